"""Activation gradients, effective gradients, traces and norms along training, vanilla and modified.

g = ∂L/∂a and η = ∂L/∂p = g σ'(p), per sample, of saved weights on the whole un-augmented training split: histograms of
log10 g² over all and over active entries, gradient density (share of η ≠ 0), sums and counts of η, and what the weights
say alone: tr(KKᵀ) and norms by kind. Of a ViT, that of experiment 03, and where `text` is given of a T5 on span
corruption too, that of 05, with the training split in as many windows as its test has rows.

Claim    Our reading of arXiv 2605.25612, which logs these quantities; no number of theirs is in reach: activation
         sparsity is gradient sparsity, so that the backward pass can skip what the forward pass skips; the plug-ins
         lower it; and activations that stay on are those with larger gradients, E[g² | active] > E[g²].
Verdict  with at least 3 seeds of vanilla and modified (else "not run at this scale"), at the last saved step, in every
         setting:
         (a) sparsity of η is that of σ', not gradients that vanish: in every layer and seed of both, at most 1 % of the
             entries with σ' ≠ 0 have η = 0 (that η = 0 where σ' = 0 holds by construction; the other direction, that g
             itself is hardly ever zero, is what is measured);
         (b) the gradient density of modified is below vanilla's: the 95 % interval over seeds of its relative change
             (means over layers, paired by seed) is below 0;
         (c) E[g² | active] / E[g²], as a geometric mean over layers, is above 1 in both: whole 95 % intervals.
         "reproduced" if all three hold, "reproduced in part" if some do, else "not reproduced".
Cost     beyond the trained networks, which experiments 03 and 05 share: smoke 20 s; laptop 5 min, 15 without these
         networks (1 core); workstation 50 min, 30 after experiment 01 (2 cores); paper: 32 passes over ImageNet and as
         many over rows of C4.
Run      python experiments/08_gradient_statistics.py --scale laptop
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.lab import figures
from common.lab.claims import Claim, intervals, of_parts, where_run
from common.lab.run import Experiment, run
from common.lab.statistics import change_from_one, relative_change, significant, spread
from common.training import TrainingRecipe
from sparsity.plugins import PROTOCOLS
from sparsity.studies import snapshots
from sparsity.studies.gradients import histogram_rows, measure_gradients
from sparsity.studies.images import ImageTask
from sparsity.studies.measurement import measure_all
from sparsity.studies.recipes import T5, VIT
from sparsity.studies.runs import RUN, STYLES, check_variants, plan_setting
from sparsity.studies.span_corruption import SpanCorruption

BOTH = ("vanilla", "modified")
NEEDED = "activation_gradient"  # > 0 where there are gradients
VANISHED = 0.01  # share of the entries with σ' ≠ 0 that may have η = 0

METRICS = (
    "density", "derivative_density", "gradient_density", "activation_gradient", "activation_gradient_active",
    "activation_gradient_ratio", "effective_gradient_below_1e-9", "effective_gradient_below_1e-6",
    "effective_gradient_below_1e-3", "effective_gradient_l1", "effective_gradient_l2", "beneficial_units",
    "harmful_units", "beneficial_sum", "harmful_sum", "coefficient_value_authors", "input_norm", "units", "key_trace",
)  # fmt: skip
NAMES = {
    "density": "density", "derivative_density": "derivative density", "gradient_density": "gradient density",
    "activation_gradient_ratio": "E[g²; active] / E[g²]", "activation_gradient": "E g²",
    "activation_gradient_active": "E[g²; active]", "effective_gradient_below_1e-9": "η below 1e-9",
    "effective_gradient_below_1e-6": "η below 1e-6", "effective_gradient_below_1e-3": "η below 1e-3",
    "effective_gradient_l1": "‖η‖₁ per token", "effective_gradient_l2": "‖η‖² per token",
    "beneficial_units": "η < 0 per token", "harmful_units": "η > 0 per token", "beneficial_sum": "Σ of η < 0",
    "harmful_sum": "Σ of η > 0", "coefficient_value_authors": "‖∂L/∂z‖²", "input_norm": "‖x‖²",
    "key_trace": "tr(KKᵀ)", "beneficial": "beneficial, η < 0", "harmful": "harmful, η > 0",
}  # fmt: skip
DENSITIES = ("density", "derivative_density", "gradient_density")
BELOW = tuple(name for name in METRICS if "below" in name)
SIZES = ("effective_gradient_l1", "effective_gradient_l2", "coefficient_value_authors")


@dataclass(frozen=True)
class Settings:
    """Task, recipe and log_every are those of experiment 03 at the same scale, so that its networks are used again."""

    seeds: tuple[int, ...] = (0, 1, 2)  # histograms are kept of the first one, quantiles of all
    variants: tuple[str, ...] = BOTH
    task: ImageTask = VIT["laptop"]["task"]
    recipe: TrainingRecipe = VIT["laptop"]["recipe"]
    log_every: int = VIT["laptop"]["log_every"]
    text: SpanCorruption | None = None  # of a T5; task, recipe and log_every are those of 05
    text_recipe: TrainingRecipe = T5["laptop"]["recipes"][0]
    text_log_every: int = T5["laptop"]["log_every"]

    def __post_init__(self):
        check_variants(self.variants)


TEXT = {
    scale: dict(text=T5[scale]["task"], text_recipe=T5[scale]["recipes"][0], text_log_every=T5[scale]["log_every"])
    for scale in T5
}
SCALES = {
    "smoke": Settings(seeds=(0,), **VIT["smoke"], **TEXT["smoke"]),
    "laptop": Settings(**TEXT["laptop"]),
    "workstation": Settings(**VIT["workstation"], **TEXT["workstation"]),
    "paper": Settings(seeds=(0,), **VIT["paper"], **TEXT["paper"]),
}


def measure(settings, context):
    seeds = dict.fromkeys(settings.variants, settings.seeds)
    options = dict(log_every=settings.log_every)
    plan = list(plan_setting(settings.task.data, settings.task, settings.recipe, seeds, **options))
    if settings.text:
        options = dict(log_every=settings.text_log_every, exempt=PROTOCOLS["t5"])
        plan += plan_setting(f"T5, {settings.text.data}", settings.text, settings.text_recipe, seeds, **options)
    for labels, by_step in measure_all(plan, context, measure_run):
        for step, (measured, gradients) in by_step.items():
            yield from step_rows(labels, step, measured, gradients, is_whole=labels["seed"] == settings.seeds[0])


def measure_run(run, trained, device):
    """Return by saved step what the probe measures on the training split, and histograms, traces and norms."""
    measured = snapshots.measure_snapshots("train", run, trained, device)
    return {step: (rows, measure_gradients(run, trained, device, step)) for step, rows in measured.items()}


def step_rows(labels, step, measured, gradients, is_whole):
    values, bins = ([row for row in gradients if column in row] for column in ("metric", "left"))
    layers = snapshots.by_layer([*measured, *values])
    yield from snapshots.snapshot_rows(labels, step, layers, METRICS)
    del layers["all"]
    labels = {**labels, "split": snapshots.SAVED, "step": step, "layer": "all"}
    yield from (labels | row for row in histogram_rows(bins, layers, is_whole))


# From here on only the table is seen --------------------------------------------------------------------------------


def layer_means(data):
    means = snapshots.layer_means(data, needed=NEEDED)
    return means.assign(
        **{name: 100 * means[name] for name in (*DENSITIES, *BELOW)},
        beneficial=100 * means.beneficial_units / means.units,
        harmful=100 * means.harmful_units / means.units,
        thousands=means.step / 1000,
    )


def norms(data):
    rows = data[data.metric.str.startswith("norm: ")]
    return rows.assign(quantity=rows.metric.str.removeprefix("norm: "), thousands=rows.step / 1000)


def by_setting(data):
    """Return the rows of each setting by its name: one of a ViT and, where there is a second, of a T5."""
    return {name: data[data.setting == name] for name in dict.fromkeys(data.setting)}


def draw(data):
    (_, own), *others = by_setting(data).items()
    drawn = draw_setting(own)
    for name, rows in others:
        drawn |= {f"{stem}_{name.split(',')[0].lower()}": figure for stem, figure in draw_setting(rows).items()}
    return drawn


def draw_setting(data):
    means = layer_means(data)
    options = dict(x="thousands", by="variant", xlabel="training step, thousands", names=NAMES)

    def panels(metrics, **further):
        rows = means.melt([*RUN, "step", "thousands"], metrics, "quantity").dropna()
        return figures.lines(rows, panel="quantity", **options | further)

    drawn = {f"histogram_{variant}": draw_histogram(data, variant) for variant in data.variant.unique()}
    return drawn | {
        "gradient_of_active": figures.lines(
            means, y="activation_gradient_ratio", ylabel="E[g² | active] / E[g²], layer mean", level=1.0, **options
        ),
        "densities": panels(DENSITIES, ylabel="share of entries, %"),
        "small_gradients": panels(BELOW, ylabel="share of entries, %"),
        "size_of_gradients": panels(SIZES, ylabel="mean over layers", yscale="log"),
        "beneficial_and_harmful": panels(("beneficial", "harmful"), ylabel="share of units, %"),
        "beneficial_and_harmful_sums": panels(("beneficial_sum", "harmful_sum"), ylabel="per token"),
        "key_trace": figures.lines(means, y="key_trace", ylabel="tr(KKᵀ), mean over layers", yscale="log", **options),
        "norms": figures.lines(
            norms(data).query("quantity in ['keys', 'values', 'MLP norms', 'attention']"),
            panel="quantity", ylabel="norm of the weights", yscale="log", **options,
        ),
    }  # fmt: skip


def draw_histogram(data, variant):
    """Draw the histograms of four saved steps with gradients, from an early one to the last."""
    rows = data[(data.variant == variant) & data.metric.str.startswith("histogram, ")]
    steps = sorted(rows.step.unique())
    chosen = [steps[round(place)] for place in np.linspace(0, len(steps) - 1, min(4, len(steps)))]
    rows = rows[rows.step.isin(chosen)]
    rows = rows.assign(percent=100 * rows.value, when=[f"step {step}" for step in rows.step])
    seen = rows.log10_g2[rows.percent >= 0.1]  # %; the tails of the histograms are long
    rows = rows[rows.log10_g2.between(seen.min(), seen.max())]
    names = {"histogram, all": "all entries", "histogram, active": "active entries"}
    return figures.lines(
        rows, x="log10_g2", y="percent", by="metric", panel="when", names=names, xlabel="log10 g²",
        ylabel=f"{variant}: share of entries, %",
    )  # fmt: skip


def last(data):
    return snapshots.last_step(layer_means(data))


def compare(data, published):
    rows = []
    for (setting, variant), part in last(data).groupby(RUN[:2], sort=False):
        is_text = setting.startswith("T5")
        where, same = (f"; {setting}", "T5 on Python sources") if is_text else ("", "ViT on embedded images")
        for metric in (*DENSITIES, *BELOW, "activation_gradient_ratio"):
            text = NAMES[metric] + ("" if metric == "activation_gradient_ratio" else ", %")
            values = part[metric]
            row = dict(quantity=f"{text}: {variant}{where}", paper=np.nan, ours=values.mean(), sd=values.std())
            rows.append({**row, "n": len(values), "same_setting": f"no: small {same}"})
    return pd.DataFrame(rows)


def tables(data):
    parts = by_setting(data)
    if len(parts) == 1:
        return tables_of_setting(data)
    return {
        f"{name}: {heading}": table
        for name, rows in parts.items()
        for heading, table in tables_of_setting(rows).items()
    }


def tables_of_setting(data):
    means = layer_means(data)
    shown = {name: NAMES[name] for name in (*METRICS, "beneficial", "harmful") if name in NAMES}
    shown |= {name: f"{NAMES[name]}, %" for name in (*DENSITIES, *BELOW, "beneficial", "harmful")}
    by_step = means.groupby(["variant", "step"], sort=False)[list(shown)].mean().rename(columns=shown)
    quantiles = data[data.metric.str.startswith("log10 g²")]
    quantiles = quantiles.groupby(["variant", "step", "metric"], sort=False).value.mean().unstack(sort=False)
    weights = norms(data).groupby(["variant", "step", "quantity"], sort=False).value.mean().unstack(sort=False)
    return {
        "Along training: means over layers and seeds": significant(by_step),
        "Quantiles of log10 g² over entries that are not zero, all layers": significant(quantiles),
        "Norms of the weights by kind": significant(weights),
        "At the last saved step, means over layers ± sd over seeds": final_table(data),
    }


def final_table(data):
    rows = []
    for variant, part in last(data).groupby("variant", sort=False):
        row = {f"{NAMES[name]}, %": spread(part[name], 2) for name in (*DENSITIES, *BELOW, "beneficial", "harmful")}
        row |= {NAMES["activation_gradient_ratio"]: spread(part.activation_gradient_ratio, 2)}
        rows.append({"variant": variant, **row, "seeds": len(part)})
    return pd.DataFrame(rows)


def vanished(data):
    """Return by variant how many of the entries with σ' ≠ 0 have η = 0 at the end: the share in the worst layer."""
    table = snapshots.layer_table(data, needed=NEEDED)
    final = snapshots.last_step(table)
    shares = 1 - final.gradient_density / final.derivative_density
    return shares.clip(lower=0).groupby(final.variant, sort=False).max()  # below 0: rounding


