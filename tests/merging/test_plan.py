"""The plan: which tensors belong together, how they are stored, what is kept, and what is refused."""

import math
import re

import pytest
import torch
from models_on_disk import experts_of, in_memory, models, plan_of, saved, state_of, weights

from merging.checkpoints import open_checkpoint
from merging.command.main import main, merge
from merging.command.plan import make_plan
from merging.command.recipe import Recipe


def layouts(plan):
    return {step.name: step.layout for step in plan.steps}


def test_transposed_storage_shows_in_the_bias_and_in_names(tmp_path):
    base = {
        "h.0.c_fc.weight": torch.ones(4, 6), "h.0.c_fc.bias": torch.ones(6),
        "h.0.mlp.c_proj.weight": torch.ones(6, 4), "h.0.mlp.c_proj.bias": torch.ones(4),
        "h.0.attn.c_proj.weight": torch.ones(4, 4), "h.0.attn.c_proj.bias": torch.ones(4),
        "attn.in_proj_weight": torch.ones(12, 4), "attn.in_proj_bias": torch.ones(12),
        "visual.proj": torch.ones(4, 3), "text_projection": torch.ones(4, 3), "q_proj.weight": torch.ones(4, 3),
        "wte.weight": torch.ones(9, 4), "conv.weight": torch.ones(4, 3, 2, 2), "conv1d.weight": torch.ones(6, 5, 3),
        "experts.gate_up": torch.ones(2, 4, 6), "experts.gate_up_bias": torch.ones(2, 6),
        "moe.down": torch.ones(2, 3, 4), "pos": torch.ones(1, 5, 4), "norm.weight": torch.ones(4),
    }  # fmt: skip
    found = layouts(plan_of(tmp_path, base, experts_of(base)))
    conv1d = {"h.0.c_fc.weight", "h.0.mlp.c_proj.weight", "h.0.attn.c_proj.weight"}
    of = {layout: {name for name in found if found[name] == layout} for layout in found.values()}
    assert of["transposed"] == conv1d | {"visual.proj", "text_projection"}
    assert of["kernel"] == {"conv.weight", "conv1d.weight", "pos"}
    assert found["experts.gate_up"] == "transposed stack" and found["moe.down"] == "stack"
    assert found["q_proj.weight"] == found["attn.in_proj_weight"] == found["wte.weight"] == "matrix"


def test_square_linear_layers_are_matrices(tmp_path):
    base = state_of(up=(6, 4), q=(4, 4)) | {"up.bias": torch.ones(6), "q.bias": torch.ones(4)}
    assert set(layouts(plan_of(tmp_path, base, experts_of(base))).values()) == {"matrix", "vector"}


def test_vocabularies_of_different_size_share_their_first_rows(tmp_path):
    base = state_of(embed=(10, 4), head=(10, 4), bias=(10,), mlp=(4, 4))
    longer, shorter = experts_of(base, 2)
    for name in ("embed.weight", "head.weight", "bias.weight"):
        longer[name] = torch.cat([longer[name], torch.full((3, *longer[name].shape[1:]), 9.0)])
        shorter[name] = shorter[name][:8]
    where = saved(tmp_path / "base", base, vocab_size=10)
    nested = {"text_config": {"vocab_size": 8}}
    others = saved(tmp_path / "e0", longer, vocab_size=13), saved(tmp_path / "e1", shorter, **nested)
    recipe = Recipe(where, others, "weight_average")
    merge(recipe, tmp_path / "out")
    found = weights(tmp_path / "out")
    assert torch.equal(found["embed.weight"][8:], base["embed.weight"][8:])
    common = [{n: t[:8] if "mlp" not in n else t for n, t in state.items()} for state in (base, longer, shorter)]
    expected = in_memory(common[0], common[1:], "weight_average")
    assert all(torch.equal(found[n][:8], expected[n][:8]) for n in found)
    plan = make_plan(recipe, open_checkpoint(where), [open_checkpoint(other) for other in others])
    rows = "10 / 13 / 8 rows (base / experts): the first 8 are merged; rows 8 to 9 are the base's"
    assert f"'embed.weight': {rows}" in plan.notes
    with pytest.raises(ValueError, match=r"--strict: 'bias\.weight': 10 / 13 / 8 rows .*\(and 2 more\)"):
        merge(Recipe(where, others, "weight_average", strict=True), tmp_path / "strict")
    saved(tmp_path / "e0", longer, vocab_size=99)
    with pytest.raises(ValueError, match=r"e0/model\.safetensors: 'bias\.weight': shape \[13\], and \[10\]"):
        merge(recipe, tmp_path / "refused")


def test_tied_tensors_stay_tied(tmp_path):
    base = state_of(embedding=(10, 4), mlp=(6, 4))
    experts = experts_of(base)
    for state in (base, *experts):
        state["zhead.weight"] = state["embedding.weight"].clone()
    where, others = models(tmp_path, base, experts)
    for method, svc in (("dare", False), ("task_arithmetic", True)):  # masks and SVC go by names
        merge(Recipe(where, others, method, svc=svc), tmp_path / method)
        found = weights(tmp_path / method)
        assert torch.equal(found["embedding.weight"], found["zhead.weight"])
    experts[0]["zhead.weight"] = experts[0]["zhead.weight"] + 1
    plan = plan_of(tmp_path, base, experts)
    assert not plan.notes and not plan.remarks


