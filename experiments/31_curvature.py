"""Curvature against augmented flatness and density along training, and whether SVC's merged models are flatter.

Part "training": snapshots of ViTs trained from scratch as in experiment 03. On the same test images, for the key and
value matrices of every MLP: traces of Hessian, GGN (for cross-entropy also the Fisher) and empirical Fisher, beside
augmented flatness AF and activation density. Part "merging": pretrained, expert and merged image encoders, each merger
with and without SVC, at its own scale and at one tuned on validation; the test loss of each task under its frozen head,
as a function of the matrices that SVC treats. Neither question is in the papers.

Traces depend on the scale of the weights. The relative trace Σ_W mean(W²) · tr(H_W) does not, matrix by matrix: it is
twice what the loss gains, to second order, when each weight gets independent noise of its matrix's root mean square.
Two sharpnesses no rescaling of weights can change at all: what the loss gains when each weight gets noise of a tenth of
itself, and under the steepest such step (adaptive SAM). What is said of flatness rests on the first of these.

Claim    along training augmented flatness follows the curvature, and so does density; SVC's models are flatter.
Verdict  first, with at least 3 training seeds (else "training: not run at this scale"), by Spearman's correlation over
         the snapshots after step 0 of a run, sums over layers, of AF_K with the GGN trace of the key matrices:
         "augmented flatness follows the GGN" if it is above 0.7 in every run of vanilla and modified, "in part" if
         their mean is, else "does not follow". The same for density with the sharpness under relative noise ("density
         follows sharpness"); its correlation with the raw trace stands beside it and decides nothing. Second, on the
         8-task suite with at least 3 seeds, or of ViT-B/32 (else "merging: not run at this scale"), from the 95 %
         interval of the relative change of the GGN trace, SVC against base, paired by seed and task: "flatter" if it
         lies below 0 for all mergers at their own and at tuned scales, "flatter at own scale only" if at own scale for
         all, "sharper" if above 0 for all at both, else "it depends on the merger".
Cost     smoke 40 s; laptop about 15 min (the committed run had one core of a busy machine and took 47), workstation
         about 1 h (2 idle cores), both estimated, with training unless 03 has run; paper: not timed.
Run      python experiments/31_curvature.py --scale laptop
"""

from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch.nn.functional as F
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from common import hessian
from common.cache import cached_rows
from common.lab import figures
from common.lab.claims import question
from common.lab.curvature import curvature_rows, evenly_spaced
from common.lab.report import comparison_row
from common.lab.run import Experiment, run
from common.lab.statistics import relative_change, spread
from common.training import TrainingRecipe
from merging import MERGERS, apply, calibrate, mergers, tuning
from merging.calibration import SVC_MATRICES, published_alpha
from merging.suites import comparison, vision
from merging.suites.suite import measure_suites
from sparsity.studies.curvature import measure_curvature
from sparsity.studies.images import ImageTask
from sparsity.studies.measurement import measure_all
from sparsity.studies.recipes import VIT
from sparsity.studies.runs import STYLES, check_variants, plan_setting


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)  # of the merging suites' experts
    suites: tuple[int, ...] = (8,)  # numbers of tasks
    backbones: tuple[str, ...] = ("glyph-96",)  # glyph-WIDTH, or ViT-B/32 (from the hub)
    methods: tuple[str, ...] = ("task_arithmetic", "plain_sum", "ties", "iso_c")
    recipe: vision.GlyphRecipe = vision.GlyphRecipe()
    images: int = 24  # of each task and model
    training_seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("vanilla", "modified", "vanilla, MLP norms undecayed")  # of sparsity.studies.runs
    task: ImageTask = VIT["laptop"]["task"]
    training: TrainingRecipe = VIT["laptop"]["recipe"]
    training_images: int = 64  # test images on which each snapshot is measured
    log_every: int = VIT["laptop"]["log_every"]
    snapshots: int = 16  # of each run
    probes: int = 16  # random vectors per Hessian trace, draws of labels for a sampled Fisher
    ggn: str = "fisher"  # how the GGN trace is taken: exactly, or as sampled_fisher, where there are many classes

    def __post_init__(self):
        vision.check_suites(self.backbones, self.suites)
        mergers.check_methods(self.methods)
        check_variants(self.variants)
        if self.ggn not in ("fisher", "sampled_fisher", "ggn"):
            raise ValueError(f"ggn must be fisher, sampled_fisher or ggn, got {self.ggn!r}")


