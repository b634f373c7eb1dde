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

import math
from dataclasses import dataclass
from functools import partial

import pandas as pd

from common.cache import cached_rows
from common.lab import figures
from common.lab.report import published_accuracy
from common.lab.run import Experiment, run
from common.lab.statistics import paired_interval, spread, with_bounds
from merging import MERGERS, apply, calibrate, calibration, mergers, task_vector
from merging.suites import comparison, vision

SPACES = ("none", "output", "input")


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)
    suites: tuple[int, ...] = (8, 14)  # numbers of tasks
    backbones: tuple[str, ...] = ("glyph-96",)  # glyph-WIDTH, or ViT-B/32 (from the hub)
    methods: tuple[str, ...] = tuple(MERGERS)
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
    yield from vision.measure_suites(settings, context, partial(measure_suite, settings.methods))


def measure_suite(methods, suite, seed):
    """All rows of one suite and seed; cached merger by merger, so that a killed run goes on where it was."""
    updates = [task_vector(expert, suite.pretrained) for expert in suite.experts]
    yield from cached_rows("reference_models", {"suite": suite.key}, suite.own_rows)
    for method in methods:
        inputs = {"suite": suite.key, "method": method, "seed": seed}
        build = partial(merger_rows, suite, updates, method, seed)
        yield from cached_rows("calibration_space", inputs, build)


def merger_rows(suite, updates, method, seed):
    """One merger without SVC and in both spaces, scored together: each against the base, and output against input."""
    merged = mergers.merge(method, updates, seed)
    alpha = calibration.published_alpha(method, len(updates))
    found = {"none": merged} | {s: calibrate(merged, updates, alpha=alpha, space=s) for s in ("output", "input")}
    common = dict(method=method, scale_rule="fixed", scale=1.0)
    labelled = [
        (dict(common, svc=space, alpha=None if space == "none" else alpha), apply(suite.pretrained, update))
        for space, update in found.items()
    ]
    yield from suite.rows(labelled, pairs=[{}, {"": 0, "_over_input": 2}, {"": 0}])


# From here on only the table is seen --------------------------------------------------------------------------------

DIFFERENCES = {  # name: rows of this `svc`, and their counts
    "output − input": ("output", "_over_input"),
    "input − base": ("input", ""),
    "output − base": ("output", ""),
}
IN_SPACE = {"output": " + SVC, output space", "input": " + SVC, input space", "none": ""}


def methods_of(data):
    return [method for method in MERGERS if method in set(data.method)]


def in_order(data):
    """The mergers' rows: small suites first, mergers as in the library's table, base before output before input."""
    places = {name: place for place, name in enumerate([*MERGERS, *SPACES])}
    merged = data[data.method.isin(MERGERS)]
    return merged.sort_values(
        ["suite", "method", "svc"], key=lambda c: c if c.name == "suite" else c.map(places), kind="stable"
    )


def intervals(data):
    """Each difference of each merger, one row an interval, in points."""
    found = []
    for (backbone, suite, method), rows in in_order(data).groupby(["backbone", "suite", "method"], sort=False):
        for name, (space, suffix) in DIFFERENCES.items():
            interval = paired_interval(rows[rows.svc == space], f"gained{suffix}", f"lost{suffix}")
            found.append(dict(backbone=backbone, suite=suite, method=method, difference=name, interval=interval))
    return pd.DataFrame(found)


def seed_means(data):
    """Mean accuracy over the tasks, one row for each backbone, suite, method, space and seed."""
    return in_order(data).groupby(["backbone", "suite", "method", "svc", "seed"], sort=False).value.mean().reset_index()


