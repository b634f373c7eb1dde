"""experiments/27 and 28 at `--scale paper`, offline, on repositories of the true format: from download to table."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import torch
from fake_hub import environment
from fake_language import BERT, GPT2, TEST_ROWS
from pandas.testing import assert_frame_equal

from common import cache
from common.lab.results import load
from merging.suites import language
from merging.suites.data.hub_texts import BERT_SUITE, GLUE, HUB_TEXTS
from merging.suites.text_experts import FineTuning, TextRecipe

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
TEXTS, ADAPTERS = "27_language_classification", "28_adapters"
SHORT = ["--methods", "task_arithmetic", "--recipe.batch-size", "4"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(
    name: str, hub: Path, scratch: Path, *more: str, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    flags = ["--scale", "paper", "--device", "cpu", "--jobs", "1", "--results-dir", str(scratch / "results")]
    variables = environment(hub) | {"EXPERIMENTS_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}
    variables["HF_DATASETS_CACHE"] = str(scratch / "datasets")
    command = [sys.executable, *launcher, str(EXPERIMENTS / f"{name}.py"), *flags, *SHORT, *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=900)


def table(done: subprocess.CompletedProcess[str], name: str, scratch: Path) -> tuple[pd.DataFrame, Path]:
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (scratch / "results" / name).iterdir()
    return load(folder), folder


def readme(folder: Path) -> str:
    return " ".join((folder / "README.md").read_text().split())


def accuracy(data: pd.DataFrame, backbone: str) -> pd.DataFrame:
    """Scores of the test sets by task; columns: pretrained, expert, merged (own scale, no SVC)."""
    rows = data[(data.backbone == backbone) & data.method.isin(["pretrained", "expert", "task_arithmetic"])]
    rows = rows[rows.scale_rule.isna() | ((rows.scale_rule == "fixed") & (rows.svc == "none") & (rows.others == "own"))]
    return rows.pivot(index="task", columns="method", values="value")


def assert_all_three_differ(scores: pd.DataFrame) -> None:
    assert (scores.expert != scores.pretrained).any() and (scores.task_arithmetic != scores.pretrained).any()
    assert (scores.task_arithmetic != scores.expert).any()


@pytest.fixture(scope="module")
def texts(true_language_hub, tmp_path_factory):
    """Table and folder of experiment 27."""
    scratch = tmp_path_factory.mktemp("texts")
    done = run(TEXTS, true_language_hub, scratch, "--recipe.steps", "2", "--recipe.probe-texts", "20")
    return table(done, TEXTS, scratch)


def test_the_text_classification_table(texts):
    data, folder = texts
    data = data[data.images.notna()]  # the others are norms of updates and what tells a testbed
    tasks = {backbone: tuple(dict.fromkeys(rows.task)) for backbone, rows in data.groupby("backbone")}
    assert tasks == {"BERT": BERT_SUITE, "GPT-2": GLUE[:-1], "Flan-T5-base": GLUE}
    assert set(zip(data.backbone, data.suite, strict=True)) == {(name, len(own)) for name, own in tasks.items()}
    one_split = data[data.task == "sms"].images
    assert set(one_split) == {24} and set(data[data.task != "sms"].images) == {TEST_ROWS}  # all of them
    assert set(data[data.metric == "Spearman"].task) == {"stsb"} and set(data[data.task == "stsb"].metric) == {
        "Spearman"
    }
    for backbone in tasks:
        assert_all_three_differ(accuracy(data, backbone))
    assert accuracy(data, "Flan-T5-base").loc["stsb"].nunique() == 3
    assert set(data[data.method == "probe"].backbone) == {"BERT"}
    text = readme(folder)
    for quantity, paper in {
        "4 tasks, BERT: task_arithmetic": "56.9",
        "4 tasks, BERT: task_arithmetic + SVC": "69",
        "7 tasks, GPT-2: task_arithmetic": "70",
        "8 tasks, Flan-T5-base: task_arithmetic": "78.9",
    }.items():
        assert f"| {quantity} | {paper} " in text
    assert "of 4 tasks that have one" in text  # a probe


def test_two_processes_give_the_same_table(texts, true_language_hub, tmp_path):
    done = run(TEXTS, true_language_hub, tmp_path, "--backbones", "GPT-2", launcher=TWO_PROCESSES)
    data, folder = table(done, TEXTS, tmp_path)
    assert json.loads((folder / "provenance.json").read_text())["processes"] == 2
    one = texts[0][texts[0].backbone == "GPT-2"].reset_index(drop=True)
    assert_frame_equal(data, one[data.columns], check_dtype=False)


def test_the_adapter_table(true_language_hub, tmp_path):
    flags = ["--suites", "2", "--recipe.t5-steps", "60"]
    data, folder = table(run(ADAPTERS, true_language_hub, tmp_path, *flags), ADAPTERS, tmp_path)
    lora, ia3 = ["Flan-T5-base LoRA", "Flan-T5-large LoRA"], ["T0-3B IA³, vectors", "T0-3B IA³, matrices"]
    scored = data[data.metric == "accuracy"]
    assert set(scored.backbone) == {*lora, *ia3} and set(scored.task) == set(GLUE[:2])
    assert set(scored.images) == {TEST_ROWS}
    for backbone in lora:
        assert_all_three_differ(accuracy(scored, backbone))
        assert f"2 tasks, {backbone}: task_arithmetic | {77.4 if 'base' in backbone else 87.3}" in readme(folder)
    scores = accuracy(scored, ia3[0])
    assert (scores.expert != scores.pretrained).any()
    # without SVC the two forms are one merged model, but for the rounding of IA³'s vectors
    assert (accuracy(scored, ia3[1]) == scores).all(axis=None)
    errors = data[data.metric == "relative error"]
    assert set(errors.backbone) == set(lora) and set(errors.svc) == {"none", "output"} and errors.value.max() < 1e-5


def test_a_missing_expert_ends_in_one_line(true_language_hub, tmp_path):
    shutil.copytree(true_language_hub, tmp_path / "hub", symlinks=True)
    expert = HUB_TEXTS["rte"].expert_id(GPT2)
    shutil.rmtree(tmp_path / "hub" / "hub" / f"models--{expert.replace('/', '--')}")
    done = run(TEXTS, tmp_path / "hub", tmp_path, "--backbones", "GPT-2")
    assert done.returncode == 2 and not (tmp_path / "results").exists()
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert f"error: model {expert} is not in the local cache" in last and "Traceback" not in done.stderr


def move_to_another_commit(hub: Path, kind: str, repository: str) -> None:
    home = hub / "hub" / f"{kind}s--{repository.replace('/', '--')}"
    (snapshot,) = (home / "snapshots").iterdir()
    snapshot.rename(snapshot.with_name("f" * 40))
    (home / "refs" / "main").write_text("f" * 40)


def test_nothing_stale_is_found_after_a_repository_has_changed(true_language_hub, tmp_path, monkeypatch):
    copy = tmp_path / "hub"
    shutil.copytree(true_language_hub, copy, symlinks=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(copy / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")

    def keys() -> tuple[str, str]:
        """Of a suite, and of an expert that would be trained here."""
        for function in (language.suite, language._base, language._hub_task):
            function.cache_clear()
        recipe, cpu = TextRecipe(), torch.device("cpu")
        how = FineTuning("full", language.BACKBONES["BERT"].learning_rates[0])
        expert = language._artefact(recipe, cpu, ("BERT", "cola", how, 0))
        return language.suite("GPT-2", 1, 0, recipe, cpu).key, cache.cache_key(*expert[1:])

    before, moved = keys(), {}
    for kind, repository in {
        "base": ("model", GPT2),
        "expert": ("model", HUB_TEXTS["cola"].expert_id(GPT2)),
        "other base": ("model", BERT),
        "data": ("dataset", HUB_TEXTS["cola"].repo),
    }.items():
        move_to_another_commit(copy, *repository)
        after = keys()
        moved[kind] = tuple(new != old for new, old in zip(after, before, strict=True))
        before = after
    assert keys() == before
    only_suite, only_expert = (True, False), (False, True)
    assert moved == {"base": only_suite, "expert": only_suite, "other base": only_expert, "data": (True, True)}
    for function in (language.suite, language._base, language._hub_task):
        function.cache_clear()
