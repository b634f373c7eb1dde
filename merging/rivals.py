"""Data-free mergers of 2024 to 2026 from outside the official SVC repository, rivals and complements of calibration.

Notation and rank rule are those of `merging.mergers`, in whose table these stand too; each follows its authors' code,
and its docstring says where it does not. Tensors that a merger leaves alone are averaged, as in all of this package.

Core Space (arXiv 2509.17786) is no merger but a space in which LoRA updates are merged: see `merging.lowrank`. So is
the space of KnOTS (arXiv 2410.19735), but for mergers of single entries: with TIES in it, it stands here.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from common.spectral import numerical_rank, rank_tolerance, svd
from merging.layers import depths, layer_of
from merging.record import Updates, merge_each, sum_of
from merging.task_vectors import OneTensor, Predicate, TaskVector, check, check_finite, matrices_without
from merging.ties_dare import ties

LINEAR_LAYERS = matrices_without("text_projection", "embed")


# WUDI ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def wudi(
    task_vectors: Sequence[TaskVector],
    steps: int = 300,
    rate: float = 1e-5,
    *,
    matrices: Predicate = LINEAR_LAYERS,
) -> dict[str, Tensor]:
    """Minimise the interference of the sum with each task, by Adam (WUDI, Cheng et al., 2025, arXiv 2503.08099).

        L(τ) = Σ_i ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖²,  from τ = Σ τ_i, by `steps` steps of Adam at learning rate `rate`

    The rows of τ_i (out, in) stand for the layer's inputs on task i, so that L is the error of its outputs. With
    G = Σ_i τ_iᵀ τ_i / ‖τ_i‖² and E = τ − Σ_j τ_j the gradient is 2 (E G + B), B = Σ_i (Σ_{j≠i} τ_j) τ_iᵀ τ_i / ‖τ_i‖²:
    a step takes one product with an n × n matrix, whatever K, and tasks are read one by one. A single task is kept.

    The rate is absolute, chosen by the authors for CLIP: an entry moves by at most about `steps` · `rate`, 3e-3 by
    default, so that τ stays near Σ τ_i where updates are as large as that. `wudi_minimum` has no such scale.

    Args:
        task_vectors: the K task vectors.
        steps: of Adam, at least 0.
        rate: learning rate, above 0.
        matrices: which tensors are treated so; the others are averaged. (The authors treat the linear layers of CLIP
            and leave all other tensors at the pretrained value.)

    Raises:
        ValueError: an option is out of range.
    """
    if isinstance(steps, bool) or steps != int(steps) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps}")
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"rate must be positive and finite, got {rate}")
    return merge_each(task_vectors, partial(_wudi_matrix, steps=int(steps), rate=rate), matrices)


def _wudi_matrix(updates: Updates, steps: int, rate: float) -> Tensor:
    total = sum_of(updates)  # (m, n)
    rows, columns = total.shape
    stacked = columns > len(updates) * rows
    start, inputs = _interference(updates, total, stacked)
    if not start.any():  # one task, orthogonal tasks, or no update at all
        return total
    away = torch.zeros_like(total)  # E
    adam = torch.optim.Adam([away], lr=rate)
    for _ in range(steps):
        product = (away @ inputs.T) @ inputs if stacked else away @ inputs  # E G
        away.grad = product.add_(start).mul_(2)
        adam.step()
    return total.add_(away)


def _interference(updates: Updates, total: Tensor, stacked: bool) -> tuple[Tensor, Tensor]:
    """Return B (m, n) and G (n, n), or, `stacked`, the rows τ_i / ‖τ_i‖ (K m, n) of which G is the Gram matrix.

    Args:
        updates: K matrices (m, n).
        total: their sum, in the dtype of the result.
        stacked: what is smaller where n > K m.
    """
    start, columns = torch.zeros_like(total), total.shape[1]
    gram, units = total.new_zeros(columns if not stacked else 0, columns), []
    for update in updates:
        update = update.to(total)
        if length := torch.linalg.vector_norm(update):  # else the task left this weight alone
            unit = update / length
            start += torch.linalg.multi_dot([total - update, unit.T, unit])
            if stacked:
                units.append(unit)
            else:
                gram.addmm_(unit.T, unit)
        del update
    return start, torch.cat(units) if units else gram


def wudi_copies(rows: int, columns: int, tasks: int) -> float:
    """Return the memory of `wudi`, in copies of the matrix: Σ τ_i, E, B, gradient, Adam's two moments, and G."""
    return 8 + min(tasks, 2 * columns / max(1, rows))


