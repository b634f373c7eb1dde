"""Merging suites of language models: an encoder or GPT-2 with one head per task, or a T5 that writes its answers.

Experiments name a backbone and see only `Suite`. MiniLM and the T5 of this project need no download: their tasks are
made from the texts of installed packages. The others come from the hub, with GLUE and similar tasks.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from common.cache import cache_key, is_cached
from common.data import hub
from common.lab.statistics import spread
from common.models.minilm import MINILM, minilm
from merging.suites import learning_rates, package_t5, text_experts
from merging.suites.data import hub_texts, package_texts
from merging.suites.data.text_tasks import TextTask
from merging.suites.models import adapted, language
from merging.suites.suite import Rows, State, Suite
from merging.suites.text_experts import Base, FineTuning, TextRecipe, Tuned

GLUE = tuple(name for name in hub_texts.GLUE if name != "stsb")
FLAN = "google/flan-t5-base", "google/flan-t5-large"
T0 = "bigscience/T0_3B", "google-t5/t5-base"  # T0 has no tokenizer of the present format; its vocabulary is T5's


@dataclass(frozen=True)
class Backbone:
    """A model to be merged, its tasks, and where its experts come from.

    Args:
        base: loads the model; the recipe says for how many steps a model that is trained here is trained.
        tasks: names, in the order in which suites take them.
        task: maps a name to the task.
        tuned: what fine-tuning changed: everything ("full"), or the adapter ("lora", "ia3").
        learning_rates: of experts that are trained here, in ascending order; of several, `learning_rates.choose` takes
            one, the middle one where the recipe does not ask for a choice.
        hub: repository of the base if the experts are on the hub too; "" if they are trained here.
    """

    base: Callable[[TextRecipe], Base]
    tasks: tuple[str, ...]
    task: Callable[[str], TextTask]
    tuned: Tuned = "full"
    learning_rates: tuple[float, ...] = ()
    hub: str = ""


def _minilm(recipe: TextRecipe) -> Base:
    model, tokenizer = minilm()
    return Base(f"{MINILM} {metadata.version(MINILM)}", model, tokenizer)


def _bert(recipe: TextRecipe) -> Base:
    repository = "google-bert/bert-base-uncased"
    return Base(_at_commit(repository), *language.encoder(repository), pooling="cls")


def _gpt2(recipe: TextRecipe) -> Base:
    repository = "openai-community/gpt2"
    return Base(_at_commit(repository), *language.gpt2(repository), pooling="last")


def _t5(recipe: TextRecipe, repositories: tuple[str, ...]) -> Base:
    return Base(" ".join(map(_at_commit, repositories)), *language.t5(*repositories), pooling="")


def _at_commit(repository: str, kind: Literal["model", "dataset"] = "model") -> str:
    """Return a repository's name with its present commit, so that the cache finds nothing stale after a change."""
    return f"{repository}@{hub.commit(repository, kind)}"


@cache
def _hub_task(name: str) -> TextTask:
    task = hub_texts.task(name)
    return replace(task, key=f"{task.key}, {_at_commit(hub_texts.HUB_TEXTS[name].repo, 'dataset')}")


def _package_t5(recipe: TextRecipe) -> Base:
    return package_t5.base(recipe.base_steps)


_package = (package_texts.TASKS, package_texts.task)
_shifted = (package_texts.TASKS, package_texts.shifted_task)  # the same tasks in one domain that all of them share
_glue = (hub_texts.GLUE, _hub_task)

