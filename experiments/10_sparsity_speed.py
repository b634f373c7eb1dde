"""What activation sparsity pays on a CPU: inference that skips zeros, and a backward pass by sparse products.

`sparsity.skip_zeros` beside dense inference: the value layer, the whole MLP (with a fresh token at every call, so that
no mask is met twice), small batches, whole models. All contenders take turns, one call each, so that a change in the
machine's load meets all. A time is the lower quartile over turns, which other programs on the machine disturb least,
and a gain the ratio of dense time to a contender's. "keys screened" leaves out keys by a proven bound, "…, 8 sd" by
eight standard deviations of the rounding error. The backward pass of `sparsity.studies.sparse_backward` uses one
pattern for ∂L/∂x, ∂L/∂K and ∂L/∂V.

Claim    none published with numbers: arXiv 2605.25612 promises that activation sparsity prunes inference and derivative
         sparsity training. Ours, for one token at 95 % zeros: the value layer 4096 × 11008 gains at least 5 ×, and an
         OPT-shaped decoder 1.5 × in tokens per second; a training step gains 1.1 × below 10 % derivative density.
Verdict  from means over seeds, where the three were timed (else "not run at this scale"): "within the goals" if the
         value layer gains ≥ 5 for each number of threads, the decoder ≥ 1.5 (keys screened by the proven bound), and
         a training step of the ViT ≥ 1.1 at every measured derivative density below 10 %; else "outside the goals",
         with what is missed.
Cost     smoke 20 s; laptop 10 min (20 beside other programs), of which 2 train the T5 and the ViT of experiments 05
         and 03; workstation 30 min; paper: the sizes of workstation and more turns, since the paper has none.
Run      python experiments/10_sparsity_speed.py --scale laptop
"""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from common.lab import benchmark, figures
from common.lab.claims import question
from common.lab.figures import INK, MUTED, Style
from common.lab.run import Experiment, run
from sparsity.plugins import PROTOCOLS
from sparsity.studies import speed, take_home
from sparsity.studies.measurement import load
from sparsity.studies.models.vit import vit
from sparsity.studies.recipes import T5, VIT
from sparsity.studies.runs import MODIFIED, Run
from sparsity.studies.speed import DENSE, LIKELY, SCREENED, VALUES
from sparsity.studies.training import make_task, train

BACKWARD = "backward pass by sparse products"
VALUE_LAYER, MLP, BATCH = "value layer, one token", "MLP, one token", "MLP, some tokens"
TEXTS, TRAINED_T5, TRAINED_VIT = "OPT-shaped decoder", "trained T5", "trained ViT"
STEP, LAYER_STEP = "training step of a ViT", "training step of an MLP"
INFERENCE_PROFILE, BACKWARD_PROFILE = "profile of an MLP", "profile of a training step of an MLP"
WIDEST = "4096 × 11008"
GOALS = {VALUE_LAYER: 5.0, TEXTS: 1.5, STEP: 1.1}
TURNS_LEFT_OUT = 1  # the first, which warms up

STYLES = {
    DENSE: Style(DENSE, MUTED), VALUES: Style(VALUES, "#E69F00"), SCREENED: Style("… and keys screened", "#0072B2"),
    LIKELY: Style("… and keys screened, 8 sd", "#56B4E9"), BACKWARD: Style(BACKWARD, INK),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)  # of weights and tokens
    shapes: tuple[tuple[int, int], ...] = ((768, 3072), (2048, 8192), (4096, 11008))  # d × d_ff
    zeros: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
    threads: tuple[int, ...] = (1, 2)
    turns: int = 17
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # tokens, in an MLP of the second shape at 95 % zeros
    alike: tuple[float, ...] = (0.0, 0.9)  # share of the variance that the tokens of a batch have in common
    opt: tuple[int, int, int, int] = (2048, 8192, 2, 16)  # width, d_ff, layers, heads
    texts_zeros: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
    length: int = 16  # tokens that are generated
    trained: str = "laptop"  # the scale of experiments 03 and 05 whose networks are taken
    vit: tuple[int, int, int, int] = (768, 2, 224, 4)  # width, layers, pixels, images of a step
    step_shapes: tuple[tuple[int, int, int], ...] = ((1024, 768, 3072), (256, 2048, 8192))  # tokens, d, d_ff
    step_densities: tuple[float, ...] = (0.15, 0.08, 0.05, 0.02)
    step_turns: int = 5

    def __post_init__(self):
        if len(self.shapes) < 2 and self.batches:
            raise ValueError("batches are measured at the second of the shapes: give two, or no batches")
        if self.turns <= TURNS_LEFT_OUT or self.step_turns <= TURNS_LEFT_OUT:
            raise ValueError(f"the first turn warms up: turns and step_turns must be above {TURNS_LEFT_OUT}")