def draw(data):
    data = data[data.backbone == data.backbone.iloc[0]]
    panels = {suite: f"{suite} tasks" for suite in data.suite.unique()}
    gaps = intervals(data).query("difference == 'output − input'").reset_index(drop=True)
    gaps = with_bounds(gaps, "interval")
    output = in_order(data[(data.svc == "output") & (data.suite == data.suite.max())])
    points = 100 * (output.gained_over_input - output.lost_over_input) / output.images
    common = dict(panel="suite", names=panels | {"none": "base", "output": "output space", "input": "input space"})
    forest = dict(item="method", condition="difference", xlabel="output − input, mean accuracy, points")
    matrix = dict(row="task", column="method", text="output − input, points", cells="+z.0f")
    return {
        "accuracy_by_space": figures.paired(seed_means(data), xlabel="mean accuracy of the tasks, %", **common),
        "output_minus_input": figures.forest(gaps, **forest, **common),
        "output_minus_input_by_task": figures.matrix(output.assign(value=points), **matrix, **common),
    }


def own_number(*wanted):
    """The paper's own number; what others measured on the hub's checkpoints has no counterpart with SVC."""
    value, source = published_accuracy(*wanted)
    return math.nan if source else value


def compare(data, published):
    """The published table on the smallest suite, and (output − input) on every suite."""
    means, lines = seed_means(data[data.method.isin(mergers.PUBLISHED)]), []
    for (backbone, suite, method), rows in means.groupby(["backbone", "suite", "method"], sort=False):
        ours = rows.pivot(index="seed", columns="svc", values="value")
        stands_for, setting = vision.STANDS_FOR.get(backbone, backbone), vision.setting(backbone)
        paper = {svc: own_number(published, f"{suite} vision tasks", stands_for, method, svc) for svc in SPACES}
        shown = {f"{method}{IN_SPACE[svc]}": (ours[svc], paper[svc]) for svc in SPACES}
        shown = shown if suite == means.suite.min() else {}
        shown[f"{method}: output − input"] = (ours.output - ours.input, paper["output"] - paper["input"])
        for name, (values, number) in shown.items():
            numbers = dict(paper=number, ours=values.mean(), sd=values.std(), n=len(values), same_setting=setting)
            lines.append(dict(quantity=f"{suite} tasks, {backbone}: {name}", **numbers))
    return pd.DataFrame(lines)


def tables(data):
    keys = ["backbone", "suite", "method"]
    means = seed_means(data).groupby([*keys, "svc"], sort=False).value.apply(spread)
    gaps = intervals(data).set_index([*keys, "difference"]).interval.map(str).unstack(sort=False)
    shown = {
        "Mean accuracy of the tasks, %": means.unstack(sort=False).rename(columns={"none": "base"}).reset_index(),
        "Paired differences in points, 95 % interval": gaps.reset_index(),
    }
    for (backbone, suite), rows in in_order(data).groupby(["backbone", "suite"], sort=False):
        by_task = rows.groupby(["method", "svc", "task"], sort=False).value.mean().unstack(sort=False).round(1)
        shown[f"Task by task, {suite} tasks, {backbone}, %"] = by_task.reset_index()
    return shown


def verdict(data):
    if not vision.is_evidence(data, ["glyph-96"]) or not set(mergers.PUBLISHED) <= set(data.method):
        return "not run at this scale"
    found = intervals(data[data.method.isin(mergers.PUBLISHED)])
    gaps, inputs = (found[found.difference == name] for name in ("output − input", "input − base"))
    above, linear = gaps.interval.map(lambda x: x.sign == 1), gaps[gaps.method.isin(mergers.PUBLISHED[:3])]
    direction = all(interval.mean > 0 for interval in linear.interval)
    result = "reproduced" if above.all() else "direction reproduced" if direction else "not reproduced"
    signs = inputs.interval.map(lambda x: x.sign)
    return (
        f"{result}: output is above input space in {above.sum()} of {len(gaps)} cells, on average by "
        f"{gaps.interval.map(lambda x: x.mean).mean():.1f} points. Input space is above the base merger in "
        f"{(signs == 1).sum()} and below it in {(signs == -1).sum()} of {len(inputs)}."
    )


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
)

if __name__ == "__main__":
    run(EXPERIMENT)
