"""The activations of the paper with their derivatives: JSReLU, squared ReLU, the S-shaped ones, shifts and mixtures.

Source: "Towards the Connection between Activation Sparsity and Flat Minima", arXiv 2605.25612; S-shaped activations and
shifts are those of its section V. With p the pre-activation, σ(p) the activation and σ'(p) its derivative:

    ReLU      σ(p) = max(p, 0)              σ'(p) = 1 for p > 0, else 0
    JSReLU    σ(p) = p + p²/2 for p > 0     σ'(p) = p + 1 for p > 0, else 0     (jumps from 0 to 1)
    squared   σ(p) = p² for p > 0           σ'(p) = 2p for p > 0, else 0
    S-shaped  S(p) = σ(p − h) − σ(−p − h)   S'(p) = σ'(p − h) + σ'(−p − h)      (flat where |p| ≤ h)
    shifted   S(p − dx) + dy                S'(p − dx)
    mixture   (1 − k) σ₀(p) + k σ₁(p)       (1 − k) σ₀'(p) + k σ₁'(p)

At the jump σ'(0) = 0, as torch has it for ReLU, so that an entry that is zero has derivative zero; the authors take 1.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def derivative(activation: nn.Module, x: Tensor) -> Tensor:
    """Return σ'(x), entry by entry and detached; `x` and its graph are left unchanged.

    The activation's own `derivative` method is used where there is one. For any other module autograd is:
    Σ_j ∂σ(x)_j/∂x_i is σ'(x_i) if σ acts on each entry by itself, which is taken for granted where it keeps the shape.

    Args:
        activation: elementwise, such as nn.ReLU, nn.GELU, those of transformers, or one of this module.
        x: pre-activations, any shape and floating-point dtype; also inside torch.no_grad and torch.inference_mode.

    Returns:
        σ'(x), in the shape and dtype of `x`.

    Raises:
        ValueError: the activation changes the shape or cannot be differentiated.
    """
    if hasattr(activation, "derivative"):
        return activation.derivative(x.detach())
    if isinstance(activation, nn.ReLU):
        return (x.detach() > 0).to(x.dtype)
    return _derivative_by_autograd(activation, x)


def _derivative_by_autograd(activation: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        # A copy, as σ may work in place; `forward`, as a call would run the module's hooks, and those may ask for σ'.
        result = activation.forward(leaf.clone())
        if not isinstance(result, Tensor) or result.shape != x.shape:
            found = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise _no_derivative(activation, f"maps shape {tuple(x.shape)} to {found}")
        if not result.requires_grad:
            raise _no_derivative(activation, "cannot be differentiated")
        return torch.autograd.grad(result, leaf, torch.ones_like(result))[0]


def _no_derivative(activation: nn.Module, reason: str) -> ValueError:
    name = type(activation).__name__
    return ValueError(f"no derivative: {name} {reason}; give {name} a method `derivative(x)` that returns σ'(x)")


# JSReLU -------------------------------------------------------------------------------------------------------------


def jsrelu(x: Tensor) -> Tensor:
    """Return the jumping squared ReLU σ(x) = x + x²/2 for x > 0, else 0 (arXiv 2605.25612); σ'(x) = x + 1 for x > 0.

    Second derivatives are right too, under autograd, forward AD and torch.func. In bfloat16 and float16 σ and the
    gradient are rounded once, at the end; float16 overflows from x ≈ 361 on.

    Run eagerly, the backward pass keeps the INPUT, as GELU does, not the output, as ReLU does: from it σ' = 1 + x is
    right to the last bit, while √(2σ + 1) inherits the rounding of σ, overflows with it and takes five passes over
    memory in place of two. The price is one tensor of the size of x; torch.compile keeps what suits the whole graph.

    Args:
        x: pre-activations, any shape.

    Returns:
        σ(x), in the shape and dtype of `x`.
    """
    # Dynamo does not trace a Function that has a jvp, and fuses the plain formula better than any Function.
    return _jsrelu(x) if torch.compiler.is_compiling() else _JSReLU.apply(x)


def _jsrelu(x: Tensor) -> Tensor:
    positive = torch.relu(x)
    return torch.addcmul(positive, positive, positive, value=0.5)  # not ((x + 1)² − 1)/2, which loses small x


class _JSReLU(torch.autograd.Function):
    """`_jsrelu` with fewer passes over memory in the backward pass.

    It saves its input, so that autograd can go through `backward` once more; a saved intermediate result would make
    second derivatives silently zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _jsrelu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # σ'(x) · gradient; this is ReLU's own backward, which masks in one pass, where torch.where takes several.
        return torch.ops.aten.threshold_backward(torch.addcmul(gradient, gradient, x), x, 0)

    jvp = backward  # σ' acts on tangents as it does on gradients


class JSReLU(nn.Module):
    """The jumping squared ReLU as a module: see `jsrelu`."""

    def forward(self, x: Tensor) -> Tensor:
        return jsrelu(x)

    def derivative(self, x: Tensor) -> Tensor:
        """Return x + 1 where x > 0, else 0."""
        return torch.where(x > 0, x + 1, 0)


