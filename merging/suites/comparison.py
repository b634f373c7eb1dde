"""One merger in all the forms that have to be compared, and the table of their scores.

Every claim about a merger needs the same rows beside each other: the base merger and SVC on top of it, each at the
merger's own scale and at a scale chosen on validation data after calibration. A further pair averages all tensors that
SVC does not calibrate, so that the effect of the matrices can be told apart from that of the other tensors' scale, and
another has every tensor at the mean norm of the experts' updates (merging.norm_matching), a scale that needs no data.
merging.suites.controls reads these rows as controls of SVC, merging.suites.testbed says where they count.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from common.cache import cached_rows
from common.lab import figures
from common.lab.figures import INK, MUTED, Style
from common.lab.report import comparison_row
from common.lab.statistics import paired_interval, spread, with_bounds
from merging import mergers, tuning
from merging.adapters import Adapter, fold_adapter, merge_adapters
from merging.calibration import SVC_MATRICES, calibrate, published_alpha
from merging.mergers import MERGERS, merger, weight_average
from merging.norm_matching import norm_match
from merging.suites.suite import Rows, Suite
from merging.task_vectors import TaskVector, apply, combine, task_vector

Forms = Mapping[float | None, TaskVector]  # α → calibrated update; None → the merged update itself

REFERENCES = ("pretrained", "expert")
CONDITIONS = {  # what figures show besides mergers
    "pretrained": Style("pretrained", "#B3B3B3"),
    "expert": Style("experts", INK),
    "none": Style("base", MUTED),
    "output": Style("+ SVC", "#0072B2"),
    "input": Style("+ SVC, input space", "#D55E00"),
    "unrelated": Style("sum of unrelated updates", "#A6A6A6"),
}


def merging_styles() -> dict[str, Style]:
    """Return how mergers, references and conditions are written and coloured in figures: name → style."""
    return CONDITIONS | {name: Style(merger(name).title, merger(name).colour) for name in MERGERS}


def dense_forms(
    method: str, updates: Sequence[TaskVector], seed: int, alphas: Sequence[float], **options: Any
) -> Forms:
    """Return the forms of a merger: None → the merged update, and each α → the update calibrated with it.

    Args:
        method: a merger.
        updates: the K task vectors.
        seed: of DARE's masks.
        alphas: floors of the coefficients.
        **options: further options of `calibrate`.
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
    """Return the same forms, as updates of the base's tensors, from adapters: factored LoRA, or IA³ as vectors.

    A merger without a factored form (TIES, DARE) merges LoRA by `dense_forms`.

    Args:
        adapters: the K adapters whose updates of the base are `updates`.
        base: those tensors of the base that the adapters change.
        method, updates, seed, alphas: as for `dense_forms`.
    """
    own = merger(method)
    if adapters[0].kind == "lora" and not own.factored:
        return dense_forms(method, updates, seed, alphas)

    def update(svc: dict[str, float] | None) -> TaskVector:
        merged = merge_adapters(adapters, method, svc, base=base, **own.known(seed=seed))
        return task_vector(fold_adapter(merged, base), base)

    return {None: update(None)} | {alpha: update({"alpha": alpha}) for alpha in alphas}


def variant_rows(suite: Suite, method: str, seed: int, merge: Callable[..., Forms] = dense_forms) -> Rows:
    """Yield the rows of all variants of one merger, scored together.

    The counts gained and lost compare with the tuned base where the scale is tuned, and else with the base at its own
    scale; those that end in "_over_tuned" compare with the tuned, in "_over_norm" with the norm-matched base.

    Args:
        suite, method, seed: as for `suite_rows`.
        merge: maps (method, task vectors, seed, αs) to the forms of a merger.
    """
    found = variants(method, suite.task_vectors(), seed, partial(validation_scores, suite), merge)
    rules = [labels["scale_rule"] for labels, _ in found]  # the first of each rule is the base by that rule
    tuned, matched = rules.index("validation"), rules.index("norm")
    pairs = [{"": tuned if rule == "validation" else 0, "_over_tuned": tuned, "_over_norm": matched} for rule in rules]
    yield from scored(suite, [({"method": method, **labels}, update) for labels, update in found], pairs)


