"""Norm matching, beside naive loops over entries and beside the same in matrices."""

import math

import pytest
import torch

from merging import MERGERS, mergers, norm_match
from merging.lowrank import LowRank, merge_low_rank
from merging.norm_matching import low_rank_norm, norm_match_low_rank

SHAPES = {"weight": (4, 6), "kernel": (3, 2, 2, 2), "bias": (5,), "scale": (), "none": (0, 3)}


def noise(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_vectors():
    tasks = [{name: (1 + 3 * seed) * noise(*size, seed=seed) for name, size in SHAPES.items()} for seed in range(3)]
    return [task | {"count": torch.tensor(3)} for task in tasks]


def naive_norm(*tensors):
    return math.sqrt(sum(float(entry) ** 2 for tensor in tensors for entry in tensor.flatten()))


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_every_tensor_gets_the_mean_norm_of_the_experts_and_keeps_its_direction(scale):
    tasks = task_vectors()
    merged = {name: scale * sum(task[name] for task in tasks) for name in SHAPES}
    before = {name: tensor.clone() for name, tensor in merged.items()}
    matched = norm_match(merged, tasks)
    assert matched.keys() == SHAPES.keys() and all(merged[name].equal(before[name]) for name in SHAPES)
    for name in SHAPES:
        wanted = sum(naive_norm(task[name]) for task in tasks) / 3
        assert naive_norm(matched[name]) == pytest.approx(wanted, rel=1e-12)
        factor = wanted / naive_norm(merged[name]) if merged[name].numel() else 1.0
        torch.testing.assert_close(matched[name], factor * merged[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_one_number_for_the_whole_update(scale):
    tasks = task_vectors()
    merged = {name: scale * sum(task[name] for task in tasks) for name in SHAPES}
    matched = norm_match(merged, tasks, whole=True)
    wanted = sum(naive_norm(*(task[name] for name in SHAPES)) for task in tasks) / 3
    assert naive_norm(*matched.values()) == pytest.approx(wanted, rel=1e-12)
    factor = wanted / naive_norm(*merged.values())
    for name in SHAPES:
        torch.testing.assert_close(matched[name], factor * merged[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_an_update_of_zero_stays_zero_and_dtypes_stay(whole):
    tasks = [{"a": noise(3, 2, seed=seed).bfloat16(), "b": noise(3, seed=seed).float()} for seed in range(2)]
    matched = norm_match({"a": torch.zeros(3, 2, dtype=torch.bfloat16), "b": tasks[0]["b"]}, tasks, whole=whole)
    assert matched["a"].equal(torch.zeros(3, 2, dtype=torch.bfloat16))
    assert matched["b"].dtype == torch.float32 and matched["b"].norm() > 0


def test_one_task_is_left_as_it_is():
    (task,) = [{name: noise(*size) for name, size in SHAPES.items()}]
    for whole in (False, True):
        for name, tensor in norm_match(task, [task], whole=whole).items():
            torch.testing.assert_close(tensor, task[name], rtol=1e-14, atol=0)


def test_updates_that_do_not_fit_are_refused_by_name():
    tasks = task_vectors()
    with pytest.raises(ValueError, match="'bias'"):
        norm_match({**tasks[0], "bias": noise(6)}, tasks)
    with pytest.raises(ValueError, match="at least one task vector"):
        norm_match(tasks[0], [])


@pytest.mark.parametrize("layout", ["matrix", "transposed"])
@pytest.mark.parametrize("method", [name for name, own in MERGERS.items() if own.factored])
def test_factors_are_matched_as_their_matrices_are(method, layout):
    updates = [
        LowRank(noise(12, 2 + seed, seed=seed), noise(2 + seed, 20, seed=seed + 9), 0.5 + seed, layout)
        for seed in range(3)
    ]
    merged = merge_low_rank(updates, method)
    matrices = [{"weight": update.dense()} for update in updates]
    expected = norm_match({"weight": merged.dense()}, matrices)["weight"]
    torch.testing.assert_close(norm_match_low_rank(merged, updates).dense(), expected, rtol=1e-9, atol=1e-12)
    if layout == "matrix" and method != "star":  # and it is what matching the merged matrices gives
        dense = norm_match(mergers.merge(method, matrices, 0), matrices)["weight"]
        assert (dense - expected).norm() < 1e-5 * expected.norm()


def test_the_norm_of_factors_is_that_of_their_product_also_where_they_nearly_cancel():
    column, row = noise(30, 1), noise(1, 40, seed=1)
    cancelling = LowRank(torch.cat([column, column], 1), torch.cat([row, -(1 - 1e-6) * row]), scale=-3.0)
    for update in (cancelling, LowRank(noise(7, 0), noise(0, 5))):
        assert low_rank_norm(update) == pytest.approx(float(update.dense().norm()), rel=1e-8)
