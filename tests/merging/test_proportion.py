"""What has no partner: heads are noted, more than that is refused in one line, or merged where it is asked for."""

import re

import pytest
import torch
import transformers as t
from models_on_disk import experts_of, models, saved, weights

from merging.checkpoints import open_checkpoint
from merging.command.main import main, merge
from merging.command.plan import make_plan
from merging.command.recipe import Recipe

TEXT = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=40,
)  # fmt: skip


def plan_of(base, *experts, **options):
    recipe = Recipe(str(base), tuple(map(str, experts)), "weight_average", **options)
    return make_plan(recipe, open_checkpoint(base), [open_checkpoint(expert) for expert in experts])


def llama(folder, seed=0, kind=t.LlamaForCausalLM, **config):
    torch.manual_seed(seed)
    kind(t.LlamaConfig(**TEXT | config)).save_pretrained(folder)
    return folder


def gemma(folder):
    torch.manual_seed(1)
    t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT, head_dim=8)).save_pretrained(folder)
    return folder


def deeper(folder):
    return llama(folder, 1, num_hidden_layers=4)


def renamed(folder):
    """As a file of another program calls the tensors of its layers."""
    state = weights(llama(folder / "own", 1))
    saved(folder, {name.replace("self_attn", "attention").replace("_proj", ""): t for name, t in state.items()})
    return folder


def with_tower(folder):
    state = weights(llama(folder / "own", 1))
    saved(folder, state | {f"visual.blocks.{index}.w": torch.randn(30, 30) for index in range(2)})
    return folder


