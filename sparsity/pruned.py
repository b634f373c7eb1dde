"""Inference that skips zeros: values of inactive units are not added up, keys of surely inactive units not computed.

For one token, or a few, an MLP z = V σ(K x) costs what it takes to read K and V. With an activation that is zero for
most units much of both can be left unread, and the result stays the same up to the rounding of sums:

    values  z = Σ_j a_j V_j over the units with a_j ≠ 0. V is stored transposed, so that V_j is one piece of memory.
    keys    p_j is needed only where it may be positive. A screen (`sparsity.screening`), K rounded to 8 bits, proves of
            most other units that p_j ≤ 0. Only what it leaves is computed from K as ever.
    gates   in a gated MLP, z = V (σ(K x) ⊙ G x), the rows of G are needed only where those of K are.

Skipping pays below some share of active units, which depends on shape, machine and number of tokens: `skip_zeros`
measures it, layer by layer, and whatever is above it is computed densely.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.blocks import LAYOUTS, Block, Layout, find_blocks
from sparsity.break_even import BreakEven
from sparsity.plugin_modules import PluginMixin, add_innermost_mixin
from sparsity.screening import Screen, can_screen, some_rows

LONGEST_PAUSE = 31  # calls


def skip_zeros(
    model: nn.Module,
    *,
    screen_keys: bool = True,
    margin: float = 1.0,
    most_tokens: int = 4,
    layouts: Sequence[Layout] = LAYOUTS,
) -> nn.Module:
    """Let the MLPs of a trained `model` skip what is zero when they generate, IN PLACE, and return it.

    It acts inside torch.no_grad or torch.inference_mode, as `generate` runs. While gradients are on, under autocast and
    inside torch.compile all is dense as before. There is no way back but a copy.deepcopy made before. Note:

    - Names, shapes and values of parameters stay, and with them state dicts and `save_pretrained`. The weight of each
      second linear is stored transposed, though, so that safetensors' `save_file` wants `.contiguous()` from you.
    - Screened keys take a quarter of their float32 memory in addition. When weights change, they follow by themselves.
      What they return of units that are surely inactive is an estimate, which is not positive.
    - Break-even points are measured here, with the number of threads that torch has, on the device and in the dtype of
      the model: call it again after changing one of these.

    Args:
        model: with MLP blocks that `layouts` describe, on its device and in its dtype.
        screen_keys: leave out keys too, where they are an nn.Linear on a CPU, torch has the 8-bit product and the
            activation is zero for all p ≤ 0. Elsewhere the keys are computed as they were.
        margin: the share of the error bound that is kept. 1: proven. Rounding errors are far below the bound, by a
            factor of about √d if they are independent, so that 8/√d is eight standard deviations, and skips more.
        most_tokens: calls with more tokens than this (all sequences of a batch together) are computed densely.
        layouts: the kinds of layer to look for; your own go first: [Layout(...), *LAYOUTS].

    Returns:
        `model` itself.

    Raises:
        ValueError: an option is out of range; there is no MLP block; a block's second linear is not nn.Linear or Conv1D
            with a weight of its own, or its activation has no zeros. The model is unchanged then.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"margin must be in (0, 1], got {margin}")
    if most_tokens < 1:
        raise ValueError(f"most_tokens must be at least 1, got {most_tokens}")
    blocks = find_blocks(model, layouts)
    for block in blocks:
        _check(block)
    break_even = BreakEven(most_tokens)
    with torch.no_grad():
        for block in blocks:
            _skip_values(block.value, break_even)
            if screen_keys and _can_screen(block):
                _screen(block, margin, break_even)
            elif isinstance(block.key, ScreenedKeys):  # by an earlier call
                block.key._break_even = {}
    return model


