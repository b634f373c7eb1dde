"""The snapshots of a run, the weights saved along its training: measured on one split, and as tables by layer and step.

Rows of the experiment's table are (setting, variant, seed) × (split, step, layer) × metric; for those made here the
split is called SAVED. Layer "all" is the whole network, every other one an MLP block.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from common.cache import Artefact
from sparsity.flatness import ratio
from sparsity.studies.measurement import Rows, measure_snapshot
from sparsity.studies.runs import RUN, Run

SAVED = "saved weights"
ERRORS = ("key", "key, authors' C_0", "value", "value, authors' C_2")  # of which identity, with which coefficient


def measure_snapshots(split: str, run: Run, trained: Artefact, device: torch.device) -> dict[int, Rows]:
    """Return step → rows of `sparsity.studies.measurement.measure_snapshot`, of all snapshots of a run on a split."""
    return {step: measure_snapshot(run, trained, device, split, step) for step in run.snapshot_steps}


def identity_errors(values: Mapping[str, float]) -> dict[str, float]:
    """Return the relative errors of the identities of one MLP block, with exact coefficients and with the authors'.

    These are AF_K / (T d_ff C_0) / density − 1 and AF_V / C_2 / E ‖a‖² − 1 (arXiv 2605.25612, section III-B). The
    authors average ‖x‖² g² for C_0, without σ'², and ‖∂L/∂z‖² for C_2, without the weights ‖a‖².

    Args:
        values: the probe's statistics of the block.

    Returns:
        "error: NAME" → error, for each name in ERRORS; NaN where there is nothing to divide by.
    """
    density, norm = values["density"], values["activation_norm"]
    entries = values["tokens"] * values["units"]
    pairs = (
        (values["density_from_flatness"], density),  # AF_K less what active entries that count as zero add to it
        (ratio(values["augmented_flatness_key"], values["coefficient_key_authors"] * entries), density),
        (values["activation_norm_from_flatness"], norm),
        (ratio(values["augmented_flatness_value"], values["coefficient_value_authors"]), norm),
    )
    return {f"error: {name}": ratio(*pair) - 1 for name, pair in zip(ERRORS, pairs, strict=True)}


def snapshot_rows(
    labels: Mapping[str, Any], step: int, layers: Mapping[str, Mapping[str, float]], metrics: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the table's rows of one snapshot: all that is known of the whole network, and `metrics` of each MLP block.

    Args:
        labels: setting, variant, seed.
        step: after which the weights were saved.
        layers: layer → metric → value: see `by_layer`.
        metrics: the wanted ones of MLP blocks, in this order.

    Raises:
        KeyError: an MLP block lacks one of the metrics.
    """
    labels = {**labels, "split": SAVED, "step": step}
    for layer, values in layers.items():
        for metric in values if layer == "all" else metrics:
            yield {**labels, "layer": layer, "metric": metric, "value": values[metric]}


def by_layer(measured: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return layer → metric → value from the rows (layer, metric, value) of a measurement, layers in their order."""
    layers: dict[str, dict[str, float]] = {}
    for row in measured:
        layers.setdefault(row["layer"], {})[row["metric"]] = row["value"]
    return layers


def layer_table(data: pd.DataFrame, needed: str) -> pd.DataFrame:
    """Return a row for each run, saved step and MLP block, with a column for each metric.

    Args:
        data: the experiment's table.
        needed: rows in which this metric is not above 0 are left out. With a metric of gradients these are the rows of
            the untrained network, whose output layer is zero, so that no gradient reaches the MLPs.
    """
    rows = data[(data.split == SAVED) & (data.layer != "all")]
    order = list(dict.fromkeys(rows.layer))
    table = rows.pivot(index=[*RUN, "step", "layer"], columns="metric", values="value").reset_index()
    table = table[table[needed] > 0]
    return in_order(table, data).sort_values("layer", key=lambda names: names.map(order.index), kind="stable")


def layer_means(data: pd.DataFrame, needed: str) -> pd.DataFrame:
    """Return the means of `layer_table` over MLP blocks: a row for each run and saved step."""
    table = layer_table(data, needed).drop(columns="layer")
    return table.groupby([*RUN, "step"], sort=False).mean().reset_index()


def in_order(table: pd.DataFrame, data: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table with settings and variants in the order of `data`, which a pivot does not keep."""
    names = list(dict.fromkeys(zip(data.setting, data.variant, strict=True)))
    places = [names.index(pair) for pair in zip(table.setting, table.variant, strict=True)]
    columns = ["place", "seed"] + ["step"] * ("step" in table)
    return table.assign(place=places).sort_values(columns, kind="stable").drop(columns="place")


def relative(table: pd.DataFrame, metrics: Sequence[str], by: Sequence[str] = ()) -> pd.DataFrame:
    """Return metrics as multiples of what they are at the run's first step: a row for each run, step and metric.

    Args:
        table: a row for each run and step (and each value of `by`), a column for each metric.
        metrics: the columns that are wanted; rows without a value are left out.
        by: further columns that tell the rows of one step apart, such as "layer".

    Returns:
        columns setting, variant, seed, those of `by`, step, quantity (the metric's name) and value.
    """
    keys = [*RUN, *by]
    table = table.reset_index(drop=True)
    first = table.sort_values("step").groupby(keys, sort=False)[list(metrics)].transform("first")
    scaled = table[[*keys, "step"]].join(table[list(metrics)] / first)
    return scaled.melt([*keys, "step"], var_name="quantity").dropna()


def last_step(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each run's last step."""
    return table[table.step == table.groupby(RUN).step.transform("max")]


def log_changes(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return by how much ln of each metric changes from a run's first to its last snapshot, as a mean over MLP blocks.

    The changes of factors add up to that of their product. A block whose metric is 0 at either end (a dead one) has no
    logarithm and is left out.

    Args:
        table: what `layer_table` returns; rows in any order.
        metrics: columns of it.

    Returns:
        one row per run: setting, variant, seed, the metrics, and `layers`, how many blocks the means are over.
    """
    steps = table.groupby(RUN).step
    ends = [table[table.step == steps.transform(end)].set_index([*RUN, "layer"])[[*metrics]] for end in ("min", "max")]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(ends[1] / ends[0])
    logs = logs[np.isfinite(logs).all(axis=1)]
    means = logs.groupby(RUN, sort=False).mean().assign(layers=logs.groupby(RUN).size())
    return in_order(means.reset_index(), table)