BACKBONES: dict[str, Backbone] = {
    "MiniLM": Backbone(_minilm, *_package, learning_rates=(1e-4, 3e-4, 1e-3)),
    "MiniLM shifted": Backbone(_minilm, *_shifted, learning_rates=(1e-4, 3e-4, 1e-3)),
    "MiniLM LoRA": Backbone(_minilm, *_package, "lora", (1e-3, 2e-3, 4e-3)),
    "MiniLM IA³": Backbone(_minilm, *_package, "ia3", (5e-3, 1e-2, 2e-2)),
    "T5": Backbone(_package_t5, *_package, learning_rates=(1e-3,)),
    "T5 LoRA": Backbone(_package_t5, *_package, "lora", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "T5 IA³": Backbone(_package_t5, *_package, "ia3", (5e-3, 1e-2, 2e-2, 4e-2)),
    "BERT": Backbone(_bert, hub_texts.BERT_SUITE, _hub_task, learning_rates=(2e-5,)),
    "GPT-2": Backbone(_gpt2, GLUE, _hub_task, hub="openai-community/gpt2"),
    "Flan-T5-base": Backbone(partial(_t5, repositories=FLAN[:1]), *_glue, hub=FLAN[0]),
    "Flan-T5-base LoRA": Backbone(partial(_t5, repositories=FLAN[:1]), *_glue, "lora", hub=FLAN[0]),
    "Flan-T5-large LoRA": Backbone(partial(_t5, repositories=FLAN[1:]), *_glue, "lora", hub=FLAN[1]),
    "T0-3B IA³": Backbone(partial(_t5, repositories=T0), GLUE, _hub_task, "ia3", (3e-3,)),
}


@dataclass(frozen=True)
class _Expert:
    """What is known of an expert: its key, its state or the folder of its adapter, and its head, if it has one."""

    key: str
    state: State | None = None
    adapter: Path | None = None
    head: Mapping[str, Tensor] | None = None


def check_backbones(names: Sequence[str]) -> None:
    """Raise a ValueError unless every backbone is known."""
    for name in names:
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")


@lru_cache(maxsize=1)  # several parts of an experiment ask for the same one
def suite(name: str, tasks: int, seed: int, recipe: TextRecipe, device: torch.device) -> Suite:
    """Return the suite of the first `tasks` tasks of a backbone, training what the cache does not hold yet.

    Its states hold only the tensors that fine-tuning has changed in some expert. `Suite.adapters` has the folders of
    the experts' adapters, in peft's format.

    Args:
        name: an entry of BACKBONES.
        tasks: number of tasks; all, if the backbone has fewer.
        seed: of the experts that are trained here.
        recipe: how they are trained and scored.
        device: of the states.

    Raises:
        ValueError: the backbone is unknown.
        OSError: a repository is not available; the message says what to do.
    """
    check_backbones([name])
    backbone, base = BACKBONES[name], _base(name, recipe)
    texts = [backbone.task(task) for task in backbone.tasks[:tasks]]
    if backbone.hub:
        find = partial(_hub_expert, backbone)
    else:
        find = partial(_own_expert, tuning(name, recipe, device), seed, recipe, device)
    experts = [find(base, text) for text in texts]
    pretrained = language.parameters(base.model.to(device))
    changes = [_changes(base, expert, pretrained) for expert in experts]
    changed = [name for name in pretrained if any(name in own for own in changes)]
    states = [{name: own.get(name, pretrained[name]) for name in changed} for own in ({}, *changes)]
    pairs = zip(texts, experts, strict=True)
    networks = tuple(text_experts.network(base, text, expert.head).to(device) for text, expert in pairs)
    limits = {"test": recipe.test_texts or None, "validation": recipe.validation_texts or None}
    facts = {"base": base.name, "experts": [expert.key for expert in experts], "tasks": [text.key for text in texts]}
    key = cache_key(facts | {"limits": limits, "device": device.type}, suite)
    return Suite(
        key,
        tuple(text.name for text in texts),
        networks,
        states[0],
        tuple(states[1:]),
        _Batches(base, {text.name: text for text in texts}, limits, device),
        tuple(expert.adapter for expert in experts if expert.adapter),
    )


@lru_cache(maxsize=1)
def _base(name: str, recipe: TextRecipe) -> Base:
    load = BACKBONES[name].base
    base = load(recipe)
    return replace(base, name=f"{base.name}, {cache_key({}, load)}")  # weights, and the code that reads them


def tuning(name: str, recipe: TextRecipe, device: torch.device) -> FineTuning:
    """Return how experts of a backbone are trained here, at the learning rate that is chosen from its grid."""
    return FineTuning(BACKBONES[name].tuned, _choice(name, recipe, device)[0])


def _choice(name: str, recipe: TextRecipe, device: torch.device) -> tuple[float, list[dict[str, Any]]]:
    backbone = BACKBONES[name]
    tasks = [backbone.task(task) for task in backbone.tasks[: recipe.rate_tasks]]
    return learning_rates.choose(_base(name, recipe), tasks, backbone.tuned, backbone.learning_rates, recipe, device)


def _own_expert(
    tuning: FineTuning, seed: int, recipe: TextRecipe, device: torch.device, base: Base, task: TextTask
) -> _Expert:
    found = text_experts.fine_tune(base, task, tuning, seed, recipe, device)
    head = load_file(found.path / "head.safetensors") if base.pooling else None
    if tuning.tuned != "full":
        return _Expert(found.key, adapter=found.path / "adapter", head=head)
    return _Expert(found.key, load_file(found.path / "model.safetensors"), head=head)


def _hub_expert(backbone: Backbone, base: Base, task: TextTask) -> _Expert:
    repository = hub_texts.HUB_TEXTS[task.name].expert_id(backbone.hub, lora=backbone.tuned == "lora")
    key = _at_commit(repository)
    if backbone.tuned != "full":
        return _Expert(key, adapter=language.adapter_folder(repository))
    like = language.parameters(base.model)
    if not base.pooling:
        return _Expert(key, language.t5_expert_state(repository, like))
    state, head = language.gpt2_expert(repository, like)
    return _Expert(key, state, head={"weight": head})


def _changes(base: Base, expert: _Expert, pretrained: State) -> State:
    """Return the tensors that fine-tuning changed, on the device of the base; the others are not kept."""
    state = expert.state or adapted.folded(base.model, expert.adapter)
    return {name: own for name, start in pretrained.items() if not (own := state[name].to(start.device)).equal(start)}


class _Batches:
    """The evaluation batches of each task and split, tokenised as they are asked for."""

    def __init__(self, base: Base, tasks: Mapping[str, TextTask], limits: Mapping[str, int | None], device: Any):
        self.base, self.tasks, self.limits, self.device = base, tasks, limits, device

    def __call__(self, name: str, split: str) -> Iterable[tuple[dict[str, Tensor], Tensor]]:
        task = self.tasks[name]
        examples = text_experts.first(task.split(split), self.limits[split])
        loader = text_experts.evaluation_batches(self.base, task, examples)
        return Accelerator(cpu=self.device.type == "cpu").prepare(loader)


# For experiments -----------------------------------------------------------------------------------------------------


def task_names(backbone: str) -> tuple[str, ...]:
    """Return the tasks of a backbone, in the order in which suites take them."""
    return BACKBONES[backbone].tasks


def probe_rows(name: str, suite: Suite, recipe: TextRecipe) -> Rows:
    """Yield the rows "chance" and "probe" of each task, if experts with heads are trained here; else nothing."""
    backbone = BACKBONES[name]
    if backbone.hub or not _base(name, recipe).pooling:
        return
    for task in suite.tasks:
        folder = text_experts.probe(_base(name, recipe), backbone.task(task), recipe, suite.device).path
        scores = json.loads((folder / "scores.json").read_text())
        for method in ("chance", "probe"):
            row = {"method": method, "task": task, "metric": "accuracy", "value": scores[method]}
            yield row | {"images": scores["test"]}


def rate_rows(name: str, recipe: TextRecipe, device: torch.device) -> Rows:
    """Yield the rows of the choice of a learning rate (`learning_rates.rows`), if there is one; else nothing."""
    if not BACKBONES[name].hub:
        yield from learning_rates.rows(*_choice(name, recipe, device))


PROGRESS = "validation loss"  # in nats


def progress_rows(name: str, suite: Suite, seed: int, recipe: TextRecipe) -> Rows:
    """Yield the validation losses of experts that are trained here, by `step`; nothing where none was looked at."""
    backbone = BACKBONES[name]
    if backbone.hub or not recipe.validate_every:
        return
    how = tuning(name, recipe, suite.device)
    for task in suite.tasks:
        expert = text_experts.fine_tune(_base(name, recipe), backbone.task(task), how, seed, recipe, suite.device)
        for step, loss in json.loads((expert.path / "progress.json").read_text()):
            yield {"method": "expert", "task": task, "metric": PROGRESS, "step": step, "value": loss}


def prepare(settings: Any, context: Any) -> None:
    """Train, in parallel processes, all probes and experts that the cache does not hold yet, and choose their rates."""
    recipe, device = settings.recipe, context.device
    own = [name for name in settings.backbones if not BACKBONES[name].hub]
    for name in own:  # a base that is trained here is trained once, by this process
        _base(name, recipe)
    merged = [(name, task) for name in own for task in BACKBONES[name].tasks[: max(settings.suites)]]
    grids = [
        (name, task, FineTuning(BACKBONES[name].tuned, rate), learning_rates.SEED)
        for name in own
        for task in BACKBONES[name].tasks[: recipe.rate_tasks]
        for rate in BACKBONES[name].learning_rates
        if len(BACKBONES[name].learning_rates) > 1
    ]
    probed = list(dict.fromkeys([*merged, *((name, task) for name, task, _, _ in grids)]))
    context.map(partial(_probe_one, recipe, device), probed, "fit probes")
    _fine_tune_all(recipe, context, grids, "fine-tune experts at every rate")
    context.map(partial(_choose_one, recipe, device), own, "choose learning rates")
    chosen = {name: tuning(name, recipe, device) for name in own}
    experts = [(name, task, chosen[name], seed) for name, task in merged for seed in settings.seeds]
    _fine_tune_all(recipe, context, experts, "fine-tune experts")


def _fine_tune_all(recipe: TextRecipe, context: Any, items: Sequence[tuple], description: str) -> None:
    missing = [item for item in items if not is_cached(*_artefact(recipe, context.device, item))]
    context.map(partial(_fine_tune_one, recipe, context.device), missing, description)


def _artefact(recipe: TextRecipe, device: torch.device, item: tuple[str, str, FineTuning, int]) -> tuple:
    name, task, how, seed = item
    return text_experts.expert(_base(name, recipe), BACKBONES[name].task(task), how, seed, recipe, device)


def _probe_one(recipe: TextRecipe, device: torch.device, item: tuple[str, str]) -> None:
    name, task = item
    if _base(name, recipe).pooling:
        text_experts.probe(_base(name, recipe), BACKBONES[name].task(task), recipe, device)


def _fine_tune_one(recipe: TextRecipe, device: torch.device, item: tuple[str, str, FineTuning, int]) -> None:
    name, task, how, seed = item
    text_experts.fine_tune(_base(name, recipe), BACKBONES[name].task(task), how, seed, recipe, device)


def _choose_one(recipe: TextRecipe, device: torch.device, name: str) -> None:
    tuning(name, recipe, device)


def progress_table(data: pd.DataFrame) -> pd.DataFrame:
    """Return, task by task, the experts' validation loss before training, at its lowest and at the end, over seeds.

    The lowest is over the states that an expert may be, so without the one before training. "falling" counts the seeds
    whose loss was lowest at the very end, and may have fallen further.
    """
    lines = []
    for (backbone, task), rows in data[data.metric == PROGRESS].groupby(["backbone", "task"], sort=False):
        losses = rows.pivot_table(index="seed", columns="step", values="value").sort_index(axis=1)
        trained, last = losses.iloc[:, 1:], losses.columns[-1]
        best = trained.idxmin(axis=1)
        falling = f"{int((best == last).sum())} of {len(losses)}"
        found = {"before": losses.iloc[:, 0], "lowest": trained.min(axis=1), "last": losses[last]}
        shown = {name: spread(values, 3) for name, values in found.items()} | {"step of the lowest": spread(best, 0)}
        lines.append(dict(backbone=backbone, task=task, **shown, falling=falling))
    return pd.DataFrame(lines)


def suite_table(data: pd.DataFrame) -> pd.DataFrame:
    """Return, task by task, the scores that need no merging: chance, probe, base, expert, and expert − probe, in %."""
    names = ("chance", "probe", "pretrained", "expert")
    own, keys = (
        data[data.method.isin(names) & data.metric.isin(["accuracy", "Spearman"])],
        ["backbone", "suite", "task"],
    )
    columns = {method: rows.groupby(keys, sort=False).value.apply(spread) for method, rows in own.groupby("method")}
    table = pd.DataFrame({name: columns[name] for name in names if name in columns})
    if "probe" in columns:
        means = own.pivot_table(index=keys, columns="method", values="value", sort=False)
        table["expert − probe"] = (means.expert - means.probe).round(1)
    return table.reset_index()
