"""Full-size language models merged by `python -m merging`'s own functions and scored by lm-evaluation-harness.

Nothing is held in memory but what the command streams: each merge is written into a folder, scored, and deleted; what
stays, in the cache, is which questions it got right. A benchmark's first `validation` questions choose the scale of the
finished update, the others are reported, so that nothing is chosen on what is reported.
"""

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from common import cache
from common.cache import artefact
from common.data import hub
from merging.calibration import published_alpha
from merging.command.main import merge
from merging.command.recipe import Recipe
from merging.suites.suite import Rows

BENCHMARKS = {  # task of the harness → metric and filter: a question counts as right where the metric is 1
    "gsm8k": ("exact_match", "strict-match"),
    "ifeval": ("prompt_level_strict_acc", "none"),
}


@dataclass(frozen=True)
class Family:
    """A base model and its experts, all of them repositories of the hub."""

    base: str
    experts: tuple[str, ...]


FAMILIES = {
    "Llama2-7B": Family(
        "meta-llama/Llama-2-7b-hf",
        ("meta-llama/Llama-2-7b-chat-hf", "WizardLMTeam/WizardMath-7B-V1.0", "codellama/CodeLlama-7b-hf"),
    ),
    "Qwen2.5-1.5B": Family(
        "Qwen/Qwen2.5-1.5B", ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Coder-1.5B")
    ),
}


@dataclass(frozen=True)
class Scoring:
    """How models are scored.

    Args:
        benchmarks: names in BENCHMARKS.
        validation: number of questions of each benchmark that choose a scale and are not reported.
        questions: how many of each benchmark are used in all; 0: all of them.
        scales: of the finished update, among which the validation questions choose; 1 is the merger's own.
    """

    benchmarks: tuple[str, ...] = tuple(BENCHMARKS)
    validation: int = 100
    questions: int = 0
    scales: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0)

    def __post_init__(self):
        for name in self.benchmarks:
            if name not in BENCHMARKS:
                raise ValueError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        if 1.0 not in self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be positive, and 1 among them, got {self.scales}")
        if self.validation < 1 or 0 < self.questions <= self.validation:
            left = "none is left to report"
            raise ValueError(f"of {self.questions} questions {self.validation} choose the scale: {left}")


Right = dict[str, list[int]]  # benchmark → 1 or 0 for each question, in the order of the benchmark


def check_families(names: Sequence[str]) -> None:
    """Raise a ValueError unless every family is known."""
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"unknown family {name!r}; there are {', '.join(FAMILIES)}")