SMALL = dict(images=4, training_images=4, training_seeds=(0,), variants=("vanilla", "modified"), probes=2, log_every=1,
             snapshots=8)  # fmt: skip
SCALES = {
    "smoke": Settings(
        suites=(2,), backbones=("glyph-32",), methods=("task_arithmetic",), recipe=vision.SMOKE,
        task=VIT["smoke"]["task"], training=replace(VIT["smoke"]["recipe"], steps=3), **SMALL,
    ),
    "laptop": Settings(),
    "workstation": Settings(
        seeds=(0, 1, 2), images=64, training_images=128, probes=32,
        task=VIT["workstation"]["task"], training=VIT["workstation"]["recipe"],
        log_every=VIT["workstation"]["log_every"],
    ),
    "paper": Settings(
        backbones=("ViT-B/32",), training_seeds=(0,), ggn="sampled_fisher",
        task=VIT["paper"]["task"], training=VIT["paper"]["recipe"], log_every=VIT["paper"]["log_every"],
    ),
}  # fmt: skip


def measure(settings, context):
    yield from measure_training(settings, context)
    parts = [(method,) for method in ("references", *settings.methods)]
    yield from measure_suites(vision, settings, context, measure_models, parts)


def measure_training(settings, context):
    """Rows of the snapshots of every run: the networks of experiment 03."""
    seeds = dict.fromkeys(settings.variants, settings.training_seeds)
    options = dict(log_every=settings.log_every, snapshots=settings.snapshots)
    plan = plan_setting("", settings.task, settings.training, seeds, **options)
    measure_run = partial(measure_curvature, settings.training_images, settings.probes, settings.ggn)
    for labels, rows in measure_all(plan, context, measure_run):
        yield from (dict(part="training", seed=labels["seed"], variant=labels["variant"]) | row for row in rows)


# Merged models -------------------------------------------------------------------------------------------------------


def measure_models(settings, suite, backbone, seed, method):
    """The rows of one merger, or of the pretrained model and the experts, on one suite; cached."""
    inputs = dict(suite=suite.key, method=method, seed=seed, images=settings.images, probes=settings.probes)
    build = partial(model_rows, settings, suite, method, seed)
    for row in cached_rows("curvature_merging", inputs | dict(ggn=settings.ggn), build):
        yield dict(part="merging") | row


def model_rows(settings, suite, method, seed):
    for labels, states in models_of(suite, method, seed):
        for task, network, state in zip(suite.tasks, suite.networks, states, strict=True):
            outcome = dict(matrix="all", metric="accuracy", value=suite.scores([state], tasks=[task])[0])
            for row in (outcome, *head_rows(settings, suite, task, network.head, state, seed)):
                yield dict(method=method, svc="none", scale_rule="fixed", scale=1.0, task=task) | labels | row


def models_of(suite, method, seed):
    """Labels and, for each task, the state of every model: the same one for all tasks, but for the experts."""
    if method == "references":
        yield dict(method="pretrained"), [suite.pretrained] * len(suite.tasks)
        yield dict(method="expert"), suite.experts
        return
    updates = suite.task_vectors()
    merged = mergers.merge(method, updates, seed)
    calibrated = calibrate(merged, updates, alpha=published_alpha(method, len(updates)))
    for svc, update in {"none": merged, "output": calibrated}.items():
        scores = partial(comparison.validation_scores, suite, update)
        for rule, factor in {"fixed": 1.0, "validation": tuning.tune_scale(scores)}.items():
            labels = dict(svc=svc, scale_rule=rule, scale=factor)
            yield labels, [apply(suite.pretrained, update, factor)] * len(suite.tasks)


