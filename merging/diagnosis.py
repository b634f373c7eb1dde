"""Diagnoses in a few numbers: means over directions, matrices and tasks of what `diagnose` finds in each.

All functions take `Diagnosis` objects of calibrated matrices (`calibrated_matrices` picks and names them) and count
every matrix once, whatever its size; interference and energy are sums over all of them.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.spectral import effective_rank, energy_shares, stable_rank
from merging.calibration import Diagnosis


def calibrated_matrices(diagnoses: Mapping[str, Diagnosis]) -> dict[str, Diagnosis]:
    """Return the diagnoses of calibrated matrices under short names ("block 0 c_fc"), in the order of the blocks."""
    layers = []
    for name, seen in diagnoses.items():
        block, tail = re.search(r"\.(\d+)\.", name), re.sub(r"[._]?weight\b", "", name).split(".")[-1]
        if seen.treatment == "calibrated":
            layers.append((int(block[1]) if block else math.inf, f"block {block[1]} {tail}" if block else tail, seen))
    return {layer: seen for _, layer, seen in sorted(layers, key=lambda entry: entry[0])}


def without_null_directions(seen: Diagnosis) -> Diagnosis:
    """Return the diagnosis of a matrix without the directions beyond its rank (most of them, if it comes from LoRA)."""
    kept = {
        name: getattr(seen, name)[..., : seen.rank]
        for name in ("singular_values", "coefficients", "max_coefficient", "gamma", "energy", "interference")
    }
    return replace(seen, inflation=seen.inflation[: seen.rank], **kept)


def tenths(values: Tensor) -> Tensor:
    """Return the means over ten groups of directions, in order and as equal in size as possible: (…, r) → (…, 10)."""
    return torch.stack([part.mean(-1) for part in values.tensor_split(10, dim=-1)], -1)


def energy_by_tenth(singular_values: Tensor) -> Tensor:
    """Return the share (%) of ‖A‖_F² that the strongest 1, 2, … 10 tenths of the directions hold: (r,) → (10,)."""
    sizes = torch.tensor([len(part) for part in singular_values.tensor_split(10)])
    return 100 * energy_shares(singular_values)[sizes.cumsum(0) - 1]


def mean(measure: Callable, items: Iterable) -> Tensor:
    """Return the mean over items, such as matrices, of a measure that maps an item to a tensor."""
    return torch.stack([measure(item) for item in items]).mean(0)


def overlap_between_tasks(seen: Diagnosis) -> Tensor:
    """Return the mean overlap of two different tasks' leading subspaces, () (NaN for one task)."""
    count = len(seen.overlap)
    return (seen.overlap.sum() - seen.overlap.trace()) / (count * (count - 1))


def relative_interference(layers: Iterable[Diagnosis]) -> float:
    """Return Σ (s − 1)² ‖a‖² / Σ ‖a‖² over tasks, directions and matrices (eq. 7); an update of zero would have 1."""
    layers = list(layers)
    return float(sum(seen.interference.sum() for seen in layers) / sum(seen.energy.sum() for seen in layers))


def ranks(spectra: Iterable[Tensor]) -> dict[str, float]:
    """Return the mean effective rank (% of r) and stable rank of matrices from their singular values."""
    spectra = list(spectra)
    return {
        "effective rank, %": float(mean(lambda values: 100 * effective_rank(values) / len(values), spectra)),
        "stable rank": float(mean(stable_rank, spectra)),
    }


def totals(layers: Iterable[Diagnosis]) -> dict[str, float]:
    """Return how inflated, over-counted, interfering and concentrated a merged update is, in seven numbers."""
    layers = list(layers)
    counted = mean(lambda seen: tenths(seen.coefficients.mean(0)), layers)  # (10,), s averaged over the tasks
    return {
        "inflation, largest σ": float(mean(lambda seen: seen.inflation[0], layers)),
        "inflation, top tenth": float(mean(lambda seen: tenths(seen.inflation)[0], layers)),
        "s, top tenth": float(counted[0]),
        "s, lower half": float(counted[5:].nanmean()),  # with fewer than 10 directions some tenths are empty
        "interference": relative_interference(layers),
    } | ranks(seen.singular_values for seen in layers)


# Nearly private directions -------------------------------------------------------------------------------------------


def privacy(layers: Sequence[Diagnosis]) -> dict[str, float]:
    """Return how private the directions of all matrices are: medians, 99 % quantiles and maxima of two measures.

    A direction is private if only one task responds to it. "max s / K", for the sum of the tasks, is 1 where all tasks
    respond alike and far above 1 where a direction is nearly private. "largest share", max_i ‖a_i‖² / Σ_i ‖a_i‖², is
    the strongest task's share of the response: 1/K where all respond alike, 1 where a direction is private.
    """
    largest = torch.cat([seen.energy.amax(0) / seen.energy.sum(0) for seen in layers])
    quantiles = {"median": 0.5, "99 % quantile": 0.99, "maximum": 1.0}
    return {
        f"{measure}, {name}": float(torch.quantile(values, quantile))
        for measure, values in {"max s / K": _peaks(layers), "largest share": largest}.items()
        for name, quantile in quantiles.items()
    }


def by_peak(layers: Sequence[Diagnosis]) -> dict[float, dict[str, float]]:
    """Return how many directions, of all matrices, each octave of max_i s_i / K has, and what SVC does to them.

    Returns:
        upper end of the octave (1/16 for all below, 1024 for all above) → share (%) of the directions, and of the
        merged update's energy Σσ² before and after SVC, ratio of the energies after and before, and the median γ;
        octaves without a direction are left out.
    """
    octaves = _peaks(layers).clamp(2**-4, 2**10).log2().ceil()
    gamma = torch.cat([seen.gamma for seen in layers]).double()
    energy = torch.cat([seen.singular_values for seen in layers]).double().square()
    shares = {
        "directions, %": torch.ones_like(energy),
        "energy, %": energy,
        "energy after SVC, %": gamma.square() * energy,
    }
    found = {}
    for octave in octaves.unique():
        inside = octaves == octave
        found[float(2**octave)] = {
            **{name: float(100 * parts[inside].sum() / parts.sum()) for name, parts in shares.items()},
            "energy after SVC / before": float((gamma.square() * energy)[inside].sum() / energy[inside].sum()),
            "median γ": float(gamma[inside].median()),
        }
    return found


def _peaks(layers: Sequence[Diagnosis]) -> Tensor:
    return torch.cat([seen.max_coefficient / len(seen.coefficients) for seen in layers])
