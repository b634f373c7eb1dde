"""Time, memory and error of merging checkpoints on disk, beside mergekit, and of merging adapters in factored form.

Four parts, all on a CPU with one thread. Beside mergekit: a base of Llama's architecture and experts, base + noise, in
bfloat16 and in shards, merged by `python -m merging` and by mergekit from the same files, in a fresh process each time,
by task arithmetic and by TIES; and, for the floor, read and copied without any arithmetic. Agreement: recipes of
mergekit with weights, densities, filters and gradients, carried out by both on a small model in float32. Model size:
`python -m merging` on checkpoints of one large tensor and more and more layers. Adapters: updates of rank 16, merged
and calibrated in factored form and as dense matrices.

Claim    Merging needs no more memory than a few of the model's tensors, whatever the model's size and its shards, and
         adapters need no dense matrix.
Verdict  seven parts, each "yes" or "no" on what was run, which is named; "holds" if no part that was run is "no":
         memory   peak resident memory below mergekit's for each method and shard size;
         time     seconds at most mergekit's for each method and shard size (means over repeats);
         floor    seconds of task arithmetic at most 1.5 times those of reading all inputs and writing the output
                  with no arithmetic, for each shard size (means over repeats);
         agreement with mergekit's own output, for each of its methods: relative difference of the updates at most 1e-5
                  (for TIES without the K entries of each tensor that differ most: mergekit keeps one less per expert);
                  DARE's masks are random: share of entries that change, and their mean magnitude, within 2 %;
         error    distance to the float64 merge at most 1.01 of that of the float64 merge rounded to the output's dtype;
         size     peak resident memory at most 1 GiB + (K + 4) × the largest tensor for each model and method;
         adapters at least 100 times faster than dense, relative difference at most 1e-5, for each method at 4096 × 4096
                  (smaller ones: "not run").
         In memory and time mergekit counts twice, with arithmetic in the files' dtype (its default) and, where that is
         run too, in float32 (what `python -m merging` does); both have to be met against both. Without mergekit these
         two, and agreement, are "not run".
         Evidence for the full claim: shards of 5 GB and models up to 8 GB.
Cost     smoke 30 s; laptop 8 min; workstation 1 h, 25 GB of disk and 16 GB of memory; paper, a model of 8e9
         parameters: not timed.
Run      python experiments/30_checkpoint_merging.py --scale laptop
         mergekit is looked for on the PATH, or as --mergekit PATH/TO/mergekit-yaml; in an environment of its own:
         python -m venv DIR && DIR/bin/pip install mergekit==0.1.5 accelerate==1.15.0 sentencepiece tiktoken
"""

import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from common.lab import benchmark, figures
from common.lab.claims import question
from common.lab.run import Experiment, run
from merging.command.recipe import shard_bytes
from merging.lowrank import LowRank, merge_and_calibrate, merge_low_rank
from merging.suites import comparison
from merging.suites.reference import task_arithmetic_by_entry, ties_by_entry

SCALE = 0.3
AGREEMENT = {  # method of mergekit → weights and densities of three experts, and what holds for all
    method: dict(
        weights=[0.8, [0.2, 1.0], [{"filter": "mlp", "value": 0.5}, {"value": 0.3}]],
        densities=[0.5, 0.4, [0.3, 0.6]],
        parameters={} if method == "linear" else {"lambda": 0.7},
    )
    for method in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
}
TWINS = {"task_arithmetic": task_arithmetic_by_entry, "ties": ties_by_entry}
OURS, PEER, PEER_32 = "python -m merging", "mergekit", "mergekit, float32"
FLOOR = "copy"
ROUNDED = "float64, rounded"
SIZED = {  # flags of the three kinds of streaming: ranges of rows, several passes, whole matrices
    "task_arithmetic": ["--method", "task_arithmetic"],
    "ties, global": ["--method", "ties", "--set", "*:scope=global"],
    "task_arithmetic + SVC": ["--method", "task_arithmetic", "--svc"],
}
FACTORED = {"task_arithmetic + SVC": ("task_arithmetic", {}), "tsv_m": ("tsv_m", None), "iso_c": ("iso_c", None)}
NAMES = {
    "ties, global": "TIES, global",
    "task_arithmetic + SVC": "Task Arithmetic + SVC",
    "limit": "limit: 1 GiB + (K + 4)\n× largest tensor",
}
PROFILE = {  # where the seconds of a merge go: functions as the profiler spells them
    "reading": r"numpy\.fromfile",
    "converting": r"'(copy_|to)' of 'torch",
    "arithmetic": r"'\w+' of 'torch._C.TensorBase|torch._C._VariableFunctions",
    "writing": r"posix\.(pwrite|fsync)",
}
COPY = [sys.executable, "-m", "merging.suites.copy_floor"]
MERGEKIT_FLAGS = ["--quiet", "--no-copy-tokenizer", "--lazy-unpickle", "--num-threads", "1"]
LATER_LAYERS = re.compile(r"layers\.(?!0\.|1\.)")  # their errors are not looked at: the float64 merge is slow
MIB = 2**20
MEANT = {"difference of updates": 0.0, "changed entries, ours / theirs": 1.0, "magnitude, ours / theirs": 1.0}