def head_rows(settings, suite, task, head, state, seed):
    """Curvature of one task's test loss under its frozen head, over the matrices that SVC treats."""
    suite.encoder.load_state_dict(state, strict=False)  # CLIP's frozen projection is in the encoder alone
    named = dict(suite.encoder.named_parameters())
    treated = [name for name in state if name in named and SVC_MATRICES(name, named[name])]
    batches = evenly_spaced(suite.batches(task, "test"), settings.images)
    risk = hessian.empirical_risk(suite.encoder, batches, treated, logits=partial(head_logits, head))
    yield from curvature_rows(risk, {"hessian": "hessian", "ggn": settings.ggn}, settings.probes, seed)


def head_logits(head, encoder, images):
    return F.normalize(encoder(images), dim=-1) @ head.T


# From here on only the table is seen --------------------------------------------------------------------------------

KINDS = {
    "augmented_flatness": "augmented flatness", "ggn": "GGN = Fisher", "hessian": "Hessian",
    "empirical_fisher": "empirical Fisher",
}  # fmt: skip
RULES = {"fixed": "own scale", "validation": "tuned scale"}
MEASURES = {
    "ggn": "GGN trace",
    "relative ggn": "relative GGN trace",
    "largest eigenvalue": "largest Hessian eigenvalue",
    "noise sharpness": "sharpness, relative noise",
    "adaptive sharpness": "sharpness, adaptive SAM",
}
CELL = ["backbone", "suite", "method", "svc", "scale_rule", "seed", "task"]


def training_table(data):
    """Return a row per snapshot after step 0: traces and AF (sums over layers), densities (means), loss."""
    rows = data[(data.part == "training") & (data.step > 0)]
    keys = ["variant", "seed", "step"]
    sums = rows[rows.metric.isin(KINDS)].groupby([*keys, "metric", "matrix"], sort=False).value.sum().unstack([-2, -1])
    sums.columns = [f"{metric} {matrix}" for metric, matrix in sums.columns]
    keyed = rows[(rows.metric == "ggn") & (rows.matrix == "key")]
    sums["relative ggn key"] = keyed.assign(own=keyed.value * keyed.mean_square).groupby(keys, sort=False).own.sum()
    means = rows[rows.matrix == "all"].groupby([*keys, "metric"], sort=False).value.mean().unstack()
    return sums.join(means).reset_index()


def correlations(data):
    """Return Spearman's correlations over the snapshots of each run: variant, seed, pair, value."""
    pairs = {
        "AF_K, GGN of keys": ("augmented_flatness key", "ggn key"),
        "AF_V, GGN of values": ("augmented_flatness value", "ggn value"),
        "AF_K, Hessian of keys": ("augmented_flatness key", "hessian key"),
        "AF_K, empirical Fisher of keys": ("augmented_flatness key", "empirical_fisher key"),
        "density, GGN of keys": ("density", "ggn key"),
        "density, relative GGN of keys": ("density", "relative ggn key"),
        "density, sharpness under noise": ("density", "noise sharpness"),
        "density, sharpness of adaptive SAM": ("density", "adaptive sharpness"),
        "density, AF_K": ("density", "augmented_flatness key"),
    }
    found = []
    for (variant, seed), part in training_table(data).groupby(["variant", "seed"], sort=False):
        for pair, (one, other) in pairs.items():
            value = spearmanr(part[one], part[other]).statistic
            found.append(dict(variant=variant, seed=seed, pair=pair, value=value))
    return pd.DataFrame(found)


def merging_table(data):
    """Return a row per model, seed and task: traces (sums over matrices), the Hessian's error, loss, …"""
    rows = data[data.part == "merging"]
    traces = rows[rows.matrix != "all"]
    traces = traces.assign(weighted=traces.value * traces.mean_square, variance=traces.error**2)
    sums = traces.groupby([*CELL, "metric"], sort=False)[["value", "weighted", "variance"]].sum().unstack()
    table = rows[rows.matrix == "all"].groupby([*CELL, "metric"], sort=False).value.mean().unstack()
    for kind in ("hessian", "ggn"):
        table[kind], table[f"relative {kind}"] = sums["value"][kind], sums["weighted"][kind]
    return table.assign(hessian_error=sums["variance"]["hessian"] ** 0.5).reset_index()


