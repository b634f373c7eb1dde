"""Merging a plan tensor by tensor: read a range, merge it, write it, forget it.

Arithmetic is in float32 whatever the files hold; one rounding takes the result to the output's dtype. The methods are
those of `merging.mergers`, called on dicts of one tensor. What a method does entry by entry (linear ones, TIES, DARE)
is done on ranges of rows, so that no tensor need be in memory as a whole; what needs matrices (TSV-M, Iso, STAR, SVC)
has the K task vectors of one tensor in memory and a few more tensors of that size (`merging.estimate`). TIES
thresholds of large tensors, or of all tensors together, come from histograms over the bits of the magnitudes: exact,
in two passes, with half a megabyte for each expert.
"""

import inspect
import math
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging import calibration, mergers
from merging.calibration import calibrate, diagnose
from merging.mergers import MERGERS, iso_basis
from merging.plan import Piece, Plan, Step
from merging.recipe import SVC_OPTIONS, merger_options
from merging.summary import totals
from merging.task_vectors import apply

RANGE = 2**21  # entries merged at a time where rows are independent: 8 MiB in float32
BY_ENTRY = ("weight_average", "task_arithmetic", "plain_sum", "ties", "dare")  # methods that need no matrix
Rule = Callable[[list[Tensor], slice], Tensor]


@dataclass(frozen=True)
class Election:
    """What TIES decides over many entries before it can merge one: a threshold a task, and the majority's sign."""

    thresholds: tuple[float, ...]
    majority: int


@dataclass(frozen=True)
class Streamer:
    """Merges the steps of a plan by its recipe; safe to use from several threads.

    Args:
        plan: what becomes of each tensor.
        device: where the arithmetic is done.
        election: of global TIES, from `elect` over all tensors; None for other methods.
    """

    plan: Plan
    device: torch.device
    election: Election | None = None

    def tensor(self, step: Step, rows: list[dict[str, Any]] | None = None) -> Iterator[Tensor]:
        """Yield one output tensor as consecutive ranges of its flattened entries, on the CPU, in the output's dtype.

        Args:
            step: which tensor.
            rows: where given, the diagnoses of its matrices are appended to it, a dict of numbers each.

        Raises:
            ValueError: an expert holds NaN or infinite entries, or the result overflows the output's dtype.
        """
        position = 0
        for piece in step.pieces:
            for start, update in self._updates(step, piece, rows):
                position = start + update.numel()
                base = step.base.read(start, position, torch.float32, self.device).reshape(update.shape)
                merged = apply({step.name: base}, {step.name: update}, step.options["final_scale"])[step.name]
                yield _rounded(step, merged)
        for start in range(position, step.base.count, RANGE):  # what is kept from the base
            yield step.base.read(start, min(start + RANGE, step.base.count), step.dtype)

    def _updates(self, step: Step, piece: Piece, rows: list[dict] | None) -> Iterator[tuple[int, Tensor]]:
        """Yield (first entry, merged update) for consecutive ranges of a piece."""
        if not self.is_whole(step, piece):
            rule = self._rule(step, piece)
            for part in _row_ranges(piece):
                yield piece.start + part.start * _width(piece), rule(self._differences(step, piece, part), part)
            return
        updates = self._differences(step, piece)
        merged = self._merged(step, piece, updates)
        if treatment(step, piece) != "merged value":
            updates, merged = [_oriented(piece, update) for update in updates], _oriented(piece, merged)
            merged = _oriented(piece, self._calibrated(step, piece, merged, updates, rows))
        del updates
        for part in _row_ranges(piece):
            yield piece.start + part.start * _width(piece), merged[part] if piece.shape else merged

    def _merged(self, step: Step, piece: Piece, updates: list[Tensor]) -> Tensor:
        """Merge a whole piece, as stored; methods for matrices see it in the orientation of the layer."""
        rule = self._rule(step, piece)
        if rule is None:
            seen = [_oriented(piece, update) for update in updates]
            return _oriented(piece, _library_rule(self.plan.recipe.method, step, piece)(seen, slice(None)))
        if piece.count <= RANGE:
            return rule(updates, slice(None))
        merged = torch.empty(piece.shape, device=self.device)
        for part in _row_ranges(piece):
            merged[part] = rule([update[part] for update in updates], part)
        return merged

    def _calibrated(
        self, step: Step, piece: Piece, merged: Tensor, updates: list[Tensor], rows: list[dict] | None
    ) -> Tensor:
        options, tasks = svc_options(step), [{piece.name: update} for update in updates]
        if rows is not None:
            rows.append(_numbers(piece, diagnose({piece.name: merged}, tasks, **options)))
        if not step.options["svc"]:
            return merged
        method = self.plan.recipe.method
        if method in ("iso_c", "iso_cts") and options["space"] == "output" and not options["split_qkv"]:
            options["bases"] = iso_basis(tasks, method) or None  # its result has no basis: all σ are equal
        return calibrate({piece.name: merged}, tasks, **options)[piece.name]

    # Which way -------------------------------------------------------------------------------------------------------

    def is_whole(self, step: Step, piece: Piece) -> bool:
        """Return whether the task vectors of a piece are in memory as a whole while it is merged."""
        return piece.count <= RANGE or self.is_spectral(step, piece)

    def is_spectral(self, step: Step, piece: Piece) -> bool:
        """Return whether a piece is merged or calibrated as a matrix, not entry by entry."""
        svc = step.options["svc"] or self.plan.recipe.report
        return not self.by_entry(piece) or (svc and treatment(step, piece) != "merged value")

    def by_entry(self, piece: Piece) -> bool:
        """Return whether the merger treats each entry of a piece by itself, apart from thresholds and masks."""
        method = self.plan.recipe.method
        return method in BY_ENTRY or not takes(method, piece)

    def _rule(self, step: Step, piece: Piece) -> Rule | None:
        """Return how ranges of rows are merged, or None where the method needs the whole piece."""
        method = self.plan.recipe.method
        if not self.by_entry(piece):
            return None
        if method == "ties" and (self.election or piece.count > RANGE):
            return self._ties_rule(step, piece)
        if method == "dare" and piece.count > RANGE:
            return _dare_rule(step, piece)
        return _library_rule(method if takes(method, piece) else "weight_average", step, piece)

    def _ties_rule(self, step: Step, piece: Piece) -> Rule:
        options = merger_options("ties") | chosen(step, "ties")
        found = self.election or elect([(step, piece)], options["keep"], self.device)

        def rule(updates: list[Tensor], part: slice) -> Tensor:
            combined = mergers._ties_combine(_trimmed(updates, found.thresholds), found.majority, options["combine"])
            return options["scale"] * combined

        return rule

    def _differences(self, step: Step, piece: Piece, part: slice | None = None) -> list[Tensor]:
        return differences(step, piece, part, self.device)