def _check(block: Block) -> None:
    linear = _linear(block.value)
    kind = type(block.value).__name__
    if "forward" in vars(block.value):
        raise ValueError(f"{block.name}: a {kind} has a forward of its own on the instance; call skip_zeros first")
    if linear is None:
        raise ValueError(
            f"{block.name}: a {kind} cannot skip zeros, only an nn.Linear or Conv1D whose weight is a parameter; merge "
            "adapters, remove parametrizations or dequantize first"
        )
    if not (_activations(block, furthest=4.0) == 0).sum() > 1:
        kind = type(block.activation).__name__
        raise ValueError(f"{block.name}: a {kind} gives no zeros to skip; train it with ReLU or `sparsify` first")


def _linear(module: nn.Module) -> str | None:
    """Return "Linear" or "Conv1D" (transformers', whose weight is (in, out)) if the module computes just that."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return None
    plain = next(kind for kind in type(module).__mro__ if not issubclass(kind, PluginMixin) and "forward" in vars(kind))
    if plain is nn.Linear:
        return "Linear"
    return "Conv1D" if plain.__name__ == "Conv1D" and hasattr(module, "nf") else None


@torch.no_grad()
def _activations(block: Block, furthest: float = 1000.0) -> Tensor:
    """Return σ at 0 and at p and −p, for p from 1e-4 to `furthest`; those that are not positive come first (65)."""
    weight = next(block.key.parameters())
    positive = torch.logspace(-4, math.log10(furthest), 64, device=weight.device).to(weight.dtype)
    return block.activation(torch.cat([-positive, positive.new_zeros(1), positive]))


def _may_skip(module: nn.Module, inputs: Tensor) -> bool:
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(inputs.device.type)
        or torch.compiler.is_compiling()
        or inputs.dtype != module.weight.dtype
    )


# Values --------------------------------------------------------------------------------------------------------------


class SkippingValues(PluginMixin):
    """The second linear of an MLP, which reads the values of active units only."""

    def forward(self, units: Tensor) -> Tensor:
        """Return V a + bias for activations a, (…, d_ff)."""
        tokens = units.reshape(-1, units.shape[-1])  # (n, d_ff)
        share = self._break_even.get(len(tokens))
        if share and _may_skip(self, units):
            values = _transposed(self)
            if values.is_contiguous():  # not after another weight was put in its place
                active = tokens.nonzero()
                if len(active) <= share * tokens.numel():
                    return _add_up(tokens, active, values, self.bias).reshape(*units.shape[:-1], -1)
        return super().forward(units)


def _transposed(value: nn.Module) -> Tensor:
    """Return Vᵀ, (d_ff, d)."""
    return value.weight if _linear(value) == "Conv1D" else value.weight.t()


def _add_up(tokens: Tensor, active: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Return Σ_j a_tj V_j + bias, (n, d).

    Args:
        tokens: activations a, (n, d_ff).
        active: token and unit of each entry of a that counts, in the order of tokens, (count, 2).
        values: V transposed, (d_ff, d).
        bias: (d,) or None.
    """
    of_token, unit = active.unbind(1)
    first = torch.searchsorted(of_token.contiguous(), torch.arange(len(tokens), device=tokens.device))
    result = F.embedding_bag(unit, values, first, mode="sum", per_sample_weights=tokens[of_token, unit])
    return result if bias is None else result + bias


def _skip_values(value: nn.Module, break_even: BreakEven) -> None:
    if not isinstance(value, SkippingValues):
        add_innermost_mixin(value, SkippingValues)
    if _linear(value) == "Linear":
        value.weight.data = value.weight.data.t().contiguous().t()
    values = _transposed(value).detach()

    def dense(tokens: Tensor) -> Tensor:
        return F.linear(tokens, values.t())

    def skipping(tokens: Tensor, share: float) -> Tensor:
        kept = torch.where(torch.arange(len(values), device=values.device) % 64 < 64 * share, tokens, 0)
        return _add_up(kept, kept.nonzero(), values, None)

    value._break_even = break_even.shares("values", values, len(values), dense, skipping)


# Keys ----------------------------------------------------------------------------------------------------------------


