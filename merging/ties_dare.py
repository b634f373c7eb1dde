"""TIES and DARE: mergers of single entries, which depend on whole tensors by thresholds and majorities, or by masks.

Each is written twice: for whole tensors, and for ranges of rows, when a tensor is not in memory as a whole. The two
agree bit for bit.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.spectral import working
from merging.task_vectors import TaskVector, check, check_choice, check_finite, of_each_task, sum_of_weights

Ranges = Callable[[], Iterable[Sequence[Tensor]]]  # reads one tensor: the K updates of each range of its rows

# TIES ----------------------------------------------------------------------------------------------------------------


def ties(
    task_vectors: Sequence[TaskVector],
    keep: float | Sequence[float] = 0.2,
    scope: str = "layer",
    combine: str = "mean",
    scale: float = 1.0,
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Trim each task's small entries, elect a sign per entry, and combine the entries that agree with it (TIES).

    The official SVC script uses one threshold and one majority per tensor and the mean (the defaults); the published
    TIES (Yadav et al., 2023) is scope="global", combine="sum", scale=0.3.

    Args:
        task_vectors: the K task vectors.
        keep: share of the entries that survive trimming, in (0, 1], or one for each task.
        scope: "layer" takes threshold and majority of each tensor by itself, "global" of all tensors together.
        combine: "mean" over the entries that agree, or their "sum".
        scale: factor of the result.
        weights: of the tasks, by which their vectors are multiplied already (`weighted`): the mean is then divided by
            the sum of the weights that agree, Σ w_i τ_i / Σ w_i, not by their number; by 1 where that sum is zero.

    Raises:
        ValueError: an option is out of range.
    """
    keeps = _check_ties(keep, scope, combine, scale, len(task_vectors))
    names = check(task_vectors)
    merged = {}
    for group in [names] if scope == "global" else [[name] for name in names]:
        pairs = zip(task_vectors, keeps, strict=True)
        thresholds = [_threshold([task[name] for name in group], own) for task, own in pairs]
        signs = (_signs(_trimmed(_updates(task_vectors, name), thresholds)).sum() for name in group)
        majority = sum(int(total) for total in signs)
        for name in group:
            combined = _combined(_trimmed(_updates(task_vectors, name), thresholds), majority, combine, weights)
            merged[name] = (scale * combined).to(task_vectors[0][name].dtype)
    return merged


def _check_ties(keep: float | Sequence[float], scope: str, combine: str, scale: float, tasks: int) -> list[float]:
    """Return the share that each task keeps, after checking all options."""
    keeps = of_each_task("keep", keep, tasks)
    for own in keeps:
        if not 0 < own <= 1:
            raise ValueError(f"keep must be in (0, 1], got {own}")
    check_choice("scope", scope, ("layer", "global"))
    check_choice("combine", combine, ("mean", "sum"))
    check_finite("scale", scale)
    return keeps


def _updates(task_vectors: Sequence[TaskVector], name: str) -> Iterable[Tensor]:
    return (working(task[name]) for task in task_vectors)


def _threshold(tensors: list[Tensor], keep: float) -> Tensor:
    """Return the k-th smallest magnitude of d entries, k = d − ⌊keep · d⌋: what is smaller is trimmed."""
    magnitudes = torch.cat([working(tensor).abs().flatten() for tensor in tensors])
    if not len(magnitudes):
        return magnitudes.sum()
    return magnitudes.kthvalue(_rank(len(magnitudes), keep)).values


def _rank(entries: int, keep: float) -> int:
    return max(1, entries - math.floor(keep * entries))


def _trimmed(updates: Iterable[Tensor], thresholds: Iterable[Tensor | float]) -> Tensor:
    """Return the updates (K, …) with zeros for all entries below their task's threshold."""
    pairs = ((update, torch.as_tensor(limit).to(update)) for update, limit in zip(updates, thresholds, strict=True))
    return torch.stack([update.where(update.abs() >= limit, 0) for update, limit in pairs])