def suite_rows(
    suite: Suite,
    methods: Sequence[str],
    seed: int,
    measure: Callable[[Suite, str, int], Rows] = variant_rows,
    labels: Mapping[str, Any] | None = None,
) -> Rows:
    """Yield all rows of a suite: references, then each merger; each is cached, so that a killed run can be continued.

    Args:
        suite: with experts.
        methods: names of mergers.
        seed: of DARE's masks.
        measure: (suite, method, seed) → the rows of one merger.
        labels: columns to add to all rows; partials of one `measure` must differ in them.
    """
    labels = dict(labels or {})
    rows = cached_rows("reference_models", {"suite": suite.key}, suite.own_rows)
    for method in methods:
        rows += merger_rows(suite, method, seed, measure, labels=labels)
    yield from ({**row, **labels} for row in rows)


def merger_rows(
    suite: Suite, method: str, seed: int, measure: Callable[[Suite, str, int], Rows], **inputs: Any
) -> list[dict[str, Any]]:
    """Return the rows that `measure(suite, method, seed)` yields, from the cache if it has them.

    Args:
        suite, method, seed, measure: as for `suite_rows`.
        **inputs: everything else that the rows depend on.
    """
    inputs |= {"suite": suite.key, "method": method, "seed": seed}
    return cached_rows("merger_rows", inputs, partial(measure, suite, method, seed))


def scored(
    suite: Suite, labelled: Sequence[tuple[dict[str, Any], TaskVector]], pairs: Sequence[dict[str, int]] = ()
) -> Rows:
    """Yield the rows of labelled updates, each applied at its label `scale` (1 if it has none); see `Suite.rows`.

    Args:
        suite: whose tasks are scored.
        labelled: labels (columns) of each update, and the update.
        pairs: as for `Suite.rows`.
    """
    states = [(labels, apply(suite.pretrained, update, labels.get("scale", 1.0))) for labels, update in labelled]
    yield from suite.rows(states, pairs)


