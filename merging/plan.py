"""What becomes of each tensor: which tensors of the experts belong to it, how it is stored, whether it is merged.

No list of architectures: everything is read off names, shapes and, where two tensors may be tied, bytes.

Names       experts may carry a prefix that the base lacks, or lack one ("transformer.", "module."); the one under
            which most names agree is taken.
Missing     a tensor that no expert has (another head) keeps the base's value; one that some have and others lack is
            refused. Tensors that only experts have are left out. A tied copy that one side does not store is found by
            comparing bytes.
Vocabulary  tensors that differ in their number of rows alone: the rows that all have are merged, the base's other
            rows are kept. With config.json on both sides the rows must be their vocab_size, else it is refused.
Integers    keep the base's value; where experts differ in more than a single counter, that is refused.
Storage     a 2-D tensor is a matrix (out, in), or, transposed, (in, out): told by the length of its bias (GPT-2's
            Conv1D; square ones go by the other tensors of their kind), and by the name of parameters *proj and
            *projection (OpenCLIP). Output space always means the output of the layer.
            A 3-D tensor whose first dimension is the smallest, or whose name says "expert", is a stack of matrices,
            each merged by itself under the name NAME[i]. Every other tensor of more than two dimensions is a kernel:
            methods for matrices that take kernels see it as (out, rest), the others take the mean, and SVC leaves it
            alone unless told otherwise.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from merging.checkpoints import Checkpoint, Entry
from merging.recipe import OUTPUT_DTYPES, Recipe

COMPARED = 2**22  # entries compared at a time


@dataclass(frozen=True)
class Piece:
    """A consecutive range of a tensor's entries that is merged by itself: all of it, or one matrix of a stack."""

    name: str
    start: int  # in the flattened tensor
    shape: tuple[int, ...]  # as stored
    transposed: bool = False  # stored as (in, out)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape that methods see."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class Step:
    """One tensor of the output."""

    name: str
    base: Entry
    experts: tuple[Entry, ...]  # empty: the base's value is kept
    pieces: tuple[Piece, ...]
    dtype: torch.dtype  # of the output
    layout: str
    options: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the output."""
        return self.base.count * self.dtype.itemsize


@dataclass
class Plan:
    """All tensors, and what has to be said about them."""

    recipe: Recipe
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what differs between the models, and is refused by --strict
    remarks: list[str] = field(default_factory=list)  # tied tensors


def make_plan(recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint]) -> Plan:
    """Decide what becomes of each tensor of the base.

    Raises:
        ValueError: one line that names file and tensor; with `recipe.strict` for everything that would be a note.
    """
    plan = Plan(recipe, base, tuple(experts))
    names = [_match(base, expert, plan) for expert in experts]
    storage = _storage(base.entries)
    for name, entry in base.entries.items():
        options = recipe.of(name, len(experts))
        found = _partners(name, entry, base, experts, names, plan.notes) if options["merge"] else ()
        rows = _common_rows(entry, found, base, experts, plan.notes)
        layout = options["layout"] or storage[name]
        pieces = _pieces(entry, layout, rows) if found else ()
        dtype = OUTPUT_DTYPES.get(recipe.dtype, entry.dtype) if entry.dtype.is_floating_point else entry.dtype
        plan.steps.append(Step(name, entry, found, pieces, dtype, layout, options))
    plan.steps = _with_ties(plan.steps, plan.remarks)
    if odd := recipe.unmatched(base.entries):
        raise ValueError(f"--set {odd[0]!r}: matches no tensor of {base.given}")
    if not any(step.experts for step in plan.steps):
        raise ValueError(f"{base.given}: no tensor is merged; the experts share none with it")
    if recipe.strict and plan.notes:
        raise ValueError(f"--strict: {plan.notes[0]}" + _more(len(plan.notes) - 1))
    return plan


# Which tensors belong together ---------------------------------------------------------------------------------------


def _match(base: Checkpoint, expert: Checkpoint, plan: Plan) -> dict[str, str]:
    """Return base name → expert name under the prefix, added or taken away, with which most names agree."""
    ours, theirs = base.entries.keys(), expert.entries.keys()
    matches = [{name: name for name in ours if name in theirs}]
    matches += [{name: p + name for name in ours if p + name in theirs} for p in _prefixes(theirs)]
    matches += [
        {name: name[len(p) :] for name in ours if name.startswith(p) and name[len(p) :] in theirs}
        for p in _prefixes(ours)
    ]
    best = max(matches, key=len)  # the first of equals: names as they are
    if not best:
        raise ValueError(f"{expert.given}: shares no tensor name with {base.given}; is it of the same architecture?")
    used = set(best.values())
    extra = [name for name in theirs if name not in used]
    copies = [name for name in extra if _copy_of(expert.entries[name], [expert.entries[other] for other in used])]
    if copies:
        plan.remarks.append(f"{expert.given}: {_some(copies)}: a tied copy, not stored in {base.given}; left out")
    if extra := [name for name in extra if name not in copies]:
        plan.notes.append(f"{expert.given}: {_some(extra)}: not in {base.given}; left out")
    return best


def _prefixes(names: Sequence[str]) -> list[str]:
    """Return what names begin with, up to their first and second dot, the most frequent first."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:depth]) + "." for depth in (1, 2) if len(parts) > depth)
    return [prefix for prefix, _ in counts.most_common(16)]


