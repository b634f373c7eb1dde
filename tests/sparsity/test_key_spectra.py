"""Spectra of KKᵀ and second moments of an MLP, against naive computations and samples of the law itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from common import spectral
from sparsity.studies.anisotropy import (
    GRADIENTS,
    INPUTS,
    AnisotropyRun,
    ResidualMLP,
    SecondMoments,
    alpha_over_p,
    bounds,
    distance_to_law,
)
from sparsity.studies.key_spectra import concentration, key_spectrum


def narrowest(values):
    """The narrowest run of bins that holds 80 % of the values above 0.1, by trying all."""
    logs = sorted(math.log10(value) for value in values if value > 0.1)
    low, high = logs[0], logs[-1]
    counts = [0] * 100
    for log in logs:
        counts[min(99, int((log - low) / (high - low) * 100))] += 1
    widths = [
        end - start
        for start in range(100)
        for end in range(start + 1, 101)
        if sum(counts[start:end]) >= 0.8 * len(logs) - 1e-9
    ]
    return 10 ** (min(widths) / 100 * (high - low))


@pytest.mark.parametrize("seed", range(4))
def test_concentration_against_a_search(seed):
    torch.manual_seed(seed)
    values = torch.randn(83).exp() * 0.3
    assert concentration(values) == pytest.approx(narrowest(values.tolist()), rel=1e-6)


def test_concentration_of_equal_and_of_no_eigenvalues():
    assert concentration(torch.full((5,), 2.0)) == 1
    assert math.isnan(concentration(torch.zeros(5)))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_key_spectrum_against_the_gram_matrix(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.2
    gram = torch.linalg.eigvalsh((weight @ weight.T).double()).flip(0).clamp(min=0)
    found = key_spectrum(weight)
    assert found["near-zero rate"] == pytest.approx((gram <= 0.1).float().mean().item())
    assert found["near-zero rate by rank"] == max(0, shape[0] - shape[1]) / shape[0]
    assert [found[f"eigenvalue {index}"] for index in (1, 2, 3)] == pytest.approx(gram[:3].tolist(), rel=1e-5)
    assert found["condition"] == pytest.approx((gram[0] / gram[min(shape) - 1]).item(), rel=1e-4)


def test_noise_has_nothing_above_noise_and_a_signal_has():
    torch.manual_seed(0)
    noise = torch.randn(256, 64) * 0.05
    signal = noise + torch.linalg.qr(torch.randn(256, 5)).Q @ (3 * torch.linalg.qr(torch.randn(64, 5)).Q.T)
    assert key_spectrum(noise)["above noise"] <= 1 / 64
    assert 5 / 64 <= key_spectrum(signal)["above noise"] <= 6 / 64


def test_second_moments_against_gradients_of_single_samples():
    torch.manual_seed(0)
    model = ResidualMLP(6, 5, 2, 3)
    moments = SecondMoments(model.hidden, kept=0.9)
    expected = {(index, kind): torch.zeros(5, 5) for index in range(2) for kind in (INPUTS, GRADIENTS)}
    for _ in range(2):
        x, y = torch.randn(4, 6), torch.randint(3, (4,))
        F.cross_entropy(model(x), y).backward()
        naive = {key: torch.zeros(5, 5) for key in expected}
        for sample in range(4):
            z = model.first(x[sample])
            seen = []
            for linear in model.hidden:
                inner = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
                output = F.linear(inner, linear.weight, linear.bias)
                seen.append((inner, output))
                z = z + output.relu()
            loss = F.cross_entropy(model.last(z)[None], y[sample : sample + 1])
            gradients = torch.autograd.grad(loss, [output for _, output in seen])
            for index, ((inner, _), gradient) in enumerate(zip(seen, gradients, strict=True)):
                naive[index, INPUTS] += torch.outer(inner, inner).detach() / 4
                naive[index, GRADIENTS] += torch.outer(gradient, gradient) / 4
        expected = {key: 0.9 * expected[key] + naive[key] for key in expected}
    with torch.no_grad():
        model(torch.randn(4, 6))  # evaluation does not count
    for key, value in expected.items():
        assert torch.allclose(moments.sums[key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0])
def test_samples_of_the_law_are_near_it_and_alpha_gives_its_ratio(ratio):
    torch.manual_seed(0)
    p = 400
    samples = torch.randn(p, int(p / ratio), dtype=torch.float64)
    moments = samples @ samples.T / samples.shape[1]
    eigenvalues = torch.linalg.eigvalsh(moments).clamp(min=0)
    assert 1 / alpha_over_p(moments) - 1 == pytest.approx(ratio, rel=0.05)
    assert distance_to_law(eigenvalues, ratio, 1.0) < 0.02
    assert distance_to_law(eigenvalues, 2 * ratio, 1.0) > 0.1
    assert distance_to_law(3 * eigenvalues, ratio, 3.0) < 0.02


def test_alpha_and_anisotropy_are_one_quantity():
    torch.manual_seed(0)
    factor = torch.randn(7, 5)
    moments = (factor @ factor.T).double()
    scale = moments.trace() / moments.square().sum()
    anisotropy = math.sqrt(7) * (scale * moments - torch.eye(7)).norm().item() / 7
    alpha = (moments.trace() ** 2 / moments.square().sum()).item() / 7
    assert alpha_over_p(moments) == pytest.approx(alpha)
    assert anisotropy == pytest.approx(math.sqrt(1 - alpha))
    assert alpha_over_p(torch.eye(9)) == pytest.approx(1)


def test_bounds_as_the_authors_write_them():
    alpha, anisotropy, p, c, v = 0.3, 0.8, 64, 0.02, 0.01
    q = math.sqrt(c + (2 * math.sqrt(2) + 3) * c * alpha / v + c * anisotropy / v + c / (v * p))
    real, imaginary = bounds(alpha, anisotropy, p, c)
    assert real == pytest.approx(math.sqrt(2) * alpha * q / (c * math.sqrt(v)))
    assert imaginary == pytest.approx(math.sqrt(2) * alpha**2 * q / (c * v**1.5))


def test_unknown_data_are_refused():
    with pytest.raises(ValueError, match="data must be digits or fashion_mnist, got 'mnist'"):
        AnisotropyRun("mnist", 8, 0.0, 0, 10)


def test_eigenvalues_below_the_law_are_as_far_as_can_be():
    low, _ = spectral.marchenko_pastur_edges(0.25)
    assert distance_to_law(torch.full((10,), low / 2, dtype=torch.float64), 0.25, 1.0) == pytest.approx(1.0)