def variants(
    method: str,
    updates: Sequence[TaskVector],
    seed: int,
    score: Callable[[TaskVector, Sequence[float]], Sequence[float]],
    merge: Callable[..., Forms] = dense_forms,
) -> list[tuple[dict[str, Any], TaskVector]]:
    """Return the merger's labelled updates: base first, then calibrated; at its own scale, tuned and norm-matched.

    Args:
        method, seed, merge: as for `variant_rows`.
        updates: the K task vectors.
        score: maps (update, scales) to validation scores.

    Returns:
        pairs of labels (svc, alpha, scale_rule, scale, others) and update, which is not scaled yet, but norm-matched
        where scale_rule is "norm" (each tensor) or "norm, whole" (the base by one number).
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
            found.append((labels | dict(scale_rule="norm"), norm_match(update, updates)))
        if alpha is None:
            found.append((labels | dict(scale_rule="norm, whole"), norm_match(update, updates, whole=True)))
    return found


def validation_scores(suite: Suite, update: TaskVector, scales: Sequence[float]) -> list[float]:
    """Return the mean validation accuracy (%) of the update at each scale."""
    return suite.scores([apply(suite.pretrained, update, scale) for scale in scales], "validation")


# Reading the table ---------------------------------------------------------------------------------------------------

BASE, SVC, SVC_1 = "base", "+ SVC (paper)", "+ SVC, α = 1"
BASE_TUNED, SVC_TUNED = "base, tuned scale", "+ SVC (paper), tuned scale"
BASE_MEAN, SVC_MEAN = "base, other tensors averaged", "+ SVC (paper), other tensors averaged"
BASE_NORM, SVC_NORM = "base, norm matching", "+ SVC (paper), norm matching"
BASE_WHOLE = "base, norm matching by one number"
ORDER = (BASE, SVC, SVC_1, BASE_MEAN, SVC_MEAN, BASE_NORM, SVC_NORM, BASE_WHOLE, BASE_TUNED, SVC_TUNED)
CAPTIONS = {
    "accuracy_by_merger": "Mean accuracy of every merger at its own scale, without and with SVC.",
    "accuracy_at_tuned_scales": "The same, each at the scale that is best on validation data.",
    "paired_gains": "What SVC gains in every cell, at the merger's own scale and where both scales are tuned.",
    "in_brief": "Mean accuracy over tasks and suites, at each merger's own scale and at one tuned on validation data.",
}
IN_BRIEF = {  # variant → panel and legend of the figure that sums up
    BASE: ("at the mergers' own scales", BASE),
    SVC: ("at the mergers' own scales", "+ SVC"),
    BASE_TUNED: ("at scales tuned on validation data", BASE),
    SVC_TUNED: ("at scales tuned on validation data", "+ SVC"),
}
CELL = ["backbone", "suite", "method"]  # what comparisons are made within
SVC_GAIN, SVC_OVER_TUNED, TUNED_GAIN = "SVC − base", "SVC − tuned base", "tuned SVC − tuned base"
GAINS = {SVC_GAIN: (SVC, ""), SVC_OVER_TUNED: (SVC, "_over_tuned"), TUNED_GAIN: (SVC_TUNED, "")}


def named(data: pd.DataFrame) -> pd.DataFrame:
    """Return the table with a column `row`, the name of each variant."""
    is_base, is_published = data.svc.ne("output"), has_published_alpha(data)
    tuned, averaged = data.scale_rule.eq("validation"), data.others.eq("mean")
    matched, whole = data.scale_rule.eq("norm"), data.scale_rule.eq("norm, whole")
    names = {
        BASE_TUNED: is_base & tuned,
        BASE_MEAN: is_base & averaged,
        BASE_NORM: is_base & matched,
        BASE_WHOLE: is_base & whole,
        BASE: is_base,
        SVC_1: ~is_published,
        SVC_TUNED: tuned,
        SVC_MEAN: averaged,
        SVC_NORM: matched,
    }
    names = np.select(list(names.values()), list(names), SVC)
    return data.assign(row=names)


def has_published_alpha(data: pd.DataFrame) -> np.ndarray:
    """Return for each row whether its α is that of the paper."""
    published = [published_alpha(*pair) for pair in zip(data.method, data.suite, strict=True)]
    return np.isclose(data.alpha, published, rtol=1e-4)


def by_size(names: Iterable[str]) -> list[str]:
    """Return the different names, short ones first: glyph-96 before glyph-128."""
    return sorted(set(names), key=lambda name: (len(name), name))


def in_order(table: pd.DataFrame, columns: Sequence[str], **orders: Sequence[Any]) -> pd.DataFrame:
    """Return the table sorted by columns; equal rows keep their order.

    Args:
        table: any.
        columns: the most important one first.
        **orders: the values of a column in their order. By default backbones are sorted by size, methods as in
            `MERGERS` after the models that are not merged, and other columns by value.
    """
    found = {name: orders.get(name) or _usual_order(name, table[name]) for name in columns}
    keys = {name: {value: place for place, value in enumerate(values)} for name, values in found.items()}
    return table.sort_values(
        list(columns), key=lambda column: column.map(keys[column.name]), ignore_index=True, kind="stable"
    )


def _usual_order(name: str, values: pd.Series) -> list[Any]:
    if name == "method":
        return [*REFERENCES, *MERGERS]
    return by_size(values) if name == "backbone" else sorted(set(values))


def methods_of(data: pd.DataFrame) -> list[str]:
    """Return the mergers of a table in the order of `MERGERS`."""
    return [method for method in MERGERS if method in set(data.method)]


def models(data: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that score models, merged or not: not those of chance and probes, nor of other metrics."""
    return data[data.method.isin([*REFERENCES, *MERGERS]) & data.metric.isin(["accuracy", "Spearman"])]


