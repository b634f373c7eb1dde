"""Mergers: each takes the list of task vectors and returns one merged task vector; its inputs are left unchanged.

All follow the algorithms of the official SVC repository (github.com/lyymuwu/SVC), with scale 1 after merging unless
the function says otherwise. Notation: K task vectors τ_i; per matrix m × n and r = min(m, n); A = U diag(σ) Vᵀ is
the thin SVD and polar(A) = U Vᵀ. Arithmetic is at least float32, the result has the dtype of the inputs. Task vectors
that do not fit each other raise the errors of `merging.task_vectors.check`.

Rank rule: for updates without full rank (LoRA, repeated tasks) the published TSV-M, Iso-C and Iso-CTS depend on
arbitrary null vectors. Here triplets with σ_r ≤ ε σ_1 are dropped, and Iso spreads its singular values over the
remaining directions only. ε is the rounding noise of the input's dtype: 1e-6 for float32 and narrower, 1e-10 for
float64, which is decomposed by a true SVD (`common.spectral.rank_tolerance`). Updates whose singular values are all
above it, those of full rank, are not affected.

To add a merger, write one function and put its record into `MERGERS` at the end: a `Merger` (`merging.record`) holds
all that the rest of the project has to know about it, and no other file knows a merger by its name. The functions of
mergers from outside that repository stand in `merging.rivals`, their records in the same table.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from common.spectral import leading_triplets, numerical_rank, polar, product, rank_tolerance, singular_values, svd
from merging.record import ByRows, Merger, Updates, as_matrix, merge_each, sum_of
from merging.rivals import (
    knots,
    knots_copies,
    lines,
    subspace_boost,
    wudi,
    wudi_copies,
    wudi_minimum,
    wudi_minimum_copies,
)
from merging.task_vectors import (
    OneTensor,
    Predicate,
    TaskVector,
    check,
    check_choice,
    check_finite,
    matrices_without,
    sum_of_weights,
)
from merging.ties_dare import dare, dare_by_rows, elect, elected_together, ties, ties_by_rows

SUM_MATRICES = matrices_without("text_projection", "token_embedding")
TSV_MATRICES = matrices_without("text_projection", "embedding")
ISO_MATRICES = matrices_without("text_projection")
STAR_MATRICES = matrices_without(conv=True)

# Linear combinations -------------------------------------------------------------------------------------------------


def weight_average(task_vectors: Sequence[TaskVector], *, weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the mean of the task vectors, τ = (1/K) Σ τ_i.

    Args:
        task_vectors: the K task vectors.
        weights: of the tasks, by which their vectors are multiplied already (`weighted`): the mean is then divided by
            Σ w_i instead of K.

    Raises:
        ValueError: the weights sum to zero, or there are not K.
    """
    return merge_each(task_vectors, lambda updates: sum_of(updates).div_(sum_of_weights(weights, len(updates))))


def task_arithmetic(task_vectors: Sequence[TaskVector], scale: float = 0.3) -> dict[str, Tensor]:
    """Return τ = scale · Σ τ_i on all tensors (Ilharco et al., 2023).

    Args:
        task_vectors: the K task vectors.
        scale: λ, the factor of the sum.

    Raises:
        ValueError: scale is not finite.
    """
    check_finite("scale", scale)
    return merge_each(task_vectors, lambda updates: sum_of(updates).mul_(scale))


def plain_sum(task_vectors: Sequence[TaskVector], *, matrices: Predicate = SUM_MATRICES) -> dict[str, Tensor]:
    """Return τ = Σ τ_i on the matrices and the mean elsewhere; SVC's theory is about this merger.

    Args:
        task_vectors: the K task vectors.
        matrices: which tensors are summed.
    """
    return merge_each(task_vectors, sum_of, matrices)


# Spectral mergers ----------------------------------------------------------------------------------------------------


