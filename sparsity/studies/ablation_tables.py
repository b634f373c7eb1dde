"""What experiment 07 shows: densities by condition with intervals, their changes, rates, attacks, and the verdict."""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from common.lab import claims, figures
from common.lab.claims import NOT_RUN, Claim, question, where_run
from common.lab.report import comparison_row
from common.lab.statistics import Interval, change_from_one, relative_change, spread, with_bounds
from sparsity.studies import density_tables
from sparsity.studies.ablations import ALONE, FACTORS, LEFT_OUT, NOISY, TUNED
from sparsity.studies.density_tables import CONTROL, PAPER, change
from sparsity.studies.finetuning import LIFTED
from sparsity.studies.finetuning_tables import relation
from sparsity.studies.robustness import ATTACK, COVERING, NOISE
from sparsity.studies.runs import RUN

SEEDS = 3  # at least, for a verdict
SAME_E = 0.02  # two settings have the same E = Σ rate × decay if it differs by less than this share
KINDS = {"vanilla": "references", CONTROL: "references"}
DENSITIES = {"density": "test", "training_density": "training, whole run", "late_density": "training, last tenth"}


def size_relation(interval: Interval) -> str:
    """Return what `relation` says of two densities in the words for two sizes."""
    return relation(interval).replace("sparser", "smaller").replace("denser", "larger")


GRIDS: dict[str, dict[str, Callable[[Interval], str]]] = {  # parts of many settings → what is compared at equal E
    "rates": {"density": relation},
    "durations": {"density": relation, "norm_weight": size_relation},
}
_SHORT = {"density": "", "norm_weight": "|w| of "}
_MAIN = (("modified", "vanilla"), ("modified", CONTROL), (CONTROL, "vanilla"))
_DECISIVE = (
    *_MAIN,
    *((ALONE[name], "vanilla") for name in ALONE),
    *(("modified", LEFT_OUT[name]) for name in LEFT_OUT),
)
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {  # by part: which condition is compared with which
    "plug-ins": (
        *_DECISIVE,
        ("restricted norm alone", CONTROL),
        ("modified, bias at output", "modified"),
        ("zeroth bias alone, at output", "zeroth bias alone"),
        ("modified, bias not clipped", "modified"),
        ("MLP norms without bias", "vanilla"),
        ("MLP norms fixed at 1", "vanilla"),
        ("MLP norms fixed at 1", "restricted norm alone"),
        ("MLP norms bounded, with bias", "restricted norm alone"),
    ),
    "2x2": tuple((name, "vanilla") for name in FACTORS if name != "vanilla"),
    "rates": _MAIN,
    "durations": _MAIN,
    "T5": _MAIN,
    "noise": (
        *((f"{name}{NOISY}", name) for name in TUNED),
        (LIFTED, "vanilla"),
        ("modified", LIFTED),
    ),
}


CAPTIONS = {
    "density_by_condition": "Test density of every condition of the plug-ins part.",
    "density_and_accuracy": "Accuracy against test density, in every condition.",
    "density_two_by_two": "Test density of JSReLU × zeroth bias.",
    "density_t5": "Test density of the T5 at the authors' E.",
    "density_by_duration": "Test density over the number of steps, decay × steps being the same.",
    "norms_by_duration": "Weights of the norms that feed MLPs over the number of steps, decay × steps being the same.",
    "accuracy_under_noise": "Accuracy while the weights get noise.",
    "density_under_noise": "Test density while the weights get noise.",
    "accuracy_under_attack": "Accuracy under an attack on the images (FGSM).",
    "density_under_attack": "Test density under an attack on the images (FGSM).",
}