def merged(data: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that score merged models."""
    return models(data)[lambda rows: rows.method.isin(MERGERS)]


def seed_means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean accuracy over the tasks, one row for each cell, variant (column `row`) and seed."""
    return rows.groupby([*CELL, "row", "seed"], sort=False).value.mean().reset_index()


def variant_means(data: pd.DataFrame) -> pd.DataFrame:
    """Return the `seed_means` of all variants of a table, cells in order."""
    return in_order(seed_means(named(data)), CELL)


def differences(rows: pd.DataFrame, wanted: Mapping[str, tuple[str, str]], keys: Sequence[str] = CELL) -> pd.DataFrame:
    """Return paired comparisons of every cell, in points with 95 % intervals.

    Args:
        rows: of mergers, with a column `row`.
        wanted: name of a difference → variant (of column `row`), and suffix of the counts gained and lost.
        keys: columns that tell cells apart.

    Returns:
        One row for each cell, in order of appearance, and each difference whose variant it holds: the keys, `condition`
        (the name), `interval`, and its `mean`, `low`, `high` and `sign`.
    """
    found = []
    for cell, part in rows.groupby(list(keys), sort=False, dropna=False):
        for name, (row, suffix) in wanted.items():
            if len(own := part[part.row == row]):
                interval = paired_interval(own, f"gained{suffix}", f"lost{suffix}")
                found.append(dict(zip(keys, cell, strict=True), condition=name, interval=interval, sign=interval.sign))
    return with_bounds(pd.DataFrame(found), "interval")


def gains(data: pd.DataFrame) -> pd.DataFrame:
    """Return what SVC gains in every cell, in the format of `differences`."""
    return differences(in_order(named(merged(data)), CELL), GAINS)


def spread_table(means: pd.DataFrame) -> pd.DataFrame:
    """Return `seed_means` as text, mean ± standard deviation over seeds, with one column for each variant."""
    return means.groupby([*CELL, "row"], sort=False).value.apply(spread).unstack(sort=False).reset_index()


def wide(found: pd.DataFrame, keys: Sequence[str] = CELL) -> pd.DataFrame:
    """Return `differences` as text, with one column for each of them."""
    return found.set_index([*keys, "condition"]).interval.map(str).unstack(sort=False).reset_index()


def draw(data: pd.DataFrame, panel: str = "{backbone}, {suite} tasks", off_scale: str = "") -> dict[str, Figure]:
    """Return the figures of a comparison: every merger at its own and at tuned scales, and what SVC gains.

    Args:
        data: the table.
        panel: title of a panel; the columns in it tell panels apart.
        off_scale: a merger that would flatten the figure, and so is left out unless its scale is tuned.
    """
    means, found = variant_means(merged(data)), gains(data)
    means, found = (x.assign(panel=[panel.format(**row) for row in x[CELL].to_dict("records")]) for x in (means, found))
    shown = means[means.row.isin([BASE, SVC, SVC_1]) & means.method.ne(off_scale)]
    tuned = means[means.row.isin([BASE_TUNED, SVC_TUNED])]
    at_own_scale = found.condition.eq(SVC_GAIN) & found.method.ne(off_scale)
    found = found[at_own_scale | found.condition.eq(TUNED_GAIN)]
    found = in_order(found, ["condition"], condition=(SVC_GAIN, TUNED_GAIN))
    options = dict(condition="row", panel="panel", xlabel="mean accuracy of the tasks, %")
    difference = "difference in mean accuracy, points"
    drawn = {
        "in_brief": _draw_in_brief(means[means.method.ne(off_scale)]),
        "accuracy_by_merger": figures.paired(shown, start=BASE, **options),
        "paired_gains": figures.forest(found, item="method", panel="panel", xlabel=difference),
    }
    if off_scale in set(means.method):
        said = f"Without {figures.label(off_scale)} at its own scale, which is far below the others."
        drawn = {stem: figures.explain(x, f"{figures.explanation(x)} {said}") for stem, x in drawn.items()}
    drawn["accuracy_at_tuned_scales"] = figures.paired(tuned, start=BASE_TUNED, **options)
    return drawn


def _draw_in_brief(means: pd.DataFrame) -> Figure:
    """Draw every merger without and with SVC, at its own and at its tuned scale, as the mean over all cells."""
    means = means[means.row.isin(IN_BRIEF)]
    means = means.groupby(["method", "row", "seed"], sort=False).value.mean().reset_index()
    rules, names = (means.row.map({row: texts[part] for row, texts in IN_BRIEF.items()}) for part in (0, 1))
    return figures.paired(
        means.assign(rule=rules, row=names),
        start=BASE,
        condition="row",
        panel="rule",
        sharex=True,
        xlabel="mean accuracy of all tasks and suites, %",
    )


# Beside the paper ----------------------------------------------------------------------------------------------------

# variant → suffix of the merger's name in `compared`, and `svc` in the published table
OURS_AND_PAPER = {BASE: ("", "none"), SVC: (" + SVC", "output")}


def published_accuracy(
    table: pd.DataFrame, suite: str, backbone: str, merger: str, svc: str, peers: bool = True
) -> tuple[float, str]:
    """Return a published mean score (%) over tasks, if possible the paper's own, and its source if it is another's.

    Args:
        table: `published("merging")` of `common.lab.report`.
        suite: as the table names it, such as "8 vision tasks".
        backbone: as in the paper, ViT-B/32.
        merger: a merger, "pretrained" or "expert".
        svc: none, output or input.
        peers: whether a number of other authors is taken if the paper has none.

    Returns:
        the number (NaN where none is known) and the source in words, empty for the paper itself.
    """
    merger = {"expert": "fine_tuned"}.get(merger, merger)
    wanted = {"suite": suite, "backbone": backbone, "merger": merger, "svc": svc}
    found = table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    own = found[found.source.str.contains("2602.05536")]
    if len(own):
        return own.value.iloc[0], ""
    return (found.value.iloc[0], found.source.iloc[0]) if len(found) and peers else (math.nan, "")


def compared(
    means: pd.DataFrame,
    published: pd.DataFrame,
    number: Callable[[pd.DataFrame, str, int, str, str], tuple[float, str]],
    setting: Callable[[str], str],
    shown: Mapping[str, tuple[str, str]] = OURS_AND_PAPER,
) -> pd.DataFrame:
    """Return the comparison with the published numbers, one row for each cell and variant.

    Args:
        means: `seed_means`, in the order of the comparison.
        published: `published("merging")` of `common.lab.report`.
        number: (published, backbone, suite, method, svc) → the published number, NaN where there is none, and its
            source where that is not the paper.
        setting: maps a backbone to a text that says whether its setting is the paper's.
        shown: variant → what follows the merger's name, and the argument `svc` of `number`. Others are left out.
    """
    lines = []
    for (backbone, suite, method, row), rows in means.groupby([*CELL, "row"], sort=False):
        if row in shown:
            suffix, svc = shown[row]
            paper, source = number(published, backbone, suite, method, svc)
            same = setting(backbone) + (f"; not the paper's: {source}" if source else "")
            line = comparison_row(f"{suite} tasks, {backbone}: {method}{suffix}", rows.value, same, paper)
            lines.append(line | dict(item=method, condition=row))
    return pd.DataFrame(lines)


# The text of a README ------------------------------------------------------------------------------------------------


def tables(data: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables of a README: every variant, paired differences, chosen scales, and tasks one by one."""
    data, shown = models(data), {}
    for backbone in by_size(data.backbone):
        name = f"Accuracy of every variant, {backbone}: mean of the tasks (share of the experts' accuracy), %"
        shown[name] = _variants_table(data[data.backbone == backbone])
    shown["Paired differences in points, 95 % interval"] = wide(gains(data))
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
    """Return in words in how many cells (tuned SVC − tuned base) is above 0: at most half, all, or a number between."""
    share = (signs == 1).mean()
    if share <= 0.5:
        return "does not beat a tuned scale"
    return "beats a tuned scale" if share == 1 else "beats a tuned scale in part"
