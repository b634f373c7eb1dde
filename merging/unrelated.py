"""The chance level of every comparison of task vectors: the same spectra, in directions that have nothing in common."""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from common.spectral import singular_values
from merging.calibration import SVC_MATRICES
from merging.lowrank import LowRank
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


def _random_frame(size: int, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return (size, count) orthonormal columns, uniformly distributed: QR of Gaussian noise, with R's diagonal > 0."""
    frame, triangle = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=dtype))
    return frame * triangle.diagonal().sign()


# Chance levels from the spectra alone ---------------------------------------------------------------------------------


def overlap_by_chance(ranks: Sequence[int], width: int, side: int) -> float:
    """Return the overlap of two tasks' leading subspaces to expect of random ones, the mean over all pairs of tasks.

    E ‖U_iᵀ U_j‖_F² / k = k_i k_j / (k m) for subspaces of k_i and k_j dimensions that are uniformly distributed in R^m:
    k/m where both have k dimensions. NaN for one task.

    Args:
        ranks: numerical rank of each of the K updates.
        width: k, the number of leading directions that are compared.
        side: m, the number of entries of each direction.
    """
    sizes = [min(rank, width) for rank in ranks]
    pairs = len(sizes) * (len(sizes) - 1)
    return (sum(sizes) ** 2 - sum(size**2 for size in sizes)) / (pairs * width * side) if pairs else math.nan


class Unrelated(Mapping[str, Tensor]):
    """A task vector of one matrix with given singular values, in random directions: drawn whenever it is asked for."""

    def __init__(self, name: str, shape: tuple[int, int], spectrum: Tensor, task: int):
        """Take the name and shape (m, n) of the matrix, its singular values (r,), and which of the K tasks it is.

        Name, shape and task alone decide the directions.
        """
        self._name, self._shape = name, shape
        self._spectrum = spectrum[: max(1, int((spectrum > 0).sum()))].float()
        self._seed = zlib.crc32(f"{name} {shape} {task}".encode())

    def factors(self) -> LowRank:
        """Return it as Q diag(σ) times Pᵀ, without the directions whose σ is 0."""
        generator, singular = torch.Generator().manual_seed(self._seed), self._spectrum
        left, right = (_random_frame(size, len(singular), generator, torch.float32) for size in self._shape)
        return LowRank(left.to(singular.device) * singular, right.T.to(singular.device))

    def __getitem__(self, name: str) -> Tensor:
        if name != self._name:
            raise KeyError(name)
        return self.factors().dense()

    def __iter__(self) -> Iterator[str]:
        return iter((self._name,))

    def __len__(self) -> int:
        return 1