@dataclass(frozen=True)
class Llama:
    """A model beside mergekit; the defaults are of 0.1e9 parameters."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 6
    vocabulary: int = 16000


@dataclass(frozen=True)
class Sized:
    """Checkpoints of growing size, float32: one large tensor and as many layers as fill the rest."""

    gigabytes: tuple[float, ...] = (0.25, 0.5, 1.0)  # 1e9 bytes
    largest: tuple[int, int] = (65536, 512)
    layer: tuple[int, int] = (512, 8192)  # flat, so that SVC takes minutes and not hours


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)  # of the random weights
    llama: Llama = Llama()
    shards: tuple[str, ...] = ("50MB", "500MB")  # of inputs and outputs
    experts: int = 3
    repeats: int = 2
    sized: Sized = Sized()
    side: int = 1024  # of the adapters' weight
    rank: int = 16
    adapters: int = 8
    mergekit: str = "mergekit-yaml"  # name on the PATH, or path
    float32: bool = True  # run mergekit with arithmetic in float32 too
    small: Llama = Llama(64, 176, 4, 500)  # on which the outputs are compared

    def __post_init__(self):
        if os.sep in self.mergekit and not shutil.which(self.mergekit):
            raise ValueError(f"--mergekit: there is no program {self.mergekit}; give the path of mergekit-yaml")


SCALES = {
    "smoke": Settings(
        llama=Llama(64, 176, 2, 500),
        shards=("100KB",),
        repeats=1,
        sized=Sized((0.002,), (512, 64), (64, 256)),
        side=128,
    ),
    "laptop": Settings(),
    "workstation": Settings(
        llama=Llama(3072, 8192, 24, 32000),  # 2.7e9 parameters: 5.4 GB
        shards=("500MB", "5GB"),
        experts=2,
        repeats=1,
        sized=Sized((1.0, 2.0, 4.0, 8.0), (131072, 512)),
        side=4096,
        float32=False,
    ),
    "paper": Settings(
        llama=Llama(4096, 14336, 32, 128256),  # Llama-3.1-8B
        shards=("500MB", "5GB"),
        sized=Sized((8.0, 16.0, 32.0, 64.0), (131072, 4096)),
        side=4096,
    ),
}


def measure(settings, context):
    peer = shutil.which(settings.mergekit)
    for seed in settings.seeds:
        for shard in settings.shards:
            with context.stage(f"shards of {shard}"), tempfile.TemporaryDirectory() as folder:
                yield from beside_mergekit(settings, Path(folder), peer, seed, shard)
        if peer:
            with context.stage("agreement"), tempfile.TemporaryDirectory() as folder:
                yield from agreement(settings, Path(folder), peer, seed)
        for size in settings.sized.gigabytes:
            with context.stage(f"{size:g} GB"), tempfile.TemporaryDirectory() as folder:
                yield from one_size(settings.sized, Path(folder), seed, size)
        with context.stage("adapters"):
            torch.set_num_threads(1)
            yield from adapters(settings, seed)
            torch.set_num_threads(context.threads)


# Beside mergekit ------------------------------------------------------------------------------------------------------


def beside_mergekit(settings, folder, peer, seed, shard) -> Iterator[dict]:
    models = [folder / "base", *(folder / f"expert{i}" for i in range(settings.experts))]
    write_llamas(settings.llama, models, seed, shard)
    gigabytes = sum(file.stat().st_size for file in models[0].glob("*.safetensors")) / 1e9
    for method in TWINS:
        commands = {OURS: ours(models, "--method", method, "--scale", SCALE, "--shard-size", shard)}
        if method == "task_arithmetic":
            commands[FLOOR] = [*COPY, "--models", *models, "--shard-size", shard, "--out"]
        if peer:
            peers = {PEER: {}} | ({PEER_32: dict(dtype="float32", out_dtype="bfloat16")} if settings.float32 else {})
            for name, options in peers.items():
                commands[name] = mergekit(peer, folder / f"{method}, {name}.yaml", models, method, shard, options)
        for repeat in range(settings.repeats):
            for contender, command in commands.items():
                labels = dict(seed=seed, part="beside mergekit", method=method, contender=contender, repeat=repeat)
                labels |= dict(shard=shard, gigabytes=gigabytes)
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    yield from usage_rows(labels, [*command, Path(out) / "merged"])
                    if (
                        repeat == 0 and shard == settings.shards[0] and contender != FLOOR
                    ):  # how files are cut changes no value
                        yield from error_rows(labels, models, Path(out) / "merged", method)
        if method == "task_arithmetic":
            labels = dict(seed=seed, part="profile", method=method, contender=OURS, repeat=0, shard=shard)
            _, _, module, *arguments = commands[OURS]
            with tempfile.TemporaryDirectory(dir=folder) as out:
                seconds = benchmark.profile_module(module, [*arguments, Path(out) / "merged"], PROFILE, threads=1)
            for name, value in seconds.items():
                yield labels | dict(metric=name, value=value)


def write_llamas(llama, folders, seed, shard, dtype=torch.bfloat16):
    """Write a base with transformers' own random weights, and experts which differ from it by noise."""
    config = LlamaConfig(
        hidden_size=llama.hidden,
        intermediate_size=llama.intermediate,
        num_hidden_layers=llama.layers,
        num_attention_heads=llama.hidden // 32,
        num_key_value_heads=llama.hidden // 64,
        vocab_size=llama.vocabulary,
    )
    for index, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        generator = torch.Generator().manual_seed(1000 * seed + index)
        with torch.no_grad():
            for weight in model.parameters() if index else ():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=2e-3)
        model.save_pretrained(folder, max_shard_size=shard)


