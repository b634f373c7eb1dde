"""From trained runs to the numbers that one compares: densities, accuracy, E and the factors of the identity.

Rows of the table are (setting, variant, seed) × (split, step, layer) × metric. Layers weigh equally in a mean, as in
the authors' figures. E = Σ learning rate × weight decay over all steps: how strongly weight decay has acted.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from common.cache import Artefact
from common.lab import claims, figures
from common.lab.claims import NOT_RUN, Claim, question
from common.lab.run import Context
from common.lab.statistics import Interval, change_from_one, relative_change, spread
from sparsity.flatness import remaining_multiply_adds
from sparsity.studies.equal_accuracy import PRUNED, VIT_MARGIN, Margin, equal_accuracy, measure_pruned
from sparsity.studies.measurement import Rows, curve, curve_rows, measure_all, measure_snapshot
from sparsity.studies.runs import CONTROLS, RUN, Plan, Run

TEST_METRICS = (
    "density", "derivative_density", "live_density", "dead_units", "union_density", "density_from_flatness",
    "augmented_flatness_key", "coefficient_key", "augmented_flatness_value", "coefficient_value", "input_norm",
    "activation_gradient_active", "squared_derivative", "pre_activation_std",
)  # fmt: skip
CURVE_METRICS = (
    "density", "derivative_density", "augmented_flatness_key", "coefficient_key", "input_norm", "norm_weight",
    "loss", "decay", "other_norm_weight",
)  # fmt: skip


def measure(plan: Plan, context: Context, kept: Sequence[float] = ()) -> Iterator[dict[str, Any]]:
    """Train and measure the runs of a plan, in parallel processes, and yield the table's rows.

    Args:
        plan: see `sparsity.studies.runs.plan_density_tables`.
        context: of the experiment.
        kept: thresholds under which each network is measured too; see `sparsity.studies.equal_accuracy`.
    """
    for labels, (measured, logged, pruned) in measure_all(plan, context, partial(_all_of_one, kept)):
        yield from run_rows(labels, measured, logged)
        yield from ({**labels, "layer": "all", **row} for row in pruned)


def _all_of_one(kept: Sequence[float], run: Run, trained: Artefact, device: torch.device) -> tuple[Rows, Rows, Rows]:
    pruned = measure_pruned(run, trained, device, kept) if kept else []
    return measure_snapshot(run, trained, device), curve(trained), pruned


def run_rows(labels: Mapping[str, Any], measured: Sequence[Mapping], logged: Sequence[Mapping]) -> Iterator[dict]:
    """Yield the table's rows of one run: its test measurements by layer, and its training curve as layer means.

    Args:
        labels: setting, variant, seed and what else tells runs apart.
        measured: what `sparsity.studies.measurement.measure_snapshot` returns.
        logged: what `sparsity.studies.measurement.curve` returns.
    """
    for row in measured:
        if row["layer"] == "all" or row["metric"] in TEST_METRICS:
            yield {**labels, "split": "test", **row}
    yield from ({**labels, **row} for row in curve_rows(logged, CURVE_METRICS, "train"))


def brief_rows(labels: Mapping[str, Any], measured: Sequence[Mapping], logged: Sequence[Mapping]) -> Iterator[dict]:
    """Yield the rows of one run that `finals` reads, a third of `run_rows`: layer means, norms and E at the end alone.

    Args:
        labels, measured, logged: as for `run_rows`.
    """
    rows = pd.DataFrame(row for row in measured if row["layer"] == "all" or row["metric"] in TEST_METRICS)
    for metric, value in rows.groupby("metric", sort=False).value.mean().items():
        yield {**labels, "split": "test", "layer": "all", "metric": metric, "value": value}
    last = max(row["step"] for row in logged)
    for row in curve_rows(logged, CURVE_METRICS, "train"):
        if row["metric"] in ("density", "derivative_density") or row["step"] == last:
            yield labels | row


def finals(data: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run: test numbers (means over layers), training means, final norms and E.

    Training density is the mean over the logged steps of the whole run, without the very first one; beside it stands
    the mean over the last tenth of the steps, since arXiv 2605.25612 does not say over which it averages.
    """
    test = data[data.split == "test"].groupby([*RUN, "metric"], sort=False).value.mean().unstack()
    train = data[(data.split == "train") & (data.step > 1)]
    along = train.groupby([*RUN, "metric"], sort=False).value.mean().unstack()
    end = train.groupby(RUN).step.transform("max")
    late = train[train.step > 0.9 * end].groupby([*RUN, "metric"], sort=False).value.mean().unstack()
    last = train[train.step == end]
    last = last.groupby([*RUN, "metric"], sort=False).value.mean().unstack()
    table = test.assign(
        training_density=along.density,
        late_training_density=late.density,
        training_derivative_density=along.derivative_density,
        E=last.decay,
        norm_weight=last.norm_weight,
        other_norm_weight=last.other_norm_weight,
    )
    forward, _ = remaining_multiply_adds(table.density, table.derivative_density)
    _, backward = remaining_multiply_adds(along.density, along.derivative_density)  # training batches
    return table.assign(forward_left=forward, backward_left=backward).reset_index()


