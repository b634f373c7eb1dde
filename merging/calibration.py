"""Singular value calibration (SVC): scale back the directions that merging has counted more than once.

Source: "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", arXiv 2602.05536. For a matrix ΔW
of the merged update with left singular vectors u_r, and the tasks' own updates τ_i:

    b_r = u_rᵀ ΔW,  a_ir = u_rᵀ τ_i                     merged and own response in output direction r
    s_ir = <b_r, a_ir> / max(‖a_ir‖², 1e-12)            how often ΔW counts task i's response           (eq. 8)
    I_ir = (s_ir − 1)² ‖a_ir‖²                          interference                                    (eq. 7)
    γ_r = K / Σ_i max(s_ir, α)                          calibration factor
    ΔW̃ = U diag(γ) Uᵀ ΔW                                so V is never needed, and U is an eigenbasis of ΔW ΔWᵀ
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.spectral import (
    inflation_of_spectra,
    numerical_rank,
    projection_coefficients,
    spectral_factors,
    subspace_overlap,
    svd,
    working,
)
from merging.mergers import MERGERS, iso_basis, merger
from merging.task_vectors import OneTensor, Predicate, TaskVector, check, check_choice, matrices_without

SVC_MATRICES = matrices_without("text_projection", "embedding")
FUSED_QKV = ("in_proj_weight", "qkv.weight")  # how torch and open_clip, and timm, end the names of (3d, d) weights
OVERLAP_RANK = 8  # leading directions that `Diagnosis.overlap` compares


@dataclass(frozen=True)
class SVC:
    """The options of SVC. The tensors to calibrate, and bases of their own, are chosen by arguments of `calibrate`."""

    alpha: float | None = None
    """Floor of the coefficients, > 0. Default 1/K."""
    space: str = "output"
    """"output" compares u_rᵀ ΔW with u_rᵀ τ_i, "input" ΔW v_r with τ_i v_r (the same on the transposes)."""
    target: int | None = None
    """Index of a task to calibrate for: γ_r = 1 / max(s_tr, α) where s_tr > 0, else 1."""
    rule: str = "current"
    """"current" as above, or "legacy", the authors' code until March 2026: γ_r = 1 / max(mean_i s_ir, α) where all
    s_ir > 0, else 1. It has no influence if there is a target."""
    split_qkv: bool = False
    """Calibrate the query, key and value part of a fused (3d, d) weight each by itself, not as one."""
    vectors: bool = False
    """Calibrate 1-D tensors too (IA³), as a whole: γ = K / Σ_i s_i with s_i = <τ, τ_i> / ‖τ_i‖², and 1 where that sum
    is not positive. Independent of alpha, space, target and rule."""
    flatten: bool = False
    """Offer tensors of more than 2 dimensions to `matrices` as (out, rest); without it they keep the merged value."""

    def check(self, tasks: int) -> None:
        """Raise a ValueError that names the option and what it can be, unless all are in range for K tasks."""
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        check_choice("space", self.space, ("output", "input"))
        check_choice("rule", self.rule, ("current", "legacy"))
        if self.target is not None and self.target not in range(tasks):
            raise ValueError(f"target must be the index of a task, 0 to {tasks - 1}, got {self.target}")

    def treatment(self, name: str, tensor: Tensor, matrices: Predicate = SVC_MATRICES) -> str:
        """Return what becomes of a tensor: "calibrated", "vector rule" or "merged value".

        Raises:
            ValueError: `matrices` selects a tensor that is not a matrix.
        """
        if not tensor.numel():
            return "merged value"
        if tensor.ndim == 1 and self.vectors:
            return "vector rule"
        tensor = tensor.flatten(1) if self.flatten and tensor.ndim > 2 else tensor
        if not matrices(name, tensor):
            return "merged value"
        if tensor.ndim != 2:
            raise ValueError(
                f"{name!r}: `matrices` selects a tensor of shape {tuple(tensor.shape)}, which is no matrix"
                + (" (flatten=True makes it one)" if tensor.ndim > 2 else "")
            )
        return "calibrated"

    def splits(self, name: str) -> bool:
        """Return whether a tensor of this name is calibrated in three parts."""
        return self.split_qkv and name.endswith(FUSED_QKV)


def calibrate(
    merged: TaskVector,
    task_vectors: Sequence[TaskVector],
    svc: SVC | None = None,
    *,
    matrices: Predicate = SVC_MATRICES,
    bases: Mapping[str, Tensor] | None = None,
    chance: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return `merged` with its singular values calibrated (SVC, equations above); the inputs are left unchanged.

    What to know before use:

    - SVC(c · ΔW; α) = SVC(ΔW; α/c) for c > 0: a scale before calibration is only another α. One that should act as a
      scale belongs after it (`apply(pretrained, calibrated, scale)`). Tensors that are not calibrated keep the
      merger's own scale either way.
    - α = 1 only suppresses (γ ≤ 1). A direction of a plain sum to which the other tasks respond with exact zero gets
      γ = K / (1 + (K − 1) α). But where their response is small and not zero, some s_ir is huge and γ near 0: nearly
      private directions are erased (`diagnose` shows max_i s_ir).
    - Iso-C and Iso-CTS make all singular values equal, so that the basis, and with it the result, is arbitrary.
      `bases=iso_basis(task_vectors, "iso_c")` makes it the merger's own.
    - Without full rank nothing is lost: ΔW has no component along its null directions, and their γ changes nothing.

    Args:
        merged: the merged task vector.
        task_vectors: the K ORIGINAL task vectors, not trimmed or masked ones, with the same floating-point keys.
            They are read one tensor at a time, and moved to the device of `merged`.
        svc: the options; default `SVC()`.
        matrices: which tensors are calibrated; the others keep the merged value.
        bases: name → (m, c), orthonormal columns which span those of that matrix (rows for space="input"), to use
            in place of its singular vectors; the parts of a split weight are named "NAME[q]", "[k]" and "[v]".
        chance: name → (r,), by how much chance alone raises s in the r directions, largest σ first; it is subtracted
            from the coefficients of all tasks before α is applied. Not in the paper: updates that share nothing are
            inflated too, and the paper's rule calibrates them as well (merging.unrelated measures it).
        **options: fields of `SVC`, such as alpha=1.0, which take precedence over those of `svc`.

    Returns:
        name → calibrated update, in the dtype of `merged`; tensors that are not floating-point are left out.

    Raises:
        TypeError, ValueError: bad task vectors (as for the mergers), or an option out of range.
    """
    svc = replace(svc or SVC(), **options)
    calibrated = {}
    for name, _, blocks in _walk(merged, task_vectors, svc, matrices, bases, chance):
        parts = [_directions(block, updates, svc).calibrated().to(block.merged.dtype) for block, updates in blocks]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else merged[name].clone()
        calibrated[name] = whole.reshape(merged[name].shape)
    return calibrated


