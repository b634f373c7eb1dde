"""The hooks of a probe on one MLP block: what each of them sees, and which sums it adds to.

They run in the order in which they stand here. `sparsity.probes` installs them, `sparsity.accumulators` keeps the sums.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsity.accumulators import THRESHOLDS, LayerSums, count, histogram, squares, total
from sparsity.activations import derivative
from sparsity.blocks import Block
from sparsity.tracing import in_backward

Mask = Tensor | Mapping[str, Tensor] | None


class Recording(Protocol):
    """What the hooks ask of their probe: its options, and whether the present pass is recorded."""

    mask: Mask
    reduction: str
    grad_scale: float
    zero: float
    histograms: bool
    open: bool
    recording: bool
    recomputing: bool


class _Call:
    """What one run of an MLP block has to remember until its end, or until its gradients come."""

    def __init__(
        self, sums: LayerSums, x: Tensor, samples: int, counted: int, index: Tensor | None, axis: int, forward: bool
    ) -> None:
        self.sums = sums
        self.samples = samples  # B
        self.counted = counted  # B, or 0 if a piece of the same samples has been counted already
        self.index = index  # the tokens that count; None: all
        self.axis = axis  # of d and d_ff
        self.forward = forward  # no recomputation: the forward statistics count
        self.x2 = squares(self.rows(x))  # ‖x_t‖², (N,)
        self.a2: Tensor | None = None  # ‖a_t‖², (N,)
        self.active: Tensor | None = None  # (N, d_ff) bool
        self.marginal: Tensor | None = None  # flat indices of the few entries with 0 < |a| ≤ zero

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the tokens of a (B, …, d) tensor that count, (N, d), at least in single precision."""
        rows = tensor.detach().movedim(self.axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        rows = rows if self.index is None else rows.index_select(0, self.index)
        return rows if rows.dtype == torch.float64 else rows.float()


class LayerProbe:
    """The hooks on one MLP block, in the order in which they run."""

    def __init__(self, probe: Recording, block: Block) -> None:
        if not isinstance(block.activation, nn.Module):
            raise ValueError(
                f"{block.name}: its activation {block.layout.activation!r} is {block.activation!r}, no module that a "
                "hook could watch; make it an nn.Module"
            )
        try:
            derivative(block.activation, torch.zeros(1, device=_device(block)))
        except ValueError as error:
            raise ValueError(f"{block.name}: {error}") from None
        for part in (block.key, block.value):
            if isinstance(part, nn.Conv2d) and not part.weight[0, 0].numel() == part.groups == 1:
                raise ValueError(
                    f"{block.name}: {part} mixes tokens or splits channels, and is no linear of each token"
                )
        if any(getattr(module, "batch_first", True) is False for module in block.layer.children()):
            raise ValueError(f"{block.name}: this layer takes (T, B, d), not (B, T, d); make it with batch_first=True")
        self.probe, self.block = probe, block
        self.axis = 1 if block.convolutional else -1  # of channels
        self.sums = LayerSums()
        self.batch: int | None = None  # B of the layer, while it runs
        self.call: _Call | None = None

    def hooks(self) -> Iterator[Any]:
        """Install the hooks one after another and yield their handles."""
        key, activation, value = self.block.key, self.block.activation, self.block.value
        yield self.block.layer.register_forward_pre_hook(self.layer_begins, with_kwargs=True)
        yield self.block.layer.register_forward_hook(self.layer_ends, always_call=True)
        yield key.register_forward_pre_hook(self.enter, with_kwargs=True)
        yield activation.register_forward_pre_hook(self.see_pre_activation, with_kwargs=True)
        yield activation.register_forward_hook(self.see_activation)
        yield value.register_forward_pre_hook(self.see_value_input, with_kwargs=True)
        yield value.register_forward_hook(self.leave)

    def layer_begins(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Samples, (B, …), go into the layer; its MLP may see them in chunks, or all tokens as one list."""
        tensors = (value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
        first = next(tensors, None)
        self.batch, self.counted = (None if first is None else first.shape[0]), False

    def layer_ends(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.batch = None

    @torch.no_grad()
    def enter(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """x, (B, …, d), goes into the key layer."""
        self.call = None
        recomputed = in_backward()
        if not (self.probe.recomputing if recomputed else self.probe.recording):
            return
        x = _first(inputs, named)
        samples, counted = (x.shape[0], False) if self.batch is None else (self.batch, self.counted)
        self.counted = True
        index = self.positions(x)
        self.call = call = _Call(self.sums, x, samples, 0 if counted else samples, index, self.axis, not recomputed)
        if call.forward:
            sizes = {"calls": 1, "samples": call.counted, "tokens": len(call.x2)}
            call.sums.forward.add({"x²": call.x2.sum()}, **sizes)

    def see_pre_activation(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """p, (B, …, d_ff), goes into the activation."""
        call = self.call
        if call is None:
            return None
        p = _first(inputs, named)
        self.wait_for_gradient(p, call, self.add_effective_gradient)
        if call.forward:
            self.add_pre_activation(call, p)
        # Autograd drops the hooks of a view that is overwritten, and p is a view of what nn.Linear computes.
        return ((p.clone(),), {}) if getattr(module, "inplace", False) else None

    @torch.no_grad()
    def add_pre_activation(self, call: _Call, p: Tensor) -> None:
        rows = call.rows(p)
        slope = derivative(self.block.activation, rows)
        sums = {"p": total(rows), "p²": squares(rows).sum(), "σ'²": squares(slope).sum()}
        call.sums.forward.add(sums | {"differentiable": count(torch.ne, slope, 0)}, entries=rows.numel())

    @torch.no_grad()
    def see_activation(self, module: nn.Module, inputs: Any, a: Tensor) -> None:
        """a, (B, …, d_ff), comes out of the activation."""
        call = self.call
        if call is None:
            return
        magnitude = call.rows(a).abs()
        call.active = magnitude > self.probe.zero
        call.marginal = ((magnitude > 0) != call.active).flatten().nonzero().squeeze(1)
        if call.forward:
            counts = call.active.sum(0)  # (d_ff,)
            call.sums.forward.add({"active": counts.sum(), "union": (counts > 0).sum() / len(counts)})
            call.sums.forward.add_vector("active", counts)
        self.wait_for_gradient(a, call, self.add_activation_gradient)

    @torch.no_grad()
    def see_value_input(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """a, (B, …, d_ff), goes into the value layer, after gate and dropout."""
        call = self.call
        if call is None:
            return
        if call.active is None:
            raise RuntimeError(
                f"{self.block.name}: its activation {self.block.layout.activation!r} did not run between the key and "
                "the value layer (fused or functional code?), so that nothing can be measured"
            )
        call.a2 = squares(call.rows(_first(inputs, named)))
        if call.forward:
            call.sums.forward.add({"a²": call.a2.sum()})

    def leave(self, module: nn.Module, inputs: Any, z: Tensor) -> None:
        """z, (B, …, d), comes out of the value layer."""
        call, self.call = self.call, None
        if call is not None:
            self.wait_for_gradient(z, call, self.add_output_gradient)

    def wait_for_gradient(self, tensor: Tensor, call: _Call, add: Callable[[_Call, Tensor], None]) -> None:
        """Call `add` with the first gradient of a tensor, and let go of `call` then, not when the graph dies."""
        waiting = [call]  # never the tensor itself: the graph would hold it, and it the graph

        def hook(gradient: Tensor) -> None:
            if waiting:
                call = waiting.pop()
                if self.probe.open:
                    add(call, gradient)

        if tensor.requires_grad:
            tensor.register_hook(hook)

    @torch.no_grad()
    def add_output_gradient(self, call: _Call, gradient: Tensor) -> None:
        """∂L/∂z, (B, …, d), has come."""
        z2 = squares(call.rows(gradient)) * self.scale(call) ** 2
        sums = {"a²": call.a2.sum(), "z'²": z2.sum(), "a²z'²": call.a2 @ z2}
        call.sums.value.add(sums, samples=call.counted, tokens=len(z2))

    @torch.no_grad()
    def add_activation_gradient(self, call: _Call, gradient: Tensor) -> None:
        """g = ∂L/∂a, (B, …, d_ff), has come."""
        g, scale = call.rows(gradient), self.scale(call)
        g2, active_g2 = squares(g) * scale**2, squares(g * call.active) * scale**2
        sums = {"g²": g2.sum(), "x²g²": call.x2 @ g2}
        sums |= {"active g²": active_g2.sum(), "active x²g²": call.x2 @ active_g2}
        call.sums.key.add(sums)
        if self.probe.histograms:
            call.sums.key.add_vector("all", histogram(g * scale))
            call.sums.key.add_vector("active", histogram(g[call.active] * scale))

    @torch.no_grad()
    def add_effective_gradient(self, call: _Call, gradient: Tensor) -> None:
        """η = ∂L/∂p, (B, …, d_ff), has come."""
        eta, scale = call.rows(gradient), self.scale(call)
        eta2 = squares(eta) * scale**2
        active_eta2 = squares(eta * call.active) * scale**2
        marginal = eta.flatten()[call.marginal] ** 2 * call.x2[call.marginal // eta.shape[1]] * scale**2
        sums = {
            "active": call.active.sum(),
            "x²η²": call.x2 @ eta2,
            "active x²η²": call.x2 @ active_eta2,
            "marginal x²η²": marginal.sum(),
            "η²": eta2.sum(),
            "|η|": total(eta.abs()) * scale,
            "η": total(eta) * scale,
            "η < 0": count(torch.lt, eta, 0),
            "η > 0": count(torch.gt, eta, 0),
        }
        for name, threshold in THRESHOLDS.items():
            sums[name] = count(torch.lt, eta.abs(), threshold / scale)
        call.sums.key.add(sums, samples=call.counted, tokens=len(eta), entries=eta.numel())

    def scale(self, call: _Call) -> float:
        """Return what makes a gradient that of one sample's unscaled loss."""
        return (call.samples if self.probe.reduction == "mean" else 1) / self.probe.grad_scale

    def positions(self, x: Tensor) -> Tensor | None:
        """Return the indices of the tokens of x that the mask lets count, or None if all do."""
        mask = self.probe.mask
        if isinstance(mask, Mapping):
            name = self.block.name.removeprefix("module.")  # of DDP
            prefixes = [prefix for prefix in mask if f"{name}.".startswith(f"{prefix}." if prefix else "")]
            if not prefixes:
                raise ValueError(f"{self.block.name}: no entry of the mask is a prefix of this layer: {[*mask]}")
            mask = mask[max(prefixes, key=len)]
        if mask is None:
            return None
        shape = x.movedim(self.axis, -1).shape[:-1]
        as_one_list = len(shape) == 1 and self.batch == len(mask) and mask.numel() == len(x)
        if not (mask.shape == shape or as_one_list) or mask.is_floating_point():
            raise ValueError(
                f"{self.block.name}: the mask must be bool, of the shape {tuple(shape)} of the layer's tokens, "
                f"but is {mask.dtype} {tuple(mask.shape)}; set p.mask before each pass whose shape differs"
            )
        return mask.to(x.device).flatten().nonzero().squeeze(1)


def _first(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return next(iter((*inputs, *named.values())))


def _device(block: Block) -> torch.device | None:
    parameter = next(block.layer.parameters(), None)
    return None if parameter is None else parameter.device
