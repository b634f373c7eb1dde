"""What experiments on fine-tuning show: tables, figures and the verdict by the rule that their scripts state."""

import math
import textwrap
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from common.lab import claims, figures
from common.lab.claims import NOT_PUBLISHED, NOT_RUN, Claim, question, where_run
from common.lab.statistics import Interval, spread
from sparsity.studies import density_tables
from sparsity.studies.density_tables import change
from sparsity.studies.equal_accuracy import Margin, frontier, margin_of
from sparsity.studies.finetuning import BEFORE, FOLDED, LIFTED, results
from sparsity.studies.runs import RUN

EQUIVALENT = 10.0  # %: two densities count as equal if the whole interval of their ratio is within this of 1
SEEDS = 3  # at least, for a verdict
PAIRS = (  # of arms: which is compared with which
    ("modified", "vanilla"),
    ("modified", LIFTED),
    (LIFTED, "vanilla"),
    (FOLDED, "vanilla"),
    ("norms folded, then bounded", LIFTED),
    ("JSReLU and zeroth bias, norms free", "vanilla"),
    ("vanilla, MLP norms undecayed", "vanilla"),
    ("vanilla", BEFORE),
)
NAMES = {"density": "density", "equal_density": "density at equal accuracy"}


CAPTIONS = {
    "frontier": "Score against test density while thresholds are raised; each curve begins without any, on the right.",
    "density_along_training": "Density on training batches of fine-tuning.",
    "norm_weights": "Weights of the norms that feed MLPs along fine-tuning.",
    "change_of_density_at_equal_accuracy": "The same, thresholds raised until every arm is equally accurate.",
    "change_of_density": "Ratio of test densities, each arm against another from the same vanilla network.",
}


def relation(interval: Interval) -> str:
    """Return what an interval of a relative change in % says: sparser, denser, equal (within EQUIVALENT), undecided.

    An interval that is whole on one side and within the margin too is called by its side, with "slightly".
    """
    within = interval.low >= -EQUIVALENT and interval.high <= EQUIVALENT
    if interval.sign:
        return ("slightly " if within else "") + ("sparser" if interval.sign < 0 else "denser")
    return "equal" if within else "undecided"


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the relative changes of all PAIRS, in both densities: a row each, with its interval and what it says."""
    rows = []
    for setting in dict.fromkeys(table.setting):
        for metric, name in NAMES.items():
            for variant, reference in (*PAIRS, *_penalised(table)):
                found = change(table, setting, metric, variant, reference)
                if found is not None:
                    low, high = found.ends
                    pair = {"setting": setting, "comparison": f"{variant} / {reference}", "metric": name}
                    rows.append({**pair, "mean": found.mean, "low": low, "high": high, "interval": found})
    return pd.DataFrame(rows)


def _penalised(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return modified paired with each ReLU + L1, the strongest penalty last."""
    return [("modified", name) for name in dict.fromkeys(table.variant) if name.startswith("ReLU + L1")]


def draw(data: pd.DataFrame, metric: str, margin: Margin, score: str) -> dict[str, Figure]:
    """Return the figures: score against density with thresholds, density against E, norms along training, changes.

    Args:
        data: the experiment's table.
        metric, margin: as for `sparsity.studies.equal_accuracy.equal_accuracy`.
        score: what the metric is called on an axis, with its unit.
    """
    table = results(data, metric, margin)
    titles = {name: textwrap.fill(name, 20) for name in table.setting.unique()}
    panel = "setting" if len(titles) > 1 else None
    options = dict(panel=panel, names=titles)
    pruned = frontier(data)
    means = pruned.groupby(["setting", "variant", "kept"], sort=False).mean(numeric_only=True).reset_index()
    means = means.assign(percent=100 * means["density test"]).sort_values("kept")
    means = means[_near(means, f"{metric} test", metric, margin)]
    order = {name: place for place, name in enumerate(dict.fromkeys(table.variant))}
    means = means.sort_values("variant", key=lambda column: column.map(order), kind="stable")
    means = means.sort_values("setting", key=lambda column: column.map(list(titles).index), kind="stable")
    curves = data[(data.split == "train") & (data.step > 1)].pivot(
        index=[*RUN, "step"], columns="metric", values="value"
    )
    curves = curves.reset_index().assign(percent=lambda rows: 100 * rows.density)
    curves = curves.sort_values("variant", key=lambda column: column.map(order), kind="stable")
    curves = curves.sort_values("setting", key=lambda column: column.map(list(titles).index), kind="stable")
    seen = changes(table)
    ends = ["mean", "low", "high"]
    seen[ends] = 1 + seen[ends] / 100  # as ratios, which a logarithmic axis shows evenly
    return {
        "frontier": figures.lines(
            means, x="percent", y=f"{metric} test", by="variant", ylabel=score,
            xlabel="test density, %", **options,
        ),
        "density_along_training": figures.lines(
            curves, x="step", y="percent", by="variant", xlabel="training step",
            ylabel="density, training batches, %", **options,
        ),
        "norm_weights": figures.lines(
            curves, x="step", y="norm_weight", by="variant", xlabel="training step",
            ylabel="mean |weight| of the MLPs' norms", **options,
        ),
    } | {
        f"change_of_{name.replace(' ', '_')}": figures.forest(
            rows, item="comparison", condition="metric", xlabel="ratio of densities", level=1.0, log=True, **options
        )
        for name, rows in seen.groupby("metric", sort=False)
    }  # fmt: skip


