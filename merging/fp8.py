"""Weights in 8-bit floating point, float8_e4m3fn, as published checkpoints store them: read as what they stand for.

The value is weight · scale, with one scale per tensor, per row, or per block of the matrix, stored beside it as
NAME_scale_inv (quant_method "fp8": DeepSeek-V3, Qwen3-FP8) or NAME_scale ("compressed-tensors"). Each range of a tensor
is multiplied when it is read. Scales of activations are left out.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints import Checkpoint, Entry
from merging.views import View

ENDINGS = ("_scale_inv", "_scale")
OF_ACTIVATIONS = re.compile(r"(^|\.)(input|output|[qkv]|activation)_scale(_inv)?$")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Scaled(View):
    """The values weight · scale of a tensor; its sources are the two, and `block` is what one scale is for."""

    block: tuple[int, int]  # rows and columns

    def _stored(self, start: int, stop: int) -> Tensor:
        weight, scale = self.sources
        height, width = self.shape[-2:]
        if scale.count == 1:
            return weight._stored(start, stop).float() * scale.read(to=torch.float32)
        rows = torch.arange(start // width, -(-stop // width))
        high, wide = -(-height // self.block[0]), -(-width // self.block[1])  # blocks of one matrix
        scales = scale.read(to=torch.float32).reshape(-1, wide)[rows // height * high + rows % height // self.block[0]]
        spread = scales.repeat_interleave(self.block[1], dim=1)[:, :width].reshape(-1)
        first = start // width * width
        return weight._stored(start, stop).float() * spread[start - first : stop - first]


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose 8-bit weights are read as what they stand for, in the dtype of its configuration.

    Raises:
        ValueError: it is quantised otherwise, or a weight lacks its scale; names file and tensor.
    """
    quantised = checkpoint.config.get("quantization_config")
    if not quantised:
        return checkpoint
    block, entries, scales = _block(checkpoint, quantised), dict(checkpoint.entries), []
    dtype = DTYPES.get(str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))), torch.bfloat16)
    for name, entry in checkpoint.entries.items():
        if entry.dtype == torch.float8_e4m3fn:
            scale = next((name + ending for ending in ENDINGS if name + ending in entries), None)
            if scale is None:
                raise ValueError(f"{entry.where}: 8-bit, and no {name}_scale or _scale_inv; dequantise the model first")
            entries[name] = _scaled(entry, checkpoint.entries[scale], block, dtype)
            scales.append(scale)
    return replace(
        checkpoint,
        entries={
            name: entry for name, entry in entries.items() if name not in scales and not OF_ACTIVATIONS.search(name)
        },
    )


def _scaled(entry: Entry, scale: Entry, block: tuple[int, int] | None, dtype: torch.dtype) -> Entry:
    """Return the values of a weight, after checking which scale is whose by their shapes."""
    known = len(entry.shape) >= 2 and scale.dtype.is_floating_point
    matrices, (height, width) = math.prod(entry.shape[:-2]), entry.shape[-2:] if known else (0, 0)
    if known and block and scale.count == matrices * -(-height // block[0]) * -(-width // block[1]):
        found = block
    elif known and scale.count == 1:
        found = (height, width)
    elif known and scale.shape in ((*entry.shape[:-1], 1), entry.shape[:-1]):
        found = (1, width)
    elif known and scale.count == matrices and scale.shape[:1] == entry.shape[:1]:
        found = (height, width)
    else:
        raise ValueError(
            f"{scale.where}: scales {list(scale.shape)} of {scale.dtype} for a weight {list(entry.shape)} are none per "
            f"tensor, row or block{f' of {list(block)}' if block else ''}; dequantise the model first"
        )
    return Scaled(entry.name, dtype, entry.shape, entry.path, sources=(entry, scale), block=found)


def _block(checkpoint: Checkpoint, quantised: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the block that each scale is for, None if there are no blocks, by the configuration.

    Raises:
        ValueError: the weights are quantised otherwise.
    """
    try:
        groups = [group.get("weights") or {} for group in (quantised.get("config_groups") or {}).values()]
        floats = all(
            each.get("num_bits") == 8 and each.get("type") == "float" and each.get("symmetric", True) for each in groups
        )
        sizes = [each.get("block_structure") for each in groups] + [quantised.get("weight_block_size")]
        blocks = {(int(height), int(width)) for height, width in filter(None, sizes)}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"{checkpoint.home / 'config.json'}: quantization_config is none that fp8 or compressed-tensors writes; "
            "download it again, or dequantise the model first"
        ) from None
    if quantised.get("quant_method") == "compressed-tensors" and not (groups and floats):
        raise ValueError(
            f"{checkpoint.given}: its weights are quantised (compressed-tensors, {quantised.get('format')}), not in "
            "8-bit floating point; dequantise the model first"
        )
    if len(blocks) > 1:
        raise ValueError(f"{checkpoint.given}: config.json names several sizes of blocks; dequantise the model first")
    return next(iter(blocks), None)
