"""Accuracy over SVC's floor α and over the update's scale, and how much of "+SVC" is only a scale (the α sweep).

SVC(c ΔW; α) = SVC(ΔW; α/c): a scale before calibration is another α, so that scales act here after calibration. Every
sweep is scored on validation and on test images; a value is "fixed" (the paper's), chosen on "validation", or by an
"oracle" that saw the test images. SVC may tune α (at scale 1) or the scale (at the paper's α), whichever is better on
validation; the base merger can only tune its scale.

Claim    The default α = 1/K needs no tuning, and SVC does more than a better global scale would (the question that
         reviewers ask; the paper answers neither with numbers).
Verdict  on suites of 8, 14 and 20 tasks, backbone glyph-96 and at least 3 seeds, or on the 8-task suite of ViT-B/32
         (else "not run at this scale"), for Task Arithmetic, from the paired 95 % interval of (SVC, tuned − base,
         tuned): "a tuned scale explains SVC's gain" if it is not above 0 in more than half of the suites, "SVC is more
         than a scale" if it is above 0 in all of them, else "a tuned scale explains SVC's gain in part". Then "the
         default α needs no tuning" if α chosen on validation gains less than 1 point over it in every suite, else
         "α needs tuning". The other mergers are counted beside it. Also beside it, without a rule: SVC with s corrected
         for chance, where what unrelated updates of the same spectra give is subtracted from s before α is applied (a
         variant that the committed run does not have yet). Interval: seeds, tasks and images resampled.
Cost     smoke 40 s; laptop 5 min, workstation about 40 min (2 cores); paper: about 30 passes over the 8 test sets; the
         last two are not timed.
Run      python experiments/24_alpha_and_scale.py --scale laptop
"""

from dataclasses import dataclass, replace
from functools import partial

import pandas as pd

from common.lab import figures
from common.lab.claims import Claim, intervals, of_parts, question, where_run
from common.lab.run import Experiment, run
from common.lab.statistics import spread
from merging import mergers
from merging.suites import ablations, comparison, vision
from merging.suites.comparison import CELL
from merging.suites.suite import measure_suites

MATRIX_SCALE_METHODS = ("task_arithmetic", "plain_sum")
BASIS_METHODS = ("task_arithmetic", "iso_c", "iso_cts")  # the first has a basis of its own: the control


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)
    suites: tuple[int, ...] = (8,)  # numbers of tasks
    backbones: tuple[str, ...] = ("glyph-96",)  # glyph-WIDTH, or ViT-B/32 (from the hub)
    methods: tuple[str, ...] = ("task_arithmetic", "plain_sum", "ties", "tsv_m", "iso_c")
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)  # of the experts of the smallest suite, beside the recipe's
    recipe: vision.GlyphRecipe = vision.GlyphRecipe()

    def __post_init__(self):
        vision.check_suites(self.backbones, self.suites)
        mergers.check_methods(self.methods)


SCALES = {
    "smoke": Settings(suites=(2,), backbones=("glyph-32",), methods=("task_arithmetic", "tsv_m"), recipe=vision.SMOKE),
    "laptop": Settings(),
    "workstation": Settings((0, 1, 2), (8, 14, 20)),
    "paper": Settings(backbones=("ViT-B/32",)),
}


def measure(settings, context):
    sweeps = [(ablations.sweep_rows, method) for method in settings.methods]
    others = [(ablations.matrix_scale_rows, method) for method in MATRIX_SCALE_METHODS]
    others += [(ablations.basis_rows, method) for method in BASIS_METHODS]
    yield from measure_suites(vision, settings, context, measure_part, [*sweeps, *others])
    trained_here = tuple(filter(vision.is_glyph, settings.backbones))
    for rate in settings.learning_rates:
        if rate != settings.recipe.expert_learning_rate:
            recipe = replace(settings.recipe, expert_learning_rate=rate)
            smallest = replace(settings, backbones=trained_here, suites=(min(settings.suites),), recipe=recipe)
            yield from (row for row in measure_suites(vision, smallest, context, measure_part, sweeps) if outcome(row))


def measure_part(settings, suite, backbone, seed, part, method):
    rate = settings.recipe.expert_learning_rate if vision.is_glyph(backbone) else None
    for row in comparison.merger_rows(suite, method, seed, part):
        yield {"learning_rate": rate} | row


def outcome(row):
    """Whether a row is about what was chosen: of other learning rates nothing else is kept."""
    return row["part"] in ("tuned", "paired")


# From here on only the table is seen --------------------------------------------------------------------------------

