"""Whether a suite is a testbed at all, and how much over-accumulation it has: what every verdict on SVC rests on.

The rule, fixed before any run that it judges. A suite (backbone and number of tasks) is a testbed if

    (a) Task Arithmetic, at its own scale or at the one tuned on validation data, scores at least 2 points above the
        pretrained model (mean over tasks and seeds), and
    (b) every expert's update has less than 20 % of the base's norm: ‖τ_i‖ / ‖θ_pre‖ over all tensors that some expert
        changed.

Where merging itself does not work, or experts are trained so hard that they leave the base's neighbourhood, what SVC
does to the merged model says nothing about SVC. Of a suite for which (a) or (b) was not measured the rule says so, and
leaves it in: what is not known has not failed.

Beside it the diagnosis of the plain sum, as in experiment 21, each quantity next to its level by chance, which is that
of unrelated updates with the same spectra: without over-accumulation there is nothing to remove.
"""

import math
from functools import partial
from typing import Any

import pandas as pd

from common.cache import cached_rows
from common.lab.statistics import spread
from merging.calibration import diagnose
from merging.diagnosis import calibrated_matrices, totals, without_null_directions
from merging.interference import NORM as UPDATE_NORM
from merging.interference import update_norms
from merging.mergers import plain_sum, task_arithmetic
from merging.suites import comparison
from merging.suites.comparison import BASE, BASE_TUNED
from merging.suites.suite import Rows, Suite
from merging.unrelated import unrelated

LINEAR, SUM, CHANCE = task_arithmetic.__name__, plain_sum.__name__, "unrelated"  # as they are called in tables
GAIN = 2.0  # points that Task Arithmetic must gain over the pretrained model
LARGEST = 20.0  # % of the base's norm that every expert's update must stay below
DIAGNOSIS = {"s, top tenth": "s, top tenth", "inflation, largest σ": "inflation", "interference": "interference"}
PLACE = ["backbone", "suite"]


def rows(suite: Suite, seed: int, **labels: Any) -> Rows:
    """Yield what the rule and the diagnosis need besides the scores; cached.

    Args:
        suite: with experts.
        seed: of the unrelated updates.
        **labels: columns to add to all rows.
    """
    inputs = {"suite": suite.key, "seed": seed}
    yield from (row | labels for row in cached_rows("testbed", inputs, partial(_rows, suite, seed)))


def judged_rows(settings: Any, suite: Suite, backbone: str, seed: int) -> Rows:
    """Yield all rows of a suite (`comparison.suite_rows`) and those by which it is judged: the `measure` of suites.

    Args:
        settings: with `methods`.
        suite, seed: as for `rows`.
        backbone: of the suite, which knows it already.
    """
    yield from comparison.suite_rows(suite, settings.methods, seed)
    yield from rows(suite, seed)


def _rows(suite: Suite, seed: int) -> Rows:
    updates = suite.task_vectors()
    for task, share in zip(suite.tasks, update_norms(suite.pretrained, updates), strict=True):
        yield dict(method="expert", svc="none", task=task, metric=UPDATE_NORM, value=share)
    for method, own in {SUM: updates, CHANCE: unrelated(updates, seed)}.items():
        found = calibrated_matrices(diagnose(plain_sum(own), own))
        known = totals(map(without_null_directions, found.values()))
        for metric in DIAGNOSIS:
            yield dict(method=method, svc="none", metric=metric, value=known[metric])


# Reading the table ---------------------------------------------------------------------------------------------------


def judged(data: pd.DataFrame) -> pd.DataFrame:
    """Return, for each backbone and suite, what the rule looks at and its answer.

    Args:
        data: a table with the rows of `comparison.suite_rows`, Task Arithmetic among the mergers, and of `rows`.

    Returns:
        columns backbone, suite, gain (of Task Arithmetic over the pretrained model, points; NaN where it was not run),
        largest (update norm, %; NaN where it was not measured) and testbed ("yes", "no" or "not measured").
    """
    means = (
        comparison.variant_means(comparison.models(data)).groupby([*PLACE, "method", "row"], sort=False).value.mean()
    )
    norms = data[data.metric == UPDATE_NORM].groupby(PLACE).value.max()
    lines = []
    for place in dict.fromkeys(zip(*(means.index.get_level_values(key) for key in PLACE), strict=True)):
        known = means[place]
        merged = [known.get((LINEAR, row), float("nan")) for row in (BASE, BASE_TUNED)]
        gain = pd.Series(merged).max() - known.get(("pretrained", BASE), float("nan"))
        largest = norms.get(place, float("nan"))
        known = "yes" if gain >= GAIN and largest < LARGEST else "no"
        lines.append((*place, gain, largest, "not measured" if math.isnan(gain + largest) else known))
    return pd.DataFrame(lines, columns=[*PLACE, "gain", "largest", "testbed"])


def on_testbeds(data: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows (with columns backbone and suite) without those of suites that are no testbeds by the table."""
    found = judged(data)
    places = set(found[found.testbed == "no"][PLACE].itertuples(index=False, name=None))
    return rows[[place not in places for place in rows[PLACE].itertuples(index=False, name=None)]]


def sentence(data: pd.DataFrame) -> str:
    """Return in words which suites are testbeds, and why the others are none or not known to be any."""
    found = judged(data)
    counts = found.testbed.value_counts()
    if counts.get("yes") == len(found):
        return f"All {len(found)} suites are testbeds."
    if counts.get("not measured") == len(found):
        return "Testbeds: not measured in this run."
    reasons = [
        f"{line.backbone}, {line.suite} tasks (Task Arithmetic {line.gain:+.1f} points over the pretrained model, "
        f"updates up to {line.largest:.0f} % of the base's norm)"
        for line in found[found.testbed == "no"].itertuples()
    ]
    unknown = [f"{line.backbone}, {line.suite} tasks" for line in found[found.testbed == "not measured"].itertuples()]
    parts = [f"{counts.get('yes', 0)} of {len(found)} suites are testbeds"]
    parts += [f"no testbed: {'; '.join(reasons)}"] if reasons else []
    parts += [f"not measured in this run: {'; '.join(unknown)}"] if unknown else []
    return f"{'; '.join(parts)}."


def table(data: pd.DataFrame) -> pd.DataFrame:
    """Return the rule's answer and the diagnosis of every suite as text, "measured (by chance)", means over seeds."""
    metrics = data[data.metric.isin(DIAGNOSIS) & data.method.isin([SUM, CHANCE])]
    means = metrics.groupby([*PLACE, "method", "metric"]).value.mean()
    norms = data[data.metric == UPDATE_NORM].groupby(PLACE).value.apply(spread)
    lines = []
    for line in judged(data).itertuples():
        place = (line.backbone, line.suite)
        shown = dict(zip(PLACE, place, strict=True)) | {"testbed": line.testbed}
        gain = "not run" if math.isnan(line.gain) else f"{line.gain:+.1f}"
        shown |= {"Task Arithmetic − pretrained, points": gain, UPDATE_NORM: norms.get(place, "not measured")}
        for metric, name in DIAGNOSIS.items():
            if (*place, SUM, metric) in means:
                own, chance = (means[(*place, method, metric)] for method in (SUM, CHANCE))
                shown[f"{name} (by chance)"] = f"{own:.2f} ({chance:.2f})"
        lines.append(shown)
    return pd.DataFrame(lines)


HEADING = "Which suites are testbeds, and how much the sum of their updates over-accumulates"