def published_alpha(method: str, tasks: int) -> float:
    """Return the α of the paper's "+SVC" column for K = `tasks`: 1 on TSV-M, 1/K on every other merger."""
    own = merger(method).alpha if method in MERGERS else None
    return 1 / tasks if own is None else own


def own_bases(
    method: str, task_vectors: Sequence[TaskVector], svc: SVC, matrices: Predicate = SVC_MATRICES, **options: Any
) -> dict[str, Tensor] | None:
    """Return the `bases` in which SVC calibrates the result of a merger: the merger's own if it has any, else None.

    There are none in the input space, nor for a weight that is split in three.

    Args:
        method: the merger.
        task_vectors: the K task vectors that were merged.
        svc, matrices: as for `calibrate`.
        **options: `side` and `precision` of `iso_basis`.

    Returns:
        name → (m, r) with orthonormal columns.
    """
    own = merger(method)
    if own.basis is None or svc.space != "output":
        return None

    def is_calibrated(name: str, tensor: Tensor) -> bool:
        whole = svc.treatment(name, tensor, matrices) == "calibrated" and not svc.splits(name)
        return whole and own.takes(name, tensor)

    return iso_basis(task_vectors, method, matrices=is_calibrated, **options) or None


@dataclass(frozen=True)
class Diagnosis:
    """What calibration finds in one tensor and does to it. Directions are sorted by singular value, descending.

    Tensors that keep the merged value have only `treatment`. A calibrated vector has one direction, itself.
    Directions from `rank` on are null: their coefficients are rounding noise, and their γ has no effect.
    """

    treatment: str  # "calibrated", "vector rule" or "merged value"
    singular_values: Tensor | None = None  # (r,) σ of the merged update
    rank: int | None = None  # how many of them are above 1e-6 of the largest
    coefficients: Tensor | None = None  # (K, r) s
    max_coefficient: Tensor | None = None  # (r,) max_i s: far above K where a direction is nearly private
    gamma: Tensor | None = None  # (r,) γ: the calibrated singular value is γ σ
    energy: Tensor | None = None  # (K, r) ‖a‖², the tasks' own response
    interference: Tensor | None = None  # (K, r) (s − 1)² ‖a‖²
    spectra: Tensor | None = None  # (K, r) the tasks' own singular values
    inflation: Tensor | None = None  # (r,) σ over the mean of the tasks' own j-th singular values
    overlap: Tensor | None = None  # (K, K) of the leading min(8, r) directions of each task, see `diagnose`


