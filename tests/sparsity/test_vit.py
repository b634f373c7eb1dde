"""The ViT starts as the protocol says, and is the Transformer that its docstring describes."""

import pytest
import torch
import torch.nn.functional as F

from sparsity.studies.models.vit import vit

SMALL = dict(pixels=8, patch=2, channels=1, width=16, depth=2, heads=2, classes=10)


def by_hand(model, images):
    """The class-token model from its own tensors: pre-norm attention and ReLU MLPs."""
    tokens = model.patch_embed.proj(images).flatten(2).transpose(1, 2)  # (B, T, d)
    tokens = torch.cat([model.cls_token.expand(len(images), -1, -1), tokens], 1) + model.pos_embed
    for block in model.blocks:
        x = F.layer_norm(tokens, (16,), block.norm1.weight, block.norm1.bias, 1e-6)
        query, key, value = F.linear(x, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, -1)
        heads = []
        for q, k, v in zip(query.split(8, -1), key.split(8, -1), value.split(8, -1), strict=True):
            heads.append((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v)
        tokens = tokens + block.attn.proj(torch.cat(heads, -1))
        x = F.layer_norm(tokens, (16,), block.norm2.weight, block.norm2.bias, 1e-6)
        tokens = tokens + block.mlp.fc2(block.mlp.fc1(x).relu())
    return model.head(F.layer_norm(tokens, (16,), model.norm.weight, model.norm.bias, 1e-6)[:, 0])


def test_it_is_a_pre_norm_relu_transformer():
    model = vit(**SMALL).train()  # dropout 0: training mode changes nothing
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model(images), by_hand(model, images))


def test_average_pooling_has_no_class_token_and_pools_every_patch():
    model = vit(**SMALL, pooling="avg")
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(3, 1, 8, 8)
    tokens = model.blocks(model.patch_embed(images) + model.pos_embed)
    assert model.cls_token is None and tokens.shape == (3, 16, 16)
    torch.testing.assert_close(model(images), model.head(model.fc_norm(tokens.mean(1))))


def test_it_starts_as_the_protocol_says():
    torch.manual_seed(0)
    model = vit(pixels=32, patch=4, width=128, depth=2, heads=4).requires_grad_(False)
    for block in model.blocks:
        for linear in (block.mlp.fc1, block.mlp.fc2):
            bound = (6 / (128 + 512)) ** 0.5  # xavier-uniform
            assert linear.weight.abs().max() <= bound and linear.weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
            assert linear.bias.std() == pytest.approx(1e-6, rel=0.2)
        bound = (6 / (128 + 3 * 128)) ** 0.5
        assert block.attn.qkv.weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not block.attn.qkv.bias.any() and not block.attn.proj.bias.any()
        assert block.norm2.eps == block.norm1.eps == 1e-6
    assert model.pos_embed.std() == pytest.approx(0.02, rel=0.05)
    assert not model.cls_token.any() and not model.head.weight.any() and not model.head.bias.any()
    assert all(dropout.p == 0 for dropout in model.modules() if isinstance(dropout, torch.nn.Dropout))


def test_the_default_is_vit_b_16():
    with torch.device("meta"):
        model = vit()
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656  # torchvision's vit_b_16
    assert model.pos_embed.shape == (1, 197, 768)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "patch must divide the image side 8, got 3"),
        ({"heads": 3}, "heads must divide width 16, got 3"),
        ({"pooling": "map"}, "pooling must be token or avg, got 'map'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        vit(**SMALL | change)
