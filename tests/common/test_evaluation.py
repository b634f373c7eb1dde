"""Scoring several models in one pass, and the paired comparison of two of them."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy
import torch
from torch import nn

from common.evaluation import errors, metric, predictions, score
from common.lab.statistics import mean_difference, paired_interval, relative_change, spread
from merging.suites.vision import ZeroShot


def test_several_models_in_one_pass_give_what_each_gives_alone():
    torch.manual_seed(0)
    encoder, head = nn.Linear(6, 4), torch.randn(3, 4)
    network = ZeroShot(encoder, head)
    states = [{name: torch.randn_like(tensor) for name, tensor in encoder.state_dict().items()} for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images, labels = torch.randn(50, 6), torch.randint(3, (50,))
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    together, right = predictions(network, states, batches)
    assert together.shape == (3, 50) and right.equal(labels)
    for state, answers in zip(states, together, strict=True):
        features = images @ state["weight"].T + state["bias"]
        assert answers.equal((features / features.norm(dim=1, keepdim=True) @ head.T).argmax(1))
    assert all(tensor.equal(before[name]) for name, tensor in encoder.state_dict().items())


def test_classes_are_scored_by_accuracy_and_numbers_by_rank():
    predicted, classes = torch.tensor([2, 0, 1, 1]), torch.tensor([2, 0, 0, 1])
    assert metric(classes) == "accuracy" and score(predicted, classes) == 75
    assert errors(predicted, classes).tolist() == [0, 0, 1, 0]
    numbers = torch.tensor([0.0, 2.0, 3.5, 5.0])
    assert metric(numbers) == "Spearman" and score(numbers.exp(), numbers) == pytest.approx(100)
    swapped = torch.tensor([0.0, 3.5, 2.0, 5.0])
    assert score(swapped, numbers) == pytest.approx(80)  # 1 − 6 Σd² / n(n² − 1)
    assert errors(swapped, numbers).tolist() == [0, 1.5, 1.5, 0]
    assert score(torch.zeros(4), numbers) == 0


def cells(gained, lost, seeds=3, tasks=8, images=200):
    return pd.DataFrame([dict(seed=seed, task=f"t{task}", images=images, gained=gained, lost=lost)
                         for seed in range(seeds) for task in range(tasks)])  # fmt: skip


def test_the_mean_difference_is_exact_and_the_interval_holds_it():
    interval = paired_interval(cells(gained=30, lost=10))
    assert interval.mean == pytest.approx(10) and interval.low < 10 < interval.high and interval.sign == 1
    assert paired_interval(cells(10, 30)).sign == -1 and paired_interval(cells(20, 20)).sign == 0


def test_images_count_even_where_seeds_and_tasks_agree_and_more_of_them_narrow_the_interval():
    wide, narrow = paired_interval(cells(3, 1, images=20)), paired_interval(cells(300, 100, images=2000))
    assert 0 < narrow.high - narrow.low < (wide.high - wide.low) / 5


def test_spread_over_tasks_widens_the_interval():
    data = cells(30, 10)
    uneven = data.assign(gained=data.gained.where(data.task != "t0", 190), lost=data.lost.where(data.task != "t0", 0))
    even, wide = paired_interval(data), paired_interval(uneven)
    assert wide.high - wide.low > 2 * (even.high - even.low)


def test_the_interval_is_the_same_each_time_and_gaps_are_refused():
    data = cells(12, 9)
    assert paired_interval(data) == paired_interval(data)
    with pytest.raises(ValueError, match="every seed and task"):
        paired_interval(data.iloc[1:])


def test_spread_shows_a_deviation_only_where_there_is_one():
    assert spread(pd.Series([1.0, 2.0])) == "1.5 ± 0.7" and spread(pd.Series([1.0])) == "1.0"


def test_relative_change_is_students_interval_of_log_ratios():
    first, second = pd.Series({0: 0.2, 1: 0.3, 2: 0.25}), pd.Series({2: 0.12, 0: 0.1, 1: 0.16, 3: 9.0})
    found = relative_change(first, second)
    logs = np.log([0.1 / 0.2, 0.16 / 0.3, 0.12 / 0.25])
    low, high = scipy.stats.t.interval(0.95, 2, logs.mean(), logs.std(ddof=1) / np.sqrt(3))
    assert [found.mean, found.low, found.high] == pytest.approx([100 * np.expm1(x) for x in (logs.mean(), low, high)])
    assert found.sign == -1


def test_a_mean_difference_has_students_interval_over_the_seeds_that_both_have():
    found = mean_difference(pd.Series({0: 1.0, 1: 2.0, 2: 3.0}), pd.Series({2: 3.5, 0: 1.1, 1: 2.9, 7: 9.0}))
    differences = np.array([0.1, 0.9, 0.5])
    expected = scipy.stats.t.interval(0.95, 2, differences.mean(), differences.std(ddof=1) / np.sqrt(3))
    assert found.mean == pytest.approx(0.5) and (found.low, found.high) == pytest.approx(expected)
    assert math.isinf(mean_difference(pd.Series({0: 1.0}), pd.Series({0: 2.0})).high)
    with pytest.raises(ValueError, match="no seed has both"):
        mean_difference(pd.Series({0: 1.0}), pd.Series({1: 1.0}))


def test_relative_change_of_one_seed_is_a_number_without_bounds():
    found = relative_change(pd.Series({4: 0.2}), pd.Series({4: 0.1}))
    assert found.mean == pytest.approx(-50) and (found.low, found.high) == (-100, math.inf) and found.sign == 0
    assert str(found) == "-50.0 (one seed)" and found.ends == (found.mean, found.mean)
    with pytest.raises(ValueError, match="no seed has both"):
        relative_change(pd.Series({0: 1.0}), pd.Series({1: 1.0}))
