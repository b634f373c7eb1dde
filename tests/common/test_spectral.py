"""Spectra against torch's own SVD in float64, and against what theory says of matrices whose answer is known."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import spectral


def low_rank(m, n, rank, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return (left @ torch.randn(rank, n, generator=generator, dtype=torch.float64)).to(dtype)


def orthonormal(m, k, seed=0):
    return torch.linalg.qr(low_rank(m, k, k, seed)).Q


def close(actual, expected, tolerance=1e-6):
    assert actual.shape == expected.shape
    scale = max(expected.double().abs().max().item(), 1e-30)
    assert (actual.double() - expected.double()).abs().max().item() <= tolerance * scale


matrices = st.builds(
    lambda m, n, rank, seed, dtype: low_rank(m, n, min(rank, m, n), seed, dtype),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(0, 12),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(matrices)
def test_factors_multiply_to_the_matrix_and_are_orthogonal(matrix):
    left, right = spectral.spectral_factors(matrix)
    rank = min(matrix.shape)
    assert left.shape == (len(matrix), rank) and right.shape == (rank, matrix.shape[1])
    assert left.dtype == torch.promote_types(matrix.dtype, torch.float32)
    assert torch.allclose((left @ right).double(), matrix.double(), atol=1e-4)
    for inner in (left.T @ left, right @ right.T):
        assert (inner - inner.diag().diag()).abs().max() <= 1e-5 * (1 + inner.diag().max())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(matrices)
def test_svd_is_an_svd_of_any_rank(matrix):
    left, singular, right = spectral.svd(matrix.double())
    reference = torch.linalg.svdvals(matrix.double())
    scale = 1 + reference.max()
    assert (left * singular @ right - matrix).abs().max() <= 1e-7 * scale
    assert (singular - reference).abs().max() <= 1e-7 * scale
    assert (singular[:-1] >= singular[1:]).all()
    identity = torch.eye(min(matrix.shape), dtype=torch.float64)
    assert torch.allclose(left.T @ left, identity, atol=1e-5)
    assert torch.allclose(right @ right.T, identity, atol=1e-5)
    assert all(part.dtype == matrix.dtype for part in spectral.svd(matrix))


def test_spectra_are_batched():
    batch = torch.stack([low_rank(7, 5, rank, seed=rank) for rank in (5, 3, 0)])
    left, singular, right = spectral.svd(batch)
    close(left * singular.unsqueeze(-2) @ right, batch)
    close(spectral.singular_values(batch), torch.linalg.svdvals(batch), 1e-7)
    close(spectral.polar(batch)[1], spectral.polar(batch[1]))
    assert spectral.numerical_rank(singular).tolist() == [5, 3, 0]


def test_singular_values_survive_a_wide_spectrum_in_float32():
    spectrum = torch.logspace(0, -5, 16, dtype=torch.float64)
    matrix = (orthonormal(40, 16, 1) * spectrum @ orthonormal(24, 16, 2).T).float()
    found = spectral.singular_values(matrix)[:16].double()
    assert (found / torch.linalg.svdvals(matrix.double())[:16] - 1).abs().max() < 1e-3


def test_polar_drops_the_null_directions():
    left, right = orthonormal(9, 3, 1), orthonormal(6, 3, 2)
    matrix = left * torch.tensor([5.0, 2.0, 1e-8], dtype=torch.float64) @ right.T
    close(spectral.polar(matrix), left[:, :2] @ right[:, :2].T)
    close(spectral.polar(matrix.float()), left[:, :2] @ right[:, :2].T, 1e-5)
    assert not spectral.polar(torch.zeros(4, 3)).any()


def test_a_true_svd_resolves_what_float64_holds():
    left, right = orthonormal(9, 3, 1), orthonormal(6, 3, 2)
    spectrum = torch.tensor([5.0, 2.0, 1e-8], dtype=torch.float64)
    for matrix in (left * spectrum @ right.T, right * spectrum @ left.T):
        found, singular, _ = spectral.svd(matrix, 3, precision=torch.float64)
        assert found.shape == (len(matrix), 3) and (singular[:3] / spectrum - 1).abs().max() < 1e-6
        assert (spectral.singular_values(matrix, torch.float64)[:3] / spectrum - 1).abs().max() < 1e-6
    close(spectral.polar(left * spectrum @ right.T, precision=torch.float64), left @ right.T)
    assert spectral.polar((left * spectrum @ right.T).float(), precision=torch.float64).dtype == torch.float32


def test_ranks_of_known_spectra():
    spectra = torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0], [0, 0, 0, 0], [2, 1, 1, 0]])
    assert spectral.numerical_rank(spectra).tolist() == [4, 1, 0, 3]
    close(spectral.effective_rank(spectra), torch.tensor([4, 1, 0, math.exp(1.5 * math.log(2))]))
    close(spectral.stable_rank(spectra), torch.tensor([4, 1, 0, 1.5]))
    close(spectral.energy_shares(spectra)[3], torch.tensor([4, 5, 6, 6]) / 6)
    assert not spectral.energy_shares(spectra)[2].any()


def test_principal_angles_of_rotated_planes_down_to_tiny_angles():
    angles = torch.tensor([1e-10, 0.3, 1.2], dtype=torch.float64)
    first = torch.eye(6, 3, dtype=torch.float64)
    second = torch.cat([angles.cos().diag(), angles.sin().diag()])
    close(spectral.principal_angles(first, second), angles, 1e-12)
    assert abs(spectral.principal_angles(first, second)[0] / 1e-10 - 1) < 1e-3
    assert spectral.principal_angles(first, second[:, :2]).shape == (2,)
    close(spectral.principal_angles(second[:, 1:], first), spectral.principal_angles(first, second[:, 1:]), 1e-12)


def test_overlap_is_the_mean_squared_cosine_and_k_over_m_by_chance():
    bases = torch.stack([orthonormal(30, 6, seed) for seed in range(20)])
    overlap = spectral.subspace_overlap(bases)
    close(overlap.diag(), torch.ones(20), 1e-6)
    close(overlap[2, 5], spectral.principal_angles(bases[2], bases[5]).cos().square().mean(), 1e-6)
    assert abs(overlap[~torch.eye(20, dtype=torch.bool)].mean() - 6 / 30) < 0.02


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_projection_coefficients_against_loops_for_columns_of_any_length(shape, dtype, tolerance):
    updates = [low_rank(*shape, 5, seed) for seed in range(3)]
    left, singular, right = torch.linalg.svd(sum(updates), full_matrices=False)
    expected = torch.zeros(3, 5 if 5 in shape else 6, dtype=torch.float64)
    energies = expected.clone()
    for i, update in enumerate(updates):
        for r in range(len(singular)):
            own, merged = left[:, r] @ update, left[:, r] @ sum(updates)
            expected[i, r] = merged @ own / max(float(own @ own), 1e-12)
            energies[i, r] = own @ own
    length = torch.logspace(-4, 4, len(singular), dtype=torch.float64)
    scaled = (left * length).to(dtype), (right * (singular / length)[:, None]).to(dtype)
    coefficients, energy = spectral.projection_coefficients(*scaled, iter(update.to(dtype) for update in updates))
    close(coefficients, expected, tolerance)
    close(energy, energies, tolerance)


def test_projection_floor_counts_the_unit_direction_and_null_columns_give_zeros():
    left = torch.tensor([[1e3, 0.0], [0.0, 0.0]], dtype=torch.float64)
    right = torch.tensor([[1e-3, 0.0], [0.0, 0.0]], dtype=torch.float64)  # the matrix is diag(1, 0)
    update = torch.diag(torch.tensor([1e-7, 1.0], dtype=torch.float64))
    coefficients, energy = spectral.projection_coefficients(left, right, [update, torch.zeros(2, 2)])
    close(coefficients, torch.tensor([[1e-7 / 1e-12, 0], [0, 0]]), 1e-9)
    close(energy, torch.tensor([[1e-14, 0], [0, 0]], dtype=torch.float64), 1e-9)


def test_inflation_of_identical_and_of_orthogonal_updates():
    update = low_rank(8, 5, 5)
    close(spectral.inflation(4 * update, [update] * 4), torch.full((5,), 4.0), 1e-6)
    corners = [torch.zeros(3, 3).index_put((torch.tensor(i), torch.tensor(i)), torch.tensor(1.0)) for i in range(3)]
    inflated = spectral.inflation(sum(corners), corners)
    assert inflated[0] == 1 and inflated.isfinite().all() and inflated[2] > 1e5
    assert not spectral.inflation(torch.zeros(3, 2), [torch.zeros(3, 2)]).any()


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 3.0])
def test_marchenko_pastur_describes_noise_and_its_fit_finds_the_variance(ratio):
    n, variance = 500, 0.7
    p = round(ratio * n)
    noise = variance**0.5 * torch.randn(p, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(noise @ noise.T / n)
    low, high = spectral.marchenko_pastur_edges(ratio, variance)
    positive = eigenvalues[eigenvalues > 1e-9]
    assert len(positive) == min(p, n)
    assert positive.min() > low - 0.1 * variance and positive.max() < high * 1.1

    grid = torch.linspace(max(low, 1e-7), high, 400001, dtype=torch.float64)
    density = spectral.marchenko_pastur_density(grid, ratio, variance)
    assert abs(torch.trapezoid(density, grid) - min(1, 1 / ratio)) < 5e-3
    assert abs(torch.trapezoid(density * grid, grid) - variance) < 5e-3  # the law's mean is the variance
    assert not spectral.marchenko_pastur_density(torch.tensor([low - 0.01, high + 0.01]), ratio, variance).any()
    middle = (low + high) / 2
    share = torch.trapezoid(density[grid <= middle], grid[grid <= middle]) * max(1, ratio)
    assert abs((positive <= middle).double().mean() - share) < 0.02

    assert abs(spectral.fit_noise_level(eigenvalues, ratio) / variance - 1) < 0.03
    spiked = eigenvalues.clone()
    spiked[-n // 50 :] *= 100  # outliers barely move it
    assert abs(spectral.fit_noise_level(spiked, ratio) / variance - 1) < 0.05
    both = spectral.fit_noise_level(torch.stack([eigenvalues, 2 * eigenvalues]), ratio)
    assert both.shape == (2,) and abs(both[1] / both[0] - 2) < 1e-9


@pytest.mark.parametrize(
    "call",
    [
        lambda: spectral.marchenko_pastur_edges(0.0),
        lambda: spectral.marchenko_pastur_edges(0.5, -1.0),
        lambda: spectral.fit_noise_level(torch.ones(4), float("nan")),
    ],
)
def test_impossible_laws_are_refused(call):
    with pytest.raises(ValueError, match="must be positive and finite, got"):
        call()


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("call", [
    lambda matrix, precision: spectral.svd(matrix, precision=precision),
    lambda matrix, precision: spectral.singular_values(matrix, precision),
    lambda matrix, precision: spectral.polar(matrix, precision=precision),
    lambda matrix, precision: spectral.spectral_factors(matrix),
    lambda matrix, precision: spectral.product(matrix, matrix.mT, torch.float32),
    lambda matrix, precision: spectral.inflation(matrix, [matrix]),
    lambda matrix, precision: spectral.subspace_overlap(matrix[None]),
    lambda matrix, precision: spectral.principal_angles(matrix, matrix),
])  # fmt: skip
def test_complex_matrices_are_refused(call, dtype, precision):
    with pytest.raises(ValueError, match=f"spectra are those of real matrices, got {dtype}"):
        call(torch.randn(5, 3).to(dtype) * 1j, precision)


@pytest.mark.parametrize("function", [spectral.energy_shares, spectral.effective_rank, spectral.stable_rank,
                                      spectral.numerical_rank])  # fmt: skip
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_what_is_relative_does_not_depend_on_the_scale(function, scale):
    spectrum = torch.tensor([[4.0, 2, 1, 0.5, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(function(scale * spectrum), function(spectrum))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_singular_values_of_any_scale(scale):
    matrix = orthonormal(6, 3, 0).float() * torch.tensor([3.0, 2, 1]) @ orthonormal(4, 3, 1).float().T
    expected = torch.tensor([3.0, 2, 1, 0]) * scale
    torch.testing.assert_close(spectral.singular_values(scale * matrix), expected, rtol=1e-5, atol=1e-6 * scale)


# A part of the triplets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(80, 80), (60, 300), (300, 60)])
@pytest.mark.parametrize("rank", [None, 5])  # 5: fewer directions than are asked for
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_triplets_are_those_of_the_whole_decomposition(shape, rank, dtype):
    generator = torch.Generator().manual_seed(0)
    inner = rank or min(shape)
    draw = dict(generator=generator, dtype=torch.float64)
    matrix = (torch.randn(shape[0], inner, **draw) @ torch.randn(inner, shape[1], **draw)).to(dtype)
    left, singular, right = spectral.leading_triplets(matrix, 10)
    whole = spectral.svd(matrix, 10, torch.float64)
    assert left.shape == (shape[0], 10) and right.shape == (10, shape[1])
    assert {part.dtype for part in (left, singular, right)} == {torch.float64}
    noise = 1e-6 * whole[1][0]
    assert torch.allclose(singular, whole[1][:10], atol=noise)
    product = (left * singular) @ right
    assert torch.allclose(product, (whole[0] * whole[1][:10]) @ whole[2], atol=float(noise))
    assert torch.allclose(left.T @ left, torch.eye(10, dtype=torch.float64), atol=1e-9)
    assert spectral.leading_triplets(matrix, 0)[0].shape == (shape[0], 0)


def test_leading_triplets_fall_back_where_lapack_finds_no_part(monkeypatch):
    matrix = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    expected = spectral.leading_triplets(matrix, 4)[1]

    def fails(*arguments, **options):
        raise scipy.linalg.LinAlgError

    monkeypatch.setattr(scipy.linalg, "eigh", fails)
    assert torch.allclose(spectral.leading_triplets(matrix, 4)[1], expected)


def test_svd_forms_as_many_vectors_as_its_spectrum_says():
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    whole = torch.linalg.svdvals(matrix)
    for form in (matrix, matrix.T, matrix.double()):
        left, singular, right = spectral.svd(form, lambda found: int((found > 0.5 * found[0]).sum()))
        count = int((whole > 0.5 * whole[0]).sum())
        assert left.shape[1] == len(right) == count and torch.allclose(singular.float(), whole, atol=1e-5)