def ours(models, *options):
    base, *experts = models
    start = [sys.executable, "-m", "merging", "--base", base, "--experts", *experts]
    return [*start, *map(str, options), "--out"]


def mergekit(program, recipe, models, method, shard, options):
    """Write a recipe that means the same as ours, and return the command; only the folder of the result is missing."""
    base, *experts = map(str, models)
    parameters = {"weight": 1.0} | ({"density": 0.2} if method == "ties" else {})
    merge = dict(merge_method=method, base_model=base, parameters={"lambda": SCALE, "normalize": method == "ties"})
    merge |= dict(models=[dict(model=expert, parameters=parameters) for expert in experts])
    recipe.write_text(json.dumps(merge | options))  # JSON is YAML
    return [program, *MERGEKIT_FLAGS, "--out-shard-size", str(shard_bytes(shard)), recipe]


def usage_rows(labels, command) -> Iterator[dict]:
    os.sync()  # else the system writes one contender's output while the next one runs
    usage = benchmark.run_command(command, threads=1)
    for metric, value in zip(("seconds", "peak MiB", "anonymous MiB"), astuple(usage), strict=True):
        yield labels | dict(metric=metric, value=value)


def error_rows(labels, models, out, method) -> Iterator[dict]:
    """Distance to the float64 merge over the decided entries, as a share of the norm of the merged update."""
    readers, result = [stored(folder) for folder in models], stored(out)
    sums = dict.fromkeys(("update", labels["contender"], ROUNDED, "undecided", "entries"), 0.0)
    for name in [name for name in readers[0] if not LATER_LAYERS.search(name)]:
        base, *experts = (reader[name].get_tensor(name) for reader in readers)
        exact, decided = TWINS[method](base, experts, SCALE)
        found = {"update": base, labels["contender"]: result[name].get_tensor(name), ROUNDED: exact.to(base.dtype)}
        for key, value in found.items():
            sums[key] += ((value.double() - exact) * decided).square().sum().item()
        sums["undecided"] += (~decided).sum().item()
        sums["entries"] += decided.numel()
    for contender in (labels["contender"], ROUNDED) if labels["contender"] == OURS else (labels["contender"],):
        error = math.sqrt(sums[contender] / sums["update"])
        yield labels | dict(contender=contender, metric="relative error", value=error)
    if labels["contender"] == OURS:
        yield labels | dict(contender=ROUNDED, metric="undecided share", value=sums["undecided"] / sums["entries"])


