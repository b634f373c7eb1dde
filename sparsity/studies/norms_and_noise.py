"""What experiment 07 changes in training beside plug-ins: the affine part of norms, and noise on the weights.

Both follow the authors' code of arXiv 2605.25612: an earlier option that switches the affine part of norms off, and
"magic synapses", noise on the output of each linear as if every token met weights with noise of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.blocks import find_blocks

NORMS = ("free", "no bias", "fixed", "bounded, with bias")


def change_norms(model: nn.Module, norms: str) -> nn.Module:
    """Change, IN PLACE, what of the norms that feed MLPs is trained from scratch, and return the network.

    Args:
        model: untrained: weights of norms are 1 and biases 0.
        norms: "free" changes nothing; "no bias" leaves the biases at 0; "fixed" leaves the weights at 1 too; "bounded,
            with bias" lets the biases of norms train that `sparsify`, called with uplift_steps=1, has bounded.

    Raises:
        ValueError: the word is none of NORMS.
    """
    if norms not in NORMS:
        raise ValueError(f"norms must be one of {', '.join(NORMS)}, got {norms!r}")
    for block in find_blocks(model) if norms != "free" else ():
        norm = block.norm
        if norms == "fixed":
            norm.weight.requires_grad_(False)
        bias = getattr(norm, "bias", None)  # an RMSNorm has none
        if bias is None:
            continue
        if norms == "bounded, with bias":
            del norm.bias  # a buffer since `sparsify`
            norm.bias = nn.Parameter(bias.detach())
        else:
            bias.requires_grad_(False)
    return model


@contextmanager
def weight_noise(model: nn.Module, size: float, generator: torch.Generator | None = None) -> Iterator[None]:
    """Within the block, add Gaussian noise to the weights of all linears, drawn anew for every token and pass.

    Noise N(0, s²) on each weight, s = size · ‖W‖_F / √(number of weights), changes W x by N(0, s² ‖x‖²) in each entry:
    that is what is added, and no gradient goes through its size. An adapter's linear counts with its update.

    Args:
        model: its linears are found when the block begins.
        size: of the noise, relative to the root mean square of the weights; 0.05 in the authors' script, 0 for none.
        generator: where the noise comes from, on the model's device; None: torch's global one.
    """
    handles = []
    for module in _linears(model) if size else ():
        handles.append(module.register_forward_hook(_Noise(size, generator)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Noise:
    """The forward hook of one linear."""

    def __init__(self, size: float, generator: torch.Generator | None) -> None:
        self.size, self.generator = size, generator

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        with torch.no_grad():
            spread = self.size * whole_weight(module).square().mean().sqrt()
            normal = torch.empty_like(output).normal_(generator=self.generator)
            noise = normal * spread * inputs[0].norm(dim=-1, keepdim=True)
        return output + noise


def _linears(model: nn.Module) -> Iterator[nn.Module]:
    """Yield each linear, with the adapter around it where there is one, and not the adapter's own linears."""
    for module in model.children():
        if isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear):
            yield module
        else:
            yield from _linears(module)


def whole_weight(linear: nn.Module) -> Tensor:
    """Return the weight (out, in) by which a linear acts: with the update of peft's LoRA, if it is around it."""
    if isinstance(linear, nn.Linear):
        return linear.weight
    updates = [linear.get_delta_weight(name) for name in linear.active_adapters]
    return linear.base_layer.weight + sum(updates)
