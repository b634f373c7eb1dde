"""Adapters in peft's format: read exactly, merged as the folded models would be, written so that peft finds its names.

The folders are written here, tensor by tensor, with the keys that peft gives them; the references are peft's formulas.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import apply, calibrate, merger, task_vector
from merging.adapters import (
    Adapter,
    extract_adapter,
    fold_adapter,
    load_adapter,
    merge_adapters,
    rename_to_base,
    save_adapter,
)
from merging.lowrank import LowRank

P = "base_model.model."
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "base", "task_type": "CAUSAL_LM"}


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(hash(size) % 1000 + 7 * seed))


def write(folder, tensors, **config):
    folder.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_base():
    return {
        "layers.0.q.weight": random(5, 4),
        "layers.0.q.bias": random(5),
        "layers.0.fc.weight": random(7, 5),
        "layers.0.norm.weight": random(5, seed=1),
        "embed.weight": random(9, 4),
        "head.weight": random(3, 5),
        "steps": torch.tensor([3]),
    }


def lora_tensors(rank=2, seed=0):
    return {
        f"{P}layers.0.q.lora_A.weight": random(rank, 4, seed=seed),
        f"{P}layers.0.q.lora_B.weight": random(5, rank, seed=seed),
        f"{P}layers.0.fc.lora_A.weight": random(rank, 5, seed=seed),
        f"{P}layers.0.fc.lora_B.weight": random(7, rank, seed=seed),
    }


def delta(tensors, module, scale):
    return scale * tensors[f"{P}{module}.lora_B.weight"] @ tensors[f"{P}{module}.lora_A.weight"]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora, scale", [(False, 3.0), (True, 6 / math.sqrt(2))])
def test_lora_is_scaled_by_alpha_over_r_or_its_root(tmp_path, rslora, scale):
    tensors = lora_tensors()
    adapter = load_adapter(write(tmp_path / "a", tensors, **LORA, use_rslora=rslora))
    assert adapter.modules.keys() == {"layers.0.q.weight", "layers.0.fc.weight"}
    close(adapter.modules["layers.0.q.weight"].dense(), delta(tensors, "layers.0.q", scale))
    base = make_base()
    folded = fold_adapter(adapter, base)
    close(folded["layers.0.fc.weight"], base["layers.0.fc.weight"] + delta(tensors, "layers.0.fc", scale))
    assert folded["embed.weight"] is base["embed.weight"] and folded.keys() == base.keys()


def test_rank_and_alpha_patterns_hold_for_their_modules_only(tmp_path):
    small, large = lora_tensors(2), lora_tensors(4)
    tensors = {key: (large if ".fc." in key else small)[key] for key in small}
    patterns = {"rank_pattern": {r"layers\.\d+\.fc": 4}, "alpha_pattern": {"q": 10, "c": 99}}
    modules = load_adapter(write(tmp_path / "a", tensors, **LORA, **patterns)).modules
    close(modules["layers.0.fc.weight"].dense(), delta(tensors, "layers.0.fc", 6 / 4))
    close(modules["layers.0.q.weight"].dense(), delta(tensors, "layers.0.q", 10 / 2))
    rooted = load_adapter(write(tmp_path / "b", tensors, **LORA, **patterns, use_rslora=True)).modules
    close(rooted["layers.0.fc.weight"].dense(), delta(tensors, "layers.0.fc", 6 / 2))


def test_transposed_weights_and_embeddings_get_the_transposed_update(tmp_path):
    tensors = lora_tensors() | {
        f"{P}embed.lora_embedding_A": random(2, 9),
        f"{P}embed.lora_embedding_B": random(4, 2),
    }
    adapter = load_adapter(write(tmp_path / "a", tensors, **LORA, fan_in_fan_out=True))
    base = make_base()
    base |= {name: base[name].T for name in ("layers.0.q.weight", "layers.0.fc.weight")}
    folded = fold_adapter(adapter, base)
    close(folded["layers.0.q.weight"], base["layers.0.q.weight"] + delta(tensors, "layers.0.q", 3).T)
    embedded = 3 * (tensors[f"{P}embed.lora_embedding_B"] @ tensors[f"{P}embed.lora_embedding_A"]).T
    close(folded["embed.weight"], base["embed.weight"] + embedded)
    with pytest.raises(ValueError, match=r"'layers.0.fc.weight': .*fan_in_fan_out"):
        fold_adapter(adapter, make_base())


def test_biases_and_whole_modules_come_with_their_values(tmp_path):
    whole = {
        f"{P}layers.0.q.base_layer.bias": random(5, seed=3),
        f"{P}layers.0.norm.bias": random(5, seed=4),
        f"{P}head.weight": random(3, 5, seed=5),
        f"{P}other.modules_to_save.bias": random(3),
        f"{P}other.original_module.bias": random(3),
    }
    adapter = load_adapter(write(tmp_path / "a", lora_tensors() | whole, **LORA, bias="all", modules_to_save=["head"]))
    assert adapter.values.keys() == {"layers.0.q.bias", "layers.0.norm.bias", "head.weight", "other.bias"}
    folded = fold_adapter(adapter, make_base())
    assert torch.equal(folded["layers.0.q.bias"], whole[f"{P}layers.0.q.base_layer.bias"])
    assert torch.equal(folded["head.weight"], whole[f"{P}head.weight"])


def test_an_old_bin_file_is_read_as_tensors_only(tmp_path):
    folder = write(tmp_path / "a", lora_tensors(), **LORA)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(lora_tensors(), folder / "adapter_model.bin")
    assert len(load_adapter(folder).modules) == 2
    torch.save({"w": tmp_path}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin: .*holds more than tensors"):
        load_adapter(folder)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "LOHA"}, "kind LOHA"),
        ({"peft_type": "LOKR"}, "kind LOKR"),
        ({"peft_type": "VERA"}, "kind VERA"),
        ({"peft_type": None}, "kind None"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "bias of lora_B"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' may change the base"),
        ({"r": 3}, "layers.0.fc.*not of rank 3"),
        ({"modules_to_save": 3}, "modules_to_save is 3, and must be a list of names"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head', and must be a list of names"),
    ],
    ids=str,
)
def test_other_kinds_are_refused_by_name(tmp_path, config, message):
    folder = write(tmp_path / "a", lora_tensors(), **(LORA | config))
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


A, B = f"{P}layers.0.q.lora_A.weight", f"{P}layers.0.q.lora_B.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        ({B: None}, "'base_model.model.layers.0.q' has lora_A.weight only"),
        ({A: torch.full((2, 4), float("nan"))}, "lora_A.weight': 8 entries are NaN"),
        ({A: torch.ones(2, 4, dtype=torch.int8)}, "dtype torch.int8"),
        ({A: torch.ones(2, 4, 3, 3)}, "convolutions"),
        ({f"{P}layers.0.q.lora_magnitude_vector": torch.ones(5)}, "lora_magnitude_vector' is no part of plain LoRA"),
        ({f"{P}embed.token_adapter.trainable_tokens_delta": torch.ones(5)}, "trainable_tokens_delta"),
        ({"stray": torch.ones(5)}, "'stray'"),
    ],
)
def test_tensors_that_do_not_belong_are_named(tmp_path, change, message):
    tensors = {key: tensor for key, tensor in (lora_tensors() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(write(tmp_path / "a", tensors, **LORA))
    assert "\n" not in str(caught.value) and "adapter_model.safetensors" in str(caught.value)


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        load_adapter(tmp_path)
    folder = write(tmp_path / "a", lora_tensors(), **LORA)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: .*truncated"):
        load_adapter(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors"):
        load_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: is no sound JSON"):
        load_adapter(folder)


# Merging: the same as merging the folded models -----------------------------------------------------------------------


def make_adapters(tmp_path):
    """Three adapters: mixed ranks and scales, one with a bias and a whole module, one that leaves a weight alone."""
    only_q = {key: tensor for key, tensor in lora_tensors(1, seed=2).items() if ".q." in key}
    whole = {f"{P}layers.0.q.base_layer.bias": random(5, seed=3), f"{P}head.weight": random(3, 5, seed=5)}
    settings = LORA | {"bias": "lora_only", "modules_to_save": ["head"]}
    return [
        load_adapter(write(tmp_path / "one", lora_tensors(), **LORA)),
        load_adapter(write(tmp_path / "two", lora_tensors(3, seed=1) | whole, **(settings | {"r": 3}))),
        load_adapter(write(tmp_path / "three", only_q, **(LORA | {"r": 1, "use_rslora": True}))),
    ]


@pytest.mark.parametrize("method", ["weight_average", "task_arithmetic", "plain_sum", "tsv_m", "star"])
@pytest.mark.parametrize("svc", [None, {}, {"alpha": 1.0, "space": "input"}], ids=str)
def test_merged_adapters_are_the_merged_folded_models(tmp_path, method, svc):
    base = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in make_base().items()}
    adapters = make_adapters(tmp_path)
    tasks = [task_vector(fold_adapter(adapter, base), base) for adapter in adapters]
    expected = merger(method)(tasks)
    expected = expected if svc is None else calibrate(expected, tasks, **svc)
    merged = merge_adapters(adapters, method, svc, base=base, final_scale=0.5)
    folded = fold_adapter(merged, base)
    for name, tensor in apply(base, expected, 0.5).items():
        close(folded[name], tensor)


def test_a_base_with_other_prefixes_is_found(tmp_path):
    adapter = make_adapters(tmp_path)[1]
    longer = {f"model.{name}": tensor for name, tensor in make_base().items()}
    assert rename_to_base(adapter, longer).modules.keys() == {"model.layers.0.q.weight", "model.layers.0.fc.weight"}
    assert rename_to_base(adapter, longer).values.keys() == {"model.layers.0.q.bias", "model.head.weight"}
    shorter = {name.removeprefix("layers."): tensor for name, tensor in make_base().items()}
    folded = fold_adapter(adapter, shorter)
    close(folded["0.q.weight"], shorter["0.q.weight"] + adapter.modules["layers.0.q.weight"].dense())
    assert torch.equal(folded["0.q.bias"], adapter.values["layers.0.q.bias"])
    merged = merge_adapters([adapter], "weight_average", base=longer)
    close(merged.values["head.weight"], adapter.values["head.weight"])
    with pytest.raises(ValueError, match=r"no tensor 'layers.0.fc.weight', nor one change of prefix"):
        fold_adapter(adapter, {"q.weight": torch.zeros(5, 4)})


def test_what_cannot_be_merged_is_refused(tmp_path):
    adapters = make_adapters(tmp_path)
    with pytest.raises(ValueError, match=r"'head.weight' is held whole by an adapter.*`base`"):
        merge_adapters(adapters, "plain_sum")
    base = make_base()
    del base["head.weight"]
    with pytest.raises(ValueError, match=r"'head.weight' is held whole, but is not in the base"):
        merge_adapters(adapters, "plain_sum", base=base)
    with pytest.raises(ValueError, match="ties looks at single entries"):
        merge_adapters(adapters[:1], "ties")
    with pytest.raises(ValueError, match="one kind, got ia3, lora"):
        merge_adapters([adapters[0], Adapter("ia3")], "plain_sum")
    with pytest.raises(ValueError, match="one kind, got none"):
        merge_adapters([], "plain_sum")
    with pytest.raises(ValueError, match="final_scale"):
        merge_adapters(adapters[:1], "plain_sum", final_scale=math.inf)


# Writing --------------------------------------------------------------------------------------------------------------


def test_a_merged_adapter_is_written_at_the_chosen_rank(tmp_path):
    adapters, base = make_adapters(tmp_path), make_base()
    merged = merge_adapters(adapters, "plain_sum", {}, base=base)
    lost = save_adapter(merged, tmp_path / "whole")
    assert max(lost.values()) < 1e-10
    again = load_adapter(tmp_path / "whole")
    for name, tensor in fold_adapter(merged, base).items():
        close(fold_adapter(again, base)[name], tensor)
    lost = save_adapter(merged, tmp_path / "rank-2", rank=2)
    for name, update in merged.modules.items():
        difference = update.dense() - load_adapter(tmp_path / "rank-2").modules[name].dense()
        energy = float(difference.square().sum() / update.dense().square().sum())
        assert lost[name] == pytest.approx(energy, rel=1e-3) and lost[name] > 1e-4
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_the_files_have_the_names_that_peft_gives_them(tmp_path):
    merged = merge_adapters(make_adapters(tmp_path), "plain_sum", base=make_base())
    save_adapter(merged, tmp_path / "m", rank=3)
    tensors = load_file(tmp_path / "m" / "adapter_model.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert shapes == {
        f"{P}layers.0.q.lora_A.weight": (3, 4),
        f"{P}layers.0.q.lora_B.weight": (5, 3),
        f"{P}layers.0.fc.lora_A.weight": (3, 5),
        f"{P}layers.0.fc.lora_B.weight": (7, 3),
        f"{P}layers.0.q.base_layer.bias": (5,),
        f"{P}head.weight": (3, 5),
    }
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    expected = {"r": 3, "lora_alpha": 3, "bias": "lora_only", "modules_to_save": ["head"], "fan_in_fan_out": False}
    assert expected.items() <= config.items()
    assert config["target_modules"] == ["layers.0.fc", "layers.0.q"] and config["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("layout", ["transposed", "embedding"])
def test_transposed_layouts_survive_a_round_trip(tmp_path, layout):
    update = LowRank(random(9, 2), random(2, 4), 1.5, layout)
    save_adapter(Adapter("lora", {"wte.weight": update}), tmp_path / "a", 2)
    again = load_adapter(tmp_path / "a").modules["wte.weight"]
    assert again.layout == layout and again.shape == (9, 4)
    close(again.dense(), update.dense())


def test_writing_refuses_what_it_would_destroy_or_cannot_express(tmp_path):
    adapter = Adapter("lora", {"a.weight": LowRank(random(3, 1), random(1, 3))})
    save_adapter(adapter, tmp_path / "a")
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_adapter(adapter, tmp_path / "a")
    mixed = Adapter("lora", {**adapter.modules, "b.weight": LowRank(random(3, 1), random(1, 3), layout="transposed")})
    with pytest.raises(ValueError, match="linear and conv1d"):
        save_adapter(mixed, tmp_path / "b")
    with pytest.raises(ValueError, match="'proj': peft adapts the weights of modules"):
        save_adapter(Adapter("lora", {"proj": adapter.modules["a.weight"]}), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_full_expert_becomes_an_adapter_and_says_what_it_loses(tmp_path):
    expert = {name: tensor for name, tensor in make_base().items() if "head" not in name} | {"proj": random(3, 3)}
    adapter, lost = extract_adapter(expert, 2, layouts={"layers.0.fc.weight": "conv1d"})
    assert adapter.modules.keys() == {"layers.0.q.weight", "layers.0.fc.weight"}
    assert adapter.modules["layers.0.fc.weight"].layout == "transposed"
    assert lost["embed.weight"] == lost["layers.0.norm.weight"] == lost["proj"] == 1 and "steps" not in lost
    for name, update in adapter.modules.items():
        difference = (expert[name] - update.dense()).square().sum() / expert[name].square().sum()
        assert lost[name] == pytest.approx(float(difference), rel=1e-4)


# IA³ ------------------------------------------------------------------------------------------------------------------


def ia3_adapter(folder, seed, **settings):
    tensors = {
        f"{P}layers.0.q.ia3_l": 1 + random(5, 1, seed=seed) / 4,
        f"{P}layers.0.fc.ia3_l": 1 + random(1, 5, seed=seed) / 4,
    }
    config = {"peft_type": "IA3", "target_modules": ["q", "fc"], "feedforward_modules": ["fc"]}
    return tensors, load_adapter(write(folder, tensors, **config, **settings))


@pytest.mark.parametrize("transposed", [False, True])
def test_ia3_multiplies_outputs_with_their_biases_and_inputs_without(tmp_path, transposed):
    tensors, adapter = ia3_adapter(tmp_path / "a", 0, fan_in_fan_out=transposed)
    base = make_base() | {"layers.0.fc.bias": random(7)}
    turn = torch.t if transposed else torch.clone
    stored = base | {name: turn(base[name]) for name in ("layers.0.q.weight", "layers.0.fc.weight")}
    folded = fold_adapter(adapter, stored)
    output, inputs = tensors[f"{P}layers.0.q.ia3_l"], tensors[f"{P}layers.0.fc.ia3_l"]
    x, hidden = random(4), random(5, seed=9)
    expected = output.flatten() * (base["layers.0.q.weight"] @ x + base["layers.0.q.bias"])
    close(turn(folded["layers.0.q.weight"]) @ x + folded["layers.0.q.bias"], expected)
    expected = base["layers.0.fc.weight"] @ (inputs.flatten() * hidden) + base["layers.0.fc.bias"]
    close(turn(folded["layers.0.fc.weight"]) @ hidden + folded["layers.0.fc.bias"], expected)


def test_svc_of_ia3_is_the_rule_for_vectors_on_what_they_add_to_one(tmp_path):
    adapters = [ia3_adapter(tmp_path / str(seed), seed)[1] for seed in range(3)]
    merged = merge_adapters(adapters, "task_arithmetic", {}, scale=0.7, final_scale=0.9)
    for name, vector in merged.vectors.items():
        updates = [adapter.vectors[name] - 1 for adapter in adapters]
        total = 0.7 * sum(updates)
        share = sum(float((total * update).sum() / update.square().sum()) for update in updates)
        gamma = len(updates) / share if share > 0 else 1
        assert vector.shape == adapters[0].vectors[name].shape
        close(vector, 1 + 0.9 * gamma * total)


@pytest.mark.parametrize("method", ["ties", "dare", "iso_c"])
def test_vectors_can_be_merged_by_every_merger(tmp_path, method):
    adapters = [ia3_adapter(tmp_path / str(seed), seed)[1] for seed in range(3)]
    del adapters[2].vectors["layers.0.q.weight"]  # left alone: no update
    merged = merge_adapters(adapters, method)
    tasks = [
        {name: (adapter.vectors.get(name, torch.ones(5)) - 1).flatten() for name in adapters[0].vectors}
        for adapter in adapters
    ]
    for name, update in merger(method)(tasks).items():
        close(merged.vectors[name].flatten(), 1 + update)


def test_ia3_survives_a_round_trip(tmp_path):
    _, adapter = ia3_adapter(tmp_path / "a", 1)
    assert save_adapter(adapter, tmp_path / "b") == {}
    again = load_adapter(tmp_path / "b")
    assert again.vectors.keys() == adapter.vectors.keys()
    assert all(torch.equal(again.vectors[name], vector) for name, vector in adapter.vectors.items())
    assert again.config["target_modules"] == ["layers.0.fc", "layers.0.q"]
    assert again.config["feedforward_modules"] == ["layers.0.fc"]
    with pytest.raises(ValueError, match=r"'layers.0.q.weight': an IA³ vector of shape \(5, 1\)"):
        fold_adapter(again, make_base() | {"layers.0.q.weight": torch.zeros(6, 4)})
