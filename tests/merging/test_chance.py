"""Unrelated updates: the same singular values, and no more overlap than chance."""

import pytest
import torch

from merging import calibrate, diagnose, plain_sum
from merging.suites.chance import chance_coefficients
from merging.unrelated import Unrelated, overlap_by_chance, unrelated


def task_vectors() -> list[dict[str, torch.Tensor]]:
    """Six tasks that share their directions, with steep spectra."""
    generator = torch.Generator().manual_seed(3)
    shared = {name: torch.randn(m, n, generator=generator) for name, (m, n) in SHAPES.items()}
    decay = {name: torch.logspace(0, -2, n) for name, (_, n) in SHAPES.items()}
    return [
        {
            name: (shared[name] + 0.1 * torch.randn(shape, generator=generator)) * decay[name]
            for name, shape in SHAPES.items()
        }
        | {"bias": torch.randn(5, generator=generator)}
        for _ in range(6)
    ]


SHAPES = {"wide": (40, 60), "tall": (90, 30)}


def test_singular_values_stay_and_everything_else_too():
    tasks = task_vectors()
    before = [{name: tensor.clone() for name, tensor in task.items()} for task in tasks]
    for own, other in zip(tasks, unrelated(tasks), strict=True):
        assert other["bias"].equal(own["bias"])
        for name in SHAPES:
            assert other[name].dtype == own[name].dtype and other[name].shape == own[name].shape
            torch.testing.assert_close(
                torch.linalg.svdvals(other[name]), torch.linalg.svdvals(own[name]), rtol=1e-4, atol=1e-5
            )
    assert all(task[name].equal(old[name]) for task, old in zip(tasks, before, strict=True) for name in task)


def test_directions_are_unrelated():
    tasks = task_vectors()
    related, chance = (diagnose(plain_sum(updates), updates) for updates in (tasks, unrelated(tasks)))
    pairs = ~torch.eye(6, dtype=torch.bool)
    for name, (m, _) in SHAPES.items():
        assert related[name].overlap[pairs].mean() > 2 * 8 / m
        assert chance[name].overlap[pairs].mean() == pytest.approx(8 / m, rel=0.25)  # k/m
        assert chance[name].inflation[0] < 0.6 * related[name].inflation[0]


def test_both_sides_turn_by_the_seed_alone():
    tasks = task_vectors()
    first, again, other = unrelated(tasks, seed=1), unrelated(tasks, seed=1), unrelated(tasks, seed=2)
    assert first[0]["wide"].equal(again[0]["wide"]) and not first[0]["wide"].allclose(other[0]["wide"])
    for turned in (lambda x: x, lambda x: x.T):  # the leading direction of each side moves
        old, new = (torch.linalg.svd(turned(task[0]["wide"])).U[:, 0] for task in (tasks, first))
        assert (old @ new).abs() < 0.7


def test_a_predicate_chooses_and_bad_input_is_refused():
    tasks = task_vectors()
    assert unrelated(tasks, matrices=lambda name, _: name == "tall")[0]["wide"].equal(tasks[0]["wide"])
    with pytest.raises(ValueError, match="empty list"):
        unrelated([])


def test_a_matrix_is_drawn_from_its_spectrum_the_same_each_time():
    spectrum = torch.logspace(0, -2, 30)
    first, second = (Unrelated("wide", (40, 60), spectrum, task) for task in (0, 1))
    assert first["wide"].equal(first["wide"]) and not first["wide"].allclose(second["wide"])
    assert not first["wide"].allclose(Unrelated("other", (40, 60), spectrum, 0)["other"])
    torch.testing.assert_close(torch.linalg.svdvals(first["wide"])[:30], spectrum, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.factors().dense(), first["wide"])
    with pytest.raises(KeyError):
        first["bias"]


@pytest.mark.parametrize("ranks", [(8, 8), (20, 3, 5), (1, 1)])
def test_overlap_by_chance_is_the_mean_over_many_draws(ranks):
    spectra = torch.stack([(torch.arange(20) < rank) * torch.linspace(2, 1, 20) for rank in ranks])
    found = []
    for index in range(100):
        tasks = [Unrelated(f"w{index}", (30, 20), spectrum, task) for task, spectrum in enumerate(spectra)]
        dense = [{"w": task[f"w{index}"]} for task in tasks]
        overlap = diagnose(plain_sum(dense), dense)["w"].overlap
        found.append(float(overlap[~torch.eye(len(ranks), dtype=torch.bool)].mean()))
    assert sum(found) / 100 == pytest.approx(overlap_by_chance(ranks, 8, 30), rel=0.15)


@pytest.mark.parametrize("method", ["plain_sum", "task_arithmetic", "weight_average"])
def test_what_chance_adds_to_s_is_measured_on_unrelated_updates(method):
    tasks = [{name: task[name] for name in SHAPES} for task in task_vectors()]
    found = chance_coefficients(method, tasks, seed=4)
    scale = {"plain_sum": 1.0, "task_arithmetic": 0.3, "weight_average": 1 / 6}[method]
    scattered = unrelated(tasks, 4)
    for name, (m, n) in SHAPES.items():
        total = scale * sum(task[name].double() for task in scattered)
        left = torch.linalg.svd(total, full_matrices=False)[0]
        naive = torch.zeros(min(m, n), dtype=torch.float64)
        for r in range(min(m, n)):
            for task in scattered:
                own = left[:, r] @ task[name].double()
                naive[r] += float(own @ (left[:, r] @ total)) / float(own @ own) / 6
        shares = [float((total * task[name]).sum() / task[name].double().square().sum()) for task in scattered]
        assert sum(shares) / 6 == pytest.approx(scale, abs=0.15 * scale)  # unrelated: nothing but their scale
        top = slice(0, 5)  # where σ are apart, so that directions are well-defined
        torch.testing.assert_close(found[name].double()[top], (naive - sum(shares) / 6)[top], rtol=1e-2, atol=1e-3)
        assert found[name][0] > 0.2 * scale  # chance inflates, too


def test_corrected_coefficients_are_those_less_chance():
    tasks = [{name: task[name].double() for name in SHAPES} for task in task_vectors()]
    merged = plain_sum(tasks)
    chance = {name: torch.linspace(0.8, -0.1, min(size)).double() for name, size in SHAPES.items()}
    corrected = calibrate(merged, tasks, alpha=0.25, chance=chance)
    for name in SHAPES:
        left, singular, right = torch.linalg.svd(merged[name], full_matrices=False)
        expected = torch.zeros_like(merged[name])
        for r in range(len(singular)):
            divisor = 0.0
            for task in tasks:
                own = left[:, r] @ task[name]
                s = float(own @ (left[:, r] @ merged[name])) / float(own @ own)
                divisor += max(s - float(chance[name][r]), 0.25) / len(tasks)
            expected += singular[r] / divisor * torch.outer(left[:, r], right[r])
        torch.testing.assert_close(corrected[name], expected, rtol=1e-6, atol=1e-8)
    none = {name: torch.zeros(min(size)) for name, size in SHAPES.items()}
    for name, update in calibrate(merged, tasks, chance=none).items():
        assert update.equal(calibrate(merged, tasks)[name])


def test_chance_of_another_shape_or_tensor_is_refused_by_name():
    tasks = task_vectors()
    with pytest.raises(ValueError, match=r"chance\['wide'\]: expected shape \(40,\), got \(3,\)"):
        calibrate(plain_sum(tasks), tasks, chance={"wide": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"no tensor of this name is calibrated: chance\['bias'\]"):
        calibrate(plain_sum(tasks), tasks, chance={"bias": torch.zeros(5)})