SCALES = {
    "smoke": Settings(
        shapes=((16, 32), (32, 64)), zeros=(0.5, 0.95), threads=(1,), turns=3, batches=(1, 4), opt=(32, 64, 2, 2),
        texts_zeros=(0.95,), length=3, trained="smoke", vit=(24, 1, 16, 2), step_shapes=((16, 8, 16),),
        step_densities=(0.05,), step_turns=2,
    ),
    "laptop": Settings(),
    "workstation": Settings(seeds=(0, 1, 2), turns=25, opt=(2048, 8192, 6, 16), length=32, step_turns=12),
    "paper": Settings(seeds=(0, 1, 2), turns=50, opt=(2048, 8192, 24, 32), length=64, step_turns=25),
}  # fmt: skip


def measure(settings, context):
    parts = {
        "layers": layer_rows, "batches": batch_rows, "texts": text_rows, "trained": trained_rows, "steps": step_rows,
    }  # fmt: skip
    for seed in settings.seeds:
        for name, rows in parts.items():
            torch.manual_seed(seed)
            with context.stage(name):
                torch.set_num_threads(1)
                yield from (dict(seed=seed) | row for row in rows(settings, context, seed))
    torch.set_num_threads(context.threads)


def timed(labels, steps, turns, context):
    """Yield the seconds of every contender in every turn but the first."""
    for turn, name, seconds in benchmark.interleaved_seconds(steps, turns, context.device):
        if turn >= TURNS_LEFT_OUT:
            yield labels | dict(contender=name, turn=turn, metric="seconds", value=seconds)


def layer_rows(settings, context, seed):
    for shape in settings.shapes:
        layer = speed.Layer(*shape).eval()
        speed.set_zeros(layer, 0.5, draw=True)
        for threads in settings.threads:
            torch.set_num_threads(threads)
            models = speed.contenders(copy.deepcopy(layer), most_tokens=1)
            for zeros in settings.zeros:
                labels = dict(shape=f"{shape[0]} × {shape[1]}", threads=threads, zeros=zeros, tokens=1)
                yield from one_token_rows(labels, models, shape, zeros, settings, context)


def one_token_rows(labels, models, shape, zeros, settings, context):
    values = speed.value_layers(models)
    inputs = speed.activations(settings.turns, shape[1], zeros)
    steps = {name: speed.on_fresh(value, inputs) for name, value in values.items()}
    yield from timed(labels | dict(part=VALUE_LAYER), steps, settings.turns, context)

    speed.share_zeros(models, zeros)
    inputs = speed.tokens(settings.turns, 1, shape[0])
    steps = {name: speed.on_fresh(model, inputs) for name, model in models.items()}
    yield from timed(labels | dict(part=MLP), steps, settings.turns, context)
    dense, *others = models
    expected = speed.on_fresh(models[dense], inputs[:1])()
    for name in others:
        error = speed.relative_error(speed.on_fresh(models[name], inputs[:1])(), expected)
        yield labels | dict(part=MLP, contender=name, metric="relative error", value=error)
    for name in (SCREENED, LIKELY):
        left = speed.possible_share(models[name], inputs)
        yield labels | dict(part=MLP, contender=name, metric="left by the screen", value=left)
    if zeros == 0.95:
        for part, seconds in speed.inference_profile(models[SCREENED], inputs):
            yield labels | dict(part=INFERENCE_PROFILE, contender=part, metric="seconds", value=seconds)


