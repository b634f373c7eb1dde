"""Over-accumulation: how merging inflates what tasks share, and what SVC does to it (the paper's analysis figures).

Inflated spectra, overlap between tasks, over-counting by direction, energy concentration, interference and growth with
the number of tasks, from weights alone. Everything stands beside a chance level: the sum of UNRELATED updates, which
have the tasks' own singular values in directions drawn at random.

Claim    Tasks share spectral directions; positive inner products across tasks inflate the singular values of their sum
         there (Theorems 3.2, 3.3), the more the more tasks; SVC restores a balanced spectrum.
Verdict  on 8, 14 and 20 tasks, backbones glyph-96, glyph-128 and glyph-160 and at least 3 seeds, or on the 8 tasks of
         ViT-B/32 (else "not run at this scale"), for the plain sum, in every cell of backbone, suite and seed:
         (a) inflation in the top tenth of directions is above 2 and above that of unrelated updates;
         (b) the tasks' top-8 subspaces overlap more than twice as much as those of unrelated updates;
         (c) inflation of the largest singular value, relative to that of unrelated updates, grows with the number of
             tasks (Spearman above 0.9 over all numbers measured; one value for each backbone and seed);
         (d) SVC (α = 1/K) lowers the total interference.
         "reproduced" if all four hold everywhere, "reproduced in part" if some do, else "not reproduced".
Domains  the glyph tasks share one artificial domain, so that sharing is built in. The condition "own domains" gives
         every task one of its own: the same four parts are counted for it, beside the verdict, and how much of the
         excess over chance remains there, (value − chance) with own domains over the same with one domain. It is to be
         added to the scales with their next run, until then: --backbones glyph-96 "glyph-96 own domains".
Cost     smoke 10 s; laptop 4 min with training, workstation 5 min without (2 cores); paper: not timed.
Run      python experiments/21_over_accumulation.py --scale laptop
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd

from common import spectral
from common.cache import cached_rows
from common.lab import figures
from common.lab.claims import Claim, of_parts, where_run
from common.lab.report import comparison_row
from common.lab.run import Experiment, run
from common.lab.statistics import spread
from merging import MERGERS, calibrate, calibration, diagnose, diagnosis, mergers, unrelated
from merging.suites import comparison, vision
from merging.suites.suite import measure_suites

SUM, CHANCE = "plain_sum", "unrelated"  # the latter: the plain sum of unrelated updates
RELATION = "Spearman of overlap and inflation"  # over the matrices
LINEAR = (SUM, "task_arithmetic", "weight_average")  # the mergers whose growth with the number of tasks is shown


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)
    suites: tuple[int, ...] = (8, 14)  # numbers of tasks
    growth: tuple[int, ...] = (2, 4, 6, 11)  # further numbers of tasks, for the growth curves
    # glyph-WIDTH, also with " own domains", or ViT-B/32 (from the hub); details of the first only
    backbones: tuple[str, ...] = ("glyph-96",)
    methods: tuple[str, ...] = mergers.OFFICIAL
    recipe: vision.GlyphRecipe = vision.GlyphRecipe()

    def __post_init__(self):
        vision.check_suites(self.backbones, self.suites)
        mergers.check_methods(self.methods)


OWN = "glyph-96 own domains"

SCALES = {
    "smoke": Settings(suites=(2,), growth=(), backbones=("glyph-32",), recipe=vision.SMOKE),
    "laptop": Settings(),
    "workstation": Settings((0, 1, 2), (8, 14, 20), (2, 4, 6, 11, 17), ("glyph-96", "glyph-128", "glyph-160")),
    "paper": Settings(suites=(8,), growth=(2, 4, 6), backbones=("ViT-B/32",)),
}


def measure(settings, context):
    counts = (*settings.suites, *settings.growth)
    yield from measure_suites(vision, replace(settings, suites=counts), context, measure_suite, [(settings.suites,)])


def measure_suite(settings, suite, backbone, seed, detailed):
    """All rows of one suite and seed: totals, and on the first backbone the depth that figures need."""
    is_detailed = backbone == settings.backbones[0] and len(suite.tasks) in detailed
    depth = is_detailed + (is_detailed and len(suite.tasks) == min(detailed))  # 2: every merger, layer by direction
    methods = list(dict.fromkeys((*LINEAR, *(settings.methods if is_detailed else ()), CHANCE)))
    inputs = {"suite": suite.key, "methods": methods, "seed": seed, "depth": depth}
    return cached_rows("over_accumulation", inputs, partial(unit_rows, suite, methods, seed, depth))


def unit_rows(suite, methods, seed, depth):
    updates = suite.task_vectors()
    for method in methods:
        own = unrelated.unrelated(updates, seed) if method == CHANCE else updates
        merged = mergers.merge(SUM if method == CHANCE else method, own, seed)
        alpha = calibration.published_alpha(method, len(updates))
        for svc, update in {"none": merged, "output": calibrate(merged, own, alpha=alpha)}.items():
            found = diagnosis.calibrated_matrices(diagnose(update, own, alpha=alpha))
            labels = dict(method=method, svc=svc, alpha=alpha if svc == "output" else None)
            for row in method_rows(found, method, svc, suite.tasks, depth):
                yield labels | row
    yield from ({"method": "expert", "svc": "none", **row} for row in expert_rows(updates, depth))


def method_rows(found, method, svc, tasks, depth):
    layers, is_sum = list(found.values()), method in (SUM, CHANCE)
    yield from rows_of(diagnosis.totals(layers))
    if is_sum and svc == "none":
        overlap = pd.Series([float(diagnosis.overlap_between_tasks(seen)) for seen in layers])
        inflation = pd.Series([float(diagnosis.tenths(seen.inflation)[0]) for seen in layers])
        yield from rows_of({"overlap": overlap.mean(), RELATION: overlap.corr(inflation, method="spearman")})
    if method == SUM and svc == "none":
        yield from rows_of(diagnosis.privacy(layers))
    if depth > 1 or (depth and is_sum):
        yield from tenth_rows("inflation", diagnosis.mean(lambda seen: diagnosis.tenths(seen.inflation), layers))
    if depth and is_sum:
        energy = diagnosis.mean(lambda seen: diagnosis.energy_by_tenth(seen.singular_values), layers)
        yield from tenth_rows("energy, %", energy)
    if depth and method == SUM:
        yield from layer_rows(found, depth)
        if svc == "none":
            yield from pair_rows(layers, tasks)
            for octave, shares in diagnosis.by_peak(layers).items():
                yield from rows_of(shares, octave=octave)


def layer_rows(found, depth):
    for layer, seen in found.items():
        yield dict(layer=layer, metric="interference", value=diagnosis.relative_interference([seen]))
        if depth > 1:
            yield from tenth_rows("s", diagnosis.tenths(seen.coefficients.mean(0)), layer=layer)


def pair_rows(layers, tasks):
    overlap = diagnosis.mean(lambda seen: seen.overlap, layers)  # (K, K)
    for (i, task), (j, other) in itertools.combinations(enumerate(tasks), 2):
        yield dict(task=task, other=other, metric="overlap", value=float(overlap[i, j]))


def expert_rows(updates, depth):
    """Ranks and energies of the tasks' own updates: means over tasks and matrices."""
    matrices = [update[name] for update in updates for name in update if calibration.SVC_MATRICES(name, update[name])]
    spectra = [spectral.singular_values(matrix) for matrix in matrices]
    yield from rows_of(diagnosis.ranks(spectra))
    if depth:
        yield from tenth_rows("energy, %", diagnosis.mean(diagnosis.energy_by_tenth, spectra))