def diagnose(
    merged: TaskVector,
    task_vectors: Sequence[TaskVector],
    svc: SVC | None = None,
    *,
    matrices: Predicate = SVC_MATRICES,
    bases: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, Diagnosis]:
    """Return for each tensor what `calibrate` computes with the same options; both run the same code.

    `overlap` is ‖U_iᵀ U_j‖_F² / k for the top k = min(8, r) singular directions (in the calibrated space) of tasks
    i and j, k/m by chance; a task of rank below k has rank/k on the diagonal. For vectors it is the squared cosine.

    Args:
        merged: the merged task vector.
        task_vectors: the K original task vectors.
        svc, matrices, bases, **options: as for `calibrate`.

    Returns:
        name → Diagnosis, with one entry each for "NAME[q]", "NAME[k]" and "NAME[v]" of a weight that is split.

    Raises:
        TypeError, ValueError: as `calibrate` does.
    """
    svc = replace(svc or SVC(), **options)
    diagnoses = {}
    for name, treatment, blocks in _walk(merged, task_vectors, svc, matrices, bases):
        if not blocks:
            diagnoses[name] = Diagnosis(treatment)
        for block, updates in blocks:
            diagnoses[block.name] = _diagnosis(treatment, block, updates, svc)
    return diagnoses


# What is calibrated --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """One matrix to calibrate: a tensor, or a third of a fused weight."""

    name: str
    merged: Tensor  # (m, n)
    is_vector: bool
    basis: Tensor | None  # (m, c), in place of its singular vectors
    chance: Tensor | None = None  # (r,), to subtract from s


def _walk(
    merged: TaskVector,
    task_vectors: Sequence[TaskVector],
    svc: SVC,
    matrices: Predicate,
    bases: Mapping[str, Tensor] | None,
    chance: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, str, list[tuple[_Block, Sequence[Tensor]]]]]:
    """Yield (name, treatment, matrices to calibrate with the tasks' updates); all are views of the inputs."""
    names, bases, chance = check(task_vectors, merged), bases or {}, chance or {}
    svc.check(len(task_vectors))
    unused = {f"bases[{name!r}]": name for name in bases} | {f"chance[{name!r}]": name for name in chance}
    for name in names:
        treatment = svc.treatment(name, merged[name], matrices)
        blocks = []
        if treatment != "merged value":
            parts = _parts(name, merged[name], svc)
            blocks = [
                (
                    _Block(part, matrix, treatment == "vector rule", bases.get(part), chance.get(part)),
                    _own(task_vectors, name, part, svc),
                )
                for part, matrix in parts.items()
            ]
            unused = {entry: part for entry, part in unused.items() if part not in parts}
        yield name, treatment, blocks
    if unused:
        raise ValueError(f"no tensor of this name is calibrated: {', '.join(sorted(unused))}")


def _own(task_vectors: Sequence[TaskVector], name: str, part: str, svc: SVC) -> Sequence[Tensor]:
    """Return the tasks' own updates of one matrix."""
    return OneTensor(task_vectors, name, lambda tensor: _parts(name, tensor, svc)[part])


def _parts(name: str, tensor: Tensor, svc: SVC) -> dict[str, Tensor]:
    if tensor.ndim == 1:
        return {name: tensor[None]}  # a vector as (1, n): u = 1, and s is that of the vector rule
    matrix = tensor.flatten(1)
    if not svc.splits(name):
        return {name: matrix}
    if len(matrix) % 3:
        raise ValueError(f"{name!r}: a fused qkv weight of {len(matrix)} rows cannot be split in three")
    return {f"{name}[{part}]": third for part, third in zip("qkv", matrix.chunk(3), strict=True)}


# The computation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Directions:
    """A matrix in its spectral directions, ΔW = left @ right; ΔWᵀ = left @ right if SVC works in the input space."""

    left: Tensor  # (m, r)
    right: Tensor  # (r, n)
    coefficients: Tensor  # (K, r)
    energy: Tensor  # (K, r)
    divisor: Tensor  # (r,) 1 / γ
    transposed: bool

    def calibrated(self) -> Tensor:
        if len(self.left) > self.right.shape[1]:  # scale the smaller factor
            matrix = self.left @ (self.right / self.divisor[:, None])
        else:
            matrix = (self.left / self.divisor) @ self.right
        return matrix.T if self.transposed else matrix