def batch_rows(settings, context, seed):
    if not settings.batches:
        return
    shape, zeros = settings.shapes[1], 0.95
    layer = speed.Layer(*shape).eval()
    speed.set_zeros(layer, zeros, draw=True)
    models = speed.contenders(layer, most_tokens=max(settings.batches))
    for common in settings.alike:
        for count in settings.batches:
            labels = dict(part=BATCH, shape=f"{shape[0]} × {shape[1]}", threads=1, zeros=zeros, tokens=count)
            labels |= dict(common=common)
            inputs = speed.tokens(settings.turns, count, shape[0], common)
            steps = {name: speed.on_fresh(model, inputs) for name, model in models.items()}
            yield from timed(labels, steps, settings.turns, context)
            passes = speed.on_fresh(models[DENSE], inputs)
            yield from density_rows(labels, models[DENSE], lambda run=passes: [run() for _ in range(settings.turns)])


def density_rows(labels, model, call):
    """Yield the density that a dense model reaches, and the union density of the tokens of a pass."""
    for metric, value in zip(("density", "union density"), speed.densities(model, call), strict=True):
        yield labels | dict(contender=DENSE, metric=metric, value=value)


def text_rows(settings, context, seed):
    width, d_ff, depth, heads = settings.opt
    vocabulary, prompt = 512, 4
    model = speed.opt(width, d_ff, depth, heads, vocabulary, positions=prompt + settings.length)
    models = speed.contenders(model, most_tokens=1)
    inputs = [torch.randint(2, vocabulary, (1, prompt)) for _ in range(settings.step_turns)]
    calls = {name: partial(speed.generate, each, settings.length) for name, each in models.items()}
    for zeros in settings.texts_zeros:
        speed.share_zeros(models, zeros)
        labels = dict(part=TEXTS, shape=f"{width} × {d_ff}, {depth} layers", threads=1, zeros=zeros, tokens=1)
        steps = {name: speed.on_fresh(call, inputs) for name, call in calls.items()}
        yield from timed(labels, steps, settings.step_turns, context)
        yield from density_rows(labels, model, speed.on_fresh(calls[DENSE], inputs))


def trained_rows(settings, context, seed):
    task, recipe = T5[settings.trained]["task"], T5[settings.trained]["recipes"][0]
    options = dict(exempt=PROTOCOLS["t5"], log_every=T5[settings.trained]["log_every"])
    described = Run(task, recipe, MODIFIED, seed, **options)
    model = load(described, train(described, context.device), context.device)
    batch = next(iter(make_task(task, context.device).batches("test")))
    inputs = list(batch["input_ids"][: settings.turns].split(1))
    calls = {name: partial(speed.generate, each, 12) for name, each in speed.contenders(model, most_tokens=1).items()}
    yield from trained_model_rows(TRAINED_T5, f"{task.width} × {task.d_ff}", calls, inputs, model, settings, context)

    described = Run(**{name: VIT[settings.trained][name] for name in ("task", "recipe", "log_every")}, variant=MODIFIED)
    model = load(described, train(described, context.device), context.device)
    images = next(iter(make_task(described.task, context.device).batches("test")))["images"]
    inputs = list(images[: settings.turns].split(1))
    models = speed.contenders(model, most_tokens=64)  # all tokens of an image at once
    width = described.task.width
    shape = f"{width} × {width * described.task.mlp_ratio}"
    yield from trained_model_rows(TRAINED_VIT, shape, models, inputs, model, settings, context)


def trained_model_rows(part, shape, calls, inputs, model, settings, context):
    steps = {name: speed.on_fresh(call, inputs) for name, call in calls.items()}
    labels = dict(part=part, shape=shape, threads=1)
    yield from timed(labels, steps, settings.turns, context)
    passes = speed.on_fresh(calls[DENSE], inputs)
    yield from density_rows(labels, model, lambda: [passes() for _ in inputs])


def step_rows(settings, context, seed):
    turns = settings.step_turns
    for number, d, d_ff in settings.step_shapes:
        layer = speed.Layer(d, d_ff)
        speed.set_zeros(layer, 0.5, draw=True)
        models = {DENSE: layer, BACKWARD: speed.with_sparse_backward(layer)}
        batch, gradient = torch.randn(number, d), torch.randn(number, d)
        for density in settings.step_densities:
            for model in models.values():
                speed.set_zeros(model, 1 - density)
            labels = dict(shape=f"{d} × {d_ff}", threads=1, zeros=1 - density, tokens=number)
            steps = {name: partial(speed.layer_step, model, batch, gradient) for name, model in models.items()}
            yield from timed(labels | dict(part=LAYER_STEP), steps, turns, context)
            if density == 0.05:
                for _ in range(turns):
                    for name, seconds in speed.backward_profile(layer, batch, gradient):
                        yield labels | dict(part=BACKWARD_PROFILE, contender=name, metric="seconds", value=seconds)
    yield from vit_step_rows(settings, context)