NAMES = {"none": "base", "output": "+ SVC (paper's α)"}
PLACE = ["backbone", "learning_rate", "suite", "method"]  # what paired comparisons are made within
BASE, BASE_TUNED = "base", "base, scale on validation"
SVC, SVC_TUNED = "+ SVC", "+ SVC, α or scale on validation"
SVC_ALPHA, SVC_SCALE = "+ SVC, α on validation", "+ SVC, scale on validation"
SVC_OVER_SCALE, BOTH = "SVC − tuned base", "tuned SVC − tuned base"
DIFFERENCES = {
    "tuned base − base": (BASE_TUNED, ""),
    "SVC − base": (SVC, ""),
    SVC_OVER_SCALE: (SVC, "_over_tuned"),
    BOTH: (SVC_TUNED, "_over_tuned"),
}
COMPARED = {  # row: what follows the merger's name, and the published `svc`
    BASE: (f", {BASE}", "none"),
    BASE_TUNED: (f", {BASE_TUNED}", ""),
    SVC: (f", {SVC}", "output"),
    SVC_TUNED: (f", {SVC_TUNED}", ""),
}
TUNED = {"own scales": (), "others tuned": ("others",), "matrices tuned": ("scale",), "both tuned": ("scale", "others")}


def own_rate(data):
    """The rows of the recipe's own learning rate, which come first in the table."""
    return data[data.learning_rate.isna() | data.learning_rate.eq(data.learning_rate.iloc[0])]


def part_of(data, part):
    """The rows of one part, cells in order."""
    return comparison.in_order(data[data.part == part], CELL)


def groups(rows):
    """(labels, rows) of each backbone, suite and merger."""
    return [(dict(zip(CELL, key, strict=True)), part) for key, part in rows.groupby(CELL, sort=False)]


def choices(rows):
    """The rows of one merger in the parts "tuned" and "paired" by what was chosen how."""
    svc, rule, variant = rows.svc, rows.scale_rule, rows.variant
    return {
        BASE: rows[(svc == "none") & (rule == "fixed")],
        BASE_TUNED: rows[(svc == "none") & (rule == "validation")],
        SVC: rows[(svc == "output") & (rule == "fixed")],
        SVC_TUNED: better_knob(rows),
        "base, scale by oracle": rows[(svc == "none") & (rule == "oracle")],
        SVC_ALPHA: rows[(rule == "validation") & (variant == "tuned α")],
        SVC_SCALE: rows[(svc == "output") & (rule == "validation") & (variant == "tuned scale")],
        "+ SVC, α by oracle": rows[(rule == "oracle") & (variant == "tuned α")],
        "+ SVC, scale by oracle": rows[(svc == "output") & (rule == "oracle") & (variant == "tuned scale")],
    }


def better_knob(rows):
    """Of SVC at tuned α and at tuned scale the one with the higher validation accuracy, for each seed."""
    tuned = rows[(rows.svc == "output") & (rows.scale_rule == "validation")]
    best = tuned.groupby("seed").validation.transform("max")
    kept = tuned[tuned.validation == best].sort_values("variant", kind="stable")
    return kept.drop_duplicates(["seed", "task"])


def named(rows, keys=CELL):
    """The rows with their choice in the column `row`; the better knob's stand there a second time."""
    cells = rows.groupby(list(keys), sort=False, dropna=False)
    return pd.concat([part.assign(row=name) for _, cell in cells for name, part in choices(cell).items()])


def differences(data):
    """The paired comparisons of each learning rate, backbone, suite and merger."""
    return comparison.differences(named(part_of(data, "paired"), PLACE), DIFFERENCES, PLACE)


def by_tuned_scales(rows):
    """Accuracies by seed of a merger's part "apart", by which scales are chosen on validation; the others are 1."""
    found = {}
    for svc, part in rows.groupby("svc", sort=False):
        for text, tuned in TUNED.items():
            cells = part[(part[[held for held in ("scale", "others") if held not in tuned]] == 1).all(axis=1)]
            found[svc, text] = cells.loc[cells.groupby("seed").validation.idxmax()].value
    return found


