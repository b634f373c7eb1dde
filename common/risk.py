"""The mean loss of a model over some data, as a function of some of its parameters: what curvature is measured of.

Each label counts once, and by its class's weight if the loss has class weights, so that the risk does not depend on how
data are cut into batches.
"""

import contextlib
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Inputs = Tensor | Mapping[str, Any]

# Losses that compare each entry of a prediction with one of the target; other losses take integers as classes.
ENTRYWISE = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss,
    nn.PoissonNLLLoss, nn.SoftMarginLoss, nn.MultiLabelSoftMarginLoss,
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Inputs with all their labels, and those that count."""

    inputs: Inputs
    labels: Tensor  # (B, …)
    kept: Tensor  # the n that count: classes (n,), or values
    count: int  # n
    weight: float  # n, or the sum of their classes' weights


@dataclass(frozen=True)
class Risk:
    """A mean loss as a function of some parameters of a model; `empirical_risk` makes it."""

    network: "Network"
    loss: nn.Module
    parameters: dict[str, nn.Parameter]
    data: list[Batch]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return next(iter(self.parameters.values())).dtype

    @property
    def dimension(self) -> int:
        """The size of the curvature matrix: the number of entries of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def labels(self) -> int:
        """N, how many labels count in all batches."""
        return sum(batch.count for batch in self.data)

    def share(self, batch: Batch) -> float:
        """Return the share of a batch's mean loss in the whole."""
        return batch.weight / sum(other.weight for other in self.data)


def model_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return what a model predicts: `model(inputs)`, or the logits of `model(**inputs)` for a mapping."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def empirical_risk(
    model: nn.Module,
    batches: Iterable[Any],
    parameters: Sequence[str] | None = None,
    loss: nn.Module | None = None,
    logits: Callable[[nn.Module, Inputs], Tensor] = model_logits,
) -> Risk:
    """Return the mean loss of a model over all labels of the batches, as a function of the chosen parameters.

    A frozen head, or any other way from inputs to logits, goes into `logits`:

        empirical_risk(encoder, batches, logits=lambda encoder, images: F.normalize(encoder(images), dim=-1) @ head.T)

    Args:
        model: any module; it is not copied, so that later changes of its weights are seen.
        batches: read once, kept and moved to the model's device: pairs (inputs, labels), or mappings with the entry
            "labels", which go to `logits` as a whole (Hugging Face models take labels). All tensors start with the
            dimension of the B samples. Labels are classes (B,) or (B, T), of which the loss's `ignore_index` (−100)
            marks those that do not count; or, as floating-point numbers or for a loss such as nn.MSELoss, values of
            the predictions' shape, all of which count. Batches may differ in size: each label counts once.
        parameters: names, or patterns ("blocks.*.mlp.fc?.weight"); None: all that require a gradient.
        loss: maps logits (n, C) and labels (n,), or two tensors of values, to their mean; cross-entropy by default.
        logits: maps (model, inputs) to logits (B, C) or (B, T, C); to values (B, …), also (B, …, 1) for labels (B, …).

    Raises:
        ValueError: no parameter has such a name, there is no label, or the loss is not a mean. Later, when the risk is
            measured: predictions do not fit the labels.
    """
    loss = nn.CrossEntropyLoss() if loss is None else loss
    if getattr(loss, "reduction", None) != "mean":
        raise ValueError(f"loss must be a module with reduction='mean', got {loss!r}")
    chosen = _chosen(model, parameters)
    first = next(iter(chosen.values()))
    moved = (send_to_device(batch, first.device) for batch in batches)
    pairs = ((batch, batch["labels"]) if isinstance(batch, Mapping) else batch for batch in moved)
    made = (_batch(inputs, labels, loss, first.dtype) for inputs, labels in pairs)
    data = [batch for batch in made if batch.count]
    if not data:
        raise ValueError("batches hold no label that counts: nothing to measure the curvature on")
    return Risk(Network(model, logits, getattr(loss, "ignore_index", None)), loss, chosen, data)


def _batch(inputs: Inputs, labels: Tensor, loss: nn.Module, dtype: torch.dtype) -> Batch:
    if labels.is_floating_point() or isinstance(loss, ENTRYWISE):
        labels = labels.to(dtype)
        kept = labels.flatten(0, -2) if labels.ndim > 1 else labels
        count = len(kept) if isinstance(loss, nn.CrossEntropyLoss) else kept.numel()  # shares of classes, or values
        return Batch(inputs, labels, kept, count, count)
    ignored = getattr(loss, "ignore_index", None)
    kept = labels.flatten() if ignored is None else labels[labels != ignored]
    weights = loss.weight if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) else None
    weight = len(kept) if weights is None else float(weights.to(kept.device)[kept].sum())
    return Batch(inputs, labels, kept, len(kept), weight)


def _chosen(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    if patterns is None:
        patterns, named = ["*"], {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            near = difflib.get_close_matches(pattern, named, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ", which has none that requires a gradient"
            raise ValueError(f"no parameter of {type(model).__name__} matches {pattern!r}{hint}")
    kept = (name for name in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    return {name: named[name] for name in kept}


class Network(nn.Module):
    """The model as a function of batches: it maps one to what it predicts for the labels that count."""

    def __init__(self, model: nn.Module, logits: Callable[[nn.Module, Inputs], Tensor], ignored: int | None):
        super().__init__()
        self.model, self.logits, self.ignored = model, logits, ignored

    def forward(self, batch: Batch) -> Tensor:
        labels = batch.labels
        found = self.logits(self.model, batch.inputs)  # (B, …, C)
        if labels.is_floating_point():
            found = found.squeeze(-1) if found.shape == (*labels.shape, 1) else found
            if found.shape != labels.shape:
                raise ValueError(
                    f"predictions of shape {tuple(found.shape)} do not fit values of shape {tuple(labels.shape)}: "
                    "expected the same shape; adapt `logits`"
                )
            return found.flatten(0, -2) if found.ndim > 1 else found
        if found.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits of shape {tuple(found.shape)} do not fit labels of shape {tuple(labels.shape)}: expected "
                "labels (B,) with logits (B, C), or (B, T) with (B, T, C); adapt `logits`"
            )
        rows = found.flatten(0, -2)
        return rows if self.ignored is None else rows[labels.flatten() != self.ignored]


@contextlib.contextmanager
def measuring(risk: Risk) -> Iterator[None]:
    """Set evaluation mode and plain attention within the block, and restore what was set before."""
    modes = {module: module.training for module in risk.network.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    risk.network.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


def predict_with(risk: Risk, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return what the network predicts of a batch with some of its parameters replaced, by their names."""
    named = {f"model.{name}": parameter for name, parameter in parameters.items()}
    return functional_call(risk.network, named, (batch,))


@torch.no_grad()
def mean_loss(risk: Risk, parameters: Mapping[str, Tensor] | None = None) -> float:
    """Return the mean loss itself, in nats for cross-entropy; with some parameters replaced, where given."""
    with measuring(risk):
        losses = ((risk.loss(predict_with(risk, batch, parameters or {}), batch.kept), batch) for batch in risk.data)
        return sum(loss.item() * risk.share(batch) for loss, batch in losses)
