"""The testbed rule on tables whose answer is known, its quantities beside naive loops, and controls pooled by hand."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

from common.lab.statistics import paired_interval
from merging import apply, diagnose, plain_sum
from merging.suites import controls, testbed
from merging.suites.comparison import TUNED_GAIN
from merging.suites.suite import Suite


def noise(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The rule -------------------------------------------------------------------------------------------------------------


def table(gain_own, gain_tuned, largest):
    """One suite of two tasks and two seeds: the pretrained model at 50 %, Task Arithmetic at two scales, and norms."""
    rows = []
    for seed in (0, 1):
        for task, more in (("a", -3.0), ("b", 3.0)):
            cell = dict(seed=seed, task=task, backbone="B", suite=2, metric="accuracy", images=100)
            rows.append(cell | dict(method="pretrained", value=50 + more))
            for rule, gain in (("fixed", gain_own), ("validation", gain_tuned)):
                labels = dict(method="task_arithmetic", svc="none", scale_rule=rule, others="own")
                rows.append(cell | labels | dict(value=50 + more + gain + (2 * seed - 1)))
            own = largest if (seed, task) == (1, "b") else largest / 2
            rows.append(cell | dict(method="expert", metric=testbed.UPDATE_NORM, value=own))
    for method, value in (("plain_sum", 4.0), ("unrelated", 1.5)):
        for metric in testbed.DIAGNOSIS:
            rows.append(dict(seed=0, backbone="B", suite=2, method=method, svc="none", metric=metric, value=value))
    return pd.DataFrame(rows).assign(alpha=float("nan"))


@pytest.mark.parametrize(
    ("own", "tuned", "largest", "expected"),
    [
        (5.0, 5.0, 10.0, "yes"),
        (-20.0, 2.1, 19.9, "yes"),  # "at some scale"
        (2.1, -20.0, 19.9, "yes"),
        (1.9, 1.9, 5.0, "no"),
        (-30.0, -1.0, 5.0, "no"),
        (9.0, 9.0, 20.0, "no"),
        (9.0, 9.0, 66.0, "no"),
    ],
)
def test_a_suite_counts_where_merging_works_near_the_base(own, tuned, largest, expected):
    data = table(own, tuned, largest)
    (found,) = testbed.judged(data).itertuples()
    assert found.testbed == expected and found.largest == largest
    assert found.gain == pytest.approx(max(own, tuned))
    assert len(testbed.on_testbeds(data, data)) == (len(data) if expected == "yes" else 0)
    text = testbed.sentence(data)
    if expected == "yes":
        assert text == "All 1 suites are testbeds."
    else:
        assert text.startswith("0 of 1 suites are testbeds; no testbed: B, 2 tasks (Task Arithmetic ")


def unmeasured(gain, what):
    """A suite for which the update norms, their values or Task Arithmetic are not in the table."""
    data = table(gain, gain, float("nan") if what == "no values" else 5.0)
    if what == "no norms":
        return data[data.metric != testbed.UPDATE_NORM]
    return data[data.method != "task_arithmetic"] if what == "no Task Arithmetic" else data


@pytest.mark.parametrize("what", ["no norms", "no values", "no Task Arithmetic"])
@pytest.mark.parametrize("gain", [9.0, -9.0])
def test_what_was_not_measured_is_unknown_and_leaves_the_suite_in(gain, what):
    data = unmeasured(gain, what)
    assert list(testbed.judged(data).testbed) == ["not measured"]
    assert testbed.on_testbeds(data, data).equals(data)
    assert testbed.sentence(data) == "Testbeds: not measured in this run."
    (line,) = testbed.table(data).to_dict("records")
    assert line["testbed"] == "not measured"
    shown = ["not run", "+5.0"] if what == "no Task Arithmetic" else [f"{gain:+.1f}", "not measured"]
    assert line["Task Arithmetic − pretrained, points"] == shown[0]
    if what != "no values":
        assert line[testbed.UPDATE_NORM] == shown[1] or what == "no Task Arithmetic"


def test_of_several_suites_each_is_judged_by_what_is_known_of_it():
    parts = {"A": table(5.0, 5.0, 5.0), "B": table(5.0, 5.0, 50.0), "C": unmeasured(5.0, "no norms")}
    data = pd.concat([part.assign(backbone=name) for name, part in parts.items()], ignore_index=True)
    assert dict(testbed.judged(data)[["backbone", "testbed"]].to_numpy()) == {
        "A": "yes", "B": "no", "C": "not measured",
    }  # fmt: skip
    assert set(testbed.on_testbeds(data, data).backbone) == {"A", "C"}
    text = testbed.sentence(data)
    assert text.startswith("1 of 3 suites are testbeds; no testbed: B, 2 tasks (Task Arithmetic +5.0 points")
    assert text.endswith("updates up to 50 % of the base's norm); not measured in this run: C, 2 tasks.")


def test_the_table_puts_chance_beside_every_quantity():
    (line,) = testbed.table(table(5.0, 6.0, 10.0)).to_dict("records")
    assert line["testbed"] == "yes" and line["Task Arithmetic − pretrained, points"] == "+6.0"
    assert [line[f"{name} (by chance)"] for name in testbed.DIAGNOSIS.values()] == ["4.00 (1.50)"] * 3


# Its quantities -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(30, 20).double()


def suite(rank=None):
    """Three experts that share directions, of full rank or as LoRA makes them; one tensor that none of them changes."""
    start = {"weight": noise(20, 30), "bias": noise(20, seed=1), "kept": 100 * noise(7, seed=2)}
    shared, updates = noise(20, 30, seed=3), []
    for seed in range(3):
        change = shared + 0.5 * noise(20, 30, seed=4 + seed)
        if rank:
            left = noise(20, rank, seed=30) + 0.3 * noise(20, rank, seed=31 + seed)
            change = left @ noise(rank, 30, seed=40)
        updates.append(
            {"weight": 0.1 * (1 + seed) * change, "bias": 0.1 * noise(20, seed=9 + seed), "kept": 0 * start["kept"]}
        )
    experts = tuple(apply(start, update) for update in updates)
    return Suite("a key", ("a", "b", "c"), (Linear(),) * 3, start, experts, lambda task, split: []), start, updates


@pytest.mark.parametrize("rank", [None, 2])
def test_update_norms_leave_out_what_no_expert_changed(rank):
    _, start, updates = suite(rank)
    base = math.sqrt(sum(float(x) ** 2 for name in ("weight", "bias") for x in start[name].flatten()))
    expected = [
        100 * math.sqrt(sum(float(x) ** 2 for name in ("weight", "bias") for x in update[name].flatten())) / base
        for update in updates
    ]
    assert testbed.update_norms(start, updates) == pytest.approx(expected)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_diagnosis_is_that_of_the_sum_without_null_directions(rank, tmp_path, monkeypatch):
    monkeypatch.setattr("common.cache.CACHE", tmp_path)
    own, _, _ = suite(rank)
    updates = own.task_vectors()
    found = {
        (row["method"], row["metric"]): row["value"] for row in testbed.rows(own, 0, form="f") if "task" not in row
    }
    total = sum(update["weight"] for update in updates)
    left, singular, _ = torch.linalg.svd(total, full_matrices=False)
    count = int((singular > 1e-6 * singular[0]).sum())
    assert count == (2 if rank else 20)
    interference = energy = 0.0
    coefficients = torch.zeros(3, count, dtype=torch.float64)
    for task, update in enumerate(updates):
        for r in range(count):
            a, b = left[:, r] @ update["weight"], left[:, r] @ total
            coefficients[task, r] = float(a @ b) / float(a @ a)
            interference += (float(coefficients[task, r]) - 1) ** 2 * float(a @ a)
            energy += float(a @ a)
    assert found["plain_sum", "interference"] == pytest.approx(interference / energy, rel=1e-4)
    top = coefficients.mean(0).tensor_split(10)[0].mean()
    assert found["plain_sum", "s, top tenth"] == pytest.approx(float(top), rel=1e-4)
    largest = [float(torch.linalg.svdvals(update["weight"])[0]) for update in updates]
    assert found["plain_sum", "inflation, largest σ"] == pytest.approx(float(singular[0]) * 3 / sum(largest), rel=1e-4)
    assert found["unrelated", "s, top tenth"] < found["plain_sum", "s, top tenth"]  # the tasks share directions
    assert len(diagnose(plain_sum(updates), updates)["weight"].coefficients[0]) == 20  # null ones included


# Controls -------------------------------------------------------------------------------------------------------------


def cells():
    """Two suites that share task a, two seeds: the gains of norm matching by hand."""
    rows = []
    for backbone, suite_size, tasks in (("B", 2, "ab"), ("C", 3, "abc")):
        for seed in (0, 1):
            for task in tasks:
                cell = dict(backbone=backbone, suite=suite_size, seed=seed, task=task, metric="accuracy", images=200)
                up = 10 * (suite_size - 1) + 4 * (task == "c") + 2 * seed
                counts = {
                    f"{count}{suffix}": 0
                    for count in ("gained", "lost")
                    for suffix in ("", "_over_tuned", "_over_norm")
                }
                for rule, more in (("fixed", 0), ("validation", 0), ("norm", up)):
                    labels = dict(
                        method="ties", svc="none", alpha=math.nan, scale_rule=rule, others="own", value=50.0 + more / 2
                    )
                    rows.append(cell | labels | counts | {"gained_over_tuned": more, "gained": more})
    return pd.DataFrame(rows)


def test_pooled_differences_count_each_task_once_with_its_mean_over_cells():
    data = cells()
    found = controls.pooled(data).set_index("condition")
    pooled = found.loc[controls.NORM_OVER_TUNED]
    by_task = {(seed, "a"): (10 + 20) / 2 + 2 * seed for seed in (0, 1)} | {
        (seed, "b"): 15 + 2 * seed for seed in (0, 1)
    }
    by_task |= {(seed, "c"): 24 + 2 * seed for seed in (0, 1)}
    assert pooled["mean"] == pytest.approx(sum(by_task.values()) / 6 / 2) and pooled.cells == 2  # of 200 images, in %
    rows = [dict(seed=s, task=t, images=200, gained=up, lost=0) for (s, t), up in by_task.items()]
    assert pooled.interval == paired_interval(pd.DataFrame(rows))
    assert pooled.low < pooled["mean"] < pooled.high and pooled.sign == 1
    width = (pooled.high - pooled.low) / 2
    assert (
        controls.brief(controls.pooled(data), controls.NORM_OVER_TUNED) == f"ties {pooled['mean']:+.1f} ± {width:.1f}"
    )


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(-1.4, 2.0, "replaces it"), (-1.4, -0.1, "replaces it"), (-1.6, -0.1, "is worse"), (-1.6, 0.5, "undecided")],
)
def test_words_for_norm_matching(low, high, word):
    found = pd.DataFrame([dict(method="ties", condition=controls.NORM_OVER_TUNED, low=low, high=high)])
    assert controls.replaced(found) == {"ties": word}


@pytest.mark.parametrize("norm_matched", [False, True])
def test_a_table_from_before_norm_matching_has_the_pooled_intervals_that_it_allows(norm_matched):
    data = cells()
    tuned = data[data.scale_rule == "validation"].assign(svc="output", alpha=1 / data.suite, gained=8.0)
    data = pd.concat([data, tuned], ignore_index=True)
    if not norm_matched:
        data = data[data.scale_rule != "norm"].drop(columns=["gained_over_norm", "lost_over_norm"])
    by_cell, together, best = controls.tables(data).values()
    assert ("norm matching" in by_cell) is norm_matched and "SVC + tuned scale" in by_cell
    (line,) = together.to_dict("records")
    assert line[TUNED_GAIN].startswith("+4.0 [") and line["cells"] == 2  # 8 of 200 images
    assert (controls.NORM_OVER_TUNED in line) is norm_matched
    assert len(best) == 2
    words = controls.beside_a_tuned_scale(controls.pooled(data))
    assert words == ("Norm matching beside a tuned scale: ties replaces it. " if norm_matched else "")
    assert list(controls.draw(data)) == ["pooled_differences"] + norm_matched * ["pooled_norm_matching"]


def test_nothing_merged_has_no_controls():
    data = cells().assign(method="pretrained")
    assert controls.tables(data) == {} == controls.draw(data)


def test_the_spread_over_bases_is_that_of_the_pooled_means_of_the_bases():
    data = cells()
    base, other = (data[data.backbone == name] for name in "BC")
    data = pd.concat([base, other, other.assign(backbone="DD", gained_over_tuned=other.gained_over_tuned + 2)])
    (line,) = controls.over_bases(data, controls.NORM_OVER_TUNED).to_dict("records")
    found = [controls.pooled(data[data.backbone == name]).set_index("condition") for name in ("B", "C", "DD")]
    means = [rows.loc[controls.NORM_OVER_TUNED, "mean"] for rows in found]
    assert line["over bases"] == f"{sum(means) / 3:.1f} ± {pd.Series(means).std():.1f}"
    assert means[2] == pytest.approx(means[1] + 1)
    assert list(line) == ["method", "B", "C", "DD", "over bases"]
    assert line["B"].startswith(f"{means[0]:+.1f} ± ")
