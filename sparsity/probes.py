"""Measuring a Transformer while it trains: `with probe(model) as p: …; p.summary()`.

Hooks on the key layer, activation and value layer of every MLP block add up sums; no activation is stored. What has to
wait for the backward pass (norms of tokens, one byte per activation) is dropped when its gradient has come. The sums
are kept by `sparsity.accumulators`; the equations that turn them into densities and flatness stand in
`sparsity.flatness`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sparsity.accumulators import HISTOGRAM, THRESHOLDS, LayerSums, count, histogram, squares, total
from sparsity.activations import derivative
from sparsity.blocks import LAYOUTS, Block, Layout, find_blocks, layers_without
from sparsity.tracing import in_backward

REDUCTIONS = ("mean", "sum")
Mask = Tensor | Mapping[str, Tensor] | None


@contextlib.contextmanager
def probe(
    model: nn.Module,
    every: int = 1,
    mask: Mask = None,
    reduction: str = "mean",
    grad_scale: float = 1.0,
    *,
    zero: float = 1e-6,
    histograms: bool = False,
    layouts: Sequence[Layout] = LAYOUTS,
) -> Iterator["Probe"]:
    """Within the block, measure the activations and gradients of every MLP block of a model.

    Densities are shares over all entries of a layer (samples × tokens × units) and over all recorded passes; gradients
    are per sample and free of loss scaling. In a gated MLP the activation of the gate is what is measured, and η is the
    gradient at the gate's pre-activation. Of several losses on one forward pass only the first backward pass counts:
    add the losses up, and call backward() on the sum. Where activations are NaN, so are all statistics of their layer.

    Args:
        model: any model with MLP blocks that `find_blocks` knows; may be wrapped (DDP), not compiled.
        every: record the 1st, (every + 1)th, … forward pass of the model; the others cost nothing.
        mask: the positions that count: None for all, padding included, as the authors do; a (B, T) bool tensor, or
            {prefix of layer names: tensor}, as {"encoder": …, "decoder": …} for T5. It may be set anew before any pass
            (`p.mask = …`).
        reduction: how the loss combines samples. "mean" (over samples, or over their tokens): gradients are multiplied
            by B, the first dimension of what enters the MLP's layer; "sum": they are taken as they are.
        grad_scale: what the loss was multiplied by (AMP's scale, 1 / accumulation steps); gradients are divided by it.
            It may be set anew before any backward pass (`p.grad_scale = …`). A gradient that overflows stays in the
            sums, as inf or NaN, until `p.reset()`.
        zero: an activation counts as zero if |a| ≤ zero.
        histograms: also collect those of log10 g² (`p.histogram()`).
        layouts: the kinds of layer to look for.

    Yields:
        The `Probe`; its `summary()` works inside and after the block. Hooks are gone after it, whatever happened in it.

    Raises:
        ValueError: there is no MLP block, the model is compiled, an activation is no module or has no derivative, a key
            layer is a convolution of more than one pixel, a layer takes (T, B, d), or an option is out of range; within
            the block: a mask has another shape than the tokens of a layer.

    Warns:
        UserWarning: some layers have no MLP that `layouts` describe (mixtures of experts), and are not measured.
    """
    measured = Probe(model, every, mask, reduction, grad_scale, zero, histograms, layouts)
    with contextlib.ExitStack() as hooks:
        measured.install(hooks)
        yield measured


@dataclass(eq=False, repr=False)
class Probe:
    """What `probe` yields: the sums of every layer, and the tables made of them."""

    model: nn.Module
    every: int
    mask: Mask
    reduction: str
    grad_scale: float
    zero: float
    histograms: bool
    layouts: Sequence[Layout]

    def __post_init__(self) -> None:
        model, layouts = self.model, self.layouts
        for option in ("every", "grad_scale"):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option} must be positive, got {getattr(self, option)}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {self.reduction!r} of the loss over samples; choose 'mean' or 'sum'")
        for name, module in model.named_modules():
            if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
                raise ValueError(
                    f"{name or type(module).__name__} is compiled, and compiled code skips hooks: probe the model that "
                    "was compiled (model._orig_mod), and run that one on the steps to be measured"
                )
        blocks = find_blocks(model, layouts)
        self.layers = {block.name: _Layer(self, block) for block in blocks}
        if missing := layers_without(model, blocks):
            warnings.warn(
                f"{missing[0]} and {len(missing) - 1} more layers have no MLP that a layout describes (mixtures of "
                "experts?), and are not measured",
                stacklevel=6,
            )
        self.warned = False
        self.open = False
        self.recording = False  # the forward pass that is under way is recorded
        self.recomputing = False  # … and so is what gradient checkpointing recomputes of the latest one
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next pass is recorded."""
        self.seen = self.passes = 0
        for layer in self.layers.values():
            layer.sums = LayerSums()

    def install(self, hooks: contextlib.ExitStack) -> None:
        """Install all hooks; closing the stack removes them."""
        self.open = True
        hooks.callback(self._stop)
        hooks.callback(self.model.register_forward_pre_hook(self._begin).remove)
        hooks.callback(self.model.register_forward_hook(self._end, always_call=True).remove)
        for layer in self.layers.values():
            for handle in layer.hooks():
                hooks.callback(handle.remove)

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        if in_backward():
            return
        self.recording = self.recomputing = self.seen % self.every == 0
        self._forget_calls()
        self.seen += 1
        self.passes += self.recording

    def _end(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if not in_backward():
            self.recording = False

    def _stop(self) -> None:
        self.open = self.recording = self.recomputing = False
        self._forget_calls()

    def _forget_calls(self) -> None:
        """Drop what blocks remember that never ended: an exception passed, or a recomputation stopped early."""
        for layer in self.layers.values():
            layer.call = layer.batch = None

    def summary(self, gradients: bool | None = None) -> pd.DataFrame:
        """Return the table of all recorded passes, one row per MLP block in module order.

        The columns are those of `sparsity.flatness`: densities, key_identity, value_identity, gradient_statistics.

        Args:
            gradients: True: a layer without gradients is an error. None: the columns that need gradients are there if
                any layer had a backward pass (NaN where one had none); without, a KeyError names them when they are
            asked for. False: forward statistics alone.

        Raises:
            RuntimeError: no forward pass was recorded; or gradients=True and a layer saw no backward pass.
        """
        layers = self.layers
        if not any(layer.sums.forward.counts["calls"] for layer in layers.values()):
            raise RuntimeError(
                f"the probe of {type(self.model).__name__} recorded no forward pass: within the block, call the model "
                "that was given to probe() itself, not a part of it or a compiled copy"
            )
        without = [name for name, layer in layers.items() if not layer.sums.has_gradients]
        if gradients and without:
            raise RuntimeError(
                f"{without[0]}: no gradient was seen here ({len(without)} of {len(layers)} layers): within the block, "
                "run backward() on a loss of a recorded pass; summary() gives the forward statistics without it"
            )
        gradients = len(without) < len(layers) if gradients is None else gradients
        rows = {name: layer.sums.row(gradients) for name, layer in layers.items()}
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
        self._warn_of_nan(table)
        return table if gradients else _ForwardTable(table)

    def _warn_of_nan(self, table: pd.DataFrame) -> None:
        broken = [name for name in table.index[table["density"].isna()] if table["samples"][name]]
        if broken and not self.warned:
            self.warned = True
            warnings.warn(
                f"{broken[0]}: activations were NaN, and so are the statistics of {len(broken)} of {len(table)} layers",
                stacklevel=3,
            )

    def histogram(self) -> pd.DataFrame:
        """Return the histograms of log10 g² per layer, over all and over active entries.

        Exact zeros are counted in no bin; values outside the range are counted in the outermost ones.

        Returns:
            One row per layer and bin: layer, left, right (edges), all, active (numbers of entries).

        Raises:
            RuntimeError: the probe was made without histograms=True, or saw no gradients.
        """
        if not self.histograms:
            raise RuntimeError("this probe collects no histograms: use probe(model, histograms=True)")
        edges = np.linspace(HISTOGRAM[0], HISTOGRAM[1], HISTOGRAM[2] + 1)
        tables = [
            pd.DataFrame({"layer": name, "left": edges[:-1], "right": edges[1:], **layer.sums.bins()})
            for name, layer in self.layers.items()
            if layer.sums.has_gradients
        ]
        if not tables:
            raise RuntimeError("no gradient was seen: within the block, run backward() on a loss of a recorded pass")
        return pd.concat(tables, ignore_index=True)


class _ForwardTable(pd.DataFrame):
    """A table without the columns that need gradients, which says so when it is asked for one of them."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except KeyError as error:
            missing = {key} if isinstance(key, str) else set(key) if isinstance(key, list) else set()
            needing = sorted(missing & LayerSums().row(gradients=True).keys() - set(self.columns))
            if not needing:
                raise
            raise KeyError(
                f"{needing[0]} needs gradients: run backward() within the probe's block on a loss of a recorded pass"
            ) from error


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


class _Layer:
    """The hooks on one MLP block, in the order in which they run."""

    def __init__(self, probe: Probe, block: Block) -> None:
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
        active_g2 = squares(g * call.active) * scale**2
        sums = {"g²": squares(g).sum() * scale**2, "active g²": active_g2.sum(), "active x²g²": call.x2 @ active_g2}
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
