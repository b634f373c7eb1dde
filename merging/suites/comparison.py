"""One merger in all the forms that have to be compared, and the table of their scores.

Every claim about a merger needs the same rows beside each other: the base merger and SVC on top of it, each at the
merger's own scale and at a scale chosen on validation data after calibration, and with the tensors that SVC leaves
alone averaged, so that what the matrices do and what the scale of all others does can be told apart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from common.cache import cached_rows
from common.lab.figures import INK, MUTED, Style
from common.lab.statistics import paired_interval, spread, with_bounds
from merging import mergers, tuning
from merging.adapters import Adapter, fold_adapter, merge_adapters
from merging.calibration import SVC_MATRICES, calibrate, published_alpha
from merging.mergers import MERGERS, merger, weight_average
from merging.suites.suite import Rows, Suite
from merging.task_vectors import TaskVector, apply, combine, task_vector

Forms = Mapping[float | None, TaskVector]  # α → calibrated update; None → the merged update itself

REFERENCES = ("pretrained", "expert")
CONDITIONS = {  # beside the mergers, in figures
    "pretrained": Style("pretrained", "#B3B3B3"),
    "expert": Style("experts", INK),
    "none": Style("base", MUTED),
    "output": Style("+ SVC", "#0072B2"),
    "input": Style("+ SVC, input space", "#D55E00"),
    "unrelated": Style("sum of unrelated updates", "#A6A6A6"),
}


def merging_styles() -> dict[str, Style]:
    """Return how mergers, references and conditions are written and coloured in the figures of experiments."""
    return CONDITIONS | {name: Style(merger(name).title, merger(name).colour) for name in MERGERS}


def dense_forms(
    method: str, updates: Sequence[TaskVector], seed: int, alphas: Sequence[float], **options: Any
) -> Forms:
    """Return the merged update under None, and under each α what SVC makes of it.

    Args:
        method: a merger.
        updates: the K task vectors.
        seed: of DARE's masks.
        alphas: floors of the coefficients.
        **options: further ones of `calibrate`.
    """
    merged = mergers.merge(method, updates, seed)
    return {None: merged} | {alpha: calibrate(merged, updates, alpha=alpha, **options) for alpha in alphas}


def adapter_forms(
    adapters: Sequence[Adapter],
    base: TaskVector,
    method: str,
    updates: Sequence[TaskVector],
    seed: int,
    alphas: Sequence[float],
) -> Forms:
    """Return the same forms from adapters, LoRA in factored form and IA³ as vectors, as updates of the base's tensors.

    Args:
        adapters: the K adapters whose updates of the base are `updates`.
        base: state of what they change.
        method, seed, alphas: as for `dense_forms`, to which mergers without a factored form (TIES, DARE) are left on
            LoRA.
    """
    own = merger(method)
    if adapters[0].kind == "lora" and not own.factored:
        return dense_forms(method, updates, seed, alphas)

    def update(svc: dict[str, float] | None) -> TaskVector:
        merged = merge_adapters(adapters, method, svc, base=base, **own.known(seed=seed))
        return task_vector(fold_adapter(merged, base), base)

    return {None: update(None)} | {alpha: update({"alpha": alpha}) for alpha in alphas}


def suite_rows(
    suite: Suite,
    methods: Sequence[str],
    seed: int,
    merge: Callable[..., Forms] = dense_forms,
    labels: Mapping[str, Any] | None = None,
) -> Rows:
    """Yield all rows of a suite: references, then each merger; cached one by one, so that a killed run goes on.

    Args:
        suite: with experts.
        methods: mergers.
        seed: of the masks.
        merge: another way from (method, task vectors, seed, αs) to the same forms, such as `adapter_forms`.
        labels: columns to add to all rows; they must tell one `merge` from another.
    """
    labels = dict(labels or {})
    updates = [task_vector(expert, suite.pretrained) for expert in suite.experts]
    rows = cached_rows("reference_models", {"suite": suite.key}, suite.own_rows)
    for method in methods:
        inputs = {"suite": suite.key, "method": method, "seed": seed, "labels": labels}
        build = partial(merger_rows, suite, updates, method, seed, merge)
        rows += cached_rows("merger_variants", inputs, build)
    yield from ({**row, **labels} for row in rows)


def merger_rows(
    suite: Suite, updates: Sequence[TaskVector], method: str, seed: int, merge: Callable[..., Forms]
) -> Rows:
    """Yield the rows of all variants of one merger, scored together.

    Counts of pairs: against the base by the same rule of the scale, and, "_over_tuned", against the tuned base.
    """
    found = variants(method, updates, seed, partial(validation_scores, suite), merge)
    rules = [labels["scale_rule"] for labels, _ in found]  # the first of each rule is the base by that rule
    pairs = [{"": rules.index(rule), "_over_tuned": rules.index("validation")} for rule in rules]
    states = [apply(suite.pretrained, update, labels["scale"]) for labels, update in found]
    labelled = [({"method": method, **labels}, state) for (labels, _), state in zip(found, states, strict=True)]
    yield from suite.rows(labelled, pairs)


def variants(
    method: str,
    updates: Sequence[TaskVector],
    seed: int,
    score: Callable[[TaskVector, Sequence[float]], Sequence[float]],
    merge: Callable[..., Forms] = dense_forms,
) -> list[tuple[dict[str, Any], TaskVector]]:
    """Return the merger's labelled updates: base first, then calibrated; own and tuned scale, other tensors averaged.

    Args:
        method, updates, seed, merge: as for `suite_rows`.
        score: maps (update, scales) to validation scores.
    """
    published = published_alpha(method, len(updates))
    mean = weight_average(updates)
    found = []
    for alpha, update in merge(method, updates, seed, list(dict.fromkeys([published, 1.0]))).items():
        labels = dict(svc="output" if alpha else "none", alpha=alpha, scale_rule="fixed", scale=1.0, others="own")
        found.append((labels, update))
        if alpha in (None, published):
            tuned = tuning.tune_scale(partial(score, update))
            found.append((labels | dict(scale_rule="validation", scale=tuned), update))
            averaged = combine(update, mean, SVC_MATRICES)
            if any(not averaged[name].equal(update[name]) for name in update):
                found.append((labels | dict(others="mean"), averaged))
    return found


def validation_scores(suite: Suite, update: TaskVector, scales: Sequence[float]) -> list[float]:
    """Return the mean validation accuracy (%) of the update at each scale."""
    return suite.scores([apply(suite.pretrained, update, scale) for scale in scales], "validation")


# Reading the table ---------------------------------------------------------------------------------------------------

BASE, SVC, SVC_1 = "base", "+ SVC (paper)", "+ SVC, α = 1"
BASE_TUNED, SVC_TUNED = "base, tuned scale", "+ SVC (paper), tuned scale"
BASE_MEAN, SVC_MEAN = "base, other tensors averaged", "+ SVC (paper), other tensors averaged"
ORDER = (BASE, SVC, SVC_1, BASE_MEAN, SVC_MEAN, BASE_TUNED, SVC_TUNED)
CELL = ["backbone", "suite", "method"]  # what comparisons are made within
GAINS = {"SVC − base": SVC, "tuned SVC − tuned base": SVC_TUNED}


def named(data: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a column `row`, the name of each variant."""
    published = [published_alpha(*pair) for pair in zip(data.method, data.suite, strict=True)]
    is_base, is_published = data.svc.ne("output"), np.isclose(data.alpha, published, rtol=1e-4)
    tuned, averaged = data.scale_rule.eq("validation"), data.others.eq("mean")
    names = np.select(
        [is_base & tuned, is_base & averaged, is_base, ~is_published, tuned, averaged],
        [BASE_TUNED, BASE_MEAN, BASE, SVC_1, SVC_TUNED, SVC_MEAN],
        SVC,
    )
    return data.assign(row=names)