def results(data: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run: `density_tables.finals`, density over the last tenth of the steps, part, rate, batch and
    steps.

    Training densities are means over single logged steps: "training_density" over those of the whole run but the first,
    "late_density" over those in the last tenth. Which of the two the paper averages over is not known.
    """
    table = density_tables.finals(data)
    train = data[(data.split == "train") & (data.metric == "density")]
    late = train[train.step > 0.9 * train.groupby(RUN).step.transform("max")]
    table = table.merge(late.groupby(RUN).value.mean().rename("late_density").reset_index(), on=RUN)
    table = table.merge(train.groupby(RUN).step.max().rename("steps").reset_index(), on=RUN)
    return table.merge(data[["part", "rate", "batch", "setting"]].drop_duplicates("setting"), on="setting")


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the relative changes of densities: a row per setting, pair of PAIRS and metric, with interval and text."""
    rows = []
    for (part, setting), _ in table.groupby(["part", "setting"], sort=False):
        for pair in PAIRS[part]:
            for metric in DENSITIES:
                if found := change(table, setting, metric, *pair):
                    labels = dict(part=part, setting=setting, variant=pair[0], reference=pair[1], metric=metric)
                    rows.append({**labels, "interval": found, "text": f"{found}: {relation(found)}"})
    return pd.DataFrame(rows)


def at_equal_decay(
    table: pd.DataFrame, part: str, metric: str = "density"
) -> Iterator[tuple[str, str, str, float, Interval]]:
    """Yield variant, two settings of a part with the same E, that E, and how a metric changes from first to second."""
    own = table[table.part == part]
    decays = own.groupby("setting", sort=False).E.mean()
    for first, second in itertools.combinations(decays.index, 2):
        if abs(decays[second] / decays[first] - 1) < SAME_E:
            for variant, rows in own.groupby("variant", sort=False):
                by_seed = rows.pivot(index="seed", columns="setting", values=metric)
                found = relative_change(by_seed[first], by_seed[second])
                yield variant, first, second, decays[first], found


def percent(values: pd.Series) -> Interval:
    """Return the geometric mean of shares, one per seed, in %, with its 95 % interval over seeds."""
    found = change_from_one(values)
    return Interval(100 + found.mean, 100 + found.low, 100 + found.high)


def cell(interval: Interval) -> str:
    """Return "mean [low, high]"; the mean alone where there is one seed."""
    return str(interval).replace("+", "").replace(" (one seed)", "")


# Figures --------------------------------------------------------------------------------------------------------------


def draw(data: pd.DataFrame) -> dict[str, Figure]:
    """Return the figures of the parts that the table has."""
    table = results(data)
    drawn = {}
    for part, stem in {"plug-ins": "density_by_condition", "2x2": "density_two_by_two", "T5": "density_t5"}.items():
        if (rows := table[table.part == part]).size:
            drawn[stem] = _by_condition(rows)
    if (rows := table[table.part == "plug-ins"]).size:
        drawn["density_and_accuracy"] = figures.frontier(
            rows.assign(percent=100 * rows.density), x="percent", y="score",
            xlabel="density on test data, %", ylabel="accuracy, %",
        )  # fmt: skip
    if (rows := table[table.part == "rates"]).size:
        rows = rows.assign(percent=100 * rows.density, decay=rows.E.map("{:.3g}".format).astype(float))
        rows = rows.assign(row=rows.rate.map("{:g}".format), column=rows.batch.map("{:g}".format))
        drawn["density_by_rate_and_batch"] = figures.matrix(
            rows, row="row", column="column", value="percent", panel="variant", centre=None, cells=".1f",
            xlabel="batch size", ylabel="learning rate", text="density, test data, %",
            names={name: textwrap.fill(name, 16) for name in rows.variant.unique()},
        )  # fmt: skip
        drawn["density_against_decay"] = figures.lines(
            rows, x="decay", y="percent", by="variant", panel="column", xscale="log",
            names={size: f"batch size {size}" for size in rows.column.unique()},
            xlabel="E = Σ rate × weight decay", ylabel="density, test data, %",
        )  # fmt: skip
    if (rows := table[table.part == "durations"]).size:
        rows = rows.assign(percent=100 * rows.density, hundreds=rows.steps / 100)
        options = dict(x="hundreds", by="variant", xlabel="training steps, hundreds, at equal E")
        drawn["density_by_duration"] = figures.lines(rows, y="percent", ylabel="density, test data, %", **options)
        drawn["norms_by_duration"] = figures.lines(
            rows, y="norm_weight", ylabel="mean |weight| of the MLPs' norms", **options
        )
    return drawn | dict(_draw_robustness(data))


def _by_condition(rows: pd.DataFrame) -> Figure:
    """Draw densities with intervals, the densest condition on top, beside vanilla's as a line."""
    found = [
        {"variant": name, "kind": KINDS.get(name, "changed"), "interval": percent(part.density)}
        for name, part in rows.groupby("variant", sort=False)
    ]
    found = pd.DataFrame(found).pipe(with_bounds, "interval")
    unbounded = found.high == math.inf  # of one seed
    found = found.assign(low=found.low.mask(unbounded, found["mean"]), high=found.high.mask(unbounded, found["mean"]))
    found = found.sort_values("mean", ascending=False, kind="stable")
    level = found[found.variant == "vanilla"]["mean"].iloc[0]
    return figures.forest(
        found, item="variant", condition="kind", level=level, xlabel="density on test data, % (95 %); line: vanilla"
    )


def _draw_robustness(data: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    labels = {ATTACK: "ε of the attack, 1/255 of the range", NOISE: "relative noise on the weights"}
    for split, stem in {ATTACK: "attack", NOISE: "noise"}.items():
        rows = data[data.split == split]
        if rows.empty:
            continue
        rows = rows.assign(amount=rows["size"] * (255 if split == ATTACK else 1))
        rows = rows.assign(amount=rows.amount.round(6), percent=100 * rows.value)
        options = dict(x="amount", by="variant", xlabel=labels[split])
        scores, densities = rows[rows.metric == "score"], rows[rows.metric == "density"]
        yield f"accuracy_under_{stem}", figures.lines(scores, y="value", ylabel="accuracy, %", **options)
        means = densities.groupby([*RUN, "amount"], sort=False).percent.mean().reset_index()
        yield f"density_under_{stem}", figures.lines(means, y="percent", ylabel="density, %", **options)


# Tables ---------------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, Callable[[pd.Series], str]]] = {
    "density": ("density, test, % [95 %]", lambda values: cell(percent(values))),
    "training_density": ("training, whole run, %", lambda values: spread(100 * values)),
    "late_density": ("training, last tenth, %", lambda values: spread(100 * values)),
    "live_density": ("live density, %", lambda values: spread(100 * values)),
    "dead_units": ("dead units, %", lambda values: spread(100 * values)),
    "score": ("accuracy (of tokens in T5), %", lambda values: spread(values)),
    "loss": ("test loss", lambda values: spread(values, 3)),
    "E": ("E", lambda values: spread(values, 2)),
    "norm_weight": ("weights of MLP norms", lambda values: spread(values, 3)),
    "other_norm_weight": ("weights of other norms", lambda values: spread(values, 3)),
}


def tables(data: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables: densities by part and what they cost, changes with what they say, attacks, covering."""
    table, found = results(data), {}
    for part, rows in table.groupby("part", sort=False):
        lines = [
            dict(zip(RUN[:2], labels, strict=True))
            | {heading: text(own[metric]) for metric, (heading, text) in COLUMNS.items()}
            | {"seeds": len(own)}
            for labels, own in rows.groupby(RUN[:2], sort=False)
        ]
        found[f"{part}: densities and what they cost (means over layers ± sd over seeds)"] = pd.DataFrame(lines)
    for part, rows in changes(table).groupby("part", sort=False):
        pairs = rows.assign(comparison=rows.variant + " / " + rows.reference)
        wide = pairs.pivot(index=["setting", "comparison"], columns="metric", values="text")
        order = list(dict.fromkeys(zip(pairs.setting, pairs.comparison, strict=True)))
        wide = wide.loc[order, list(DENSITIES)].rename(columns=DENSITIES).reset_index()
        found[f"{part}: changes of density, % [95 % interval over seeds, not corrected for their number]"] = wide
    for part in GRIDS:
        if lines := list(_equal_lines(table, part)):
            found[f"{part}: changes between settings of the same E, % [95 %]"] = pd.DataFrame(lines)
    for split, heading in {ATTACK: "Accuracy under FGSM, %", NOISE: "Accuracy under noise on the weights, %"}.items():
        rows = data[(data.split == split) & (data.metric == "score")]
        if rows.size:
            options = (255, "ε · 255 = ") if split == ATTACK else (1, "")
            found[heading] = _by_size(rows, *options)
            found[f"{heading}: noise in fine-tuning less none (paired, mean ± sd)"] = _by_size(_gain(rows), *options)
    rows = data[data.split == COVERING]
    if rows.size:
        means = rows.groupby([*RUN, "size", "metric"], sort=False).value.mean().reset_index()
        wide = means.assign(size=255 * means["size"]).groupby(["variant", "size", "metric"], sort=False).value
        wide = wide.agg(lambda values: spread(values, 3)).unstack("metric").reset_index()
        found["Covering: weight change that does what FGSM does (medians over images, means over layers)"] = (
            wide.rename(columns={"size": "ε · 255"})
        )
    return found


def _equal_lines(table: pd.DataFrame, part: str) -> Iterator[dict[str, str]]:
    by_metric = [at_equal_decay(table, part, metric) for metric in ("density", "norm_weight")]
    for (variant, first, second, decay, density), (*_, weight) in zip(*by_metric, strict=True):
        yield {
            "variant": variant,
            "from": cell_of(first),
            "to": cell_of(second),
            "E": f"{decay:.2g}",
            "density, test": f"{density}: {relation(density)}",
            "weights of MLP norms": f"{weight}: {size_relation(weight)}",
        }


def _gain(rows: pd.DataFrame) -> pd.DataFrame:
    """Return by how much a score is higher where there was noise in fine-tuning, a row per arm, seed and size."""
    wide = rows.pivot(index=["seed", "size"], columns="variant", values="value")
    gains = {name: wide[f"{name}{NOISY}"] - wide[name] for name in TUNED}
    return pd.DataFrame(gains).melt(var_name="variant", ignore_index=False).reset_index()


def _by_size(rows: pd.DataFrame, factor: float, prefix: str) -> pd.DataFrame:
    rows = rows.assign(amount=[f"{prefix}{factor * size:.3g}" for size in rows["size"]])
    wide = rows.groupby(["variant", "amount"], sort=False).value.agg(spread).unstack("amount", sort=False)
    return wide.reset_index()


def compare(data: pd.DataFrame, published: Any, same_setting: Callable[[str], str]) -> pd.DataFrame:
    """Return changes beside the abstract's figures, and all densities, of which no published one is known."""
    table, rows = results(data), []
    for (part, setting), own in table.groupby(["part", "setting"], sort=False):
        same = same_setting(part)
        for metric, name in DENSITIES.items() if part in ("plug-ins", "T5") else ():
            by_seed = own.pivot(index="seed", columns="variant", values=metric)
            paper = PAPER.get("density" if metric == "density" else "training_density", math.nan)
            for variant, reference in _MAIN:
                if {variant, reference} <= set(by_seed):
                    values = 100 * (by_seed[variant] / by_seed[reference] - 1)
                    known = paper if (variant, reference) == _MAIN[0] else math.nan
                    quantity = f"change of density ({name}), %: {variant} against {reference}; {setting}"
                    rows.append(comparison_row(quantity, values, same, known))
        for variant, runs in own.groupby("variant", sort=False):
            rows.append(comparison_row(f"density on test data, %: {variant}; {setting}", 100 * runs.density, same))
    return pd.DataFrame(rows)


# Verdict --------------------------------------------------------------------------------------------------------------


def verdict(data: pd.DataFrame) -> str:
    """Return the verdict by the rule that experiment 07 states."""
    table = results(data)
    enough = _judged_parts(table)
    if "plug-ins" not in enough:
        return NOT_RUN
    texts, seen = [], changes(table[table.part.isin(enough)])
    seen = seen[seen.metric == "density"]
    for part, rows in seen.groupby("part", sort=False):
        intervals = _intervals(rows)
        if part == "plug-ins":
            intervals = {pair: intervals[pair] for pair in _DECISIVE if pair in intervals}
        said = [f"{pair[0]} / {pair[1]} {found} %: {relation(found)}" for pair, found in intervals.items()]
        texts.append(_cells(part, rows) if part in GRIDS else f"{part}: {'; '.join(said)}")
        for metric, words in GRIDS.get(part, {}).items():
            texts += [
                f"{_SHORT[metric]}{variant} at equal E {decay:.2g}, {cell_of(second)} / {cell_of(first)} {found} %: "
                f"{words(found)}"
                for variant, first, second, decay, found in at_equal_decay(table, part, metric)
                if metric == "density" or variant == "vanilla"
            ]
    names = ", ".join(_contributing(_intervals(seen[seen.part == "plug-ins"]))) or "none"
    text = _intervals(seen[seen.part == "T5"]).get(_MAIN[0])
    head = f"sparser alone and on top of the others: {names}"
    if text is not None:
        head += f"; T5 at low E: {'beyond 36 %' if text.high <= PAPER['density'] else relation(text)}"
    if "durations" in enough:
        head += f"; E by itself: {_decided(table)}"
    return f"{head}. {'. '.join(texts)}"


def _decided(table: pd.DataFrame) -> str:
    """Return whether E decides density, in every variant, and vanilla's |w|, by the rule that experiment 07 states."""
    answers = []
    for metric, name in {"density": "density", "norm_weight": "|w|"}.items():
        found = [
            interval
            for variant, _, _, _, interval in at_equal_decay(table, "durations", metric)
            if metric == "density" or variant == "vanilla"
        ]
        said = {relation(interval) for interval in found}
        if said & {"sparser", "denser"}:
            answers.append(f"does not decide {name}")
        else:
            answers.append(f"{name} undecided" if "undecided" in said else f"decides {name}")
    return ", ".join(answers)


def _judged_parts(table: pd.DataFrame) -> list[str]:
    """Return the parts that have three seeds or more of every condition."""
    counts = table.groupby(["part", "setting", "variant"], sort=False).seed.nunique().groupby("part", sort=False).min()
    return [part for part, seeds in counts.items() if seeds >= SEEDS]


def stated_claims(data: pd.DataFrame) -> list[Claim]:
    """Return the claims of experiment 07: the abstract's number for T5 at low decay, and which plug-ins act."""
    table = results(data)
    enough, seen = _judged_parts(table), changes(table)
    seen = seen[seen.metric == "density"]
    said = "" if "plug-ins" in enough else NOT_RUN
    text = _intervals(seen[seen.part == "T5"]).get(_MAIN[0])
    ours, answer = "not measured", NOT_RUN
    if text is not None:
        ours = claims.intervals([text], "%", table[table.part == "T5"].seed.nunique())
        answer = "direction reproduced" if text.sign < 0 else "not reproduced"
        answer = "reproduced" if text.high <= PAPER["density"] else answer
        answer = where_run(said, answer if "T5" in enough else NOT_RUN)
    low = "At the authors' E = 0.48 the plug-ins cut T5's inference density by at least 36 %"
    intervals = _intervals(seen[seen.part == "plug-ins"])
    seeds = table[table.part == "plug-ins"].seed.nunique()
    beyond = [intervals[_MAIN[1]]] if _MAIN[1] in intervals else []
    names = f"{', '.join(_contributing(intervals)) or 'none'} (n = {seeds})"
    return [
        Claim("abstract", low, f"≤ {PAPER['density']:g} %", ours, answer),
        question("Which plug-ins lower density alone and on top of the others?", names, said),
        question("Are all three sparser than vanilla whose MLP norms do not decay?",
                 claims.intervals(beyond, "%", seeds), said),
    ]  # fmt: skip


def _contributing(intervals: Mapping[tuple[str, str], Interval]) -> list[str]:
    """Return the plug-ins that lower density alone and, as a whole interval too, on top of the two others."""
    pairs = {name: ((ALONE[name], "vanilla"), ("modified", LEFT_OUT[name])) for name in ALONE}
    return [
        name for name, both in pairs.items() if all(pair in intervals and intervals[pair].sign < 0 for pair in both)
    ]


def _intervals(rows: pd.DataFrame) -> Mapping[tuple[str, str], Interval]:
    return dict(zip(zip(rows.variant, rows.reference, strict=True), rows.interval, strict=True))


def _cells(part: str, rows: pd.DataFrame) -> str:
    texts = []
    for pair in _MAIN:
        own = rows[(rows.variant == pair[0]) & (rows.reference == pair[1])]
        said = own.interval.map(relation).value_counts()
        if len(own):
            listed = ", ".join(f"{word} in {count}" for word, count in said.items())
            texts.append(f"{pair[0]} / {pair[1]} {listed} of {len(own)} cells")
    return f"{part}: {'; '.join(texts)}"


def remarks(data: pd.DataFrame) -> str:
    """Return what the parts show, in words with the numbers of the table."""
    table = results(data)
    texts = [
        f"**{part}.** Test density [95 %], E and |w| of MLP norms: "
        + "; ".join(
            f"{variant} {cell(percent(rows.density))} % (E {rows.E.mean():.2g}, |w| {rows.norm_weight.mean():.2f})"
            for variant, rows in own.groupby("variant", sort=False)
        )
        + "."
        for part, own in table[~table.part.isin(list(GRIDS))].groupby("part", sort=False)
    ]
    for part in GRIDS:
        equal = [
            f"{variant}: {cell_of(first)} and {cell_of(second)} (E {decay:.2g} both) differ by {found} %"
            for variant, first, second, decay, found in at_equal_decay(table, part)
        ]
        if equal:
            texts.append(f"**{part.capitalize()} at equal E.** {'; '.join(equal)}.")
    return "\n\n".join(texts)


def cell_of(setting: str) -> str:
    """Return what follows the name of the data in the name of a setting: rate and batch size, or steps and decay."""
    return setting.partition(", ")[2]
