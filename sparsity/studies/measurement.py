"""Measuring trained networks: load a snapshot, run it under the probe on one split of its task; cached per snapshot."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from common.cache import Artefact, cached_rows
from common.lab.run import Context
from sparsity.blocks import without_mlps
from sparsity.probes import probe
from sparsity.studies.runs import Plan, Run
from sparsity.studies.training import Rows, build, make_task, train

Found = TypeVar("Found")
Measure = Callable[[Run, Artefact, torch.device], Found]


def measure_all(plan: Plan, context: Context, measure_one: Measure) -> Iterator[tuple[dict[str, Any], Found]]:
    """Train and measure every run of a plan, in parallel processes, and yield its labels and what was found, in order.

    Args:
        plan: labels and description of each run; see `sparsity.studies.runs`.
        context: of the experiment: device and processes.
        measure_one: maps (run, trained network, device) to what is wanted, such as `measure_snapshot`; a function that
            other processes can import, or a partial of one.
    """
    labels, runs = zip(*plan, strict=True)
    with context.stage("train and measure"):
        found = context.map(partial(_train_and_measure, measure_one, context.device), runs, "train and measure")
    yield from zip(labels, found, strict=True)


def _train_and_measure(measure_one: Measure, device: torch.device, run: Run) -> Any:
    return measure_one(run, train(run, device), device)


def curve(trained: Artefact) -> Rows:
    """Return the training curve of a run: see `sparsity.studies.training.Recorder`."""
    return json.loads((trained.path / "curve.json").read_text())


def curve_rows(logged: Rows, metrics: Sequence[str], split: str) -> Iterator[dict[str, Any]]:
    """Yield the table's rows of a training curve: means over layers of single logged batches.

    Args:
        logged: what `curve` returns, or the entries of some steps.
        metrics: of MLP blocks or of the whole network, in this order for each step.
        split: what the rows are to be called.
    """
    means = pd.DataFrame(logged).drop(columns="layer").groupby("step").mean()  # a metric is that of layers or of "all"
    for step, values in means.iterrows():
        for metric in metrics:
            yield {"split": split, "step": step, "layer": "all", "metric": metric, "value": values[metric]}


def load(run: Run, trained: Artefact, device: torch.device, step: int | None = None) -> nn.Module:
    """Return the network of a snapshot in evaluation mode, on `device`.

    Args:
        run, trained: the description of a run and what `train` returned for it.
        device: where the network runs.
        step: of the snapshot; None for the last.
    """
    step = run.recipe.steps if step is None else step
    model = build(make_task(run.task, device), run)
    model.load_state_dict(load_file(trained.path / f"step-{step}.safetensors"))
    return model.to(device).eval()


def measure_snapshot(
    run: Run, trained: Artefact, device: torch.device, split: str = "test", step: int | None = None
) -> Rows:
    """Return what a snapshot does on one split: rows (layer, metric, value), from the cache where they are known.

    Layer "all" has the loss, the task's metric ("score"), and both with the MLPs switched off. Each MLP block has the
    probe's statistics over the whole split; gradients are per sample, of the evaluation loss.

    Args:
        run, trained: the description of a run and what `train` returned for it.
        device: where the network runs.
        split: "train" (not augmented), "validation" or "test".
        step: of the snapshot; None for the last.
    """
    step = run.recipe.steps if step is None else step
    inputs = {"run": trained.key, "split": split, "step": step, "device": device.type}
    return cached_rows("sparsity_measured", inputs, partial(_measure, run, trained, device, split, step))


def _measure(run: Run, trained: Artefact, device: torch.device, split: str, step: int) -> Iterator[dict[str, Any]]:
    task, model = make_task(run.task, device), load(run, trained, device, step)
    whole = []
    with probe(model, reduction="sum") as seen:
        for batch in task.batches(split):
            seen.mask = task.masks(batch) if task.masks else None
            losses, scores = task.score(model, batch)
            losses.sum().backward()
            model.zero_grad()
            whole.append(torch.stack([losses.detach(), scores.detach()], -1).double())
    with without_mlps(model), torch.no_grad():
        alone = [torch.stack(task.score(model, batch), -1).double() for batch in task.batches(split)]
    for suffix, pairs in {"": whole, " without MLPs": alone}.items():
        loss, score = torch.cat(pairs).mean(0).tolist()
        yield {"layer": "all", "metric": f"loss{suffix}", "value": loss}
        yield {"layer": "all", "metric": f"score{suffix}", "value": score}
    for layer, statistics in seen.summary().iterrows():
        yield from ({"layer": layer, "metric": name, "value": value} for name, value in statistics.items())
