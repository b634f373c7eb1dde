"""Inference that skips zeros: values of inactive units are not added up, keys of surely inactive units not computed.

For one token, or a few, an MLP z = V σ(K x) costs what it takes to read K and V. With an activation that is zero for
most units much of both can be left unread, and the result stays the same up to the rounding of sums:

    values  z = Σ_j a_j V_j over the units with a_j ≠ 0. V is stored transposed, so that V_j is one piece of memory.
    keys    p_j is needed only where it may be positive. K̃, K rounded to 8 bits per row, is a quarter of the memory,
            and p̃ = K̃ x̃ (x̃ is x in bfloat16) tells: with δ_j = K_j − K̃_j

                |p_j − p̃_j| ≤ ‖δ_j‖ ‖x̃‖ + ‖K_j‖ ‖x − x̃‖ + rounding of p̃_j                    (Cauchy–Schwarz)

            so that p̃_j plus this bound ≤ 0 proves σ(p_j) = 0. All other p_j are computed from K as ever.

Skipping pays below some number of active units, which depends on shape, machine and number of tokens: `skip_zeros`
measures it, layer by layer, and whatever is above it is computed densely. So is everything while gradients are on.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.blocks import LAYOUTS, Block, Layout, find_blocks
from sparsity.plugin_modules import PluginMixin, add_mixin

ROUNDOFF = 2.0**-8  # of bfloat16
CHUNK = 2**18  # entries of K that are gathered at a time, so that they are still in the cache when they are used
REPEATS = 5  # calls that are timed, of which the fastest counts


def skip_zeros(
    model: nn.Module,
    *,
    screen_keys: bool = True,
    margin: float = 1.0,
    most_tokens: int = 4,
    layouts: Sequence[Layout] = LAYOUTS,
) -> nn.Module:
    """Let the MLPs of a trained `model` skip what is zero when they generate, IN PLACE, and return it.

    Names, shapes and state dicts stay; the weight of each second linear is stored transposed from now on, and screened
    keys take a quarter of their float32 memory in addition. When weights change, the rounded keys follow by themselves.
    Break-even points are measured with the number of threads that torch uses at this moment: call it again after
    changing that.

    Args:
        model: with MLP blocks that `layouts` describe, on its device and in its dtype.
        screen_keys: leave out keys too, where the activation is zero for all p ≤ 0 and torch has the 8-bit product (on
            CPUs). Elsewhere the keys are computed as they were.
        margin: the share of the error bound that is kept. 1: proven. Rounding errors are far below the bound, by a
            factor of about √d if they are independent, so that 8/√d is eight standard deviations, and skips more.
        most_tokens: calls with more tokens than this (all sequences of a batch together) are computed densely.
        layouts: the kinds of layer to look for; your own go first: [Layout(...), *LAYOUTS].

    Returns:
        `model` itself.

    Raises:
        ValueError: an option is out of range; there is no MLP block; a block's second linear is no linear layer, has a
            forward of its own on the instance, or its activation has no zeros. The model is unchanged then.
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
                _screen(block.key, margin, break_even)
    return model


def _check(block: Block) -> None:
    for part in (block.value, block.key):
        if "forward" in vars(part):
            kind = type(part).__name__
            raise ValueError(f"{block.name}: a {kind} has a forward of its own on the instance; call skip_zeros first")
    if not _is_linear(block.value):
        kind = type(block.value).__name__
        raise ValueError(f"{block.name}: a {kind} cannot skip zeros, only nn.Linear and Conv1D can")
    if not (_activations(block) == 0).any():
        kind = type(block.activation).__name__
        raise ValueError(f"{block.name}: a {kind} gives no zeros to skip; train it with ReLU or `sparsify` first")


@torch.no_grad()
def _activations(block: Block) -> Tensor:
    """Return σ over a wide range of pre-activations, the negative ones first, in the dtype of the keys."""
    weight = next(block.key.parameters())
    positive = torch.logspace(-4, 3, 64, device=weight.device).to(weight.dtype)
    return block.activation(torch.cat([-positive, positive]))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether it is transformers' Conv1D, whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


