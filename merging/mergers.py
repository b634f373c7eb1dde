"""Mergers: each takes the list of task vectors and returns one merged task vector; its inputs are left unchanged.

All follow the algorithms of the official SVC repository (github.com/lyymuwu/SVC), with scale 1 after merging unless
the function says otherwise. Notation: K task vectors τ_i; per matrix m × n and r = min(m, n); A = U diag(σ) Vᵀ is
the thin SVD and polar(A) = U Vᵀ. Arithmetic is at least float32, the result has the dtype of the inputs.

Rank rule: for updates without full rank (LoRA, repeated tasks) the published TSV-M, Iso-C and Iso-CTS depend on
arbitrary null vectors. Here triplets with σ_r ≤ 1e-6 σ_1 are dropped, and Iso spreads its singular values over the
remaining directions only. Updates of full rank are not affected.

To add a merger, write one function and add it to `MERGERS` at the end.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from common.spectral import RANK_TOLERANCE, numerical_rank, polar, product, singular_values, svd, working
from merging.task_vectors import OneTensor, Predicate, TaskVector, check, check_choice, check_finite, matrices_without

Updates = Sequence[Tensor]  # one tensor of each task

SUM_MATRICES = matrices_without("text_projection", "token_embedding")
TSV_MATRICES = matrices_without("text_projection", "embedding")
ISO_MATRICES = matrices_without("text_projection")
STAR_MATRICES = matrices_without(conv=True)


def _merge_each(
    task_vectors: Sequence[TaskVector],
    rule: Callable[[Updates], Tensor],
    matrices: Predicate | None = None,
) -> dict[str, Tensor]:
    """Apply `rule` to one tensor of all tasks after the other; where `matrices` refuses a tensor, take the mean."""
    merged = {}
    for name in check(task_vectors):
        first = task_vectors[0][name]
        shape, dtype = first.shape, first.dtype
        refused = matrices is not None and not (first.numel() and matrices(name, first))
        del first  # tasks may be large: one at a time
        view = working if matrices is None or refused else partial(_as_matrix, name)
        result = (_mean if refused else rule)(OneTensor(task_vectors, name, view))
        merged[name] = result.reshape(shape).to(dtype)
    return merged


def _as_matrix(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        raise ValueError(f"{name!r}: `matrices` selects a tensor of shape {tuple(tensor.shape)}, which is no matrix")
    return working(tensor).flatten(1)  # (out, rest)


def _sum(updates: Iterable[Tensor]) -> Tensor:
    """Return the sum, with no more than one update and the sum in memory."""
    total = None
    for update in updates:
        total = update.clone() if total is None else total.add_(update)
        del update
    return total


def _mean(updates: Updates) -> Tensor:
    return _sum(updates).div_(len(updates))


# Linear combinations -------------------------------------------------------------------------------------------------


def weight_average(task_vectors: Sequence[TaskVector]) -> dict[str, Tensor]:
    """Return the mean of the task vectors, τ = (1/K) Σ τ_i."""
    return _merge_each(task_vectors, _mean)


def task_arithmetic(task_vectors: Sequence[TaskVector], scale: float = 0.3) -> dict[str, Tensor]:
    """Return τ = scale · Σ τ_i on all tensors (Ilharco et al., 2023).

    Raises:
        ValueError: scale is not finite.
    """
    check_finite("scale", scale)
    return _merge_each(task_vectors, lambda updates: _sum(updates).mul_(scale))


def plain_sum(task_vectors: Sequence[TaskVector], *, matrices: Predicate = SUM_MATRICES) -> dict[str, Tensor]:
    """Return τ = Σ τ_i on the matrices and the mean elsewhere; SVC's theory is about this merger.

    Args:
        task_vectors: the K task vectors.
        matrices: which tensors are summed.
    """
    return _merge_each(task_vectors, _sum, matrices)


# Elections and masks -------------------------------------------------------------------------------------------------


def ties(
    task_vectors: Sequence[TaskVector],
    keep: float = 0.2,
    scope: str = "layer",
    combine: str = "mean",
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Trim each task's small entries, elect a sign per entry, and combine the entries that agree with it (TIES).

    The official SVC script uses one threshold and one majority a tensor and the mean (the defaults); the published
    TIES (Yadav et al., 2023) is scope="global", combine="sum", scale=0.3.

    Args:
        task_vectors: the K task vectors.
        keep: share of the entries that survive trimming, in (0, 1].
        scope: threshold and majority "layer" by layer, or "global", over all tensors together.
        combine: "mean" over the entries that agree, or their "sum".
        scale: factor of the result.

    Raises:
        ValueError: an option is out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    check_choice("scope", scope, ("layer", "global"))
    check_choice("combine", combine, ("mean", "sum"))
    check_finite("scale", scale)
    names = check(task_vectors)
    merged = {}
    for group in [names] if scope == "global" else [[name] for name in names]:
        thresholds = [_ties_threshold([task[name] for name in group], keep) for task in task_vectors]
        signs = (_ties_signs(_trimmed(task_vectors, name, thresholds)).sum() for name in group)
        majority = sum(int(total) for total in signs)
        for name in group:
            combined = _ties_combine(_trimmed(task_vectors, name, thresholds), majority, combine)
            merged[name] = (scale * combined).to(task_vectors[0][name].dtype)
    return merged


def _ties_threshold(tensors: list[Tensor], keep: float) -> Tensor:
    """Return the k-th smallest magnitude of d entries, k = d − ⌊keep · d⌋: what is smaller is trimmed."""
    magnitudes = torch.cat([working(tensor).abs().flatten() for tensor in tensors])
    if not len(magnitudes):
        return magnitudes.sum()
    return magnitudes.kthvalue(max(1, len(magnitudes) - math.floor(keep * len(magnitudes)))).values


def _trimmed(task_vectors: Sequence[TaskVector], name: str, thresholds: list[Tensor]) -> Tensor:
    updates = (working(task[name]) for task in task_vectors)
    pairs = zip(updates, thresholds, strict=True)
    return torch.stack([update.where(update.abs() >= threshold.to(update), 0) for update, threshold in pairs])


def _ties_signs(trimmed: Tensor) -> Tensor:
    return trimmed.sum(0).sign()  # (K, …) → (…)


def _ties_combine(trimmed: Tensor, majority: int, combine: str) -> Tensor:
    """Combine the entries (K, …) of the elected sign; an undecided entry follows the majority, else it is negative."""
    signs = _ties_signs(trimmed)
    positive = (signs > 0) | ((signs == 0) & (majority > 0))
    agrees = torch.where(positive, trimmed > 0, trimmed < 0)  # (K, …)
    total = trimmed.where(agrees, 0).sum(0)
    return total if combine == "sum" else total / agrees.sum(0).clamp_min(1)


def dare(task_vectors: Sequence[TaskVector], drop: float = 0.8, seed: int = 0) -> dict[str, Tensor]:
    """Drop entries at random, rescale the others by 1 / (1 − drop), and take the mean (Yu et al., 2024).

    Each mask depends on nothing but (seed, task index, tensor name): not on the device, nor on which tensors were
    merged before. Other implementations agree in distribution only.

    Args:
        task_vectors: the K task vectors; their order decides which masks they get.
        drop: probability that an entry is dropped, in [0, 1).
        seed: any integer.

    Raises:
        ValueError: drop is out of range.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    merged = {}
    for name in check(task_vectors):
        updates = [working(task[name]) for task in task_vectors]
        kept = (update * _dare_mask(update, drop, seed, index, name) for index, update in enumerate(updates))
        merged[name] = (sum(kept) / ((1 - drop) * len(updates))).to(task_vectors[0][name].dtype)
    return merged


