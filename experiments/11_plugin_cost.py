"""What the plug-ins and the probe cost: time and peak memory of a training step, as ratios to the vanilla ReLU model.

A training step is forward, backward and AdamW on a fixed random batch; the work does not depend on the values. Every
contender has a copy of the network (timm's ViT, transformers' T5), and all take turns, one step each, so that a change
in the machine's load meets all. Ten turns are a cycle, in which a probe of every 10th step records once; a ratio is
that of mean times in one cycle. "JSReLU, compiled" compiles the activations alone; "…, compiled" the whole model. Then
the activations by themselves, forward and backward, beside eager ReLU.

Claim    none published. Ours: probing every 10th step adds at most 10 % to the training step, and compiled JSReLU takes
         at most 1.15 × the time of eager ReLU on a tensor (8192, 3072).
Verdict  from medians over cycles, where both networks were timed, and the compiled JSReLU on (8192, 3072) (else "not
         run at this scale"): "within the goals" if, for each number of threads, the step with a probe of every 10th
         step takes ≤ 1.10 of the vanilla step on both networks, and compiled JSReLU, forward and backward, ≤ 1.15 of
         eager ReLU; else "outside the goals", with what is missed.
Cost     smoke 10 s; laptop 5 min (1 thread, half of it compilation); workstation about 1 h (1 and 2 threads); paper:
         a GPU of 80 GB, not timed.
Run      python experiments/11_plugin_cost.py --scale laptop
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.lab import benchmark, figures
from common.lab.claims import question
from common.lab.memory import peak_allocated_mib, state_mib
from common.lab.run import Experiment, run
from common.models.t5 import t5
from sparsity import JSReLU, find_blocks, probe, sparsify
from sparsity.studies.models.vit import vit
from sparsity.studies.runs import STYLES

CYCLE = 10  # turns
ALONE = "activation alone"
SHAPE = (8192, 3072)  # tokens × d_ff of the activations alone, to which the goal belongs
STEP_GOAL, ACTIVATION_GOAL = 1.10, 1.15
ALL_MEMORY = "weights and moments too"


@dataclass(frozen=True)
class Contender:
    """What takes part in a comparison: plug-ins, what is compiled, how often a probe records."""

    plugins: Mapping[str, Any] | None = None  # arguments of sparsify; None: vanilla
    compiled: Literal["", "activations", "model"] = ""
    probe_every: int = 0  # 0: no probe


ZEROTH_BIAS = dict(activation=None, zeroth_bias=True, restricted_norm=False)
RESTRICTED_NORM = dict(activation=None, zeroth_bias=False, restricted_norm=True)
JSRELU = dict(activation="jsrelu", zeroth_bias=False, restricted_norm=False)
ALL_THREE = dict(activation="jsrelu", zeroth_bias=True, restricted_norm=True)

CONTENDERS = {
    "vanilla": Contender(),
    "zeroth bias": Contender(ZEROTH_BIAS),
    "restricted norm": Contender(RESTRICTED_NORM),
    "JSReLU": Contender(JSRELU),
    "JSReLU, compiled": Contender(JSRELU, compiled="activations"),
    "all three": Contender(ALL_THREE),
    "vanilla, compiled": Contender(compiled="model"),
    "all three, compiled": Contender(ALL_THREE, compiled="model"),
    "probe, every step": Contender(probe_every=1),
    "probe, every 10th step": Contender(probe_every=CYCLE),
}
ACTIVATIONS = {
    "ReLU": Contender(),
    "GELU": Contender(),
    "JSReLU": Contender(),
    "JSReLU, compiled": Contender(compiled="activations"),
}
ORDER = ("ReLU", "GELU", *CONTENDERS)


@dataclass(frozen=True)
class Size:
    """Arguments of `vit` and `t5`, and the size of a batch: images; texts, tokens of a source and of a target."""

    vit: Mapping[str, int] = field(default_factory=dict)
    images: int = 4
    t5: Mapping[str, int] = field(default_factory=dict)
    texts: int = 4
    source: int = 128
    target: int = 32


SIZES = {
    "tiny": Size(
        dict(pixels=16, patch=4, width=32, depth=2, heads=2, classes=10), 2,
        dict(vocabulary=64, width=32, depth=1, heads=2, d_ff=128), 2, 16, 8,
    ),
    "small": Size(
        dict(pixels=64, patch=8, width=256, depth=6, heads=4, classes=100), 4,
        dict(vocabulary=384, width=256, depth=2, heads=4, d_ff=1024), 4,
    ),
    "shallow base": Size(  # layers of ViT-B/16 and T5-Base, a third and a sixth of them
        dict(depth=4), 2, dict(vocabulary=4096, width=768, depth=2, heads=12, d_ff=3072), 2,
    ),
    "base": Size({}, 64, dict(vocabulary=32128, width=768, depth=12, heads=12, d_ff=3072), 16, 512, 114),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)  # of weights and batches
    networks: tuple[Literal["ViT", "T5"], ...] = ("ViT", "T5")
    size: Literal["tiny", "small", "shallow base", "base"] = "small"
    cycles: int = 3
    compiled: bool = True  # whether the contenders that are compiled take part
    shape: tuple[int, int] = SHAPE
    threads: tuple[int, ...] = (1,)
    precision: Literal["no", "bf16"] = "no"

    def __post_init__(self):
        if not self.networks or set(self.networks) - {"ViT", "T5"}:
            raise ValueError(f"networks must be ViT, T5 or both, got {self.networks}")
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}")
        if self.cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {self.cycles}")


SCALES = {
    "smoke": Settings(size="tiny", cycles=1, compiled=False, shape=(64, 128)),
    "laptop": Settings(),
    "workstation": Settings(size="shallow base", cycles=5, threads=(1, 2)),
    "paper": Settings(size="base", cycles=10, precision="bf16"),
}


def measure(settings, context):
    for threads in settings.threads:
        torch.set_num_threads(threads)
        for seed in settings.seeds:
            for part in (*settings.networks, ALONE):
                labels = dict(seed=seed, part=part, size=settings.size, threads=threads)
                labels |= dict(shape=shape_text(settings.shape)) if part == ALONE else {}
                with context.stage(f"{part}, {threads_text(threads)}"), benchmark.cold_compiler():
                    for row in part_rows(settings, context.device, part, seed):
                        yield labels | row
                gc.collect()  # the optimizers' hook visits every sparsified model alive
    torch.set_num_threads(context.threads)


def part_rows(settings, device, part, seed) -> Iterator[dict]:
    """Build all contenders, warm them up, time them in turn, then take the peak memory of one step of each."""
    contenders = ACTIVATIONS if part == ALONE else CONTENDERS
    contenders = {name: each for name, each in contenders.items() if settings.compiled or not each.compiled}
    with contextlib.ExitStack() as hooks:
        steps, probes = {}, {}
        for name, contender in contenders.items():
            torch.manual_seed(seed)  # the same weights and batch for all
            if part == ALONE:
                steps[name] = activation_step(name, contender, settings, device)
            else:
                model, steps[name] = training_step(contender, part, settings, device)
            seconds = benchmark.warm_up(steps[name], device)
            if contender.compiled:
                yield dict(contender=name, metric="compile seconds", value=seconds)
            if contender.probe_every:
                probes[name] = hooks.enter_context(probe(model, contender.probe_every))
                steps[name]()
                probes[name].reset()  # the first turn is recorded
        for turn, name, seconds in benchmark.interleaved_seconds(steps, CYCLE * settings.cycles, device):
            recorded = name in probes and turn % contenders[name].probe_every == 0
            yield dict(contender=name, turn=turn, recorded=recorded, metric="seconds", value=seconds)
        for name, step in steps.items():
            if name in probes:
                yield dict(
                    contender=name, metric="summary seconds", value=benchmark.seconds_of(probes[name].summary, device)
                )
                probes[name].reset()
            yield dict(contender=name, metric="peak MiB", value=peak_allocated_mib(step, device))
            if part != ALONE:
                yield dict(contender=name, metric="state MiB", value=state_mib(step.keywords["optimizer"]))


def training_step(contender: Contender, network: str, settings: Settings, device) -> tuple[nn.Module, Callable]:
    """Return a contender's model and a function without arguments that does one training step with it."""
    size = SIZES[settings.size]
    model = vit(**size.vit) if network == "ViT" else t5(**size.t5)
    if contender.plugins is not None:
        sparsify(model, tokens=size.source if network == "T5" else None, **contender.plugins)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    called = model
    if contender.compiled == "activations":
        for block in find_blocks(model):
            block.activation.compile()
    elif contender.compiled == "model":
        called = torch.compile(model)
    loss = partial(image_loss if network == "ViT" else text_loss, called, random_batch(network, size, model, device))
    return model, partial(train_once, loss, optimizer=optimizer, device=device, precision=settings.precision)


