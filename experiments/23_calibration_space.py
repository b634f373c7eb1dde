"""Output space against input space: where SVC should compare the merged update with the experts' (ablation table).

Claim    Calibration in the output space (left singular vectors) helps, in the input space it does not: on 8 tasks,
         CLIP ViT-B/32, base / output / input is 68.9 / 81.9 / 64.9 for Task Arithmetic, 72.6 / 80.0 / 65.7 for TIES,
         65.8 / 80.7 / 67.5 for DARE, 84.0 / 84.8 / 84.0 for TSV-M, 83.1 / 84.6 / 82.1 for Iso-C, 81.4 / 85.6 / 85.5
         for Iso-CTS.
Verdict  on suites of 8, 14 and 20 tasks, glyph-96 and at least 3 seeds, or on the 8-task suite of ViT-B/32 (else "not
         run at this scale"), from the paired difference (output − input) in mean accuracy, both at scale 1 and α = 1
         for TSV-M, 1/K elsewhere: "reproduced" if its 95 % interval is above 0 for the six published mergers in every
         suite; "direction reproduced" if its mean is above 0 for Task Arithmetic, TIES and DARE in every suite; else
         "not reproduced". It is said beside that in how many cells input space is above and below the base merger.
         Interval: seeds, tasks and images resampled.
Cost     smoke 10 s; laptop 1 min, workstation 2 min (2 cores, once experiment 22 has trained the experts);
         paper: nine passes over the 8 test sets with three models each, not timed.
Run      python experiments/23_calibration_space.py --scale laptop
"""

from dataclasses import dataclass

import pandas as pd

from common.lab import figures
from common.lab.claims import Claim, question, word
from common.lab.run import Experiment, run
from merging import MERGERS, mergers
from merging.suites import ablations, comparison, vision
from merging.suites import claims as answers
from merging.suites.comparison import CELL
from merging.suites.suite import measure_suites


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)
    suites: tuple[int, ...] = (8, 14)  # numbers of tasks
    backbones: tuple[str, ...] = ("glyph-96",)  # glyph-WIDTH, or ViT-B/32 (from the hub)
    methods: tuple[str, ...] = mergers.OFFICIAL
    recipe: vision.GlyphRecipe = vision.GlyphRecipe()

    def __post_init__(self):
        vision.check_suites(self.backbones, self.suites)
        mergers.check_methods(self.methods)


SCALES = {
    "smoke": Settings(suites=(2,), backbones=("glyph-32",), recipe=vision.SMOKE),
    "laptop": Settings(),
    "workstation": Settings((0, 1, 2), (8, 14, 20)),
    "paper": Settings(suites=(8,), backbones=("ViT-B/32",)),
}


def measure(settings, context):
    yield from measure_suites(vision, settings, context, measure_suite)


def measure_suite(settings, suite, backbone, seed):
    return comparison.suite_rows(suite, settings.methods, seed, ablations.space_rows)


# From here on only the table is seen --------------------------------------------------------------------------------

SPACES = ("none", "output", "input")
GAP = "output − input"
DIFFERENCES = {GAP: ("output", "_over_input"), "input − base": ("input", ""), "output − base": ("output", "")}
COMPARED = {  # row: what follows the merger's name, and the published `svc`
    "none": ("", "none"),
    "output": (" + SVC, output space", "output"),
    "input": (" + SVC, input space", "input"),
    GAP: (f": {GAP}", GAP),
}


def named(data):
    """The rows of mergers in order, with the space in the column `row`: base before output before input."""
    merged = data[data.method.isin(MERGERS)]
    return comparison.in_order(merged.assign(row=merged.svc), [*CELL, "row"], row=SPACES)


def differences(data):
    return comparison.differences(named(data), DIFFERENCES)


def draw(data):
    data = data[data.backbone == data.backbone.iloc[0]]
    rows, gaps = named(data), differences(data)
    panels = {suite: f"{suite} tasks" for suite in data.suite.unique()}
    output = rows[(rows.row == "output") & (rows.suite == data.suite.max())]
    points = 100 * (output.gained_over_input - output.lost_over_input) / output.images
    common = dict(panel="suite", names=panels | {"none": "base", "output": "output space", "input": "input space"})
    paired = dict(condition="row", xlabel="mean accuracy of the tasks, %")
    forest = dict(item="method", condition="condition", xlabel="output − input, mean accuracy, points")
    matrix = dict(row="task", column="method", text="output − input, points", cells="+z.0f")
    return {
        "accuracy_by_space": figures.paired(comparison.seed_means(rows), **paired, **common),
        "output_minus_input": figures.forest(gaps[gaps.condition == GAP], **forest, **common),
        "output_minus_input_by_task": figures.matrix(output.assign(value=points), **matrix, **common),
    }