def ratios(data):
    """Return by variant how many % E[g² | active] / E[g²] is above 1 at the last saved step."""
    table = snapshots.layer_table(data, needed=NEEDED)
    final = snapshots.last_step(table)
    final = final[final.activation_gradient_ratio > 0]  # dead layers have none
    logs = np.log(final.activation_gradient_ratio).groupby([final.variant, final.seed], sort=False).mean()
    found = {variant: np.exp(part.droplevel(0)) for variant, part in logs.groupby(level=0, sort=False)}
    return {variant: change_from_one(own) for variant, own in found.items()}


def remarks(data):
    parts = by_setting(data)
    return "\n\n".join(remarks_of_setting(rows, f"{name}, " * (len(parts) > 1)) for name, rows in parts.items())


def remarks_of_setting(data, setting):
    means, texts = last(data), []
    gone, norm, whole = vanished(data), norms(data), data[data.layer == "all"]
    for variant, part in means.groupby("variant", sort=False):
        mean = part.mean(numeric_only=True)
        seen = whole[(whole.variant == variant) & (whole.step == part.step.max())].groupby("metric").value.mean()
        own = norm[norm.variant == variant].groupby(["quantity", "step"]).value.mean()
        growth = {kind: own[kind].iloc[-1] / own[kind].iloc[0] for kind in ("keys", "values", "MLP norms")}
        small = {
            bound: 100 - 100 * (100 - mean[f"effective_gradient_below_{bound}"]) / mean.gradient_density
            for bound in ("1e-6", "1e-3")
        }
        texts.append(
            f"**{setting}{variant}.** At the last saved step (training loss {seen.loss:.3g}) "
            f"{mean.gradient_density:.2f} % of ∂L/∂p are not zero, beside a derivative density of "
            f"{mean.derivative_density:.2f} %; in the worst layer "
            f"{100 * gone[variant]:.2g} % of the entries with σ' ≠ 0 have no gradient. Of those that are not zero "
            f"{small['1e-6']:.1f} % lie below 1e-6 and {small['1e-3']:.1f} % below 1e-3. Active entries have "
            f"{mean.activation_gradient_ratio:.2f} times the mean g². Per token {mean.beneficial_units:.1f} units "
            f"would lower the loss by a larger pre-activation and {mean.harmful_units:.1f} by a smaller one. Since "
            f"initialisation the norm of the keys has changed by a factor {growth['keys']:.2g}, of the values by "
            f"{growth['values']:.2g}, of the weights of the MLPs' norms by {growth['MLP norms']:.2g}."
        )
    return "\n\n".join(texts)


