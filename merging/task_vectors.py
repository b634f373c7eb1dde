"""Task vectors, plain dicts of tensors: what fine-tuning added to each weight, and how to add it back.

Only floating-point tensors take part. Integer and boolean ones (counters, position ids, masks) keep the pretrained
value: `task_vector` leaves them out, and everything that reads task vectors ignores them.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from common.spectral import working

TaskVector = Mapping[str, Tensor]
Predicate = Callable[[str, Tensor], bool]


class Finite(dict[str, Tensor]):
    """A task vector of which it is known already that no entry is NaN or infinite."""


class OneTensor(Sequence[Tensor]):
    """The same tensor of all tasks, each read from its task vector when asked for: task vectors may be on disk."""

    def __init__(self, task_vectors: Sequence[TaskVector], name: str, view: Callable[[Tensor], Tensor] = working):
        self._task_vectors, self.name, self._view = task_vectors, name, view

    def __len__(self) -> int:
        return len(self._task_vectors)

    def __getitem__(self, index: int) -> Tensor:
        return self._view(self._task_vectors[index][self.name])


@torch.no_grad()
def task_vector(finetuned: TaskVector, pretrained: TaskVector) -> dict[str, Tensor]:
    """Return τ = θ_finetuned − θ_pretrained for every floating-point tensor; both state dicts are left unchanged.

    Args:
        finetuned: state dict of the fine-tuned model.
        pretrained: state dict of the model that it started from, with the same keys and shapes.

    Returns:
        name → difference, in the dtype of the weights (the wider one where they differ).

    Raises:
        TypeError: one of the two is no mapping, such as a model in place of its state dict.
        ValueError: keys or shapes differ, or a tensor is floating-point in only one of the two.
    """
    for given in (finetuned, pretrained):
        if not isinstance(given, Mapping):
            raise TypeError(f"expected a state dict, got {type(given).__name__}; of a model take model.state_dict()")
    if odd := finetuned.keys() ^ pretrained.keys():
        raise ValueError(f"the fine-tuned and the pretrained model differ in keys: {_some(odd)}")
    difference = {}
    for name, start in pretrained.items():
        end = finetuned[name]
        if end.shape != start.shape:
            raise ValueError(
                f"{name!r}: fine-tuned shape {tuple(end.shape)}, pretrained shape {tuple(start.shape)}; leave heads "
                "that only one task has out of both state dicts, and merge the rest"
            )
        if end.is_floating_point() != start.is_floating_point():
            raise ValueError(f"{name!r}: fine-tuned dtype {end.dtype}, pretrained dtype {start.dtype}")
        if start.is_floating_point():
            difference[name] = end - start
    return difference


@torch.no_grad()
def apply(pretrained: TaskVector, merged: TaskVector, scale: float = 1.0) -> dict[str, Tensor]:
    """Return a new state dict θ = θ_pretrained + scale · τ; both inputs are left unchanged.

    Args:
        pretrained: state dict; its tensors set keys, dtypes and devices of the result.
        merged: a task vector. Tensors that it lacks, and integer ones, keep the pretrained value.
        scale: λ, the factor of the whole update.

    Raises:
        ValueError: the update has a key or a shape that the model lacks, or scale is not finite.
    """
    check_finite("scale", scale)
    if unknown := merged.keys() - pretrained.keys():
        raise ValueError(f"the update has keys that the model lacks: {_some(unknown)}")
    state = {}
    for name, start in pretrained.items():
        state[name] = start.clone()
        if name not in merged or not start.is_floating_point():
            continue
        if merged[name].shape != start.shape:
            raise ValueError(f"{name!r}: update shape {tuple(merged[name].shape)}, model shape {tuple(start.shape)}")
        end = working(start) + scale * working(merged[name]).to(start.device)
        state[name] = end.to(start.dtype)
    return state


@torch.no_grad()
def weighted(task_vectors: Sequence[TaskVector], weights: Sequence[float]) -> list[dict[str, Tensor]]:
    """Return w_i τ_i for each task, in place of τ_i in any merger, in SVC and in `diagnose`; the inputs are unchanged.

    Experts of weight w count as models which went w times as far from the pretrained one (back, where w < 0). A mean is
    still divided by K; mergers that can divide by Σ w_i take the weights too (`weights`, as of `weight_average`).

    Args:
        task_vectors: the K task vectors.
        weights: K finite numbers.

    Raises:
        ValueError: there are not K finite weights.
    """
    weights = of_each_task("weights", weights, len(task_vectors))
    for weight in weights:
        check_finite("weights", weight)
    return [
        {name: tensor * weight if tensor.is_floating_point() else tensor for name, tensor in task.items()}
        for task, weight in zip(task_vectors, weights, strict=True)
    ]


def of_each_task(option: str, given: float | Sequence[float], tasks: int) -> list[float]:
    """Return K values of an option, given one for all tasks or one for each.

    Raises:
        ValueError: there are not K of them.
    """
    values = list(given) if isinstance(given, Sequence) else [given] * tasks
    if len(values) != tasks:
        raise ValueError(f"{option}: {len(values)} values for {tasks} experts; give one for each")
    return values


def sum_of_weights(weights: Sequence[float] | None, tasks: int) -> float:
    """Return what a mean is divided by: Σ w_i, or K where there are no weights.

    Raises:
        ValueError: there are not K weights, or their sum is zero.
    """
    total = sum(of_each_task("weights", 1 if weights is None else weights, tasks))
    if not total:
        raise ValueError(f"weights {list(weights or ())} sum to zero, by which no mean can be divided")
    return total


def combine(treated: TaskVector, others: TaskVector, matrices: Predicate) -> dict[str, Tensor]:
    """Return `treated` where `matrices` accepts a tensor of it, and `others` elsewhere; both are left unchanged.

    So the effect of a method on its matrices is told apart from what happens to all other tensors.
    """
    return {name: tensor if matrices(name, tensor) else others[name] for name, tensor in treated.items()}


def matrices_without(*words: str, conv: bool = False) -> Predicate:
    """Return the predicate "is a 2-D tensor whose name contains none of these words", for a method's `matrices`.

    Args:
        words: parts of names that are left out.
        conv: accept tensors of more dimensions as well, to be treated as (out, rest).
    """

    def is_treated(name: str, tensor: Tensor) -> bool:
        return (tensor.ndim == 2 or (conv and tensor.ndim > 2)) and not any(word in name for word in words)

    return is_treated


def check(task_vectors: Sequence[TaskVector], merged: TaskVector | None = None) -> list[str]:
    """Return the names of the floating-point tensors, after checking that all task vectors can be merged.

    Args:
        task_vectors: one or more mappings from names to tensors.
        merged: if given, checked with them.

    Raises:
        TypeError: a task vector is not a mapping, or one of its values is not a tensor.
        ValueError: there is no task vector, keys or shapes differ, or an entry is NaN or infinite.
    """
    if isinstance(task_vectors, Mapping | Tensor | str) or not isinstance(task_vectors, Sequence):
        raise TypeError(f"expected a list of task vectors, got {type(task_vectors).__name__}")
    if not task_vectors:
        raise ValueError("expected at least one task vector, got an empty list")
    labelled = {f"task vector {index}": task for index, task in enumerate(task_vectors)}
    if merged is not None:
        labelled["the merged task vector"] = merged
    shapes = {label: _checked_shapes(label, task) for label, task in labelled.items()}
    first = shapes["task vector 0"]
    for label, other in shapes.items():
        if odd := first.keys() ^ other.keys():
            raise ValueError(f"task vector 0 and {label} differ in their floating-point keys: {_some(odd)}")
        for name, shape in other.items():
            if shape != first[name]:
                raise ValueError(f"{name!r}: shape {tuple(first[name])} in task vector 0, {tuple(shape)} in {label}")
    return list(first)


def _checked_shapes(label: str, task: TaskVector) -> dict[str, torch.Size]:
    if not isinstance(task, Mapping):
        raise TypeError(f"{label} is no mapping from names to tensors, but {type(task).__name__}")
    shapes = {}
    for name, tensor in task.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label}, {name!r}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            continue
        # One cheap pass: a bad entry spoils the sum. A sum may overflow by itself, so only then look at each entry.
        if not isinstance(task, Finite) and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise ValueError(f"{label}, {name!r}: {int((~tensor.isfinite()).sum())} entries are NaN or infinite")
        shapes[name] = tensor.shape
    return shapes


def check_choice(option: str, given: str, allowed: Iterable[str]) -> None:
    """Raise a ValueError that names the option and the nearest allowed value, unless `given` is one of them."""
    allowed = list(allowed)
    if given in allowed:
        return
    near = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {option} {given!r}, expected one of {', '.join(allowed)}{hint}")


def check_finite(option: str, given: float) -> None:
    """Raise a ValueError unless the option is a finite number."""
    if not math.isfinite(given):
        raise ValueError(f"{option} must be a finite number, got {given}")


def _some(names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
