"""The chance level of every comparison of task vectors: the same spectra, in directions that have nothing in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.spectral import singular_values
from merging.calibration import SVC_MATRICES
from merging.task_vectors import Predicate, TaskVector, check


@torch.no_grad()
def unrelated(
    task_vectors: Sequence[TaskVector], seed: int = 0, *, matrices: Predicate = SVC_MATRICES
) -> list[dict[str, Tensor]]:
    """Return task vectors whose matrices keep their singular values but get directions drawn at random.

    τ_i = U diag(σ) Vᵀ becomes Q diag(σ) Pᵀ with Q and P uniformly distributed (Haar), independent for every task and
    matrix. Merging inflates singular values even so: K unrelated updates overlap by chance. What the real task vectors
    show above these comes from directions that the tasks share.

    Args:
        task_vectors: the K task vectors; they are left unchanged.
        seed: of the directions; they do not depend on the device.
        matrices: which tensors; the others are passed on as they are.

    Returns:
        K task vectors with the same keys, shapes, dtypes and devices.

    Raises:
        TypeError, ValueError: bad task vectors (as for the mergers).
    """
    names = check(task_vectors)
    generator = torch.Generator().manual_seed(seed)
    scattered = [{name: task[name] for name in names} for task in task_vectors]
    for task in scattered:
        for name, update in task.items():
            if update.numel() and matrices(name, update):
                task[name] = _turned(update.flatten(1), generator).reshape(update.shape)
    return scattered


def _turned(update: Tensor, generator: torch.Generator) -> Tensor:
    singular = singular_values(update.double())  # (r,)
    left, right = (_random_frame(size, len(singular), generator).to(singular) for size in update.shape)
    return ((left * singular) @ right.T).to(update.dtype)


def _random_frame(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return (size, count) orthonormal columns, uniformly distributed: QR of Gaussian noise, with R's diagonal > 0."""
    frame, triangle = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))
    return frame * triangle.diagonal().sign()
