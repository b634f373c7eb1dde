"""experiments/29 at `--scale paper`, offline: repositories of the true format, merged by the command, scored as lm_eval
reports it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import environment
from fake_llama import make_fake_llamas, write_harness
from transformers import AutoModelForCausalLM

from common.data.hub import MissingResource
from common.lab.results import load
from merging import apply, calibrate, task_arithmetic, task_vector
from merging.suites import harness
from merging.suites.harness import FAMILIES, Scoring

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "29_generation.py"
QUESTIONS = ["--scoring.questions", "12", "--scoring.validation", "4", "--scoring.scales", "1.0", "2.0"]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A Hub cache of both families, and a folder with a harness."""
    root = tmp_path_factory.mktemp("llamas")
    make_fake_llamas(root)
    write_harness(root / "packages")
    return root


def run(root: Path, scratch: Path, *more: str, search: str) -> subprocess.CompletedProcess[str]:
    flags = ["--scale", "paper", "--device", "cpu", "--jobs", "1", "--results-dir", str(scratch / "results")]
    variables = environment(root) | {"EXPERIMENTS_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (search, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, str(SCRIPT), *flags, "--methods", "task_arithmetic", "iso_c", *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=900)


@pytest.fixture(scope="module")
def result(llamas, tmp_path_factory):
    """Table, README and cache of a run on both families."""
    scratch = tmp_path_factory.mktemp("generation")
    done = run(llamas, scratch, *QUESTIONS, search=str(llamas / "packages"))
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (scratch / "results" / "29_generation").iterdir()
    return load(folder), " ".join((folder / "README.md").read_text().split()), scratch / "cache"


def test_the_table_of_both_families(result):
    data, text, cache = result
    assert set(data.backbone) == set(FAMILIES) and set(data.suite) == {3} and set(data.images) == {8}
    merged = data[data.method.isin(["task_arithmetic", "iso_c"])]
    assert len(merged) == len(FAMILIES) * 2 * 2 * 2 * 2  # mergers, with and without SVC, scale rules, benchmarks
    assert set(merged.scale_rule) == {"fixed", "validation"} and set(merged.scale) <= {1.0, 2.0}
    assert set(merged[merged.scale_rule == "fixed"].scale) == {1.0}
    assert (merged.value.round(6) % 12.5 == 0).all() and merged.value.nunique() > 2
    experts = data[data.method == "expert"]
    assert len(experts) == 2 * len(FAMILIES) and set(experts.model) <= {
        expert for family in FAMILIES.values() for expert in family.experts
    }
    assert "| Llama2-7B, GSM8K: iso_c | 42 " in text and "| Llama2-7B, GSM8K: iso_c + SVC | 51.4 " in text
    assert "not measured in this run" in text  # update norms
    assert list(cache.glob("merged-*")) == []  # no weights are left


def test_gained_and_lost_are_counted_against_the_base_merger(result):
    data, _, _ = result
    own = data[data.method.isin(["task_arithmetic", "iso_c"])]
    fixed = own[own.scale_rule == "fixed"]
    wide = fixed.pivot_table(index=["backbone", "method", "task"], columns="svc", values=["value", "gained", "lost"])
    change = 100 * (wide.gained - wide.lost).output / 8
    assert (change - (wide.value.output - wide.value.none)).abs().max() < 1e-6
    assert (wide.gained.none == 0).all() and (wide.lost.none == 0).all()


def test_what_is_scored_is_the_calibrated_merge(llamas, tmp_path, monkeypatch):
    """The folder that the harness gets holds the same weights as a merge in memory."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(llamas / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("common.cache.CACHE", tmp_path)
    seen = {}

    def score(model, scoring, device):
        state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
        seen.update({name: tensor.clone() for name, tensor in state.items()})
        return {"gsm8k": [1, 0]}

    monkeypatch.setattr(harness, "score", score)
    family = FAMILIES["Qwen2.5-1.5B"]
    right = harness._merged_right(family, "task_arithmetic", True, 2.0, 0, Scoring(("gsm8k",), 1), "cpu")
    assert right == {"gsm8k": [1, 0]}
    base, *experts = (
        {
            name: tensor.detach().float()
            for name, tensor in AutoModelForCausalLM.from_pretrained(
                repository, local_files_only=True
            ).named_parameters()
        }
        for repository in (family.base, *family.experts)
    )
    updates = [task_vector(expert, base) for expert in experts]
    expected = apply(base, calibrate(task_arithmetic(updates), updates), 2.0)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value.bfloat16().float(), rtol=1e-2, atol=1e-3)


def test_a_missing_harness_ends_in_one_line(llamas, tmp_path):
    hidden = tmp_path / "hidden" / "lm_eval"
    done = run(llamas, tmp_path, *QUESTIONS, search="")
    assert not hidden.exists() and done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert "error: the package lm_eval, which scores full-size models, is missing: pip install" in last


def test_a_missing_harness_is_seen_before_any_model_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingResource, match="lm_eval"):
        next(harness.family_rows("Llama2-7B", ["iso_c"], 0, Scoring(), "cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmarks": ("mmlu",)}, "unknown benchmark 'mmlu'; there are gsm8k, ifeval"),
        ({"scales": (0.5, 2.0)}, "scales must be positive, and 1 among them"),
        ({"questions": 50}, "of 50 questions 100 choose the scale: none is left to report"),
    ],
)
def test_settings_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**options)
    with pytest.raises(ValueError, match=r"unknown family 'Llama'; there are Llama2-7B, Qwen2\.5-1\.5B"):
        harness.check_families(["Llama"])


def test_another_report_of_the_harness_is_refused():
    samples = [{"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0}]
    with pytest.raises(ValueError, match=r"lm_eval reports no exact_match \(strict-match\); it reports acc \(none\)"):
        harness._answers("gsm8k", samples)
