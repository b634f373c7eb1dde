"""The experts' updates of a planned tensor: ranges of rows of all of them, or one whole expert at a time.

Updates are float32. Large ones are read again each time that they are asked for, so that a method which takes one task
after the other needs the memory of one.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from merging.command.storage import Piece, Step

RANGE = 2**21  # entries merged at a time where rows are independent: 8 MiB in float32


def differences(step: Step, piece: Piece, part: slice | None, device: torch.device) -> list[Tensor]:
    """Return the task vectors τ_i of some rows of a piece (default: all), as stored.

    Raises:
        ValueError: an entry is NaN or infinite; names file and tensor.
    """
    return _differences(step, piece, part, device, range(len(step.experts)))


def _differences(step: Step, piece: Piece, part: slice | None, device: torch.device, tasks: range) -> list[Tensor]:
    part = part or slice(0, piece.rows)
    start, stop = (piece.start + row * width(piece) for row in (part.start, part.stop))
    shape = (part.stop - part.start, *piece.shape[1:]) if piece.shape else ()
    base = step.base.read(start, stop, torch.float32, device) if step.kind == "values" else None
    updates = []
    for task in tasks:
        expert = step.experts[task]
        if expert is None:
            update = torch.zeros(stop - start, device=device)
        elif step.kind == "low rank":
            update = expert.entries(start, stop, device).float()
        else:
            update = expert.read(start, stop, torch.float32, device).sub_(1 if base is None else base)
        if not update.sum().isfinite() and not update.isfinite().all():
            raise ValueError(_not_finite(step, expert, start, stop))
        updates.append(update.reshape(shape))
    return updates


def _not_finite(step: Step, expert, start: int, stop: int) -> str:
    keep = f"--set '{step.name}:merge=false' keeps the base's"
    if step.kind == "low rank":
        return f"{expert.up.where}: its product with lora_A overflows float32; {keep}"
    base = step.base.read(start, stop, torch.float32)
    wrong = step.base if step.kind == "values" and not base.isfinite().all() else expert
    count = int((~wrong.read(start, stop, torch.float32).isfinite()).sum())
    return f"{wrong.where}: {count} entries are NaN or infinite; {keep}"


class Task(Mapping[str, Tensor]):
    """The task vector of one expert, of one piece alone: read whenever it is asked for, in the layer's orientation."""

    def __init__(self, step: Step, piece: Piece, index: int, device: torch.device):
        self._step, self._piece, self._index, self._device = step, piece, index, device

    def __getitem__(self, name: str) -> Tensor:
        if name != self._piece.name:
            raise KeyError(name)
        update = torch.empty(self._piece.shape, device=self._device)
        for part in row_ranges(self._piece):
            one = range(self._index, self._index + 1)
            (update[part],) = _differences(self._step, self._piece, part, self._device, one)
        return oriented(self._piece, update)

    def __iter__(self) -> Iterator[str]:
        return iter((self._piece.name,))

    def __len__(self) -> int:
        return 1


def task_vectors(step: Step, piece: Piece, device: torch.device) -> list[Mapping[str, Tensor]]:
    """Return the experts' task vectors of one piece in the layer's orientation; large ones are read when asked for."""
    if piece.count > RANGE:
        return [Task(step, piece, index, device) for index in range(len(step.experts))]
    return [{piece.name: oriented(piece, update)} for update in differences(step, piece, None, device)]


def width(piece: Piece) -> int:
    """Return the number of entries in a row."""
    return piece.count // piece.rows if piece.rows else 0


def row_ranges(piece: Piece) -> Iterator[slice]:
    """Yield consecutive ranges of rows, of about RANGE entries each."""
    height = max(1, RANGE // max(1, width(piece)))
    for start in range(0, piece.rows, height):
        yield slice(start, min(start + height, piece.rows))


def oriented(piece: Piece, tensor: Tensor) -> Tensor:
    """Return a tensor of a piece in the orientation of its layer, or from there as stored."""
    return tensor.T if piece.transposed else tensor