def stored(folder):
    """Return {name of a tensor: the open safetensors file that holds it}."""
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def agreement(settings, folder, peer, seed) -> Iterator[dict]:
    """Carry out each recipe of mergekit by both programs, and compare what they add to the base."""
    base, *experts = models = [folder / "base", *(folder / f"expert{i}" for i in range(3))]
    write_llamas(settings.small, models, seed, "5GB", torch.float32)
    for method, text in AGREEMENT.items():
        recipe = folder / f"{method}.yaml"
        recipe.write_text(json.dumps(recipe_of(method, base, experts, **text)))
        outs = [folder / method / name for name in (OURS, PEER)]
        start = [sys.executable, "-m", "merging", "--mergekit", recipe, "--out"]
        for command, out in zip((start, [peer, *MERGEKIT_FLAGS, recipe]), outs, strict=True):
            out.parent.mkdir(exist_ok=True)
            benchmark.run_command([*command, out], threads=1)
        for metric, value in compared(*map(stored, (base, *outs)), method, len(experts)).items():
            yield dict(seed=seed, part="agreement", method=method, contender=OURS, repeat=0, metric=metric, value=value)


def recipe_of(method, base, experts, weights, densities, parameters):
    """Return the recipe as mergekit spells it; linear merges the base like the others, and trims nothing."""
    listed = []
    for expert, weight, density in zip(experts, weights, densities, strict=True):
        own = {"weight": weight} | ({} if method in ("linear", "task_arithmetic") else {"density": density})
        listed.append(dict(model=str(expert), parameters=own))
    if method == "linear":
        listed.append(dict(model=str(base), parameters={"weight": 0.5}))
    return dict(merge_method=method, base_model=str(base), models=listed, parameters=parameters, dtype="float32")


def compared(base, ours, theirs, method, experts):
    """Return how two merges differ in what they add to the base: entry by entry, or in distribution where random."""
    sums = torch.zeros(6, dtype=torch.float64)
    for name in theirs:
        start = base[name].get_tensor(name).double()
        own, other = (model[name].get_tensor(name).double() - start for model in (ours, theirs))
        changed = [(update.abs() > 1e-7).sum() for update in (own, other)]  # beyond the rounding of base + update
        square = (own - other).square().flatten().sort().values
        kept = square[: len(square) - experts] if method == "ties" else square
        sums += torch.stack([kept.sum(), other.square().sum(), *changed, own.abs().sum(), other.abs().sum()])
    away, norm, *rest = sums.tolist()
    if not method.startswith("dare"):
        return {"difference of updates": math.sqrt(away / norm)}
    return {"changed entries, ours / theirs": rest[0] / rest[1], "magnitude, ours / theirs": rest[2] / rest[3]}


# Model size and adapters ----------------------------------------------------------------------------------------------


def one_size(sized, folder, seed, gigabytes) -> Iterator[dict]:
    base, expert = folder / "base", folder / "expert"
    for model in (base, expert):
        write_sized(sized, model, seed, gigabytes, noise=1e-3 * (model is expert))
    limit = 1024 + (2 + 4) * 4 * math.prod(sized.largest) / MIB
    for method, flags in SIZED.items():
        labels = dict(seed=seed, part="model size", method=method, contender=OURS, repeat=0, gigabytes=gigabytes)
        with tempfile.TemporaryDirectory(dir=folder) as out:
            yield from usage_rows(labels, [*ours([base, expert, expert], *flags), Path(out) / "merged"])
        yield labels | dict(metric="limit MiB", value=limit)


