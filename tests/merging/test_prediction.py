"""Leave-tasks-out correlations beside naive loops, their intervals and chance levels, and tables with known answers."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from common.lab.experiment import load_experiment
from merging.interference import CONFLICT, COSINE, FEATURES, NORM, TASKS
from merging.suites import prediction
from merging.suites.task_sets import DROP_TUNED, STARTS, TARGETS, TUNED, task_sets


def names(tasks):
    return [f"t{number}" for number in range(tasks)]


def members_of(sets, tasks):
    return np.array([[name in own for name in names(tasks)] for own in sets])


def pairs(tasks):
    return members_of(itertools.combinations(names(tasks), 2), tasks)


def effects(members, draw, noise=1.0):
    """One value for each set: the sum of its tasks' own values, and noise."""
    return members @ draw.normal(size=members.shape[1]) + noise * draw.normal(size=len(members))


# Correlations --------------------------------------------------------------------------------------------------------


def naive(members, features, target, wanted):
    """The definition of the module's docstring, set by set."""
    ranks = {name: stats.rankdata(values) for name, values in features.items()}
    ranks = {name: (r - r.mean()) / np.linalg.norm(r - r.mean()) for name, r in ranks.items()}
    goal = stats.rankdata(target)
    goal = (goal - goal.mean()) / np.linalg.norm(goal - goal.mean())
    scores, kept = [], []
    for place, own in enumerate(members):
        others = [i for i, other in enumerate(members) if not (own & other).any()]
        if len(others) < 3:
            continue
        kept.append(place)
        if wanted in features:
            covariance = np.cov(ranks[wanted][others], goal[others], bias=True)[0, 1]
            scores.append(np.sign(covariance.round(12)) * ranks[wanted][place])
            continue
        parts = [name for name in prediction.TOGETHER[wanted] if name in features]
        z = np.stack([ranks[name] for name in parts], 1)
        centred = z[others] - z[others].mean(0)
        gram = centred.T @ centred / len(others) + prediction.PENALTY * np.eye(len(parts)) / len(members)
        weights = np.linalg.solve(gram, centred.T @ (goal[others] - goal[others].mean()) / len(others))
        scores.append(z[place] @ weights)
    return stats.spearmanr(scores, goal[kept]).statistic


@pytest.mark.parametrize("sizes", [(2,), (2, 3, 5)])
def test_correlations_are_those_of_the_definition(sizes):
    draw, tasks = np.random.default_rng(1), 8
    members = members_of(task_sets(names(tasks), sizes, 20), tasks)
    features = {name: effects(members, draw) for name in (NORM, COSINE, CONFLICT)}
    features[NORM] = features[NORM].round()  # ties
    if len(sizes) > 1:
        features[TASKS] = members.sum(1)
    targets = np.stack([effects(members, draw), features[CONFLICT] + draw.normal(size=len(members))])
    found = prediction.left_out_correlations(members, features, targets)
    assert set(found) == {*features, *prediction.TOGETHER}
    for name, row in found.items():
        assert row == pytest.approx([naive(members, features, target, name) for target in targets], abs=1e-9), name


def test_too_few_disjoint_sets_give_no_number():
    members = pairs(4)  # each pair has one other that shares no task with it
    found = prediction.left_out_correlations(members, {COSINE: np.arange(6.0)}, np.ones((2, 6)))
    assert all(np.isnan(row).all() and len(row) == 2 for row in found.values())


# Intervals and chance ------------------------------------------------------------------------------------------------


def test_intervals_cover_the_truth_though_sets_share_tasks():
    """Feature and target are sums over correlated tasks, and noise; an interval over sets would be far too narrow."""
    draw, members, known, naively, runs = np.random.default_rng(0), pairs(14), 0, 0, 120

    def sample():
        first = draw.normal(size=14)
        second = 0.8 * first + 0.6 * draw.normal(size=14)
        return tuple(members @ own + draw.normal(size=len(members)) for own in (first, second))

    truth = np.mean([stats.spearmanr(*sample()).statistic for _ in range(400)])
    for _ in range(runs):
        feature, target = sample()
        rho = stats.spearmanr(feature, target).statistic
        left_out = [stats.spearmanr(feature[~own], target[~own]).statistic for own in members.T]
        low, high = prediction.jackknife(rho, np.array(left_out), is_correlation=True)
        known += low <= truth <= high
        reach = 1.96 / math.sqrt(len(members) - 3)
        naively += math.tanh(math.atanh(rho) - reach) <= truth <= math.tanh(math.atanh(rho) + reach)
    assert 0.88 <= known / runs <= 1 and naively / runs < 0.75


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.array([1.0, 4.0, 2.0, 8.0, 5.0])
    left_out = np.array([np.delete(values, place).mean() for place in range(5)])
    expected = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert prediction.jackknife(values.mean(), left_out) == pytest.approx(expected)


@pytest.mark.parametrize(("sizes", "most", "count"), [((2,), 1, 99), ((2, 3), 9, 8), ((2, 3, 4), 500, 99)])
def test_relabellings_exchange_tasks(sizes, most, count):
    """All permutations where the sets allow it, else the shifts: what sets share with each other stays as it is."""
    members = members_of(task_sets(names(9), sizes, most), 9)
    moved = prediction.relabellings(names(9), members)
    shared = members.astype(int) @ members.T
    assert moved.shape == (count, len(members))
    for places in moved:
        assert sorted(places) == list(range(len(members))) and (places != np.arange(len(members))).any()
        assert (shared[np.ix_(places, places)] == shared).all()