def change(table: pd.DataFrame, setting: str, metric: str, variant: str, reference: str) -> Interval | None:
    """Return by how many % a variant's metric differs from the reference's, paired by seed; None if one is missing."""
    rows = table[table.setting == setting].pivot(index="seed", columns="variant", values=metric)
    if variant not in rows or reference not in rows or (rows[variant] / rows[reference]).dropna().empty:
        return None
    return relative_change(rows[reference], rows[variant])


def means_by_variant(table: pd.DataFrame, columns: Mapping[str, tuple[str, int]]) -> pd.DataFrame:
    """Return a table of means ± standard deviations over seeds, a row per setting and variant.

    Args:
        table: what `finals` returns.
        columns: metric → (heading, digits after the point).
    """
    rows = []
    for (setting, variant), part in table.groupby(RUN[:2], sort=False):
        cells = {heading: spread(part[metric], digits) for metric, (heading, digits) in columns.items()}
        rows.append({"setting": setting, "variant": variant, **cells, "seeds": len(part)})
    return pd.DataFrame(rows)


# What the experiments that train from scratch show -------------------------------------------------------------------

PAPER = {"density": -36.0, "training_density": -50.0}  # relative change in %, "at least": arXiv 2605.25612, abstract
LATE = "late_training_density"
NAMES = {
    "density": "inference density",
    "training_density": "training density",
    LATE: "training density, last tenth of the steps",
}
CONTROL = "vanilla, MLP norms undecayed"
CAPTIONS = {
    "in_brief": "Density on test data: vanilla, with the plug-ins, and vanilla whose MLP norms do not decay.",
    "frontier": "Accuracy (05: loss) against density on test data; sparser is to the left.",
    "density_by_layer": "Density of every MLP on test data.",
    "density_along_training": "Density on training batches along training.",
    "density_against_decay": "The same over E, how strongly weight decay has acted so far.",
    "norm_weights": "Weights of the norms that feed MLPs: decay shrinks them unless they are restricted or left out.",
    "relative_change": "Change of density against vanilla of the same seed.",
}
MARGIN = 10.0  # %: within it modified and control count as equally dense


def draw(data: pd.DataFrame, score: str = "accuracy, %", metric: str = "score") -> dict[str, Figure]:
    """Return the figures: score against density, density by layer, along training and against E, relative changes.

    Args:
        data: the experiment's table.
        score: what stands on the other axis of the first figure, with its unit.
        metric: its name in the table: "score" or "loss".
    """
    table = finals(data)
    table = table.assign(percent=100 * table.density)
    layers = data[(data.split == "test") & (data.metric == "density") & data.variant.isin(CONTROLS)]
    layers = layers.assign(number=pd.factorize(layers.layer)[0] + 1, percent=100 * layers.value)
    curves = data[(data.split == "train") & data.variant.isin(CONTROLS)]
    keys = [*RUN, "step"]
    curves = curves.pivot(index=keys, columns="metric", values="value").reset_index()
    curves = curves.assign(percent=100 * curves.density, E=curves.decay.round(3))
    curves = curves.sort_values("variant", key=lambda column: column.map(CONTROLS.index), kind="stable")
    panel = "setting" if table.setting.nunique() > 1 else None
    titles = {name: textwrap.fill(name, 24) for name in table.setting.unique()}
    options = dict(y="percent", by="variant", panel=panel, names=titles)
    brief = table[table.variant.isin(CONTROLS[:3])]
    return {
        "in_brief": figures.paired(
            brief, item="setting", condition="variant", value="percent", start="vanilla", names=titles,
            xlabel="density on test data, %",
        ),
        "frontier": figures.frontier(
            table, x="percent", y=metric, panel=panel, names=titles, xlabel="density on test data, %", ylabel=score
        ),
        "density_by_layer": figures.lines(layers, x="number", xlabel="MLP", ylabel="density, test data, %", **options),
        "density_along_training": figures.lines(
            curves, x="step", xlabel="training step", ylabel="density, training batches, %", **options
        ),
        "density_against_decay": figures.lines(
            curves, x="E", xlabel="E = Σ rate × weight decay", ylabel="density, training batches, %", **options
        ),
        "norm_weights": figures.lines(
            curves, x="E", xlabel="E = Σ rate × weight decay", ylabel="mean |weight| of the MLPs' norms",
            **options | dict(y="norm_weight"),
        ),
        "relative_change": figures.forest(
            _changes(table), item="variant", condition="metric", panel=panel, names=NAMES | titles,
            xlabel="change against vanilla, % (95 %)",
        ),
    }  # fmt: skip


