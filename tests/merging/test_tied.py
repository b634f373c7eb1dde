"""A tied output head that was trained apart is written, the configuration unties it, and the output loads equal."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers as t
from models_on_disk import weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from merging.command.main import merge
from merging.command.recipe import Recipe

TEXT = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=40,
)  # fmt: skip
TOKENS = torch.arange(12)[None]


def tied_llama(folder):
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**TEXT, tie_word_embeddings=True))
    model.save_pretrained(folder)
    assert "lm_head.weight" not in weights(folder)
    return model


def perturbed(model, seed, of=lambda name: True):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if of(name):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def expert(folder, seed, tied):
    """A model fine-tuned from the tied base, its head by itself or still tied."""
    torch.manual_seed(0)
    model = t.LlamaForCausalLM.from_pretrained(folder.parent / "base", tie_word_embeddings=tied)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
    perturbed(model, seed).save_pretrained(folder)
    return model


def merged(tmp_path, experts, **options):
    recipe = Recipe(
        str(tmp_path / "base"), tuple(map(str, experts)), options.pop("method", "weight_average"), **options
    )
    merge(recipe, tmp_path / "out")
    loaded, info = t.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return loaded


@pytest.mark.parametrize("tied", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("strict", [True, False])
def test_full_experts_that_untied_their_head(tmp_path, tied, strict):
    tied_llama(tmp_path / "base")
    experts = [expert(tmp_path / f"e{index}", index + 1, each) for index, each in enumerate(tied)]
    loaded = merged(tmp_path, [tmp_path / "e0", tmp_path / "e1"], strict=strict)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    states = [each.state_dict() for each in experts]
    for name, tensor in loaded.state_dict().items():
        assert torch.allclose(tensor, (states[0][name] + states[1][name]) / 2, atol=1e-6), name
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert "'lm_head.weight': tied in base, and trained apart" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_stores_the_copy_is_untied_too(tmp_path):
    model = tied_llama(tmp_path / "base")
    state = {**weights(tmp_path / "base"), "lm_head.weight": model.lm_head.weight.detach().clone()}
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    experts = [expert(tmp_path / f"e{index}", index + 1, False) for index in range(2)]
    loaded = merged(tmp_path, [tmp_path / "e0", tmp_path / "e1"])
    assert not loaded.config.tie_word_embeddings
    head = (experts[0].lm_head.weight + experts[1].lm_head.weight) / 2
    assert torch.allclose(loaded.lm_head.weight, head, atol=1e-6)


def test_experts_that_are_still_tied_leave_the_base_tied(tmp_path):
    tied_llama(tmp_path / "base")
    for index in range(2):
        expert(tmp_path / f"e{index}", index + 1, True)
    loaded = merged(tmp_path, [tmp_path / "e0", tmp_path / "e1"])
    assert loaded.config.tie_word_embeddings and "lm_head.weight" not in weights(tmp_path / "out")


def adapter(folder, seed, **config):
    base = t.LlamaForCausalLM.from_pretrained(folder.parent / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **config))
    perturbed(model, seed, of=lambda name: "lora_" in name or "modules_to_save" in name).save_pretrained(folder)
    return folder


def by_peft(tmp_path, folder):
    """The base with an adapter folded in by peft itself."""
    base = t.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    return PeftModel.from_pretrained(base, folder).merge_and_unload()


@pytest.mark.parametrize("svc", [False, True])
def test_an_adapter_with_its_own_embedding_and_head_is_folded_as_peft_does(tmp_path, svc):
    tied_llama(tmp_path / "base")
    folder = adapter(tmp_path / "e0", 1, modules_to_save=["embed_tokens", "lm_head"])
    loaded, expected = merged(tmp_path, [folder], svc=svc), by_peft(tmp_path, folder)
    assert not torch.equal(expected.lm_head.weight, expected.model.embed_tokens.weight)
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS).logits, expected(TOKENS).logits, atol=1e-5)


def test_of_two_adapters_one_leaves_the_head_alone(tmp_path):
    base = tied_llama(tmp_path / "base")
    folders = adapter(tmp_path / "e0", 1, modules_to_save=["embed_tokens", "lm_head"]), adapter(tmp_path / "e1", 2)
    loaded, first = merged(tmp_path, folders, strict=True), by_peft(tmp_path, folders[0])
    for name in ("lm_head", "model.embed_tokens"):
        own, other = first.get_submodule(name).weight, base.get_submodule(name).weight
        assert torch.allclose(loaded.get_submodule(name).weight, (own + other) / 2, atol=1e-6)


T5 = dict(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0)
WITH_TIES = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**TEXT, tie_word_embeddings=True), "q_proj"),
    "t5": (t.T5ForConditionalGeneration, t.T5Config(**T5), "q"),
    "t5, unscaled": (t.T5ForConditionalGeneration, t.T5Config(**T5, tie_word_embeddings=False), "q"),
    "mt5": (t.MT5ForConditionalGeneration, t.MT5Config(**T5), "q"),
    "umt5": (t.UMT5ForConditionalGeneration, t.UMT5Config(**T5), "q"),
    "switch": (t.SwitchTransformersForConditionalGeneration, t.SwitchTransformersConfig(**T5), "q"),
}
OF_HEADS = [
    dict(modules_to_save=["lm_head"]),
    dict(target_modules=["lm_head"]),
    dict(target_modules=["lm_head"], ensure_weight_tying=True),
    dict(target_modules=["embed_tokens", "lm_head"]),
    dict(modules_to_save=["embed_tokens"]),
    dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
]
CASES = [("llama", config) for config in OF_HEADS] + [(name, config) for name in WITH_TIES for config in OF_HEADS[:2]]


def logits(model):
    words = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(TOKENS, **words).logits


@pytest.mark.parametrize("name, config", CASES, ids=lambda each: str(each))
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_one_of_two_tied_tensors_is_what_was_trained(tmp_path, name, config):
    """peft folds LoRA of either into both; what is expected is the model with its adapter beside it."""
    kind, configuration, target = WITH_TIES[name]
    torch.manual_seed(0)
    kind(configuration).save_pretrained(tmp_path / "base")
    facts = json.loads((tmp_path / "base" / "config.json").read_text())
    facts.pop("scale_decoder_outputs", None) if name == "t5" else None  # as files of older versions
    (tmp_path / "base" / "config.json").write_text(json.dumps(facts))
    targets = LoraConfig(r=2, **{**config, "target_modules": [target, *config.get("target_modules", ())]})
    model = get_peft_model(kind.from_pretrained(tmp_path / "base"), targets)
    perturbed(model, 1, of=lambda name: "lora_" in name or "modules_to_save" in name).save_pretrained(tmp_path / "e0")
    merge(Recipe(str(tmp_path / "base"), (str(tmp_path / "e0"),), "weight_average"), tmp_path / "out")
    loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = logits(PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "e0"))
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(kind.from_pretrained(tmp_path / "base")), atol=1e-2)


def test_lora_of_the_embedding_leaves_the_head_tied_as_where_peft_folds_it_and_says_so(tmp_path, capsys):
    tied_llama(tmp_path / "base")
    base = t.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    perturbed(model, 1, of=lambda name: "lora_" in name).save_pretrained(tmp_path / "e0", save_embedding_layers=True)
    loaded, expected = merged(tmp_path, [tmp_path / "e0"]), by_peft(tmp_path, tmp_path / "e0")
    assert loaded.config.tie_word_embeddings and torch.allclose(logits(loaded), logits(expected), atol=1e-5)
    assert "adapted, and tied to the head, which changes with it" in capsys.readouterr().err


def test_an_embedding_and_head_that_were_trained_as_one_stay_tied(tmp_path):
    tied_llama(tmp_path / "base")
    folder = adapter(tmp_path / "e0", 1, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    loaded = merged(tmp_path, [folder])
    assert loaded.config.tie_word_embeddings and "lm_head.weight" not in weights(tmp_path / "out")


@pytest.mark.parametrize("kind, lost", [(t.LlamaForSequenceClassification, False), (t.LlamaForCausalLM, True)])
def test_an_adapter_holds_a_head_that_the_base_lacks(tmp_path, kind, lost):
    torch.manual_seed(0)
    whole = kind(t.LlamaConfig(**TEXT, num_labels=3))
    whole.model.save_pretrained(tmp_path / "base")
    module = "lm_head" if lost else "score"
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module])
    trained = perturbed(get_peft_model(whole, config), 1, of=lambda name: "lora_" in name or "modules_to_save" in name)
    trained.save_pretrained(tmp_path / "e0")
    recipe = Recipe(str(tmp_path / "base"), (str(tmp_path / "e0"),), "weight_average")
    if lost:
        with pytest.raises(ValueError, match=r"e0: '\S*lm_head\.weight' \(.*not in \S*base; left out .*--partial"):
            merge(recipe, tmp_path / "out")
        recipe = replace(recipe, partial=True)
    merge(recipe, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(rf"{module}\.weight' \(\d+\.\d\d% of its bytes\): not in base; left out", card)
