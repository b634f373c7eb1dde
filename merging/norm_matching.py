"""Norm matching: a merged update rescaled to the size of the experts' own updates, without data and without an SVD.

The rival that SVC has to beat where its effect could be one of scale alone. For a merged update τ and the K experts'
updates τ_i of the same tensor, with ‖·‖ the Frobenius norm:

    τ̃ = c τ,  c = (1/K) Σ_i ‖τ_i‖ / ‖τ‖            one number for each tensor, or for the whole update

Not in the paper (arXiv 2602.05536), which compares SVC with no scale of its own. Any positive scale of τ drops out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from merging.lowrank import LowRank
from merging.task_vectors import TaskVector, check


@torch.no_grad()
def norm_match(update: TaskVector, task_vectors: Sequence[TaskVector], *, whole: bool = False) -> dict[str, Tensor]:
    """Return `update` rescaled to the mean norm of the experts' updates; the inputs are left unchanged.

    Args:
        update: the merged task vector, calibrated or not.
        task_vectors: the K original task vectors, with the same floating-point keys.
        whole: match the norm of the whole update by one number, in place of one number for each tensor.

    Returns:
        name → rescaled update, in the dtype of `update`. An update of zero stays zero. Tensors that are not
        floating-point are left out.

    Raises:
        TypeError, ValueError: bad task vectors (as for the mergers).
    """
    names = check(task_vectors, update)
    merged = {name: frobenius_norm(update[name]) for name in names}
    own = {name: [frobenius_norm(task[name]) for task in task_vectors] for name in names}
    if whole:
        factors = dict.fromkeys(names, norm_factor(math.hypot(*merged.values()), map(math.hypot, *own.values())))
    else:
        factors = {name: norm_factor(merged[name], own[name]) for name in names}
    return {name: factors[name] * update[name] for name in names}


def norm_match_low_rank(update: LowRank, updates: Sequence[LowRank]) -> LowRank:
    """Return a merged low-rank update of one weight, rescaled to the mean norm of the experts' low-rank updates.

    Equal to `norm_match` of the matrices up to rounding; no m × n matrix is formed.

    Args:
        update: what `merge_low_rank` returned.
        updates: the K updates that were merged.
    """
    return replace(update, scale=update.scale * norm_factor(low_rank_norm(update), map(low_rank_norm, updates)))


def low_rank_norm(update: LowRank) -> float:
    """Return ‖ΔW‖_F of ΔW = scale · b @ a from its factors: ‖R_b R_aᵀ‖_F, with b = Q_b R_b and aᵀ = Q_a R_a."""
    tall, wide = (torch.linalg.qr(factor.double())[1] for factor in (update.b, update.a.T))
    return abs(update.scale) * frobenius_norm(tall @ wide.T)


def norm_factor(merged: float, own: Iterable[float]) -> float:
    """Return c from the norm of a merged update and those of the experts' own; 1 for an update of zero."""
    own = list(own)
    return sum(own) / len(own) / merged if merged > 0 else 1.0


def frobenius_norm(tensor: Tensor) -> float:
    """Return ‖tensor‖ of all its entries, summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