def differences(step: Step, piece: Piece, part: slice | None, device: torch.device) -> list[Tensor]:
    """Return the task vectors τ_i of some rows of a piece (default: all), float32, as stored.

    Raises:
        ValueError: an entry is NaN or infinite; names file and tensor.
    """
    part = part or slice(0, piece.rows)
    start, stop = (piece.start + row * _width(piece) for row in (part.start, part.stop))
    shape = (part.stop - part.start, *piece.shape[1:]) if piece.shape else ()
    base = step.base.read(start, stop, torch.float32, device)
    updates = []
    for expert in step.experts:
        update = expert.read(start, stop, torch.float32, device).sub_(base)
        if not update.sum().isfinite() and not update.isfinite().all():
            wrong = expert if base.isfinite().all() else step.base
            count = int((~wrong.read(start, stop, torch.float32).isfinite()).sum())
            raise ValueError(
                f"{wrong.where}: {count} entries are NaN or infinite; --set '{step.name}:merge=false' keeps the base's"
            )
        updates.append(update.reshape(shape))
    return updates


def treatment(step: Step, piece: Piece) -> str:
    """Return what SVC does, or would do, to a piece: "calibrated", "vector rule" or "merged value"."""
    options = calibration._Options(**(calibrate.__kwdefaults__ | svc_options(step)))
    return calibration._treatment(piece.name, torch.empty(piece.seen, device="meta"), options)


def svc_options(step: Step) -> dict[str, Any]:
    """Return the options of `calibrate` for one tensor."""
    return {key: step.options[key] for key in SVC_OPTIONS} | {"flatten": step.options["kernels"]}