def write_sized(sized, folder, seed, gigabytes, noise):
    """Write float32 shards of 32 tensors and their index: the largest tensor, and layers up to the size."""
    count = round((gigabytes * 1e9 / 4 - math.prod(sized.largest)) / math.prod(sized.layer))
    shapes = {"embed.weight": sized.largest} | {f"layers.{i}.weight": sized.layer for i in range(count)}
    draw, differ = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1))
    weight_map = {}
    folder.mkdir()
    for start in range(0, len(shapes), 32):
        names = list(shapes)[start : start + 32]
        shard = {name: torch.randn(shapes[name], generator=draw).mul_(0.02) for name in names}
        for tensor in shard.values() if noise else ():
            tensor.add_(torch.randn(tensor.shape, generator=differ), alpha=noise)
        file = f"model-{start}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def adapters(settings, seed) -> Iterator[dict]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(settings.adapters + 1, 2, settings.side, settings.rank, generator=generator)
    updates = [LowRank(b, a.T, scale=1e-3) for b, a in draw[:-1] + draw[-1]]  # they share a part
    dense = [{"weight": update.dense()} for update in updates]
    cpu = torch.device("cpu")
    for method, (merger, svc) in FACTORED.items():
        results = {}
        calls = {
            "factored": partial(keep, results, "factored", merge_low_rank, updates, merger, svc),
            "dense": partial(keep, results, "dense", merge_and_calibrate, dense, merger, svc),
        }
        calls["factored"]()  # warms up
        labels = dict(seed=seed, part="adapters", method=method, side=settings.side)
        for contender, repeats in {"factored": 5, "dense": 1}.items():
            for repeat, _, seconds in benchmark.interleaved_seconds({contender: calls[contender]}, repeats, cpu):
                yield labels | dict(contender=contender, repeat=repeat, metric="seconds", value=seconds)
        exact = results["dense"]["weight"]
        difference = torch.linalg.norm(results["factored"].dense() - exact) / torch.linalg.norm(exact)
        yield labels | dict(contender="factored", repeat=0, metric="relative difference", value=difference)


def keep(results, name, function, *arguments):
    results[name] = function(*arguments)


# From here on only the table is seen --------------------------------------------------------------------------------


def part(data, name, metric):
    return data[(data.part == name) & (data.metric == metric)]


def beside(data, metric):
    """Means over repeats: a row for each shard size and method, a column for each contender."""
    rows = part(data, "beside mergekit", metric)
    return rows.groupby(["shard", "method", "contender"], sort=False).value.mean().unstack(sort=False)


def agreed(data):
    """How the outputs of recipes of mergekit differ from its own: the worst seed of each method and metric."""
    rows = data[data.part == "agreement"].assign(
        distance=lambda rows: (rows.value - rows.metric.map(MEANT).astype(float)).abs()
    )
    return rows.loc[rows.groupby(["method", "metric"], sort=False).distance.idxmax()] if len(rows) else rows


def sizes(data):
    """Peak memory of each model size and method, beside its limit."""
    keys = ["gigabytes", "method"]
    columns = {"peak MiB": "peak", "limit MiB": "limit", "seconds": "seconds"}
    rows = data[(data.part == "model size") & data.metric.isin(columns)]
    return rows.groupby([*keys, "metric"], sort=False).value.max().unstack().rename(columns=columns).reset_index()


def factored(data):
    """Seconds of both ways, their ratio and the difference of their results, by method."""
    seconds = part(data, "adapters", "seconds").groupby(["side", "method", "contender"], sort=False).value.mean()
    table = seconds.unstack()
    difference = part(data, "adapters", "relative difference").groupby(["side", "method"], sort=False).value.max()
    return table.assign(ratio=table.dense / table.factored, difference=difference).reset_index()


def draw(data):
    items = part(data, "beside mergekit", "seconds"), part(data, "beside mergekit", "peak MiB")
    seconds, memory = (rows.assign(item=rows.method.map(figures.label) + ", shards of " + rows.shard) for rows in items)
    memory = memory[memory.contender != FLOOR]
    peaks, limits = part(data, "model size", "peak MiB"), part(data, "model size", "limit MiB")
    against_size = pd.concat([peaks, limits.drop_duplicates("gigabytes").assign(method="limit")])
    options = dict(item="item", condition="contender", log=True)
    return {
        "memory_against_model_size": figures.lines(
            against_size, x="gigabytes", xlabel="size of the model, GB", ylabel="peak resident memory, MiB", names=NAMES
        ),
        "seconds_beside_mergekit": figures.paired(seconds, start=FLOOR, xlabel="seconds", **options),
        "memory_beside_mergekit": figures.paired(memory, start=PEER, xlabel="peak resident memory, MiB", **options),
    }


