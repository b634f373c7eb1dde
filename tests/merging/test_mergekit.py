"""Recipes of mergekit: what they mean is computed entry by entry after mergekit's formulas, with nothing of ours."""

import itertools
import math

import pytest
import torch
import yaml
from models_on_disk import models, state_of, weights

from merging.command.flags import parse
from merging.command.main import main, merge
from merging.command.mergekit import read_mergekit
from merging.command.recipe import read_recipe

LAYERS = 4


def llama(seed=0):
    shapes = {"model.embed_tokens": (6, 4)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{part}": (4, 5) for part in ("self_attn.q_proj", "mlp.up_proj")}
    shapes |= {"model.norm": (7,), "lm_head": (6, 4)}
    return state_of(seed, **shapes)


@pytest.fixture
def folders(tmp_path):
    return models(tmp_path, llama(), [llama(1), llama(2), llama(3)])


def written(tmp_path, method, base, listed, parameters=None, **more):
    text = dict(merge_method=method, models=[dict(model=model, parameters=own) for model, own in listed])
    text |= ({"base_model": base} if base else {}) | ({"parameters": parameters} if parameters else {}) | more
    path = tmp_path / "mergekit.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


# mergekit's meaning, naively ------------------------------------------------------------------------------------------


def value(setting, name):
    """A setting at a tensor: a number, a gradient over the layers, or the first filter that fits."""
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for one in setting:
            if one.get("filter", "*") == "*" or one["filter"] in name:
                return value(one["value"], name)
        return None
    if not isinstance(setting, list):
        return setting
    t = int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0
    place = t * (len(setting) - 1)
    low, high = math.floor(place), math.ceil(place)
    return setting[low] + (place - low) * (setting[high] - setting[low])


def parameter(name, key, own, shared, default=None):
    for settings in (own, shared):
        if key in settings and (found := value(settings[key], name)) is not None:
            return found
    return default


def trimmed(update, density):
    """The ⌊density · d⌋ largest entries; the next one too, which is where implementations differ."""
    order = update.abs().flatten().sort(descending=True).values
    limit = order[min(max(1, int(density * update.numel())), len(order) - 1)] if density < 1 else 0
    return update.where(update.abs() >= limit, 0)


def expected(method, states, listed, shared, name, normalize):
    base, *experts = (state[name].double() for state in states)
    if method == "linear":
        factors = [parameter(name, "weight", own, shared) for own in listed]
        total = sum(w * state for w, state in zip(factors, (base, *experts), strict=True))
        return total / sum(factors) if normalize else total
    updates, factors = [], []
    for own, expert in zip(listed, experts, strict=True):
        update = expert - base
        if method == "ties":
            update = trimmed(update, parameter(name, "density", own, shared, 1.0))
        factors.append(parameter(name, "weight", own, shared))
        updates.append(factors[-1] * update)
    merged = torch.zeros_like(base).flatten()
    for place, column in enumerate(zip(*(update.flatten().tolist() for update in updates), strict=True)):
        agree = [True] * len(column)
        if method in ("ties", "dare_ties"):
            sign = 1 if sum(column) >= 0 else -1
            agree = [entry * sign > 0 for entry in column]
        divisor = sum(w for w, yes in zip(factors, agree, strict=True) if yes) or 1
        merged[place] = sum(entry for entry, yes in zip(column, agree, strict=True) if yes) / (
            divisor if normalize else 1
        )
    return base + float(parameter(name, "lambda", {}, shared, 1.0)) * merged.reshape(base.shape)


SETTINGS = {
    "numbers": ([{"weight": 1.0}, {"weight": 0.5}, {"weight": 0.3}], {}),
    "negative": ([{"weight": 1.0}, {"weight": -0.5}, {"weight": 0.25}], {"lambda": 0.7}),
    "of all": ([{}, {"weight": 0.5}, {}], {"weight": 2, "density": 0.6, "lambda": "5e-1"}),
    "gradients": ([{"weight": [0, 0.5, 1]}, {"weight": [1, 0.2]}, {"weight": 0.1}], {"lambda": [0.2, 0.6]}),
    "filters": (
        [
            {"weight": [{"filter": "mlp", "value": 0.5}, {"filter": "layers.1", "value": 3}, {"value": 1}]},
            {"weight": [{"filter": "self_attn", "value": [0.1, 0.9]}], "density": [{"filter": "mlp", "value": 0.3}]},
            {"weight": {"value": 0.2}},
        ],
        {
            "weight": 0.7,
            "density": [{"filter": "embed", "value": 0.5}, {"value": 0.9}],
            "lambda": [{"filter": "mlp", "value": 2}],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False, None])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_a_recipe_means_what_mergekit_computes(tmp_path, folders, method, settings, normalize):
    base, others = folders
    states = [llama(seed) for seed in range(4)]
    listed, shared = SETTINGS[settings]
    if method.startswith("dare"):  # nothing random
        listed = [{key: own for key, own in each.items() if key == "weight"} for each in listed]
        shared = {key: own for key, own in shared.items() if key != "density"}
    if method == "linear":
        listed, others = [{"weight": 0.4}, *listed], (base, *others)
        shared = {key: own for key, own in shared.items() if key != "lambda"}
        if normalize is False:
            listed = [{"weight": w} for w in (0.4, 1.1, -0.2, -0.3)]  # of sum 1
    parameters = shared | ({} if normalize is None else {"normalize": normalize})
    path = written(tmp_path, method, base, list(zip(others, listed, strict=True)), parameters)
    assert main(["--mergekit", str(path), "--out", str(tmp_path / "out")]) == 0
    default = method in ("linear", "ties")
    for name, found in weights(tmp_path / "out").items():
        exact = expected(method, states, listed, shared, name, default if normalize is None else normalize)
        assert torch.allclose(found.double(), exact, atol=1e-5), name
    again = read_recipe(tmp_path / "out" / "merging.yaml")
    merge(again, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("method, rescale", [*itertools.product(("dare_linear", "dare_ties"), (None, True, False))])
def test_dare_keeps_the_density_and_the_values_of_mergekit(tmp_path, method, rescale):
    base, expert = {"w": torch.zeros(200, 100)}, {"w": torch.randint(1, 5, (200, 100)).float()}
    where, others = models(tmp_path, base, [expert, expert])
    shared = {} if rescale is None else {"rescale": rescale}
    listed = [(others[0], {"weight": 1.0, "density": 0.3}), (others[1], {"weight": 0.0})]
    path = written(tmp_path, method, where, listed, shared, dtype="float32")
    assert main(["--mergekit", str(path), "--out", str(tmp_path / "out")]) == 0
    found = weights(tmp_path / "out")["w"]
    kept = found != 0
    assert abs(kept.float().mean() - 0.3) < 0.02
    factor = 1 if rescale is False else 1 / 0.3
    assert torch.allclose(found[kept], factor * expert["w"][kept])


def test_without_a_base_the_first_model_is_it_and_one_listed_is_no_expert(tmp_path, folders):
    base, others = folders
    path = written(tmp_path, "linear", None, [(base, {"weight": 1}), (others[0], {"weight": 3})])
    recipe, _ = read_mergekit(path)
    assert (recipe.base, recipe.experts, recipe.weights) == (base, (base, others[0]), (1.0, 3.0))
    path = written(tmp_path, "ties", base, [(base, {}), (others[0], {"weight": 3})])
    recipe, _ = read_mergekit(path)
    assert (recipe.base, recipe.experts, recipe.weights) == (base, (others[0],), (3.0,))


def test_what_has_no_effect_is_noted_and_the_dtype_is_that_of_the_output(tmp_path, folders, capsys):
    base, others = folders
    shared = {"int8_mask": True, "density": 0.5}
    path = written(
        tmp_path, "task_arithmetic", base, [(others[0], {"weight": 1})], shared, dtype="float32", out_dtype="bfloat16",
        tokenizer_source="base",
    )  # fmt: skip
    assert main(["--mergekit", str(path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "note:" in said and "int8_mask: has no effect" in said and "density: has no effect" in said
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    flags = parse(["--mergekit", str(path), "--svc", "--out", "x"])
    assert flags.svc and flags.base == base and flags.dtype == "bfloat16"


def change(**changes):
    return lambda text: text | changes


def of_first(**changes):
    return lambda text: text | {"models": [text["models"][0] | changes, *text["models"][1:]]}


@pytest.mark.parametrize("spoil, message", [
    (change(merge_method="slerp"), "merge_method: 'slerp' has no counterpart here; these have: linear"),
    (change(merge_method=["ties"]), "merge_method: .* has no counterpart"),
    (change(slices=[]), "slices: is not supported"),
    (change(modules={}), "modules: is not supported"),
    (change(tokenizer={"source": "union"}), "tokenizer: is not supported"),
    (change(tokenizer_source="union"), "tokenizer_source: 'union' is not supported"),
    (change(chat_template="auto"), "chat_template: is not supported"),
    (change(base_model=None), "base_model: ties needs one"),
    (change(base_model=3), "base_model: must be a path"),
    (change(dtype=16), "dtype: must be the name of a dtype"),
    (change(models=None), "models: must be a list"),
    (change(models=[3]), r"models\[0\]: must be a mapping"),
    (change(parameters=[1]), "parameters: must be a mapping"),
    (change(parameters={"t": 0.5}), "parameters.t: is not supported; supported are normalize"),
    (change(parameters={"rescale": True}), "parameters.rescale: true is not supported for ties"),
    (change(parameters={"normalize": [{"value": 1}]}), "parameters.normalize: must be true or false"),
    (change(parameters={"lambda": "much"}), "parameters.lambda: 'much' is no number"),
    (of_first(weight=1), r"models\[0\].weight: is not supported"),
    (of_first(model="me/m+me/lora"), r"models\[0\].model: 'me/m\+me/lora': a model with an adapter"),
    (of_first(model="me/m@main"), r"models\[0\].model: 'me/m@main': a model with an adapter or a revision"),
    (of_first(model={"model": {"path": "x", "revision": "y"}}), r"models\[0\].model: must be a path"),
    (of_first(parameters={"gamma": 0.1}), r"models\[0\].parameters.gamma: is not supported"),
    (of_first(parameters={"lambda": 0.1}), r"models\[0\].parameters.lambda: is one for all models"),
    (of_first(parameters={}), "weight: has no value"),
    (of_first(parameters={"weight": [{"filter": "mlp", "value": 1}]}), "weight: has no value for tensors"),
    (of_first(parameters={"weight": [{"filter": "mlp", "valu": 1}]}), "weight.valu: is not supported"),
    (of_first(parameters={"weight": True}), "weight: True is no number"),
    (of_first(parameters={"weight": []}), r"weight: \[\] is no number"),
])  # fmt: skip
def test_keys_without_a_meaning_here_are_refused_by_name(tmp_path, folders, spoil, message):
    base, others = folders
    text = dict(merge_method="ties", base_model=base, models=[dict(model=m, parameters={"weight": 1}) for m in others])
    path = tmp_path / "mergekit.yaml"
    path.write_text(yaml.safe_dump(spoil(text)))
    with pytest.raises(ValueError, match=rf"mergekit.yaml: .*{message}") as refused:
        read_mergekit(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "base: x\nmethod: ties\n"])
def test_what_is_no_recipe_of_mergekit_is_said(tmp_path, text, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert main(["--mergekit", str(path), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert str(path) in said and said.count("\n") == 1


def test_linear_refuses_what_would_scale_the_base(tmp_path, folders):
    base, others = folders
    listed = [(base, {"weight": 0.5}), (others[0], {"weight": 1.0})]
    with pytest.raises(ValueError, match=r"parameters.normalize: false, with weights that do not sum to 1"):
        read_mergekit(written(tmp_path, "linear", base, listed, {"normalize": False}))
    with pytest.raises(ValueError, match=r"base: weight: has no value"):
        read_mergekit(written(tmp_path, "linear", base, listed[1:]))


def test_relative_paths_are_looked_for_in_the_current_folder_then_in_that_of_the_recipe(folders, tmp_path, monkeypatch):
    path = written(tmp_path, "ties", "base", [(name, {"weight": 1.0}) for name in ("e0", "e1")])
    monkeypatch.chdir(tmp_path)
    assert read_mergekit(path)[0].base == "base"
    monkeypatch.chdir("/")
    assert read_mergekit(path)[0].base == folders[0]
    assert read_mergekit(path)[0].experts == tuple(folders[1][:2])
