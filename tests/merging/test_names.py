"""Names and layouts: experts that store their tensors otherwise than the base are merged as transformers loads them."""

import re
import sys

import pytest
import torch
import transformers as t
from models_on_disk import saved, weights
from safetensors.torch import load_file, save_file

from merging.checkpoints import open_checkpoint
from merging.command.main import merge
from merging.command.names import best_prefix
from merging.command.plan import make_plan
from merging.command.recipe import Recipe
from merging.views import joined, part, renamed, transposed

TEXT = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=40,
)  # fmt: skip
EXPERTS = TEXT | dict(moe_intermediate_size=12, shared_expert_intermediate_size=20, head_dim=8, num_experts_per_tok=2)
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8)


def deepseek():
    latent = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    experts = dict(n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1)
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**EXPERTS | latent | experts))


MIXTURES = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**EXPERTS, num_experts=4)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**EXPERTS, num_experts=4)),
    "deepseek": deepseek,
}


def fine_tuned(model, seed, size=0.1):
    """A copy of a model with other weights."""
    other, generator = type(model)(model.config), torch.Generator().manual_seed(seed)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for value in other.parameters():
            value.add_(size * torch.randn(value.shape, generator=generator))
    return other


def mean_of(models):
    states = [model.state_dict() for model in models]
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def merged_and_loaded(tmp_path, kind, base, experts, **options):
    """The model that transformers loads from a merge, nothing of it missing or left over."""
    recipe = Recipe(str(base), tuple(map(str, experts)), options.pop("method", "weight_average"), **options)
    merge(recipe, tmp_path / "out")
    loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return loaded.state_dict()


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].float(), tensor.float(), atol=tolerance), name


def rewritten(folder, rename):
    """Store a model's tensors under other names."""
    (path,) = folder.glob("*.safetensors")
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


# Views ----------------------------------------------------------------------------------------------------------------


def test_views_read_what_slices_and_concatenations_of_the_tensors_hold(tmp_path):
    state = {"a": torch.randn(4, 6, 5), "b": torch.randn(3, 5), "c": torch.randn(2, 5)}
    entries = open_checkpoint(saved(tmp_path, state)).entries
    own = [part(entries["a"], f"a{index}", index * 15, (3, 5)) for index in range(8)]
    cases = [
        (renamed(entries["b"], "x"), state["b"]),
        (own[3], state["a"].reshape(8, 3, 5)[3]),
        (part(own[3], "rows", 5, (2, 5)), state["a"].reshape(8, 3, 5)[3, 1:]),
        (joined([entries["b"], own[1], entries["c"]], "x", (8, 5)),
         torch.cat([state["b"], state["a"][0, 3:], state["c"]])),
        (joined(own[2:6], "x", (2, 6, 5)), state["a"][1:3]),
        (joined(own[::-1], "x", (8, 3, 5)), state["a"].reshape(8, 3, 5).flip(0)),
        (transposed(entries["a"], "x"), state["a"].transpose(1, 2)),
        (transposed(entries["b"], "x"), state["b"].T),
        (transposed(transposed(entries["b"], "y"), "x"), state["b"]),
    ]  # fmt: skip
    for view, expected in cases:
        assert view.shape == expected.shape and view.count == expected.numel() and str(tmp_path) in view.where
        flat = expected.reshape(-1)
        for start, stop in ((0, None), (0, 0), (0, 1), (7, 9), (3, len(flat)), (len(flat) - 1, len(flat))):
            assert torch.equal(view.read(start, stop), flat[start:stop])
        assert view.read(0, 2, torch.bfloat16).dtype == torch.bfloat16
    assert joined(own[2:6], "x", (2, 6, 5)).sources == (entries["a"],)  # read at once


# Mixtures of experts --------------------------------------------------------------------------------------------------


@pytest.fixture(params=list(MIXTURES))
def mixture(request, tmp_path):
    """A tiny mixture of experts and two fine-tuned ones, each saved packed ("new") and one by one ("old")."""
    torch.manual_seed(0)
    base = MIXTURES[request.param]()
    models = [base, fine_tuned(base, 1), fine_tuned(base, 2)]
    for name, model in zip(("base", "e0", "e1"), models, strict=True):
        model.save_pretrained(tmp_path / "old" / name, save_original_format=True)
        model.save_pretrained(tmp_path / "new" / name, save_original_format=False)
    assert weights(tmp_path / "old" / "base").keys() != weights(tmp_path / "new" / "base").keys()
    return models


def test_experts_of_a_mixture_are_merged_in_either_layout(tmp_path, mixture):
    expected = mean_of(mixture[1:])
    for base, first, second in (("old", "new", "new"), ("new", "old", "old"), ("new", "new", "old")):
        folders = tmp_path / base / "base", [tmp_path / first / "e0", tmp_path / second / "e1"]
        (tmp_path / f"{base} {first} {second}").mkdir()
        found = merged_and_loaded(tmp_path / f"{base} {first} {second}", type(mixture[0]), *folders)
        assert_same(found, expected)
        written = weights(tmp_path / f"{base} {first} {second}" / "out")
        assert written.keys() == weights(tmp_path / base / "base").keys()  # the base's layout


