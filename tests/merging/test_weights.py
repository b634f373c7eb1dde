"""Weights of experts, values of single experts and values over layers: what they mean in memory and in the command."""

import itertools

import pytest
import torch
from models_on_disk import assert_close, content, models, saved, state_of, weights
from safetensors.torch import load_file

from merging import MERGERS, apply, calibrate, dare, task_arithmetic, task_vector, ties, weight_average, weighted
from merging.adapters import Adapter, save_adapter
from merging.checkpoints import open_checkpoint
from merging.command import changes
from merging.command.flags import parse
from merging.command.main import main, merge
from merging.command.plan import make_plan
from merging.command.recipe import Recipe
from merging.layers import depths
from merging.lowrank import LowRank

WEIGHTS = (1.0, 0.5, -2.0)


def experts_on_a_grid(base, count=3):
    """Experts whose differences from the base, and some multiples of them, are exact in float32."""
    generator = torch.Generator().manual_seed(7)
    return [
        {n: t + torch.randint(-8, 9, t.shape, generator=generator) / 8 for n, t in base.items()} for _ in range(count)
    ]


def grid(seed=0):
    return {name: (8 * tensor).round() / 8 for name, tensor in state_of(seed).items()}


def scaled_experts(base, experts, factors=WEIGHTS):
    """Experts that went w times as far from the base."""
    return [
        {name: base[name] + factor * (tensor - base[name]) for name, tensor in expert.items()}
        for expert, factor in zip(experts, factors, strict=True)
    ]


@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("range_", [changes.RANGE, 24])
@pytest.mark.parametrize("method", MERGERS)
def test_a_weight_is_the_same_as_an_expert_that_went_further(tmp_path, method, svc, range_, monkeypatch):
    monkeypatch.setattr(changes, "RANGE", range_)
    base = grid()
    experts = experts_on_a_grid(base)
    where, others = models(tmp_path, base, experts)
    _, further = models(tmp_path / "further", base, scaled_experts(base, experts))
    merge(Recipe(where, others, method, svc=svc, weights=WEIGHTS), tmp_path / "weighted")
    merge(Recipe(where, further, method, svc=svc), tmp_path / "scaled")
    assert_close(weights(tmp_path / "weighted"), weights(tmp_path / "scaled"), 1e-6)


@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("method", MERGERS)
def test_weights_of_one_change_no_byte(tmp_path, method, svc):
    base = state_of()
    where, others = models(tmp_path, base, experts_on_a_grid(base))
    merge(Recipe(where, others, method, svc=svc), tmp_path / "without")
    merge(Recipe(where, others, method, svc=svc, weights=(1.0, 1.0, 1.0)), tmp_path / "ones")
    first, second = (content(tmp_path / name)["model.safetensors"] for name in ("without", "ones"))
    assert first == second


def test_one_and_minus_one_is_the_difference_of_two_experts(tmp_path):
    base = grid()
    experts = experts_on_a_grid(base, 2)
    where, others = models(tmp_path, base, experts)
    flags = ["--base", where, "--experts", *others, "--method", "task_arithmetic", "--scale", "1"]
    assert main([*flags, "--weights", "1", "-1", "--out", str(tmp_path / "out")]) == 0
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], base[name] + experts[0][name] - experts[1][name]) for name in base)
    assert parse([*flags, "--weights", "1", "-1", "1e-1"]).weights == (1.0, -1.0, 0.1)


def test_the_library_weights_task_vectors_for_any_merger_and_for_svc():
    base = grid()
    experts = experts_on_a_grid(base)
    tasks = [task_vector(expert, base) for expert in experts]
    further = [task_vector(expert, base) for expert in scaled_experts(base, experts)]
    for ours, exact in zip(weighted(tasks, WEIGHTS), further, strict=True):
        assert all(torch.equal(ours[name], exact[name]) for name in base)
    ours, exact = (calibrate(task_arithmetic(each), each) for each in (weighted(tasks, WEIGHTS), further))
    assert all(torch.equal(ours[name], exact[name]) for name in base)
    with pytest.raises(ValueError, match="weights: 2 values for 3 experts"):
        weighted(tasks, [1, 2])