def tsv_m(
    task_vectors: Sequence[TaskVector],
    *,
    matrices: Predicate = TSV_MATRICES,
    side: int | None = None,
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Join the top r/K singular triplets of each task and whiten their two bases (TSV-M, Gargiulo et al., 2025).

        τ = polar(Û) diag(σ̂) polar(V̂)ᵀ,  Û, σ̂, V̂ the concatenated top ⌊r/K⌋ triplets of every τ_i

    A matrix with r < K keeps no triplet, and so becomes zero. The rank rule is applied to τ_i, Û and V̂.

    Args:
        task_vectors: the K task vectors.
        matrices: which tensors are treated so; the others are averaged.
        side: r, where the task vectors hold the small cores of larger matrices (`merging.lowrank`).
        precision: for the rank rule, the dtype that the task vectors were computed from, if not their own.
    """
    return merge_each(task_vectors, partial(_tsv_matrix, side=side, precision=precision), matrices)


def _tsv_matrix(updates: Updates, side: int | None = None, precision: torch.dtype | None = None) -> Tensor:
    like = updates[0]
    precision = precision or like.dtype
    count = (min(like.shape) if side is None else side) // len(updates)
    left, singular, right = _concatenate([_top(update, count, precision) for update in updates])
    if not len(singular):
        return torch.zeros_like(like)
    left = polar(left, precision=precision)
    return product(left, singular[:, None] * polar(right, precision=precision), like.dtype)


def _top(update: Tensor, count: int, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `count` triplets, or as many as the numerical rank allows, in float64."""
    left, singular, right = leading_triplets(update, min(count, *update.shape), precision)
    count = int(numerical_rank(singular, rank_tolerance(precision))) if len(singular) else 0
    return left[:, :count], singular[:count], right[:count]


def _concatenate(triplets: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    lefts, singulars, rights = zip(*triplets, strict=True)
    return torch.cat(lefts, 1), torch.cat(singulars), torch.cat(rights)


def iso_c(
    task_vectors: Sequence[TaskVector],
    *,
    matrices: Predicate = ISO_MATRICES,
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Give the sum's directions one common singular value, their mean (Iso-C, Marczak et al., 2025).

        τ = mean(σ) · U Vᵀ,  U diag(σ) Vᵀ = Σ τ_i

    By the rank rule the mean runs over the numerical rank only.

    Args:
        task_vectors: the K task vectors.
        matrices: which tensors are treated so; the others are averaged.
        precision: as for `tsv_m`.
    """
    return merge_each(task_vectors, partial(_iso_c_matrix, precision=precision), matrices)


def _iso_c_matrix(updates: Updates, precision: torch.dtype | None = None) -> Tensor:
    total = sum_of(updates)
    precision = precision or total.dtype
    left, singular, right = svd(total, precision=precision)
    rank = int(numerical_rank(singular, rank_tolerance(precision)))
    return (left[:, :rank] @ right[:rank]).mul_(singular[:rank].sum() / max(1, rank))


def _basis_of_sum(updates: Updates, side: int | None = None, precision: torch.dtype | None = None) -> Tensor:
    total = sum_of(updates)
    return svd(total, precision=precision or total.dtype)[0]


def iso_cts(
    task_vectors: Sequence[TaskVector],
    *,
    matrices: Predicate = ISO_MATRICES,
    side: int | None = None,
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Replace the weakest directions of the sum by each task's own, then flatten (Iso-CTS, Marczak et al., 2025).

    The top c directions U_c of Σ τ_i are common; every task adds the top q of (1 − U_c U_cᵀ) τ_i. With
    c₀ = ⌊0.8 r⌋, q = round((r − c₀) / K), half to even, and c = r − q K (r = 768, K = 8: q = 19, c = 616):

        τ = mean(σ̂) · polar(Û) polar(V̂)ᵀ,  Û, σ̂, V̂ the r concatenated triplets

    By the rank rule the mean runs only over the triplets above ε of the largest.

    Args:
        task_vectors: the K task vectors.
        matrices: which tensors are treated so; the others are averaged.
        side, precision: as for `tsv_m`.
    """
    return merge_each(task_vectors, partial(_iso_cts_matrix, side=side, precision=precision), matrices)


def _iso_cts_matrix(updates: Updates, side: int | None = None, precision: torch.dtype | None = None) -> Tensor:
    like = updates[0]
    precision = precision or like.dtype
    left, singular, right = _iso_cts_triplets(updates, side, precision)
    if not len(singular):
        return torch.zeros_like(like)
    left = polar(left, precision=precision)
    return product(left, singular.mean() * polar(right, precision=precision), like.dtype)


def _iso_cts_triplets(updates: Updates, side: int | None, precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    common, own = iso_cts_counts(min(updates[0].shape) if side is None else side, len(updates))
    total = torch.zeros_like(updates[0], dtype=torch.float64)  # float64, as Û may be ill-conditioned
    for update in updates:
        _add(total, update)
        del update
    left, singular, right = svd(total, dtype=torch.float64, precision=precision)
    del total
    kept = min(common, int(numerical_rank(singular, rank_tolerance(precision))))
    shared, others = left[:, :kept], left[:, kept:]  # (m, c), (m, r − c)
    triplets = [(shared, singular[:kept], right[:kept])]
    for update in updates if own else []:
        if len(left) == left.shape[1]:  # the others span all that is not shared
            inner, singular, right = leading_triplets(product(others.T, update, torch.float64), own, precision)
            triplets.append((others @ inner, singular, right))
        else:
            triplets.append(leading_triplets(_outside(shared, update), own, precision))
        del update
    left, singular, right = _concatenate(triplets)
    kept = singular > rank_tolerance(precision) * (singular.amax() if len(singular) else 0)
    return (left, singular, right) if kept.all() else (left[:, kept], singular[kept], right[kept])


def _outside(shared: Tensor, update: Tensor) -> Tensor:
    """Return (1 − shared sharedᵀ) update in float64."""
    residual = product(shared, -product(shared.T, update, torch.float64), torch.float64)
    _add(residual, update)
    return residual


def _add(total: Tensor, update: Tensor) -> None:
    """Add an update to a float64 sum, by rows: at once, the whole update would be copied to float64."""
    for part, own in zip(total.split(1024), update.split(1024), strict=True):
        part += own


def iso_cts_counts(rank: int, tasks: int) -> tuple[int, int]:
    """Return c, the number of common directions, and q, the number of each task's own, for r = `rank`."""
    own = round((rank - int(0.8 * rank)) / tasks)
    return rank - own * tasks, own


def _iso_cts_basis(updates: Updates, side: int | None = None, precision: torch.dtype | None = None) -> Tensor:
    dtype = updates[0].dtype
    precision = precision or dtype
    columns, singular, _ = _iso_cts_triplets(updates, side, precision)
    rank = int(numerical_rank(singular_values(columns, precision), rank_tolerance(precision)))
    full = rank == len(singular)
    columns = polar(columns, precision=precision) if full else svd(columns, rank, precision=precision)[0]
    return columns.to(dtype)


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
        matrices: which tensors are treated so (kernels as (out, rest)); the others are averaged.

    Raises:
        ValueError: share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")

    def rule(updates: Updates) -> Tensor:
        return sum_of(_star_matrix(update, share) for update in updates).div_(len(updates))

    return merge_each(task_vectors, rule, matrices)


def _star_matrix(update: Tensor, share: float) -> Tensor:
    left, singular, right = svd(update, lambda singular: int((singular.cumsum(0) < share * singular.sum()).sum()) + 1)
    total, kept = singular[singular > 1e-7 * singular[0]].sum(), singular[: left.shape[1]]  # less noise; the first p
    if total <= 1e-12:
        return torch.zeros_like(update)
    return (left * (kept * total / kept.sum())) @ right


def iso_basis(
    task_vectors: Sequence[TaskVector],
    method: str,
    *,
    matrices: Predicate = ISO_MATRICES,
    side: int | None = None,
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return the left basis in which Iso-C or Iso-CTS built each matrix, for `calibrate(..., bases=…)`.

    All singular values of their result are equal, so that the result alone does not determine a basis, and SVC gives a
    different matrix in each. Iso-C's basis is U of Σ τ_i; that of Iso-CTS is polar(Û), or, if Û has no full rank, an
    orthonormal basis of the space that its columns span.

    Args:
        task_vectors: the K task vectors that were merged.
        method: a merger whose record has a `basis`: "iso_c" or "iso_cts".
        matrices: which tensors get a basis, as for the merger.
        side, precision: as for the merger.

    Returns:
        name → (m, r) with orthonormal columns (fewer columns for Iso-CTS without full rank), for 2-D tensors.

    Raises:
        ValueError: unknown method.
    """
    check_choice("method", method, [name for name in MERGERS if merger(name).basis])
    bases = {}
    for name in check(task_vectors):
        first = task_vectors[0][name]
        taken = first.numel() and matrices(name, first)
        del first
        if taken:
            updates = OneTensor(task_vectors, name, partial(as_matrix, name))
            bases[name] = MERGERS[method].basis(updates, side, precision)
    return bases


# The table -----------------------------------------------------------------------------------------------------------

MERGERS: dict[str, Merger] = {
    # norm_matched says what experiment 33 found: "replaces it" for TIES and DARE; the average, Task Arithmetic and the
    # sum, which norm matching makes one, lose 1.2 to 1.8 points by it.
    "weight_average": Merger(weight_average, "weight average", "#56B4E9", by_entry=True, factored=True),
    "task_arithmetic": Merger(
        task_arithmetic, "Task Arithmetic", "#0072B2", by_entry=True, factored=True, published=True
    ),
    "plain_sum": Merger(plain_sum, "sum", "#4D4D4D", by_entry=True, factored=True),
    "ties": Merger(
        ties,
        "TIES",
        "#D55E00",
        by_entry=True,
        by_rows=ByRows(ties_by_rows, elect, elected_together),
        per_task=("keep",),
        norm_matched=True,
        published=True,
    ),
    "dare": Merger(
        dare,
        "DARE",
        "#CC79A7",
        by_entry=True,
        by_rows=ByRows(dare_by_rows),
        per_task=("drop",),
        norm_matched=True,
        published=True,
    ),
    "tsv_m": Merger(tsv_m, "TSV-M", "#009E73", factored=True, alpha=1.0, published=True),
    "iso_c": Merger(iso_c, "Iso-C", "#E69F00", factored=True, basis=_basis_of_sum, published=True),
    "iso_cts": Merger(iso_cts, "Iso-CTS", "#8C6D31", factored=True, basis=_iso_cts_basis, published=True, copies=8),
    "star": Merger(star, "STAR", "#7A5195", factored=True),
    "wudi": Merger(wudi, "WUDI", "#332288", rival=True, alpha=1.0, copies=wudi_copies),
    "wudi_minimum": Merger(
        wudi_minimum, "WUDI, minimum", "#6699CC", factored=True, rival=True, alpha=1.0, copies=wudi_minimum_copies
    ),
    "subspace_boost": Merger(
        subspace_boost, "Subspace Boosting", "#882255", factored=True, basis=_basis_of_sum, rival=True
    ),
    "lines": Merger(lines, "LiNeS", "#44AA99", by_entry=True, factored=True, rival=True),
    "knots": Merger(knots, "KnOTS-TIES", "#999933", rival=True, copies=knots_copies),
}

OFFICIAL = tuple(name for name in MERGERS if not MERGERS[name].rival)  # the mergers of the official repository
RIVALS = tuple(name for name in MERGERS if MERGERS[name].rival)  # the others
PUBLISHED = tuple(name for name in MERGERS if MERGERS[name].published)  # those of the paper's main table


def check_methods(names: Sequence[str]) -> None:
    """Raise a ValueError that names the nearest merger, unless every name is one."""
    for name in names:
        check_choice("merger", name, MERGERS)


def merge(method: str, task_vectors: Sequence[TaskVector], seed: int = 0) -> dict[str, Tensor]:
    """Return the merged task vector of a merger with its default options.

    Args:
        method: name of the merger.
        task_vectors: the K task vectors.
        seed: for the mergers that draw masks (DARE).

    Raises:
        ValueError: there is no such merger; the message names the nearest one.
    """
    own = merger(method)
    return own(task_vectors, **own.known(seed=seed))


def merger(name: str) -> Merger:
    """Return the record of the merger of this name; a plain function in the table gets a record of defaults.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    check_choice("merger", name, MERGERS)
    own = MERGERS[name]
    return own if isinstance(own, Merger) else Merger(own, name)