def vit_step_rows(settings, context):
    width, depth, pixels, count = settings.vit
    images, labels_of_images = torch.randn(count, 3, pixels, pixels), torch.randint(100, (count,))
    dense = vit(pixels=pixels, patch=pixels // 14 or 1, width=width, depth=depth, heads=width // 8, classes=100).train()
    speed.set_zeros(dense, 0.5, draw=True)
    models = {DENSE: dense, BACKWARD: speed.with_sparse_backward(dense)}
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-6, fused=True) for name, model in models.items()}
    for density in settings.step_densities:
        for model in models.values():
            speed.set_zeros(model, 1 - density)
        steps = {
            name: partial(speed.training_step, model, optimizers[name], images, labels_of_images)
            for name, model in models.items()
        }
        labels = dict(part=STEP, shape=f"{width} × {4 * width}, {depth} layers", threads=1, zeros=1 - density)
        yield from timed(labels, steps, settings.step_turns, context)
        yield from density_rows(labels, dense, partial(dense, images))


# From here on only the table is seen --------------------------------------------------------------------------------

KEYS = ["part", "shape", "threads", "zeros", "tokens", "common"]


def gains(data):
    """Return dense seconds over each contender's, lower quartiles over turns: a row per seed, setting and contender."""
    rows = data[(data.metric == "seconds") & data.turn.notna()]
    groups = rows.groupby(["seed", *KEYS, "contender"], sort=False, dropna=False).value
    table = groups.agg(seconds=speed.typical_seconds, turns="count").reset_index()
    dense = table[table.contender == DENSE].rename(columns={"seconds": "dense"})
    table = table.merge(dense[["seed", *KEYS, "dense"]], on=["seed", *KEYS])
    return table.assign(gain=table.dense / table.seconds, percent=100 * table.zeros, density=100 - 100 * table.zeros)


def means(data):
    """Return gains and seconds as means over seeds: a row per setting and contender, the dense one included."""
    groups = gains(data).groupby([*KEYS, "contender"], sort=False, dropna=False)
    named = dict(gain=("gain", "mean"), sd=("gain", "std"), seconds=("seconds", "mean"), turns=("turns", "sum"))
    return groups.agg(**named).reset_index()


def skipping(table):
    return table[table.contender != DENSE]


def threads_text(threads):
    return f"{threads:.0f} thread{'s' * (threads != 1)}"


def draw(data):
    rows = skipping(gains(data))
    values, mlps, batches, texts = (rows[rows.part == part] for part in (VALUE_LAYER, MLP, BATCH, TEXTS))
    values = values.assign(kind=values.threads.map(threads_text))
    steps = rows[rows.part.isin([LAYER_STEP, STEP])]
    steps = steps.assign(kind=[f"{row.part.split()[-1]}, {row['shape']}" for _, row in steps.iterrows()])
    options = dict(y="gain", ylabel="time, dense / skipping", level=1.0, yscale="log")
    zeros = dict(x="percent", xlabel="activations that are zero, %")
    drawn = {
        "value_layer": figures.lines(values, by="kind", panel="shape", **zeros, **options),
        "decoder": figures.lines(texts, by="contender", panel="shape", **zeros, **options | dict(yscale="linear")),
        "training_step": figures.lines(
            steps, x="density", by="kind", xlabel="derivative density, %",
            **options | dict(yscale="linear", ylabel="time, dense / sparse backward"),
        ),
    }  # fmt: skip
    for threads, rows in mlps.groupby("threads"):
        drawn[f"mlp_{threads:.0f}"] = figures.lines(rows, by="contender", panel="shape", **zeros, **options)
    if len(batches):
        batches = batches.assign(kind=batches.common.map(alike_text))
        unions = data[(data.part == BATCH) & (data.metric == "union density")]
        unions = unions.assign(kind=unions.common.map(alike_text), percent=100 * unions.value)
        scale = dict(x="tokens", xlabel="tokens of a call", xscale="log")
        drawn["batches"] = figures.lines(batches, by="contender", panel="kind", **scale, **options)
        drawn["union_density"] = figures.lines(
            unions, by="kind", y="percent", ylabel="units active for some token, %", **scale
        )
    return drawn