def _near(means: pd.DataFrame, column: str, metric: str, margin: Margin) -> pd.Series:
    """Tell which rows are within some margins of vanilla without thresholds: the rest would press all into a line."""
    whole = means[(means.variant == "vanilla") & (means.kept == 1)].set_index("setting")[column]
    lost = means[column] - means.setting.map(whole)
    allowed = means.setting.map(lambda setting: 8 * margin_of(margin, setting))
    return (lost if metric == "loss" else -lost) <= allowed


def compare(data: pd.DataFrame, published: Any, metric: str, margin: Margin, same_setting: str) -> pd.DataFrame:
    """Return the relative changes and the densities of all arms; no figure of the paper's on fine-tuning is known."""
    table, lines = results(data, metric, margin), []
    for setting, part in table.groupby("setting", sort=False):
        for column, name in NAMES.items():
            by_seed = part.pivot(index="seed", columns="variant", values=column)
            for variant, reference in PAIRS:
                if {variant, reference} <= set(by_seed):
                    values = 100 * (by_seed[variant] / by_seed[reference] - 1).dropna()
                    lines.append((f"change of {name}, %: {variant} against {reference}; {setting}", values))
        for variant, rows in part.groupby("variant", sort=False):
            lines.append((f"density on test data, %: {variant}; {setting}", 100 * rows.density))
    return pd.DataFrame(
        dict(quantity=quantity, paper=math.nan, ours=values.mean(), sd=values.std(), n=len(values))
        | dict(same_setting=same_setting)
        for quantity, values in lines
    )


def tables(data: pd.DataFrame, metric: str, margin: Margin, score: str) -> dict[str, pd.DataFrame]:
    """Return the tables: densities, scores, E and norms; and the relative changes with what they say."""
    table = results(data, metric, margin)
    table[["density", "training_density", "dead_units", "equal_density"]] *= 100
    columns = {
        "density": ("density, test, %", 1),
        "equal_density": ("density at equal accuracy, %", 1),
        "score": (score, 1),
        "loss": ("test loss", 3),
        "equal_score": (f"{metric} there", 3 if metric == "loss" else 1),
        "training_density": ("density, training, %", 1),
        "dead_units": ("dead units, %", 1),
        "E": ("E", 2),
        "norm_weight": ("weights of MLP norms", 3),
        "other_norm_weight": ("weights of other norms", 3),
    }
    reached = table.groupby(RUN[:2], sort=False).equal_density.count().rename("runs that reach it").reset_index()
    main = density_tables.means_by_variant(table, columns).replace("nan", "–").merge(reached, on=RUN[:2])
    seen = changes(results(data, metric, margin))
    says = seen.assign(
        text=[f"{interval}: {relation(interval)}" for interval in seen.interval],
    ).pivot(index=["setting", "comparison"], columns="metric", values="text")
    order = list(dict.fromkeys(zip(seen.setting, seen.comparison, strict=True)))
    names = [name for name in NAMES.values() if name in says]
    return {
        "Densities and what they cost (means over layers ± sd over seeds)": main,
        "Changes of test density, % [95 % interval over seeds]": says.loc[order, names].reset_index(),
    }


