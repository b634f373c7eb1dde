"""Spectral concentration of KKᵀ: how the eigenvalues of a key layer's Gram matrix are spread, along training.

K is (d_ff, d) with d < d_ff, so that KKᵀ (d_ff, d_ff) has d eigenvalues σ² from the singular values of K, and d_ff − d
zeros, whatever K is: the rank alone makes the near-zero rate at least 1 − d/d_ff.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common import spectral
from common.cache import Artefact
from sparsity.blocks import find_blocks
from sparsity.studies.measurement import load
from sparsity.studies.runs import Run

NEAR_ZERO = 0.1  # eigenvalues up to this are near zero, in the authors' code
HELD = 0.8  # share of the others that the narrowest interval holds
BINS = 100
LEADING = 3  # eigenvalues that the authors logged


def concentration(eigenvalues: Tensor) -> float:
    """Return 10^w, w the width of the narrowest interval of log10 λ that holds 80 % of the eigenvalues above 0.1.

    As in the authors' code the interval is made of bins, 100 from the smallest to the largest of them. 1 if all are
    equal; NaN if there is none.

    Args:
        eigenvalues: (n,), not negative.
    """
    logs = eigenvalues[eigenvalues > NEAR_ZERO].double().log10()
    if not len(logs):
        return float("nan")
    low, high = logs.min(), logs.max()
    if low == high:
        return 1.0
    counts = torch.histc(logs, BINS, low.item(), high.item())
    held = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    wanted = HELD * len(logs) - 1e-9
    ends = torch.searchsorted(held, held + wanted)  # for each start the first edge that is far enough
    width = (ends - torch.arange(BINS + 1))[ends <= BINS].min()
    return (10 ** (width / BINS * (high - low))).item()


def key_spectrum(weight: Tensor) -> dict[str, float]:
    """Return what is said of the spectrum of KKᵀ, by name.

    "near-zero rate" and "… by rank", the part of it that 1 − d/d_ff explains, are shares of all d_ff eigenvalues;
    "concentration" see above; "eigenvalue 1" to "3" the largest; "condition" the largest over the smallest of the
    min(d_ff, d) that can differ from zero; "above noise" the share of these beyond the upper edge of the
    Marchenko–Pastur law whose variance fits their median, d_ff/d being its ratio.

    Args:
        weight: K, (d_ff, d).
    """
    units, width = weight.shape
    values = spectral.singular_values(weight.detach().float()).double().square()  # descending
    zeros = max(0, units - width)
    result = {
        "near-zero rate": ((values <= NEAR_ZERO).sum().item() + zeros) / units,
        "near-zero rate by rank": zeros / units,
        "concentration": concentration(values),
        "condition": (values[0] / values[-1]).item(),
    }
    whole = torch.cat([values, values.new_zeros(zeros)]) / width
    ratio = units / width
    _, edge = spectral.marchenko_pastur_edges(ratio, max(spectral.fit_noise_level(whole, ratio).item(), 1e-30))
    result["above noise"] = (whole > edge).sum().item() / len(values)
    return result | {f"eigenvalue {index + 1}": value for index, value in enumerate(values[:LEADING].tolist())}


def measure_spectra(run: Run, trained: Artefact, device: torch.device) -> list[dict[str, Any]]:
    """Return rows (step, layer, metric, value) of all snapshots of a run; layers are numbered from 0."""
    return list(_rows(run, trained, device))


def _rows(run: Run, trained: Artefact, device: torch.device) -> Iterator[dict[str, Any]]:
    for step in run.snapshot_steps:
        for layer, block in enumerate(find_blocks(load(run, trained, device, step))):
            for metric, value in key_spectrum(block.key.weight).items():
                yield {"step": step, "layer": layer, "metric": metric, "value": value}