def rows_of(values, **labels):
    return [{**labels, "metric": metric, "value": value} for metric, value in values.items()]


def tenth_rows(metric, values, **labels):
    return [dict(labels, tenth=i, metric=metric, value=value) for i, value in enumerate(values.tolist(), 1)]


# From here on only the table is seen --------------------------------------------------------------------------------

SERIES = {  # the lines of figures, by method and svc
    (SUM, "none"): SUM,
    (SUM, "output"): "sum + SVC",
    (CHANCE, "none"): CHANCE,
    ("task_arithmetic", "none"): "task_arithmetic",
    ("weight_average", "none"): "weight_average",
    ("expert", "none"): "the tasks' own updates",
}
GROWTH = {
    "inflation, largest σ": "inflation of the largest σ",
    "s, top tenth": "s in the top tenth",
    "interference": "interference",
}
QUANTITIES = {  # of `compare`: (method, svc, metric)
    "inflation of the sum in the top tenth of directions": (SUM, "none", "inflation, top tenth"),
    "overlap of the tasks' top-8 subspaces": (SUM, "none", "overlap"),
    "interference of the sum (eq. 7)": (SUM, "none", "interference"),
    "interference of the sum + SVC": (SUM, "output", "interference"),
}
REMAINING = ("inflation, largest σ", "inflation, top tenth", "s, top tenth", "interference", "overlap")
TENTH = "tenth of directions (1: largest σ)"


