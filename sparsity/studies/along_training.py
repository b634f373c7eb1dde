"""What the saved weights of a run do along its training: measured on one split, and as tables by layer and step.

Rows of the table are (setting, variant, seed) × (split, step, layer) × metric; those made here have the split SAVED.
Layer "all" is the whole network, every other one an MLP block.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from common.cache import Artefact
from sparsity.studies import study
from sparsity.studies.study import Run

RUN = ["setting", "variant", "seed"]
SAVED = "saved weights"


def measure_saved(split: str, run: Run, trained: Artefact, device: torch.device) -> dict[int, list[dict[str, Any]]]:
    """Return step → rows of `sparsity.studies.study.measure`, of all saved weights of a run on a split."""
    return {step: study.measure(run, trained, device, split, step) for step in run.snapshot_steps}


def saved_rows(
    labels: Mapping[str, Any], step: int, layers: Mapping[str, Mapping[str, float]], metrics: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the table's rows of one step: all that is known of the whole network, `metrics` of each MLP block.

    Args:
        labels: setting, variant, seed.
        step: after which the weights were saved.
        layers: layer → metric → value: see `by_layer`.
        metrics: those of MLP blocks, in order; one that a block lacks is an error.
    """
    labels = {**labels, "split": SAVED, "step": step}
    for layer, values in layers.items():
        for metric in values if layer == "all" else metrics:
            yield {**labels, "layer": layer, "metric": metric, "value": values[metric]}


def by_layer(measured: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return layer → metric → value from the rows (layer, metric, value) of a measurement, layers in order."""
    layers: dict[str, dict[str, float]] = {}
    for row in measured:
        layers.setdefault(row["layer"], {})[row["metric"]] = row["value"]
    return layers


def layer_table(data: pd.DataFrame, needed: str) -> pd.DataFrame:
    """Return a row for each run, saved step and MLP block, with a column for each metric.

    Args:
        data: the experiment's table.
        needed: rows in which this metric is not above 0 are left out: those of weights without gradients (the untrained
            network's output layer is zero).
    """
    rows = data[(data.split == SAVED) & (data.layer != "all")]
    order = list(dict.fromkeys(rows.layer))
    table = rows.pivot(index=[*RUN, "step", "layer"], columns="metric", values="value").reset_index()
    table = table[table[needed] > 0]
    return in_order(table, data).sort_values("layer", key=lambda names: names.map(order.index), kind="stable")


def layer_means(data: pd.DataFrame, needed: str) -> pd.DataFrame:
    """Return the means over MLP blocks of `layer_table`: a row for each run and saved step."""
    table = layer_table(data, needed).drop(columns="layer")
    return table.groupby([*RUN, "step"], sort=False).mean().reset_index()


def in_order(table: pd.DataFrame, data: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table with settings and variants in the order of `data`, which pivots have lost."""
    names = list(dict.fromkeys(zip(data.setting, data.variant, strict=True)))
    places = [names.index(pair) for pair in zip(table.setting, table.variant, strict=True)]
    columns = ["place", "seed"] + ["step"] * ("step" in table)
    return table.assign(place=places).sort_values(columns, kind="stable").drop(columns="place")


def relative(table: pd.DataFrame, metrics: Sequence[str], by: Sequence[str] = ()) -> pd.DataFrame:
    """Return a row (step, quantity, value) for each run, step and metric, relative to the run's first step.

    Args:
        table: a row for each run and step (and each value of `by`), a column for each metric.
        metrics: the columns that are wanted; rows without a value are left out.
        by: further columns that tell rows of a step apart.
    """
    keys = [*RUN, *by]
    table = table.reset_index(drop=True)
    first = table.sort_values("step").groupby(keys, sort=False)[list(metrics)].transform("first")
    scaled = table[[*keys, "step"]].join(table[list(metrics)] / first)
    return scaled.melt([*keys, "step"], var_name="quantity").dropna()