def test_sets_that_no_exchange_carries_into_themselves_have_no_chance_level():
    members = members_of([("t0", "t1"), ("t1", "t2"), ("t3", "t4"), ("t3", "t1")], 5)
    assert prediction.relabellings(names(5), members).shape == (0, 4)


# Tables with known answers -------------------------------------------------------------------------------------------


def table(seed, planted="", tasks=9, sizes=(2,), strength=1.0, halves=0.3):
    """Two seeds of experts; every feature and target is a sum over tasks and noise, and `planted` drives DROP_TUNED."""
    draw, sets = np.random.default_rng(seed), task_sets(names(tasks), sizes, 24)
    members, rows = members_of(sets, tasks), []
    known = {name: effects(members, draw) for name in (*FEATURES, *TARGETS, *STARTS)} | {TASKS: members.sum(1)}
    known |= {name: known[name] - 5 for name in STARTS}
    if planted:
        known[DROP_TUNED] = strength * known[planted] + 0.3 * draw.normal(size=len(sets))
    for expert in (0, 1):
        for name, values in known.items():
            kind = "feature" if name in FEATURES else "target"
            for own, value in zip(sets, values + 0.05 * draw.normal(size=len(sets)) * (name != TASKS), strict=True):
                row = dict(seed=expert, backbone="B", set="+".join(own), tasks=len(own), kind=kind, metric=name)
                first, second = value + halves * draw.normal(size=2)
                has_halves = name not in (*FEATURES, TUNED)
                rows.append(row | dict(value=value) | (dict(first=first, second=second) if has_halves else {}))
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("planted", "sizes"), [(CONFLICT, (2,)), (CONFLICT, (2, 3)), (COSINE, (2,))])
@pytest.mark.parametrize("strength", [1.0, -1.0])
def test_a_planted_cause_is_found_whatever_its_sign(planted, sizes, strength):
    found = prediction.answers(table(0, planted, tasks=12, sizes=sizes, strength=strength))
    assert set(found.group) == ({"B, pairs"} if sizes == (2,) else {"B, pairs", "B, 2 to 3 tasks"})
    assert (TASKS in set(found[found.group == "B, pairs"].feature)) is False  # pairs all have the same number
    rows = found[(found.target == DROP_TUNED) & (found.feature == planted)]
    assert rows.foretells.all() and rows.advice.all() and (rows.rho > 0.85).all()
    assert (np.sign(rows.plain) == strength).all() and (rows.plain.abs() > 0.85).all()
    assert rows.beyond.all() == (planted != COSINE)  # a simple baseline is never beyond the simple baselines
    if planted == COSINE:
        assert (found[(found.target == DROP_TUNED)].best == COSINE).all()
        assert not found[found.target == DROP_TUNED].beyond.any()


def test_one_of_many_features_rarely_passes_by_luck():
    """Nothing drives anything, though all of it goes with the tasks: at most about 5 % of the targets pass."""
    found = [prediction.answers(table(seed)) for seed in range(5)]
    passed = [own.groupby("target").foretells.any() for own in found]
    assert sum(each.sum() for each in passed) <= 5  # of 30
    assert all((own.bar > 0.2).all() for own in found)


def test_the_noise_of_a_target_limits_rho():
    clean, noisy = (next(prediction.groups(table(0, halves=halves))) for halves in (0.01, 5.0))
    assert prediction.ceiling(clean, DROP_TUNED) > 0.99 > 0.9 > prediction.ceiling(noisy, DROP_TUNED) >= 0
    assert math.isnan(prediction.ceiling(clean, TUNED))  # a chosen scale has no halves


def test_what_starting_without_data_costs():
    data = table(0)
    found = prediction.starts(data).set_index("scale")
    for scale in STARTS:
        costs = data[data.metric == scale].value
        assert found.loc[scale, "mean"] == pytest.approx(costs.mean())
        assert found.loc[scale, "worst"] == pytest.approx(costs.quantile(0.05))
        assert found.loc[scale, "low"] < costs.mean() < found.loc[scale, "high"]


# The experiment's verdict ---------------------------------------------------------------------------------------------

EXPERIMENT = load_experiment(Path(__file__).resolve().parents[2] / "experiments" / "32_predicting_interference.py")


@pytest.mark.parametrize(
    ("planted", "tasks", "expected"),
    [
        (CONFLICT, 12, "predictable beyond the baselines."),
        (COSINE, 12, "predictable."),
        ("", 12, "not predictable by these features."),
        (CONFLICT, 6, "not run at this scale"),
    ],
)
def test_the_verdict_follows_the_rule(planted, tasks, expected):
    data = table(0, planted, tasks=tasks)
    text = EXPERIMENT.verdict(data)
    assert text.startswith(expected)
    if planted and tasks == 12:
        assert f"B, pairs of 12, 2 seeds: drop, tuned scale by {planted} 0." in text
    if tasks == 12:
        assert text.endswith("Good starts without data: none.")  # costs of several points either way, in the table


def test_a_start_is_good_where_it_surely_costs_little():
    data = table(0, tasks=12)
    near = data.metric == "norm-matched"
    data.loc[near, "value"] = 0.01 * data.value[near] - 1
    assert EXPERIMENT.verdict(data).endswith("Good starts without data: norm-matched.")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sizes": (3,)}, "expected 2, for pairs"), ({"sizes": (2, 21)}, "others up to 20"), ({"parts": 0}, "at least 1")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(EXPERIMENT.scales["laptop"], **options)
