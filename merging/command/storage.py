"""How each tensor is stored, and the pieces of it that are merged by themselves.

matrix            (out, in); an embedding is taken as it is stored, its rows being the vocabulary
transposed        (in, out): told by the length of its bias (GPT-2's Conv1D; square ones go by the other tensors of the
                  same last name), and by the name of parameters *proj and *projection (OpenCLIP)
stack             of matrices: three dimensions, of which the first is the smallest, or a name that says "expert"; each
                  matrix is merged by itself under the name NAME[i], or, where transformers says what is packed in it
                  (an expert's gate and up), under the name of what is packed
transposed stack  of matrices (in, out)
kernel            every other tensor of more than two dimensions: methods for matrices that take kernels see it as
                  (out, rest), the others take the mean, and SVC leaves it alone unless told otherwise
vector            fewer than two dimensions

SVC's output space always means the output of the layer.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from merging.checkpoints import Entry

LAYOUTS = ("matrix", "transposed", "stack", "transposed stack", "kernel")  # and "vector", which cannot be chosen


@dataclass(frozen=True)
class Piece:
    """A consecutive range of a tensor's entries that is merged by itself: all of it, or one matrix of a stack."""

    name: str
    start: int  # in the flattened tensor
    shape: tuple[int, ...]  # as stored
    layout: str  # one of the words above that are no stacks

    @property
    def count(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Number of rows, the first dimension; a scalar has one."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Number of entries per row."""
        return self.count // self.rows if self.rows else 0

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape that methods see: that of the layer, (out, in)."""
        return self.shape[::-1] if self.layout == "transposed" else self.shape

    def oriented(self, tensor: Tensor) -> Tensor:
        """Transpose if the weight is stored (in, out); its own inverse."""
        return tensor.T if self.layout == "transposed" else tensor


def storage(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Return name → how that tensor is stored, in the words above.

    A square weight's orientation cannot be seen from its bias: take the majority of weights with the same last name, or
    of all weights with a bias where there are none.
    """
    known: dict[str, str | None] = {name: _by_shape(name, entry, entries) for name, entry in entries.items()}
    votes: dict[str, Counter[str]] = {}
    for name, layout in known.items():
        if layout in ("matrix", "transposed") and _bias_length(name, entries) is not None:
            for voters in (_last_name(name), "of all"):
                votes.setdefault(voters, Counter())[layout] += 1
    for name, layout in known.items():
        if layout is None:
            counts = votes.get(_last_name(name)) or votes.get("of all") or Counter()
            known[name] = "transposed" if counts["transposed"] > counts["matrix"] else "matrix"
    return {name: str(layout) for name, layout in known.items()}


def _by_shape(name: str, entry: Entry, entries: Mapping[str, Entry]) -> str | None:
    """Return the layout that shape, bias and name show; None for a square weight with a bias, which shows nothing."""
    shape, bias = entry.shape, _bias_length(name, entries)
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


def _bias_length(name: str, entries: Mapping[str, Entry]) -> int | None:
    """Return the length of the bias that belongs to a weight, if it has one."""
    for bias in (name.removesuffix("weight") + "bias" if name.endswith("weight") else "", name + "_bias"):
        if bias in entries and entries[bias].shape:
            return entries[bias].shape[-1]
    return None


def _last_name(name: str) -> str:
    return name.removesuffix(".weight").split(".")[-1]


def pieces(entry: Entry, layout: str, rows: int | None = None, parts: Sequence[Entry] = ()) -> tuple[Piece, ...]:
    """Return what of a tensor is merged by itself.

    Args:
        entry: the base's tensor.
        layout: how it is stored, in the words above.
        rows: how many of its first rows are merged (default: all).
        parts: the matrices that a stack packs, consecutive in it, where they are known (`merging.command.naming`): an
            expert's gate by itself and its up by itself.

    Raises:
        ValueError: it has too few or too many dimensions for that layout.
    """
    shape = entry.shape if rows is None else (rows, *entry.shape[1:])
    if layout.endswith("stack"):
        if len(shape) != 3:
            raise ValueError(f"{entry.where}: layout {layout!r} needs three dimensions, the shape is {list(shape)}")
        if layout == "stack" and len(parts) > 1:
            starts = accumulate((part.count for part in parts), initial=0)
            return tuple(
                Piece(part.name, start, part.shape, "matrix") for part, start in zip(parts, starts, strict=False)
            )
        size, each = shape[1] * shape[2], "transposed" if layout == "transposed stack" else "matrix"
        return tuple(Piece(f"{entry.name}[{index}]", index * size, shape[1:], each) for index in range(shape[0]))
    if layout == "transposed" and len(shape) != 2:
        raise ValueError(f"{entry.where}: layout {layout!r} needs two dimensions, the shape is {list(shape)}")
    return (Piece(entry.name, 0, shape, layout),)