@pytest.mark.parametrize("method, svc", [("task_arithmetic", True), ("iso_c", False), ("dare", False), ("ties", False)])
def test_packed_experts_are_merged_matrix_by_matrix_as_those_that_are_stored_one_by_one(tmp_path, mixture, method, svc):
    if method == "dare" and isinstance(mixture[0], t.MixtralForCausalLM):
        pytest.skip("random masks go by the base's names, and Mixtral's files call its router otherwise")
    found = {}
    for layout in ("old", "new"):
        folder, out = tmp_path / layout, tmp_path / f"of {layout}"
        out.mkdir()
        folders = folder / "base", [folder / "e0", folder / "e1"]
        found[layout] = merged_and_loaded(out, type(mixture[0]), *folders, method=method, svc=svc)
    assert_same(found["new"], found["old"])
    base = mixture[0].state_dict()
    packed = [name for name in base if "experts" in name and base[name].ndim == 3]
    assert packed and all(not torch.allclose(found["new"][name], base[name]) for name in packed)


def test_a_pattern_of_packed_experts_is_refused_with_the_tensor_that_packs_them(tmp_path):
    model = MIXTURES["qwen3_moe"]()
    for name in ("base", "expert"):
        model.save_pretrained(tmp_path / name, save_original_format=False)
    text = "*layers.0.mlp.experts.1.up_proj*:scale=0.1"
    recipe = Recipe(str(tmp_path / "base"), (str(tmp_path / "expert"),), "task_arithmetic", set=(text,))
    message = r"matches no tensor of .*base itself, but a part of 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"
    with pytest.raises(ValueError, match=message):
        merge(recipe, tmp_path / "out")


def test_packed_vision_language_experts_are_merged_where_they_are_stored_transposed(tmp_path):
    torch.manual_seed(0)
    text = EXPERTS | dict(num_experts=4, rope_scaling={"mrope_section": [2, 1, 1], "rope_type": "default"})
    vision = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=16, patch_size=4)
    vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=4)
    model = t.Qwen3VLMoeForConditionalGeneration(t.Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    experts = [fine_tuned(model, 1), fine_tuned(model, 2)]
    for name, each in zip(("base", "e0", "e1"), (model, *experts), strict=True):
        each.save_pretrained(tmp_path / name)
    (path,) = (tmp_path / "base").glob("*.safetensors")
    state = {n: v.mT.contiguous() if "mlp.experts" in n else v for n, v in load_file(path).items()}
    assert any("mlp.experts" in name for name in state)
    save_file(state, path, {"format": "pt"})  # as on the hub: (experts, in, out)
    found = merged_and_loaded(tmp_path, type(model), tmp_path / "base", [tmp_path / "e0", tmp_path / "e1"])
    assert_same(found, mean_of(experts))
    written = weights(tmp_path / "out")
    assert all(written[name].shape == tensor.shape for name, tensor in state.items())


# Renamed tensors ------------------------------------------------------------------------------------------------------


def old_norms(name):
    """As bert-base-uncased is stored on the hub."""
    return re.sub("LayerNorm.bias$", "LayerNorm.beta", re.sub("LayerNorm.weight$", "LayerNorm.gamma", name))


def compiled(name):
    return f"_orig_mod.{name}"


def sharded(name):
    return "module." + re.sub(r"layer\.(\d+)\.", r"layer.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name)


@pytest.mark.parametrize("config", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize("of_base, of_experts", [
    (old_norms, str), (str, old_norms), (str, compiled), (compiled, str), (str, sharded), (old_norms, sharded),
    (sharded, compiled), (str, lambda name: f"model.encoder.{name}"),
])  # fmt: skip
def test_norms_of_old_files_and_wrapped_models_are_merged(tmp_path, of_base, of_experts, config):
    torch.manual_seed(0)
    base = t.BertModel(t.BertConfig(**TEXT))
    models = [base, fine_tuned(base, 1), fine_tuned(base, 2)]
    folders = [tmp_path / name for name in ("base", "e0", "e1")]
    for folder, model, rename in zip(folders, models, (of_base, of_experts, of_experts), strict=True):
        model.save_pretrained(folder)
        rewritten(folder, rename)
        if not config:
            (folder / "config.json").unlink()
    recipe = Recipe(str(folders[0]), tuple(map(str, folders[1:])), "weight_average", strict=True)
    merge(recipe, tmp_path / "out")
    expected = {of_base(name): tensor for name, tensor in mean_of(models[1:]).items()}
    assert_same(weights(tmp_path / "out"), expected)


def test_a_base_without_head_and_experts_with_another_prefix_and_old_norms_share_all_else(tmp_path):
    torch.manual_seed(0)
    expert = t.BertForSequenceClassification(t.BertConfig(**TEXT))
    experts = [fine_tuned(expert, 1), fine_tuned(expert, 2)]
    expert.bert.save_pretrained(tmp_path / "base")
    rewritten(tmp_path / "base", old_norms)
    for index, each in enumerate(experts):
        each.save_pretrained(tmp_path / f"e{index}")
    found = merged_and_loaded(tmp_path, t.BertModel, tmp_path / "base", [tmp_path / "e0", tmp_path / "e1"])
    assert_same(found, mean_of([each.bert for each in experts]))


def llava():
    text = t.LlamaConfig(**TEXT)
    vision = t.CLIPVisionConfig(**VISION, patch_size=4)
    return t.LlavaForConditionalGeneration(t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39))


def qwen_vl():
    vision = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=16, patch_size=4)
    text = TEXT | dict(rope_scaling={"mrope_section": [2, 1, 1], "rope_type": "default"})
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]})
    return t.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("make", [llava, qwen_vl])
