"""The learning rate of vanilla networks on validation data, at one E = Σ learning rate × weight decay.

Rows of the table are (setting, variant, seed) × learning_rate × metric, all of the split "validation". The variant is
"vanilla" at the rate of the setting's recipe, and "vanilla, other rate" elsewhere. Neither densities nor test data have
a part in the choice, so that it favours no plug-in and no control.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from common.lab.run import Context
from common.lab.statistics import mean_difference, spread
from common.training import TrainingRecipe
from sparsity.studies.images import ImageTask
from sparsity.studies.measurement import measure_all, measure_snapshot
from sparsity.studies.runs import RUN, Run

VALIDATION = "validation"
HEADING = "Learning rate of vanilla, on validation data, at the same E"
METRICS = ("score", "loss", "dead_units")
IN_USE, OTHER = "vanilla", "vanilla, other rate"


def measure(
    name: str,
    task: ImageTask,
    recipe: TrainingRecipe,
    rates: Sequence[float],
    seeds: Sequence[int],
    context: Context,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Train vanilla at each learning rate, with the decay that keeps E, and yield what validation data say of it.

    Args:
        name: of the setting.
        task, recipe: of the setting; its own rate is compared with the others.
        rates: learning rates.
        seeds: of each.
        context: of the experiment.
        options: further fields of `Run`.
    """
    plan = []
    for rate in dict.fromkeys([recipe.learning_rate, *rates]):
        variant = IN_USE if rate == recipe.learning_rate else OTHER
        own = replace(recipe, learning_rate=rate, weight_decay=recipe.learning_rate * recipe.weight_decay / rate)
        for seed in seeds:
            labels = dict(zip(RUN, (name, variant, seed), strict=True)) | {"learning_rate": rate}
            plan.append((labels, Run(task, own, seed=seed, **options)))
    for labels, rows in measure_all(plan, context, partial(measure_snapshot, split=VALIDATION)):
        found = pd.DataFrame(rows)
        for metric, value in found[found.metric.isin(METRICS)].groupby("metric", sort=False).value.mean().items():
            yield labels | {"split": VALIDATION, "layer": "all", "metric": metric, "value": value}


def scores(data: pd.DataFrame) -> dict[str, tuple[float, pd.DataFrame]]:
    """Return, by setting, the rate in use and the validation scores: a row per seed, a column per rate, rising."""
    rows = data[data.split.eq(VALIDATION) & data.metric.eq("score")]
    return {
        setting: (
            part.learning_rate[part.variant == IN_USE].iloc[0],
            part.pivot(index="seed", columns="learning_rate", values="value"),
        )
        for setting, part in rows.groupby("setting", sort=False)
    }


def table(data: pd.DataFrame) -> pd.DataFrame:
    """Return a row per rate: means ± sd over seeds, and the score against that of the rate in use, paired by seed."""
    lines = []
    for setting, (used, by_rate) in scores(data).items():
        for rate in by_rate:
            own = data[data.split.eq(VALIDATION) & data.setting.eq(setting) & data.learning_rate.eq(rate)]
            values = own.pivot(index="seed", columns="metric", values="value")
            lines.append(
                {
                    "setting": setting, "learning rate": f"{rate:g}", "accuracy, %": spread(values.score),
                    "loss, nats": spread(values.loss, 3), "dead units, %": spread(100 * values.dead_units),
                    "accuracy against the rate in use, points [95 %]":
                        "in use" if rate == used else str(mean_difference(by_rate[used], by_rate[rate])),
                    "seeds": len(values),
                }
            )  # fmt: skip
    return pd.DataFrame(lines)


def remark(data: pd.DataFrame) -> str:
    """Return in one sentence for each setting whether validation data would have chosen the rate in use."""
    return "\n\n".join(_sentence(used, by_rate) for used, by_rate in scores(data).values())


def _sentence(used: float, by_rate: pd.DataFrame) -> str:
    best, seeds = by_rate.mean().idxmax(), len(by_rate)
    against = {rate: mean_difference(by_rate[rate], by_rate[best]) for rate in by_rate if rate != best}
    level = ", ".join(f"{rate:g}" for rate, found in against.items() if found.sign == 0)
    head = (
        f"**Learning rate.** Of {len(by_rate.columns)} rates at the same E, by vanilla's accuracy on validation data,"
    )
    if best == used:
        return f"{head} the one in use, {used:g}, is the best (n = {seeds}); not resolved from it: {level or 'none'}."
    word = "which is more" if against[used].sign > 0 else "which is not resolved"
    return f"{head} {best:g} is the best: {against[used]} points above {used:g}, the one in use (n = {seeds}), {word}."
