"""Measuring a Transformer while it trains: `with probe(model) as p: …; p.summary()`.

Hooks on the key layer, activation and value layer of every MLP block add up sums; no activation is stored. What has to
wait for the backward pass (norms of tokens, one byte per activation) is dropped when its gradient has come. The sums
are kept by `sparsity.accumulators`; the equations that turn them into densities and flatness stand in
`sparsity.flatness`.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from sparsity.accumulators import HISTOGRAM, LayerSums
from sparsity.blocks import LAYOUTS, Layout, find_blocks, layers_without
from sparsity.probe_hooks import LayerProbe, Mask
from sparsity.tracing import in_backward

REDUCTIONS = ("mean", "sum")


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
        self.layers = {block.name: LayerProbe(self, block) for block in blocks}
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
