"""The slow twins agree with the library, and the floor does the projections that it claims to."""

import pytest
import torch

from merging import MERGERS, calibrate, plain_sum, task_arithmetic, ties
from merging.lowrank import LowRank, merge_low_rank
from merging.suites import ablations, reference
from merging.suites.reference import (
    calibrate_by_svd,
    calibration_floor,
    factored_errors,
    left_singular_vectors,
    task_arithmetic_by_entry,
    ties_by_entry,
)


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


def bfloat16_models():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 40, generator=generator)
    experts = [base + 0.1 * torch.randn(300, 40, generator=generator) for _ in range(3)]
    return base.bfloat16(), [expert.bfloat16() for expert in experts]


def test_the_twins_by_entry_are_the_mergers_in_float64():
    base, experts = bfloat16_models()
    updates = [{"weight": expert.double() - base.double()} for expert in experts]
    for twin, merger in ((task_arithmetic_by_entry, task_arithmetic), (ties_by_entry, ties)):
        found, decided = twin(base, experts, 0.3)
        expected = base.double() + merger(updates, scale=0.3)["weight"]
        assert found.dtype == torch.float64 and decided.float().mean() > 0.9
        assert (found - expected)[decided].abs().max() < 1e-14


def test_ties_is_undecided_at_its_thresholds_and_where_survivors_cancel():
    base = torch.zeros(5)
    experts = [torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([1.0, 2, 3, 4, -5])]
    merged, decided = ties_by_entry(base, experts, 1.0, keep=0.4)  # threshold 3: the third smallest of five
    assert decided.tolist() == [True, True, False, True, False]
    assert merged[decided].tolist() == [0, 0, 4]


def low_rank_updates(layout="matrix"):
    generator = torch.Generator().manual_seed(0)
    shapes = {"q.weight": (20, 14), "v.weight": (9, 30)}

    def draw(rows, columns):
        return torch.randn(rows, columns, generator=generator)

    return [{name: LowRank(draw(m, 3), draw(3, n), 0.5, layout) for name, (m, n) in shapes.items()} for _ in range(3)]


@pytest.mark.parametrize("method", [name for name, own in MERGERS.items() if own.factored])
@pytest.mark.parametrize("svc", [None, {"alpha": 1 / 3}], ids=str)
@pytest.mark.parametrize("layout", ["matrix", "transposed"])
def test_factored_errors_are_those_of_rounding(method, svc, layout):
    errors = factored_errors(low_rank_updates(layout), method, svc)
    assert errors.keys() == {"q.weight", "v.weight"}
    assert all(0 < factored < 1e-6 and 0 < dense < 1e-5 for factored, dense in errors.values())


def test_factored_errors_are_relative_and_zero_updates_have_none():
    updates = low_rank_updates()
    true = {
        name: 0.3 * sum(own[name].scale * own[name].b.double() @ own[name].a.double() for own in updates)
        for name in updates[0]
    }
    for name, (factored, dense) in factored_errors(updates, "task_arithmetic").items():
        found = merge_low_rank([adapter[name] for adapter in updates], "task_arithmetic", name=name).dense()
        assert factored == pytest.approx(float((found - true[name]).norm() / true[name].norm()), rel=1e-3)
        found = task_arithmetic([{"": adapter[name].dense()} for adapter in updates])[""]
        assert dense == pytest.approx(float((found - true[name]).norm() / true[name].norm()), rel=1e-3)
    nothing = [{"q.weight": LowRank(torch.zeros(5, 2), torch.ones(2, 4))}] * 2
    assert factored_errors(nothing, "plain_sum", {"alpha": 0.5}) == {"q.weight": (0, 0)}


def test_the_relative_distance_is_that_of_all_matrices_together():
    exact = {"a.weight": torch.eye(3), "b.weight": 2 * torch.ones(2, 4), "bias": torch.ones(3)}
    update = {"a.weight": torch.eye(3) + 0.1, "b.weight": 2 * torch.ones(2, 4) - 0.3, "bias": torch.zeros(3)}
    away, size = (
        torch.cat([(x[name] - y.get(name, 0)).flatten() for name in ("a.weight", "b.weight")]).norm()
        for x, y in ((update, exact), (exact, {}))
    )
    assert reference.relative_distance(update, exact) == pytest.approx(float(away / size), rel=1e-6)


def test_noise_is_as_large_as_it_is_said_to_be_and_scales_are_separate():
    update = {"a.weight": torch.full((200, 300), 3.0), "bias": torch.zeros(4)}
    noisy = ablations.perturbed(update, 0.01, seed=1)
    assert reference.relative_distance(noisy, update) == pytest.approx(0.01, rel=0.02) and noisy["bias"].eq(0).all()
    scaled = ablations.scaled_separately({"a.weight": torch.ones(2, 3), "bias": torch.ones(4)}, 2.0, 0.5)
    assert scaled["a.weight"].eq(2).all() and scaled["bias"].eq(0.5).all()
