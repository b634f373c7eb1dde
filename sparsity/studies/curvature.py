"""Curvature, augmented flatness and density of a run's snapshots, all on the same few test images."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from common import hessian
from common.cache import Artefact, cached_rows
from common.lab.curvature import curvature_rows, evenly_spaced
from sparsity.blocks import find_blocks
from sparsity.probes import probe
from sparsity.studies.measurement import Rows, load
from sparsity.studies.runs import Run
from sparsity.studies.training import make_task


def measure_curvature(images: int, draws: int, ggn: str, run: Run, trained: Artefact, device: torch.device) -> Rows:
    """Return the rows of all snapshots of a run, cached one by one.

    Args:
        images: test images per snapshot.
        draws: random vectors per Hessian trace, draws of labels for a sampled Fisher.
        ggn: how the GGN trace is taken, a kind of `common.hessian.per_block`.
        run, trained: the description of an image task's run and what `train` returned for it.
        device: where the network runs.

    Returns:
        rows (step, layer, matrix, metric, value): traces and augmented flatness of the "key" and "value" matrix of each
        MLP block (layer 0, 1, …), densities of each block, and loss and largest eigenvalue of the whole (layer "all").
    """
    found = []
    for step in run.snapshot_steps:
        inputs = dict(run=trained.key, step=step, images=images, probes=draws, ggn=ggn)
        build = partial(_measure, images, draws, ggn, run, trained, device, step)
        found += cached_rows("curvature_training", inputs, build)
    return found


def _measure(
    images: int, draws: int, ggn: str, run: Run, trained: Artefact, device: torch.device, step: int
) -> Iterator[dict[str, Any]]:
    task, model = make_task(run.task, device), load(run, trained, device, step)
    batches = evenly_spaced(((batch["images"], batch["labels"]) for batch in task.batches("test")), images)
    paths = {id(module): path for path, module in model.named_modules()}
    matrices = {}
    for layer, block in enumerate(find_blocks(model)):
        matrices |= {f"{paths[id(block.key)]}.weight": (layer, "key")}
        matrices |= {f"{paths[id(block.value)]}.weight": (layer, "value")}
    kinds = {"hessian": "hessian", "ggn": ggn, "empirical_fisher": "empirical_fisher"}
    risk = hessian.empirical_risk(model, batches, list(matrices))
    for row in curvature_rows(risk, kinds, draws):
        layer, matrix = matrices.get(row["matrix"], ("all", "all"))
        yield row | dict(step=step, layer=layer, matrix=matrix)

    with probe(model, reduction="sum") as seen:
        for inputs, labels in batches:
            F.cross_entropy(model(inputs), labels, reduction="sum").backward()
    for layer, (_, found) in enumerate(seen.summary(gradients=True).iterrows()):
        for matrix in ("key", "value"):
            value = found[f"augmented_flatness_{matrix}"]
            yield dict(step=step, layer=layer, matrix=matrix, metric="augmented_flatness", value=value)
        for metric in ("density", "derivative_density", "input_norm"):
            yield dict(step=step, layer=layer, matrix="all", metric=metric, value=found[metric])
