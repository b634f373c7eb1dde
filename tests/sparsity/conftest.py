"""Tiny Transformers of four families with ReLU in the MLP, each with a batch and a loss; built anew for every test."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

WIDTH, HIDDEN, LAYERS, VOCABULARY = 16, 32, 2, 23
FAMILIES = ("vit", "t5", "bert", "gpt2")


@dataclass
class Tiny:
    """A model with `blocks` MLPs on at most `tokens` positions, and a batch of B samples for it."""

    name: str
    model: nn.Module
    batch: dict[str, Tensor]
    tokens: int
    blocks: int

    def output(self, model: nn.Module | None = None) -> Tensor:
        """The logits of the batch, by this model or by another one of its kind."""
        model = self.model if model is None else model
        return model(self.batch["pixels"]) if self.name == "vit" else model(**self.batch).logits

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """The mean cross-entropy over samples (ViT) or target tokens."""
        logits = self.output(model)
        return nn.functional.cross_entropy(logits.flatten(0, -2), self.batch["labels"].flatten())

    def train(self, optimizer: torch.optim.Optimizer, steps: int = 1, model: nn.Module | None = None) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(model).backward()
            optimizer.step()


def vit() -> Tiny:
    """Pre-LN, 3 × 3 patches and a class token; one label per image."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=12, patch_size=4, in_chans=1, num_classes=5, embed_dim=WIDTH, depth=LAYERS,
                              num_heads=2, mlp_ratio=HIDDEN / WIDTH, act_layer=nn.ReLU)  # fmt: skip
    batch = {"pixels": torch.randn(4, 1, 12, 12), "labels": torch.randint(5, (4,))}
    return Tiny("vit", model, batch, tokens=10, blocks=LAYERS)


def t5(dropout: float = 0.0) -> Tiny:
    """RMSNorm, encoder and decoder; 7 tokens in, 5 out."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=HIDDEN, num_layers=LAYERS, num_heads=2,
                      dropout_rate=dropout, feed_forward_proj="relu", decoder_start_token_id=0)  # fmt: skip
    batch = {"input_ids": torch.randint(2, VOCABULARY, (4, 7)), "labels": torch.randint(2, VOCABULARY, (4, 5))}
    return Tiny("t5", T5ForConditionalGeneration(config), batch, tokens=512, blocks=2 * LAYERS)


def bert() -> Tiny:
    """Post-LN; 6 tokens, a target for each."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
                        num_attention_heads=2, max_position_embeddings=12, hidden_act="relu",
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    ids = torch.randint(2, VOCABULARY, (4, 6))
    return Tiny("bert", BertForMaskedLM(config), {"input_ids": ids, "labels": ids.flip(1)}, tokens=12, blocks=LAYERS)


def gpt2() -> Tiny:
    """Pre-LN, causal; 6 tokens, the next one's target for each."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=16,
                        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=0, eos_token_id=1, pad_token_id=1)  # fmt: skip
    ids = torch.randint(2, VOCABULARY, (4, 6))
    return Tiny(
        "gpt2", GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids.roll(-1, 1)}, tokens=16, blocks=LAYERS
    )


@pytest.fixture
def build() -> Callable[..., Tiny]:
    """Builds a family by its name: build("t5", dropout=0.1); always the same weights and batch."""

    def build(name: str, **options: float) -> Tiny:
        torch.manual_seed(0)
        return {"vit": vit, "t5": t5, "bert": bert, "gpt2": gpt2}[name](**options)

    return build


@pytest.fixture(params=FAMILIES)
def tiny(request, build) -> Tiny:
    """Each family in turn, in training mode and without dropout."""
    return build(request.param)
