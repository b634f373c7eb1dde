"""Features of task vectors beside naive loops, and on sets whose answers are known."""

import itertools
import math

import pytest
import torch

from merging.interference import (
    CONFLICT,
    COSINE,
    COUNT,
    FEATURES,
    INFLATION,
    INTERFERENCE,
    LARGEST_COSINE,
    LARGEST_COUNT,
    MATCHED,
    NORM,
    OVERLAP,
    TASKS,
    features,
    inner_products,
    sign_conflict,
    update_norms,
)


def noise(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


BASE = {"block.0.up.weight": noise(20, 30), "bias": noise(20, seed=1), "steps": torch.tensor(3)}


def update(seed, like=None, weight=0.0):
    """Random, or mixed with another one."""
    own = {"block.0.up.weight": noise(20, 30, seed=seed), "bias": noise(20, seed=seed + 50)}
    return {name: tensor + weight * (like or own)[name] for name, tensor in own.items()}


THREE = [update(2), update(3, like=update(2), weight=0.7), update(4)]


def flat(task):
    return [float(x) for tensor in task.values() for x in tensor.flatten()]


def test_sizes_angles_and_signs_are_those_of_naive_loops():
    found, vectors = features(BASE, THREE), [flat(task) for task in THREE]
    base = math.sqrt(sum(float(x) ** 2 for name in THREE[0] for x in BASE[name].flatten()))
    norms = [math.sqrt(sum(x * x for x in vector)) for vector in vectors]
    products = [[sum(x * y for x, y in zip(a, b, strict=True)) for a in vectors] for b in vectors]
    cosines = [products[i][j] / norms[i] / norms[j] for i, j in itertools.combinations(range(3), 2)]
    opposed = total = 0.0
    for entries in zip(*vectors, strict=True):
        elected = math.copysign(1, sum(entries))
        opposed += sum(abs(x) for x in entries if x * elected < 0)
        total += sum(map(abs, entries))
    summed = math.sqrt(sum(sum(entries) ** 2 for entries in zip(*vectors, strict=True)))
    assert inner_products(THREE).flatten().tolist() == pytest.approx([x for row in products for x in row])
    assert update_norms(BASE, THREE) == pytest.approx([100 * norm / base for norm in norms])
    assert found[NORM] == pytest.approx(100 * sum(norms) / 3 / base)
    assert found[COSINE] == pytest.approx(sum(cosines) / 3) and found[LARGEST_COSINE] == pytest.approx(max(cosines))
    assert found[CONFLICT] == pytest.approx(opposed / total) == pytest.approx(sign_conflict(THREE))
    assert found[MATCHED] == pytest.approx(sum(norms) / 3 / summed)
    assert found[TASKS] == 3 and tuple(found) == FEATURES


def test_experts_that_are_the_same_share_everything():
    found = features(BASE, [THREE[0]] * 4)
    assert found[COSINE] == pytest.approx(1) and found[OVERLAP] == pytest.approx(1)
    assert found[CONFLICT] == pytest.approx(0, abs=1e-12) and found[MATCHED] == pytest.approx(1 / 4)
    assert found[LARGEST_COUNT] == pytest.approx(1)  # all respond alike: s is K
    assert found[INTERFERENCE] == pytest.approx((4 - 1) ** 2)
    chance = features(BASE, [THREE[0]] * 4, [THREE[0]] * 4)
    assert chance[COUNT] == chance[INFLATION] == 0 and found[COUNT] > 1 and found[INFLATION] > 1


def test_experts_that_oppose_each_other_cancel():
    assert sign_conflict([THREE[0], {name: -tensor for name, tensor in THREE[0].items()}]) == pytest.approx(1 / 2)
    assert math.isnan(sign_conflict([{"a": torch.zeros(3)}] * 2))


def test_unrelated_experts_are_at_the_chance_level():
    """Averages over draws: s and inflation above chance are about 0 where nothing is shared."""
    found = [features(BASE, [update(100 + 3 * seed + i) for i in range(3)]) for seed in range(20)]
    shared = features(BASE, [update(seed, like=THREE[0], weight=2.0) for seed in (7, 8, 9)])
    for name in (COUNT, INFLATION):
        values = torch.tensor([each[name] for each in found])
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values)) + 0.02
        assert shared[name] > values.max()


def test_the_inputs_stay_as_they_are():
    before = [{name: tensor.clone() for name, tensor in task.items()} for task in THREE]
    features(BASE, THREE)
    assert all(torch.equal(task[name], kept[name]) for task, kept in zip(THREE, before, strict=True) for name in task)


def test_what_has_no_answer_is_refused():
    with pytest.raises(ValueError, match="at least 2 task vectors"):
        features(BASE, THREE[:1])
    with pytest.raises(ValueError, match="no matrix that SVC would calibrate"):
        features(BASE, [{"bias": task["bias"]} for task in THREE])