def _dare_mask(tensor: Tensor, drop: float, seed: int, index: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return (torch.rand(tensor.shape, generator=generator) >= drop).to(tensor)  # drawn on the CPU for every device


# Spectral mergers ----------------------------------------------------------------------------------------------------


def tsv_m(
    task_vectors: Sequence[TaskVector], *, matrices: Predicate = TSV_MATRICES, side: int | None = None
) -> dict[str, Tensor]:
    """Join the top r/K singular triplets of each task and whiten their two bases (TSV-M, Gargiulo et al., 2025).

        τ = polar(Û) diag(σ̂) polar(V̂)ᵀ,  Û, σ̂, V̂ the concatenated top ⌊r/K⌋ triplets of every τ_i

    A matrix with r < K keeps no triplet, and so becomes zero. The rank rule is applied to τ_i, Û and V̂.

    Args:
        task_vectors: the K task vectors.
        matrices: which tensors; the others take the mean.
        side: r, where the task vectors hold the small cores of larger matrices (`merging.lowrank`).
    """
    return _merge_each(task_vectors, partial(_tsv_matrix, side=side), matrices)


def _tsv_matrix(updates: Updates, side: int | None = None) -> Tensor:
    count = (min(updates[0].shape) if side is None else side) // len(updates)
    left, singular, right = _concatenate([_top(update, count) for update in updates])
    if not len(singular):
        return torch.zeros_like(updates[0])
    left = polar(left)
    return product(left, singular[:, None] * polar(right), updates[0].dtype)


def _top(update: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `count` triplets, or as many as the numerical rank allows, in float64."""
    left, singular, right = svd(update, count, torch.float64)
    count = min(count, int(numerical_rank(singular)))
    return left[:, :count], singular[:count], right[:count]


def _concatenate(triplets: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    lefts, singulars, rights = zip(*triplets, strict=True)
    return torch.cat(lefts, 1), torch.cat(singulars), torch.cat(rights)


def iso_c(task_vectors: Sequence[TaskVector], *, matrices: Predicate = ISO_MATRICES) -> dict[str, Tensor]:
    """Give the sum's directions one common singular value, their mean (Iso-C, Marczak et al., 2025).

        τ = mean(σ) · U Vᵀ,  U diag(σ) Vᵀ = Σ τ_i

    By the rank rule the mean runs over the numerical rank only.

    Args:
        task_vectors: the K task vectors.
        matrices: which tensors; the others take the mean.
    """
    return _merge_each(task_vectors, _iso_c_matrix, matrices)


def _iso_c_matrix(updates: Updates) -> Tensor:
    left, singular, right = svd(_sum(updates))
    rank = int(numerical_rank(singular))
    return (left[:, :rank] @ right[:rank]).mul_(singular[:rank].sum() / max(1, rank))


def iso_cts(
    task_vectors: Sequence[TaskVector], *, matrices: Predicate = ISO_MATRICES, side: int | None = None
) -> dict[str, Tensor]:
    """Replace the weakest directions of the sum by each task's own, then flatten (Iso-CTS, Marczak et al., 2025).

    The top c directions U_c of Σ τ_i are common; every task adds the top q of (1 − U_c U_cᵀ) τ_i. With
    c₀ = ⌊0.8 r⌋, q = round((r − c₀) / K), half to even, and c = r − q K (r = 768, K = 8: q = 19, c = 616):

        τ = mean(σ̂) · polar(Û) polar(V̂)ᵀ,  Û, σ̂, V̂ the r concatenated triplets

    By the rank rule the mean runs only over the triplets above 1e-6 of the largest.

    Args:
        task_vectors: the K task vectors.
        matrices: which tensors; the others take the mean.
        side: r, where the task vectors hold the small cores of larger matrices (`merging.lowrank`).
    """
    return _merge_each(task_vectors, partial(_iso_cts_matrix, side=side), matrices)


def _iso_cts_matrix(updates: Updates, side: int | None = None) -> Tensor:
    left, singular, right = _iso_cts_triplets(updates, side)
    if not len(singular):
        return torch.zeros_like(updates[0])
    left = polar(left)
    return product(left, singular.mean() * polar(right), updates[0].dtype)


def _iso_cts_triplets(updates: Updates, side: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    common, own = _iso_cts_counts(min(updates[0].shape) if side is None else side, len(updates))
    total = torch.zeros_like(updates[0], dtype=torch.float64)  # for Û may be ill-conditioned
    for update in updates:
        _add(total, update)
        del update
    triplets = [_top(total, common)]
    shared = triplets[0][0]  # (m, c)
    del total
    for update in updates if own else []:
        left, singular, right = svd(_outside(shared, update), own)
        triplets.append((left, singular[:own], right))
        del update
    left, singular, right = _concatenate(triplets)
    kept = singular > RANK_TOLERANCE * (singular.amax() if len(singular) else 0)
    return (left, singular, right) if kept.all() else (left[:, kept], singular[kept], right[kept])


def _outside(shared: Tensor, update: Tensor) -> Tensor:
    """Return (1 − shared sharedᵀ) update in float64."""
    residual = product(shared, -product(shared.T, update, torch.float64), torch.float64)
    _add(residual, update)
    return residual


def _add(total: Tensor, update: Tensor) -> None:
    """Add an update to a float64 sum; by rows, because a whole one would be copied to float64."""
    for part, own in zip(total.split(1024), update.split(1024), strict=True):
        part += own


def _iso_cts_counts(rank: int, tasks: int) -> tuple[int, int]:
    """Return c, the number of common directions, and q, that of each task's own."""
    own = round((rank - int(0.8 * rank)) / tasks)
    return rank - own * tasks, own


def star(
    task_vectors: Sequence[TaskVector],
    share: float = 0.4,
    *,
    matrices: Predicate = STAR_MATRICES,
) -> dict[str, Tensor]:
    """Truncate each task's spectrum, restore its nuclear norm, and take the mean (STAR, Lee et al., 2025).

        τ_i' = (Σσ / Σ_{j≤p} σ_j) · U_p diag(σ_p) V_pᵀ,  p the smallest rank with Σ_{j≤p} σ_j ≥ share · Σσ

    Args:
        task_vectors: the K task vectors.
        share: of the nuclear norm that is kept, in (0, 1].
        matrices: which tensors (kernels as (out, rest)); the others take the mean.

    Raises:
        ValueError: share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")

    def rule(updates: Updates) -> Tensor:
        return _sum(_star_matrix(update, share) for update in updates).div_(len(updates))

    return _merge_each(task_vectors, rule, matrices)


def _star_matrix(update: Tensor, share: float) -> Tensor:
    left, singular, right = svd(update)
    cumulative = singular.cumsum(0)
    total = cumulative[-1]
    if total <= 1e-12:
        return torch.zeros_like(update)
    kept = int((cumulative < share * total).sum()) + 1  # p
    return (left[:, :kept] * (singular[:kept] * total / cumulative[kept - 1])) @ right[:kept]


def iso_basis(
    task_vectors: Sequence[TaskVector],
    method: str,
    *,
    matrices: Predicate = ISO_MATRICES,
    side: int | None = None,
) -> dict[str, Tensor]:
    """Return the left basis in which Iso-C or Iso-CTS built each matrix, for `calibrate(..., bases=…)`.

    All singular values of their result are equal, so that the result alone does not determine a basis: whatever SVC
    computes in another one is a different matrix. Iso-C's basis is U of Σ τ_i; that of Iso-CTS is polar(Û), or,
    where Û has no full rank, an orthonormal basis of the same columns.

    Args:
        task_vectors: the K task vectors that were merged.
        method: "iso_c" or "iso_cts".
        matrices: which tensors, as for the merger.
        side: as for the merger.

    Returns:
        name → (m, r) with orthonormal columns (fewer columns for Iso-CTS without full rank), for 2-D tensors.

    Raises:
        ValueError: unknown method.
    """
    check_choice("method", method, ("iso_c", "iso_cts"))
    bases = {}
    for name in check(task_vectors):
        first = task_vectors[0][name]
        taken = first.numel() and matrices(name, first)
        del first
        if taken:
            updates = OneTensor(task_vectors, name, partial(_as_matrix, name))
            bases[name] = svd(_sum(updates))[0] if method == "iso_c" else _iso_cts_basis(updates, side)
    return bases


def _iso_cts_basis(updates: Updates, side: int | None = None) -> Tensor:
    columns, singular, _ = _iso_cts_triplets(updates, side)
    rank = int(numerical_rank(singular_values(columns)))
    columns = polar(columns) if rank == len(singular) else svd(columns, rank)[0]
    return columns.to(updates[0].dtype)


MERGERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "weight_average": weight_average,
    "task_arithmetic": task_arithmetic,
    "plain_sum": plain_sum,
    "ties": ties,
    "dare": dare,
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "star": star,
}


PUBLISHED = ("task_arithmetic", "ties", "dare", "tsv_m", "iso_c", "iso_cts")  # the mergers of the paper's main table


def check_methods(names: Sequence[str]) -> None:
    """Raise a ValueError that names the nearest merger, unless every name is one."""
    for name in names:
        check_choice("merger", name, MERGERS)


def merge(method: str, task_vectors: Sequence[TaskVector], seed: int = 0) -> dict[str, Tensor]:
    """Return what a merger makes of the task vectors with its defaults; `seed` is for DARE, the one that draws masks.

    Raises:
        ValueError: there is no such merger; the message names the nearest one.
    """
    return merger(method)(task_vectors, **({"seed": seed} if method == "dare" else {}))


def merger(name: str) -> Callable[..., dict[str, Tensor]]:
    """Return the merger of this name.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    check_choice("merger", name, MERGERS)
    return MERGERS[name]