def _partners(
    name: str,
    entry: Entry,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    names: Sequence[Mapping[str, str]],
    notes: list[str],
) -> tuple[Entry, ...]:
    """Return each expert's tensor for one of the base, or () if the base's value is kept."""
    found: list[Entry | None] = []
    for expert, known in zip(experts, names, strict=True):
        other = known.get(name) or known.get(_twin(entry, base, known) or "")
        found.append(expert.entries[other] if other else None)
    if not any(found):
        notes.append(f"{base.given}: {name!r}: in no expert; the base's value is kept")
        return ()
    for expert, other in zip(experts, found, strict=True):
        if other is None:
            raise ValueError(
                f"{expert.given}: lacks {name!r}, which other experts have; --set '{name}:merge=false' keeps the base's"
            )
        if other.dtype.is_floating_point != entry.dtype.is_floating_point:
            raise ValueError(f"{other.where}: {other.dtype}, and {entry.dtype} in {base.given}; they cannot be merged")
        if any(each.dtype.is_floating_point and each.dtype.itemsize == 1 for each in (entry, other)):
            raise ValueError(f"{other.where}: stored as {other.dtype}, which is quantised; dequantise the model first")
    return _same_integers(entry, found) if not entry.dtype.is_floating_point else tuple(found)


def _same_integers(entry: Entry, found: Sequence[Entry]) -> tuple[Entry, ...]:
    """Return (): integers keep the base's value, which must be that of all experts, except for single counters."""
    for other in found:
        if entry.count > 1 and not _equal(entry, other):
            raise ValueError(
                f"{other.where}: {other.dtype} and different from the base's; integers cannot be merged (quantised? "
                f"dequantise first): --set '{entry.name}:merge=false' keeps the base's"
            )
    return ()


def _twin(entry: Entry, base: Checkpoint, known: Mapping[str, str]) -> str | None:
    """Return the name of the base's tensor with the same bytes that an expert has, where it lacks this one (tied)."""
    others = [base.entries[name] for name in known if name != entry.name]
    copy = _copy_of(entry, others)
    return copy.name if copy else None


def _copy_of(entry: Entry, others: Sequence[Entry]) -> Entry | None:
    if len(entry.shape) < 2:
        return None
    same = (other for other in others if other.shape == entry.shape and other.dtype == entry.dtype)
    return next((other for other in same if _equal(entry, other)), None)


def _equal(entry: Entry, other: Entry) -> bool:
    if entry.shape != other.shape or entry.dtype != other.dtype:
        return False
    if entry.file.path == other.file.path and entry.offset == other.offset:
        return True
    for start in (0, *range(64, entry.count, COMPARED)):  # nearly all pairs differ in their first entries
        stop = min(64, entry.count) if start == 0 else min(start + COMPARED, entry.count)
        if not torch.equal(entry.read(start, stop), other.read(start, stop)):
            return False
    return True


def _with_ties(steps: list[Step], remarks: list[str]) -> list[Step]:
    """Give tied tensors, those with the same bytes in the base and in every expert, the name of the first of them."""
    groups: dict[Any, list[Step]] = {}
    for step in steps:
        if step.experts and len(step.base.shape) > 1:
            start = step.base.read(0, min(64, step.base.count)).view(torch.uint8)
            groups.setdefault((step.base.shape, step.base.dtype, bytes(start.numpy())), []).append(step)
    renamed = {}
    for group in groups.values():
        for index, step in enumerate(group):
            first = next((other for other in group[:index] if _tied(step, other)), None)
            if first and first.name not in renamed:
                renamed[step.name] = first
                remarks.append(f"{step.name!r}: tied to {first.name!r}; both are merged as {first.name!r}")
    return [_merged_as(step, renamed[step.name]) if step.name in renamed else step for step in steps]


def _merged_as(step: Step, first: Step) -> Step:
    return replace(step, pieces=first.pieces, layout=first.layout, options=first.options)