def alike_text(common):
    return "independent tokens" if common == 0 else f"tokens share {100 * common:.0f} % of variance"


def setting_text(row):
    zeros = "" if np.isnan(row["zeros"]) else f", {100 * row['zeros']:.0f} % zeros"
    tokens = "" if not row["tokens"] > 1 else f", {row['tokens']:.0f} tokens"
    alike = f", {alike_text(row['common'])}" if row["common"] > 0 else ""
    return f"{row['part']} {row['shape']}{zeros}{tokens}{alike}, {threads_text(row['threads'])}"


def compare(data, published):
    table = skipping(means(data))
    table = table[(table.zeros.isna() | (table.zeros > 0.9)) & (table.part != BATCH)]  # tables have the others
    return pd.DataFrame(
        dict(quantity=f"gain, {row['contender']}: {setting_text(row)}", ours=row["gain"], sd=row["sd"], n=row["turns"])
        for row in table.to_dict("records")
    ).assign(paper=np.nan, same_setting="no: nothing published")


def tables(data):
    table = means(data)
    shown = {}
    for part in (VALUE_LAYER, MLP):
        rows = skipping(table[table.part == part])
        wide = rows.pivot_table(index=["shape", "threads", "contender"], columns="zeros", values="gain", sort=False)
        wide.columns = [f"{100 * zeros:.0f} % zeros" for zeros in wide.columns]
        shown[f"Gain (dense time over skipping time): {part}"] = wide.round(2).reset_index()
    shown["Seconds of a call or step, dense and skipping"] = whole_models(data, table)
    batches = skipping(table[table.part == BATCH])
    if len(batches):
        unions = data[(data.part == BATCH) & (data.metric == "union density")]
        unions = unions.groupby(["common", "tokens"]).value.mean()
        wide = batches.pivot_table(index=["common", "tokens"], columns="contender", values="gain", sort=False).round(2)
        wide = wide.assign(**{"units active for some token, %": (100 * unions).round(1)}).reset_index()
        shown["Gain with several tokens in a call, at 95 % zeros"] = wide
    left = data[data.metric.isin(["left by the screen", "relative error"])]
    wide = left.pivot_table(index=["shape", "zeros"], columns=["metric", "contender"], values="value", sort=False)
    wide.columns = [f"{metric}: {contender}" for metric, contender in wide.columns]
    shown["What the screen leaves (share of units), and the difference to the dense result"] = wide.reset_index()
    for part in (INFERENCE_PROFILE, BACKWARD_PROFILE):
        rows = data[data.part == part]
        if len(rows):
            wide = rows.assign(value=1000 * rows.value).pivot_table(
                index="contender", columns=["shape", "threads"], values="value", aggfunc="median", sort=False
            )
            wide.columns = [f"{shape}, {threads_text(threads)}" for shape, threads in wide.columns]
            shown[f"Where the time goes: {part}, at 95 % zeros, milliseconds"] = wide.round(2).reset_index(names="part")
    return shown


def whole_models(data, table):
    """Return seconds, density and gains of models and training steps."""
    table = table[table.part.isin([TEXTS, TRAINED_T5, TRAINED_VIT, STEP, LAYER_STEP])]
    keys = ["part", "shape", "zeros"]
    for metric in ("density", "union density"):
        found = data[data.metric == metric].groupby(keys, dropna=False).value.mean().mul(100).round(1)
        table = table.merge(found.rename(f"{metric}, %").reset_index(), on=keys, how="left")
    columns = [
        "part",
        "shape",
        "zeros",
        "density, %",
        "union density, %",
        "contender",
        "seconds",
        "gain",
    ]
    return table[columns]


