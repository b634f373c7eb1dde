"""The slow twins agree with the library, and the floor does the projections that it claims to."""

import pytest
import torch

from merging import calibrate, plain_sum
from merging.reference import calibrate_by_svd, calibration_floor, left_singular_vectors


@pytest.fixture
def updates():
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (12, 30), "tall": (30, 12), "bias": (12,), "embedding": (4, 12)}
    draw = {name: torch.randn(4, *shape, generator=generator) for name, shape in shapes.items()}
    return [{name: noise[i] + noise[3] for name, noise in draw.items()} for i in range(3)]


@pytest.mark.parametrize("alpha", [None, 1.0, 0.05])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_the_twin_is_calibrate(updates, alpha, dtype, tolerance):
    merged = plain_sum(updates)
    found, expected = calibrate_by_svd(merged, updates, alpha, dtype), calibrate(merged, updates, alpha=alpha)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.linalg.norm(found[name] - tensor) <= tolerance * torch.linalg.norm(tensor)
    assert not found["wide"].equal(merged["wide"]) and found["embedding"].equal(merged["embedding"])


def test_the_floor_projects_every_matrix(updates):
    projected = calibration_floor(plain_sum(updates), updates)
    assert projected.keys() == {"wide", "tall"}
    # the columns of U are a basis of all 12 output directions of the wide matrix: nothing of the task is lost
    assert projected["wide"].norm().item() == pytest.approx(updates[-1]["wide"].norm().item(), rel=1e-5)


def test_another_solvers_basis_gives_the_same_calibration(updates):
    merged = plain_sum(updates)
    bases = left_singular_vectors(merged)
    assert bases.keys() == {"wide", "tall"} and bases["tall"].shape == (30, 12)
    found, expected = calibrate(merged, updates, bases=bases), calibrate(merged, updates)
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in merged)