def compare(data, published):
    quantities = {}
    for metric in ("seconds", "peak MiB", "anonymous MiB", "relative error"):
        for (shard, method), row in beside(data, metric).iterrows():
            for peer in row.dropna().index.intersection([PEER, PEER_32] + [FLOOR] * (metric == "seconds")):
                quantities[f"{metric}, ours / {peer}: {method}, shards of {shard}"] = row[OURS] / row[peer]
    for row in agreed(data).itertuples():
        quantities[f"{row.metric}: {row.method}, a recipe of mergekit"] = row.value
    for row in sizes(data).itertuples():
        quantities[f"peak MiB / limit: {row.method}, {row.gigabytes:g} GB"] = row.peak / row.limit
    for row in factored(data).itertuples():
        quantities[f"time dense / factored: {row.method}, {row.side:g} × {row.side:g}"] = row.ratio
    seeds = data.seed.nunique()
    lines = [dict(quantity=name, ours=value) for name, value in quantities.items()]
    return pd.DataFrame(lines).assign(paper=math.nan, sd=math.nan, n=seeds, same_setting="no: not in the paper")


def tables(data):
    shown = {}
    for metric, title in {"seconds": "Seconds of a merge", "peak MiB": "Peak resident memory, MiB"}.items():
        shown[f"{title}, beside mergekit"] = beside(data, metric).reset_index()
    shown["Of which not mapped from files (the system may drop mapped pages), MiB"] = beside(
        data, "anonymous MiB"
    ).reset_index()
    errors = beside(data, "relative error").map("{:.5g}".format)
    undecided = beside(data, "undecided share")[ROUNDED].map("{:.1%}".format)
    profile = data[data.part == "profile"].groupby(["shard", "metric"], sort=False).value.mean().unstack(sort=False)
    shown[
        "Where the seconds of Task Arithmetic go, under a profiler, which slows the rest: start, plan, Python itself"
    ] = profile.reset_index()
    shown["Distance to the float64 merge / norm of the update"] = errors.assign(undecided=undecided).reset_index()
    shown["Recipes of mergekit, beside its own output"] = agreed(data)[["method", "metric", "value"]].assign(
        value=lambda table: table.value.map("{:.3g}".format)
    )
    shown["Memory and time against model size"] = sizes(data)
    shown["Adapters: seconds and relative difference"] = factored(data).assign(
        difference=lambda table: table.difference.map("{:.1e}".format)
    )
    return shown


def verdict(data):
    found = {
        "memory": against_mergekit(data, "peak MiB"),
        "time": against_mergekit(data, "seconds"),
        "floor": floor_part(data),
        "agreement": agreement_part(data),
        "error": error_part(data),
        "size": size_part(data),
        "adapters": adapters_part(data),
    }
    judged = {text.split()[0] for text in found.values()} & {"yes", "no"}
    head = "holds in part" if len(judged) == 2 else "does not hold" if judged == {"no"} else "holds"
    return f"{head}. " + ". ".join(f"{name.capitalize()}: {text}" for name, text in found.items())


def answer(holds, text):
    return f"{'yes' if holds else 'no'} ({text})"


def against_mergekit(data, metric):
    table = beside(data, metric)
    if PEER not in table:
        return "not run, no mergekit"
    ratios = table[[name for name in (PEER, PEER_32) if name in table]].rdiv(table[OURS], axis=0)
    worst = ratios.max(axis=None)
    holds = worst < 1 if metric == "peak MiB" else worst <= 1
    model = data.gigabytes[data.part == "beside mergekit"].iloc[0]
    shards = " and ".join(table.index.unique("shard"))
    return answer(
        holds, f"{ratios.min(axis=None):.2f} to {worst:.2f} of mergekit's, {model:.2g} GB in shards of {shards}"
    )


def floor_part(data):
    table = beside(data, "seconds")
    if FLOOR not in table:
        return "not run"
    table = table.dropna(subset=[FLOOR])
    ratios = table[OURS] / table[FLOOR]
    return answer(ratios.max() <= 1.5, f"{ratios.min():.2f} to {ratios.max():.2f} times the time of copying")