def _changes(table: pd.DataFrame, metrics: Sequence[str] = tuple(PAPER)) -> pd.DataFrame:
    """Return the changes against vanilla: a row per setting, variant and metric, with interval and text."""
    rows = []
    for (setting, variant), _ in table.groupby(RUN[:2], sort=False):
        for metric in metrics:
            found = change(table, setting, metric, variant, "vanilla") if variant != "vanilla" else None
            if found:
                low, high = found.ends
                row = {"setting": setting, "variant": variant, "metric": metric, "text": str(found)}
                rows.append({**row, "mean": found.mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def compare(data: pd.DataFrame, published: pd.DataFrame, same_setting: str) -> pd.DataFrame:
    """Return the relative changes of density beside the paper's, then absolute densities beside what is known."""
    table, lines = finals(data), []
    for setting, part in table.groupby("setting", sort=False):
        for metric, paper in (PAPER | {LATE: PAPER["training_density"]}).items():
            for variant, reference in (("modified", "vanilla"), ("modified", CONTROL), (CONTROL, "vanilla")):
                by_seed = part.pivot(index="seed", columns="variant", values=metric)
                if {variant, reference} <= set(by_seed):
                    values = 100 * (by_seed[variant] / by_seed[reference] - 1)
                    known = paper if (variant, reference) == ("modified", "vanilla") else math.nan
                    quantity = f"change of {NAMES[metric]}, %: {variant} against {reference}; {setting}"
                    lines.append((quantity, known, values.dropna()))
        for variant, rows in part.groupby("variant", sort=False):
            lines.append((f"density on test data, %: {variant}; {setting}", math.nan, 100 * rows.density))
    return pd.DataFrame(
        [
            dict(quantity=quantity, paper=paper, ours=values.mean(), sd=values.std(), n=len(values))
            | dict(same_setting=same_setting)
            for quantity, paper, values in lines
        ]
    )


def tables(
    data: pd.DataFrame, score: str, metric: str = "score", margin: Margin = VIT_MARGIN
) -> dict[str, pd.DataFrame]:
    """Return the tables: densities and what they cost; the factors of the identity; changes against vanilla.

    Args:
        data: the experiment's table.
        score: the name of the metric of its task, with its unit.
        metric, margin: what equal accuracy means, as for `sparsity.studies.equal_accuracy.equal_accuracy`; a fourth
            table says how dense networks are there, where the table has thresholds.
    """
    table = finals(data)
    shares = ["density", "training_density", LATE, "live_density", "dead_units", "derivative_density", "union_density"]
    shares += ["forward_left", "backward_left"]
    table[shares] = 100 * table[shares]
    main = {
        "density": ("density, test, %", 1),
        "training_density": ("density, training, %", 1),
        LATE: ("density, training, last tenth, %", 1),
        "live_density": ("live density, %", 1),
        "dead_units": ("dead units, %", 1),
        "derivative_density": ("derivative density, %", 1),
        "union_density": ("union density of a batch, %", 1),
        "score": (score, 1),
        "loss": ("test loss", 3),
        "score without MLPs": (f"{score} without MLPs", 1),
        "forward_left": ("forward multiply-adds left, %", 1),
        "backward_left": ("backward multiply-adds left, %", 1),
        "E": ("E", 2),
        "norm_weight": ("weights of MLP norms", 3),
        "other_norm_weight": ("weights of other norms", 3),
    }
    factors = {
        "augmented_flatness_key": ("AF_K (numerator)", 6),
        "coefficient_key": ("C_0 (denominator)", 6),
        "input_norm": ("‖x‖²", 2),
        "activation_gradient_active": ("E[g² | active]", 8),
        "squared_derivative": ("E σ'²", 3),
        "density_from_flatness": ("AF_K / (T d_ff C_0)", 4),
        "pre_activation_std": ("sd of p", 3),
    }
    seen = _changes(table, tuple(NAMES))
    changes = seen.pivot(index=RUN[:2], columns="metric", values="text").rename(columns=NAMES)
    order = list(dict.fromkeys(zip(seen.setting, seen.variant, strict=True)))
    return {
        "Densities and what they cost (means over layers ± sd over seeds)": means_by_variant(table, main),
        "Factors of the identity on test data, per sample (means over layers)": means_by_variant(table, factors),
        "Change against vanilla, % [95 % interval over seeds]": changes.loc[order, list(NAMES.values())].reset_index(),
    } | _at_equal_accuracy(data, metric, margin)


def _at_equal_accuracy(data: pd.DataFrame, metric: str, margin: Margin) -> dict[str, pd.DataFrame]:
    """Return how dense networks are with thresholds as high as accuracy allows; nothing where none was measured."""
    if not data.split.isin(PRUNED).any():
        return {}
    found, rows = equal_accuracy(data, metric, margin), []
    for setting, variant in data[data.split.isin(PRUNED)][RUN[:2]].drop_duplicates().itertuples(index=False):
        part = found[(found.setting == setting) & (found.variant == variant)]
        changes = {
            reference: change(found, setting, "equal_density", variant, reference) for reference in ("vanilla", CONTROL)
        }
        rows.append(
            {"setting": setting, "variant": variant, "density, test, %": spread(100 * part.equal_density)}
            | {f"{metric} there": spread(part.equal_score, 3 if metric == "loss" else 1)}
            | {
                f"against {reference}, % [95 %]": "" if seen is None or variant == reference else str(seen)
                for reference, seen in changes.items()
            }
            | {"seeds": len(part), "runs that reach it": part.equal_density.count()}
        )
    heading = "At equal accuracy: thresholds on activations, without training, as high as validation data allow"
    return {heading: pd.DataFrame(rows)}


def verdict(data: pd.DataFrame) -> str:
    """Return the verdict by the rule that experiments 03 and 05 state."""
    table = finals(data)
    settings = _judged_settings(table)
    if not settings:
        return NOT_RUN
    found = {metric: [change(table, name, metric, "modified", "vanilla") for name in settings] for metric in PAPER}
    head, texts = _head(found), []
    for index, name in enumerate(settings):
        beyond = change(table, name, "density", "modified", CONTROL)
        inference, training = found["density"][index], found["training_density"][index]
        late = change(table, name, LATE, "modified", "vanilla")
        against = f"against vanilla with undecayed MLP norms {beyond} %: {beside_control(beyond)}"
        texts.append(f"{name}: inference {inference} %, training {training} % (last tenth {late} %); {against}")
    return f"{head}. {'. '.join(texts)}"


def _judged_settings(table: pd.DataFrame) -> list[str]:
    """Return the settings of which the rule speaks: three seeds or more of vanilla, modified and the control."""
    seeds = table[table.variant.isin(["vanilla", "modified", CONTROL])].groupby(["setting", "variant"]).seed.nunique()
    return [name for name in table.setting.unique() if len(seeds[name]) == 3 and seeds[name].min() >= 3]


def _head(found: Mapping[str, Sequence[Interval]]) -> str:
    """Return the first words of the verdict on the intervals of some metrics, one for each setting."""
    if all(interval.high <= PAPER[metric] for metric, intervals in found.items() for interval in intervals):
        return "reproduced"
    below = all(interval.high < 0 for intervals in found.values() for interval in intervals)
    return "direction reproduced" if below else "not reproduced"


def stated_claims(data: pd.DataFrame) -> list[Claim]:
    """Return the claims of experiments 03 and 05: both densities against vanilla, and inference against the control."""
    table = finals(data)
    settings = _judged_settings(table)
    shown = settings or list(table.setting.unique())
    seeds = table[table.setting.isin(shown) & table.variant.eq("modified")].groupby("setting").seed.nunique().min()

    def changes(metric: str, reference: str) -> list[Interval]:
        found = (change(table, name, metric, "modified", reference) for name in shown)
        return [interval for interval in found if interval]

    stated = []
    for metric, paper in PAPER.items():
        found = changes(metric, "vanilla")
        verdict = _head({metric: found}) if settings else NOT_RUN
        text = f"The plug-ins cut {NAMES[metric]} by at least {-paper:g} %, against vanilla"
        stated.append(Claim("abstract", text, f"≤ {paper:g} %", claims.intervals(found, "%", seeds), verdict))
    against = claims.intervals(changes("density", CONTROL), "%", seeds)
    text = "Are they sparser than vanilla whose MLP norms do not decay? (inference density)"
    return [*stated, question(text, against, "" if settings else NOT_RUN)]


def beside_control(found: Interval) -> str:
    """Return in words what the relative change of density against the control says.

    The whole 95 % interval has to lie within MARGIN for "equal": that is stricter than the usual two one-sided tests at
    5 %, which take the 90 % interval.
    """
    if found.high < 0:
        return "beyond the control" + (f", by less than {MARGIN:g} %" if found.low > -MARGIN else "")
    if max(-found.low, found.high) < MARGIN:
        return f"equal to the control within {MARGIN:g} %"
    return "denser than the control" if found.low > 0 else "undecided against the control"


def remarks(data: pd.DataFrame) -> str:
    """Return what the effect is, in one paragraph per setting, with the numbers of the table, and pooled over them."""
    table, texts = finals(data), []
    for setting, part in table.groupby("setting", sort=False):
        means = part.groupby("variant").mean(numeric_only=True)
        if {"vanilla", "modified", CONTROL} <= set(means.index):
            texts.append(f"**{setting}.** {_remark(means)} {_share_of_control(table, setting)}".rstrip())
    if len(texts) > 1:
        texts.append(_pooled(table))
    return "\n\n".join(texts)


def _share_of_control(table: pd.DataFrame, setting: str) -> str:
    """Return how much of the effect the control has, seed by seed, where the effect has a sign."""
    whole = change(table, setting, "density", "modified", "vanilla")
    logs = np.log(table[table.setting == setting].pivot(index="seed", columns="variant", values="density"))
    shares = 100 * ((logs[CONTROL] - logs.vanilla) / (logs.modified - logs.vanilla)).dropna()
    if len(shares) < 2:
        return ""
    if whole.sign == 0:
        return "The effect itself is undecided, so that the control's share of it means nothing."
    span = f"{shares.min():.0f} to {shares.max():.0f} % (n = {len(shares)})"
    return f"The control's share of the effect, seed by seed: {span}."


def _pooled(table: pd.DataFrame) -> str:
    """Return the change against the control over all settings, each (setting, seed) counting once."""
    by_run = table.pivot(index=["setting", "seed"], columns="variant", values="density")
    ratios = (by_run.modified / by_run[CONTROL]).dropna()
    found = change_from_one(ratios)
    return (
        f"**Over all settings**, modified against vanilla with undecayed MLP norms: {found} % "
        f"(n = {len(ratios)} pairs, {ratios.index.unique('setting').size} settings): {beside_control(found)}. The "
        "interval is over pairs; it does not speak of settings that are not here."
    )


def _remark(means: pd.DataFrame) -> str:
    vanilla, modified, control = means.loc["vanilla"], means.loc["modified"], means.loc[CONTROL]

    def ratio(metric: str) -> float:
        return modified[metric] / vanilla[metric]

    whole, alone = math.log(ratio("density")), math.log(control.density / vanilla.density)
    text = (
        f"With E = {vanilla.E:.1f}, test density goes from {100 * vanilla.density:.1f} % (vanilla) to "
        f"{100 * modified.density:.1f} % (modified), {100 * (ratio('density') - 1):+.0f} %; leaving the norms that "
        f"feed MLPs out of the decay of the vanilla network alone gives {100 * control.density:.1f} %, "
        f"{100 * (control.density / vanilla.density - 1):+.0f} %"
    )
    text += f", that is {100 * alone / whole:.0f} % of the effect in logarithms. " if whole < 0 else ". "
    text += (
        f"Vanilla's norm weights end at {vanilla.norm_weight:.2f}, the restricted ones at {modified.norm_weight:.2f}. "
        f"In the identity density = AF_K / (T d_ff C_0) the numerator changes by a factor "
        f"{ratio('augmented_flatness_key'):.2g} and the denominator by {ratio('coefficient_key'):.2g}: the squared "
        f"input norm by {ratio('input_norm'):.2g}, the activation gradient of active entries by "
        f"{ratio('activation_gradient_active'):.2g}, σ'² by {ratio('squared_derivative'):.2g}. "
        f"Dead units: {100 * vanilla.dead_units:.1f} % in vanilla, {100 * modified.dead_units:.1f} % in modified; "
        f"among live units density changes by {100 * (ratio('live_density') - 1):+.0f} %. "
    )
    direction = "rises" if ratio("augmented_flatness_key") > 1 else "falls"
    return text + f"AF_K {direction}; it depends on the scale of x, so that by itself it says nothing about flatness."