def changes(data):
    """By how many % SVC changes each measure, by backbone, suite, merger and rule; paired by seed and task.

    Noise can lower a loss: pairs in which a sharpness is not above 0 have no relative change, and are left out.
    """
    table, found = merging_table(data), []
    merged = table[table.method.isin(MERGERS)]
    for (backbone, suite, method, rule), part in merged.groupby(
        ["backbone", "suite", "method", "scale_rule"], sort=False
    ):
        for measure in MEASURES:
            cells = part.pivot(index=["seed", "task"], columns="svc", values=measure)
            positive = cells[(cells > 0).all(axis=1)]
            if positive.empty:
                continue
            change = relative_change(positive["none"], positive["output"])
            text = f"{change}" if len(positive) == len(cells) else f"{change} ({len(positive)} of {len(cells)} pairs)"
            labels = dict(backbone=backbone, suite=suite, method=method, scale_rule=rule, measure=measure)
            found.append(labels | dict(mean=change.mean, low=change.low, high=change.high, text=text))
    return pd.DataFrame(found)


def draw(data):
    snapshots, models = training_table(data), merging_table(data)
    longer = [
        snapshots[["variant", "seed", "step"]].assign(kind=text, value=snapshots[f"{metric} key"])
        for metric, text in KINDS.items()
    ]
    longer = pd.concat(longer)
    longer = longer[longer.value > 0]  # a Hessian's trace may be below 0, early on
    change = changes(data)
    change = change.assign(panel=change.suite.map("{:.0f} tasks, ".format) + change.scale_rule.map(RULES))
    keys = ["backbone", "suite", "method", "svc", "scale_rule", "seed"]
    means = models.groupby(keys, sort=False)[["loss", "ggn"]].mean().reset_index()
    return {
        "along_training": figures.lines(
            longer, x="step", by="kind", panel="variant", yscale="log",
            xlabel="training step", ylabel="AF_K, traces of key matrices (sum over layers)",
        ),
        "augmented_flatness_against_ggn": scatter(
            snapshots, "ggn key", "augmented_flatness key", "GGN trace of the key matrices", "augmented flatness AF_K"
        ),
        "density_against_ggn": scatter(
            snapshots.assign(percent=100 * snapshots.density), "ggn key", "percent",
            "GGN trace of the key matrices", "density, %",
        ),
        "density_against_sharpness": scatter(
            snapshots.assign(percent=100 * snapshots.density), "noise sharpness", "percent",
            "gain of the loss under relative noise, nats", "density, %",
        ),
        "change_by_svc": figures.forest(
            change, item="method", condition="measure", panel="panel", names=MEASURES,
            xlabel="change of SVC's model against its base, %",
        ),
        "curvature_against_loss": scatter(
            means, "loss", "ggn", "mean test loss of the tasks", "mean GGN trace", by="method", filled="svc"
        ),
    }  # fmt: skip


@figures.plot_style
def scatter(rows, x, y, xlabel, ylabel, by="variant", filled=None):
    """Draw points in logarithmic axes, a colour per value of `by`; hollow where the column `filled` is "none"."""
    figure, axes = figures.new_figure(width=5.4, height=3.4)
    tones = {name: figures.colour(name, place) for place, name in enumerate(rows[by].unique())}
    rows = rows[(rows[x] > 0) & (rows[y] > 0)]
    for row in rows.to_dict("records"):
        inside = "white" if filled and row[filled] == "none" else tones[row[by]]
        axes[0, 0].plot(row[x], row[y], "o", ms=5, mew=1.2, color=tones[row[by]], mfc=inside)
    for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis):
        figures.log_axis(axis)
    axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
    handles = [Line2D([], [], ls="", marker="o", color=tone) for tone in tones.values()]
    texts = [figures.label(name) for name in tones]
    if filled:
        handles += [
            Line2D([], [], ls="", marker="o", color=figures.INK, mfc=inside) for inside in ("white", figures.INK)
        ]
        texts += [figures.label(name) for name in ("none", "output")]
    figure.legend(handles, texts, loc="outside right upper")
    return figure