def random_batch(network: str, size: Size, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    if network == "ViT":
        images = torch.randn(size.images, 3, *model.patch_embed.img_size)
        batch = dict(images=images, labels=torch.randint(model.num_classes, (size.images,)))
    else:
        words = partial(torch.randint, 2, size.t5["vocabulary"])  # neither padding nor the end
        batch = dict(input_ids=words((size.texts, size.source)), labels=words((size.texts, size.target)))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def image_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])


def text_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).loss


def train_once(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: torch.device, precision: str):
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def activation_step(name: str, contender: Contender, settings: Settings, device: torch.device) -> Callable[[], Any]:
    """Return a function that applies an activation and takes the gradient at its input."""
    activation = {"ReLU": nn.ReLU, "GELU": nn.GELU}.get(name, JSReLU)()
    if contender.compiled:
        activation.compile()
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    x, gradient = (torch.randn(settings.shape).to(device, dtype) for _ in range(2))
    x.requires_grad_()

    def step() -> None:
        torch.autograd.grad(activation(x), x, gradient)

    return step


# From here on only the table is seen --------------------------------------------------------------------------------


def cycles(data: pd.DataFrame) -> pd.DataFrame:
    """Return mean seconds: a row per part, number of threads, seed and cycle, a column per contender, in order."""
    rows = data[data.metric == "seconds"]
    rows = rows.assign(cycle=rows.turn // CYCLE)
    means = rows.groupby(["part", "threads", "seed", "cycle", "contender"], sort=False).value.mean().unstack()
    return means[[name for name in ORDER if name in means]]


def ranges(data: pd.DataFrame) -> pd.DataFrame:
    """Return seconds and ratio to the vanilla step, or to ReLU, of each contender: medians and range of the cycles."""
    wide = cycles(data)
    base = wide["ReLU"].fillna(wide["vanilla"])  # each part has one of the two
    long = wide.melt(value_name="seconds", ignore_index=False)
    long = long.assign(ratio=long.seconds / base.reindex(long.index)).dropna().reset_index()
    groups = long.groupby(["part", "threads", "contender"], sort=False)
    return groups.agg(
        seconds=("seconds", "median"), ratio=("ratio", "median"), low=("ratio", "min"), high=("ratio", "max"),
        sd=("ratio", "std"), cycles=("ratio", "count"),
    ).reset_index()  # fmt: skip


def others(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all contenders except vanilla and ReLU, with which they are compared."""
    return table[~table.contender.isin(["vanilla", "ReLU"])]


def threads_text(threads):
    return f"{threads} thread{'s' * (threads != 1)}"


def shape_text(shape):
    return " × ".join(map(str, shape))


def draw(data):
    table = others(ranges(data)).rename(columns={"ratio": "mean"})
    table = table.assign(condition=table.threads.map(threads_text))
    options = dict(item="contender", panel="part", level=1.0, bars="ranges over cycles")
    steps, alone = table[table.part != ALONE], table[table.part == ALONE]
    return {
        "step_time": figures.forest(steps, xlabel="time of a step / vanilla's", **options),
        "step_memory": figures.forest(memory_ratios(data), xlabel="peak memory / vanilla's", **options),
        "activation_time": figures.forest(alone, xlabel="time, forward + backward / ReLU's", **options),
    }


def memory(data: pd.DataFrame) -> pd.DataFrame:
    """Return by network and contender the MiB that stay from step to step, those that a step adds, and their sum."""
    rows = data[data.metric.isin(["peak MiB", "state MiB"]) & (data.part != ALONE)]
    table = rows.groupby(["part", "contender", "metric"], sort=False).value.mean().unstack()
    return table.assign(together=table["peak MiB"] + table["state MiB"]).reset_index()


def memory_ratios(data):
    table, names = memory(data), {"peak MiB": "what a step adds", "together": ALL_MEMORY}
    base = table[table.contender == "vanilla"].set_index("part")
    both = pd.concat(
        table.assign(condition=text, mean=table[column] / table.part.map(base[column]))
        for column, text in names.items()
    )
    return others(both.assign(low=both["mean"], high=both["mean"]))


def start(part):
    return "ReLU" if part == ALONE else "vanilla"


def compare(data, published):
    lines = []
    for row in others(ranges(data)).to_dict("records"):
        quantity = f"time, {row['contender']} / {start(row['part'])}: {row['part']}, {threads_text(row['threads'])}"
        lines.append(dict(quantity=quantity, ours=row["ratio"], sd=row["sd"], n=row["cycles"]))
    for row in memory_ratios(data).to_dict("records"):
        if row["condition"] == ALL_MEMORY:
            quantity = f"peak memory, {row['contender']} / vanilla: {row['part']}, with weights and moments"
            lines.append(dict(quantity=quantity, ours=row["mean"], sd=math.nan, n=1))
    return pd.DataFrame(lines).assign(paper=math.nan, same_setting="no: nothing published")


def tables(data):
    shown, columns = {}, {"low": "from", "high": "to"}
    for part, rows in ranges(data).groupby("part", sort=False):
        what = "Forward and backward of an activation" if part == ALONE else f"A training step of the {part}"
        heading = f"{what}: seconds, and ratio to {start(part)} (medians of cycles, range of the ratio)"
        shown[heading] = rows.drop(columns=["part", "sd"]).rename(columns=columns)
    if len(compiled := like_for_like(data)):
        shown["Compiled models: all three plug-ins over vanilla, both compiled"] = compiled
    if len(probed := probe_steps(data)):
        shown["Probes: a step that is recorded, and one between, over the vanilla step (medians of steps)"] = probed
    if len(compiling := data[data.metric == "compile seconds"]):
        table = compiling.groupby(["part", "threads", "contender"], sort=False).value.mean()
        shown["Seconds of compilation, forward and backward, from nothing"] = table.rename("seconds").reset_index()
    columns = {"state MiB": "weights and moments, MiB", "peak MiB": "a step adds, MiB", "together": "together, MiB"}
    used = memory(data)[["part", "contender", *columns]]
    shown["Peak memory of a training step"] = used.rename(columns=columns)
    return shown


def like_for_like(data):
    wide = cycles(data)
    if "all three, compiled" not in wide:
        return pd.DataFrame()
    ratio = (wide["all three, compiled"] / wide["vanilla, compiled"]).dropna().groupby(["part", "threads"], sort=False)
    return ratio.agg(["median", "min", "max"]).reset_index()


def probe_steps(data):
    rows = data[(data.metric == "seconds") & (data.part != ALONE)]
    keys = ["part", "threads"]
    vanilla = rows[rows.contender == "vanilla"].groupby(keys).value.median()
    probed = rows[rows.contender.str.startswith("probe")]
    table = probed.groupby([*keys, "contender", "recorded"], sort=False).value.median().unstack().div(vanilla, axis=0)
    table = table.rename(columns={True: "recorded", False: "between"})
    summary = data[data.metric == "summary seconds"].groupby([*keys, "contender"], sort=False).value.mean()
    return table.assign(**{"summary(), seconds": summary}).reset_index()


def remarks(data):
    texts = []
    for (part, threads), rows in others(ranges(data)).groupby(["part", "threads"], sort=False):
        changes = zip(rows.contender, 100 * (rows.ratio - 1), strict=True)
        listed = ", ".join(f"{name} {change:+.1f} %" for name, change in changes)
        where = part if part == ALONE else f"training step of the {part}"
        texts.append(f"Time beside {start(part)}, {where}, {threads_text(threads)}: {listed.replace('-', '−')}.")
    for row in probe_steps(data).to_dict("records"):
        if row["contender"] == "probe, every step":
            more = row["recorded"] - 1
            texts.append(
                f"A recorded step of the {row['part']} takes {100 * more:.0f} % more than a vanilla one "
                f"({threads_text(row['threads'])}): {10 * more:.1f} % when every 10th step is recorded."
            )
    return " ".join(texts)


def verdict(data):
    medians = ranges(data).set_index(["part", "contender", "threads"]).ratio
    goals = {(part, "probe, every 10th step"): STEP_GOAL for part in ("ViT", "T5")}
    goals[ALONE, "JSReLU, compiled"] = ACTIVATION_GOAL
    threads = data.threads.unique().tolist()
    needed = {(*key, count) for key in goals for count in threads}
    if not needed <= set(medians.index) or set(data["shape"].dropna()) != {shape_text(SHAPE)}:
        return "not run at this scale"
    texts, missed = [], []
    for (part, contender), goal in goals.items():
        for count in threads:
            what, ratio = f"{contender}, {part}, {threads_text(count)}", medians[part, contender, count]
            texts.append(f"{what}: {ratio:.3f} of {start(part)} (goal {goal:.2f})")
            missed += [what] if ratio > goal else []
    head = f"outside the goals (missed: {'; '.join(missed)})" if missed else "within the goals"
    return f"{head}. {'; '.join(texts)}"


def claims(data):
    """Two goals of this project; the paper has no numbers."""
    said, medians = verdict(data), ranges(data)
    rows = {
        "Does probing every 10th step cost at most 10 % of a training step?": medians[
            (medians.contender == "probe, every 10th step") & medians.part.isin(["ViT", "T5"])
        ],
        f"Does compiled JSReLU take at most 1.15 × eager ReLU, {shape_text(SHAPE)}?": medians[
            (medians.contender == "JSReLU, compiled") & (medians.part == ALONE)
        ],
    }
    return [question(text, costs(part), said) for text, part in rows.items()]


def costs(rows):
    """Medians of ratios over cycles, as text."""
    texts = [f"{row.ratio:.3f} × ({row.part.removeprefix(ALONE) or threads_text(row.threads)})"
             for row in rows.itertuples()]  # fmt: skip
    return f"{'; '.join(texts)}; {rows.cycles.min()} cycles" if texts else "not measured"


CAPTIONS = {
    "step_time": "Time of a training step over that of the vanilla ReLU model. Why compiling slows the vanilla model, "
    "and not the one with all three plug-ins, stands in the last of the deviations.",
    "step_memory": "Peak memory of a training step over that of the vanilla ReLU model.",
    "activation_time": "Time of an activation by itself, forward and backward, over that of eager ReLU.",
}

DEVIATIONS = (
    "The paper publishes no cost of its plug-ins: there is nothing to compare with.",
    "Random weights and batches. Every step uses the same batch, and no gradient is clipped.",
    "Below the paper scale the networks are small, or of the true width with fewer layers. Matrix products grow with "
    "the square of the width and what is measured here in proportion to it: the ratios of narrow networks are too high "
    "for wide ones.",
    "T5's zeroth biases have as many rows as the source has tokens, not 512.",
    "All contenders live in one process, so that the hook which keeps the plug-ins within their bounds looks at the "
    "blocks of all of them after every step, vanilla's too.",
    "Reading a probe, summary(), is timed by itself and is no part of a step.",
    "Peak memory is what a warm step allocates beside weights and moments, by torch's allocator.",
    "That compiled vanilla is slower than eager vanilla is the compiler's doing: of ReLU it keeps a mask of "
    "booleans for the backward pass, which its kernel for CPUs writes slowly, and of JSReLU numbers. In one "
    "profile of five steps of the ViT (torch 2.14.1, one thread) the fused kernels of the forward pass took 36 ms "
    "a step in compiled vanilla and 7 ms with all three plug-ins; the matrix products took the same.",
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
)

if __name__ == "__main__":
    run(EXPERIMENT)