def by_entry(rule, tasks, factors, name):
    """Merge one tensor entry by entry in Python numbers: rule(values w τ, weights) for each place."""
    columns = zip(*(task[name].flatten().tolist() for task in tasks), strict=True)
    merged = [rule([w * value for w, value in zip(factors, column, strict=True)], factors) for column in columns]
    return torch.tensor(merged).reshape(tasks[0][name].shape)


def mean_of(values, factors):
    return sum(values) / sum(factors)


def elected_mean_of(values, factors):
    positive = sum(values) >= 0
    agree = [(value, w) for value, w in zip(values, factors, strict=True) if (value > 0 if positive else value < 0)]
    divisor = sum(w for _, w in agree)
    return sum(value for value, _ in agree) / (divisor or 1)


@pytest.mark.parametrize("factors", [(1.0, 0.5, 2.0), (2.0, -1.0, 1.0)])
@pytest.mark.parametrize("method, options, rule", [
    ("weight_average", {}, mean_of),
    ("dare", {"drop": 0.0}, mean_of),
    ("dare", {"drop": 0.0, "combine": "elected mean"}, elected_mean_of),
    ("ties", {"keep": 1.0}, elected_mean_of),
])  # fmt: skip
def test_normalised_means_are_divided_by_the_weights_that_count(tmp_path, method, options, rule, factors, monkeypatch):
    base = grid()
    base = {name: tensor for name, tensor in base.items() if tensor.ndim}
    experts = experts_on_a_grid(base)
    tasks = [task_vector(expert, base) for expert in experts]
    exact = {name: by_entry(rule, tasks, factors, name) for name in base}
    where, others = models(tmp_path, base, experts)
    texts = tuple(f"*:{option}={value}" for option, value in options.items())
    recipe = Recipe(where, others, method, weights=factors, normalize=True, set=texts)
    for range_, out in ((changes.RANGE, "whole"), (24, "rows")):
        monkeypatch.setattr(changes, "RANGE", range_)
        merge(recipe, tmp_path / out)
        found = weights(tmp_path / out)
        for name in base:  # entries whose sum is zero are undecided, and TIES' own rule is another than "positive"
            total = sum(w * task[name] for w, task in zip(factors, tasks, strict=True))
            decided = (total != 0) | (torch.tensor(rule is mean_of))
            difference = (found[name] - base[name] - exact[name]).abs()[decided]
            assert difference.max() < 2e-6, name
    merged = MERGERS[method](weighted(tasks, factors), weights=factors, **options)
    assert_close(apply(base, merged), weights(tmp_path / "whole"), 1e-6)


@pytest.mark.parametrize("method", [name for name, own in MERGERS.items() if not own.known(weights=0)])
def test_where_there_is_no_mean_normalising_is_refused(tmp_path, method, capsys):
    base = state_of()
    where, others = models(tmp_path, base, experts_on_a_grid(base))
    flags = ["--base", where, "--experts", *others, "--method", method, "--normalize", "--out", str(tmp_path / "out")]
    assert main(flags) == 1
    assert f"--normalize: {method} takes no mean" in capsys.readouterr().err


def kept_share(tensor):
    return float((tensor != 0).double().mean())


def test_each_expert_has_its_own_density_in_memory_and_in_ranges_of_rows(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(40, 50)}
    tasks = [{"w": torch.randn(40, 50, generator=generator)} for _ in range(2)]
    one_by_one = [ties([task], keep=keep, combine="sum")["w"] for task, keep in zip(tasks, (0.1, 0.6), strict=True)]
    assert [kept_share(tensor) for tensor in one_by_one] == pytest.approx([0.1005, 0.6005])
    signs = sum(one_by_one).sign()
    exact = sum(own.where(own.sign() == signs, 0) for own in one_by_one)
    assert torch.allclose(ties(tasks, keep=(0.1, 0.6), combine="sum")["w"], exact)
    alone = [dare([task], drop=drop, seed=3)["w"] for task, drop in zip(tasks, (0.1, 0.6), strict=True)]
    assert [round(1 - kept_share(tensor), 1) for tensor in alone] == [0.1, 0.6]
    first = (
        dare(tasks, drop=(0.1, 0.6), seed=3, combine="sum")["w"]
        - dare([tasks[0], {"w": torch.zeros(40, 50)}], drop=(0.1, 0.6), seed=3, combine="sum")["w"]
    )
    assert 0.35 < kept_share(first) < 0.45  # what is left is the second task's, of which 0.6 is dropped
    where, others = models(tmp_path, base, tasks)
    for scope, range_ in itertools.product(("layer", "global"), (changes.RANGE, 400)):
        monkeypatch.setattr(changes, "RANGE", range_)
        texts = ("*:keep[0]=0.1", "*:keep[1]=0.6", "*:combine=sum", f"*:scope={scope}")
        merge(Recipe(where, others, "ties", set=texts), tmp_path / f"{scope}{range_}")
        assert torch.allclose(weights(tmp_path / f"{scope}{range_}")["w"], exact)