def _tied(first: Step, second: Step) -> bool:
    ours, theirs = (first.base, *first.experts), (second.base, *second.experts)
    return all(_equal(one, other) for one, other in zip(ours, theirs, strict=True))


# Vocabularies --------------------------------------------------------------------------------------------------------


def _common_rows(
    entry: Entry, found: Sequence[Entry], base: Checkpoint, experts: Sequence[Checkpoint], notes: list[str]
) -> int | None:
    """Return how many rows are merged: None for all, fewer where vocabularies differ."""
    odd = [(expert, other) for expert, other in zip(experts, found, strict=False) if other.shape != entry.shape]
    if not odd:
        return None
    for expert, other in odd:
        rows_differ = entry.shape and other.shape and other.shape[1:] == entry.shape[1:]
        sizes = _vocabulary(base), _vocabulary(expert)
        if not rows_differ or (None not in sizes and sizes != (entry.shape[0], other.shape[0])):
            raise ValueError(
                f"{other.where}: shape {list(other.shape)}, and {list(entry.shape)} in {base.given}; "
                f"--set '{entry.name}:merge=false' keeps the base's"
            )
    rows = min(other.shape[0] for other in (entry, *found))
    kept = f"; rows {rows} to {entry.shape[0] - 1} are the base's" if rows < entry.shape[0] else ""
    sizes = " / ".join(str(other.shape[0]) for other in (entry, *found))
    notes.append(f"{entry.name!r}: {sizes} rows (base / experts): the first {rows} are merged{kept}")
    return rows


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    config = checkpoint.config
    nested = next((part for part in config.values() if isinstance(part, dict) and "vocab_size" in part), {})
    return config.get("vocab_size", nested.get("vocab_size"))


# Storage -------------------------------------------------------------------------------------------------------------


def _storage(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return how each tensor is stored; square ones with a bias go by the others of their kind, then by all others."""
    known: dict[str, str | None] = {name: _by_shape(name, entry, entries) for name, entry in entries.items()}
    votes: dict[str, Counter[str]] = {}
    for name, layout in known.items():
        if layout in ("matrix", "transposed") and _bias(name, entries) is not None:
            for kind in (_kind(name), ""):
                votes.setdefault(kind, Counter())[layout] += 1
    for name, layout in known.items():
        if layout is None:
            counts = votes.get(_kind(name)) or votes.get("") or Counter()
            known[name] = "transposed" if counts["transposed"] > counts["matrix"] else "matrix"
    return {name: str(layout) for name, layout in known.items()}


def _by_shape(name: str, entry: Entry, entries: Mapping[str, Entry]) -> str | None:
    """Return the layout that shape, bias and name show, and None for a square matrix, where they show nothing."""
    shape, bias = entry.shape, _bias(name, entries)
    if len(shape) < 2:
        return "vector"
    if len(shape) > 3 or (len(shape) == 3 and not _is_stack(name, shape)):
        return "kernel"
    stack = " stack" if len(shape) == 3 else ""
    out, into = shape[-2:]
    if out != into and bias in (out, into):
        flipped = bias == into
    elif bias == out and not stack:
        return None
    else:
        flipped = not stack and name.split(".")[-1].endswith(("proj", "projection"))
    return f"transposed{stack}" if flipped else stack.strip() or "matrix"


def _is_stack(name: str, shape: Sequence[int]) -> bool:
    return shape[0] > 1 and ("expert" in name or shape[0] < min(shape[1:]))


def _bias(name: str, entries: Mapping[str, Entry]) -> int | None:
    """Return the length of the bias that belongs to a weight, if it has one."""
    for bias in (name.removesuffix("weight") + "bias" if name.endswith("weight") else "", name + "_bias"):
        if bias in entries and entries[bias].shape:
            return entries[bias].shape[-1]
    return None


def _kind(name: str) -> str:
    return name.removesuffix(".weight").split(".")[-1]


def _pieces(entry: Entry, layout: str, rows: int | None) -> tuple[Piece, ...]:
    shape = entry.shape if rows is None else (rows, *entry.shape[1:])
    flipped = layout.startswith("transposed")
    if layout.endswith("stack"):
        if len(shape) != 3:
            raise ValueError(f"{entry.where}: layout {layout!r} needs three dimensions, the shape is {list(shape)}")
        size = shape[1] * shape[2]
        return tuple(
            Piece(f"{entry.name}[{index}]", index * size, shape[1:], flipped) for index in range(shape[0])
        )  # fmt: skip
    if flipped and len(shape) != 2:
        raise ValueError(f"{entry.where}: layout {layout!r} needs two dimensions, the shape is {list(shape)}")
    return (Piece(entry.name, 0, shape, flipped),)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _more(count: int) -> str:
    return f" (and {count} more)" if count else ""