def compare(data, published):
    """The published table on the smallest suite, and (output − input) on every suite."""
    means = comparison.seed_means(named(data[data.method.isin(mergers.PUBLISHED)]))
    by_space = means.pivot(index=[*CELL, "seed"], columns="row", values="value")
    gaps = (by_space.output - by_space.input).rename("value").reset_index().assign(row=GAP)
    shown = pd.concat([means[means.suite == means.suite.min()], gaps])
    shown = comparison.in_order(shown, [*CELL, "row"], row=tuple(COMPARED))
    return comparison.compared(shown, published, own_number, vision.setting, COMPARED)


def own_number(published, backbone, suite, method, svc):
    """The paper's own number; what others measured on the hub's checkpoints has no counterpart with SVC."""
    if svc == GAP:
        output, _ = own_number(published, backbone, suite, method, "output")
        return output - own_number(published, backbone, suite, method, "input")[0], ""
    return vision.published_number(published, backbone, suite, method, svc, peers=False)


def tables(data):
    rows = named(data)
    means = comparison.spread_table(comparison.seed_means(rows))
    shown = {
        "Mean accuracy of the tasks, %": means.rename(columns={"none": "base"}),
        "Paired differences in points, 95 % interval": comparison.wide(differences(data)),
    }
    for (backbone, suite), part in rows.groupby(["backbone", "suite"], sort=False):
        by_task = part.groupby(["method", "svc", "task"], sort=False).value.mean().unstack(sort=False).round(1)
        shown[f"Task by task, {suite} tasks, {backbone}, %"] = by_task.reset_index()
    return shown


def verdict(data):
    if not vision.is_evidence(data, ["glyph-96"]) or not set(mergers.PUBLISHED) <= set(data.method):
        return "not run at this scale"
    found = differences(data[data.method.isin(mergers.PUBLISHED)])
    gaps, inputs = (found[found.condition == name] for name in (GAP, "input − base"))
    direction = (gaps["mean"][gaps.method.isin(mergers.PUBLISHED[:3])] > 0).all()
    above = gaps.sign == 1
    result = "reproduced" if above.all() else "direction reproduced" if direction else "not reproduced"
    return (
        f"{result}: output is above input space in {above.sum()} of {len(gaps)} cells, on average by "
        f"{gaps['mean'].mean():.1f} points. Input space is above the base merger in "
        f"{(inputs.sign == 1).sum()} and below it in {(inputs.sign == -1).sum()} of {len(inputs)}."
    )


def claims(data):
    """Output against input space, then input space by itself, which the rule counts and does not judge."""
    said, found = verdict(data), differences(named(data[data.method.isin(mergers.PUBLISHED)]))
    gaps, inputs = (found[found.condition == name] for name in (GAP, "input − base"))
    seeds = data.seed.nunique()
    text = "Calibrating in the output space is better than in the input space (six mergers)"
    return [
        Claim("ablation table", text, "6 of 6 (ViT-B/32)", answers.signs_in_words(gaps.sign, seeds), word(said)),
        question("Does SVC in the input space help too?", answers.signs_in_words(inputs.sign, seeds), said),
    ]


CAPTIONS = {
    "accuracy_by_space": "Mean accuracy without SVC, and with SVC in the output and in the input space.",
    "output_minus_input_by_task": "The same difference, task by task.",
    "output_minus_input": "Output space minus input space, for every merger and suite.",
}

DEVIATIONS = (
    "Embedded suite: 20 glyph-recognition tasks and a tiny CLIP of 4 layers trained here, instead of CLIP ViT on "
    "photographs; glyph-96 stands for ViT-B/32.",
    "Paper scale: experts of the hub, not the authors' own checkpoints; they hold query, key and value apart, which "
    "the authors' code calibrates as one matrix.",
    "open_clip stores `proj` as (in, out) and it is calibrated as it is stored, as in the authors' code: for this one "
    "tensor the two spaces are exchanged. Hugging Face's vision towers have no such tensor among those merged.",
    "α of the input space is taken to be that of the output space; no source states it.",
    "Iso-C and Iso-CTS have equal singular values, so SVC's basis on them is arbitrary in either space: here that of "
    "the float64 Gram matrix of the merged update.",
    "weight_average, plain_sum and star are ours; the paper's table has the other six mergers.",
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
