"""experiments/22 and 32 at `--scale paper`, offline, on repositories of the true format: from download to table."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_hub import BASE, TEST_ROWS, environment, repository, write_data
from pandas.testing import assert_frame_equal

from common.lab.results import load, load_experiment
from merging import MERGERS
from merging.suites.data.vision_tasks import VISION_TASKS

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "22_vision_merging.py"
PREDICTION = SCRIPT.with_name("32_predicting_interference.py")


# what `accelerate launch --multi_gpu` does, on CPUs; `accelerate launch --cpu` starts one process
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(
    hub: Path, scratch: Path, *more: str, launcher: Sequence[str] = (), script: Path = SCRIPT
) -> subprocess.CompletedProcess:
    flags = ["--scale", "paper", "--device", "cpu", "--jobs", "1", "--results-dir", str(scratch / "results"), *more]
    variables = environment(hub) | {"EXPERIMENTS_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}
    variables["HF_DATASETS_CACHE"] = str(scratch / "datasets")
    command = [sys.executable, *launcher, str(script), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=900)


def test_the_eight_task_table(true_hub, tmp_path):
    methods = ("task_arithmetic", "tsv_m", "wudi")  # published, by decomposition, trained; the settings have them all
    done = run(true_hub, tmp_path, "--suites", "8", "--backbones", "ViT-B/32", "--methods", *methods)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "results" / "22_vision_merging").iterdir()
    data = load(folder)
    assert set(data.backbone) == {"ViT-B/32"} and set(data.suite) == {8} and set(data.method) >= set(methods)
    scored = data[data.images.notna()]  # the others are norms of updates and what tells a testbed
    assert list(dict.fromkeys(scored.task)) == list(VISION_TASKS)[:8] and set(scored.images) == {TEST_ROWS}
    text = (folder / "README.md").read_text()
    assert "| 8 tasks, ViT-B/32: task_arithmetic + SVC | 81.9" in " ".join(text.split())
    # the experts of the fake hub share a direction, so they move the predictions of the base
    own = scored[scored.method.isin(["pretrained", "expert"])].pivot(index="task", columns="method", values="value")
    assert (own.expert != own.pretrained).any()


def test_twenty_tasks_of_the_other_backbones(true_hub, tmp_path):
    """Every data set and every expert is read; merged accuracies of all tasks are in the table."""
    flags = ["--suites", "20", "--backbones", "ViT-B/16", "ViT-L/14", "--methods", "task_arithmetic"]
    done = run(true_hub, tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "results" / "22_vision_merging").iterdir()
    data = load(folder)
    scored = data[data.images.notna() & data.method.eq("task_arithmetic")]
    assert set(scored.backbone) == {"ViT-B/16", "ViT-L/14"} and set(scored.suite) == {20}
    for _, rows in scored.groupby("backbone"):
        assert list(dict.fromkeys(rows.task)) == list(VISION_TASKS)
        assert set(rows.svc) == {"none", "output"} and set(rows.images) == {TEST_ROWS} and rows.value.notna().all()


def test_the_paper_scale_is_all_suites_of_all_backbones():
    settings = load_experiment(SCRIPT).scales["paper"]
    assert settings.suites == (8, 14, 20) and settings.backbones == ("ViT-B/32", "ViT-B/16", "ViT-L/14")
    assert settings.methods == tuple(MERGERS)


def test_pairs_of_hub_experts_have_features_and_outcomes(true_hub, tmp_path):
    done = run(true_hub, tmp_path, "--suites", "4", "--sizes", "2", "--parts", "1", script=PREDICTION)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "results" / PREDICTION.stem).iterdir()
    data = load(folder)
    assert set(data.backbone) == {"ViT-B/32"} and data.set.nunique() == 6 and (data.tasks == 2).all()
    features = data[data.kind == "feature"].pivot(index="set", columns="metric", values="value")
    assert features.notna().all(axis=None) and (features.cosine > 0.01).all()  # the fake experts share a direction
    assert "not run at this scale" in (folder / "README.md").read_text()  # four tasks are too few for the rule


def test_two_processes_score_every_image_once(true_hub, tmp_path):
    tables = []
    for name, launcher in {"one": [], "two": TWO_PROCESSES}.items():
        flags = ["--methods", "task_arithmetic", "--suites", "2", "--backbones", "ViT-B/32"]
        done = run(true_hub, tmp_path / name, *flags, launcher=launcher)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = (tmp_path / name / "results" / "22_vision_merging").iterdir()
        assert json.loads((folder / "provenance.json").read_text())["processes"] == len(tables) + 1
        tables.append(load(folder))
    assert_frame_equal(*tables)


def remove_an_expert(hub):
    shutil.rmtree(hub / "hub" / f"models--{VISION_TASKS['DTD'].expert_id(BASE).replace('/', '--')}")
    return r"error: .*clip-vit-base-patch32_dtd.*"


def rename_a_column(hub):
    task = VISION_TASKS["SUN397"]
    shutil.rmtree(repository(hub, "dataset", task.repo))
    write_data(hub, task, columns=("picture", "label"))
    return r"no column 'image', the columns are picture, label"


def permute_the_labels(hub):
    task = VISION_TASKS["MNIST"]
    shutil.rmtree(repository(hub, "dataset", task.repo))
    write_data(hub, task, names=[*task.class_names[1:], task.class_names[0]])
    return r"label 0 is '1', expected '0'"


@pytest.mark.parametrize("perturb", [remove_an_expert, rename_a_column, permute_the_labels])
def test_a_perturbed_hub_fails_before_anything_is_measured(perturb, true_hub, tmp_path):
    shutil.copytree(true_hub, tmp_path / "hub", symlinks=True)
    message = perturb(tmp_path / "hub")
    done = run(tmp_path / "hub", tmp_path)
    assert done.returncode != 0 and not (tmp_path / "results").exists()
    assert re.search(message, done.stderr), done.stderr[-2000:]
