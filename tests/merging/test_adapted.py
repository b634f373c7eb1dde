"""Adapters: what is trained, that nothing changes at first, and that peft reads back and folds what was written."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from common.models.t5 import t5
from merging.suites.models.adapted import adapt, save

RANK, WIDTH, HIDDEN, LAYERS, VOCABULARY = 3, 16, 40, 2, 50


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=HIDDEN, max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    sizes = dict(vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=16)
    return GPT2Model(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def small_t5() -> nn.Module:
    return t5(VOCABULARY, WIDTH, LAYERS, heads=2, d_ff=HIDDEN)


def logits(model: nn.Module) -> torch.Tensor:
    """What a model makes of two fixed rows of tokens."""
    tokens = torch.arange(12).view(2, 6) + 3
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :3]
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def trained(make: Callable[[], nn.Module], kind: str) -> nn.Module:
    """An adapter whose parameters are as far from their start as training could bring them."""
    adapted = adapt(build(make), kind, RANK)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    return adapted


MAKERS = {"bert": bert, "gpt2": gpt2, "t5": small_t5}
ENDS = {  # of the names of what is trained in every layer; BERT's attention.output.dense is not
    ("bert", "lora"): ("self.query", "self.value"),
    ("bert", "ia3"): ("self.key", "self.value", "0.output.dense", "1.output.dense"),
    ("gpt2", "lora"): ("attn.c_attn",),
    ("gpt2", "ia3"): ("attn.c_attn", "mlp.c_proj"),
    ("t5", "lora"): ("Attention.q", "Attention.v"),
    ("t5", "ia3"): ("Attention.k", "Attention.v", "DenseReluDense.wo"),
}
CASES = list(ENDS)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_only_the_adapters_of_the_named_modules_are_trained(name, kind):
    base = build(MAKERS[name])
    expected = {module for module, _ in base.named_modules() if module.endswith(ENDS[name, kind])}
    names = [key for key, parameter in adapt(base, kind, RANK).named_parameters() if parameter.requires_grad]
    assert all(key.startswith("base_model.model.") for key in names)
    assert {re.split(r"\.(?:lora_[AB]|ia3_l)\.", key.removeprefix("base_model.model."))[0] for key in names} == expected


def test_the_number_of_trained_parameters():
    def count(kind, make):
        return sum(value.numel() for value in adapt(make(), kind, RANK).parameters() if value.requires_grad)

    assert count("lora", bert) == LAYERS * 2 * RANK * 2 * WIDTH
    assert count("ia3", bert) == LAYERS * (2 * WIDTH + HIDDEN)
    assert count("lora", gpt2) == LAYERS * RANK * (WIDTH + 3 * WIDTH)
    assert count("ia3", gpt2) == LAYERS * (3 * WIDTH + HIDDEN)
    assert count("lora", small_t5) == LAYERS * 3 * 2 * RANK * 2 * WIDTH
    assert count("ia3", small_t5) == LAYERS * (3 * 2 * WIDTH + 2 * HIDDEN)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_untrained_adapter_changes_nothing_and_a_trained_one_something(name, kind):
    base = logits(build(MAKERS[name]))
    torch.testing.assert_close(logits(adapt(build(MAKERS[name]), kind, RANK)), base)
    assert (logits(trained(MAKERS[name], kind)) - base).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_saved_comes_back_on_a_fresh_base_and_folds_into_it(name, kind, tmp_path):
    from peft import PeftModel

    adapted = trained(MAKERS[name], kind)
    expected = logits(adapted)
    save(adapted, tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.glob("adapter/*")}
    loaded = PeftModel.from_pretrained(build(MAKERS[name]), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    folded = loaded.merge_and_unload()
    assert folded.state_dict().keys() == build(MAKERS[name]).state_dict().keys()
    # two roundings of one product; the adapter itself moves logits by more than 1e-2 (the test above)
    torch.testing.assert_close(logits(folded), expected, rtol=1e-3, atol=1e-4)


def test_lora_is_two_b_a_and_its_start_follows_torchs_generator():
    base = build(bert)
    adapted = trained(bert, "lora")
    parameters = dict(adapted.named_parameters())
    module = "encoder.layer.1.attention.self.value"
    a, b = (parameters[f"base_model.model.{module}.lora_{factor}.default.weight"] for factor in "AB")
    assert (a.shape, b.shape) == ((RANK, WIDTH), (WIDTH, RANK))
    expected = base.get_submodule(module).weight + 2 * b @ a
    folded = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(folded.get_submodule(module).weight, expected)
    again = dict(trained(bert, "lora").named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in parameters.items())


def test_a_t5_with_an_adapter_generates():
    tokens = torch.arange(12).view(2, 6) + 3
    base = build(small_t5).generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
    adapted = adapt(build(small_t5), "lora", RANK).eval()
    assert torch.equal(adapted.generate(input_ids=tokens, max_new_tokens=3, do_sample=False), base)


@pytest.mark.parametrize(
    ("make", "kind", "rank", "message"),
    [
        (bert, "loha", 3, "unknown kind of adapter 'loha'; there are lora and ia3"),
        (bert, "lora", 0, "rank must be at least 1, got 0"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "lora", 3, "Sequential has no module named query"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "ia3", 3, "Sequential has no module named key"),
    ],
)
def test_bad_arguments_are_named(make, kind, rank, message):
    with pytest.raises(ValueError, match=message):
        adapt(make(), kind, rank)