def verdict(data: pd.DataFrame, metric: str, margin: Margin) -> str:
    """Return the verdict by the rule that experiments 04 and 06 state."""
    table = results(data, metric, margin)
    settings = [name for name in dict.fromkeys(table.setting) if _seeds(table, name) >= SEEDS]
    if not settings:
        return "not run at this scale"
    heads, texts = set(), []
    for name in settings:
        whole = change(table, name, "density", "modified", "vanilla")
        equal, missing = _at_equal_accuracy(table, name)
        heads.add((whole.sign < 0, equal is not None and not missing and equal.sign < 0))
        parts = [f"modified against vanilla {whole} %: {relation(whole)}"]
        for variant, reference in (("modified", LIFTED), (FOLDED, "vanilla")):
            found = change(table, name, "density", variant, reference)
            if found is not None:
                parts.append(f"{variant} against {reference} {found} %: {relation(found)}")
        reach = f"modified does not reach it in {missing} of {_seeds(table, name)} runs" if missing else ""
        parts.append("at equal accuracy " + (reach or f"{equal} %: {relation(equal)}"))
        for variant, reference in _penalised(table)[-1:]:
            found = change(table, name, "equal_density", variant, reference)
            if found is not None and not missing:
                parts.append(f"there against {reference} {found} %: {relation(found)}")
        texts.append(f"{name}: {'; '.join(parts)}")
    if all(pair == (True, True) for pair in heads):
        head = "sparser, also at equal accuracy"
    elif all(sparser for sparser, _ in heads):
        head = "sparser, but not certainly at equal accuracy" + (" in every setting" if len(heads) > 1 else "")
    else:
        head = "not certainly sparser in every setting" if len(settings) > 1 else "not certainly sparser"
    return f"{head}. {'. '.join(texts)}"


def stated_claims(data: pd.DataFrame, metric: str, margin: Margin, claim: str) -> list[Claim]:
    """Return the claim of experiment 04 or 06 with its answer, then what it is by the lift alone and what it costs.

    Args:
        data: the experiment's table.
        metric, margin: as for `sparsity.studies.finetuning.equal_accuracy`.
        claim: of the paper.
    """
    table = results(data, metric, margin)
    settings = [name for name in dict.fromkeys(table.setting) if _seeds(table, name) >= SEEDS]
    shown = settings or list(dict.fromkeys(table.setting))
    seeds, said = min(_seeds(table, name) for name in shown), "" if settings else NOT_RUN

    def changes_of(reference: str) -> list[Interval]:
        found = (change(table, name, "density", "modified", reference) for name in shown)
        return [interval for interval in found if interval]

    whole, lifted = changes_of("vanilla"), changes_of(LIFTED)
    answer = "direction reproduced" if all(x.sign < 0 for x in whole) else "in part"
    answer = answer if any(x.sign < 0 for x in whole) else "not reproduced"
    equal, missing = zip(*(_at_equal_accuracy(table, name) for name in shown), strict=True)
    reach = [f"not reached in {gone} runs" if gone else f"{one} %" for one, gone in zip(equal, missing, strict=True)]
    return [
        Claim("Section VI", claim, NOT_PUBLISHED, claims.intervals(whole, "%", seeds), where_run(said, answer)),
        question("Sparser than vanilla at equal accuracy, by thresholds?", "; ".join(reach[:2]), said),
        question("Sparser than with norms lifted and nothing else?", claims.intervals(lifted, "%", seeds), said),
    ]


def _seeds(table: pd.DataFrame, setting: str) -> int:
    rows = table[(table.setting == setting) & table.variant.isin(["vanilla", "modified"])]
    counts = rows.groupby("variant").seed.nunique()
    return int(counts.min()) if len(counts) == 2 else 0


def _at_equal_accuracy(table: pd.DataFrame, setting: str) -> tuple[Interval | None, int]:
    """Return the change of density at equal accuracy, and in how many runs modified is not as accurate as that."""
    rows = table[(table.setting == setting) & (table.variant == "modified")]
    return change(table, setting, "equal_density", "modified", "vanilla"), int(rows.equal_density.isna().sum())


def remarks(data: pd.DataFrame, metric: str, margin: Margin) -> str:
    """Return what each setting shows, in a paragraph with the numbers of the table."""
    table, texts = results(data, metric, margin), []
    for setting, part in table.groupby("setting", sort=False):
        arms = {name: rows for name, rows in part.groupby("variant", sort=False)}
        lines = [_arm(name, rows, metric) for name, rows in arms.items()]
        texts.append(f"**{setting}.** Test density, then at equal accuracy: {'; '.join(lines)}.")
    return "\n\n".join(texts)


def _arm(name: str, rows: pd.DataFrame, metric: str) -> str:
    equal = rows.equal_density.dropna()
    reached = f"{spread(100 * equal)} %" if len(equal) == len(rows) else f"not reached in {len(rows) - len(equal)} runs"
    digits = 3 if metric == "loss" else 1
    weights = f", |w| {rows.norm_weight.mean():.2f}" if rows.norm_weight.notna().any() else ""
    return f"{name} {spread(100 * rows.density)} %, {reached} ({metric} {spread(rows[metric], digits)}{weights})"