def compare(data, published):
    lines, same = [], "not in the papers"
    for (pair, variant), part in correlations(data).groupby(["pair", "variant"], sort=False):
        lines.append(comparison_row(f"Spearman's ρ along training: {pair}; {variant}", part.value, same))
    models = merging_table(data)
    models = models[models.method.isin(MERGERS)]
    for (suite, method, rule), part in models.groupby(["suite", "method", "scale_rule"], sort=False):
        by_seed = part.groupby(["seed", "svc"]).ggn.mean().unstack()
        quantity = f"change of the mean GGN trace by SVC, %: {suite:.0f} tasks, {method}, {RULES[rule]}"
        lines.append(comparison_row(quantity, 100 * (by_seed["output"] / by_seed["none"] - 1), same))
    return pd.DataFrame(lines)


def tables(data):
    rho = correlations(data).groupby(["variant", "pair"], sort=False).value.agg(lambda x: spread(x, 2)).unstack()
    snapshots = training_table(data)
    last = snapshots[snapshots.step == snapshots.step.max()]
    columns = {"density": 3, "loss": 3, "noise sharpness": 4, "adaptive sharpness": 3, "largest eigenvalue": 3}
    columns |= {"relative ggn key": 4}
    columns |= {f"{metric} {matrix}": 4 for metric in KINDS for matrix in ("key", "value")}
    ends = [
        dict(variant=variant) | {name: spread(part[name], digits) for name, digits in columns.items()}
        for variant, part in last.groupby("variant", sort=False)
    ]
    change = changes(data)
    keys = ["backbone", "suite", "method", "scale_rule"]
    wide = (
        change.pivot(index=keys, columns="measure", values="text")
        .reindex(columns=list(MEASURES))
        .rename(columns=MEASURES)
    )
    order = list(dict.fromkeys(zip(*(change[key] for key in keys), strict=True)))
    return {
        "Spearman's correlation over the snapshots of a run (mean ± sd over seeds)": rho.reset_index(),
        "Last snapshot: sums over layers of traces and augmented flatness": pd.DataFrame(ends),
        "Merged models: means over tasks (± sd over seeds)": models_table(data),
        "Change of SVC's model against its base, % [95 % interval over seeds and tasks]": wide.loc[order].reset_index(),
    }


def models_table(data):
    columns = {"accuracy": 1, "loss": 3, "ggn": 1, "relative ggn": 3, "hessian": 1, "hessian_error": 1}
    columns |= {"relative hessian": 3, "largest eigenvalue": 2, "noise sharpness": 3, "adaptive sharpness": 3}
    lines = []
    keys = ["backbone", "suite", "method", "svc", "scale_rule"]
    for labels, part in merging_table(data).groupby(keys, sort=False):
        means = part.groupby("seed").mean(numeric_only=True)
        means["hessian_error"] = part.groupby("seed").hessian_error.apply(lambda x: (x**2).sum() ** 0.5 / len(x))
        cells = {name: spread(means[name], digits) for name, digits in columns.items()}
        lines.append(dict(zip(keys, labels, strict=True)) | cells)
    return pd.DataFrame(lines)


def verdict(data):
    return f"{training_verdict(data)}; {merging_verdict(data)}"


def training_verdict(data):
    found = correlations(data)
    found = found[found.variant.isin(["vanilla", "modified"])]
    if found.groupby("variant").seed.nunique().min() < 3:
        return "training: not run at this scale"
    texts = []
    judged = {
        "AF_K, GGN of keys": ("augmented flatness", "the GGN"),
        "density, sharpness under noise": ("density", "sharpness"),
    }
    for pair, (subject, what) in judged.items():
        values = found[found.pair == pair].value
        answer = f"follows {what} in part" if values.mean() > 0.7 else f"does not follow {what}"
        answer = f"follows {what}" if values.min() > 0.7 else answer
        texts.append(f"{subject} {answer} (ρ {span(values)})")
    raw = found[found.pair == "density, GGN of keys"].value
    return f"training: {', '.join(texts)}; density with the raw trace: ρ {span(raw)}"


