"""Spectra of matrices: bases, ranks, overlap of subspaces, projection coefficients, the Marchenko–Pastur law.

Arrays in, arrays out. Bases and singular values come from the float64 Gram matrix of a matrix's SMALLER side: one
symmetric eigenproblem of size min(m, n) instead of an SVD. Squaring the condition number costs half of float64's
digits, so singular values are resolved down to about 1e-8 of the largest: all that float32, or anything narrower,
can hold. For a matrix that holds more, `svd` and `polar` take precision=torch.float64: a true SVD, resolved to 1e-15.

Shapes: m × n matrices, r = min(m, n), K matrices of one shape; `...` stands for batch dimensions.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import scipy.linalg
import torch
from torch import Tensor

BLOCK = 2**22  # entries of a matrix that are copied to float64 at a time
RANK_TOLERANCE = 1e-6  # singular values below this share of the largest count as rounding noise of float32


def working(matrix: Tensor) -> Tensor:
    """Return the matrix in the dtype that arithmetic is done in: its own, or float32 if its own is narrower.

    Raises:
        ValueError: it is complex.
    """
    _check_real(matrix)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _check_real(matrix: Tensor) -> None:
    """Raise for complex entries, of which arithmetic in float64 would silently keep the real part alone."""
    if matrix.is_complex():
        raise ValueError(f"spectra are those of real matrices, got {matrix.dtype}; pass real and imaginary parts apart")


def rank_tolerance(precision: torch.dtype) -> float:
    """Return the share of σ_1 up to which singular values count as rounding noise, by the precision of the input.

    1e-10 for float64, and 1e-6 for float32 and whatever is narrower: above the rounding of a few operations in that
    dtype, 1e-15 and 1e-7. Rounding to bfloat16 or float16 adds noise to all directions of a matrix, as strong as small
    true directions, so that no threshold tells the two apart: these dtypes are treated as float32.

    Args:
        precision: dtype of what a matrix was computed from; a float64 sum of float32 matrices has float32's noise.
    """
    return 1e-10 if precision == torch.float64 else RANK_TOLERANCE


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Return ranges of columns of a wide matrix, about BLOCK entries each: float64 copies are made of one at a time."""
    small, long = matrix.shape[-2:]
    width = max(256, BLOCK // max(1, small))
    return (slice(start, min(start + width, long)) for start in range(0, long, width))


def _gram(matrix: Tensor) -> Tensor:
    """Return the float64 Gram matrix of the smaller side, (..., r, r): its lower triangle, all that `eigh` reads."""
    _check_real(matrix)
    wide = matrix.mT if _is_tall(matrix) else matrix
    size = wide.shape[-2]
    gram = wide.new_zeros(*wide.shape[:-1], size, dtype=torch.float64)
    for block in _blocks(wide):
        part = wide[..., block].double()
        for start in range(0, size, 256):  # a third cheaper at r = 768
            stop = min(start + 256, size)
            gram[..., start:stop, :stop] += part[..., start:stop, :] @ part[..., :stop, :].mT
    return gram


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right, computed in float64 without a float64 copy of the result or of the longer factor.

    Args:
        left: (m, r).
        right: (r, n).
        dtype: of the result (m, n).
    """
    _check_real(left)
    _check_real(right)
    if len(left) > right.shape[1]:
        return product(right.T, left.T, dtype).T
    left = left.double()
    result = right.new_empty(len(left), right.shape[1], dtype=dtype)
    for block in _blocks(right):
        result[:, block] = left @ right[:, block].double()
    return result


# Bases and spectra ---------------------------------------------------------------------------------------------------


def spectral_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Split a matrix into orthogonal directions, matrix = left @ right, at the price of one eigenproblem.

    If m ≤ n, the columns of `left` are the left singular vectors u_r and the rows of `right` are σ_r v_rᵀ; otherwise
    they are σ_r u_r and v_rᵀ. Either way the columns are orthogonal to each other, the rows are too, and no second
    basis is formed. The order is that of ascending singular values.

    Args:
        matrix: (m, n), any floating dtype.

    Returns:
        left (m, r) and right (r, n), float32 for narrower input and the dtype of the matrix otherwise.
    """
    basis = torch.linalg.eigh(_gram(matrix)).eigenvectors  # (r, r)
    matrix = working(matrix)
    basis = basis.to(matrix.dtype)
    return (matrix @ basis, basis.T) if _is_tall(matrix) else (basis, basis.T @ matrix)


def svd(
    matrix: Tensor,
    count: int | Callable[[Tensor], int] | None = None,
    dtype: torch.dtype | None = None,
    precision: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD, matrix = U @ diag(σ) @ Vh, with U and Vh orthonormal and σ descending.

    Where the matrix has no more directions (σ_r below 1e-7 σ_1) the singular vectors of the longer side are an
    arbitrary completion of the others.

    Args:
        matrix: (..., m, n), any floating dtype; computed in float64.
        count: how many singular vectors are formed, the leading ones (default: all r), or a function of all σ (r,).
        dtype: of the result (default: that of the matrix).
        precision: of what the matrix was computed from; torch.float64 asks for a true SVD, which keeps directions
            apart down to 1e-15 σ_1, at several times the price.

    Returns:
        U (..., m, count), all σ (..., r), Vh (..., count, n).
    """
    _check_real(matrix)
    dtype = dtype or matrix.dtype
    if precision == torch.float64:
        left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        count = count(singular) if callable(count) else count
        return left[..., :count].to(dtype), singular.to(dtype), right[..., :count, :].to(dtype)
    if _is_tall(matrix):
        right, singular, left = svd(matrix.mT, count, dtype, precision)
        return left.mT, singular, right.mT
    eigenvalues, basis = torch.linalg.eigh(_gram(matrix))
    singular = eigenvalues.flip(-1).clamp_min(0).sqrt()  # (..., m), descending
    count = count(singular) if callable(count) else count
    basis, length, right = _triplets(basis.flip(-1)[..., :count], matrix, dtype)
    singular = torch.cat([length, singular[..., length.shape[-1] :]], -1)
    return basis.to(dtype), singular.to(dtype), right


def leading_triplets(
    matrix: Tensor, count: int, precision: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `count` leading singular triplets in float64, cheaper than `svd` where that is a small share of all.

    Args:
        matrix: (m, n), any floating dtype.
        count: how many, at most r.
        precision: of what the matrix was computed from, as for `svd`.

    Returns:
        U (m, count), σ (count,) descending, Vh (count, n).
    """
    if precision == torch.float64 or 4 * count > min(matrix.shape) or not matrix.is_cpu:
        left, singular, right = svd(matrix, count, torch.float64, precision)
        return left, singular[:count], right
    if _is_tall(matrix):
        right, singular, left = leading_triplets(matrix.mT, count)
        return left.mT, singular, right.mT
    return _triplets(_leading_basis(_gram(matrix), count), matrix, torch.float64)


def _leading_basis(gram: Tensor, count: int) -> Tensor:
    """Return the eigenvectors (r, count) of the largest eigenvalues, descending, on a CPU.

    LAPACK's syevr, which finds a part of them for less than the whole; torch offers the whole alone.
    """
    if not count:
        return gram[:, :0]
    wanted = dict(subset_by_index=(len(gram) - count, len(gram) - 1), driver="evr", lower=True, check_finite=False)
    try:
        _, basis = scipy.linalg.eigh(gram.detach().numpy(), **wanted)
    except scipy.linalg.LinAlgError:  # rare: eigenvalues that it cannot tell apart
        return torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :count]
    return torch.from_numpy(basis).flip(-1)


def _triplets(basis: Tensor, matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular triplets of a wide matrix from its left singular vectors (..., m, count), sorted.

    Returns:
        the basis and σ in float64, and Vh in the given dtype; null directions of Vh complete the others.
    """
    right, length = _projected(basis, matrix, dtype)  # rows σ_r v_rᵀ, and their σ_r
    length, order = length.sort(dim=-1, descending=True, stable=True)
    if not (order.diff(dim=-1) > 0).all():  # rounding changed the order of some
        basis = basis.gather(-1, order.unsqueeze(-2).expand_as(basis))
        right = right.gather(-2, order.unsqueeze(-1).expand_as(right))
    present = length > 1e-7 * length[..., :1]  # (..., count)
    right /= length.where(present, 1).unsqueeze(-1).to(dtype)  # dividing by float64 would make it float64
    if not present.all():
        completed = torch.linalg.qr(working(right).mT).Q.mT  # the null rows come last, so their
        right = right.where(present.unsqueeze(-1), completed.to(dtype))  # columns of Q complete the others
    return basis, length, right


def _projected(basis: Tensor, matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return basisᵀ @ matrix (..., r, n) for a wide matrix in the given dtype, and the lengths of its rows, float64."""
    result = matrix.new_empty(*basis.shape[:-2], basis.shape[-1], matrix.shape[-1], dtype=dtype)
    squares = basis.new_zeros(*basis.shape[:-2], basis.shape[-1])
    for block in _blocks(matrix):
        part = basis.mT @ matrix[..., block].double()
        squares += part.square().sum(-1)
        result[..., block] = part
    return result, squares.sqrt()


def singular_values(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return the singular values of (..., m, n) in descending order, (..., r), in the dtype of the matrix.

    `precision` is that of `svd`: torch.float64 asks for those of a true SVD.
    """
    _check_real(matrix)
    if precision == torch.float64:
        return torch.linalg.svdvals(matrix.double()).to(matrix.dtype)
    return torch.linalg.eigvalsh(_gram(matrix)).clamp_min(0).sqrt().flip(-1).to(matrix.dtype)


def polar(matrix: Tensor, tolerance: float | None = None, precision: torch.dtype = torch.float32) -> Tensor:
    """Return the orthogonal factor U Vᵀ of a matrix: the nearest one whose singular values are all 1, or 0.

    Triplets with σ_r ≤ tolerance · σ_1 are left out: their vectors are arbitrary, and with them U Vᵀ would be.

    Args:
        matrix: (..., m, n), any floating dtype.
        tolerance: share of the largest singular value (default: `rank_tolerance` of the precision).
        precision: of what the matrix was computed from, as for `svd`.

    Returns:
        (..., m, n) in the dtype of the matrix.
    """
    if _is_tall(matrix):
        return polar(matrix.mT, tolerance, precision).mT
    tolerance = rank_tolerance(precision) if tolerance is None else tolerance
    left, singular, right = svd(matrix, dtype=torch.float64, precision=precision)
    left = left * (singular > tolerance * singular[..., :1]).unsqueeze(-2)  # (..., m, m)
    for block in _blocks(right):
        right[..., block] = left @ right[..., block]
    return right.to(matrix.dtype)


# Ranks and concentration ---------------------------------------------------------------------------------------------


def numerical_rank(singular_values: Tensor, tolerance: float = RANK_TOLERANCE) -> Tensor:
    """Return how many singular values (..., r) exceed `tolerance` times the largest, as integers (...)."""
    return (singular_values > tolerance * singular_values.amax(-1, keepdim=True)).sum(-1)


def effective_rank(singular_values: Tensor) -> Tensor:
    """Return exp(H(p)), p_r = σ_r / Σσ: between 1 and r, and 0 for a zero matrix (Roy and Vetterli, 2007).

    Args:
        singular_values: (..., r), not negative.

    Returns:
        (...), a number of directions.
    """
    total = singular_values.sum(-1, keepdim=True)
    share = singular_values / total.where(total > 0, 1)
    entropy = -torch.xlogy(share, share).sum(-1)
    return entropy.exp() * (total.squeeze(-1) > 0)


def stable_rank(singular_values: Tensor) -> Tensor:
    """Return ‖A‖_F² / σ_1² from singular values (..., r): between 1 and r, and 0 for a zero matrix, (...)."""
    largest = singular_values.amax(-1, keepdim=True)
    return (singular_values / largest.where(largest > 0, 1)).square().sum(-1)


def energy_shares(singular_values: Tensor) -> Tensor:
    """Return the share of ‖A‖_F² that the j largest of the singular values hold, for every j: (..., r), up to 1."""
    largest = singular_values.amax(-1, keepdim=True)
    scaled = singular_values / largest.where(largest > 0, 1)  # squares of 1e30 are beyond float32
    energy = scaled.square().sort(-1, descending=True).values.cumsum(-1)
    total = energy[..., -1:]
    return energy / total.where(total > 0, 1)


# Subspaces -----------------------------------------------------------------------------------------------------------


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the angles between two column spaces, ascending, in radians.

    The cosines are the singular values of AᵀB, the sines those of (1 − AAᵀ)B. Both are used, because a cosine alone
    cannot tell angles below the root of the machine's precision from zero (Björck and Golub, 1973).

    Args:
        first: (..., m, p), orthonormal columns.
        second: (..., m, q), orthonormal columns.

    Returns:
        (..., min(p, q)) between 0 and π/2.
    """
    if first.shape[-1] < second.shape[-1]:
        first, second = second, first
    first, second = working(first), working(second)
    inner = first.mT @ second  # (..., p, q)
    cosines = torch.linalg.svdvals(inner)  # descending, so angles ascend
    sines = torch.linalg.svdvals(second - first @ inner)[..., : second.shape[-1]].flip(-1)
    return torch.atan2(sines, cosines)


def subspace_overlap(bases: Tensor) -> Tensor:
    """Return ‖U_iᵀ U_j‖_F² / k for every pair: 1 for the same subspace, 0 for orthogonal ones, k/m by chance.

    Args:
        bases: (K, m, k), each with orthonormal columns (zero columns where a subspace has fewer dimensions).

    Returns:
        (K, K), the mean squared cosine of the principal angles.
    """
    count, _, width = bases.shape
    stacked = working(bases).transpose(0, 1).flatten(1)  # (m, K·k)
    inner = (stacked.T @ stacked).unflatten(0, (count, width)).unflatten(2, (count, width))
    return inner.square().sum((1, 3)) / width  # from (K, k, K, k)


def projection_coefficients(left: Tensor, right: Tensor, updates: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return how often a matrix counts the response of each update, direction by direction.

    With the UNIT vector u_r along column r of `left`, b_r = u_rᵀ (left @ right) and a_ir = u_rᵀ τ_i:

        s_ir = <b_r, a_ir> / max(‖a_ir‖², 1e-12)

    1 means that the matrix holds update i as it is, above 1 over-counted, below 0 opposed. The columns may have any
    length, as those of `spectral_factors` do: it is divided out of every result. A column of zeros gives zeros.

    Args:
        left: (m, r), orthogonal columns.
        right: (r, n).
        updates: K matrices (m, n), taken one at a time, so that they may be read as they are needed; each is moved
            to the device and dtype of `left`.

    Returns:
        s (K, r), and the response energies ‖a_ir‖² (K, r).
    """
    squared_length = left.square().sum(0)  # (r,)
    coefficients, energies = [], []
    for update in updates:
        response = left.T @ update.to(left)  # (r, n): length of column r × a_ir
        inner = squared_length * torch.linalg.vecdot(right, response)
        energy = torch.linalg.vector_norm(response, dim=1).square()
        coefficient = inner / energy.maximum(1e-12 * squared_length)
        coefficients.append(coefficient.nan_to_num(0, 0, 0))  # 0/0 where the column is null
        energies.append((energy / squared_length).nan_to_num(0, 0, 0))
        del update  # before the next one is read
    return torch.stack(coefficients), torch.stack(energies)


def inflation(merged: Tensor, updates: Sequence[Tensor]) -> Tensor:
    """Return σ_j(merged) / mean_i σ_j(τ_i): the factor by which merging increases the j-th singular value.

    The denominator is kept above 1e-6 of its largest value, so that a direction for which no update has a
    counterpart (a sum of K matrices of rank 1 has rank K) reads as a huge but finite number. Zero over zero is 0.

    Args:
        merged: (m, n).
        updates: K matrices (m, n).

    Returns:
        (r,), 1 where the merged matrix is as strong as the updates are on average.
    """
    spectra = torch.stack([singular_values(update) for update in updates])  # (K, r)
    return inflation_of_spectra(singular_values(merged), spectra)


def inflation_of_spectra(merged: Tensor, spectra: Tensor) -> Tensor:
    """Return `inflation` from known singular values: those of the merged matrix (r,) and of the updates (K, r)."""
    typical = working(spectra).mean(0)  # (r,)
    typical = typical.clamp_min(RANK_TOLERANCE * typical.amax())
    return torch.where(typical > 0, merged / typical.where(typical > 0, 1), 0)


# The Marchenko–Pastur law --------------------------------------------------------------------------------------------
# Convention: X (p, n) with independent entries of mean 0 and the given variance, ratio = p / n, and the p eigenvalues
# of (1/n) X Xᵀ, as p and n grow together. For ratio > 1 a share 1 − 1/ratio of them is exactly 0; the density below
# is that of the others and integrates to 1/ratio.


def _check_law(ratio: float, variance: float = 1.0) -> None:
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ValueError(f"ratio = p/n must be positive and finite, got {ratio}")
    if not (variance > 0 and math.isfinite(variance)):
        raise ValueError(f"variance must be positive and finite, got {variance}")


def marchenko_pastur_edges(ratio: float, variance: float = 1.0) -> tuple[float, float]:
    """Return the smallest and largest eigenvalue of pure noise, λ± = variance · (1 ± √ratio)², without zeros.

    Args:
        ratio: p/n of the (p, n) noise matrix X.
        variance: of its entries.

    Raises:
        ValueError: ratio or variance is not positive.

    Source: Marchenko and Pastur, 1967.
    """
    _check_law(ratio, variance)
    return variance * (1 - math.sqrt(ratio)) ** 2, variance * (1 + math.sqrt(ratio)) ** 2


def marchenko_pastur_density(eigenvalues: Tensor, ratio: float, variance: float = 1.0) -> Tensor:
    """Return the density √((λ₊ − λ)(λ − λ₋)) / (2π · variance · ratio · λ), and 0 outside the edges.

    It integrates to min(1, 1/ratio): the point mass of 1 − 1/ratio at 0 for ratio > 1 is not part of it.

    Args:
        eigenvalues: (...), where to evaluate it.
        ratio: p/n of the (p, n) noise matrix X, the eigenvalues being those of (1/n) X Xᵀ.
        variance: of the entries of X.

    Returns:
        (...), per unit of eigenvalue.
    """
    low, high = marchenko_pastur_edges(ratio, variance)
    eigenvalues = working(eigenvalues)
    inside = (eigenvalues > low) & (eigenvalues < high)
    safe = eigenvalues.where(inside, (low + high) / 2)
    density = ((high - safe) * (safe - low)).sqrt() / (2 * math.pi * variance * ratio * safe)
    return density.where(inside, 0)


def fit_noise_level(eigenvalues: Tensor, ratio: float) -> Tensor:
    """Return the variance at which the law's median equals that of the eigenvalues: a few outliers hardly change it.

    For ratio > 1 both medians leave out the share 1 − 1/ratio of the eigenvalues, which are zero because p > n.

    Args:
        eigenvalues: (..., p), ALL eigenvalues of (1/n) X Xᵀ, zeros included, in any order.
        ratio: p/n.

    Returns:
        (...), the variance of the entries of X that are noise.

    Raises:
        ValueError: ratio is not positive.
    """
    _check_law(ratio)
    low, high = marchenko_pastur_edges(ratio)
    # λ = centre − half · cos θ takes the square-root edges out of the integral of the density.
    angle = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    grid = (low + high) / 2 - (high - low) / 2 * angle.cos()
    mass = torch.cumulative_trapezoid(marchenko_pastur_density(grid, ratio) * (high - low) / 2 * angle.sin(), angle)
    median = grid[1:][torch.searchsorted(mass, mass[-1:] / 2)]  # (1,)
    count = eigenvalues.shape[-1]
    kept = max(1, round(count / max(1.0, ratio)))
    bulk = eigenvalues.double().sort(-1, descending=True).values[..., :kept]
    return bulk.quantile(0.5, dim=-1) / median.to(bulk.device).squeeze()
