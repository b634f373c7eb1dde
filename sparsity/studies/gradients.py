"""What a snapshot's gradients and weights look like beside the probe's means: histograms of log10 g², traces, norms."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from common.cache import Artefact, cached_rows
from sparsity.probes import probe
from sparsity.studies import weights
from sparsity.studies.measurement import Rows, load
from sparsity.studies.runs import Run
from sparsity.studies.training import make_task

QUANTILES = (0.1, 0.5, 0.9)
BINS_PER_BIN = 2  # the probe's bins of log10 g² are a quarter of a decade wide, those of the table half a decade


def measure_gradients(run: Run, trained: Artefact, device: torch.device, step: int) -> Rows:
    """Return histograms of log10 g² on the training split, traces of KKᵀ and norms of the weights of one snapshot.

    Returns:
        rows of two kinds, from the cache where they are known: bins (layer, left, right, all, active), see
        `Probe.histogram`, and values (layer, metric, value) with the metrics "key_trace" of each MLP block and
        "norm: KIND" of the whole network.
    """
    inputs = {"run": trained.key, "step": step, "device": device.type}
    return cached_rows("gradients", inputs, partial(_measure, run, trained, device, step))


def _measure(run: Run, trained: Artefact, device: torch.device, step: int) -> Iterator[dict[str, Any]]:
    task, model = make_task(run.task, device), load(run, trained, device, step)
    with probe(model, reduction="sum", histograms=True) as seen:
        for batch in task.batches("train"):
            seen.mask = task.masks(batch) if task.masks else None
            losses, _ = task.score(model, batch)
            losses.sum().backward()
            model.zero_grad()
    yield from seen.histogram().to_dict("records")
    for layer, trace in weights.key_traces(model).items():
        yield {"layer": layer, "metric": "key_trace", "value": trace}
    for kind, norm in weights.parameter_norms(model).items():
        yield {"layer": "all", "metric": f"norm: {kind}", "value": norm}


def histogram_rows(
    bins: Sequence[Mapping[str, Any]], layers: Mapping[str, Mapping[str, float]], whole: bool
) -> Iterator[dict[str, Any]]:
    """Yield the quantiles of log10 g² over all layers together and, if `whole`, its histogram, without empty bins.

    Both are given for all entries and for active ones. Exact zeros of g are in no bin: quantiles are those of the other
    entries, and the shares of a histogram may sum to less than 1.

    Args:
        bins: rows of `Probe.histogram`.
        layers: MLP block → the probe's statistics of it, from which the numbers of entries follow.
        whole: whether to yield the histogram too.

    Yields:
        metric and value: for a quantile the middle of the bin that holds it, for a bin its share of the entries, beside
        log10_g2, the middle of the bin.
    """
    entries = {name: values["samples"] * values["tokens"] * values["units"] for name, values in layers.items()}
    active = {name: layers[name]["density"] * number for name, number in entries.items()}
    counts = pd.DataFrame(bins).groupby("left")[["all", "active"]].sum()  # over layers
    for which, total in {"all": sum(entries.values()), "active": sum(active.values())}.items():
        column = counts[which]
        if column.sum():
            cumulated = column.cumsum() / column.sum()
            for quantile in QUANTILES:
                left = cumulated.index[np.searchsorted(cumulated, quantile)]
                yield {"metric": f"log10 g², {which}: {quantile:g} quantile", "value": left + 0.125}
        if whole:
            wide = column.groupby(np.arange(len(column)) // BINS_PER_BIN).sum()
            for left, number in zip(column.index[::BINS_PER_BIN], wide, strict=True):
                if number:
                    yield {"metric": f"histogram, {which}", "value": number / total, "log10_g2": left + 0.25}