@pytest.mark.parametrize("of_base", [True, False], ids=["old base", "new base"])
def test_vision_language_models_in_the_layouts_before_and_since_transformers_5(tmp_path, make, of_base):
    torch.manual_seed(0)
    base = make()
    experts = [fine_tuned(base, 1), fine_tuned(base, 2)]
    base.save_pretrained(tmp_path / "base", save_original_format=of_base)
    for index, expert in enumerate(experts):
        expert.save_pretrained(tmp_path / f"e{index}", save_original_format=not of_base)
    assert weights(tmp_path / "base").keys() != weights(tmp_path / "e0").keys()
    found = merged_and_loaded(tmp_path, type(base), tmp_path / "base", [tmp_path / "e0", tmp_path / "e1"])
    assert_same(found, mean_of(experts))


@pytest.mark.parametrize("old", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("make, text", [(llava, t.LlamaForCausalLM), (qwen_vl, t.Qwen2ForCausalLM)])
def test_the_text_of_vision_language_experts_is_merged_into_a_text_model(tmp_path, make, text, old):
    torch.manual_seed(0)
    whole = make()
    experts = [fine_tuned(whole, 1), fine_tuned(whole, 2)]
    kind = t.LlamaConfig if text is t.LlamaForCausalLM else t.Qwen2Config
    base = text(kind(**TEXT))
    base.save_pretrained(tmp_path / "base")
    for index, expert in enumerate(experts):
        expert.save_pretrained(tmp_path / f"e{index}", save_original_format=old)
    folders = tmp_path / "base", [tmp_path / "e0", tmp_path / "e1"]
    with pytest.raises(ValueError, match=r"e0: .*\d% of its bytes\): not in .*; --partial merges the rest"):
        merged_and_loaded(tmp_path, text, *folders)
    found = merged_and_loaded(tmp_path, text, *folders, partial=True)
    state = mean_of(experts)
    expected = {name.replace("model.", "model.language_model.", 1): name for name in found}
    assert_same(found, {name: state[long] for long, name in expected.items()})


def test_prefixes_never_renumber_layers_nor_take_a_tensor_twice():
    ours = [f"model.layers.{index}.w" for index in range(4)] + ["head"]
    theirs = [f"model.text.layers.{index}.w" for index in range(2)] + ["model.text.head", "head"]
    found = best_prefix(ours, theirs)
    assert found == {f"model.layers.{index}.w": f"model.text.layers.{index}.w" for index in range(2)} | {"head": "head"}
    assert best_prefix(["layers.1.w", "layers.2.w"], ["layers.2.w", "layers.3.w"]) == {"layers.2.w": "layers.2.w"}


def test_a_class_that_transformers_does_not_know_is_matched_by_names_alone(tmp_path):
    state = {"layers.0.w": torch.ones(3, 3), "layers.0.LayerNorm.gamma": torch.ones(3)}
    config = dict(model_type="of_my_own", architectures=["Mine"])
    base, expert = saved(tmp_path / "base", state, **config), saved(tmp_path / "e0", state, **config)
    rewritten(tmp_path / "e0", old_norms)
    plan = make_plan(Recipe(base, (expert,), "weight_average"), open_checkpoint(base), [open_checkpoint(expert)])
    assert all(step.change for step in plan.steps) and not plan.notes


def test_a_version_of_transformers_without_tables_matches_names_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    state = {f"layers.{index}.LayerNorm.weight": torch.ones(9) for index in range(3)} | {"layers.0.w": torch.ones(9, 9)}
    base, expert = saved(tmp_path / "base", state), saved(tmp_path / "e0", state)
    rewritten(tmp_path / "e0", lambda name: f"module.{name}")
    plan = make_plan(Recipe(base, (expert,), "weight_average"), open_checkpoint(base), [open_checkpoint(expert)])
    assert all(step.change for step in plan.steps)
    rewritten(tmp_path / "e0", old_norms)
    with pytest.raises(ValueError, match=r"LayerNorm.*the same tensors under names or in a layout that no rule"):
        make_plan(Recipe(base, (expert,), "weight_average"), open_checkpoint(base), [open_checkpoint(expert)])