def _signs(trimmed: Tensor) -> Tensor:
    return trimmed.sum(0).sign()  # (K, …) → (…)


def _combined(trimmed: Tensor, majority: int, combine: str, weights: Sequence[float] | None = None) -> Tensor:
    """Combine the entries (K, …) of the elected sign; an undecided entry follows the majority, else it is negative."""
    signs = _signs(trimmed)
    positive = (signs > 0) | ((signs == 0) & (majority > 0))
    agrees = torch.where(positive, trimmed > 0, trimmed < 0)  # (K, …)
    total = trimmed.where(agrees, 0).sum(0)
    if combine == "sum":
        return total
    if weights is None:
        return total / agrees.sum(0).clamp_min(1)
    divisor = torch.tensordot(torch.as_tensor(weights).to(total), agrees.to(total), 1)  # Σ w_i over those that agree
    return total / divisor.where(divisor != 0, 1)


# TIES by rows: thresholds and majority by counting, in three passes, half a megabyte per task.


def elect(
    tensors: Sequence[Ranges],
    every: Callable[[Callable, Iterable], Iterable] = map,
    *,
    keep: float | Sequence[float],
    **_: Any,
) -> dict[str, Any]:
    """Return TIES' global state: one threshold per task, and the sign for undecided entries.

    It is exact, over all given tensors together, which are read three times. The threshold of a task is the k-th
    smallest of its d magnitudes, k = d − ⌊keep · d⌋. Non-negative floats are ordered like the integers with the same
    bits: a first pass counts the upper 16 bits, a second one the lower 16 bits of those magnitudes that share the upper
    half of the threshold. The majority, which needs the thresholds, takes a third pass.

    Args:
        tensors: for each tensor a function that reads its float32 updates, range by range, each time it is called.
        every: `map`, or a map over several threads.
        keep: share of the entries that survive trimming, or one for each task.

    Returns:
        "thresholds", one per task, and "majority", the sum of all signs: the same that `ties` computes when it holds
        all these tensors in memory.
    """
    upper = _counts(tensors, every, lambda bits, task: bits >> 16)
    pairs = zip(upper, of_each_task("keep", keep, len(upper)), strict=True)
    highs, ranks = zip(*(_position(counts, _rank(int(counts.sum()), own)) for counts, own in pairs), strict=True)

    def lower_half(bits: Tensor, task: int) -> Tensor:
        return bits[bits >> 16 == highs[task]] & 0xFFFF

    lower = _counts(tensors, every, lower_half)
    lows = [_position(counts, own)[0] for counts, own in zip(lower, ranks, strict=True)]
    thresholds = [
        struct.unpack("<f", struct.pack("<i", high << 16 | low))[0] for high, low in zip(highs, lows, strict=True)
    ]

    def signs(ranges: Ranges) -> int:
        return sum(int(_signs(_trimmed(updates, thresholds)).sum(dtype=torch.float64)) for updates in ranges())

    return {"thresholds": thresholds, "majority": sum(every(signs, tensors))}