def takes(method: str, piece: Piece) -> bool:
    """Return whether a method treats a piece as a matrix (or treats everything); where not, it takes the mean."""
    parameter = inspect.signature(MERGERS[method]).parameters.get("matrices")
    if parameter is None:
        return True
    return bool(piece.count) and parameter.default(piece.name, torch.empty(piece.seen, device="meta"))


def chosen(step: Step, method: str) -> dict[str, Any]:
    """Return the options of a merger that the recipe sets for one tensor."""
    return {key: step.options[key] for key in merger_options(method) if key in step.options}


def _library_rule(method: str, step: Step, piece: Piece) -> Rule:
    def rule(updates: list[Tensor], part: slice) -> Tensor:
        return MERGERS[method]([{piece.name: update} for update in updates], **chosen(step, method))[piece.name]

    return rule


def _dare_rule(step: Step, piece: Piece) -> Rule:
    """DARE on ranges of rows: the masks of all rows are drawn at once, as `dare` draws them, and kept as booleans."""
    options = merger_options("dare") | chosen(step, "dare")
    MERGERS["dare"]([{}], **options)  # checks them
    like, drop = torch.empty(piece.shape, dtype=torch.bool), options["drop"]
    masks = [mergers._dare_mask(like, drop, options["seed"], index, piece.name) for index in range(len(step.experts))]

    def rule(updates: list[Tensor], part: slice) -> Tensor:
        kept = (update * mask[part].to(update) for update, mask in zip(updates, masks, strict=True))
        return sum(kept) / ((1 - drop) * len(updates))

    return rule


def _numbers(piece: Piece, diagnoses: dict[str, calibration.Diagnosis]) -> dict[str, Any]:
    gamma = torch.cat([seen.gamma for seen in diagnoses.values()])
    return {
        "tensor": piece.name,
        "shape": "×".join(map(str, piece.seen)),
        **totals(diagnoses.values()),
        "smallest γ": float(gamma.min()),
        "largest γ": float(gamma.max()),
    }


def _rounded(step: Step, merged: Tensor) -> Tensor:
    result = merged.reshape(-1).to("cpu", step.dtype)
    if not result.sum(dtype=torch.float64).isfinite():
        count = int((~result.isfinite()).sum())
        raise ValueError(f"{step.name!r}: {count} merged entries overflow {step.dtype}; choose --dtype float32")
    return result


def _width(piece: Piece) -> int:
    return piece.count // piece.rows if piece.rows else 0


def _row_ranges(piece: Piece) -> Iterator[slice]:
    height = max(1, RANGE // max(1, _width(piece)))
    for start in range(0, piece.rows, height):
        yield slice(start, min(start + height, piece.rows))


def _oriented(piece: Piece, tensor: Tensor) -> Tensor:
    return tensor.T if piece.transposed else tensor


# TIES over many entries ----------------------------------------------------------------------------------------------


def _trimmed(updates: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    tensors = [torch.tensor(threshold) for threshold in thresholds]
    return mergers._trimmed([{"": update} for update in updates], "", tensors)


def global_election(
    plan: Plan, device: torch.device, every: Callable[[Callable, Iterable], Iterable] = map
) -> Election | None:
    """Return the election of TIES over all merged tensors together, or None for any other method or scope.

    Raises:
        ValueError: a pattern gives some tensors another scope or share.
    """
    steps = [step for step in plan.steps if step.experts]
    options = [merger_options("ties") | chosen(step, "ties") for step in steps if plan.recipe.method == "ties"]
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
        parts = (differences(*entry, part, device) for part in _row_ranges(entry[1]))
        return sum(int(mergers._ties_signs(_trimmed(part, thresholds)).sum(dtype=torch.float64)) for part in parts)

    return Election(thresholds, sum(every(signs, pieces)))


def _counts(
    pieces: Sequence[tuple[Step, Piece]], device: torch.device, every: Callable, half: Callable, tasks: int
) -> Tensor:
    """Return how often each value of `half(bits, task)` occurs among the magnitudes of each task, (K, 65536)."""
    counts, lock = torch.zeros(tasks, 2**16, dtype=torch.int64, device=device), threading.Lock()

    def count(entry: tuple[Step, Piece]) -> None:
        for part in _row_ranges(entry[1]):
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