def draw(data):
    data = data[data.backbone == data.backbone.iloc[0]].assign(panel=data.suite.map("{} tasks".format))
    rows, accuracy = own_rate(data), "mean accuracy of the tasks, %"
    drawn = {"alpha_sweep": sweep_figure(part_of(rows, "alpha"), x="alpha", panel="panel", xlabel="floor α")}
    scales = part_of(rows, "scale")
    for suite in sorted({scales.suite.min(), scales.suite.max()}):
        part = scales[scales.suite == suite]
        xlabel = "scale after merging"
        drawn[f"scale_sweep_{suite}_tasks"] = sweep_figure(part, x="scale", by="svc", panel="method", xlabel=xlabel)
    grid = part_of(rows, "apart")
    grid = grid[grid.suite == grid.suite.min()].sort_values(["svc", "scale", "others"], ascending=[True, False, True])
    grid = grid.assign(scale=grid.scale.map("{:.3g}".format), others=grid.others.map("{:.3g}".format))
    for method, part in grid.groupby("method", sort=False):
        drawn[f"scales_apart_{method}"] = figures.matrix(
            part, row="scale", column="others", panel="svc", centre=None, cells=".0f", names=NAMES, text=accuracy,
            xlabel="scale of all other tensors", ylabel="scale of the matrices\n(outlined: one for all)",
        )  # fmt: skip
    gains = differences(data)
    gains = gains[gains.condition.isin([SVC_OVER_SCALE, BOTH])]
    options = dict(item="method", panel="panel", xlabel="difference in mean accuracy, points")
    own = own_rate(gains).assign(panel=lambda rows: rows.suite.map("{} tasks".format))
    drawn["gains_over_tuned_scales"] = figures.forest(own, **options)
    if gains.learning_rate.nunique() > 1:
        smallest = gains[gains.suite == gains.suite.min()].sort_values("learning_rate", kind="stable")
        by_rate = smallest.assign(panel=smallest.learning_rate.map("learning rate {:g}".format))
        drawn["gains_by_learning_rate"] = figures.forest(by_rate, **options)
    bases = part_of(rows, "basis")
    bases = bases[(bases.metric == "accuracy") & (bases.variant != "float64 SVD")]
    options = dict(condition="variant", start="default", panel="panel", xlabel=accuracy)
    drawn["accuracy_by_basis"] = figures.paired(bases, **options)
    return drawn


def sweep_figure(rows, **options):
    figure = figures.lines(rows, ylabel="mean accuracy of the tasks, %", names=NAMES, **options)
    for ax in figure.axes:
        figures.log_axis(ax.xaxis)
    return figure


def compare(data, published):
    means = comparison.seed_means(named(part_of(own_rate(data), "tuned")))
    shown = means[means.method.eq("task_arithmetic") | means.suite.eq(data.suite.min())]
    own_number = partial(vision.published_number, peers=False)
    return comparison.compared(shown, published, own_number, vision.setting, COMPARED)


def tables(data):
    own = own_rate(data)
    choice = comparison.spread_table(comparison.seed_means(named(part_of(own, "tuned"))))
    return {
        "Mean accuracy by what was chosen how, %": choice,
        "Chosen on validation, one value a seed": chosen_table(own),
        "Paired differences in points, 95 % interval": comparison.wide(differences(data), PLACE),
        "Scales of matrices and of all other tensors, tuned on validation or not: mean accuracy, %": scales_table(own),
        "Variants of the rule against the default: mean accuracy, %": rule_table(own),
        "SVC in other bases than the default: mean accuracy, %, and distance of the matrices": basis_table(own),
    }


def chosen_table(data):
    lines = []
    for labels, rows in groups(part_of(data, "tuned")):
        found = choices(rows)
        picked = {
            "scale of base": found[BASE_TUNED].scale,
            "scale of + SVC": found[SVC_SCALE].scale,
            "α of + SVC": found[SVC_ALPHA].alpha,
        }
        lines.append(labels | {text: ", ".join(f"{x:.3g}" for x in values) for text, values in picked.items()})
    return pd.DataFrame(lines)


def scales_table(data):
    lines = []
    for labels, rows in groups(part_of(data, "apart")):
        found = by_tuned_scales(rows)
        line = {f"{'base' if svc == 'none' else '+ SVC'}, {text}": spread(x) for (svc, text), x in found.items()}
        means = {key: values.mean() for key, values in found.items()}
        base = means["none", "own scales"]
        gain = means["output", "own scales"] - base
        for text in list(TUNED)[1:]:
            share = f"{100 * (means['none', text] - base) / gain:.0f} %" if gain >= 1 else "no gain"
            line[f"share of SVC's gain that base gets with {text}"] = share
        lines.append(labels | line)
    return pd.DataFrame(lines)


def rule_table(data):
    defaults = {tuple(labels.values()): choices(rows)[SVC] for labels, rows in groups(part_of(data, "tuned"))}
    lines = []
    for labels, rows in groups(part_of(data, "rule")):
        variants = {"default": defaults[tuple(labels.values())]} | dict(list(rows.groupby("variant", sort=False)))
        lines.append(labels | {variant: spread(part.value) for variant, part in variants.items()})
    return pd.DataFrame(lines)


