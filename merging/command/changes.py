"""What the experts changed of each tensor, and how it is read: ranges of rows of all experts, or one expert alone.

Experts hold a tensor in one of three forms, one class for each: `Full`, `LoRA`, `IA3`. Task vectors τ_i are float32.
Large ones are read again each time that they are asked for, so that a method which takes one task after the other needs
the memory of one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from merging.checkpoints import Entry
from merging.command.recipe import AUTO
from merging.command.storage import Piece
from merging.lowrank import LowRank, zero_like
from merging.mergers import merger
from merging.peft_files import Factors
from merging.ties_dare import Ranges

RANGE = 2**19  # entries merged at a time where rows are independent: 2 MiB in float32, which caches hold

# What the experts hold of one tensor ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What K experts hold of one tensor of the base; unless a class says otherwise, updates of its own shape."""

    experts: Sequence[Any]  # K of them; None for an adapter that leaves the tensor alone: τ_i = 0

    label: ClassVar[str] = ""  # how --dry-run marks it
    factored: ClassVar[bool] = False  # whether the updates can be had as low-rank factors, see `LoRA.read`
    repeats: ClassVar[bool] = False  # whether the same is merged for another tensor already

    def shape(self, base: Entry) -> tuple[int, ...]:
        """Return the shape of the merged update τ."""
        return base.shape

    def updates(self, base: Entry, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
        """Yield the entries from `start` to `stop` of each flattened τ_i, float32; both are ends of rows."""
        raise NotImplementedError

    def not_finite(self, base: Entry, task: int, start: int, stop: int) -> str:
        """Return what is wrong, and in which file and tensor, where entries of τ_i in that range are not finite."""
        raise NotImplementedError

    def applied(
        self, base: Entry, merged: Iterable[tuple[int, Tensor]], scale: float, device: torch.device
    ) -> Iterator[Tensor]:
        """Yield consecutive ranges of the result, base + scale · τ, in float32, as far as τ reaches.

        Args:
            base: the base's tensor.
            merged: consecutive ranges of the merged τ, each with the place of its first entry.
            scale: the final scale.
            device: where τ is.
        """
        for start, update in merged:
            own = base.read(start, start + update.numel(), torch.float32, device).reshape(update.shape)
            yield own.add_(update if scale == 1 else scale * update)


class Full(Change):
    """Each expert's own values of the tensor: τ_i = expert − base."""

    experts: Sequence[Entry | None]

    def updates(self, base: Entry, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
        own = base.read(start, stop, torch.float32, device)
        for expert in self.experts:
            yield expert.read(start, stop, torch.float32, device).sub_(own) if expert else torch.zeros_like(own)

    def not_finite(self, base: Entry, task: int, start: int, stop: int) -> str:
        expert = self.experts[task]
        wrong = _not_finite(base, start, stop) or _not_finite(expert, start, stop)
        return wrong or f"{expert.where}: its difference from the base overflows float32"


class LoRA(Change):
    """Each adapter's two factors of an update of low rank: τ_i = s_i B_i A_i."""

    experts: Sequence[Factors | None]
    label = "low rank"
    factored = True

    def updates(self, base: Entry, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
        for factors in self.experts:
            yield factors.entries(start, stop, device).float() if factors else torch.zeros(stop - start, device=device)

    def not_finite(self, base: Entry, task: int, start: int, stop: int) -> str:
        return f"{self.experts[task].up.where}: its product with lora_A overflows float32"  # the factors are finite

    def read(self, device: torch.device) -> list[LowRank]:
        """Return the K updates as factors, of rank 0 where an adapter leaves the weight alone."""
        read = [factors and factors.read(device) for factors in self.experts]
        nothing = zero_like(next(update for update in read if update))
        return [update or nothing for update in read]

    @property
    def rank(self) -> int:
        """Σ r_i, which the rank of the merged update does not exceed."""
        return sum(factors.up.shape[1] for factors in self.experts if factors)


@dataclass(frozen=True)
class IA3(Change):
    """Each adapter's vector l_i that multiplies the tensor: τ_i = l_i − 1, and base ⊙ (1 + scale · τ) is the result."""

    experts: Sequence[Entry | None]
    spread: tuple[int, ...]  # the shape in which it multiplies the tensor: (out, 1), (1, in), or (out,) for a bias
    label = "IA³"

    @property
    def repeats(self) -> bool:
        """A bias is multiplied by the vector of its weight."""
        return len(self.spread) == 1

    def shape(self, base: Entry) -> tuple[int, ...]:
        return self.spread

    def updates(self, base: Entry, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
        for vector in self.experts:
            own = vector.read(start, stop, torch.float32, device) if vector else torch.ones(stop - start, device=device)
            yield own.sub_(1)

    def not_finite(self, base: Entry, task: int, start: int, stop: int) -> str:
        return _not_finite(self.experts[task], start, stop)

    def applied(
        self, base: Entry, merged: Iterable[tuple[int, Tensor]], scale: float, device: torch.device
    ) -> Iterator[Tensor]:
        factor = (1 + joined(merged, self.spread, device).mul_(scale)).expand(base.shape)
        rows = Piece(base.name, 0, base.shape, "matrix")
        for part in row_ranges(rows):
            own = base.read(part.start * rows.width, part.stop * rows.width, torch.float32, device)
            yield own.reshape(factor[part].shape) * factor[part]


def joined(merged: Iterable[tuple[int, Tensor]], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a merged update as one tensor, from ranges with the place of their first entries; zero between them."""
    update = torch.zeros(math.prod(shape), device=device)
    for start, part in merged:
        update[start : start + part.numel()] = part.reshape(-1)
    return update.reshape(shape)


def _not_finite(entry: Entry, start: int, stop: int) -> str:
    count = int((~entry.read(start, stop, torch.float32).isfinite()).sum())
    return f"{entry.where}: {count} entries are NaN or infinite" if count else ""


# What is done with it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One tensor of the base, and what becomes of it."""

    base: Entry
    change: Change | None  # None: the base's value is kept
    pieces: tuple[Piece, ...]  # what is merged by itself
    dtype: torch.dtype  # of the output
    layout: str  # how the tensor is stored, in the words of `merging.command.storage`
    options: Mapping[str, Any]  # of the recipe, for this tensor

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.base.name

    @property
    def size(self) -> int:
        """Bytes of the output."""
        return self.base.count * self.dtype.itemsize

    @property
    def experts(self) -> Sequence[Any]:
        """What each expert holds of the tensor; empty where the base's value is kept."""
        return self.change.experts if self.change else ()

    @property
    def repeats(self) -> bool:
        """Whether another step merges the same."""
        return self.change is not None and self.change.repeats

    @property
    def norm_matched(self) -> bool:
        """Whether every piece is rescaled to the mean norm of the experts' updates of it."""
        return self.options["final_scale"] == AUTO

    @property
    def final_scale(self) -> float:
        """The factor of the finished update, after calibration and norm matching."""
        return 1.0 if self.norm_matched else self.options["final_scale"]

    def of_merger(self, method: str) -> dict[str, Any]:
        """Return the options of a merger that the recipe sets for this tensor."""
        own = merger(method)
        options = {key: self.options[key] for key in own.options if key in self.options}
        options |= own.known(depth=self.options["depth"])
        return options | (own.known(weights=self.weights) if self.options["normalize"] else {})

    @property
    def weights(self) -> tuple[float, ...]:
        """By which the experts' updates are multiplied, one for each."""
        return self.options["weights"]


# Reading it ----------------------------------------------------------------------------------------------------------


def row_ranges(piece: Piece) -> Iterator[slice]:
    """Yield consecutive ranges of rows, of about RANGE entries each."""
    height = max(1, RANGE // max(1, piece.width))
    for start in range(0, piece.rows, height):
        yield slice(start, min(start + height, piece.rows))


def differences(step: Step, piece: Piece, part: slice | None, device: torch.device) -> list[Tensor]:
    """Return the task vectors w_i τ_i of some rows of a piece (default: all), as stored.

    Raises:
        ValueError: an entry is NaN or infinite; names file and tensor.
    """
    part = part or slice(0, piece.rows)
    start, stop = (piece.start + row * piece.width for row in (part.start, part.stop))
    shape = (part.stop - part.start, *piece.shape[1:]) if piece.shape else ()
    updates = []
    for task, update in enumerate(step.change.updates(step.base, start, stop, device)):
        if not update.sum().isfinite() and not update.isfinite().all():
            wrong = step.change.not_finite(step.base, task, start, stop)
            raise ValueError(f"{wrong}; --set '{step.name}:merge=false' keeps the base's")
        weight = step.weights[task]
        updates.append((update if weight == 1 else update.mul_(weight)).reshape(shape))
    return updates


def ranges(step: Step, piece: Piece, device: torch.device) -> Ranges:
    """Return what reads the experts' updates of a piece, one range of rows after the other, whenever it is called."""
    return lambda: map(partial(differences, step, piece, device=device), row_ranges(piece))


def task_vectors(step: Step, piece: Piece, device: torch.device) -> list[Mapping[str, Tensor]]:
    """Return the experts' task vectors of one piece in the layer's orientation; large ones are read when asked for."""
    if piece.count > RANGE:
        alone = [replace(step.change, experts=(expert,)) for expert in step.change.experts]
        own = [dict(step.options, weights=(weight,)) for weight in step.weights]
        pairs = zip(alone, own, strict=True)
        return [TaskOnDisk(replace(step, change=change, options=options), piece, device) for change, options in pairs]
    return [{piece.name: piece.oriented(update)} for update in differences(step, piece, None, device)]


class TaskOnDisk(Mapping[str, Tensor]):
    """The task vector of one expert, of one piece alone: read whenever it is asked for, in the layer's orientation."""

    def __init__(self, step: Step, piece: Piece, device: torch.device):
        """Take a step whose change has one expert."""
        self._step, self._piece, self._device = step, piece, device

    def __getitem__(self, name: str) -> Tensor:
        if name != self._piece.name:
            raise KeyError(name)
        update = torch.empty(self._piece.shape, device=self._device)
        for part in row_ranges(self._piece):
            (update[part],) = differences(self._step, self._piece, part, self._device)
        return self._piece.oriented(update)

    def __iter__(self) -> Iterator[str]:
        return iter((self._piece.name,))

    def __len__(self) -> int:
        return 1