def agreement_part(data):
    table = agreed(data)
    if table.empty:
        return "not run, no mergekit"
    exact = table[table.metric == "difference of updates"].value.max()
    random = table[table.metric != "difference of updates"].distance.max()
    methods = ", ".join(table.method.unique())
    return answer(
        exact <= 1e-5 and random <= 0.02,
        f"{methods}: difference at most {exact:.0e}, DARE in distribution {random:.2%}",
    )


def error_part(data):
    table = beside(data, "relative error")
    over = table.div(table[ROUNDED], axis=0)
    others = "".join(f"; {name} {over[name].max():.3f}" for name in (PEER, PEER_32) if name in over)
    return answer(over[OURS].max() <= 1.01, f"at most {over[OURS].max():.3f} of rounding{others}")


def size_part(data):
    table = sizes(data)
    share = (table.peak / table.limit).max()
    return answer(share <= 1, f"at most {share:.2f} of the limit, models up to {table.gigabytes.max():g} GB")


def adapters_part(data):
    table = factored(data)
    ratio, difference, side = table.ratio.min(), table.difference.max(), int(table.side.iloc[0])
    text = f"{ratio:.0f} times faster or more, difference at most {difference:.0e}, {side} × {side}"
    return answer(ratio >= 100 and difference <= 1e-5, text) if side >= 4096 else f"not run at full size ({text})"


def claims(data):
    """The parts of the rule that compare with mergekit, with the limit of memory and with dense matrices."""
    texts = {
        "Does merging take less memory than mergekit?": against_mergekit(data, "peak MiB"),
        "Does merging take less time than mergekit?": against_mergekit(data, "seconds"),
        "Is peak memory below 1 GiB + (K + 4) × the largest tensor?": size_part(data),
        "Are adapters merged 100 times faster without dense matrices (4096 × 4096)?": adapters_part(data),
    }
    return [question(text, brief(found), found) for text, found in texts.items()]


def brief(found):
    """A part of the verdict without what stands behind its first comma: "yes (0.06 to 0.25 of mergekit's)"."""
    head, comma, _ = found.partition(",")
    return f"{head})" if comma and "(" in head else found


CAPTIONS = {
    "memory_beside_mergekit": "Peak memory of merging beside mergekit.",
    "seconds_beside_mergekit": "Seconds of merging beside mergekit, and of copying the files without any arithmetic.",
    "memory_against_model_size": "Peak memory over the size of the model; dashed: the limit of the rule.",
}

DEVIATIONS = (
    "The paper has no such measurement: nothing here is compared with its numbers.",
    "Random weights; experts are the base with noise (0.002 beside weights of 0.02). Seconds are of the whole process, "
    "start included; files may come from the system's cache, for all contenders alike, which take turns.",
    "Peak memory counts pages mapped from files, which both programs use and which the system drops where memory is "
    "short; the table of memory without them has been sampled every 10 ms.",
    "mergekit 0.1.5, its flags: --quiet --no-copy-tokenizer --lazy-unpickle --num-threads 1 --out-shard-size as for "
    "the inputs. --low-cpu-memory concerns accelerators, --async-write needs more memory: neither is set.",
    "The same merge: weight 1, lambda 0.3, density 0.2 and, for TIES, normalize are our scale 0.3, keep 0.2, one "
    "threshold a tensor and the mean of the entries that agree. mergekit keeps exactly ⌊density · d⌋ entries whichever "
    "come first among equals, ours all that reach the threshold; an elected sum of zero is positive there, here it "
    "follows the majority. Such entries (column `undecided`) are left out of the error, which is "
    "that of embeddings, head and two layers.",
    "The floor reads and writes with the code of `python -m merging`, range by range and on to the disk, and starts "
    "PyTorch too; it copies the base.",
    "Agreement: three experts in float32, weights 0.8, a gradient 0.2 to 1 and filters (mlp 0.5, else 0.3), densities "
    "0.5, 0.4 and a gradient 0.3 to 0.6, lambda 0.7, mergekit's defaults for normalize and rescale.",
    "Models of growing size are float32, so that a tensor is as large in the file as in the arithmetic; both experts "
    "are the same folder, to save disk. Layers are flat (512 rows), where SVC is cheap. TIES is global, in passes.",
    "Adapters: time of the factored way is the mean of five calls, of the dense way one; making the dense updates from "
    "their factors is not counted.",
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
)

if __name__ == "__main__":
    run(EXPERIMENT)
