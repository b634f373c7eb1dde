"""Updates of low rank (LoRA), merged and calibrated in factored form: no m × n matrix is ever formed.

K updates ΔW_i = s_i B_i A_i of ranks r_i, R = Σ r_i, in orthonormal bases of all their columns and of all their rows:

    [B_1 … B_K] = Q_B [T_1 … T_K],  [A_1ᵀ … A_Kᵀ] = Q_A [S_1 … S_K]      two QR decompositions, m × R and n × R
    ΔW_i = Q_B C_i Q_Aᵀ,  C_i = s_i T_i S_iᵀ                             the core of ΔW_i, R × R

The singular values of C_i are those of ΔW_i, and its singular vectors become theirs through Q_B and Q_A. So SVC, and
every merger that knows only sums, norms and singular triplets, do to the cores what they would do to the matrices:
`merging.mergers` and `merging.calibration` are called on cores, and no equation of theirs stands here again. Cost:
O((m + n) R² + K R³) instead of O(K m n min(m, n)). Arithmetic is float64.

The rank rule of `merging.mergers` makes this exact: TSV-M and Iso drop null directions, which alone could lie outside
of the two bases; its tolerance is that of the factors' dtype. TIES, DARE and WUDI look at single entries and have no
factored form: merge `LowRank.dense()` instead.

This is Core Space (Panariello et al., 2025, arXiv 2509.17786), which is lossless for the same reason; its bases are the
singular vectors of the same two stacks, ours their QR factors, and no merger that knows only sums, norms and singular
triplets can tell the two apart. KnOTS (Stoica et al., 2025, arXiv 2410.19735) aligns the columns alone: for these
mergers it is the same again. What KnOTS does with TIES depends on its basis, and is a merger (`merging.rivals.knots`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.spectral import numerical_rank, svd, working
from merging.calibration import SVC, SVC_MATRICES, Diagnosis, calibrate, diagnose, own_bases
from merging.mergers import merger
from merging.task_vectors import Predicate, TaskVector, check_choice

LAYOUTS = ("matrix", "transposed", "embedding")  # weights stored as (out, in), as (in, out), as (vocabulary, width)
ON_WHOLE_TENSORS = ("split_qkv", "vectors", "flatten")  # options of SVC that cores know nothing of


@dataclass(frozen=True)
class LowRank:
    """An update ΔW = scale · b @ a in the orientation of the stored base weight, of rank at most r."""

    b: Tensor  # (m, r)
    a: Tensor  # (r, n)
    scale: float = 1.0
    layout: str = "matrix"  # how that weight is stored, one of LAYOUTS

    def __post_init__(self):
        check_choice("layout", self.layout, LAYOUTS)
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != len(self.a):
            raise ValueError(f"b @ a is no product: shapes {tuple(self.b.shape)} and {tuple(self.a.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the base weight."""
        return len(self.b), self.a.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of b, an upper bound of the rank."""
        return len(self.a)

    def dense(self) -> Tensor:
        """Return ΔW (m, n), in at least float32."""
        return self.scale * (working(self.b) @ working(self.a))


@dataclass(frozen=True)
class JointBasis:
    """Orthonormal bases of the columns and rows of K updates, and what is left of each update in them."""

    left: Tensor  # (m, p) Q_B, p = min(m, R)
    right: Tensor  # (n, q) Q_A, q = min(n, R)
    cores: list[Tensor]  # K × (p, q)

    def outside(self, core: Tensor, like: LowRank) -> LowRank:
        """Return Q_B core Q_Aᵀ, the core taken by the smaller side, in at least float32 and the layout of `like`."""
        b, a = self.left, self.right.T
        b, a = (b @ core, a) if core.shape[0] >= core.shape[1] else (b, core @ a)
        dtype = working(like.b).dtype
        return LowRank(b.to(dtype), a.to(dtype), layout=like.layout)


def joint_basis(updates: Sequence[LowRank], name: str = "weight") -> JointBasis:
    """Return the bases Q_B, Q_A of K updates and their cores C_i (equations above), in float64.

    Args:
        updates: K updates of one shape; their ranks may differ, and be 0.
        name: of the weight, for messages.

    Raises:
        ValueError: there is none, or they differ in shape or layout.
    """
    if not updates:
        raise ValueError("expected at least one low-rank update, got an empty list")
    for index, update in enumerate(updates):
        if (update.shape, update.layout) != (updates[0].shape, updates[0].layout):
            raise ValueError(
                f"{name!r}: shape {updates[0].shape} ({updates[0].layout}) in update 0, "
                f"{update.shape} ({update.layout}) in update {index}"
            )
    ranks = [update.rank for update in updates]
    left, columns = torch.linalg.qr(torch.cat([update.b.double() for update in updates], 1))  # (m, p), (p, R)
    right, rows = torch.linalg.qr(torch.cat([update.a.double() for update in updates]).T)  # (n, q), (q, R)
    pairs = zip(updates, columns.split(ranks, 1), rows.split(ranks, 1), strict=True)
    return JointBasis(left, right, [update.scale * (tall @ wide.T) for update, tall, wide in pairs])


def merge_low_rank(
    updates: Sequence[LowRank],
    method: str,
    svc: SVC | Mapping[str, Any] | None = None,
    *,
    name: str = "weight",
    **options: Any,
) -> LowRank:
    """Return what a merger, and SVC after it, make of K low-rank updates of one weight, again as a low-rank update.

    Equal to `calibrate(merge(dense updates), dense updates)` up to rounding. Iso-C and Iso-CTS are calibrated in the
    basis in which they were built (`iso_basis`): in any other, their SVC is no single matrix.

    Args:
        updates: the K updates, of any ranks.
        method: a merger that has a factored form.
        svc: the options of SVC, or a mapping of them ({} for the defaults) that may also hold `matrices`; None for no
            calibration.
        name: of the weight; some mergers, and SVC, treat embeddings and projections by name.
        **options: of the merger, such as `scale` of task_arithmetic.

    Returns:
        the merged update, of rank at most Σ r_i, in at least float32 (the inputs are left unchanged).

    Raises:
        ValueError: the merger has no factored form, the updates do not fit together, or an option is out of range.
    """
    check_factored(method)
    basis = joint_basis([oriented(update) for update in updates], name)
    cores = [{name: core} for core in basis.cores]
    options |= _cut_out_of(method, updates)
    core = _merged(cores, method, *_options(svc, ON_WHOLE_TENSORS), **options)[name]
    return oriented(basis.outside(core, oriented(updates[0])))


def diagnose_low_rank(
    updates: Sequence[LowRank], method: str, svc: SVC | Mapping[str, Any], *, name: str = "weight", **options: Any
) -> dict[str, Diagnosis]:
    """Return what `diagnose` says of the merged update, over the Σ r_i directions that are not null by construction.

    Args:
        updates, method, svc, name, **options: as for `merge_low_rank`.
    """
    svc, matrices = _options(svc, ON_WHOLE_TENSORS)
    cores = [{name: core} for core in joint_basis([oriented(update) for update in updates], name).cores]
    merged = merger(method)(cores, **_cut_out_of(method, updates), **options)
    return diagnose(merged, cores, svc, matrices=matrices)


def _cut_out_of(method: str, updates: Sequence[LowRank]) -> dict[str, Any]:
    """Return what a merger of cores must know of their matrices: min(m, n), and the dtype for the rank rule."""
    wide = all(factor.dtype == torch.float64 for update in updates for factor in (update.b, update.a))
    return merger(method).known(side=min(updates[0].shape), precision=torch.float64 if wide else torch.float32)


def _options(svc: SVC | Mapping[str, Any] | None, refused: Sequence[str] = ()) -> tuple[SVC | None, Predicate]:
    """Return the options of SVC as a record, and which tensors are calibrated, which a mapping may hold too."""
    if svc is None:
        return None, SVC_MATRICES
    defaults = vars(SVC())
    given = {key: value for key, value in vars(svc).items() if value != defaults[key]} if isinstance(svc, SVC) else svc
    for option in given:
        check_choice("option of SVC", option, [key for key in (*defaults, "matrices") if key not in refused])
    options = dict(given)
    matrices = options.pop("matrices", SVC_MATRICES)
    return SVC(**options), matrices


def oriented(update: LowRank) -> LowRank:
    """Transpose if the weight is stored (in, out), so that the update is that of the layer, (out, in); its own inverse.

    The output space of SVC is that of the layer everywhere in this package. GPT-2's Conv1D stores (in, out), which is
    turned for merging; an embedding (vocabulary, width) is taken as it is stored.
    """
    return replace(update, b=update.a.T, a=update.b.T) if update.layout == "transposed" else update


def check_factored(method: str) -> None:
    """Raise a ValueError unless the merger has a factored form; the message says what to do instead."""
    own = merger(method)
    if not own.factored:
        reason = "looks at single entries, which factors do not have" if own.by_entry else "has no factored form"
        raise ValueError(f"{method} {reason}: merge the folded weights instead")


def merge_and_calibrate(
    task_vectors: Sequence[TaskVector],
    method: str,
    svc: SVC | Mapping[str, Any] | None = None,
    *,
    vectors: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the merged task vector of dense tensors, calibrated if `svc` is not None; Iso in its own basis.

    Args:
        task_vectors: K task vectors.
        method, svc, **options: as for `merge_low_rank`; `seed` for DARE.
        vectors: calibrate 1-D tensors by SVC's rule for vectors.

    Raises:
        ValueError: unknown merger or option, or Iso is to be calibrated in the input space.
    """
    svc, matrices = _options(svc)
    return _merged(task_vectors, method, svc and replace(svc, vectors=svc.vectors or vectors), matrices, **options)