def _directions(block: _Block, updates: Sequence[Tensor], svc: SVC) -> _Directions:
    transposed = svc.space == "input" and not block.is_vector
    matrix = working(block.merged.T if transposed else block.merged)
    if block.basis is not None:
        left, right = _factors_in_basis(block.name, matrix, block.basis)
    else:
        left, right = spectral_factors(matrix)
    oriented = map(torch.t, updates) if transposed else updates  # one task at a time: no (K, m, n)
    coefficients, energy = projection_coefficients(left, right, oriented)
    if block.chance is not None:
        coefficients = coefficients - _in_directions(block, left, right)
    divisor = _vector_divisor(coefficients) if block.is_vector else _divisor(coefficients, svc)
    return _Directions(left, right, coefficients, energy, divisor, transposed)


def _divisor(coefficients: Tensor, svc: SVC) -> Tensor:
    """Return d_r = 1/γ_r from the coefficients s (K, r)."""
    alpha = 1 / len(coefficients) if svc.alpha is None else svc.alpha
    if svc.target is not None:
        own = coefficients[svc.target]
        return own.clamp_min(alpha).where(own > 0, 1)
    if svc.rule == "legacy":
        return coefficients.mean(0).clamp_min(alpha).where((coefficients > 0).all(0), 1)
    return coefficients.clamp_min(alpha).mean(0)


def _in_directions(block: _Block, left: Tensor, right: Tensor) -> Tensor:
    """Return what chance adds to s in each direction (r,) of ΔW = left @ right, given from the largest σ down."""
    singular = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
    if block.chance.shape != singular.shape:
        raise ValueError(
            f"chance[{block.name!r}]: expected shape {tuple(singular.shape)}, got {tuple(block.chance.shape)}"
        )
    return block.chance.to(singular)[singular.argsort(descending=True).argsort()]


def _vector_divisor(coefficients: Tensor) -> Tensor:
    mean = coefficients.mean(0)  # (1,)
    return mean.where(mean > 0, 1)


def _factors_in_basis(name: str, matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of a matrix (m, n) in a given basis (m, c), after checking that they are factors."""
    if basis.ndim != 2 or len(basis) != len(matrix):
        raise ValueError(f"bases[{name!r}]: expected shape ({len(matrix)}, …), got {tuple(basis.shape)}")
    left = basis.to(matrix)
    right = left.T @ matrix
    identity = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    if not torch.allclose(left.T @ left, identity, atol=1e-2):
        raise ValueError(f"bases[{name!r}]: its columns are not orthonormal")
    if torch.linalg.matrix_norm(torch.addmm(matrix, left, right, alpha=-1)) > 1e-2 * torch.linalg.matrix_norm(matrix):
        raise ValueError(f"bases[{name!r}]: its columns do not span those of the merged update")
    return left, right


def _diagnosis(treatment: str, block: _Block, updates: Sequence[Tensor], svc: SVC) -> Diagnosis:
    found = _directions(block, updates, svc)
    singular = torch.linalg.vector_norm(found.left, dim=0) * torch.linalg.vector_norm(found.right, dim=1)
    singular, order = singular.sort(descending=True)
    coefficients, energy = found.coefficients[:, order], found.energy[:, order]
    # A vector is its own right singular direction; its left one is the number 1 for every task.
    turned = found.transposed or block.is_vector
    subspaces = (_leading_directions((update.T if turned else update).to(found.left)) for update in updates)
    leading, spectra = zip(*subspaces, strict=True)
    return Diagnosis(
        treatment=treatment,
        singular_values=singular,
        rank=int(numerical_rank(singular)),
        coefficients=coefficients,
        max_coefficient=coefficients.amax(0),
        gamma=1 / found.divisor[order],
        energy=energy,
        interference=(coefficients - 1).square() * energy,
        spectra=torch.stack(spectra),
        inflation=inflation_of_spectra(singular, torch.stack(spectra)),
        overlap=subspace_overlap(torch.stack(leading)),
    )


def _leading_directions(update: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top left singular vectors (m, k), zero beyond the rank, and all singular values (r,)."""
    left, singular, _ = svd(update)
    width = min(OVERLAP_RANK, len(singular))
    present = torch.arange(width, device=left.device) < numerical_rank(singular)
    return left[:, :width] * present, singular
