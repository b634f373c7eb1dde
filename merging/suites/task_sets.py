"""Sets of a suite's tasks: which ones are merged, what their weights say beforehand, and what merging then does.

Sets share tasks, so that they are no independent samples. Both designs here are carried into themselves by exchanging
tasks: all sets of one size by every permutation, circular ones by shifts. `merging.suites.prediction` needs that.
"""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from common import evaluation
from common.cache import cached_rows
from merging.interference import features
from merging.mergers import merger, task_arithmetic, weight_average
from merging.suites import comparison
from merging.suites.comparison import BASE, BASE_TUNED, BASE_WHOLE, SVC, SVC_TUNED
from merging.suites.suite import Rows, Suite
from merging.task_vectors import apply
from merging.unrelated import unrelated

Names = tuple[str, ...]

AVERAGE = "average"
DROP_OWN, DROP_TUNED, DROP_AVERAGE = "drop, own scale", "drop, tuned scale", "drop, average"
GAIN_OWN, GAIN_TUNED, TUNED = "SVC's gain, own scales", "SVC's gain, tuned scales", "tuned scale"
TARGETS = {  # in words; merger: Task Arithmetic, whose own scale is 0.3 Σ τ_i
    DROP_OWN: "mean accuracy lost by Task Arithmetic at its own scale, % of the experts'",
    DROP_TUNED: "mean accuracy lost by Task Arithmetic at its tuned scale, % of the experts'",
    DROP_AVERAGE: "mean accuracy lost by the average, % of the experts'",
    GAIN_OWN: "Task Arithmetic + SVC − Task Arithmetic, own scales, points",
    GAIN_TUNED: "Task Arithmetic + SVC − Task Arithmetic, both tuned, points",
    TUNED: "tuned factor of the sum of updates",
}
STARTS = {  # scales that need no data, by the row of a comparison: accuracy there − at the tuned scale, points
    "norm-matched": BASE_WHOLE,
    "own (0.3)": BASE,
    "average (1/K)": AVERAGE,
}
LOSSES = {DROP_OWN: BASE, DROP_TUNED: BASE_TUNED, DROP_AVERAGE: AVERAGE}
GAINS = {GAIN_OWN: (SVC, BASE), GAIN_TUNED: (SVC_TUNED, BASE_TUNED)}