def test_dare_without_rescaling_keeps_entries_as_they_are():
    task = {"w": torch.full((30, 30), 2.0)}
    assert set(dare([task], drop=0.5, rescale=False)["w"].unique().tolist()) == {0.0, 2.0}
    assert set(dare([task], drop=0.5)["w"].unique().tolist()) == {0.0, 4.0}
    assert set(dare([task] * 2, drop=0.5, combine="sum")["w"].unique().tolist()) == {0.0, 4.0, 8.0}


# Adapters -------------------------------------------------------------------------------------------------------------


def lora(folder, factors=None):
    generator = torch.Generator().manual_seed(1)
    base = {"layer.weight": torch.randn(6, 5, generator=generator)}
    where, others = saved(folder / "base", base), []
    for index in range(3):
        b, a = torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator)
        update = LowRank(b if factors is None else factors[index] * b, a)
        save_adapter(Adapter("lora", {"layer.weight": update}), folder / f"e{index}")
        others.append(str(folder / f"e{index}"))
    return where, tuple(others)


def ia3(folder, factors=None):
    generator = torch.Generator().manual_seed(1)
    base = {"layer.weight": torch.randn(6, 5, generator=generator)}
    where, others = saved(folder / "base", base), []
    for index in range(3):
        update = torch.randn(6, 1, generator=generator) * (1 if factors is None else factors[index])
        save_adapter(Adapter("ia3", vectors={"layer.weight": 1 + update}), folder / f"e{index}")
        others.append(str(folder / f"e{index}"))
    return where, tuple(others)


@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("method", ["weight_average", "task_arithmetic", "tsv_m", "ties"])
@pytest.mark.parametrize("kind", [lora, ia3])
def test_weights_of_adapters_are_those_of_their_updates(tmp_path, kind, method, svc):
    for name in ("plain", "scaled"):
        (tmp_path / name).mkdir()
    where, others = kind(tmp_path / "plain")
    _, further = kind(tmp_path / "scaled", WEIGHTS)
    merge(Recipe(where, others, method, svc=svc, weights=WEIGHTS), tmp_path / "out")
    merge(Recipe(where, further, method, svc=svc), tmp_path / "exact")
    assert_close(weights(tmp_path / "out"), weights(tmp_path / "exact"), 1e-5)


def test_an_adapter_written_from_weighted_adapters_has_their_update(tmp_path):
    where, others = lora(tmp_path)
    recipe = Recipe(where, others, "task_arithmetic", weights=WEIGHTS, output="adapter", rank=6, scale=1.0)
    merge(recipe, tmp_path / "out")
    merge(Recipe(where, others, "task_arithmetic", weights=WEIGHTS, scale=1.0), tmp_path / "folded")
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (b,), (a,) = ([t for name, t in factors.items() if part in name] for part in ("lora_B", "lora_A"))
    base = load_file(f"{where}/model.safetensors")["layer.weight"]
    assert torch.allclose(base + b @ a, weights(tmp_path / "folded")["layer.weight"], atol=1e-5)


# Over layers ----------------------------------------------------------------------------------------------------------


def layered(seed=0, layers=5):
    shapes = {"embed": (6, 4)} | {f"model.layers.{i}.{part}": (4, 4) for i in range(layers) for part in ("mlp", "attn")}
    return {f"{name}.weight": tensor for name, tensor in zip(shapes, state_of(seed, **shapes).values(), strict=True)}


