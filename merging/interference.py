"""What the weights alone say of a merge before it is made: how far experts moved, what they share, where they conflict.

`features` gathers for a set of K task vectors τ_i what is said to make merging lossy. Experiment 32 measures which of
these numbers foretell anything; none of them evaluates a task.

Over-counting is that of the plain sum, in the notation of merging.calibration, less what UNRELATED updates of the same
spectra would show (merging.unrelated): updates that have nothing in common overlap and inflate too.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merging.calibration import SVC_MATRICES, diagnose
from merging.diagnosis import (
    calibrated_matrices,
    mean,
    overlap_between_tasks,
    privacy,
    totals,
    without_null_directions,
)
from merging.mergers import plain_sum
from merging.task_vectors import Predicate, TaskVector, check
from merging.unrelated import unrelated

TASKS, NORM, COSINE, LARGEST_COSINE = "number of tasks", "update norm, % of the base's", "cosine", "largest cosine"
OVERLAP, COUNT, INFLATION = "top-8 overlap", "s above chance", "inflation above chance"
INTERFERENCE, LARGEST_COUNT, CONFLICT = "interference, eq. 7", "largest s / K", "sign conflict"
MATCHED = "norm-matched scale"
FEATURES = (
    TASKS, NORM, COSINE, LARGEST_COSINE, OVERLAP, COUNT, INFLATION, INTERFERENCE, LARGEST_COUNT, CONFLICT, MATCHED,
)  # fmt: skip


@torch.no_grad()
def features(
    pretrained: TaskVector,
    task_vectors: Sequence[TaskVector],
    by_chance: Sequence[TaskVector] | None = None,
    *,
    matrices: Predicate = SVC_MATRICES,
) -> dict[str, float]:
    """Return the eleven numbers of FEATURES for a set of at least two task vectors; the inputs are left unchanged.

    Args:
        pretrained: state dict of the model that the experts started from.
        task_vectors: the K task vectors.
        by_chance: K unrelated task vectors of the same spectra, the chance level; default `unrelated(task_vectors)`.
        matrices: which tensors have spectra to compare.

    Returns:
        "number of tasks"           K
        "update norm, % of the base's"  mean of `update_norms`
        "cosine", "largest cosine"  mean and maximum over pairs of whole task vectors
        "top-8 overlap"             of the leading left subspaces, mean over matrices and pairs (`diagnose`)
        "s above chance"            mean s in the top tenth of directions (eq. 8), less that of `by_chance`
        "inflation above chance"    of the largest singular value, less that of `by_chance`
        "interference, eq. 7"       Σ (s − 1)² ‖a‖² / Σ ‖a‖²
        "largest s / K"             99 % quantile over all directions of max_i s_i / K: high where some are private
        "sign conflict"             see `sign_conflict`
        "norm-matched scale"        the factor of Σ τ_i at which it has the mean norm of the τ_i

    Raises:
        TypeError, ValueError: bad task vectors (as for the mergers), fewer than two, or no matrix among them.
    """
    check(task_vectors)
    if len(task_vectors) < 2:
        raise ValueError("interference is one between experts: expected at least 2 task vectors, got 1")
    products = inner_products(task_vectors)
    norms = products.diagonal().sqrt()
    pairs = torch.triu_indices(len(norms), len(norms), 1)
    cosines = (products / torch.outer(norms, norms))[*pairs]
    own, chance = (_of_the_sum(vectors, matrices) for vectors in (task_vectors, by_chance or unrelated(task_vectors)))
    return {
        TASKS: len(task_vectors),
        NORM: sum(update_norms(pretrained, task_vectors)) / len(task_vectors),
        COSINE: float(cosines.mean()),
        LARGEST_COSINE: float(cosines.max()),
        OVERLAP: own[OVERLAP],
        COUNT: own[COUNT] - chance[COUNT],
        INFLATION: own[INFLATION] - chance[INFLATION],
        INTERFERENCE: own[INTERFERENCE],
        LARGEST_COUNT: own[LARGEST_COUNT],
        CONFLICT: sign_conflict(task_vectors),
        MATCHED: matched_scale(products),
    }


def _of_the_sum(task_vectors: Sequence[TaskVector], matrices: Predicate) -> dict[str, float]:
    diagnoses = diagnose(plain_sum(task_vectors), task_vectors, matrices=matrices)
    layers = [without_null_directions(seen) for seen in calibrated_matrices(diagnoses).values()]
    if not layers:
        raise ValueError("the experts have no matrix that SVC would calibrate: there are no spectra to compare")
    known = totals(layers)
    return {
        OVERLAP: float(mean(overlap_between_tasks, layers)),
        COUNT: known["s, top tenth"],
        INFLATION: known["inflation, largest σ"],
        INTERFERENCE: known["interference"],
        LARGEST_COUNT: privacy(layers)["max s / K, 99 % quantile"],
    }


@torch.no_grad()
def inner_products(task_vectors: Sequence[TaskVector]) -> Tensor:
    """Return <τ_i, τ_j> of whole task vectors over all floating-point tensors, (K, K), float64."""
    names = check(task_vectors)
    found = torch.zeros(len(task_vectors), len(task_vectors), dtype=torch.float64)
    for name in names:
        flat = torch.stack([task[name].flatten().double() for task in task_vectors])  # (K, n), one tensor at a time
        found += (flat @ flat.T).cpu()
    return found


def matched_scale(products: Tensor) -> float:
    """Return the factor of Σ τ_i at which it has the mean norm of the τ_i, (1/K) Σ_i ‖τ_i‖ / ‖Σ_i τ_i‖.

    It is norm matching by one number (merging.norm_matching), known before anything is merged.

    Args:
        products: <τ_i, τ_j>, (K, K).

    Returns:
        the factor, NaN where the updates cancel or nothing moves.
    """
    squares, total = products.diagonal(), float(products.sum())
    cancels = total <= 1e-12 * float(squares.sum())  # the rest is rounding
    return math.nan if cancels else float(squares.sqrt().mean()) / math.sqrt(total)


@torch.no_grad()
def sign_conflict(task_vectors: Sequence[TaskVector]) -> float:
    """Return the share of the updates' total size Σ_i ‖τ_i‖_1 that opposes the sign of its entry's sum.

    Entry by entry, TIES elects the sign of Σ_i τ_i and drops the rest (Yadav et al., 2023): this is how much the rest
    weighs, (1 − Σ_j |Σ_i τ_ij| / Σ_j Σ_i |τ_ij|) / 2. It is 0 where all agree, 1/2 where everything cancels, and NaN
    where nothing moves.
    """
    kept = total = 0.0
    for name in check(task_vectors):
        entries = torch.stack([task[name].flatten().double() for task in task_vectors])  # (K, n)
        kept += float(entries.sum(0).abs().sum())
        total += float(entries.abs().sum())
    return (1 - kept / total) / 2 if total else math.nan


def update_norms(pretrained: TaskVector, updates: Sequence[TaskVector]) -> list[float]:
    """Return ‖τ_i‖ / ‖θ_pre‖ in % for each expert, over the tensors that some expert changed; 0 where none did."""
    changed = [name for name in updates[0] if any(update[name].any() for update in updates)]
    base = _norm(pretrained, changed)
    return [100 * _norm(update, changed) / base if changed else 0.0 for update in updates]


def _norm(state: Mapping[str, Tensor], names: Sequence[str]) -> float:
    norms = [torch.linalg.vector_norm(state[name], dtype=torch.float64) for name in names]
    return float(torch.stack(norms).norm()) if norms else 0.0