def span(values):
    return f"from {values.min():.2f} to {values.max():.2f}"


def merging_verdict(data):
    rows = data[(data.part == "merging") & (data.suite == 8)]
    if rows.empty or (rows.seed.nunique() < 3 and "ViT-B/32" not in set(rows.backbone)):
        return "merging: not run at this scale"
    seen = changes(rows)
    seen = seen[seen.measure == "ggn"]
    below, above = seen.high < 0, seen.low > 0
    own = seen.scale_rule == "fixed"
    answer = "whether SVC's models are flatter depends on the merger"
    answer = "SVC's models are flatter at own scale only" if below[own].all() else answer
    answer = "SVC's models are flatter" if below.all() else answer
    answer = "SVC's models are sharper" if above.all() else answer
    counts = [
        f"{RULES[rule]}: below 0 for {below[part].sum()}, above for {above[part].sum()} of {part.sum()} mergers"
        for rule, part in {"fixed": own, "validation": ~own}.items()
    ]
    return f"merging: {answer} ({'; '.join(counts)})"


def claims(data):
    """Both correlations of the first part; what SVC does to the curvature of merged models."""
    training, merging = training_verdict(data), merging_verdict(data)
    found = correlations(data)
    found = found[found.variant.isin(["vanilla", "modified"])]
    seeds = found.groupby("variant").seed.nunique().min()
    texts = {
        "AF_K, GGN of keys": "Does augmented flatness follow the GGN trace along training?",
        "density, sharpness under noise": "Does density follow the sharpness under relative noise along training?",
    }
    stated = [
        question(text, f"ρ {span(found[found.pair == pair].value)} (n = {seeds} per variant)",
                 training.removeprefix("training: "))
        for pair, text in texts.items()
    ]  # fmt: skip
    seen = changes(data)
    seen = seen[seen.measure == "ggn"] if len(seen) else seen
    ours = "not measured"
    if len(seen):
        below, above = (seen.high < 0).sum(), (seen.low > 0).sum()
        ours = (
            f"lower for {below}, higher for {above} of {len(seen)} (n = {data[data.part == 'merging'].seed.nunique()})"
        )
    text = "Does SVC lower the GGN trace of merged models, at own and tuned scales?"
    return [*stated, question(text, ours, merging.removeprefix("merging: "))]


CAPTIONS = {
    "along_training": "Augmented flatness and curvature of the key matrices along training; three seeds.",
    "augmented_flatness_against_ggn": "Augmented flatness against the GGN trace, a point for each snapshot.",
    "density_against_ggn": "Density against the GGN trace, a point for each snapshot.",
    "density_against_sharpness": "Density against the sharpness under relative noise, a point for each snapshot.",
    "change_by_svc": "Change of curvature and sharpness by SVC.",
    "curvature_against_loss": "Curvature of pretrained, expert and merged models against their test loss.",
}

DEVIATIONS = (
    "Neither paper measures these curvatures; AF and density are the sparsity paper's, mergers and SVC the merging "
    "paper's.",
    "Curvature is that of the test loss in evaluation mode, on a few dozen images, not of the training loss.",
    "That density was to follow the raw GGN trace was the rule at first; it was changed when numbers were known, as "
    "the raw trace depends on the scale of the weights, which training changes.",
    "Noise on the weights lowers the loss of some models on a few dozen images: pairs in which a sharpness is not "
    "above 0 are left out of its relative change, which then says how many are left.",
    "Weight decay is not part of the loss: its curvature would add a constant to every eigenvalue.",
    "Hessian traces are estimates (random signs); their errors are in the table. GGN and Fisher traces are exact at "
    "laptop and workstation scale.",
    "Training part: step 0 is left out, where a head of zeros makes all gradients of the MLPs vanish.",
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
    styles=STYLES | comparison.merging_styles(),
    claims=claims,
    captions=CAPTIONS,
)

if __name__ == "__main__":
    run(EXPERIMENT)
