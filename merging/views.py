"""Tensors that are made of stored ones without loading them: renamed, parts, joined, means of rows, or transposed.

A view has the interface of the `Entry` that it is made of; it is read by ranges, when it is asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from merging.checkpoints import Entry


@dataclass(frozen=True, kw_only=True)
class View(Entry):
    """A tensor made of stored ones; dtype and path are those of the first."""

    sources: tuple[Entry, ...]

    @property
    def where(self) -> str:
        """File and stored tensor, for messages."""
        more = f" and {len(self.sources) - 1} more" if len(self.sources) > 1 else ""
        return self.sources[0].where + more


@dataclass(frozen=True, kw_only=True)
class Part(View):
    """Consecutive entries of a flattened tensor; all of them for a tensor that is only renamed or reshaped."""

    first: int = 0  # the place of its first entry in the whole

    def _stored(self, start: int, stop: int) -> Tensor:
        return self.sources[0]._stored(self.first + start, self.first + stop)


@dataclass(frozen=True, kw_only=True)
class Joined(View):
    """Several flattened tensors, one behind the other: a concatenation by rows, or a stack."""

    def _stored(self, start: int, stop: int) -> Tensor:
        found, first = [], 0
        for source in self.sources:
            low, high = max(start, first), min(stop, first + source.count)
            if low < high:
                found.append(source._stored(low - first, high - first))
            first += source.count
        return torch.cat(found) if found else torch.empty(0, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class Transposed(View):
    """A matrix, or each matrix of a stack, with its last two dimensions swapped; one matrix is in memory at a time."""

    def _stored(self, start: int, stop: int) -> Tensor:
        size, shape = math.prod(self.shape[-2:]), self.sources[0].shape[-2:]
        found = []
        for index in range(start // size, -(-stop // size)):
            flipped = self.sources[0]._stored(index * size, (index + 1) * size).reshape(shape).T.reshape(-1)
            found.append(flipped[max(start - index * size, 0) : stop - index * size])
        return torch.cat(found) if found else torch.empty(0, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class ReadTwice(View):
    """A tensor of which each range is asked for twice running, and is read once; the second caller may change it."""

    last: dict[tuple, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def read(
        self, start: int = 0, stop: int | None = None, to: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Return the entries from `start` to `stop`, as `Entry.read` does."""
        asked = (start, stop, to, device)
        if (found := self.last.pop(asked, None)) is None:
            self.last.clear()
            found = self.last[asked] = self.sources[0].read(start, stop, to, device)
        return found


@dataclass(frozen=True, kw_only=True)
class Rows(Entry):
    """A tensor made of rows of others: each run is a range of rows, the mean of those of one or several tensors."""

    runs: tuple[tuple[int, tuple[tuple[Entry, int], ...]], ...]  # (number of rows, (tensor, its first row)…)

    def _stored(self, start: int, stop: int) -> Tensor:
        width, wide = math.prod(self.shape[1:]), torch.promote_types(self.dtype, torch.float32)
        found, first = [torch.empty(0, dtype=wide)], 0
        for height, sources in self.runs:
            low, high = max(start, first), min(stop, first + height * width)
            if low < high:
                ranges = [(source, row * width - first) for source, row in sources]
                parts = [source.read(low + shift, high + shift, wide) for source, shift in ranges]
                found.append(sum(parts[1:], parts[0]).div_(len(parts)))
            first += height * width
        return torch.cat(found)


def renamed(entry: Entry, name: str) -> Entry:
    """Return a tensor under another name."""
    if name == entry.name:
        return entry
    if isinstance(entry, View):
        return replace(entry, name=name)
    return Part(name, entry.dtype, entry.shape, entry.path, sources=(entry,))


def read_twice(entry: Entry) -> Entry:
    """Return a tensor whose ranges are remembered until they are asked for again."""
    return ReadTwice(entry.name, entry.dtype, entry.shape, entry.path, sources=(entry,))


def part(entry: Entry, name: str, first: int, shape: tuple[int, ...]) -> Entry:
    """Return the entries from `first` on of a flattened tensor, as a tensor of their own."""
    if isinstance(entry, Part):
        return part(entry.sources[0], name, entry.first + first, shape)
    return Part(name, entry.dtype, shape, entry.path, sources=(entry,), first=first)


def joined(entries: Sequence[Entry], name: str, shape: tuple[int, ...]) -> Entry:
    """Return flattened tensors one behind the other as one tensor; parts that follow each other are read as one.

    Raises:
        ValueError: their dtypes differ.
    """
    for entry in entries:
        if entry.dtype != entries[0].dtype:
            raise ValueError(f"{entry.where}: {entry.dtype}, and {entries[0].dtype} in {entries[0].where}")
    first = entries[0]
    if all(isinstance(entry, Part) and entry.sources == first.sources for entry in entries):  # type: ignore[attr-defined]
        ends = [entry.first + entry.count for entry in entries]  # type: ignore[attr-defined]
        if [entry.first for entry in entries[1:]] == ends[:-1]:  # type: ignore[attr-defined]
            return part(first, name, 0, shape)
    return Joined(name, first.dtype, shape, first.path, sources=tuple(entries))


def transposed(entry: Entry, name: str) -> Entry:
    """Return a matrix, or a stack of matrices, each transposed."""
    if isinstance(entry, Transposed):
        return renamed(entry.sources[0], name)
    shape = (*entry.shape[:-2], *entry.shape[:-3:-1])
    return Transposed(name, entry.dtype, shape, entry.path, sources=(entry,))
