"""What is known of a merger, and how one is applied tensor by tensor."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.spectral import working
from merging.task_vectors import OneTensor, Predicate, TaskVector, check

Updates = Sequence[Tensor]  # the same tensor of each task


@dataclass(frozen=True)
class ByRows:
    """How ranges of rows are merged if an entry of the result depends on more than the K entries at its place."""

    start: Callable[..., Callable[[Updates], Tensor]]
    """(tensor's name, K, what was decided, **options) → what merges its ranges of rows, each once and in order."""
    decide: Callable[..., Any] | None = None
    """([reader of the ranges of a tensor, …], map, **options) → what must be decided first, as plain data."""
    together: Callable[..., dict[str, Any] | None] = lambda **options: None
    """**options → the options that must be the same for all tensors if it is decided over all of them, else None."""


@dataclass(frozen=True)
class Merger:
    """All that is known of a merger. It is called as its function is: `MERGERS["ties"](task_vectors, keep=0.1)`."""

    merge: Callable[..., dict[str, Tensor]]
    """task vectors → merged task vector. Options are keywords with plain defaults. The predicate `matrices` selects the
    tensors that are treated as matrices; the others are averaged. `side` and `precision`, if it has them, tell it the
    size and dtype of the matrices to which the cores of low-rank updates belong (`merging.lowrank`)."""
    title: str
    """Its name in figures."""
    colour: str | None = None
    """Its colour in figures; None takes the next one of the palette."""
    by_entry: bool = False
    """Whether it treats each entry by itself, so that a large tensor can be merged by calling it on ranges of rows."""
    by_rows: ByRows | None = None
    """What merges ranges of rows instead, if the entries depend on whole tensors."""
    per_task: tuple[str, ...] = ()
    """The options of which each task may have its own value: sequences of K numbers instead of one."""
    factored: bool = False
    """Whether it uses only sums, norms and singular triplets, so that it can merge low-rank updates by their cores."""
    basis: Callable[[Updates, int | None, torch.dtype | None], Tensor] | None = None
    """(updates, side, precision) → the left basis of its result; for results whose singular values are all equal."""
    alpha: float | None = None
    """α of the paper's "+ SVC"; None is 1/K."""
    norm_matched: bool = False
    """Whether experiments found that norm matching (`merging.norm_matching`) replaces a tuned scale of it, so that the
    command line offers `--final-scale auto`."""
    published: bool = False
    """Whether it is in the paper's main table."""
    rival: bool = False
    """Whether it is a rival from outside the official SVC repository (`merging.rivals`)."""
    copies: float | Callable[[int, int, int], float] = 5
    """Memory that merging a matrix takes, in copies of it in float32; measured. Or a function of m, n and K."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        return self.merge(*arguments, **options)

    @property
    def options(self) -> dict[str, Any]:
        """The options that are numbers or words, with their defaults."""
        defaults = {name: each.default for name, each in inspect.signature(self.merge).parameters.items()}
        return {name: default for name, default in defaults.items() if isinstance(default, int | float | str)}

    @property
    def matrices(self) -> Predicate | None:
        """Which tensors are treated as matrices, None where all tensors are treated alike."""
        parameter = inspect.signature(self.merge).parameters.get("matrices")
        return parameter and parameter.default

    def takes(self, name: str, tensor: Tensor) -> bool:
        """Return whether a tensor is treated by the method's own rule; otherwise it is averaged."""
        return self.matrices is None or bool(tensor.numel() and self.matrices(name, tensor))

    def memory(self, rows: int, columns: int, tasks: int) -> float:
        """Return the memory that merging a rows × columns matrix of K = `tasks` experts takes, in copies of it."""
        return self.copies(rows, columns, tasks) if callable(self.copies) else self.copies

    def known(self, **options: Any) -> dict[str, Any]:
        """Return those of the options that the merger has, such as `seed`."""
        parameters = inspect.signature(self.merge).parameters
        return {name: value for name, value in options.items() if name in parameters}


def merge_each(
    task_vectors: Sequence[TaskVector],
    rule: Callable[[Updates], Tensor],
    matrices: Predicate | None = None,
) -> dict[str, Tensor]:
    """Apply `rule` to each tensor (of all tasks) in turn; average it instead where `matrices` refuses it."""
    merged = {}
    for name in check(task_vectors):
        first = task_vectors[0][name]
        shape, dtype = first.shape, first.dtype
        refused = matrices is not None and not (first.numel() and matrices(name, first))
        del first  # tensors may be large: hold one task's at a time
        view = working if matrices is None or refused else partial(as_matrix, name)
        result = (mean_of if refused else rule)(OneTensor(task_vectors, name, view))
        merged[name] = result.reshape(shape).to(dtype)
    return merged


def as_matrix(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        raise ValueError(f"{name!r}: `matrices` selects a tensor of shape {tuple(tensor.shape)}, which is no matrix")
    return working(tensor).flatten(1)  # (out, rest)


def sum_of(updates: Iterable[Tensor]) -> Tensor:
    """Return the sum, a tensor of its own, with no more than two updates and the sum in memory."""
    updates = iter(updates)
    total, second = next(updates), next(updates, None)
    total = total.clone() if second is None else total + second
    del second
    for update in updates:
        total.add_(update)
        del update
    return total


def mean_of(updates: Updates) -> Tensor:
    return sum_of(updates).div_(len(updates))