def verdict(data):
    parts, found = by_setting(data), {}
    for name, rows in parts.items():
        if judged := verdict_of_setting(rows):
            found[f"{name}: " * (len(parts) > 1)] = judged
    if not found:
        return "not run at this scale"
    held = {letter: all(own[letter] for own, _ in found.values()) for letter in "abc"}
    head = "reproduced" if all(held.values()) else "reproduced in part" if any(held.values()) else "not reproduced"
    holding = ", ".join(name for name, holds in held.items() if holds) or "none"
    return f"{head} (holding: {holding}). {'. '.join(name + text for name, (_, text) in found.items())}"


def verdict_of_setting(data):
    """Return which of the rule's points hold, and the numbers; None with fewer than 3 seeds of both variants."""
    final = last(data).pivot(index="seed", columns="variant", values="gradient_density")
    if not set(BOTH) <= set(final) or len(final[list(BOTH)].dropna()) < 3:
        return None
    gone, change, ratio = vanished(data), relative_change(final["vanilla"], final["modified"]), ratios(data)
    held = {
        "a": all(gone[variant] <= VANISHED for variant in BOTH),
        "b": change.high < 0,
        "c": all(ratio[variant].low > 0 for variant in BOTH),
    }
    texts = ", ".join(f"{variant} {ratio[variant]} % above 1" for variant in BOTH)
    return held, (
        f"Entries with σ' ≠ 0 but η = 0: at most {100 * gone[list(BOTH)].max():.2g} %; "
        f"gradient density of modified against vanilla {change} %; E[g² | active] / E[g²]: {texts}"
    )


