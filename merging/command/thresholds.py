"""TIES over more entries than are in memory at once: thresholds and majority by counting, exact.

They come from histograms over the bits of the magnitudes, in two passes, with half a megabyte for each expert.
"""

import math
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging import mergers
from merging.command.changes import differences, row_ranges
from merging.command.recipe import merger_options
from merging.command.storage import Piece, Plan, Step


@dataclass(frozen=True)
class Election:
    """What TIES decides over many entries before it can merge one: a threshold a task, and the majority's sign."""

    thresholds: tuple[float, ...]
    majority: int


def trimmed(updates: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """Return the updates (K, …) with zeros for all entries below their task's threshold."""
    tensors = [torch.tensor(threshold) for threshold in thresholds]
    return mergers._trimmed([{"": update} for update in updates], "", tensors)


def global_election(
    plan: Plan, device: torch.device, every: Callable[[Callable, Iterable], Iterable] = map
) -> Election | None:
    """Return the election of TIES over all merged tensors together, or None for any other method or scope.

    Raises:
        ValueError: a pattern gives some tensors another scope or share.
    """
    steps = [step for step in plan.steps if step.experts and not step.repeats]
    options = [merger_options("ties") | step.of_merger("ties") for step in steps if plan.recipe.method == "ties"]
    if not any(each["scope"] == "global" for each in options):
        return None
    pairs = zip(steps, options, strict=True)
    if odd := [step.name for step, each in pairs if _globally(each) != _globally(options[0])]:
        raise ValueError(f"{odd[0]!r}: global TIES has one scope and one keep for all tensors; set them with '*'")
    return elect([(step, piece) for step in steps for piece in step.pieces], options[0]["keep"], device, every)


def _globally(options: dict[str, Any]) -> tuple[str, float]:
    return options["scope"], options["keep"]


def elect(
    pieces: Sequence[tuple[Step, Piece]],
    keep: float,
    device: torch.device,
    every: Callable[[Callable, Iterable], Iterable] = map,
) -> Election:
    """Return the thresholds and the majority of TIES over some pieces together, exactly, reading them three times.

    The threshold of a task is the k-th smallest of its d magnitudes, k = d − ⌊keep · d⌋. Non-negative floats are
    ordered like the integers with the same bits: a first pass counts the upper 16 bits, a second one the lower 16 bits
    of those magnitudes that share the upper half of the threshold. The majority needs the thresholds: a third pass.

    Args:
        pieces: ranges of tensors.
        keep: share of the entries that survive trimming.
        device: where the counting is done.
        every: map, or one over several threads.

    Returns:
        the same that `merging.ties` computes when it holds all these tensors in memory.
    """
    tasks = len(pieces[0][0].experts)
    total = sum(piece.count for _, piece in pieces)
    rank = max(1, total - math.floor(keep * total))
    upper = _counts(pieces, device, every, lambda bits, task: bits >> 16, tasks)
    highs, ranks = zip(*(_position(counts, rank) for counts in upper), strict=True)

    def lower_half(bits: Tensor, task: int) -> Tensor:
        return bits[bits >> 16 == highs[task]] & 0xFFFF

    lower = _counts(pieces, device, every, lower_half, tasks)
    lows = [_position(counts, own)[0] for counts, own in zip(lower, ranks, strict=True)]
    thresholds = tuple(
        struct.unpack("<f", struct.pack("<i", high << 16 | low))[0] for high, low in zip(highs, lows, strict=True)
    )

    def signs(entry: tuple[Step, Piece]) -> int:
        parts = (differences(*entry, part, device) for part in row_ranges(entry[1]))
        return sum(int(mergers._ties_signs(trimmed(part, thresholds)).sum(dtype=torch.float64)) for part in parts)

    return Election(thresholds, sum(every(signs, pieces)))


def _counts(
    pieces: Sequence[tuple[Step, Piece]], device: torch.device, every: Callable, half: Callable, tasks: int
) -> Tensor:
    """Return how often each value of `half(bits, task)` occurs among the magnitudes of each task, (K, 65536)."""
    counts, lock = torch.zeros(tasks, 2**16, dtype=torch.int64, device=device), threading.Lock()

    def count(entry: tuple[Step, Piece]) -> None:
        for part in row_ranges(entry[1]):
            for task, update in enumerate(differences(*entry, part, device)):
                bits = update.abs().flatten().view(torch.int32)
                found = torch.bincount(half(bits, task), minlength=2**16)
                with lock:
                    counts[task] += found

    for _ in every(count, pieces):
        pass
    return counts.cpu()


def _position(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the value at which the running count reaches `rank`, and the rank within that value."""
    running = counts.cumsum(0)
    value = int(torch.searchsorted(running, rank))
    return value, rank - int(running[value - 1] if value else 0)