def _merged(
    task_vectors: Sequence[TaskVector], method: str, svc: SVC | None, matrices: Predicate, **options: Any
) -> dict[str, Tensor]:
    own = merger(method)
    if svc and own.basis and svc.space != "output":
        raise ValueError(f"SVC after {method} is defined in the output space only, got space={svc.space!r}")
    merged = own(task_vectors, **options)
    if svc is None:
        return merged
    cut = {key: options[key] for key in ("side", "precision") if key in options}
    bases = own_bases(method, task_vectors, svc, matrices, **cut)
    return calibrate(merged, task_vectors, svc, matrices=matrices, bases=bases)


# Ranks and folding ---------------------------------------------------------------------------------------------------


def truncate(update: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the best approximation of the given rank (Eckart–Young), and the share of ‖ΔW‖_F² that it loses.

        b = U_r √Σ_r,  a = √Σ_r V_rᵀ,  lost = Σ_{j>r} σ_j² / Σ_j σ_j²

    Args:
        update: (m, n), any rank.
        rank: r ≥ 1. Where there are fewer directions, columns of zeros fill up, so that every result has rank r.

    Returns:
        the update with scale 1, and the energy lost, in [0, 1].

    Raises:
        ValueError: rank is below 1.
    """
    basis = joint_basis([update])
    left, singular, right = svd(basis.cores[0])
    dtype = working(update.b).dtype
    return _truncated(basis.left @ left, singular, right @ basis.right.T, rank, update.layout, dtype)


def extract(delta: Tensor, rank: int, layout: str = "matrix") -> tuple[LowRank, float]:
    """Return the rank-r update that is nearest to the dense ΔW of a full expert, and the share of ‖ΔW‖_F² it loses.

    Args:
        delta: (m, n), any floating dtype; this is the one place that decomposes a full matrix.
        rank: as for `truncate`.
        layout: how the weight is stored, one of LAYOUTS; adapters of "transposed" ones and embeddings are written
            differently.

    Raises:
        ValueError: delta is no matrix, or rank is below 1.
    """
    if delta.ndim != 2:
        raise ValueError(f"only a matrix has a low-rank update, got shape {tuple(delta.shape)}")
    return _truncated(*svd(delta, max(1, rank), torch.float64), rank, layout, working(delta).dtype)


def _truncated(
    left: Tensor, singular: Tensor, right: Tensor, rank: int, layout: str, dtype: torch.dtype
) -> tuple[LowRank, float]:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    root = singular[:rank].sqrt()
    b = torch.nn.functional.pad(left[:, :rank] * root, (0, rank - len(root)))  # (m, rank)
    a = torch.nn.functional.pad(root[:, None] * right[:rank], (0, 0, 0, rank - len(root)))  # (rank, n)
    energy = singular.square()
    total = float(energy.sum())
    lost = float(energy[rank:].sum()) / total if total > 0 else 0.0
    return LowRank(b.to(dtype), a.to(dtype), layout=layout), lost


def fold(update: LowRank, weight: Tensor, name: str = "weight") -> Tensor:
    """Return weight + ΔW in the dtype of the weight; the sum is made in at least float32.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(weight.shape) != update.shape:
        hint = " (transposed: see fan_in_fan_out)" if tuple(weight.shape) == update.shape[::-1] else ""
        raise ValueError(f"{name!r}: update shape {update.shape}, base shape {tuple(weight.shape)}{hint}")
    return (working(weight) + update.dense().to(weight.device)).to(weight.dtype)


def zero_like(update: LowRank) -> LowRank:
    """Return the zero update of the same shape, of rank 0: that of a task which left this weight alone."""
    return replace(update, b=update.b[:, :0], a=update.a[:0])


def numerical_rank_of(update: LowRank) -> int:
    """Return the number of singular values above 1e-6 of the largest: with this rank `truncate` loses nothing."""
    core = joint_basis([update]).cores[0]
    return int(numerical_rank(svd(core)[1])) if core.numel() else 0
