"""Slow exact twins of `calibrate`, outside the library's API: what its results and its time are compared with.

Both published implementations take a full SVD of each matrix and stack the updates of all tasks: the authors' code in
float32, fusion_bench in float64. `calibration_floor` is the work that no implementation of SVC can leave out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.calibration import SVC_MATRICES
from merging.task_vectors import Predicate, TaskVector


def calibrate_by_svd(
    merged: TaskVector,
    task_vectors: Sequence[TaskVector],
    alpha: float | None = None,
    dtype: torch.dtype = torch.float64,
    matrices: Predicate = SVC_MATRICES,
) -> dict[str, Tensor]:
    """Return SVC in the output space by the formula as it is written: ΔW̃ = U diag(σ γ) Vᵀ from a thin SVD.

    Args:
        merged: the merged task vector, checked by nobody.
        task_vectors: the K original task vectors.
        alpha: floor of the coefficients; default 1/K.
        dtype: of all arithmetic; float64 is the reference.
        matrices: which tensors are calibrated.

    Returns:
        name → calibrated update, in the dtype of `merged`.
    """
    alpha = 1 / len(task_vectors) if alpha is None else alpha
    calibrated = {}
    for name, update in merged.items():
        calibrated[name] = update.clone()
        if matrices(name, update):
            stacked = torch.stack([task[name] for task in task_vectors]).to(dtype)  # (K, m, n)
            calibrated[name] = _by_svd(update.to(dtype), stacked, alpha).to(update.dtype)
    return calibrated


def _by_svd(merged: Tensor, updates: Tensor, alpha: float) -> Tensor:
    left, singular, right = torch.linalg.svd(merged, full_matrices=False)  # (m, r), (r,), (r, n)
    own = left.T @ updates  # (K, r, n)
    inner = (own * (left.T @ merged)).sum(-1)  # (K, r)
    coefficients = inner / own.square().sum(-1).clamp_min(1e-12)
    divisor = coefficients.clamp_min(alpha).mean(0)  # (r,)
    return left @ torch.diag(singular / divisor) @ right


def calibration_floor(
    merged: TaskVector, task_vectors: Sequence[TaskVector], matrices: Predicate = SVC_MATRICES
) -> dict[str, Tensor]:
    """Do what every implementation of SVC must, and nothing else: a Gram matrix, its eigenbasis, K projections.

    Returns:
        name → the last projection (r, n), or the columns' side of a tall matrix: of no use but to be waited for.
    """
    projected = {}
    for name, update in merged.items():
        if matrices(name, update):
            small = (update.T if len(update) > update.shape[1] else update).double()
            basis = torch.linalg.eigh(small @ small.T).eigenvectors.to(update.dtype)  # (r, r)
            left = update @ basis if len(update) > update.shape[1] else basis  # (m, r)
            for task in task_vectors:
                projected[name] = left.T @ task[name]  # (r, n)
    return projected


def left_singular_vectors(
    merged: TaskVector, dtype: torch.dtype = torch.float32, matrices: Predicate = SVC_MATRICES
) -> dict[str, Tensor]:
    """Return U (m, r) of a thin SVD of each matrix, computed in `dtype`: another solver's basis for `calibrate`."""
    return {
        name: torch.linalg.svd(update.to(dtype), full_matrices=False).U.to(update.dtype)
        for name, update in merged.items()
        if matrices(name, update)
    }