def suites_of(data):
    """The numbers of tasks that have details, in order."""
    return sorted(data.suite[data.tenth.notna()].unique())


def totals(data):
    """The rows that stand for a whole update: not for a tenth, octave, layer or pair of tasks."""
    return data[data[["tenth", "octave", "layer", "task"]].isna().all(axis=1)]


def values(data, method, svc, metric):
    """One value for each backbone, suite and seed."""
    found = totals(data)
    found = found[(found.method == method) & (found.svc == svc) & (found.metric == metric)]
    return found.set_index(["backbone", "suite", "seed"]).value


def draw(data):
    suites = suites_of(data)
    data = data[data.backbone == data.backbone[data.tenth.notna()].iloc[0]].sort_values("suite", kind="stable")
    series = [SERIES.get(pair) for pair in zip(data.method, data.svc, strict=True)]
    data = data.assign(panel=data.suite.map("{} tasks".format), series=series)
    lined, smallest = data[data.series.notna()], data[data.suite == suites[0]]
    return {
        "inflated_spectra": draw_spectra(lined[lined.method.isin((SUM, CHANCE))], by="series"),
        "growth_with_tasks": draw_growth(totals(lined)),
        "counted_by_layer_and_direction": draw_counts(smallest[smallest.metric == "s"]),
        "interference_by_layer": draw_interference(data[data.layer.notna() & (data.metric == "interference")]),
        "overlap_between_tasks": draw_overlap(data[data.suite == suites[-1]]),
        "energy_concentration": draw_energy(lined[lined.tenth.notna() & (lined.metric == "energy, %")]),
        "inflated_spectra_of_mergers": draw_mergers(smallest),
        "private_directions": draw_private(data[data.octave.notna()]),
    }


def draw_spectra(data, by):
    options = dict(xlabel=TENTH, ylabel="inflation: merged σ / mean σ of tasks", yscale="log", level=1)
    return figures.lines(data[data.metric == "inflation"], x="tenth", by=by, panel="panel", **options)


def draw_mergers(data):
    data = data[data.method.isin(MERGERS)]
    figure = draw_spectra(data.assign(panel=data.svc.map(figures.label)), by="method")
    figure.axes[0].set_ylim(bottom=0.2)  # STAR's spectrum ends
    return figure


def draw_growth(data):
    data = data[data.metric.isin(GROWTH)].assign(panel=data.metric.map(GROWTH))
    options = dict(xlabel="number of tasks", ylabel="factor", yscale="log", level=1)
    return figures.lines(data, x="suite", by="series", panel="panel", **options)


def draw_counts(data):
    panel = data.svc.map({"none": "sum", "output": "sum + SVC"})
    data = data.assign(tenth=data.tenth.astype(int), panel=panel)
    text = "s: how often a task's response is counted"
    return figures.layer_heatmap(data, direction="tenth", panel="panel", xlabel=TENTH, text=text)


def draw_interference(data):
    xlabel = "interference (1: no update at all)"
    figure = figures.paired(data, item="layer", panel="panel", xlabel=xlabel, references={"": 1.0})
    for ax in figure.axes:
        figures.log_axis(ax.xaxis)
    return figure


