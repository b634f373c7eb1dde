"""The table that a reader takes home: from made-up committed rows whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from sparsity.studies import density_tables, take_home
from sparsity.studies.speed import SCREENED


def one_run(variant, seed, density, score, pruned, setting="s"):
    """Rows of one run: test numbers, a curve, and {share kept: (density, score)} with thresholds."""
    labels = dict(setting=setting, variant=variant, seed=seed)
    metrics = {name: density for name in density_tables.TEST_METRICS} | {"score": score, "loss": 1.0}
    rows = [{**labels, "split": "test", "layer": "all", "metric": name, "value": metrics[name]} for name in metrics]
    for step in (1, 100):
        for name in density_tables.CURVE_METRICS:
            row = {"split": "train", "step": step, "layer": "all", "metric": name}
            rows.append(labels | row | {"value": 0.5 if name == "decay" else density})
    for kept, (sparse, right) in pruned.items():
        for split in ("pruned, validation", "pruned, test"):
            for name, value in {"density": sparse, "score": right, "loss": 1.0}.items():
                row = {"split": split, "kept": kept, "layer": "all", "metric": name, "value": value}
                rows.append(labels | row)
    return rows


def write(results_dir, folder, runs):
    (results_dir / folder).mkdir(parents=True)
    pd.DataFrame([row for run in runs for row in run]).to_csv(results_dir / folder / "data.csv", index=False)


def finetuned(factor):
    """Runs in three seeds: vanilla falls from 40 % to 20 with thresholds, modified from 20 × factor to 18 × factor."""
    runs = []
    for seed in range(3):
        wobble = 1 + 0.01 * seed
        dense, sparse = 0.4 * wobble, 0.2 * factor * wobble
        runs.append(
            one_run("vanilla", seed, dense, 90.0, {1.0: (dense, 90.0), 0.5: (dense / 2, 89.5), 0.2: (0.08, 80.0)})
        )
        runs.append(one_run("modified", seed, sparse, 89.9, {1.0: (sparse, 89.9), 0.9: (0.9 * sparse, 89.2)}))
        runs.append(one_run("ReLU + L1, 0.1", seed, 0.1 * wobble, 90.0, {1.0: (0.1 * wobble, 90.0)}))
        runs.append(one_run("ReLU + L1, 0.02", seed, 0.3 * wobble, 90.0, {1.0: (0.3 * wobble, 90.0)}))
    return runs


def test_every_cell_is_its_own_comparison(tmp_path):
    write(tmp_path, "04_vit_finetuning/laptop", finetuned(1.0))
    seen = take_home.comparisons(tmp_path).set_index(["rival", "way"])
    means = {key: found.mean for key, found in seen.found.items() if found}
    assert means["vanilla", take_home.AS_TRAINED] == pytest.approx(-50)
    assert means["vanilla", take_home.EQUAL] == pytest.approx(-10)  # 18 % against 20 %
    assert means["pruned", take_home.EQUAL] == pytest.approx(0, abs=1e-9)  # modified as trained: 20 % against 20 %
    assert means["penalised", take_home.EQUAL] == pytest.approx(80)  # the strongest penalty, not the last in the file
    assert seen.loc[(density_tables.CONTROL, take_home.AS_TRAINED), "text"] == take_home.MISSING
    [row] = take_home.table(tmp_path).to_dict("records")
    assert row["(a) vanilla"].startswith("as trained -50.0 [-50.0, -50.0]: sparser; at equal accuracy -10.0 [")
    assert row["(b) vanilla, MLP norms undecayed"] == "not measured"
    assert row["modified − vanilla"] == "accuracy, points: -0.1 [-0.1, -0.1]"
    assert (row["network"], row["seeds"], row["E"]) == ("ViT, fine-tuned", "3", "0.5")
    assert "| ViT, fine-tuned | s " in take_home.page(tmp_path)


def test_what_does_not_reach_the_accuracy_is_said(tmp_path):
    runs = finetuned(1.0)
    runs[5] = one_run("modified", 1, 0.2, 80.0, {1.0: (0.2, 80.0)})
    write(tmp_path, "04_vit_finetuning/laptop", runs)
    seen = take_home.comparisons(tmp_path).set_index(["rival", "way"])
    assert seen.loc[("vanilla", take_home.EQUAL), "text"] == "not reached by modified in 1 of 3 runs"
    assert seen.loc[("vanilla", take_home.EQUAL), "found"] is None


@pytest.mark.parametrize("factor, answers", [(1.0, (0, 1, 0)), (0.3, (1, 0, 0)), (0.5556, (0, 0, 1))])
def test_worth_having_means_sparser_than_everything_that_was_measured(tmp_path, factor, answers):
    runs = finetuned(factor)
    if answers[2]:  # one seed of the rival is as sparse as modified, the others are not
        runs[2] = one_run("ReLU + L1, 0.1", 0, 0.2 * factor, 90.0, {1.0: (0.1 * factor, 90.0)})
    write(tmp_path, "04_vit_finetuning/laptop", runs)
    said = take_home.sentences(tmp_path)
    assert f"measured: in {answers[0]} of 1 settings" in said and f"one of them: in {answers[1]}" in said
    assert f"Undecided: in {answers[2]}." in said
    assert "**ViT, fine-tuned.** (a) vanilla as trained: sparser in 1 of 1; (a) vanilla at equal accuracy: " in said


def test_milliseconds_lie_between_those_that_were_measured(tmp_path):
    write(tmp_path, "04_vit_finetuning/laptop", finetuned(1.0))
    turns = [
        dict(part="MLP, one token", shape=take_home.SHAPE, threads=1, contender=SCREENED, metric="seconds", zeros=zeros)
        | dict(turn=turn, value=0.01 * (1 - zeros) * (1 + turn))
        for zeros in (0.5, 0.9)
        for turn in range(5)
    ]
    write(tmp_path, take_home.SPEED, [turns])
    [row] = take_home.table(tmp_path).to_dict("records")
    quartile = 10 * 2  # ms per unit of density at the second of five turns
    vanilla = np.mean([0.4 * (1 + 0.01 * seed) for seed in range(3)])
    assert (
        f"vanilla {quartile * vanilla:.1f} ± 0.1; modified {quartile * vanilla / 2:.1f} ± 0.0" in list(row.values())[-1]
    )


def test_of_the_ablations_the_t5_alone_counts(tmp_path):
    parts = [
        [row | {"part": part} for run in finetuned(factor) for row in run if row["split"] in ("test", "train")]
        for part, factor in {"plug-ins": 0.3, "T5": 1.0}.items()
    ]
    write(tmp_path, "07_ablations/laptop", parts)
    seen = take_home.comparisons(tmp_path).set_index(["rival", "way"])
    assert seen.loc[("vanilla", take_home.AS_TRAINED), "found"].mean == pytest.approx(-50)
    assert seen.loc[("vanilla", take_home.EQUAL), "text"] == take_home.MISSING


def test_no_table_without_committed_rows(tmp_path):
    assert take_home.table(tmp_path).empty and "in 0 of 0 settings" in take_home.page(tmp_path)