def by_size(names: Any) -> list[str]:
    """Return the different names, short ones first: glyph-96 before glyph-128."""
    return sorted(set(names), key=lambda name: (len(name), name))


def in_order(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return the table sorted by columns: backbones by size, methods as in the table of mergers, suites by size."""
    order = dict(backbone=by_size, method=lambda names: [*REFERENCES, *MERGERS], suite=lambda sizes: sorted(set(sizes)))
    keys = {name: order[name](table[name]) for name in columns}
    return table.sort_values(columns, key=lambda column: column.map(keys[column.name].index), ignore_index=True)


def methods_of(data: pd.DataFrame) -> list[str]:
    """Return the mergers of a table in the order of the library's."""
    return [method for method in MERGERS if method in set(data.method)]


def models(data: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of models, merged or not: without chance, probes and the like."""
    return data[data.method.isin([*REFERENCES, *MERGERS])]


def panels(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table in order, with a column `panel` that names backbone and suite."""
    table = in_order(table, CELL)
    return table.assign(panel=table.backbone + ", " + table.suite.map("{} tasks".format))


def seed_means(data: pd.DataFrame) -> pd.DataFrame:
    """Return the mean accuracy over the tasks, one row for each cell, variant and seed."""
    return named(data).groupby([*CELL, "row", "seed"], sort=False).value.mean().reset_index()


def intervals(data: pd.DataFrame) -> pd.DataFrame:
    """Return the paired comparisons of every cell, in points with 95 % intervals."""
    data, found = named(data), []
    for cell, rows in data[data.method.isin(MERGERS)].groupby(CELL):
        fixed, tuned = rows[rows.row == SVC], rows[rows.row == SVC_TUNED]
        gains = {
            "SVC − base": paired_interval(fixed),
            "SVC − tuned base": paired_interval(fixed, "gained_over_tuned", "lost_over_tuned"),
            "tuned SVC − tuned base": paired_interval(tuned),
        }
        found.append(dict(zip(CELL, cell, strict=True)) | gains)
    return in_order(pd.DataFrame(found), CELL)


def long_gains(data: pd.DataFrame) -> pd.DataFrame:
    """Return both kinds of gains, one row an interval with its bounds, for a forest plot."""
    return with_bounds(intervals(data).melt(CELL, list(GAINS), "condition"), "value")


def compared(
    data: pd.DataFrame, paper: Callable[[str, int, str, str], tuple[float, str]], setting: Callable[[str], str]
) -> pd.DataFrame:
    """Return the comparison with the published numbers: base and "+ SVC (paper)" of every cell.

    Args:
        data: the table.
        paper: maps (backbone, suite, method, svc) to a published number, NaN where there is none, and its source where
            that is not the paper.
        setting: maps a backbone to whether its setting is the paper's.
    """
    means = seed_means(data)
    means, lines = in_order(means[means.row.isin([BASE, SVC])], CELL), []
    for (backbone, suite, method, row), rows in means.groupby([*CELL, "row"], sort=False):
        number, source = paper(backbone, suite, method, "output" if row == SVC else "none")
        same = setting(backbone) + (f"; not the paper's: {source}" if source else "")
        quantity = f"{suite} tasks, {backbone}: {method}{' + SVC' if row == SVC else ''}"
        ours = dict(ours=rows.value.mean(), sd=rows.value.std(), n=len(rows))
        lines.append(dict(quantity=quantity, paper=number, **ours, same_setting=same))
    return pd.DataFrame(lines)


def tables(data: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables of a README: every variant, paired differences, chosen scales, and tasks one by one."""
    wide, shown = intervals(data), {}
    for backbone in by_size(data.backbone):
        name = f"Accuracy of every variant, {backbone}: mean of the tasks (share of the experts' accuracy), %"
        shown[name] = _variants_table(data[data.backbone == backbone])
    shown["Paired differences in points, 95 % interval"] = wide.map(lambda x: x if isinstance(x, str | int) else str(x))
    tuned = data[data.scale_rule == "validation"].groupby(["backbone", "suite", "svc", "method"]).scale.mean()
    chosen = in_order(tuned.unstack()[methods_of(data)].reset_index(), ["backbone", "suite"])
    shown["Scales chosen on validation (mean over seeds)"] = chosen
    return shown | dict(_tasks_tables(data))


def _tasks_tables(data: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    smallest = by_size(data.backbone)[0]
    for suite, rows in named(data).groupby("suite"):
        rows = rows[(rows.backbone == smallest) & rows.row.isin([BASE, SVC])]
        means = rows.groupby(["method", "row", "task"], sort=False).value.mean().unstack()
        means = means[list(dict.fromkeys(rows.task))].round(1)
        yield f"Task by task, {suite} tasks, {smallest}, %", means.reset_index()


def _variants_table(data: pd.DataFrame) -> pd.DataFrame:
    experts = data[data.method == "expert"][["suite", "seed", "task", "value"]]
    both = named(data).merge(experts, on=["suite", "seed", "task"], suffixes=("", "_expert"))
    both["share"] = 100 * both.value / both.value_expert
    means = both.groupby(["method", "row", "suite", "seed"])[["value", "share"]].mean().reset_index()
    lines = []
    for method in [*REFERENCES, *methods_of(data)]:
        for row in ORDER:
            rows = means[(means.method == method) & (means.row == row)].groupby("suite")
            texts = {f"{suite} tasks": f"{spread(part.value)} ({part.share.mean():.1f})" for suite, part in rows}
            lines += [dict(method=method, row=row if method in MERGERS else "") | texts] if texts else []
    return pd.DataFrame(lines)


def counted(signs: pd.Series) -> str:
    """Return how often intervals lie above and below 0: "above in 5 and below in 4 of 54"."""
    return f"above in {(signs == 1).sum()} and below in {(signs == -1).sum()} of {len(signs)}"


def beats(signs: pd.Series) -> str:
    """Return in words how often (tuned SVC − tuned base) is above 0: always, in at most half of the cells, or else."""
    share = (signs == 1).mean()
    if share <= 0.5:
        return "does not beat a tuned scale"
    return "beats a tuned scale" if share == 1 else "beats a tuned scale in part"