@dataclass
class Pause:
    """How many calls go by without a screen: after one in vain 1, then 3, 7, … LONGEST_PAUSE; after one that paid none.

    Where most units are active a screen would cost up to a fifth of the time of the keys, each time, for nothing.
    """

    length: int = 0
    left: int = 0

    def is_over(self) -> bool:
        """Count a call, and return whether it may screen."""
        self.left -= 1
        return self.left < 0

    def follow(self, paid: bool) -> None:
        """Set the pause that follows a screen."""
        self.length = 0 if paid else min(2 * self.length + 1, LONGEST_PAUSE)
        self.left = self.length


@dataclass
class Shortlist:
    """What the keys of a gated MLP found out about the tokens that its gate reads next."""

    inputs: Tensor | None = None
    units: Tensor | None = None


class ScreenedKeys(PluginMixin):
    """The first linear of an MLP, which computes the pre-activations of units that may be active, and bounds the rest.

    Where a pre-activation is surely not positive, its estimate stands in its place, and is not positive either.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return pre-activations (…, d_ff) of tokens x (…, d)."""
        tokens = x.reshape(-1, x.shape[-1])  # (n, d)
        self._shortlist.inputs = None
        share = self._break_even.get(len(tokens))
        if share and x.device.type == "cpu" and _may_skip(self, x) and self._pause.is_over():
            if not self._screen.is_of(self.weight):
                self._screen = Screen(self.weight, self._screen.margin)
            estimate, possible = self._screen.estimate(tokens, self.bias)
            paid = len(possible) <= share * len(self.weight)
            self._pause.follow(paid)
            if paid:
                estimate[:, possible] = some_rows(self.weight, self.bias, possible, tokens)
                if self._gated:
                    self._shortlist.inputs, self._shortlist.units = x, possible
                return estimate.reshape(*x.shape[:-1], -1)
        return super().forward(x)


class ShortlistedGate(PluginMixin):
    """The gate of a gated MLP, computed only for the units that its keys have left; 0 for all others."""

    def forward(self, x: Tensor) -> Tensor:
        """Return G x + bias, (…, d_ff), for tokens x (…, d)."""
        known, self._shortlist.inputs = self._shortlist.inputs, None
        if known is not x or not _may_skip(self, x):
            return super().forward(x)
        tokens, units = x.reshape(-1, x.shape[-1]), self._shortlist.units
        gate = tokens.new_zeros(len(tokens), len(self.weight))
        gate[:, units] = some_rows(self.weight, self.bias, units, tokens)
        return gate.reshape(*x.shape[:-1], -1)


def _can_screen(block: Block) -> bool:
    """Return whether the block's keys can be screened: a plain linear with one row per unit, and σ(p) = 0 for p ≤ 0."""
    key = block.key
    if "forward" in vars(key) or _linear(key) != "Linear" or len(key.weight) != len(_transposed(block.value)):
        return False
    return can_screen(key.weight) and not _activations(block)[:65].any()


def _screen(block: Block, margin: float, break_even: BreakEven) -> None:
    key = block.key
    if not isinstance(key, ScreenedKeys):
        add_innermost_mixin(key, ScreenedKeys)
    key._screen, key._pause, key._shortlist, key._gated = Screen(key.weight, margin), Pause(), Shortlist(), False
    if block.layout.gate:
        gate = block.layer.get_submodule(block.layout.gate)
        if "forward" not in vars(gate) and _linear(gate) == "Linear":
            if not isinstance(gate, ShortlistedGate):
                add_innermost_mixin(gate, ShortlistedGate)
            gate._shortlist, key._gated = key._shortlist, True
    weight = key.weight.detach()

    def dense(tokens: Tensor) -> Tensor:
        return F.linear(tokens, weight)

    def skipping(tokens: Tensor, share: float) -> Tensor:
        key._screen.estimate(tokens, None)
        return some_rows(weight, None, torch.arange(0, len(weight), round(1 / share)), tokens)

    key._break_even = break_even.shares("keys", weight, weight.shape[1], dense, skipping)