def task_sets(tasks: Sequence[str], sizes: Iterable[int], most: int) -> list[Names]:
    """Return the sets of tasks to merge: all sets of a size if there are at most `most`, else circular ones.

    Tasks are put on a circle in an order drawn at random (`circle`); a random pattern of places, turned round it,
    gives as many sets as there are tasks, in which every task occurs equally often. As many patterns are drawn as
    stay below `most`, at least one. Pairs are always all.

    Args:
        tasks: their names.
        sizes: numbers of tasks of a set, each from 2 to the number of tasks.
        most: sets of each size.

    Raises:
        ValueError: a size is out of range.
    """
    around, found = circle(tasks), []
    for size in sizes:
        if not 2 <= size <= len(tasks):
            raise ValueError(f"a set has 2 to {len(tasks)} tasks here, got {size}")
        if size == 2 or math.comb(len(tasks), size) <= most:
            found += itertools.combinations(tasks, size)
            continue
        draw = random.Random(size)
        for _ in range(max(1, most // len(tasks))):
            pattern = draw.sample(range(len(tasks)), size)
            turned = ({around[(place + shift) % len(tasks)] for place in pattern} for shift in range(len(tasks)))
            found += [tuple(task for task in tasks if task in own) for own in turned]
    return list(dict.fromkeys(found))


def circle(tasks: Sequence[str]) -> list[str]:
    """Return the tasks in the order in which circular designs have them; it depends on their set alone."""
    return random.Random(0).sample(sorted(tasks), len(tasks))


def of_tasks(suite: Suite, names: Sequence[str]) -> Suite:
    """Return the suite of some of its tasks, with their experts."""
    places = [suite.tasks.index(name) for name in names]
    kept = {field: tuple(getattr(suite, field)[place] for place in places) for field in ("networks", "experts")}
    return replace(suite, key=f"{suite.key} {'+'.join(names)}", tasks=tuple(names), adapters=(), **kept)


def rows(suite: Suite, sets: Sequence[Names], seed: int) -> Rows:
    """Yield for each set of tasks its features, from weights alone, and what merging it does; cached together.

    Each row has set (names joined by "+"), tasks (their number), kind ("feature" or "target"), metric and value; where
    a target is a score, also first and second: the same from either half of the test samples.

    Args:
        suite: with all tasks of all sets.
        sets: names of the tasks of each set.
        seed: of the unrelated updates that are the features' chance level.
    """
    inputs = {"suite": suite.key, "sets": sets, "seed": seed}
    yield from cached_rows("task_sets", inputs, partial(_rows, suite, sets, seed))


def _rows(suite: Suite, sets: Sequence[Names], seed: int) -> Rows:
    updates = dict(zip(suite.tasks, suite.task_vectors(), strict=True))
    scattered = dict(zip(suite.tasks, unrelated(list(updates.values()), seed), strict=True))
    needed = dict.fromkeys(task for names in sets for task in names)
    experts = {task: _scores(of_tasks(suite, [task]), [of_tasks(suite, [task]).experts[0]])[0, 0] for task in needed}
    for names in sets:
        labels = {"set": "+".join(names), "tasks": len(names)}
        own, chance = ([vectors[name] for name in names] for vectors in (updates, scattered))
        for metric, value in features(suite.pretrained, own, chance).items():
            yield dict(labels, kind="feature", metric=metric, value=value)
        expert = torch.stack([experts[name] for name in names])  # (K, 3)
        for metric, values in _targets(of_tasks(suite, names), own, expert).items():
            row = dict(labels, kind="target", metric=metric, value=values[0])
            yield row | (dict(first=values[1], second=values[2]) if len(values) > 1 else {})


def _targets(suite: Suite, updates: list[dict[str, Tensor]], expert: Tensor) -> dict[str, list[float]]:
    """Return each target, and STARTS: on all test samples and on either half of them."""
    method = task_arithmetic.__name__
    found = comparison.variants(method, updates, 0, partial(comparison.validation_scores, suite))
    table = pd.DataFrame([labels for labels, _ in found]).assign(method=method, suite=len(updates))
    variants = dict(zip(comparison.named(table).row, found, strict=True))
    wanted = (BASE, BASE_TUNED, BASE_WHOLE, SVC, SVC_TUNED)
    states = [apply(suite.pretrained, update, labels["scale"]) for labels, update in map(variants.get, wanted)]
    states.append(apply(suite.pretrained, weight_average(updates)))
    scores = dict(zip((*wanted, AVERAGE), _scores(suite, states).transpose(0, 1), strict=True))  # name → (K, 3)
    drops = {metric: 100 * (1 - scores[name].mean(0) / expert.mean(0)) for metric, name in LOSSES.items()}
    differences = GAINS | {start: (name, BASE_TUNED) for start, name in STARTS.items()}
    gains = {metric: (scores[name] - scores[base]).mean(0) for metric, (name, base) in differences.items()}
    scale = merger(method).options["scale"] * variants[BASE_TUNED][0]["scale"]
    return {metric: values.tolist() for metric, values in (drops | gains).items()} | {TUNED: [scale]}


def _scores(suite: Suite, states: Sequence[Any]) -> Tensor:
    """Return the scores (%) of S models on each of K tasks, (K, S, 3): all samples, those of even and of odd places."""
    halves = (slice(None), slice(0, None, 2), slice(1, None, 2))
    return torch.tensor(
        [
            [[evaluation.score(own[half], labels[half]) for half in halves] for own in predicted]
            for predicted, labels in suite.answers(states)
        ],
        dtype=torch.float64,
    )
