"""Slow and exact counterparts, outside the library's API, with which its results and its time are compared.

For `calibrate`: both published implementations take a full SVD of each matrix and stack the updates of all tasks, the
authors' code in float32, fusion_bench in float64. `calibration_floor` is the work that no implementation of SVC can
leave out. For `python -m merging`: task arithmetic and TIES on the weights of one tensor, in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common.spectral import working
from merging.calibration import SVC, SVC_MATRICES
from merging.layers import depths
from merging.lowrank import LowRank, merge_and_calibrate, merge_low_rank, oriented
from merging.mergers import merger
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
        merged: the merged task vector; it is not checked.
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
    """Do what every implementation of SVC must do, and nothing else: a Gram matrix, its eigenbasis, K projections.

    Args:
        merged, task_vectors, matrices: as for `calibrate_by_svd`.

    Returns:
        name → the last projection (r, n), only so that a caller can wait for it.
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


def relative_distance(update: TaskVector, exact: TaskVector, matrices: Predicate = SVC_MATRICES) -> float:
    """Return ‖update − exact‖ / ‖exact‖ in float64, Frobenius norms over all matrices taken together."""
    names = [name for name in exact if matrices(name, exact[name])]
    away = sum((update[name] - exact[name]).double().square().sum() for name in names)
    return (away / sum(exact[name].double().square().sum() for name in names)).sqrt().item()


def interference_loss(merged: Tensor, updates: Sequence[Tensor]) -> Tensor:
    """Return WUDI's loss Σ_i ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖² of one matrix, as it is written; zero updates do not count."""
    moved = [update for update in updates if update.any()]
    return sum(((merged - own) @ own.T).square().sum() / own.square().sum() for own in moved)


def interference_minimum(updates: Sequence[Tensor]) -> Tensor:
    """Return the nearest matrix to Σ τ_i at which WUDI's loss is least, in float64: Σ τ_i − B G⁺ (`merging.rivals`).

    It is the minimum that Adam would reach in the end. Directions of G below 1e-12 of the largest are taken as null.
    """
    updates = [update.double() for update in updates]
    total = torch.stack(updates).sum(0)  # (m, n)
    units = torch.cat([update / update.norm() for update in updates if update.any()] or [total])  # (K m, n)
    start = sum((total - own) @ own.T @ own / own.square().sum() for own in updates if own.any())
    return total - start @ torch.linalg.pinv(units.T @ units, rtol=1e-12, hermitian=True)


def task_arithmetic_by_entry(base: Tensor, experts: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Return θ_0 + scale · Σ_i (θ_i − θ_0) of one tensor in float64, and True for each of its entries."""
    start = base.double()
    return start + scale * sum(expert.double() - start for expert in experts), torch.ones_like(start, dtype=torch.bool)


def ties_by_entry(base: Tensor, experts: Sequence[Tensor], scale: float, keep: float = 0.2) -> tuple[Tensor, Tensor]:
    """Return TIES with one threshold per tensor and the mean, in float64, and where all implementations agree.

    Of d entries of τ_i = θ_i − θ_0, ⌊keep · d⌋ survive. Implementations differ on entries whose magnitude equals the
    threshold, the (d − ⌊keep · d⌋)-th smallest, and on entries whose survivors sum to zero: these are "not decided".

    Args:
        base, experts: one tensor of the K + 1 models, of any floating dtype.
        scale: factor of the result.
        keep: share of the entries that survive, in (0, 1).

    Returns:
        merged weights, float64, and a boolean tensor: whether the entry is decided. Both of the shape of `base`.
    """
    start = base.double()
    updates = torch.stack([expert.double() - start for expert in experts])  # (K, …)
    decided = torch.ones_like(start, dtype=torch.bool)
    for update in updates:
        magnitude, size = update.abs(), update.numel()
        threshold = magnitude.flatten().kthvalue(max(1, size - int(keep * size))).values
        decided &= magnitude != threshold
        update[magnitude < threshold] = 0
    elected = updates.sum(0).sign()
    decided &= (elected != 0) | (updates == 0).all(0)
    agrees = updates.sign() == elected  # (K, …)
    return start + scale * (updates * agrees).sum(0) / agrees.sum(0).clamp_min(1), decided


def factored_errors(
    updates: Sequence[Mapping[str, LowRank]], method: str, svc: SVC | Mapping[str, Any] | None = None
) -> dict[str, tuple[float, float]]:
    """Return, for each weight, how far two ways of merging adapters are from the merge of their matrices in float64.

    Args:
        updates: of each of K adapters, name → update; all have the same names.
        method: a merger that has a factored form.
        svc: the options of SVC, or None for no calibration.

    Returns:
        name → ‖M − M_64‖ / ‖M_64‖ of the factored form and of the matrices in float32.
    """
    errors, layers = {}, depths(updates[0])
    for name in updates[0]:
        place = merger(method).known(depth=layers[name])
        own = [oriented(adapter[name]) for adapter in updates]
        exact = [replace(update, b=update.b.double(), a=update.a.double()) for update in own]
        rule = merger(method).known(precision=working(own[0].b).dtype)  # in float64, but computed from these
        true = merge_and_calibrate([{name: update.dense()} for update in exact], method, svc, **rule, **place)[name]
        dense = merge_and_calibrate([{name: update.dense()} for update in own], method, svc, **place)[name]
        factored = merge_low_rank([adapter[name] for adapter in updates], method, svc, name=name, **place)
        factored = oriented(factored).dense()
        size = true.norm().clamp_min(torch.finfo(torch.float64).tiny)
        errors[name] = float((factored - true).norm() / size), float((dense - true).norm() / size)
    return errors