# Values --------------------------------------------------------------------------------------------------------------


class SkippingValues(PluginMixin):
    """The second linear of an MLP, which reads the values of active units only."""

    def forward(self, units: Tensor) -> Tensor:
        """Return V a + bias for activations a, (…, d_ff)."""
        tokens = units.reshape(-1, units.shape[-1])  # (n, d_ff)
        limit = 0 if torch.is_grad_enabled() else self._break_even.get(len(tokens), 0)
        values = self.weight if _is_conv1d(self) else self.weight.t()  # (d_ff, d)
        if limit and values.is_contiguous():
            active = tokens.nonzero()
            if len(active) <= limit:
                return _add_up(tokens, active, values, self.bias).reshape(*units.shape[:-1], -1)
        return super().forward(units)


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
    weights = tokens[of_token, unit].to(values.dtype)
    result = F.embedding_bag(unit, values, first, mode="sum", per_sample_weights=weights)
    return result if bias is None else result + bias


def _skip_values(value: nn.Module, break_even: "BreakEven") -> None:
    if not isinstance(value, SkippingValues):
        add_mixin(value, SkippingValues)
    if not _is_conv1d(value):
        value.weight.data = value.weight.data.t().contiguous().t()
    value._break_even = break_even.of_values(value)


# Keys ----------------------------------------------------------------------------------------------------------------


class ScreenedKeys(PluginMixin):
    """The first linear of an MLP, which computes the pre-activations of units that may be active, and bounds the rest.

    Where a pre-activation is surely not positive, its estimate stands in its place, and is not positive either.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return pre-activations (…, d_ff) of tokens x (…, d)."""
        tokens = x.reshape(-1, x.shape[-1])  # (n, d)
        limit = 0 if torch.is_grad_enabled() else self._break_even.get(len(tokens), 0)
        if limit and x.dtype == self.weight.dtype:
            if not self._screen.is_of(self.weight):
                self._screen = Screen(self.weight, self._screen.margin)
            estimate, possible = self._screen.estimate(tokens, self.bias)
            if len(possible) <= limit:
                estimate[:, possible] = _some_rows(self.weight, self.bias, possible, tokens)
                return estimate.reshape(*x.shape[:-1], -1)
        return super().forward(x)


