"""Augmented flatness of key and value layers along training: does it fall where activations become sparse?

Saved weights of a run are evaluated on the whole, un-augmented training split with gradients per sample (Section III-B
of arXiv 2605.25612 does the same on ImageNet); the training curve of single logged batches stands beside them. The
untrained network's output layer is zero, so that it has no gradients below it: "first" is the first saved step with
gradients. The identity density = AF_K / (T d_ff C_0) is a tautology: of any f that vanishes off the active entries
density is E[f] / E[f | active]. That it holds tests the probe, not the paper; what the paper says is that training
lowers augmented flatness AF_K, and that activations are sparse for that reason.

Claim    Training lowers AF_K, and density = AF_K / (T d_ff C_0) with it. In the authors' logged points (first 1.1 % of
         ImageNet) both fall, AF_K by a factor 0.7, and C_0 rises.
Verdict  for the vanilla network of the main setting, with at least 3 seeds (else "not run at this scale"):
         (a) the probe is right: the identity holds to 1e-5 in every layer, saved step, seed and variant (else
             "measured wrongly");
         (b) density, as a geometric mean over layers, falls from the first to the last saved step: the 95 % interval
             over seeds of its relative change is below 0;
         (c) AF_K falls too, in the same sense.
         "reproduced" if both fall; "density falls, AF_K does not" if the interval of AF_K is not below 0;
         "not reproduced" if that of density is not. Beside it stands what is free of the scales of x and g: AF_K over
         its value with σ' = 1 everywhere, E Σ ‖x‖² ‖g‖², which is the part of the gradient that activations let pass.
Cost     beyond the trained networks, which experiment 03 shares: smoke 10 s; laptop 1 min; workstation 30 min, with 4
         further networks (2 cores); paper: 16 passes over ImageNet, and CIFAR-10 for 150 epochs 5 times.
Run      python experiments/01_augmented_flatness.py --scale laptop
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from common.lab import figures
from common.lab.claims import Claim, intervals, question, where_run
from common.lab.results import published as published_table
from common.lab.run import Experiment, run
from common.lab.statistics import change_from_one, significant, spread
from common.training import TrainingRecipe
from sparsity.studies import snapshots
from sparsity.studies.images import IMAGENET, ImageTask
from sparsity.studies.measurement import curve, curve_rows, measure_all
from sparsity.studies.recipes import ADAMW, VIT
from sparsity.studies.runs import RUN, STYLES, check_variants, plan_setting
from sparsity.studies.snapshots import ERRORS

ERROR_GOAL = 1e-5
AUTHORS = "authors, ImageNet"
AUTHORS_ENTRIES = 197 * 3072  # T · d_ff of ViT-B/16
AUTHORS_STEPS, AUTHORS_TRAINING = 2125, 300 * 625  # the last step in their log; steps of their whole training

METRICS = (
    "density", "augmented_flatness_key", "coefficient_key", "coefficient_key_authors",
    "augmented_flatness_value", "activation_norm", "coefficient_value", "coefficient_value_authors",
    "input_norm", "activation_gradient_active", "density_from_flatness", "augmented_flatness_linear",
)  # fmt: skip
KEY = ("augmented_flatness_key", "coefficient_key")
VALUE = ("augmented_flatness_value", "coefficient_value", "activation_norm")
FACTORS = ("density", *KEY, "input_norm", "activation_gradient_active", "rest", "passed", "selected")
NAMES = {
    "density": "density", "augmented_flatness_key": "AF_K", "coefficient_key": "C_0",
    "augmented_flatness_value": "AF_V", "coefficient_value": "C_2", "activation_norm": "E ‖a‖²",
    "input_norm": "‖x‖²", "activation_gradient_active": "g² of active", "rest": "σ'², correlation",
    "ratio": "AF_K / (T d_ff C_0)", "passed": "AF_K / its value at σ' = 1",
    "selected": "AF at σ' = 1 / (T d_ff C_0)",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Task, recipe and log_every are those of experiment 03 at the same scale, so that its networks are used again.

    Of the study (`learning_rates`, `batch_sizes`) there are runs of vanilla with the first seed, in which one option of
    `study_recipe` is changed at a time.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("vanilla", "modified")
    task: ImageTask = VIT["laptop"]["task"]
    recipe: TrainingRecipe = VIT["laptop"]["recipe"]
    log_every: int = VIT["laptop"]["log_every"]
    study_task: ImageTask = VIT["laptop"]["task"]
    study_recipe: TrainingRecipe = VIT["laptop"]["recipe"]
    learning_rates: tuple[float, ...] = ()
    batch_sizes: tuple[int, ...] = ()  # at the same number of training images

    def __post_init__(self):
        check_variants(self.variants)


SCALES = {
    "smoke": Settings(
        seeds=(0,),
        **VIT["smoke"],
        study_task=VIT["smoke"]["task"],
        study_recipe=VIT["smoke"]["recipe"],
        learning_rates=(1e-3,),
    ),
    "laptop": Settings(),
    "workstation": Settings(
        **VIT["workstation"],
        study_task=VIT["workstation"]["task"],
        study_recipe=VIT["workstation"]["recipe"],
        learning_rates=(1e-2, 1e-3),
        batch_sizes=(16, 64),
    ),
    "paper": Settings(
        seeds=(0,),
        **VIT["paper"],
        study_task=replace(IMAGENET, data="cifar10", pixels=224, patch=16, randaugment=0),
        study_recipe=TrainingRecipe(
            58_500, 128, 1e-4, warmup=0, weight_decay=0.05, betas=ADAMW, stairs=150, precision="fp16"
        ),
        learning_rates=(1e-3, 1e-4, 1e-5),
        batch_sizes=(64, 256),
    ),
}


def measure(settings, context):
    main = settings.task.data
    for labels, (by_step, logged) in measure_all(plan(settings), context, measure_run):
        for step, measured in by_step.items():
            yield from snapshot_rows(labels, step, measured)
        if labels["setting"] == main:
            metrics = ("density", "augmented_flatness_key", "coefficient_key", "decay")
        else:  # of the study's runs E alone, at the end
            metrics, logged = ("decay",), [row for row in logged if row["step"] == logged[-1]["step"]]
        yield from (labels | row for row in curve_rows(logged, metrics, "training batches"))


def plan(settings):
    """Yield the labels and the description of every run: the main setting, then the study's."""
    options = dict(log_every=settings.log_every)
    seeds = dict.fromkeys(settings.variants, settings.seeds)
    yield from plan_setting(settings.task.data, settings.task, settings.recipe, seeds, **options)
    base = settings.study_recipe
    images = base.steps * base.batch_size
    others = [replace(base, learning_rate=rate) for rate in settings.learning_rates]
    others += [replace(base, batch_size=size, steps=images // size) for size in settings.batch_sizes]
    for recipe in dict.fromkeys([base, *others] if others else []):
        name = f"{settings.study_task.data}, lr {recipe.learning_rate:g}, batch {recipe.batch_size}"
        yield from plan_setting(name, settings.study_task, recipe, {"vanilla": settings.seeds[:1]}, **options)


def measure_run(run, trained, device):
    return snapshots.measure_snapshots("train", run, trained, device), curve(trained)


def snapshot_rows(labels, step, measured):
    layers = snapshots.by_layer(measured)
    whole = {"all": layers.pop("all")}
    layers = {name: values | snapshots.identity_errors(values) for name, values in layers.items()}
    metrics = (*METRICS, *(f"error: {name}" for name in ERRORS))
    yield from snapshots.snapshot_rows(labels, step, whole | layers, metrics)


# From here on only the table is seen --------------------------------------------------------------------------------


def main_setting(data):
    return data[data.setting == data.setting.iloc[0]]


def by_layer(data):
    return snapshots.layer_table(data, needed=KEY[0])


def layer_means(data):
    means = snapshots.layer_means(data, needed=KEY[0])
    return means.assign(ratio=means.density_from_flatness)


def batch_means(data):
    rows = data[data.split == "training batches"]
    table = rows.pivot(index=[*RUN, "step"], columns="metric", values="value").reset_index()
    return snapshots.in_order(table[table.augmented_flatness_key > 0], data)


def moved(data):
    """Return Δ ln of density and of its factors from the first to the last saved step, means over layers, per run."""
    table = by_layer(data)
    # C_0 = ‖x‖² · g² · rest, and density = passed · selected
    table = table.assign(
        rest=table.coefficient_key / table.input_norm / table.activation_gradient_active,
        passed=table.augmented_flatness_key / table.augmented_flatness_linear,
        selected=table.augmented_flatness_linear / table.coefficient_key,
    )
    return snapshots.log_changes(table, FACTORS)


def change(logs, variant, metric):
    """Return by how many % a metric changes during training, with its interval over seeds."""
    return change_from_one(np.exp(logs[logs.variant == variant][metric]))


def relative(table, metrics, by=()):
    return in_thousands(snapshots.relative(table, metrics, by))


def in_thousands(table):
    return table.assign(thousands=table.step / 1000)


def authors_points():
    points = published_table("sparsity_augmented_flatness_imagenet")
    points = points.rename(columns={"L0_coefficient": "coefficient_key"}).assign(
        ratio=lambda rows: rows.augmented_flatness_key / rows.coefficient_key / AUTHORS_ENTRIES
    )
    return points.assign(setting="", variant=AUTHORS, seed=0)


def draw(data):
    main = main_setting(data)
    means, layers = layer_means(main), by_layer(main)
    numbers = {name: f"MLP {number}" for number, name in enumerate(layers.layer.unique(), 1)}
    layers = in_thousands(layers.assign(layer=layers.layer.map(numbers), percent=100 * layers.density))
    vanilla, first = layers[layers.variant == layers.variant.iloc[0]], layers.variant.iloc[0]
    options = dict(x="thousands", panel="quantity", xlabel="training step, thousands", yscale="log", names=NAMES)
    by_variant = options | dict(by="variant", level=1.0, ylabel="relative to the first saved step")
    one_by_one = options | dict(by="layer", level=1.0, ylabel=f"{first}, relative to the first saved step")
    density = options | dict(y="percent", ylabel="density, training images, %", yscale="linear")
    drawn = {
        "key_layer": figures.lines(relative(means, KEY), **by_variant),
        "value_layer": figures.lines(relative(means, VALUE), **by_variant),
        "density_by_layer": figures.lines(layers, by="layer", **density | dict(panel="variant")),
        "key_layer_by_layer": figures.lines(relative(vanilla, KEY, ["layer"]), **one_by_one),
        "value_layer_by_layer": figures.lines(relative(vanilla, VALUE, ["layer"]), **one_by_one),
        "training_curve": figures.lines(
            relative(batch_means(main), KEY), **by_variant | dict(ylabel="relative to the first logged batch")
        ),
        **draw_authors(means, options | dict(x="step", xscale="log", xlabel="training step")),
        "what_moved": draw_moved(main),
        "authors_coefficients": draw_errors(means, by_variant),
    }
    if data.setting.nunique() > 1:
        others = layer_means(data[data.setting != main.setting.iloc[0]])
        percent = in_thousands(others.assign(percent=100 * others.density))
        drawn["settings"] = figures.lines(relative(others, KEY), **by_variant | dict(by="setting"))
        drawn["settings_density"] = figures.lines(percent, by="setting", **density | dict(panel=None))
    return drawn


def draw_authors(means, options):
    columns = [*RUN, "step", *KEY, "ratio"]
    both = pd.concat([means[columns], authors_points()[columns]], ignore_index=True)
    return {
        "beside_the_authors": figures.lines(
            relative(both, KEY), by="variant", ylabel="relative to the first point", level=1.0, **options
        ),
        "ratio_beside_the_authors": figures.lines(
            both, y="ratio", by="variant", ylabel=NAMES["ratio"], **options | dict(panel=None)
        ),
    }


def draw_errors(means, options):
    wrong = {"error: key, authors' C_0": "AF_K / (T d_ff C_0') / density"}
    wrong["error: value, authors' C_2"] = "AF_V / C_2' / E ‖a‖²"
    rows = means.melt([*RUN, "step"], list(wrong), "quantity")
    rows = in_thousands(rows.assign(value=rows.value + 1))
    return figures.lines(rows, **options | dict(names=wrong, ylabel="what the authors' coefficients give"))


def draw_moved(data):
    logs, rows = moved(data), []
    for metric in FACTORS:
        for variant in logs.variant.unique():
            found = change(logs, variant, metric)
            mean, low, high = (math.log1p(percent / 100) for percent in (found.mean, *found.ends))
            rows.append({"item": metric, "variant": variant, "mean": mean, "low": low, "high": high})
    text = "Δ ln, first to last saved step, mean over layers"
    return figures.forest(pd.DataFrame(rows), condition="variant", names=NAMES, xlabel=text)


def compare(data, published):
    main = main_setting(data)
    means, lines = layer_means(main), []
    points = authors_points()
    for metric in (*KEY, "ratio"):
        paper = points[metric].iloc[-1] / points[metric].iloc[0]
        for variant, rows in means.groupby("variant", sort=False):
            steps = sorted(rows.step.unique())
            near = min(steps, key=lambda step: abs(step - AUTHORS_STEPS))
            table = rows.pivot(index="seed", columns="step", values=metric)
            for last, known in {near: paper, steps[-1]: paper if near == steps[-1] else math.nan}.items():
                if last > steps[0]:
                    quantity = f"{NAMES[metric]}, step {last} / step {steps[0]}: {variant}"
                    lines.append((quantity, known, table[last] / table[steps[0]]))
    for variant, rows in means.groupby("variant", sort=False):
        for end in ("first", "last"):
            seen = rows.groupby("seed").ratio.agg(end)
            known = points.ratio.iloc[0 if end == "first" else -1]
            lines.append((f"{NAMES['ratio']} at the {end} saved step: {variant}", known, seen))
    setting = f"no: the authors' steps 25 to {AUTHORS_STEPS} are 1.1 % of ImageNet training; small ViT here"
    return pd.DataFrame(
        [
            dict(quantity=quantity, paper=paper, ours=values.mean(), sd=values.std(), n=len(values))
            | dict(same_setting=setting)
            for quantity, paper, values in lines
        ]
    )


def tables(data):
    main = main_setting(data)
    means = layer_means(main)
    columns = {**{name: NAMES[name] for name in METRICS if name in NAMES}, "coefficient_key_authors": "C_0'"}
    columns["coefficient_value_authors"] = "C_2'"
    by_step = means.groupby(["variant", "step"], sort=False)[list(columns)].mean().rename(columns=columns)
    shown = {
        "Along training: means over layers and seeds (C_0', C_2': as the authors average)": significant(by_step),
        "Largest relative errors of the identities over layers, saved steps and seeds": error_table(main),
        "What moved density: last / first saved step, geometric mean over layers (range of seeds)": factors(main),
    }
    if data.setting.nunique() > 1:
        shown["Learning rates and batch sizes, vanilla, one seed"] = study_table(data)
    return shown


def error_table(data):
    table, rows = by_layer(data), []
    for variant, part in table.groupby("variant", sort=False):
        row = {"variant": variant}
        for name in ERRORS:
            values = part[f"error: {name}"].dropna()
            exact = "authors" not in name
            row[name] = f"{values.abs().max():.1e}" if exact else f"{1 + values.min():.2f} to {1 + values.max():.2f} ×"
        rows.append(row)
    return pd.DataFrame(rows)


def factors(data):
    logs, rows = moved(data), []
    for variant, part in logs.groupby("variant", sort=False):
        named = {NAMES[name]: span(np.exp(part[name])) for name in NAMES if name in part}
        rows.append({"variant": variant, **named, "layers": spread(part.layers, 0), "seeds": len(part)})
    return pd.DataFrame(rows)


def span(values):
    """Write the geometric mean and, of several seeds, the range."""
    mean = f"{math.exp(np.log(values).mean()):.3g}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.3g} to {values.max():.3g})"


def study_table(data):
    logs, rows = moved(data[data.setting != data.setting.iloc[0]]), []
    for _, row in logs.iterrows():
        own = data[(data.setting == row.setting) & (data.seed == row.seed)]
        saved = own[own.split == snapshots.SAVED]
        last = saved[saved.step == saved.step.max()].groupby("metric").value.mean()
        decay = own[own.metric == "decay"].value.max()
        shown = {"setting": row.setting, "E": f"{decay:.2f}", "training accuracy, %": f"{last.score:.1f}"}
        shown["density, %"] = f"{100 * last.density:.1f}"
        rows.append(
            shown | {f"{NAMES[name]}, last / first": f"{math.exp(row[name]):.3g}" for name in ("density", *KEY)}
        )
    return pd.DataFrame(rows)


def remarks(data):
    main = main_setting(data)
    logs, means, texts = moved(main), layer_means(main), []
    points = authors_points()
    for variant, part in logs.groupby("variant", sort=False):
        rows = means[means.variant == variant]
        steps, density = sorted(rows.step.unique()), rows.groupby("step").density.mean()
        factor = {name: f"{math.exp(part[name].mean()):.3g}" for name in NAMES if name in part}
        lowest = density.idxmin()
        texts.append(
            f"**{variant}.** From step {steps[0]} to step {steps[-1]} density goes from {100 * density.iloc[0]:.1f} % "
            f"to {100 * density.iloc[-1]:.1f} % (lowest saved: {100 * density[lowest]:.1f} % at step {lowest}), by a "
            f"factor {factor['density']} as a geometric mean over layers. The numerator AF_K changes by a factor "
            f"{factor['augmented_flatness_key']}, the denominator C_0 by {factor['coefficient_key']}: ‖x‖² by "
            f"{factor['input_norm']}, g² of active entries by {factor['activation_gradient_active']}, the rest (σ'² "
            f"and correlation) by {factor['rest']}. Without the scales of x and g: the part of ‖x‖² ‖g‖² that "
            f"activations let pass, AF_K over its value at σ' = 1, changes by {factor['passed']}, and what remains of "
            f"density, that value over T d_ff C_0, by {factor['selected']}."
        )
    ends = {
        name: points[name].iloc[-1] / points[name].iloc[0] for name in ("augmented_flatness_key", "coefficient_key")
    }
    texts.append(
        f"In the authors' points, from step 25 to {AUTHORS_STEPS} of {AUTHORS_TRAINING}, AF_K changes by a factor "
        f"{ends['augmented_flatness_key']:.2f} and C_0 by {ends['coefficient_key']:.1f}, between spikes. Absolute "
        "values cannot be compared (theirs carry loss scaling and batch size), nor can shares of training: ours begin "
        f"at {100 * means.step.min() / means.step.max():.1f} % of it. Both AF_K and C_0 contain g², which falls with "
        "the training loss; their ratio does not depend on that scale."
    )
    return "\n\n".join(texts)


def verdict(data):
    main = main_setting(data)
    logs = moved(main)
    own = logs[logs.variant == "vanilla"]
    if own.seed.nunique() < 3:
        return "not run at this scale"
    worst = by_layer(main)["error: key"].abs().max()
    density, flatness, denominator, passed = (change(logs, "vanilla", name) for name in ("density", *KEY, "passed"))
    if worst > ERROR_GOAL:
        head = "measured wrongly"
    elif density.high >= 0:
        head = "not reproduced"
    else:
        head = "reproduced" if flatness.high < 0 else "density falls, AF_K does not"
    return (
        f"{head}. Vanilla, change from the first to the last saved step, %: density {density}, AF_K {flatness}, C_0 "
        f"{denominator}, AF_K over its value at σ' = 1 {passed}. Largest relative error of the key identity {worst:.1e}"
    )


def claims(data):
    """Density and AF_K along training, by the rule's parts; then AF_K without the scales of x and g."""
    said, logs, points = verdict(data), moved(main_setting(data)), authors_points()
    texts = {"ratio": ("density", "Training lowers activation density"), KEY[0]: (KEY[0], "Training lowers AF_K")}
    seeds, stated = logs[logs.variant == "vanilla"].seed.nunique(), []
    for name, (metric, text) in texts.items():
        found = change(logs, "vanilla", metric)
        authors = 100 * (points[name].iloc[-1] / points[name].iloc[0] - 1)
        falls = found.high < 0 and not said.startswith("measured wrongly")
        answer = where_run(said, "reproduced" if falls else "not reproduced")
        paper = f"{authors:+.0f} % (first 1.1 % of ImageNet)"
        stated.append(Claim("Section III-B", f"{text} (vanilla)", paper, intervals([found], "%", seeds), answer))
    ours = intervals([change(logs, "vanilla", "passed")], "%", seeds)
    return [*stated, question("Does AF_K fall against its value with σ' = 1? (vanilla)", ours, said)]


CAPTIONS = {
    "what_moved": "By which factor density and its parts change from the first to the last saved step.",
    "key_layer_by_layer": "The same quantities layer by layer.",
    "value_layer_by_layer": "The same quantities layer by layer.",
    "key_layer": "Key layers along training: AF_K, the coefficient C_0 and their ratio, which is density.",
    "value_layer": "Value layers along training: AF_V, the coefficient C_2 and their ratio.",
    "density_by_layer": "Density of every MLP at the saved steps.",
    "training_curve": "AF_K and C_0 of single logged training batches.",
    "beside_the_authors": "AF_K and C_0, relative to their first points, beside the authors' points on ImageNet.",
    "ratio_beside_the_authors": "AF_K / (T d_ff C_0), that is density, beside the authors' points on ImageNet.",
    "authors_coefficients": "The authors' variants of the coefficients beside those that make the identities exact.",
}

DEVIATIONS = (
    "At laptop and workstation scale: small networks on scikit-learn's digits and on glyphs, not ImageNet or CIFAR-10.",
    "Gradients are per sample and unscaled, of the plain cross-entropy on un-augmented training images (no label "
    "smoothing, no mixing); the authors' logged values carry batch size and loss scaling.",
    "The whole training split is measured, misclassified samples included; the authors use 128 batches of ImageNet, "
    "and on CIFAR-10 give misclassified samples the loss 0 and divide by the accuracy.",
    "The rule was another one at first (that the rise of C_0 makes density fall), and was changed when numbers were "
    "known: it called reproduced what the authors' points do not show.",
    "Eight saved steps, the denser the earlier; the authors keep dozens. Step 0 has no gradients below its zero output "
    "layer and is left out of everything that needs them.",
    "C_0 contains σ'² and C_2 is weighted by ‖a‖², which makes the identities exact; the authors' variants (C_0', "
    "without σ'²; C_2', the plain mean) stand beside them. Their σ'(0) is 1, ours 0.",
    "Learning rates and batch sizes are changed one at a time, at the same number of training images. Schedule and "
    "warm-up of the authors' CIFAR-10 runs are unknown to us: a cosine by epochs without warm-up at paper scale.",
)

EXPERIMENT = Experiment(
    __doc__, SCALES, measure, draw, compare, verdict, published="sparsity_augmented_flatness_imagenet",
    tables=tables, remarks=remarks, deviations=DEVIATIONS, styles=STYLES,
    claims=claims, captions=CAPTIONS, lead="what_moved",
)  # fmt: skip

if __name__ == "__main__":
    run(EXPERIMENT)
