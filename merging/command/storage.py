"""What is done with each tensor: the step that makes it, the pieces that are merged by themselves, how it is stored.

Storage     a 2-D tensor is a matrix (out, in), or, transposed, (in, out): told by the length of its bias (GPT-2's
            Conv1D; square ones go by the other tensors of their kind), and by the name of parameters *proj and
            *projection (OpenCLIP). Output space always means the output of the layer; an embedding is (out, in), as
            it is stored.
            A 3-D tensor whose first dimension is the smallest, or whose name says "expert", is a stack of matrices,
            each merged by itself under the name NAME[i]. Every other tensor of more than two dimensions is a kernel:
            methods for matrices that take kernels see it as (out, rest), the others take the mean, and SVC leaves it
            alone unless told otherwise.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from merging.checkpoints import Checkpoint, Entry
from merging.command.recipe import Recipe, merger_options
from merging.peft_files import Adapter, Factors


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
    experts: tuple[Entry | Factors | None, ...]  # empty: the base's value is kept; None: an adapter that leaves it
    pieces: tuple[Piece, ...]
    dtype: torch.dtype  # of the output
    layout: str
    options: Mapping[str, Any]
    kind: str = "values"  # what experts hold: "values" of the tensor, "low rank" updates (LoRA), a "vector" (IA³)
    spread: tuple[int, ...] = ()  # a vector: the shape in which it multiplies the tensor, (out, 1), (1, in) or (out,)

    @property
    def size(self) -> int:
        """Bytes of the output."""
        return self.base.count * self.dtype.itemsize

    def of_merger(self, method: str) -> dict[str, Any]:
        """Return the options of a merger that the recipe sets for this tensor."""
        return {key: self.options[key] for key in merger_options(method) if key in self.options}

    @property
    def repeats(self) -> bool:
        """Whether the same is merged in another step: a bias goes with its weight's vector."""
        return self.kind == "vector" and len(self.spread) == 1


@dataclass
class Plan:
    """All tensors, in the order of the base's files, and what has to be said about them."""

    recipe: Recipe
    base: Checkpoint
    experts: tuple[Checkpoint, ...] | tuple[Adapter, ...]
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what differs between the models, and is refused by --strict
    remarks: list[str] = field(default_factory=list)  # tied tensors


# Storage -------------------------------------------------------------------------------------------------------------


def storage(entries: Mapping[str, Entry]) -> dict[str, str]:
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


def pieces(entry: Entry, layout: str, rows: int | None = None) -> tuple[Piece, ...]:
    """Return what of a tensor is merged by itself, in one of LAYOUTS of the recipe or as a vector.

    Args:
        entry: the base's tensor.
        layout: how it is stored.
        rows: how many of its first rows are merged (default: all).

    Raises:
        ValueError: it has too few or too many dimensions for that layout.
    """
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


def some(names: Sequence[str]) -> str:
    """Return the first few names, for messages."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