def draw_overlap(data):
    chance = totals(data)[lambda rows: (rows.method == CHANCE) & (rows.metric == "overlap")].value.mean()
    text, own = f"top-8 overlap (chance: {chance:.2f})", data[data.task.notna()]
    limits = (min(chance, own.value.min()), own.groupby(["task", "other"]).value.mean().max())
    return figures.matrix(own, row="task", column="other", centre=None, text=text, limits=limits)


def draw_energy(data):
    ylabel = "energy in this and stronger tenths, %"
    return figures.lines(data, x="tenth", by="series", panel="panel", xlabel=TENTH, ylabel=ylabel)


def draw_private(data):
    data = data[data.metric.isin(["directions, %", "energy, %", "energy after SVC, %"])]
    names = {"directions, %": "directions", "energy, %": "energy of the sum", "energy after SVC, %": "energy after SVC"}
    options = dict(xlabel="largest s of any task / K, up to", ylabel="share, %", xscale="log", names=names)
    return figures.lines(data, x="octave", by="metric", panel="panel", **options)


def compare(data, published):
    lines = []
    for backbone, suite in itertools.product(comparison.by_size(data.backbone), suites_of(data)):
        for quantity, wanted in QUANTITIES.items():
            found = values(data, *wanted).sort_index()[backbone, suite]
            lines.append(comparison_row(f"{suite} tasks, {backbone}: {quantity}", found, vision.setting(backbone)))
    return pd.DataFrame(lines)


def tables(data):
    data = data.sort_values("suite", kind="stable")
    octaves, first = data[data.octave.notna()], data.backbone[data.tenth.notna()].iloc[0]
    whole = totals(data)[lambda rows: rows.suite.isin(suites_of(data))]
    privacy = whole.metric.str.startswith(("max s", "largest share"))
    private, whole = whole[privacy], whole[~privacy]
    sums = whole[whole.method.isin((SUM, CHANCE, "expert"))]
    merged = whole[(whole.backbone == first) & whole.method.isin(MERGERS) & ~whole.metric.isin(["overlap", RELATION])]
    growth = relative_growth(data).groupby(["backbone", "suite"], sort=False).agg(spread).unstack().reset_index()
    left = remaining(data)
    domains = {"What own domains leave of the excess over chance, %": left} if len(left) else {}
    return domains | {
        "The sum of the tasks' updates beside that of unrelated ones": wide(sums, ["method", "svc"]),
        f"Every merger, {first}": wide(merged, ["method", "svc"]),
        "Inflation of the largest σ relative to that of unrelated updates, by number of tasks": growth,
        "How private the directions of the sum are (both measures: 1/K where all tasks respond alike)": wide(
            private, []
        ),
        "Directions of the sum by their largest s / K (up to), and what SVC does": wide(octaves, ["octave"]),
    }


def wide(data, keys):
    """mean ± sd over seeds, a column for each metric."""
    keys = ["backbone", "suite", *keys]
    texts = data.groupby([*keys, "metric"], sort=False).value.agg(lambda column: spread(column, 2)).unstack()
    return texts[list(dict.fromkeys(data.metric))].fillna("").reset_index()


def relative_growth(data):
    """Inflation of the largest σ of the sum relative to that of unrelated updates; for each suite and seed."""
    return values(data, SUM, "none", "inflation, largest σ") / values(data, CHANCE, "none", "inflation, largest σ")


def growing(data):
    """Spearman of that relative inflation with the number of tasks, for each backbone and seed."""
    columns = relative_growth(data).rename("ratio").reset_index()
    groups = columns.groupby(["backbone", "seed"])[["suite", "ratio"]]
    return groups.apply(lambda rows: rows.suite.corr(rows.ratio, "spearman"))


def remaining(data):
    """What is left of the excess over chance where every task has its own domain, %; a row for each suite."""
    lines = []
    for metric in REMAINING:
        excess = values(data, SUM, "none", metric) - values(data, CHANCE, "none", metric)
        means = excess.groupby(["backbone", "suite"]).mean().unstack("backbone")
        if {OWN, "glyph-96"} <= set(means):
            lines.append((100 * means[OWN] / means["glyph-96"]).rename(metric))
    return pd.concat(lines, axis=1).round(0).reset_index() if lines else pd.DataFrame()