class SquaredReLU(nn.Module):
    """σ(x) = x² for x > 0, else 0 (Primer, arXiv 2109.08668): a rival of JSReLU, whose derivative does not jump."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()

    def derivative(self, x: Tensor) -> Tensor:
        """Return 2x where x > 0, else 0."""
        return 2 * torch.relu(x)


# Section V ----------------------------------------------------------------------------------------------------------


class SShaped(nn.Module):
    """S(x) = σ(x − h) − σ(−x − h): odd, and flat exactly where |x| ≤ h if σ is one of the ReLUs (section V).

    Args:
        inner: σ.
        h: half the width of the flat part, in units of the pre-activation; 1.5 in the paper.
    """

    def __init__(self, inner: nn.Module, h: float = 1.5) -> None:
        super().__init__()
        self.inner = inner
        self.h = h

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - self.h) - self.inner(-x - self.h)

    def derivative(self, x: Tensor) -> Tensor:
        """Return σ'(x − h) + σ'(−x − h)."""
        return derivative(self.inner, x - self.h) + derivative(self.inner, -x - self.h)

    def extra_repr(self) -> str:
        return f"h={self.h}"


class Shifted(nn.Module):
    """σ(x − dx) + dy (section V): the shift dy moves the flat part's value away from zero, and no derivative.

    Args:
        inner: σ.
        dx, dy: shifts of the pre-activation and of the activation, ±1.6 in the paper.
    """

    def __init__(self, inner: nn.Module, dx: float, dy: float) -> None:
        super().__init__()
        self.inner = inner
        self.dx, self.dy = dx, dy

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - self.dx) + self.dy

    def derivative(self, x: Tensor) -> Tensor:
        """Return σ'(x − dx)."""
        return derivative(self.inner, x - self.dx)

    def extra_repr(self) -> str:
        return f"dx={self.dx}, dy={self.dy}"


def s_shaped(inner: str, dx: float = 0.0, dy: float = 0.0, h: float = 1.5) -> Shifted:
    """Return the activation S(x − dx) + dy of section V, with S(x) = σ(x − h) − σ(−x − h).

    Args:
        inner: name of σ in ACTIVATIONS; "squared_relu" or "jsrelu" in the paper.
        dx, dy, h: see `Shifted` and `SShaped`; units of the pre-activation (dx, h) and of the activation (dy).

    Raises:
        ValueError: no activation has this name.
    """
    return Shifted(SShaped(make(inner), h), dx, dy)


# Fine-tuning --------------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """(1 − k)·first + k·second: leads a trained model from one activation to another while k rises from 0 to 1.

    k is the buffer `mixing`: it starts at 0 and is saved with the model. A state dict that knows nothing of it, such as
    a checkpoint of the model before, loads strictly all the same and leaves k as it is. At k = 0 and k = 1 outputs and
    derivatives are exactly those of one of the two, as long as those of the other are finite.

    Args:
        first: the activation at k = 0.
        second: the activation at k = 1.
    """

    mixing: Tensor  # ()

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("mixing", torch.zeros((), dtype=torch.float32))

    def set_mixing(self, k: float) -> None:
        """Set the share k of the second activation.

        Raises:
            ValueError: k is not in [0, 1].
        """
        if not 0 <= k <= 1:
            raise ValueError(f"the share of a mixture's second activation must be in [0, 1], got {k}")
        self.mixing.fill_(k)  # in place: device and dtype stay, and whoever holds the buffer sees it

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.mixing) * self.first(x) + self.mixing * self.second(x)

    def derivative(self, x: Tensor) -> Tensor:
        """Return (1 − k)·first'(x) + k·second'(x)."""
        return (1 - self.mixing) * derivative(self.first, x) + self.mixing * derivative(self.second, x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}mixing", self.mixing)  # torch hands each module a copy of the user's dict
        super()._load_from_state_dict(state_dict, prefix, *args)


# Names --------------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "jsrelu": JSReLU,
    "squared_relu": SquaredReLU,
    "s_jsrelu": lambda: SShaped(JSReLU()),
    "s_squared_relu": lambda: SShaped(SquaredReLU()),
}

_SHIFT = re.compile(r"(?P<name>.+)\((?P<dx>[^,]+),(?P<dy>[^,]+)\)")


def make(name: str) -> nn.Module:
    """Return a new activation by its name in ACTIVATIONS; one more entry there makes a name known everywhere.

    A name with a shift behind it is that activation shifted, σ(x − dx) + dy: "s_jsrelu(1.6,-1.6)" has dx = 1.6 and
    dy = −1.6 (`shifted_name` writes such names).

    Raises:
        ValueError: no activation has this name, or the shift is not two finite numbers.
    """
    if shift := _SHIFT.fullmatch(name):
        return Shifted(make(shift["name"]), _number(name, shift["dx"]), _number(name, shift["dy"]))
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"unknown activation {name!r}, expected one of {known}, or one of them shifted: NAME(dx,dy)")
    return ACTIVATIONS[name]()


def shifted_name(name: str, dx: float, dy: float) -> str:
    """Return the name under which `make` knows the activation `name` shifted by dx and dy."""
    return f"{name}({dx:g},{dy:g})"


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"activation {name!r}: a shift is two finite numbers (dx,dy), got {text!r}")
    return number
