"""Pruning small activations of a trained network, without training: the rival of every way to train sparsity.

An activation whose size is at most τ counts as zero; each MLP has its own τ, the quantile of its non-zero activations
on calibration data. Source: CATS (Lee et al., arXiv 2404.08763, section 3), which thresholds the activations of gated
MLPs in this way; TEAL (Liu et al., arXiv 2408.14690) extends it to the inputs of all linears.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.blocks import find_blocks

ENTRIES = 100_000  # of each MLP and each forward pass, at most, that quantiles are taken of


@torch.no_grad()
def active_sizes(model: nn.Module, run: Callable[[], Any], zero: float = 1e-6) -> dict[str, Tensor]:
    """Return for each MLP the sizes |a| of its activations that are not zero, or a regular sample of them: (n,) sorted.

    Args:
        model: with MLP blocks that `find_blocks` knows.
        run: runs the model on calibration data.
        zero: activations of at most this size are zeros.
    """
    blocks = find_blocks(model)
    seen: dict[str, list[Tensor]] = {block.name: [] for block in blocks}

    def collect(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        sizes = output.detach().float().abs().flatten()
        sizes = sizes[sizes > zero]
        seen[name].append(sizes[:: len(sizes) // ENTRIES + 1].cpu())

    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.activation.register_forward_hook(partial(collect, block.name)).remove)
        run()
    return {name: torch.cat(sizes).sort().values for name, sizes in seen.items()}


def thresholds(sizes: Mapping[str, Tensor], kept: float) -> dict[str, float]:
    """Return for each MLP the size τ above which lies the share `kept` of its non-zero activations.

    Args:
        sizes: what `active_sizes` returned.
        kept: in (0, 1]; 1 gives τ = 0, and so does an MLP without active units.

    Raises:
        ValueError: kept is not in (0, 1].
    """
    if not 0 < kept <= 1:
        raise ValueError(f"the share of activations that are kept must be in (0, 1], got {kept}")
    dropped = {name: round((1 - kept) * len(values)) for name, values in sizes.items()}
    return {name: values[dropped[name] - 1].item() if dropped[name] else 0.0 for name, values in sizes.items()}


@contextlib.contextmanager
def thresholded(model: nn.Module, levels: Mapping[str, float]) -> Iterator[None]:
    """Within the block, activations of at most the size τ of their MLP are zero.

    Args:
        model: whose MLPs have the names in `levels`.
        levels: what `thresholds` returned.
    """

    def cut(level: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.where(output.abs() > level, output, 0)

    with contextlib.ExitStack() as hooks:
        for block in find_blocks(model):
            handle = block.activation.register_forward_hook(partial(cut, levels[block.name]), prepend=True)
            hooks.callback(handle.remove)
        yield