def test_a_tied_copy_that_one_side_does_not_store_is_found(tmp_path):
    base = state_of(embed=(10, 4), mlp=(6, 4))
    experts = experts_of(base, 2)
    copied = [state | {"head.weight": state["embed.weight"].clone()} for state in (base, *experts)]
    plan = plan_of(tmp_path, base, copied[1:], strict=True)  # experts store the copy, the base does not
    assert [note.split(": ", 1)[1][:26] for note in plan.remarks] == ["'head.weight': a tied copy"] * 2
    plan = plan_of(tmp_path, copied[0], experts)  # the base stores the copy, experts do not
    head = next(step for step in plan.steps if step.name == "head.weight")
    assert [entry.name for entry in head.experts] == ["embed.weight"] * 2
    assert plan.remarks == ["'head.weight': tied to 'embed.weight'; both are merged as 'embed.weight'"]


def test_prefixes_are_bridged_and_heads_are_reported(tmp_path):
    base = state_of(**{"layer.0": (4, 4), "layer.1": (4, 4), "pooler": (4, 4)})
    first, second = experts_of(base, 2)
    first, second = ({f"bert.{n}": t for n, t in state.items() if n != "pooler.weight"} for state in (first, second))
    first["classifier.weight"] = torch.ones(2, 4)
    plan = plan_of(tmp_path, base, [first, second])
    assert [step.name for step in plan.steps if step.experts] == ["layer.0.weight", "layer.1.weight"]
    assert any("e0: 'classifier.weight' (20.00% of its bytes): not in" in note for note in plan.notes)
    assert any("'pooler.weight': in no expert; the base's value is kept" in note for note in plan.notes)
    with pytest.raises(ValueError, match="--strict: "):
        plan_of(tmp_path, base, [first, second], strict=True)
    longer = {f"model.{name}": tensor for name, tensor in base.items()}
    plan = plan_of(tmp_path, longer, experts_of(base, 2))
    assert len([step for step in plan.steps if step.experts]) == 3 and not plan.notes


def test_integers_are_kept_if_they_agree_or_count(tmp_path):
    base = state_of() | {"ids": torch.arange(5), "batches": torch.tensor(7)}
    experts = [state | {"batches": torch.tensor(9)} for state in experts_of(base, 2)]
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, "ties"), tmp_path / "out")
    found = weights(tmp_path / "out")
    assert torch.equal(found["ids"], base["ids"]) and found["batches"] == 7
    experts[1]["ids"] = torch.arange(5) + 1
    models(tmp_path, base, experts)
    with pytest.raises(ValueError, match=r"e1/model\.safetensors: 'ids': torch\.int64 and different from the base's"):
        merge(Recipe(where, others, "ties"), tmp_path / "again")
    merge(Recipe(where, others, "ties", set=("ids:merge=false",)), tmp_path / "again")
    assert torch.equal(weights(tmp_path / "again")["ids"], base["ids"])


def _without(name):
    return lambda base, experts: experts[1].pop(name)


def _with(name, tensor):
    return lambda base, experts: experts[1].__setitem__(name, tensor)


@pytest.mark.parametrize("spoil, message", [
    (_without("mlp.weight"), r"base: 'mlp\.weight' \(28\.83% of its bytes\): not in \S*e1; the base's value"),
    (_with("mlp.weight", torch.ones(12, 9)), r"e1/model\.safetensors: 'mlp\.weight': shape \[12, 9\], and \[12, 8\]"),
    (_with("mlp.weight", torch.ones(12, 8).int()), r"e1/model\.safetensors: 'mlp\.weight': torch\.int32, and"),
    (_with("mlp.weight", torch.ones(12, 8).to(torch.float8_e4m3fn)), r"'mlp\.weight': stored as torch\.float8_e4m3fn"),
    (_with("mlp.weight", torch.full((12, 8), math.nan)), r"e1/model\.safetensors: 'mlp\.weight': 96 entries are NaN"),
    (lambda base, experts: experts.__setitem__(1, {"x": torch.ones(2)}), "e1: shares no tensor name with"),
])  # fmt: skip
def test_what_cannot_be_merged_is_named_in_one_line(tmp_path, spoil, message, capsys):
    base = state_of()
    experts = experts_of(base, 2)
    spoil(base, experts)
    where, others = models(tmp_path, base, experts)
    assert main(["--base", where, "--experts", *others, "--method", "ties", "--out", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m merging: ")]
    assert len(said) == 1 and re.search(message, said[0])
    assert not (tmp_path / "out").exists()


BUFFERS = {
    "embeddings.position_ids": torch.arange(6)[None], "rotary_emb.inv_freq": torch.rand(4), "steps": torch.tensor(3),
    "attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(), "attn.masked_bias": torch.tensor(-1e4),
}  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_what_is_no_parameter_may_be_absent_from_some_models(tmp_path, name, capsys):
    base = state_of(layer=(64, 64)) | {name: BUFFERS[name]}
    experts = experts_of(base, 2)
    experts[1].pop(name)
    where, others = models(tmp_path, base, experts)
    command = ["--base", where, "--experts", *others, "--method", "weight_average", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert repr(name) in said and "the base's value is kept" in said
    found = weights(tmp_path / "out")
    assert torch.equal(found[name], BUFFERS[name])
    assert torch.allclose(
        found["layer.weight"], (experts[0]["layer.weight"] + experts[1]["layer.weight"]) / 2, atol=1e-6
    )