def claims(data):
    """Parts (a) to (c) of the rule, with the numbers of every setting."""
    parts, said = by_setting(data), verdict(data)
    final = {
        name: last(rows).pivot(index="seed", columns="variant", values="gradient_density")
        for name, rows in parts.items()
    }
    seeds = min(map(len, final.values()))
    gone = pd.concat([vanished(rows) for rows in parts.values()])[list(BOTH)].max()
    changes = [relative_change(own["vanilla"], own["modified"]) for own in final.values()]
    larger = [ratios(rows)[variant] for rows in parts.values() for variant in BOTH]
    answers = {
        "Effective gradients vanish only where the activation is flat": (
            gone <= VANISHED,
            f"η = 0 at most in {100 * gone:.2g} % of the others (n = {seeds})",
        ),
        "The plug-ins lower gradient density": (
            all(change.high < 0 for change in changes),
            intervals(changes, "%", seeds),
        ),
        "Active entries have larger gradients: E[g² | active] > E[g²]": (
            all(ratio.low > 0 for ratio in larger),
            intervals(larger, "%", seeds),
        ),
    }
    return [
        Claim("authors' code", text, "not published", ours, where_run(said, of_parts([held])))
        for text, (held, ours) in answers.items()
    ]


CAPTIONS = {
    "densities": "Density, derivative density and gradient density along training.",
    "histogram_vanilla": "Vanilla: shares of all and of active entries whose activation gradient g² has each size.",
    "histogram_modified": "Modified: shares of all and of active entries whose activation gradient g² has each size.",
    "gradient_of_active": "E[g² | active] / E[g²] along training: above 1 active entries have the larger gradients.",
    "key_trace": "tr(KKᵀ) along training.",
    "norms": "Norms of the weights by kind along training.",
    "size_of_gradients": "Size of activation gradients and of effective gradients along training.",
    "small_gradients": "Share of effective gradients below three thresholds along training.",
    "beneficial_and_harmful_sums": "Sums of effective gradients by sign along training.",
    "beneficial_and_harmful": "Numbers of effective gradients by sign along training.",
}
CAPTIONS |= {f"{stem}_t5": f"T5: {CAPTIONS[stem]}" for stem in CAPTIONS}

DEVIATIONS = (
    "At laptop and workstation scale: small networks on scikit-learn's digits, on glyphs and on Python sources; eight "
    "saved steps.",
    "Gradients are per sample and unscaled, of the plain cross-entropy on the whole un-augmented training split; the "
    "authors log training batches, so that their thresholds 1e-9, 1e-6, 1e-3 mean other gradients.",
    "Histograms are over all layers together; exact zeros of g are in no bin, so that a histogram sums to less than "
    "100 % where there are some.",
    "Traces of second moments of gradients are those per token: Σ η² (of η), ‖∂L/∂z‖² (of ∂L/∂z), d_ff · E g² (of g).",
    "The authors' scripts take the augmented flatness of III-B of the T5 too: it stands in the tables of 05, of the "
    "test split at the end of training.",
)

EXPERIMENT = Experiment(
    __doc__,
    SCALES,
    measure,
    draw,
    compare,
    verdict,
    tables=tables,
    remarks=remarks,
    deviations=DEVIATIONS,
    styles=STYLES,
    claims=claims,
    captions=CAPTIONS,
    lead="densities",
)

if __name__ == "__main__":
    run(EXPERIMENT)