def remarks(data):
    table = skipping(means(data))
    texts = []
    for part in (TRAINED_T5, TRAINED_VIT):
        rows, found = table[table.part == part], data[data.part == part]
        shares = found[found.metric.isin(["density", "union density"])].groupby("metric").value.mean()
        listed = ", ".join(f"{row.contender} {row.gain:.2f} ×" for row in rows.itertuples())
        texts.append(
            f"The {part} (width {rows['shape'].iloc[0]}) has a density of {100 * shares['density']:.1f} %, "
            f"{100 * shares['union density']:.0f} % of units are active for some token of a pass; gains: {listed}."
        )
    steps = table[table.part == STEP]
    listed = "; ".join(f"{setting_text(row)}: {row['gain']:.2f} ×" for row in steps.to_dict("records"))
    return " ".join([*texts, f"The backward pass by sparse products: {listed}."])


def verdict(data):
    table = skipping(means(data))
    widest = table[(table.part == VALUE_LAYER) & (table["shape"] == WIDEST) & (table.zeros == 0.95)]
    texts = table[(table.part == TEXTS) & (table.zeros == 0.95) & (table.contender == SCREENED)]
    steps = table[(table.part == STEP) & (table.zeros > 0.9)]
    if not (len(widest) and len(texts) and len(steps)):
        return "not run at this scale"
    lines, missed = [], []
    for row in pd.concat([widest, texts, steps]).to_dict("records"):
        goal, what = GOALS[row["part"]], setting_text(row)
        lines.append(f"{what}: {row['gain']:.2f} × (goal {goal:g})")
        missed += [what] if row["gain"] < goal else []
    head = f"outside the goals (missed: {'; '.join(missed)})" if missed else "within the goals"
    return f"{head}. {'; '.join(lines)}"


def claims(data):
    """Three goals of this project; the paper has no numbers."""
    said, table = verdict(data), skipping(means(data))
    rows = {
        f"Does a value layer {WIDEST} gain 5 × at 95 % zeros, one token?": (
            table[(table.part == VALUE_LAYER) & (table["shape"] == WIDEST) & (table.zeros == 0.95)]
        ),
        "Does an OPT-shaped decoder gain 1.5 × in tokens per second at 95 % zeros?": (
            table[(table.part == TEXTS) & (table.zeros == 0.95) & (table.contender == SCREENED)]
        ),
        "Does a training step gain 1.1 × below 10 % derivative density?": (
            table[(table.part == STEP) & (table.zeros > 0.9)]
        ),
    }
    return [question(text, f"{gained(part)} (n = {data.seed.nunique()})", said) for text, part in rows.items()]


def gained(rows):
    """The gains of some settings, each beside its number of threads where that differs."""
    threads = rows.threads.nunique() > 1
    texts = [f"{row.gain:.2f} ×" + f" ({threads_text(row.threads)})" * threads for row in rows.itertuples()]
    return "; ".join(texts) or "not measured"


CAPTIONS = {
    "value_layer": "Gain of the value layer by skipping zeros, one token.",
    "mlp": "Gain of a whole MLP by skipping zeros, one token.",
    "batches": "Gain of a whole MLP by skipping zeros, some tokens at once.",
    "decoder": "Gain of an OPT-shaped decoder in tokens per second.",
    "training_step": "Gain of a training step by a sparse backward pass.",
    "union_density": "Share of units that some token of a batch needs, over its size.",
}

DEVIATIONS = (
    "The paper publishes no times: there is nothing to compare with.",
    "Layers, the OPT-shaped decoder and the networks of the training steps have random weights; biases of the keys are "
    "set so that the stated share of activations is zero. Active units of such networks are independent of each other "
    "and change from token to token; in trained ones fewer differ, which favours caches.",
    "The trained T5 and ViT are those of experiments 05 and 03 at laptop scale: their MLPs are so narrow that calling "
    "a function costs as much as the layer.",
    "Seconds depend on the machine, and on what else it does: at laptop scale other programs kept both cores busy, "
    "which slows what reads much memory more than what reads little.",
    "Gains of the skipping contenders are those of `skip_zeros` as users get it: above its measured break-even points "
    "it computes densely.",
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
    pages={"sparsity_at_equal_accuracy.md": take_home.page},
)

if __name__ == "__main__":
    run(EXPERIMENT)
