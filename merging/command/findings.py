"""What the report says of one tensor: numbers of each matrix before calibration, and how far and where experts moved.

By chance: what merging does to UNRELATED updates, which have the experts' own singular values in directions drawn at
random (`merging.unrelated`). The overlap to expect of them is known in closed form; their inflation is that of one draw
per matrix, whose directions depend on its name and shape alone, so that every run finds the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.spectral import inflation_of_spectra, numerical_rank
from merging.calibration import OVERLAP_RANK, Diagnosis
from merging.command.changes import IA3, Step, differences, row_ranges
from merging.command.storage import Piece
from merging.diagnosis import overlap_between_tasks, tenths, totals
from merging.interference import matched_scale
from merging.lowrank import joint_basis
from merging.unrelated import overlap_by_chance

QUANTILES = {"γ, 10 % quantile": 0.1, "γ, median": 0.5, "γ, 90 % quantile": 0.9}


def matrix_row(
    piece: Piece, diagnoses: Mapping[str, Diagnosis], side: int, merged_by_chance: Sequence[Tensor]
) -> dict[str, Any]:
    """Return the numbers of one matrix, or of the parts of a fused one: means over the parts.

    Args:
        piece: the matrix.
        diagnoses: of its parts, before calibration.
        side: entries of a direction in the space that SVC compares.
        merged_by_chance: singular values of the merged unrelated updates, one tensor (r,) per part; empty where they
            were not drawn.
    """
    parts = list(diagnoses.values())
    gamma = torch.cat([seen.gamma[: max(1, seen.rank)] for seen in parts])  # directions that are not null
    drawn = [inflation_of_spectra(_padded(found, seen.spectra), seen.spectra) for found, seen in zip(
        merged_by_chance, parts, strict=False)]  # fmt: skip
    return {
        "tensor": piece.name,
        "shape": "×".join(map(str, piece.seen)),
        **totals(parts),
        "smallest γ": float(gamma.min()),
        "largest γ": float(gamma.max()),
        **{name: float(torch.quantile(gamma.float(), quantile)) for name, quantile in QUANTILES.items()},
        "overlap": _mean([float(overlap_between_tasks(seen)) for seen in parts]),
        "overlap, by chance": _mean([_overlap_by_chance(seen, side) for seen in parts]),
        "inflation, largest σ, by chance": _mean([float(each[0]) for each in drawn]),
        "inflation, top tenth, by chance": _mean([float(tenths(each)[0]) for each in drawn]),
    }


def _overlap_by_chance(seen: Diagnosis, side: int) -> float:
    width = min(OVERLAP_RANK, seen.spectra.shape[1])
    return overlap_by_chance(numerical_rank(seen.spectra).tolist(), width, side)


def _padded(singular: Tensor, spectra: Tensor) -> Tensor:
    width = spectra.shape[1]
    return torch.nn.functional.pad(singular.to(spectra), (0, max(0, width - len(singular))))[:width]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@torch.no_grad()
def moves(step: Step, device: torch.device) -> dict[str, Any] | None:
    """Return how far the experts moved one tensor, and in which directions; None where nothing is merged.

    Returns:
        tensor, energy ‖base‖² (of what is merged; for IA³ of the vector of ones), and products (K, K), <τ_i, τ_j>.
    """
    if step.change is None or step.repeats:
        return None
    energy, products = 0.0, torch.zeros(len(step.experts), len(step.experts), dtype=torch.float64)
    if step.change.factored:
        products += _products([core.reshape(-1) for core in joint_basis(step.change.read(device), step.name).cores])  # type: ignore[attr-defined]
    for piece in step.pieces:
        for part in row_ranges(piece):
            start, stop = (piece.start + row * piece.width for row in (part.start, part.stop))
            if isinstance(step.change, IA3):
                energy += stop - start
            else:
                energy += float(step.base.read(start, stop, torch.float32, device).double().square().sum())
            if not step.change.factored:
                products += _products([each.reshape(-1) for each in differences(step, piece, part, device)])
    return {"tensor": step.name, "energy": energy, "products": products.tolist()}


NORMS_AFTER_SVC = (
    "--final-scale auto after SVC: in experiment 33 SVC then cost TIES 7.0 and DARE 5.8 points; leave out --svc, or "
    "give a number tuned on validation data"
)


def advice(moved: Sequence[Mapping[str, Any]]) -> str:
    """Return what the sizes of the updates, and the angles between them, advise a user to do; "" where nothing.

    Only what experiments 32 and 33 support is said: of all that weights alone tell, the norm-matched scale of Task
    Arithmetic as a start. Neither cosines nor spectra foretold losses well enough.

    Args:
        moved: `moves` of all merged tensors.
    """
    products = sum(torch.tensor(each["products"], dtype=torch.float64) for each in moved)
    scale = matched_scale(products) if moved and len(products) > 1 else math.nan
    if math.isnan(scale):
        return ""
    return (
        f"Where to start: multiplied by {scale:.2g}, the sum of these updates has the mean norm of the experts' own. "
        "For Task Arithmetic without SVC this scale needs no data, and is a start. In experiment 32 (glyph tasks in "
        "sets of 2, 4 and 8, experts at about 5 % of the base's norm, one seed) it scored 0.5 points [0.2, 0.7] above "
        "a scale tuned on 64 images a task, and 0.4 below it in the mean of the sets of 8; in experiment 33 (8 and 20 "
        "of these tasks, three bases, and domains apart; three seeds) 2.7 points [1.6, 3.8] below one tuned on 128. It "
        "was not measured for experts far from the base: tune the scale where you have data. For TIES and DARE "
        "`--final-scale auto` matches norms, matrix by matrix."
    )


def _products(updates: Sequence[Tensor]) -> Tensor:
    """Return <τ_i, τ_j> of flat updates, (K, K), float64; converted a pair at a time."""
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for i, first in enumerate(updates):
        for j, second in enumerate(updates[: i + 1]):
            found[i, j] = found[j, i] = float(torch.dot(first.double(), second.double()))
    return found
