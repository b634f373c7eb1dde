"""The density tables: means, relative changes, the verdict and the remarks, of a table with known numbers."""

import math

import pandas as pd
import pytest

from common.lab.statistics import Interval
from sparsity.studies import density_tables


def table(inference, training=None, seeds=3):
    """Rows of made-up runs in one setting: {variant: density}, a little different from seed to seed."""
    rows = []
    for variant, density in inference.items():
        for seed in range(seeds):
            labels = dict(setting="s", variant=variant, seed=seed)
            for layer in ("a", "b"):
                for metric in (
                    *density_tables.TEST_METRICS,
                    "score",
                    "loss",
                    "score without MLPs",
                    "loss without MLPs",
                ):
                    value = density * (1 + 0.01 * seed) * (0.5 if layer == "a" else 1.5)
                    rows.append({**labels, "split": "test", "layer": layer, "metric": metric, "value": value})
            for step in (1, 100, 200):
                for metric in density_tables.CURVE_METRICS:
                    value = 9.0 if step == 1 else (training or inference)[variant] * (1 + 0.01 * seed)
                    rows.append(
                        {**labels, "split": "train", "step": step, "layer": "all", "metric": metric, "value": value}
                    )
    return pd.DataFrame(rows)


CONTROL = density_tables.CONTROL


def test_finals_are_means_over_layers_and_logged_steps():
    final = density_tables.finals(table({"vanilla": 0.2})).set_index("seed")
    assert final.density[0] == pytest.approx(0.2) and final.training_density[0] == pytest.approx(0.2)
    assert final.forward_left[0] == pytest.approx(0.6) and final.backward_left[0] == pytest.approx(0.2)


def densities(modified, control):
    return {"vanilla": 0.2, "modified": modified, CONTROL: control}


@pytest.mark.parametrize(
    "inference, training, head, tail",
    [
        (densities(0.05, 0.1), None, "reproduced", "beyond the control"),
        (densities(0.15, 0.1), None, "direction reproduced", "denser than the control"),
        (densities(0.05, 0.04), densities(0.15, 0.1), "direction reproduced", "denser than the control"),
        (densities(0.25, 0.1), None, "not reproduced", "denser than the control"),
    ],
)
def test_the_verdict_follows_the_rule(inference, training, head, tail):
    text = density_tables.verdict(table(inference, training))
    assert text.startswith(f"{head}.") and text.endswith(f": {tail}")
    assert density_tables.verdict(table(inference, training, seeds=2)) == "not run at this scale"


def test_comparison_and_remarks_state_the_change():
    data = table({"vanilla": 0.2, "modified": 0.1, CONTROL: 0.125})
    lines = density_tables.compare(data, None, "no").set_index("quantity")
    line = lines.loc["change of inference density, %: modified against vanilla; s"]
    assert line.paper == -36 and line.ours == pytest.approx(-50) and line.n == 3
    against = lines.loc["change of inference density, %: modified against vanilla, MLP norms undecayed; s"]
    assert math.isnan(against.paper) and against.ours == pytest.approx(-20)
    share = 100 * math.log(0.625) / math.log(0.5)
    assert f"that is {share:.0f} % of the effect" in density_tables.remarks(data)


@pytest.mark.parametrize(
    "low, high, answer",
    [
        (-30, -11, "beyond the control"),
        (-9, -1, "beyond the control, by less than 10 %"),
        (-9, 9, "equal to the control within 10 %"),
        (-11, 3, "undecided against the control"),
        (-3, 11, "undecided against the control"),
        (1, 4, "equal to the control within 10 %"),
        (1, 14, "denser than the control"),
    ],
)
def test_no_difference_that_is_seen_is_not_called_equality(low, high, answer):
    assert density_tables.beside_control(Interval((low + high) / 2, low, high)) == answer


def test_training_density_stands_beside_that_of_the_last_tenth():
    data = table({"vanilla": 0.2})
    data.loc[(data.split == "train") & (data.step == 200), "value"] *= 0.5
    final = density_tables.finals(data).set_index("seed")
    assert final.late_training_density[0] == pytest.approx(0.1) and final.training_density[0] == pytest.approx(0.15)


def test_the_controls_share_is_told_seed_by_seed_and_the_change_pooled_over_settings():
    data = table({"vanilla": 0.2, "modified": 0.1, CONTROL: 0.1})
    both = density_tables.remarks(pd.concat([data, data.assign(setting="t")]))
    assert "seed by seed: 100 to 100 % (n = 3)" in both and "(n = 6 pairs, 2 settings): equal" in both
    nothing = table({"vanilla": 0.2, "modified": 0.2, CONTROL: 0.1})
    nothing.loc[(nothing.variant == "modified") & (nothing.seed == 0), "value"] *= 1.1
    assert "the control's share of it means nothing" in density_tables.remarks(nothing)


def test_at_equal_accuracy_each_network_is_pruned_as_far_as_validation_data_allow():
    data = table({"vanilla": 0.2, "modified": 0.1, CONTROL: 0.1})
    assert len(density_tables.tables(data, "accuracy, %")) == 3  # nothing was pruned
    rows = []
    for labels in data[density_tables.RUN].drop_duplicates().itertuples(index=False, name=None):
        for kept, loss in ((1.0, 2.0), (0.5, 2.0), (0.2, 2.01), (0.1, 2.5)):
            density = kept * (0.2 if labels[1] == "vanilla" else 0.1)
            loss += 1.0 if labels[1:] == ("modified", 0) else 0.0  # one network is worse from the start
            for split in ("pruned, validation", "pruned, test"):
                for metric, value in {"density": density, "loss": loss, "score": 90.0}.items():
                    row = {"split": split, "kept": kept, "layer": "all", "metric": metric, "value": value}
                    rows.append(dict(zip(density_tables.RUN, labels, strict=True)) | row)
    both = pd.concat([data, pd.DataFrame(rows)])
    found = list(density_tables.tables(both, "accuracy, %", "loss", 0.02).values())[-1].set_index("variant")
    assert list(found.index) == ["vanilla", "modified", CONTROL]  # as the table has them
    assert found["density, test, %"].to_dict() == {
        "vanilla": "4.0 ± 0.0",
        "modified": "2.0 ± 0.0",
        CONTROL: "2.0 ± 0.0",
    }
    assert found["runs that reach it"].to_dict() == {"vanilla": 3, "modified": 2, CONTROL: 3}
    assert found.loc["modified", "against vanilla, % [95 %]"].startswith("-50.0 [")
    assert density_tables.verdict(both) == density_tables.verdict(data)
