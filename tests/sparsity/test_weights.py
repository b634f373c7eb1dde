"""Norms and traces of weights, against sums over parameters picked by hand."""

import math

import pytest
import torch
from torch import nn

from sparsity import sparsify
from sparsity.studies.weights import KINDS, key_traces, kinds_of_parameters, parameter_norms

SUFFIXES = {  # of the parameters' names, read from the models' definitions
    "vit": {
        "keys": ("mlp.fc1.weight",),
        "values": ("mlp.fc2.weight",),
        "MLP norms": ("norm2.weight",),
        "other norms": ("norm1.weight", "norm.weight"),
        "attention": ("attn.qkv.weight", "attn.proj.weight"),
        "embeddings and head": ("cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight"),
    },
    "t5": {
        "keys": ("DenseReluDense.wi.weight",),
        "values": ("DenseReluDense.wo.weight",),
        "attention": tuple(f"Attention.{part}.weight" for part in ("q", "k", "v", "o", "relative_attention_bias")),
        "embeddings and head": ("shared.weight", "lm_head.weight"),
    },
    "bert": {
        "keys": ("intermediate.dense.weight",),
        "MLP norms": ("attention.output.LayerNorm.weight",),
        "attention": ("query.weight", "key.weight", "value.weight", "attention.output.dense.weight"),
    },
    "gpt2": {
        "keys": ("mlp.c_fc.weight",),
        "values": ("mlp.c_proj.weight",),
        "MLP norms": ("ln_2.weight",),
        "other norms": ("ln_1.weight", "ln_f.weight"),
        "attention": ("attn.c_attn.weight", "attn.c_proj.weight"),
        "embeddings and head": ("wte.weight", "wpe.weight"),
    },
}


def test_kinds_are_those_that_one_picks_by_hand(tiny):
    found = kinds_of_parameters(tiny.model)
    assert list(found) == [name for name, _ in tiny.model.named_parameters()]
    for kind, suffixes in SUFFIXES[tiny.name].items():
        picked = {name for name in found if name.endswith(suffixes)}
        assert picked and {name for name, own in found.items() if own == kind} == picked


def test_norms_together_are_the_norm_of_all_parameters(tiny):
    norms = parameter_norms(tiny.model)
    assert list(norms) == [kind for kind in KINDS if kind in norms]
    every = torch.cat([parameter.detach().flatten().double() for parameter in tiny.model.parameters()])
    assert math.hypot(*norms.values()) == pytest.approx(every.norm().item(), rel=1e-12)


def test_norms_of_known_weights(build):
    model = build("vit").model
    for block in model.blocks:
        nn.init.constant_(block.mlp.fc1.weight, 0.5)
        nn.init.constant_(block.norm2.weight, -2.0)
    norms = parameter_norms(model)
    keys = [block.mlp.fc1.weight for block in model.blocks]
    assert norms["keys"] == pytest.approx(0.5 * math.sqrt(sum(key.numel() for key in keys)))
    assert norms["MLP norms"] == pytest.approx(2 * math.sqrt(sum(block.norm2.weight.numel() for block in model.blocks)))


def test_zeroth_biases_are_a_kind_of_their_own(build):
    model = sparsify(build("vit").model)
    assert parameter_norms(model)["zeroth biases"] == 0.0
    for block in model.blocks:
        nn.init.constant_(block.mlp.zeroth_bias, 0.1)
    count = sum(block.mlp.zeroth_bias.numel() for block in model.blocks)
    assert parameter_norms(model)["zeroth biases"] == pytest.approx(0.1 * math.sqrt(count))


def test_traces_are_those_of_the_products(tiny):
    found = key_traces(tiny.model)
    keys = [
        parameter.detach()
        for name, parameter in tiny.model.named_parameters()
        if name.endswith(SUFFIXES[tiny.name]["keys"])
    ]
    assert len(found) == tiny.blocks == len(keys)
    for trace, key in zip(found.values(), keys, strict=True):
        assert trace == pytest.approx(torch.trace(key @ key.T).item(), rel=1e-5)


def test_a_model_without_mlp_is_an_error():
    with pytest.raises(ValueError, match="no MLP block found in Linear"):
        parameter_norms(nn.Linear(2, 2))