def wudi_minimum(
    task_vectors: Sequence[TaskVector], *, matrices: Predicate = LINEAR_LAYERS, precision: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return where WUDI's loss is least, in closed form: no steps, no rate, no dependence on scale (not in the paper).

        τ = Σ τ_i − B G⁺, the minimum that is nearest to Σ τ_i, with G and B as for `wudi`

    That is the least-squares map from the rows of all τ_i to what each task makes of its own. Adam would reach it after
    many more steps than 300; in weak directions of G the minimum may be far from where it stops. Sums and products of
    matrices are all it takes, so that it works on LoRA in factored form. By the rank rule eigenvalues of G up to ε² of
    the largest are null; arithmetic is float64, which resolves 1e-13.

    Args:
        task_vectors: the K task vectors.
        matrices: as for `wudi`.
        precision: for the rank rule, as for `tsv_m`.
    """
    return merge_each(task_vectors, partial(_wudi_minimum, precision=precision), matrices)


def _wudi_minimum(updates: Updates, precision: torch.dtype | None) -> Tensor:
    total = sum_of(updates)
    start, gram = _interference(updates, total.double(), stacked=False)
    if not start.any():
        return total
    values, basis = torch.linalg.eigh(gram)
    kept = values > max(rank_tolerance(precision or total.dtype) ** 2, 1e-13) * values[-1]
    basis = basis[:, kept]
    away = ((start @ basis) / values[kept]) @ basis.T
    return (total - away).to(total.dtype)


def wudi_minimum_copies(rows: int, columns: int, tasks: int) -> float:
    """Return the memory of `wudi_minimum`, in copies of the matrix in float32: B and E in float64, G and its basis."""
    return 13 + 8 * columns / max(1, rows)


# Subspace Boosting ---------------------------------------------------------------------------------------------------


def subspace_boost(
    task_vectors: Sequence[TaskVector],
    share: float = 0.01,
    scale: float = 0.3,
    *,
    matrices: Predicate = LINEAR_LAYERS,
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Lift the weak directions of Task Arithmetic (Subspace Boosting, Skorobogat et al., 2025, arXiv 2506.16506).

        τ = scale · U diag(max(σ, σ_k)) Vᵀ,  U diag(σ) Vᵀ = Σ τ_i,  k the smallest with Σ_{j≤k} σ_j ≥ share · Σ σ

    With the authors' share for vision k is 1 for almost every matrix: all singular values become the largest one. By
    the rank rule null directions stay null. As after Iso-C the left basis is that of the sum, which SVC is given.

    Args:
        task_vectors: the K task vectors.
        share: β of the paper, in [0, 1]: 0.01 for vision and 0.02 for language; 1 lifts nothing.
        scale: of the result. The authors choose it on validation data, for every share; 0.3 is Task Arithmetic's, and
            too long after a strong boost: `--final-scale` and norm matching are the ways out.
        matrices: which tensors are treated so; the others are averaged. (The authors scale those like the matrices,
            and lift the three parts of a fused qkv weight one by one.)
        precision: for the rank rule, as for `tsv_m`.

    Raises:
        ValueError: an option is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    check_finite("scale", scale)
    return merge_each(task_vectors, partial(_boosted, share=share, scale=scale, precision=precision), matrices)


def _boosted(updates: Updates, share: float, scale: float, precision: torch.dtype | None) -> Tensor:
    total = sum_of(updates)
    precision = precision or total.dtype
    left, singular, right = svd(total, precision=precision)
    rank = int(numerical_rank(singular, rank_tolerance(precision)))
    if not rank:
        return torch.zeros_like(total)
    singular = singular[:rank]
    cumulative = singular.cumsum(0)
    first = int((cumulative < share * cumulative[-1]).sum())  # k − 1
    lifted = scale * singular.clamp_min(singular[first])
    return (left[:, :rank] * lifted) @ right[:rank]


# LiNeS ---------------------------------------------------------------------------------------------------------------


def lines(task_vectors: Sequence[TaskVector], rise: float = 0.5, *, depth: float | None = None) -> dict[str, Tensor]:
    """Scale Task Arithmetic by depth (LiNeS, Wang et al., 2025, arXiv 2410.17146).

        τ = (1/K + rise · (l − 1) / (L − 1)) Σ τ_i  in layer l of L; tensors outside of the layers like the first one

    This is the authors' rule on the sum of the task vectors. On other mergers it is an option of single tensors:
    `--set '*:final_scale=[A, B]'`.

    Args:
        task_vectors: the K task vectors; layers are read from the names of their tensors (`merging.layers`).
        rise: β of the paper. The authors choose it on validation data, from 0.1 to 1; 0.5 is the middle.
        depth: (l − 1) / (L − 1) of all these tensors, where they are only a part of a model.

    Raises:
        ValueError: rise is not finite, or there is only one tensor, which does not tell how many layers there are.
    """
    check_finite("rise", rise)
    names = check(task_vectors) if depth is None else []
    if len(names) == 1 and layer_of(names[0]):
        raise ValueError(f"{names[0]!r} alone does not tell how many layers there are: give its depth, from 0 to 1")
    layers = depths(names)

    def rule(updates: OneTensor) -> Tensor:
        return sum_of(updates).mul_(1 / len(updates) + rise * layers.get(updates.name, depth))

    return merge_each(task_vectors, rule)


# KnOTS ---------------------------------------------------------------------------------------------------------------


def knots(
    task_vectors: Sequence[TaskVector],
    keep: float = 0.2,
    scale: float = 1.0,
    *,
    matrices: Predicate = LINEAR_LAYERS,
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Apply TIES in directions that all tasks share (KnOTS-TIES, Stoica et al., 2025, arXiv 2410.19735).

        [τ_1 … τ_K] = U Σ [V_1ᵀ … V_Kᵀ],  τ = scale · U · TIES(Σ V_1ᵀ, …, Σ V_Kᵀ),  Σ V_iᵀ = Uᵀ τ_i

    U is the eigenbasis of Σ_i τ_i τ_iᵀ, so that the m × K n matrix is never formed; by the rank rule eigenvalues up to
    ε² of the largest are null. What is trimmed and elected are entries of the tasks' responses in these directions.
    The columns keep their own basis, so that there is no factored form on cores: LoRA is merged as matrices.

    Args:
        task_vectors: the K task vectors.
        keep: share of the entries of each response that survives trimming, in (0, 1]. The authors take one threshold of
            a task for all matrices together, here each has its own, as `ties` by default.
        scale: of the result. The authors choose it on validation data.
        matrices: which tensors are treated so; the others are averaged. (The authors treat LoRA's matrices alone.)
        precision: for the rank rule, as for `tsv_m`.

    Raises:
        ValueError: an option is out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    check_finite("scale", scale)
    return merge_each(task_vectors, partial(_knots_matrix, keep=keep, scale=scale, precision=precision), matrices)


def _knots_matrix(updates: Updates, keep: float, scale: float, precision: torch.dtype | None) -> Tensor:
    like = updates[0]
    gram = torch.zeros(len(like), len(like), dtype=torch.float64, device=like.device)
    for update in updates:
        gram.addmm_(update.double(), update.double().T)
    values, basis = torch.linalg.eigh(gram)
    if not values[-1] > 0:
        return torch.zeros_like(like)
    kept = values > max(rank_tolerance(precision or like.dtype) ** 2, 1e-13) * values[-1]
    basis = basis[:, kept].to(like.dtype)  # (m, c)
    responses = [{"": basis.T @ update} for update in updates]
    return basis @ ties(responses, keep)[""].mul_(scale)


def knots_copies(rows: int, columns: int, tasks: int) -> float:
    """Return the memory of `knots`, in copies of the matrix, measured: 4 K of them are TIES', and U is m × m."""
    return 5 + 4 * tasks + 5.3 * rows / max(1, columns)