def check_installed() -> None:
    """Raise a MissingResource unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise hub.MissingResource(
            "the package lm_eval, which scores full-size models, is missing: pip install 'shared-spectra[harness]'"
        )


def family_rows(name: str, methods: Sequence[str], seed: int, scoring: Scoring, device: str) -> Rows:
    """Yield the rows of a family: base, experts, and each merger with and without SVC, at its own and tuned scales.

    The columns are those of `merging.suites.comparison`; `task` is a benchmark, and the expert in its row, whose name
    is the column `model`, the one that is best on its validation questions.

    Args:
        name: an entry of FAMILIES.
        methods: names of mergers.
        seed: of the mergers that draw masks.
        scoring: benchmarks, questions and scales.
        device: where models are merged and run, such as "cuda".

    Raises:
        MissingResource: lm-evaluation-harness is not installed, or a repository is not available.
        ValueError: models that cannot be merged, or several processes; the message is one line.
    """
    check_families([name])
    check_installed()
    if (processes := PartialState().num_processes) > 1:
        raise ValueError(f"full-size models are merged and scored by one process, not {processes}: start it by python")
    family = FAMILIES[name]
    yield from _rows({"method": "pretrained"}, _right(family.base, scoring, device), scoring)
    experts = {repository: _right(repository, scoring, device) for repository in family.experts}
    for benchmark in scoring.benchmarks:
        scores = {each: _validation_score({benchmark: right[benchmark]}, scoring) for each, right in experts.items()}
        best = max(scores, key=scores.__getitem__)
        labels = {"method": "expert", "model": best}
        yield from _rows(labels, {benchmark: experts[best][benchmark]}, scoring)
    for method in methods:
        found = [pair for svc in (False, True) for pair in _both_scales(family, method, svc, seed, scoring, device)]
        fixed, tuned = found[0][1], found[1][1]  # of the base merger
        for labels, right in found:
            others = {"": tuned if labels["scale_rule"] == "validation" else fixed, "_over_tuned": tuned}
            yield from _rows({"method": method, **labels}, right, scoring, others)


def _both_scales(
    family: Family, method: str, svc: bool, seed: int, scoring: Scoring, device: str
) -> list[tuple[dict[str, Any], Right]]:
    """Return labels and answers of one merger at its own scale, and at the one that validation questions choose."""
    tasks = len(family.experts)
    alpha = published_alpha(method, tasks) if svc else None
    labels = dict(svc="output" if svc else "none", alpha=alpha, others="own")
    by_scale = {
        scale: _merged_right(family, method, svc, scale, seed, scoring, device) for scale in sorted(scoring.scales)
    }
    best = max(by_scale, key=lambda scale: _validation_score(by_scale[scale], scoring))  # the smallest of equal ones
    rules = {"fixed": 1.0, "validation": best}
    return [(labels | dict(scale_rule=rule, scale=scale), by_scale[scale]) for rule, scale in rules.items()]


def _validation_score(right: Right, scoring: Scoring) -> float:
    return sum(sum(own[: scoring.validation]) for own in right.values())


def _rows(labels: Mapping[str, Any], right: Right, scoring: Scoring, others: Mapping[str, Right] | None = None) -> Rows:
    for benchmark, answers in right.items():
        own = answers[scoring.validation :]
        row = {**labels, "task": benchmark, "metric": "accuracy"}
        row |= {"value": 100 * sum(own) / len(own), "images": len(own)}
        for suffix, other in (others or {}).items():
            pairs = list(zip(own, other[benchmark][scoring.validation :], strict=True))
            row |= {f"gained{suffix}": pairs.count((1, 0)), f"lost{suffix}": pairs.count((0, 1))}
        yield row


# Merging and scoring -------------------------------------------------------------------------------------------------


def _merged_right(
    family: Family, method: str, svc: bool, scale: float, seed: int, scoring: Scoring, device: str
) -> Right:
    """Return what a merged model gets right, from the cache or else merged and scored; its weights are not kept."""
    from merging.mergers import merger

    own = {"seed": seed} if "seed" in merger(method).options else {}
    recipe = Recipe(family.base, family.experts, method, svc=svc, final_scale=scale, **own)
    commits = [hub.commit(repository, "model") for repository in (family.base, *family.experts)]
    inputs = {"recipe": asdict(recipe), "commits": commits, **_facts(scoring, device)}
    return _read(artefact("generation_answers", inputs, partial(_merge_and_score, recipe, scoring, device)).path)


def _merge_and_score(recipe: Recipe, scoring: Scoring, device: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache.CACHE, prefix="merged-") as scratch:
        merge(recipe, Path(scratch) / "model", device=device)
        _write(Path(scratch) / "model", scoring, device, folder)


def _right(repository: str, scoring: Scoring, device: str) -> Right:
    inputs = {"model": repository, "commit": hub.commit(repository, "model"), **_facts(scoring, device)}
    return _read(artefact("generation_answers", inputs, partial(_write, repository, scoring, device)).path)


def _facts(scoring: Scoring, device: str) -> dict[str, Any]:
    return {"benchmarks": scoring.benchmarks, "questions": scoring.questions, "device": device}


def _read(folder: Path) -> Right:
    return json.loads((folder / "right.json").read_text())


def _write(model: str | Path, scoring: Scoring, device: str, folder: Path) -> None:
    (folder / "right.json").write_text(json.dumps(score(model, scoring, device)))


def score(model: str | Path, scoring: Scoring, device: str) -> Right:
    """Return which questions a model gets right, by lm-evaluation-harness with its own prompts and few-shot examples.

    Args:
        model: a folder or repository in transformers' format.
        scoring: which benchmarks, and how many questions of each.
        device: where it runs.

    Raises:
        ValueError: the harness did not report the metric that is read.
    """
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "auto"},
        tasks=list(scoring.benchmarks),
        device=device,
        batch_size="auto" if device.startswith("cuda") else 8,
        limit=scoring.questions or None,
        log_samples=True,
        bootstrap_iters=0,
    )
    return {name: _answers(name, found["samples"][name]) for name in scoring.benchmarks}


def _answers(benchmark: str, samples: Sequence[Mapping[str, Any]]) -> list[int]:
    metric, filtered = BENCHMARKS[benchmark]
    own = sorted((each for each in samples if each["filter"] == filtered), key=lambda each: each["doc_id"])
    if not own or metric not in own[0]:
        known = ", ".join(sorted({f"{name} ({each['filter']})" for each in samples for name in each["metrics"]}))
        raise ValueError(f"benchmark {benchmark}: lm_eval reports no {metric} ({filtered}); it reports {known}")
    return [int(float(each[metric]) == 1.0) for each in own]
