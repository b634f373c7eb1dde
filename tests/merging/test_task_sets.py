"""Which sets of tasks are merged, and that what is measured of a set is what merging it by hand gives."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from merging import apply, calibrate
from merging.interference import FEATURES, features
from merging.suites import task_sets
from merging.suites.suite import Suite
from merging.suites.task_sets import STARTS, TARGETS, circle
from merging.tuning import tune_scale
from merging.unrelated import unrelated

TASKS = [f"task{number}" for number in range(9)]


def test_small_designs_hold_every_set():
    found = task_sets.task_sets(TASKS, (2, 3, 9), most=100)
    expected = [own for size in (2, 3, 9) for own in itertools.combinations(TASKS, size)]
    assert found == expected
    assert len(task_sets.task_sets(TASKS, (2,), most=1)) == math.comb(9, 2)  # pairs are always all


@pytest.mark.parametrize("size", [3, 4, 6])
def test_circular_designs_hold_every_task_equally_often_and_are_carried_into_themselves(size):
    found = task_sets.task_sets(TASKS, (size,), most=20)
    assert 9 <= len(found) <= 20 and len(set(found)) == len(found) and all(len(set(own)) == size for own in found)
    assert {sum(task in own for own in found) for task in TASKS} == {len(found) * size // 9}
    around = circle(TASKS)
    turned = {task: around[(place + 1) % 9] for place, task in enumerate(around)}
    assert {frozenset(turned[task] for task in own) for own in found} == {frozenset(own) for own in found}
    assert sorted(around) == sorted(TASKS) and circle(TASKS[::-1]) == around


@pytest.mark.parametrize("size", [1, 10])
def test_sizes_that_no_set_has_are_refused(size):
    with pytest.raises(ValueError, match="a set has 2 to 9 tasks here"):
        task_sets.task_sets(TASKS, (2, size), most=5)


# What is measured ----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, inputs):
        return (self.encoder(inputs) @ self.head.T).argmax(-1)


def noise(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def suite():
    """Four tasks on random inputs, whose labels are what each expert says: experts are always right."""
    encoder = nn.Linear(12, 10)
    start = {"weight": noise(10, 12, seed=1), "bias": noise(10, seed=2)}
    shared, names = noise(10, 12, seed=3), ("a", "b", "c", "d")
    experts = tuple(
        {"weight": start["weight"] + 0.4 * shared + 0.6 * noise(10, 12, seed=10 + i), "bias": start["bias"] + 0.1 * i}
        for i in range(4)
    )
    networks = tuple(Classifier(encoder, noise(5, 10, seed=20 + i)) for i in range(4))

    def batches(task, split):
        place = names.index(task)
        inputs = noise(60, 12, seed=100 + place + 10 * (split == "test"))
        own = Classifier(nn.Linear(12, 10), networks[place].head)
        own.encoder.load_state_dict(experts[place])
        return [(inputs, own(inputs))]

    return Suite("a key", names, networks, start, experts, batches)


def accuracy(own, states, split="test", part=slice(None)):
    """One number for each task and state."""
    return torch.tensor(
        [
            [100 * (p[part] == labels[part]).double().mean() for p in found]
            for found, labels in own.answers(states, split)
        ]
    )


def test_the_rows_of_a_set_are_what_merging_it_by_hand_gives(tmp_path, monkeypatch):
    monkeypatch.setattr("common.cache.CACHE", tmp_path)
    whole, sets = suite(), [("a", "c"), ("b", "c", "d")]
    rows = list(task_sets.rows(whole, sets, 5))
    assert len(rows) == len(sets) * (len(FEATURES) + len(TARGETS) + len(STARTS))
    updates = dict(zip(whole.tasks, whole.task_vectors(), strict=True))
    scattered = dict(zip(whole.tasks, unrelated(whole.task_vectors(), 5), strict=True))
    for names in sets:
        found = {row["metric"]: row for row in rows if row["set"] == "+".join(names)}
        own = [updates[name] for name in names]
        expected = features(whole.pretrained, own, [scattered[name] for name in names])
        assert {name: found[name]["value"] for name in FEATURES} == pytest.approx(expected)
        assert {row["tasks"] for row in found.values()} == {len(names)}

        part, base = task_sets.of_tasks(whole, names), whole.pretrained
        assert part.tasks == names and part.key != whole.key
        total = {name: sum(update[name] for update in own) for name in base}
        linear = {name: 0.3 * tensor for name, tensor in total.items()}
        svc = calibrate(linear, own, alpha=1 / len(own))

        def score(update, scales, part=part, base=base):
            return accuracy(part, [apply(base, update, scale) for scale in scales], "validation").mean(0).tolist()

        scales = [tune_scale(partial(score, update)) for update in (linear, svc)]
        norm = sum(sum(float(t.square().sum()) for t in update.values()) ** 0.5 for update in own) / len(own)
        length = sum(float(t.square().sum()) for t in total.values()) ** 0.5
        states = [
            apply(base, linear), apply(base, linear, scales[0]), apply(base, total, 1 / len(own)),
            apply(base, svc), apply(base, svc, scales[1]), apply(base, total, norm / length),
        ]  # fmt: skip
        for column, half in {"value": slice(None), "first": slice(0, None, 2), "second": slice(1, None, 2)}.items():
            fixed, best, average, with_svc, best_svc, matched = accuracy(part, states, part=half).mean(0).tolist()
            known = {
                "drop, own scale": 100 - fixed, "drop, tuned scale": 100 - best, "drop, average": 100 - average,
                "SVC's gain, own scales": with_svc - fixed, "SVC's gain, tuned scales": best_svc - best,
                "norm-matched": matched - best, "own (0.3)": fixed - best, "average (1/K)": average - best,
            }  # fmt: skip
            assert {name: found[name][column] for name in known} == pytest.approx(known, abs=1e-4)
        assert found["tuned scale"]["value"] == pytest.approx(0.3 * scales[0]) and "first" not in found["tuned scale"]
        assert found["drop, own scale"]["value"] > 5  # merging hurts, or nothing was tested