@pytest.mark.parametrize("text, expected", [
    ("*.layers.*:scale=[0.2, 0.6]", [0.2, 0.3, 0.4, 0.5, 0.6]),
    ("*.layers.*:scale=[0, 0.5, 0]", [0, 0.25, 0.5, 0.25, 0]),
    ("*.layers.*:scale=[1e-1]", [0.1] * 5),
    ("*:scale=[0.2, 0.6]", [0.2, 0.3, 0.4, 0.5, 0.6]),
])  # fmt: skip
def test_a_list_is_interpolated_over_the_layers(tmp_path, text, expected):
    base, expert = layered(), layered(1)
    where, others = models(tmp_path, base, [expert])
    merge(Recipe(where, others, "task_arithmetic", scale=0.2, set=(text,)), tmp_path / "out")
    found = weights(tmp_path / "out")
    for name in base:
        scale = expected[int(name.split(".")[2])] if "layers" in name else 0.2
        assert torch.allclose(found[name], base[name] + scale * (expert[name] - base[name]), atol=1e-6), name


def test_weights_of_single_experts_may_change_over_layers(tmp_path):
    base, experts = layered(), [layered(1), layered(2)]
    where, others = models(tmp_path, base, experts)
    texts = ("*:weight[1]=[0, 1]", "*.attn.*:weight[0]=-1")
    merge(Recipe(where, others, "task_arithmetic", scale=1.0, weights=(2.0, 3.0), set=texts), tmp_path / "out")
    found = weights(tmp_path / "out")
    for name, tensor in base.items():
        second = int(name.split(".")[2]) / 4 if "layers" in name else 0
        first = -1 if "attn" in name else 2
        exact = tensor + first * (experts[0][name] - tensor) + second * (experts[1][name] - tensor)
        assert torch.allclose(found[name], exact, atol=1e-5), name


def test_layers_are_counted_by_stem_and_the_first_number_of_a_name_is_the_layer():
    names = ["a.layers.0.w", "a.layers.2.experts.7.w", "b.blocks.1.w", "b.blocks.4.w", "head.w", "c.0.w", "x1.2y.w"]
    assert depths(names) == dict(zip(names, [0, 1, 0.25, 1, 0, 1, 0], strict=True))


@pytest.mark.parametrize("text, message", [
    ("embed*:scale=[0.2, 0.6]", r"'embed\*:scale=\[0.2, 0.6\]': 'embed.weight', which it matches, has no number"),
    ("*:scale=[a, b]", "scale must be float"),
    ("*:scale=[]", "scale must be float"),
    ("*:svc=[true, false]", "svc must be bool"),
    ("*:scale[0]=0.5", "experts have no scale of their own, but weight"),
    ("*:weight[2]=0.5", "there is no expert 2, they are 0 to 1"),
    ("*:weight=nan", "weights must be finite"),
    ("*:scale=[0.1", "scale must be float"),
])  # fmt: skip
def test_values_that_have_no_meaning_are_refused(tmp_path, text, message):
    base = layered()
    where, others = models(tmp_path, base, [layered(1), layered(2)])
    with pytest.raises(ValueError, match=message) as refused:
        merge(Recipe(where, others, "task_arithmetic", set=(text,)), tmp_path / "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    ({"weights": (1.0,)}, "--weights: 1 values for 2 experts"),
    ({"weights": (1.0, float("nan"))}, "weights must be finite"),
    ({"weights": (1.0, -1.0), "normalize": True, "method": "weight_average"}, "--normalize: the weights 1.0 -1.0 sum"),
])  # fmt: skip
def test_weights_that_have_no_meaning_are_refused(tmp_path, change, message):
    base = layered()
    where, others = models(tmp_path, base, [layered(1), layered(2)])
    values = {"base": where, "experts": others, "method": "task_arithmetic"} | change
    with pytest.raises(ValueError, match=message):
        merge(Recipe(**values), tmp_path / "out")


def test_the_plan_knows_weights_for_every_step(tmp_path):
    where, others = models(tmp_path, layered(), [layered(1), layered(2)])
    recipe = Recipe(where, others, "weight_average", weights=(1.0, -1.0))
    plan = make_plan(recipe, open_checkpoint(where), [open_checkpoint(other) for other in others])
    assert {step.weights for step in plan.merged} == {(1.0, -1.0)}
    assert torch.equal(weight_average([{"w": torch.ones(2)}], weights=[0.5])["w"], torch.full((2,), 2.0))