def basis_table(data):
    lines = []
    for labels, rows in groups(part_of(data, "basis")):
        for variant, part in rows.groupby("variant", sort=False):
            accuracy, distance = (part[part.metric == metric].value for metric in ("accuracy", "distance"))
            line = dict(basis=variant, accuracy=spread(accuracy), distance=f"{distance.mean():.1e}")
            lines.append(labels | line)
    return pd.DataFrame(lines)


def verdict(data):
    data = own_rate(data)
    if not vision.is_evidence(data, ["glyph-96"]) or "task_arithmetic" not in set(data.method):
        return "not run at this scale"
    evidence = differences(data)
    evidence = evidence[evidence.condition == BOTH]
    linear = evidence[evidence.method == "task_arithmetic"]
    above = (linear.sign == 1).sum()
    first = "a tuned scale explains SVC's gain in part"
    first = "a tuned scale explains SVC's gain" if above < len(linear) / 2 else first
    first = "SVC is more than a scale" if above == len(linear) else first
    tuned = part_of(data, "tuned")
    tuned = tuned[(tuned.method == "task_arithmetic") & (tuned.backbone == linear.backbone.iloc[0])]
    gains = default_gains(tuned)
    second = "the default α needs no tuning" if max(gains) < 1 else "α needs tuning"
    others = evidence[evidence.method != "task_arithmetic"]
    return (
        f"{first} (Task Arithmetic: tuned SVC is above the tuned base in {above} and below in "
        f"{(linear.sign == -1).sum()} of {len(linear)} suites; other mergers: above in {(others.sign == 1).sum()} and "
        f"below in {(others.sign == -1).sum()} of {len(others)} cells); {second} (α on validation gains "
        f"{', '.join(f'{gain:+.1f}' for gain in gains)} points)"
    )


def claims(data):
    """Does α need tuning, and is SVC more than a tuned scale? Task Arithmetic, by the rule's parts."""
    said, own = verdict(data), own_rate(data)
    found = differences(own)
    found = found[(found.condition == BOTH) & (found.method == "task_arithmetic")]
    tuned = part_of(own, "tuned")
    tuned = tuned[(tuned.method == "task_arithmetic") & (tuned.backbone == found.backbone.iloc[0])]
    gains = default_gains(tuned)
    ours = f"tuned α gains {', '.join(f'{gain:+.1f}' for gain in gains)} points (n = {data.seed.nunique()})"
    answer = where_run(said, of_parts([max(gains) < 1]))
    return [
        Claim("α sweep", "The default α = 1/K needs no tuning (Task Arithmetic)", "not published", ours, answer),
        question("Is SVC more than a tuned scale? Both tuned, Task Arithmetic",
                 intervals(list(found.interval), "points", data.seed.nunique()), said),
    ]  # fmt: skip


def default_gains(tuned):
    """By how many points α chosen on validation is better than the default, for each suite."""
    found = [choices(rows) for _, rows in tuned.groupby("suite")]
    return [x[SVC_ALPHA].value.mean() - x[SVC].value.mean() for x in found]


CAPTIONS = {
    "alpha_sweep": "Accuracy over SVC's floor α.",
    "scale_sweep": "Accuracy over the scale after merging.",
    "scales_apart": "Accuracy over the scale of the matrices and that of all other tensors, each with its own.",
    "gains_over_tuned_scales": "SVC against the base at its tuned scale, and both tuned.",
    "gains_by_learning_rate": "The same by the experts' learning rate.",
    "accuracy_by_basis": "Accuracy of SVC in other bases of the merged update than the default.",
}

DEVIATIONS = (
    "Embedded suite: glyph recognition and a tiny CLIP trained here, instead of CLIP ViT on photographs.",
    "Scales, chosen values and other bases are ours; the paper keeps scale 1 throughout, and its α sweep's numbers are "
    "not known.",
    "SVC may tune either of two knobs (8 values of α, 13 scales), the base merger one (13 scales): chance favours SVC.",
    "The other tensors are biases, norms, convolutions and embeddings, which SVC leaves at the merger's own scale (for "
    "plain_sum the mean, for task_arithmetic 0.3 Σ).",
    "On Iso-C and Iso-CTS the basis of SVC is arbitrary; what other rows of these mergers show is the default basis's.",
)

EXPERIMENT = Experiment(
    __doc__,
    SCALES,
    measure,
    draw,
    compare,
    verdict,
    published="merging",
    tables=tables,
    deviations=DEVIATIONS,
    styles=comparison.merging_styles(),
    claims=claims,
    captions=CAPTIONS,
)

if __name__ == "__main__":
    run(EXPERIMENT)
