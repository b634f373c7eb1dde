"""Summaries of diagnoses count matrices, directions and tasks as they say, and show what they are made to show."""

import pytest
import torch

from merging import calibrate, diagnose, diagnosis, plain_sum

BLOCKS = ("model.blocks.10.mlp.fc.weight", "model.blocks.2.attn.in_proj_weight", "head.weight")


def random_tasks(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (24, 20 + 4 * place) for place, name in enumerate(BLOCKS)} | {"norm": (7,), "embedding": (5, 6)}
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def layers(merged, tasks):
    return list(diagnosis.calibrated_matrices(diagnose(merged, tasks)).values())


def test_only_calibrated_matrices_in_the_order_of_blocks():
    tasks = random_tasks(2)
    found = diagnosis.calibrated_matrices(diagnose(plain_sum(tasks), tasks))
    assert list(found) == ["block 2 in_proj", "block 10 fc", "head"]


def test_names_stay_different_when_a_weight_is_split():
    tasks = random_tasks(2)
    found = diagnosis.calibrated_matrices(diagnose(plain_sum(tasks), tasks, split_qkv=True))
    assert list(found) == ["block 2 in_proj[q]", "block 2 in_proj[k]", "block 2 in_proj[v]", "block 10 fc", "head"]


def test_tenths_are_means_of_almost_equal_groups():
    values = torch.arange(23.0)
    sizes = [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    expected, start = [], 0
    for size in sizes:
        expected.append(sum(range(start, start + size)) / size)
        start += size
    torch.testing.assert_close(diagnosis.tenths(values), torch.tensor(expected))
    energy = diagnosis.energy_by_tenth(torch.tensor([3.0, 1.0] + [0.0] * 18))
    assert energy[0] == 100 and (energy == 100).all()
    assert diagnosis.energy_by_tenth(torch.ones(20)).tolist() == pytest.approx([10.0 * i for i in range(1, 11)])


def test_identical_tasks_are_counted_k_times_and_svc_counts_them_once():
    tasks = random_tasks(1) * 5
    before = diagnosis.totals(layers(plain_sum(tasks), tasks))
    for name in ("inflation, largest σ", "inflation, top tenth", "s, top tenth", "s, lower half"):
        assert before[name] == pytest.approx(5)
    assert before["interference"] == pytest.approx(16)  # (5 − 1)²
    after = diagnosis.totals(layers(calibrate(plain_sum(tasks), tasks), tasks))
    assert after["inflation, top tenth"] == pytest.approx(1) and after["interference"] == pytest.approx(0, abs=1e-12)
    assert all(
        float(diagnosis.overlap_between_tasks(seen)) == pytest.approx(1) for seen in layers(plain_sum(tasks), tasks)
    )


def test_no_update_interferes_by_one():
    tasks = random_tasks(3)
    tiny = {name: 1e-9 * tensor for name, tensor in plain_sum(tasks).items()}
    assert diagnosis.relative_interference(layers(tiny, tasks)) == pytest.approx(1, abs=1e-6)


def test_interference_is_summed_over_tasks_directions_and_matrices():
    tasks = random_tasks(3, seed=4)
    merged = plain_sum(tasks)
    top = bottom = 0.0
    for name in BLOCKS:
        for column in torch.linalg.svd(merged[name], full_matrices=False).U.T:
            for task in tasks:
                own, whole = column @ task[name], column @ merged[name]
                top += float((own @ whole / own.square().sum() - 1) ** 2 * own.square().sum())
                bottom += float(own.square().sum())
    assert diagnosis.relative_interference(layers(merged, tasks)) == pytest.approx(top / bottom, rel=1e-6)


def test_ranks_are_means_over_matrices():
    flat, single = torch.ones(8), torch.tensor([2.0] + [0.0] * 7)
    assert diagnosis.ranks([flat, single]) == pytest.approx({"effective rank, %": (100 + 12.5) / 2, "stable rank": 4.5})


def private_tasks() -> list[dict[str, torch.Tensor]]:
    """Four tasks that share every direction but the last, which is (almost) the first task's own."""
    left, right = (torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0] for _ in range(2))
    shared = torch.linspace(2, 1, 19, dtype=torch.float64)
    sizes = [torch.cat([shared, torch.tensor([own], dtype=torch.float64)]) for own in (50.0, 0.01, 0.01, 0.01)]
    return [{"layer.weight": (left * size) @ right.T} for size in sizes]


def test_a_nearly_private_direction_stands_out_and_is_erased():
    torch.manual_seed(0)
    tasks = private_tasks()
    seen = layers(plain_sum(tasks), tasks)
    facts = diagnosis.privacy(seen)
    assert facts["max s / K, median"] == pytest.approx(1) and facts["max s / K, maximum"] > 1000
    assert facts["largest share, median"] == pytest.approx(1 / 4) and facts["largest share, maximum"] > 0.999
    groups = diagnosis.by_peak(seen)
    assert sum(group["directions, %"] for group in groups.values()) == pytest.approx(100)
    assert sum(group["energy, %"] for group in groups.values()) == pytest.approx(100)
    outermost = groups[max(groups)]
    assert max(groups) == 1024 and outermost["directions, %"] == pytest.approx(5)  # one of 20
    assert outermost["median γ"] < 1e-3 and outermost["energy after SVC / before"] < 1e-6
    assert outermost["energy, %"] > 70 and outermost["energy after SVC, %"] < 1