def parts(data):
    """Where the four parts of the verdict hold: name → one answer for each backbone, suite and seed, or fewer."""
    top, overlap, interference = ((SUM, "none", name) for name in ("inflation, top tenth", "overlap", "interference"))
    chance = {metric: values(data, CHANCE, "none", metric) for metric in ("inflation, top tenth", "overlap")}
    return {
        "a": values(data, *top).gt(2) & values(data, *top).gt(chance["inflation, top tenth"]),
        "b": values(data, *overlap) > 2 * chance["overlap"],
        "c": growing(data) > 0.9,
        "d": values(data, SUM, "output", "interference") < values(data, *interference),
    }


def counted(data):
    """How often each part holds, in words."""
    return ", ".join(f"({part}) in {cells.sum()} of {len(cells)}" for part, cells in parts(data).items())


def verdict(data):
    seen = data[data.suite.isin(suites_of(data))]
    own, seen = seen[seen.backbone == OWN], seen[seen.backbone != OWN]
    if not vision.is_evidence(seen, vision.STANDS_FOR):
        return "not run at this scale"
    hold = [bool(cells.all()) for cells in parts(seen).values()]
    word = "reproduced" if all(hold) else "reproduced in part" if any(hold) else "not reproduced"
    beside = f"; with a domain of its own for every task {counted(own)} cells" if len(own) else ""
    return f"{word}: {counted(seen)} cells{beside}"


def claims(data):
    """The four parts of the rule."""
    said, seen = verdict(data), data[data.suite.isin(suites_of(data)) & (data.backbone != OWN)]
    texts = {
        "a": "Merging inflates the singular values of shared directions (plain sum)",
        "b": "Leading subspaces of tasks overlap more than twice as much as by chance",
        "c": "Inflation of the largest singular value grows with the number of tasks",
        "d": "SVC lowers the total interference",
    }
    sources = {"c": "Theorems 3.2, 3.3"}
    return [
        Claim(
            sources.get(part, "analysis figures"), texts[part], "not published",
            f"in {cells.to_numpy().sum()} of {cells.size} cells (n = {seen.seed.nunique()})",
            where_run(said, of_parts([bool(cells.to_numpy().all())])),
        )
        for part, cells in parts(seen).items()
    ]  # fmt: skip


CAPTIONS = {
    "inflated_spectra_of_mergers": "Largest singular values of each merger's update over those of a single task's.",
    "inflated_spectra": "Singular values of the sum over those of a single task, beside unrelated updates.",
    "overlap_between_tasks": "Overlap of the leading subspaces of two tasks; by chance: the title.",
    "counted_by_layer_and_direction": "How often directions are counted, by layer and tenth of directions; 1: once.",
    "energy_concentration": "Share of an update's energy in its leading directions.",
    "growth_with_tasks": "Inflation of the largest singular value over the number of tasks, beside unrelated updates.",
    "interference_by_layer": "Interference of the sum by layer, before and after SVC.",
    "private_directions": "How strongly directions respond to their own task and to the others.",
}

DEVIATIONS = (
    "Embedded suite: 20 glyph-recognition tasks and a tiny CLIP of 4 layers trained here, instead of CLIP ViT on "
    "photographs; widths 96, 128 and 160 stand for ViT-B/32, B/16 and L/14.",
    "No numbers of the paper's analysis figures are known: its claims are compared, not digits.",
    "Unrelated updates, the chance level, are ours: every task's singular values in random (Haar) directions.",
    "After SVC, coefficients and interference are measured again on the calibrated update, in its own directions.",
    "On Iso-C and Iso-CTS all singular values are equal, so that their directions are arbitrary.",
)

EXPERIMENT = Experiment(
    __doc__,
    SCALES,
    measure,
    draw,
    compare,
    verdict,
    tables=tables,
    deviations=DEVIATIONS,
    styles=comparison.merging_styles(),
    claims=claims,
    captions=CAPTIONS,
    lead="inflated_spectra",
)

if __name__ == "__main__":
    run(EXPERIMENT)