class Screen:
    """A linear layer's weight rounded to 8 bits, and how far products with it can be off.

    Args:
        weight: K, (d_ff, d).
        margin: the share of the error bound that is kept.
    """

    def __init__(self, weight: Tensor, margin: float) -> None:
        self.margin = margin
        self._weight, self._version = weight, _version(weight)
        exact = weight.detach().float()
        self.scale = (exact.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()  # (d_ff,)
        steps = self.scale.float()[:, None]
        self.rounded = (exact / steps).round().clamp(-127, 127).to(torch.int8)  # (d_ff, d)
        self.error = (exact - self.rounded.float() * steps).norm(dim=1)  # ‖δ_j‖
        self.norm = exact.norm(dim=1)  # ‖K_j‖

    def is_of(self, weight: Tensor) -> bool:
        """Return whether this is the screen of `weight` as it is now."""
        return weight is self._weight and _version(weight) == self._version

    def estimate(self, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return estimated pre-activations, (n, d_ff), and the units that may be positive for one of the n tokens.

        Estimates of the other units are not positive.
        """
        narrow = tokens.bfloat16()
        product = torch.ops.aten._weight_int8pack_mm(narrow, self.rounded, self.scale).float()
        wide = narrow.float()
        bound = self.error * wide.norm(dim=1, keepdim=True)
        bound += self.norm * (tokens.float() - wide).norm(dim=1, keepdim=True)
        bound += product.abs() * (2 * ROUNDOFF)
        if bias is not None:
            product += bias
        possible = (product + self.margin * bound > 0).any(0).nonzero()[:, 0]
        return product.clamp_(max=0).to(tokens.dtype), possible


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _some_rows(weight: Tensor, bias: Tensor | None, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return tokens @ weight[rows].T + bias[rows], (n, rows), with only a few rows gathered at a time."""
    height = max(1, CHUNK // weight.shape[1])
    parts = [F.linear(tokens, weight[some]) for some in rows.split(height)] or [tokens.new_zeros(len(tokens), 0)]
    result = torch.cat(parts, 1)
    return result if bias is None else result + bias[rows]


def _can_screen(block: Block) -> bool:
    """Return whether the block's keys can be screened: σ(p) = 0 for p ≤ 0, a linear layer, on a CPU that can."""
    key = block.key
    if not isinstance(key, nn.Linear) or key.weight.device.type != "cpu" or _activations(block)[:64].any():
        return False
    try:
        ones = torch.ones(64, 64, dtype=torch.int8)
        torch.ops.aten._weight_int8pack_mm(ones[:1].bfloat16(), ones, ones[0].bfloat16())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


def _screen(key: nn.Linear, margin: float, break_even: "BreakEven") -> None:
    if not isinstance(key, ScreenedKeys):
        add_mixin(key, ScreenedKeys)
    key._screen = Screen(key.weight, margin)
    key._break_even = break_even.of_keys(key)


# Break-even ----------------------------------------------------------------------------------------------------------


@dataclass
class BreakEven:
    """Measures up to how many active units skipping is faster, once for each shape and dtype.

    Args:
        most_tokens: up to how many tokens it is measured; in between (1, 2, 4, …) the next larger number stands.
    """

    most_tokens: int

    def __post_init__(self) -> None:
        self._known: dict[object, dict[int, int]] = {}

    def of_values(self, value: nn.Module) -> dict[int, int]:
        """Return n → the largest number of active entries, of n tokens together, for which values are skipped."""
        values = value.weight if _is_conv1d(value) else value.weight.t()
        units = len(values)

        def dense(tokens: Tensor) -> Tensor:
            return F.linear(tokens, values.t())

        def skipping(tokens: Tensor, share: float) -> Tensor:
            kept = torch.where(torch.arange(units, device=values.device) % 64 < 64 * share, tokens, 0)
            return _add_up(kept, kept.nonzero(), values, None)

        return self._measured("values", values, units, dense, skipping, per_token=True)

    def of_keys(self, key: nn.Linear) -> dict[int, int]:
        """Return n → the largest number of units that may be active for which keys are screened."""

        def dense(tokens: Tensor) -> Tensor:
            return F.linear(tokens, key.weight)

        def skipping(tokens: Tensor, share: float) -> Tensor:
            key._screen.estimate(tokens, None)
            rows = torch.arange(0, len(key.weight), max(1, round(1 / share)))
            return _some_rows(key.weight, None, rows, tokens)

        return self._measured("keys", key.weight, key.weight.shape[1], dense, skipping, per_token=False)

    def _measured(
        self,
        kind: str,
        weight: Tensor,
        width: int,
        dense: Callable[[Tensor], Tensor],
        skipping: Callable[[Tensor, float], Tensor],
        per_token: bool,
    ) -> dict[int, int]:
        """Return n → limit: where dense time = fixed time + active · time per active unit, from two shares."""
        known = (kind, tuple(weight.shape), weight.dtype, weight.device, torch.get_num_threads())
        if known in self._known:
            return self._known[known]
        limits, few, many, units = {}, 1 / 64, 1 / 8, max(weight.shape)
        units = weight.shape[0]
        for count in range(1, self.most_tokens + 1):
            tokens = torch.ones(count, width, dtype=weight.dtype, device=weight.device)
            whole = _seconds(lambda tokens=tokens: dense(tokens))
            low, high = (_seconds(lambda tokens=tokens, s=share: skipping(tokens, s)) for share in (few, many))
            slope = max(high - low, 1e-12) / (many - few)  # seconds per share
            share = few + (whole - low) / slope
            limits[count] = math.floor(max(0.0, min(1.0, share)) * units * (count if per_token else 1))
        self._known[known] = limits
        return limits


def _seconds(function: Callable[[], Tensor]) -> float:
    function()
    fastest = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