def _counts(tensors: Sequence[Ranges], every: Callable, half: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return how often each value of `half(bits, task)` occurs among the magnitudes of each task, (K, 65536)."""

    def count(ranges: Ranges) -> Tensor | int:
        counts = 0
        for updates in ranges():
            bits = (update.abs().flatten().view(torch.int32) for update in updates)
            found = [torch.bincount(half(each, task), minlength=2**16) for task, each in enumerate(bits)]
            counts = counts + torch.stack(found)
        return counts

    return sum(every(count, tensors)).cpu()


def _position(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the value at which the running count reaches `rank`, and the rank within that value."""
    running = counts.cumsum(0)
    value = int(torch.searchsorted(running, rank))
    return value, rank - int(running[value - 1] if value else 0)


def elected_together(*, scope: str, keep: float | Sequence[float], **_: Any) -> dict[str, Any] | None:
    """Return the options that must be the same for all tensors if one election covers all of them, else None."""
    return {"scope": scope, "keep": keep} if scope == "global" else None


def ties_by_rows(
    name: str,
    tasks: int,
    election: Mapping[str, Any],
    *,
    keep: float | Sequence[float],
    scope: str,
    combine: str,
    scale: float,
    weights: Sequence[float] | None = None,
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the function that merges a range of rows by TIES, updates (K tensors) → merged, given what `elect` found.

    Args:
        name, tasks: of the tensor, which TIES does not need, and K.
        election: what `elect` returned for this tensor, or for all tensors together.
        keep, scope, combine, scale, weights: as for `ties`.

    Raises:
        ValueError: an option is out of range.
    """
    _check_ties(keep, scope, combine, scale, tasks)
    thresholds, majority = election["thresholds"], election["majority"]
    return lambda updates: scale * _combined(_trimmed(updates, thresholds), majority, combine, weights)


# DARE ----------------------------------------------------------------------------------------------------------------


COMBINE = ("mean", "sum", "elected mean", "elected sum")  # what DARE does with what it has not dropped


def dare(
    task_vectors: Sequence[TaskVector],
    drop: float | Sequence[float] = 0.8,
    seed: int = 0,
    rescale: bool = True,
    combine: str = "mean",
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Drop entries at random, rescale the others by 1 / (1 − drop), and take the mean (Yu et al., 2024).

    Each mask depends on nothing but (seed, task index, tensor name): not on the device, nor on which tensors were
    merged before. Other implementations agree in distribution only.

    Args:
        task_vectors: the K task vectors; their order decides which masks they get.
        drop: probability that an entry is dropped, in [0, 1), or one for each task.
        seed: any integer.
        rescale: whether the others are multiplied by 1 / (1 − drop), which keeps the expected update.
        combine: "mean" or "sum" of all tasks, or of those that agree with the sign of the sum, as in TIES ("elected
            mean", "elected sum"; an undecided entry counts as positive).
        weights: as for `ties`; the mean is then divided by their sum.

    Raises:
        ValueError: an option is out of range.
    """
    options = dict(drop=drop, seed=seed, rescale=rescale, combine=combine, weights=weights)
    merged = {}
    for name in check(task_vectors):
        merge = dare_by_rows(name, len(task_vectors), **options)
        merged[name] = merge([working(task[name]) for task in task_vectors]).to(task_vectors[0][name].dtype)
    return merged


def dare_by_rows(
    name: str,
    tasks: int,
    decided: None = None,
    *,
    drop: float | Sequence[float],
    seed: int,
    rescale: bool = True,
    combine: str = "mean",
    weights: Sequence[float] | None = None,
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the function that merges ranges of rows of one tensor by DARE, updates (K tensors) → merged.

    It draws its masks as it goes, so it must be called on each range once, in order.

    Args:
        name: of the tensor.
        tasks: K.
        decided: None: nothing has to be known first.
        drop, seed, rescale, combine, weights: as for `dare`.

    Raises:
        ValueError: an option is out of range.
    """
    drops = of_each_task("drop", drop, tasks)
    for own in drops:
        if not 0 <= own < 1:
            raise ValueError(f"drop must be in [0, 1), got {own}")
    check_choice("combine", combine, COMBINE)
    factors = [1 / (1 - own) if rescale else 1.0 for own in drops]
    generators = [_generator(seed, task, name) for task in range(tasks)]

    def merge(updates: Sequence[Tensor]) -> Tensor:
        each = zip(updates, drops, factors, generators, strict=True)
        kept = (update * (_mask(update, own, generator) * factor) for update, own, factor, generator in each)
        if combine.startswith("elected"):
            return _combined(torch.stack(list(kept)), 1, combine.removeprefix("elected "), weights)
        return sum(kept) if combine == "sum" else sum(kept) / sum_of_weights(weights, tasks)

    return merge


def _generator(seed: int, task: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{task}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _mask(update: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    """Return 1 for each entry that is kept and 0 for the others, drawn on the CPU for every device."""
    return (torch.rand(update.shape, generator=generator) >= drop).to(update)
