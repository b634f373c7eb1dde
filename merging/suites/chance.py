"""What chance alone does to SVC's coefficients: the correction that `calibrate(…, chance=…)` takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merging import mergers
from merging.calibration import SVC_MATRICES, diagnose
from merging.task_vectors import Predicate, TaskVector
from merging.unrelated import unrelated


def chance_coefficients(
    method: str, task_vectors: Sequence[TaskVector], seed: int = 0, *, matrices: Predicate = SVC_MATRICES
) -> dict[str, Tensor]:
    """Return by how much chance alone raises the coefficients s, for `calibrate(…, chance=…)`.

    The merger is applied to unrelated updates of the same spectra. In a direction r of theirs, the mean of s_ir over
    the tasks exceeds their scale in the merged update, mean_i <ΔW, τ_i> / ‖τ_i‖² (1 for a plain sum), by what
    overlaps by chance add: this is what is returned, largest σ first.

    Args:
        method: a merger.
        task_vectors: the K task vectors.
        seed: of the directions, and of DARE's masks.
        matrices: which tensors.

    Returns:
        name → (r,).
    """
    scattered = unrelated(task_vectors, seed, matrices=matrices)
    merged = mergers.merge(method, scattered, seed)
    chance = {}
    for name, seen in diagnose(merged, scattered, matrices=matrices).items():
        if seen.treatment == "calibrated":
            shares = [(merged[name] * task[name]).sum() / task[name].square().sum() for task in scattered]
            chance[name] = seen.coefficients.mean(0) - torch.stack(shares).mean()
    return chance
