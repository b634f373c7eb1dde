"""Vision Transformers from scratch, as the papers train them: timm's class with ReLU MLPs and torchvision's start."""

from functools import partial
from typing import Literal

import torch
from torch import nn


def vit(
    pixels: int = 224,
    patch: int = 16,
    channels: int = 3,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    mlp_ratio: int = 4,
    classes: int = 1000,
    pooling: Literal["token", "avg"] = "token",
) -> nn.Module:
    """Build an untrained pre-norm ViT with ReLU in its MLPs and no dropout; the defaults are ViT-B/16.

    It starts as torchvision's ViT does (protocol of arXiv 2605.25612): MLP weights xavier-uniform and their biases
    N(0, 1e-6²), joint projection of queries, keys and values xavier-uniform, patch kernel truncated N(0, 1/fan-in),
    positions N(0, .02²); class token, head and all other biases zero. Draws come from torch's global generator.

    Args:
        pixels: image side; (pixels / patch)² patches are the tokens.
        patch: side of a patch.
        channels: of the images.
        width: of the residual stream, d.
        depth: number of layers.
        heads: attention heads per layer.
        mlp_ratio: d_ff / d.
        classes: outputs.
        pooling: "token" adds a class token, whose final state is classified; "avg" classifies the mean of all tokens.

    Returns:
        A model that maps images (B, channels, pixels, pixels) to logits (B, classes).

    Raises:
        ValueError: the patch does not divide the image, the heads do not divide the width, or the pooling is unknown.
    """
    from timm.models.vision_transformer import VisionTransformer  # late: --help needs no seconds of it

    if pixels % patch:
        raise ValueError(f"patch must divide the image side {pixels}, got {patch}")
    if width % heads:
        raise ValueError(f"heads must divide width {width}, got {heads}")
    if pooling not in ("token", "avg"):
        raise ValueError(f"pooling must be token or avg, got {pooling!r}")
    model = VisionTransformer(
        img_size=pixels, patch_size=patch, in_chans=channels, num_classes=classes, global_pool=pooling,
        embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp_ratio, class_token=pooling == "token",
        norm_layer=partial(nn.LayerNorm, eps=1e-6), act_layer=nn.ReLU, weight_init="skip",
    )  # fmt: skip
    _start(model)
    return model


@torch.no_grad()
def _start(model: nn.Module) -> None:
    kernel = model.patch_embed.proj
    nn.init.trunc_normal_(kernel.weight, std=kernel.weight[0].numel() ** -0.5)
    nn.init.zeros_(kernel.bias)
    nn.init.normal_(model.pos_embed, std=0.02)
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    for block in model.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)  # one (3d, d) matrix, as torch's attention holds it
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)  # its weight keeps the start of nn.Linear
        for linear in (block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
