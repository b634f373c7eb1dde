"""Mergers of one matrix by the formula as it is written: full SVDs, all tasks in memory, one dtype throughout.

Slow counterparts of `merging.mergers`, with which time and exactness are compared. Each takes the K updates of one
matrix, (K, m, n) with full rank, and computes in their dtype: float32 as the authors' codes do, or float64.
"""

import torch
from torch import Tensor

from merging.mergers import iso_cts_counts


def polar_by_svd(matrix: Tensor) -> Tensor:
    """Return U Vᵀ of a thin SVD."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv_m_by_svd(updates: Tensor) -> Tensor:
    """Return TSV-M: the top ⌊r/K⌋ triplets of every task side by side, both bases whitened."""
    count = min(updates.shape[1:]) // len(updates)
    triplets = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    left = torch.cat([left[:, :count] for left, _, _ in triplets], 1)
    singular = torch.cat([singular[:count] for _, singular, _ in triplets])
    right = torch.cat([right[:count] for _, _, right in triplets])
    return torch.linalg.multi_dot([polar_by_svd(left), singular.diag(), polar_by_svd(right)])


def iso_c_by_svd(updates: Tensor) -> Tensor:
    """Return Iso-C: the sum with all singular values at their mean."""
    left, singular, right = torch.linalg.svd(updates.sum(0), full_matrices=False)
    return singular.mean() * (left @ right)


def iso_cts_by_svd(updates: Tensor) -> Tensor:
    """Return Iso-CTS: common directions of the sum, then the strongest of each task outside of them, flattened."""
    common, own = iso_cts_counts(min(updates.shape[1:]), len(updates))
    left, singular, right = torch.linalg.svd(updates.sum(0), full_matrices=False)
    shared = left[:, :common]
    lefts, singulars, rights = [shared], [singular[:common]], [right[:common]]
    for update in updates:
        left, singular, right = torch.linalg.svd(update - shared @ (shared.T @ update), full_matrices=False)
        lefts.append(left[:, :own])
        singulars.append(singular[:own])
        rights.append(right[:own])
    return torch.cat(singulars).mean() * (polar_by_svd(torch.cat(lefts, 1)) @ polar_by_svd(torch.cat(rights)))


def star_by_svd(updates: Tensor, share: float = 0.4) -> Tensor:
    """Return STAR: each task's spectrum cut where it reaches a share of its sum, rescaled to that sum, and the mean."""
    total = torch.zeros_like(updates[0])
    for update in updates:
        left, singular, right = torch.linalg.svd(update, full_matrices=False)
        kept = int((singular.cumsum(0) < share * singular.sum()).sum()) + 1
        scale = singular.sum() / singular[:kept].sum()
        total += left[:, :kept] @ (scale * singular[:kept]).diag() @ right[:kept]
    return total / len(updates)


def wudi_by_autograd(updates: Tensor, steps: int = 300, rate: float = 1e-5) -> Tensor:
    """Return WUDI: Adam on the loss as it is written, over all tasks stacked, with its gradient by autograd."""
    with torch.enable_grad():
        merged = torch.nn.Parameter(updates.sum(0))
        adam = torch.optim.Adam([merged], lr=rate)
        squared = updates.flatten(1).square().sum(1)[:, None, None]  # (K, 1, 1)
        for _ in range(steps):
            inner = (merged - updates) @ updates.mT  # (K, m, m)
            adam.zero_grad()
            (inner.square() / squared).sum().backward()
            adam.step()
    return merged.detach()