@pytest.mark.parametrize("base, expert, reason", [
    (llama, gemma, r"another architecture \(llama against gemma3_text\)"),
    (llama, deeper, "another number of layers"),
    (deeper, llama, "another number of layers"),
    (llama, renamed, "the same tensors under names or in a layout that no rule knows"),
    (renamed, llama, "the same tensors under names or in a layout that no rule knows"),
    (llama, with_tower, "modules that only one of them has"),
    (with_tower, llama, "modules that only one of them has"),
])  # fmt: skip
def test_little_in_common_is_refused_in_one_line_and_merged_with_partial(tmp_path, base, expert, reason, capsys):
    where, other = base(tmp_path / "base"), expert(tmp_path / "e0")
    flags = ["--base", str(where), "--experts", str(other), str(other), "--method", "weight_average"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m merging: ")]
    assert re.search(rf"\d tensors, \d+\.\d\d% of its bytes.*{reason}[^()]*\); --partial merges the rest$", said)
    assert not (tmp_path / "out").exists()
    assert main([*flags, "--partial", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "in no expert" not in said  # what is kept is told once
    notes = [line for line in said.splitlines() if reason.replace("\\", "") in line]
    assert len(notes) == 2 and all(re.search(r"left out|the base's value is kept", note) for note in notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert reason.replace("\\", "") in card and "partial: true" in (tmp_path / "out" / "merging.yaml").read_text()
    found, own, theirs = weights(tmp_path / "out"), weights(where), weights(other)
    assert found.keys() == own.keys()
    for name in found:
        assert torch.allclose(found[name], theirs[name] if name in theirs else own[name], atol=1e-6)


def test_one_expert_of_another_depth_keeps_the_layers_of_the_base_where_that_is_asked_for(tmp_path):
    base = llama(tmp_path / "base", num_hidden_layers=4)
    experts = llama(tmp_path / "e0", 1, num_hidden_layers=4), llama(tmp_path / "e1", 2)
    with pytest.raises(ValueError, match=r"base: .*: not in \S*e1; the base's .*another number of layers"):
        plan_of(base, *experts)
    merge(Recipe(str(base), tuple(map(str, experts)), "weight_average", partial=True), tmp_path / "out")
    found, own, first, second = map(weights, (tmp_path / "out", base, *experts))
    for name, tensor in found.items():
        expected = (first[name] + second[name]) / 2 if name in second else own[name]
        assert torch.allclose(tensor, expected, atol=1e-6)


def of_bert(kind, folder, seed, **config):
    torch.manual_seed(seed)
    kind(t.BertConfig(**TEXT, **config)).save_pretrained(folder)
    return folder


HEADS = [
    (t.BertModel, t.BertForSequenceClassification, {"classifier"}, set()),
    (t.BertForMaskedLM, t.BertForSequenceClassification, {"classifier", "pooler"}, {"predictions"}),
    (t.BertForMaskedLM, t.BertForTokenClassification, {"classifier"}, {"predictions"}),
    (t.BertModel, t.BertForQuestionAnswering, {"qa_outputs"}, {"pooler"}),
    (t.BertForSequenceClassification, t.BertForQuestionAnswering, {"qa_outputs"}, {"classifier", "pooler"}),
    (t.BertForSequenceClassification, t.BertModel, set(), {"classifier"}),
]


@pytest.mark.parametrize(
    "kind, of_experts, left, kept", HEADS, ids=[f"{a.__name__}-{b.__name__}" for a, b, *_ in HEADS]
)
def test_other_heads_are_noted_and_the_body_is_merged(tmp_path, kind, of_experts, left, kept):
    base = of_bert(kind, tmp_path / "base", 0)
    experts = [of_bert(of_experts, tmp_path / f"e{index}", index + 1) for index in range(2)]
    plan = plan_of(base, *experts)
    unmerged = {step.name for step in plan.steps if not step.change}
    assert {word for word in kept if any(word in name for name in unmerged)} == kept
    assert all(any(word in name for word in kept) for name in unmerged)
    assert all(any(word in note for note in plan.notes) for word in left | kept)
    assert len(plan.notes) == 2 * bool(left) + bool(kept)  # a line for each expert, and one for the base


def test_reward_models_on_a_language_model_keep_its_untied_head(tmp_path):
    kind = t.LlamaForSequenceClassification
    experts = [llama(tmp_path / f"e{index}", index + 1, kind, num_labels=1) for index in range(2)]
    plan = plan_of(llama(tmp_path / "base"), *experts)
    assert [step.name for step in plan.steps if not step.change] == ["lm_head.weight"]


def test_a_left_out_head_as_large_as_the_embedding_is_no_small_matter(tmp_path):
    base = {"embed.weight": torch.randn(40, 4), **{f"layers.{i}.w": torch.randn(4, 4) for i in range(9)}}
    experts = [state | {"head.weight": torch.randn(40, 4)} for state in experts_of(base, 2)]
    where, others = models(tmp_path, base, experts)
    with pytest.raises(ValueError, match=r"e0: 'head\.weight' \(\d+\.\d+% of its bytes\): not in \S*base; left out"):
        plan_of(where, *others)


def test_a_buffer_that_some_experts_lack_keeps_the_value_of_the_base_and_a_trained_tensor_is_refused(tmp_path):
    base = {"embed.weight": torch.randn(40, 4), "layers.0.w": torch.randn(64, 64)}
    buffers = {"position_ids": torch.arange(9)[None], "layers.0.inv_freq": torch.rand(8), "pooler.w": torch.rand(4, 4)}
    first, second = experts_of(base, 2)
    where, others = models(tmp_path, base | buffers, [first | buffers, second])
    plan = plan_of(where, *others)
    assert {step.name for step in plan.steps if not step.change} == buffers.keys()
    models(tmp_path, base | buffers, [first | buffers | {"pooler.w": torch.zeros(4, 4)}, second])
    with pytest.raises(ValueError, match=r"e1: lacks 'pooler\.w', which other experts have; --set 'pooler\.w:merge"):
        plan_of(where, *others)
    plan = plan_of(where, *others, set=("pooler.w:merge=false",))
    assert not next(step for step in plan.steps if step.name == "pooler.w").change


@pytest.mark.parametrize("holder", ["base", "expert"])
@pytest.mark.parametrize("name, buffer", [
    ("h.{}.attn.bias", torch.ones(1, 1, 64, 64).tril()),  # as GPT-2's first checkpoints have it, most of a small model
    ("h.{}.attn.bias", torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()),
    ("h.{}.attn.masked_bias", torch.tensor(-1e4)),
    ("h.{}.attn.rotary_emb.inv_freq", torch.ones(4096)),
    ("h.{}.position_ids", torch.arange(4096)),
])  # fmt: skip
def test_what_is_no_parameter_does_not_count(tmp_path, holder, name, buffer):
    torch.manual_seed(0)
    plain = {f"h.{index}.mlp.weight": torch.randn(8, 8) for index in range(2)} | {"wte.weight": torch.randn(10, 8)}
    full = plain | {name.format(index): buffer.clone() for index in range(2)}
    base, expert = (full, plain) if holder == "base" else (plain, full)
    saved(tmp_path / "base", base)
    saved(tmp_path / "expert", {key: value + value if value.ndim == 2 else value for key, value in expert.items()})
    merge(Recipe(str(tmp_path / "base"), (str(tmp_path / "expert"),) * 2, "weight_average"), tmp_path / "out")
    merged = weights(tmp_path / "out")
    assert merged.keys() == base.keys()
    for key, value in base.items():
        torch.testing.assert_close(merged[key], value + value if value.ndim == 2 else value)
