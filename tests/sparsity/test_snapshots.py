"""Snapshots: a tiny run measured at each saved step, and the tables made of a known table."""

import json
import math

import pandas as pd
import pytest
import torch

from common import cache
from common.training import TrainingRecipe
from sparsity.studies import snapshots
from sparsity.studies.images import ImageTask
from sparsity.studies.runs import Run
from sparsity.studies.training import train

CPU = torch.device("cpu")
NAMES = ("mlp.10", "mlp.2")  # module order is not the alphabet's


def known_table():
    """Two runs of a variant each, three steps, two layers: x = step · place of the layer; no gradients at step 0."""
    rows = []
    for variant in ("vanilla", "modified"):
        for step in (0, 4, 8):
            layers = {"all": {"loss": 1.0}}
            layers |= {name: {"x": step * place, "y": 5.0} for place, name in enumerate(NAMES, 1)}
            rows += snapshots.snapshot_rows({"setting": "s", "variant": variant, "seed": 0}, step, layers, ("x", "y"))
    return pd.DataFrame(rows)


def test_rows_hold_all_of_the_network_and_the_wanted_metrics_of_layers():
    layers = {"all": {"loss": 1.0, "score": 2.0}, "mlp": {"density": 0.5, "other": 3.0}}
    rows = list(snapshots.snapshot_rows({"seed": 1}, 7, layers, ("density",)))
    assert [(row["layer"], row["metric"], row["value"]) for row in rows] == [
        ("all", "loss", 1.0),
        ("all", "score", 2.0),
        ("mlp", "density", 0.5),
    ]
    assert all(row["step"] == 7 and row["seed"] == 1 for row in rows)


def test_a_metric_that_a_layer_lacks_is_an_error():
    with pytest.raises(KeyError, match="density"):
        list(snapshots.snapshot_rows({}, 0, {"mlp": {"other": 1.0}}, ("density",)))


def test_tables_keep_the_order_and_leave_out_steps_without_gradients():
    table = snapshots.layer_table(known_table(), needed="x")
    assert list(table.layer.unique()) == list(NAMES)
    assert list(table.variant.unique()) == ["vanilla", "modified"]
    assert sorted(table.step.unique()) == [4, 8]
    means = snapshots.layer_means(known_table(), needed="x")
    assert means[["variant", "step", "x", "y"]].to_numpy().tolist() == [
        ["vanilla", 4, 6.0, 5.0],
        ["vanilla", 8, 12.0, 5.0],
        ["modified", 4, 6.0, 5.0],
        ["modified", 8, 12.0, 5.0],
    ]


def test_relative_divides_each_run_by_its_own_first_step():
    means = snapshots.layer_means(known_table(), needed="x").sample(frac=1, random_state=0)  # in any order of rows
    means.loc[means.variant == "modified", "x"] *= 100
    found = snapshots.relative(means, ("x", "y")).set_index(["variant", "quantity", "step"]).value.sort_index()
    for variant in ("vanilla", "modified"):
        assert found[variant, "x"].to_dict() == {4: 1.0, 8: 2.0}
        assert found[variant, "y"].to_dict() == {4: 1.0, 8: 1.0}
    layers = snapshots.relative(snapshots.layer_table(known_table(), needed="x"), ("x",), ["layer"])
    assert len(layers) == 8 and set(layers.value) == {1.0, 2.0}


def test_every_saved_step_is_measured_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path)
    run = Run(ImageTask("digits", width=16, depth=1), TrainingRecipe(2, 16, 1e-3, warmup=0), snapshots=3)
    trained = train(run, CPU)
    found = snapshots.measure_snapshots("validation", run, trained, CPU)
    assert tuple(found) == run.snapshot_steps
    untrained = snapshots.by_layer(found[0])
    assert untrained["all"]["loss"] == pytest.approx(math.log(10), rel=1e-3)  # the output layer is zero
    assert [name for name in untrained if name != "all"] == ["blocks.0.mlp"]
    built = len(cache.RECORDS)
    assert json.dumps(snapshots.measure_snapshots("validation", run, trained, CPU)) == json.dumps(found)
    assert all(record["hit"] for record in cache.RECORDS[built:])


def test_log_changes_of_factors_add_up_and_dead_blocks_are_left_out():
    table = snapshots.layer_table(known_table(), needed="x").assign(y=lambda rows: rows.step**3.0)
    table = table.assign(product=table.x * table.y)
    table.loc[(table.variant == "modified") & (table.layer == "mlp.2") & (table.step == 8), "product"] = 0.0  # dead
    found = snapshots.log_changes(table.sample(frac=1, random_state=0), ("product", "x", "y")).set_index("variant")
    assert found.x.to_list() == pytest.approx([math.log(2)] * 2) and found.y.to_list() == pytest.approx(
        [math.log(8)] * 2
    )
    assert found["product"].to_list() == pytest.approx((found.x + found.y).to_list())
    assert found.layers.to_dict() == {"vanilla": 2, "modified": 1}


def test_identity_errors_are_those_of_the_quotients():
    values = dict(density=0.2, activation_norm=6.0, tokens=5, units=10, density_from_flatness=0.22)
    values |= dict(augmented_flatness_key=8.0, coefficient_key_authors=0.5, activation_norm_from_flatness=6.0)
    values |= dict(augmented_flatness_value=9.0, coefficient_value_authors=3.0)
    found = [snapshots.identity_errors(values)[f"error: {name}"] for name in snapshots.ERRORS]
    assert found == pytest.approx([0.1, 8 / 0.5 / 50 / 0.2 - 1, 0.0, 9 / 3 / 6 - 1])
