"""A tiny CLIP (open_clip's own class) that sees glyphs and reads their Unicode names."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import glyphs

CONTEXT = 12


def tiny_clip(width: int) -> nn.Module:
    """Build an untrained CLIP: an image side of 4 layers and this width on 24 × 24 pixels, and a small text side.

    Raises:
        ValueError: width is not a multiple of 32, the width of a head.
    """
    import open_clip  # late: --help needs no seconds of it

    if width % 32:
        raise ValueError(f"width must be a multiple of 32 (the width of a head), got {width}")
    vision = dict(image_size=glyphs.PIXELS, patch_size=8, width=width, layers=4, head_width=32)
    text = dict(context_length=CONTEXT, vocab_size=len(_vocabulary()) + 3, width=64, heads=2, layers=1)
    return open_clip.CLIP(embed_dim=width, vision_cfg=vision, text_cfg=text, init_logit_scale=torch.tensor(14.0).log())


def tokens(names: Sequence[str]) -> Tensor:
    """Return token ids (N, 12) of Unicode names, one per word; end-of-text is the largest id, where CLIP pools."""
    vocabulary = _vocabulary()
    ids = torch.zeros(len(names), CONTEXT, dtype=torch.long)
    start, end = len(vocabulary) + 1, len(vocabulary) + 2
    for row, name in enumerate(names):
        line = [start, *(vocabulary[word] for word in _words(name)[: CONTEXT - 2]), end]
        ids[row, : len(line)] = torch.tensor(line)
    return ids


@torch.no_grad()
def zero_shot_head(clip: nn.Module, names: Sequence[str]) -> Tensor:
    """Return the frozen head (C, embed): the unit text features of the class names, times the base's logit scale."""
    clip.eval()
    return F.normalize(clip.encode_text(tokens(names)), dim=-1) * clip.logit_scale.exp()


def _vocabulary() -> dict[str, int]:
    words = sorted({word for task in glyphs.TASKS for name in glyphs.class_names(task) for word in _words(name)})
    return {word: index for index, word in enumerate(words, start=1)}


def _words(name: str) -> list[str]:
    return name.replace("-", " ").split()
