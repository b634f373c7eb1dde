"""Merging a plan tensor by tensor: read a range, merge it, write it, forget it.

Arithmetic is in float32 whatever the files hold; one rounding takes the result to the output's dtype. The methods are
those of `merging.mergers`, called on dicts of one tensor. What a method does entry by entry (linear ones, TIES, DARE)
is done on ranges of rows, so that no tensor need be in memory as a whole; what needs matrices (TSV-M, Iso, STAR, SVC)
reads the task vectors of one tensor one after the other, and holds a few more tensors of that size
(`merging.command.dry_run`).
LoRA updates are merged in factored form, where a method has one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from common.spectral import singular_values
from merging.calibration import SVC, Diagnosis, calibrate, diagnose, own_bases
from merging.command import changes
from merging.command.changes import Step, differences, joined, ranges, row_ranges, task_vectors
from merging.command.findings import matrix_row
from merging.command.options import SVC_FLAGS
from merging.command.plan import Plan
from merging.command.storage import Piece
from merging.lowrank import LowRank, diagnose_low_rank, joint_basis, merge_low_rank
from merging.mergers import Merger, merger, weight_average
from merging.norm_matching import frobenius_norm, norm_factor, norm_match, norm_match_low_rank
from merging.task_vectors import Finite, TaskVector
from merging.unrelated import Unrelated
from merging.views import read_twice

CHANCE = 2**24  # entries of all unrelated updates together, up to which they are in memory at once: 64 MiB
Rule = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Streamer:
    """Merges the steps of a plan by its recipe; safe to use from several threads.

    Args:
        plan: what becomes of each tensor.
        device: where the arithmetic is done.
        decided: what the method decides over all tensors together (`merging.command.thresholds`), or None.
    """

    plan: Plan
    device: torch.device
    decided: Any = None

    @property
    def merger(self) -> Merger:
        """The merger that the recipe names."""
        return merger(self.plan.recipe.method)

    def tensor(self, step: Step, rows: list[dict[str, Any]] | None = None) -> Iterator[Tensor]:
        """Yield one output tensor as consecutive ranges of its flattened entries, on the CPU, in the output's dtype.

        Args:
            step: which tensor.
            rows: where given, the diagnoses of its matrices are appended to it, a dict of numbers each.

        Raises:
            ValueError: an expert holds NaN or infinite entries, or the result overflows the output's dtype.
        """
        position = 0
        if step.change:
            step = replace(step, base=read_twice(step.base))  # to find what the experts changed, and to add that
            updates, scale = self._updates(step, rows), step.final_scale
            for merged in step.change.applied(step.base, updates, scale, self.device):
                position += merged.numel()
                yield rounded(step.name, merged, step.dtype)
        for start in range(position, step.base.count, changes.RANGE):  # what is kept from the base
            yield step.base.read(start, min(start + changes.RANGE, step.base.count), step.dtype)

    def update(self, step: Step, rows: list[dict[str, Any]] | None = None) -> Tensor:
        """Return the merged update of a whole tensor, final scale included, float32, in the shape of the change."""
        update = joined(self._updates(step, rows), step.change.shape(step.base), self.device)
        return update.mul_(step.final_scale)

    def low_rank(self, step: Step, rows: list[dict[str, Any]] | None = None) -> LowRank:
        """Return the merged update of a step of LoRA in factored form, norm-matched or before the final scale."""
        stored, options = step.change.read(self.device), step.of_merger(self.plan.recipe.method)
        read = [replace(own, scale=own.scale * w) for own, w in zip(stored, step.weights, strict=True)]
        svc = replace(svc_of(step), split_qkv=False, vectors=False, flatten=False)  # there are matrices only
        (piece,), method = step.pieces, self.plan.recipe.method
        if rows is not None and treatment(step, piece) == "calibrated":
            seen = diagnose_low_rank(read, method, svc, name=step.name, **options)
            rows.append(self._found(step, piece, seen))
        merged = merge_low_rank(read, method, svc if step.options["svc"] else None, name=step.name, **options)
        return norm_match_low_rank(merged, read) if step.norm_matched else merged

    def _updates(self, step: Step, rows: list[dict] | None) -> Iterator[tuple[int, Tensor]]:
        """Yield (first entry, merged update) for consecutive ranges of a tensor, as stored."""
        return chain.from_iterable(self._updates_of(step, piece, rows) for piece in step.pieces)

    def _updates_of(self, step: Step, piece: Piece, rows: list[dict] | None) -> Iterator[tuple[int, Tensor]]:
        if self.is_factored(step, piece):
            merged = self.low_rank(step, rows)
            rule = lambda part: merged.scale * (merged.b[part] @ merged.a)  # noqa: E731
        elif self.is_whole(step, piece):
            merged = self._whole(step, piece, rows)
            rule = lambda part: merged[part] if piece.shape else merged  # noqa: E731
        else:
            rule = self._by_rows(step, piece)
        for part in row_ranges(piece):
            yield piece.start + part.start * piece.width, rule(part)

    def _whole(self, step: Step, piece: Piece, rows: list[dict] | None) -> Tensor:
        """Merge and calibrate a piece as a matrix in the orientation of the layer; the result is as stored."""
        tasks = task_vectors(step, piece, self.device)
        rule = self._rule(step, piece)
        if rule is None:
            merged = self.merger(tasks, **step.of_merger(self.plan.recipe.method))[piece.name]
        elif piece.count <= changes.RANGE:
            merged = piece.oriented(rule([piece.oriented(task[piece.name]) for task in tasks]))
        else:
            merged = torch.empty(piece.shape, device=self.device)
            for part in row_ranges(piece):
                merged[part] = rule(differences(step, piece, part, self.device))
            merged = piece.oriented(merged)
        if treatment(step, piece) != "merged value":
            merged = self._calibrated(step, piece, merged, tasks, rows)
        if step.norm_matched:
            merged = norm_match({piece.name: merged}, tasks)[piece.name]
        return piece.oriented(merged)

    def _by_rows(self, step: Step, piece: Piece) -> Callable[[slice], Tensor]:
        """Return what merges ranges of rows, each once and in order; matching norms takes a pass of its own before."""
        rule = self._rule(step, piece)
        plain = lambda part: rule(differences(step, piece, part, self.device))  # noqa: E731
        if not step.norm_matched:
            return plain
        first, merged, own = self._rule(step, piece), 0.0, [0.0] * len(step.experts)
        for part in row_ranges(piece):
            updates = differences(step, piece, part, self.device)
            own = [math.hypot(norm, frobenius_norm(update)) for norm, update in zip(own, updates, strict=True)]
            merged = math.hypot(merged, frobenius_norm(first(updates)))
        factor = norm_factor(merged, own)
        return lambda part: plain(part).mul_(factor)

    def _calibrated(
        self, step: Step, piece: Piece, merged: Tensor, tasks: list[TaskVector], rows: list[dict] | None
    ) -> Tensor:
        svc = svc_of(step)
        if rows is not None:
            rows.append(self._found(step, piece, diagnose({piece.name: merged}, tasks, svc)))
        if not step.options["svc"]:
            return merged
        bases = own_bases(self.plan.recipe.method, tasks, svc)
        return calibrate({piece.name: merged}, tasks, svc, bases=bases)[piece.name]

    def _found(self, step: Step, piece: Piece, seen: Mapping[str, Diagnosis]) -> dict[str, Any]:
        """Return the numbers of a piece for the report, beside what merging makes of unrelated updates."""
        height = piece.seen[0] if len(piece.seen) > 1 else 1
        width = piece.count // height  # kernels are (out, rest)
        svc = svc_of(step)
        side = width if svc.space == "input" or len(piece.seen) < 2 else height // len(seen)
        drawn = []
        for name, part in seen.items():
            shape = (height // len(seen), width)
            tasks = [Unrelated(name, shape, spectrum, task) for task, spectrum in enumerate(part.spectra)]
            if (spectrum := self._merged_by_chance(step, piece, name, tasks)) is not None:
                drawn.append(spectrum)
        return matrix_row(piece, seen, side, drawn)

    def _merged_by_chance(self, step: Step, piece: Piece, name: str, tasks: Sequence[Unrelated]) -> Tensor | None:
        """Return the singular values (r,) of merged unrelated updates; None where that needs all of them at once."""
        method, options = self.plan.recipe.method, step.of_merger(self.plan.recipe.method)
        if self.is_factored(step, piece):
            merged = merge_low_rank([task.factors() for task in tasks], method, name=name, **options)
            return singular_values(joint_basis([merged]).cores[0])
        small = len(tasks) * piece.count <= CHANCE
        if small:
            tasks = [dict(task) for task in tasks]  # drawn once
        if not takes(self.merger, piece):
            return singular_values(weight_average(tasks)[name])
        if self.merger.by_rows and not small:
            return None
        return singular_values(self.merger(tasks, **options)[name])

    # Which way -------------------------------------------------------------------------------------------------------

    def is_whole(self, step: Step, piece: Piece) -> bool:
        """Return whether the task vectors of a piece are in memory as a whole while it is merged."""
        return not self.is_factored(step, piece) and (piece.count <= changes.RANGE or self.is_spectral(step, piece))

    def is_factored(self, step: Step, piece: Piece) -> bool:
        """Return whether a piece is merged in factored form; parts of a fused weight have no factors of their own."""
        split = step.options["svc"] and svc_of(step).splits(piece.name)
        return step.change.factored and self.merger.factored and not split

    def is_spectral(self, step: Step, piece: Piece) -> bool:
        """Return whether a piece is merged or calibrated as a matrix, not entry by entry."""
        svc = step.options["svc"] or self.plan.recipe.report
        return not self.by_entry(piece) or (svc and treatment(step, piece) != "merged value")

    def by_entry(self, piece: Piece) -> bool:
        """Return whether the merger treats each entry of a piece by itself, apart from thresholds and masks."""
        return self.merger.by_entry or not takes(self.merger, piece)

    def _rule(self, step: Step, piece: Piece) -> Rule | None:
        """Return how ranges of rows are merged, or None where the method needs the whole piece."""
        if not self.by_entry(piece):
            return None
        own, options = self.merger, step.of_merger(self.plan.recipe.method)
        if not takes(own, piece):
            return lambda updates: weight_average([Finite({piece.name: update}) for update in updates])[piece.name]
        if own.by_rows is None or (self.decided is None and piece.count <= changes.RANGE):  # a single range
            return lambda updates: own([Finite({piece.name: update}) for update in updates], **options)[piece.name]
        options, decided = own.options | options, self.decided
        if decided is None and own.by_rows.decide:
            decided = own.by_rows.decide([ranges(step, piece, self.device)], **options)
        return own.by_rows.start(piece.name, len(step.experts), decided, **options)


def svc_of(step: Step) -> SVC:
    """Return the options of SVC for one tensor."""
    return SVC(**{name: step.options[flag] for name, flag in SVC_FLAGS.items()})


def treatment(step: Step, piece: Piece) -> str:
    """Return what SVC does, or would do, to a piece: "calibrated", "vector rule" or "merged value"."""
    return svc_of(step).treatment(piece.name, torch.empty(piece.seen, device="meta"))


def takes(own: Merger, piece: Piece) -> bool:
    """Return whether a merger treats a piece by its own rule; where not, it takes the mean."""
    return own.takes(piece.name, torch.empty(piece.seen, device="meta"))


def rounded(name: str, merged: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a merged tensor, flat, on the CPU and in the dtype of the output.

    Raises:
        ValueError: an entry is beyond that dtype.
    """
    result = merged.reshape(-1).to("cpu", dtype)
    if not result.sum().isfinite() and (count := int((~result.isfinite()).sum())):  # a sum may overflow by itself
        raise ValueError(f"{name!r}: {count} merged entries overflow {dtype}; choose --dtype float32")
    return result
