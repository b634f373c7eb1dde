"""Merging suites of language models that write: LoRA experts of one decoder, scored by their answers, word by word.

Experiments name a backbone and see only `Suite`. Both models need no download: one is trained here, the other comes
with an installed package. An answer counts as right or wrong; beside it stands, for every model, the perplexity on
held-out docstrings, which no expert was trained on: what fine-tuning and merging cost of the language model itself.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from common import evaluation
from common.cache import artefact, cache_key, is_cached
from common.models.smollm2 import SMOLLM2, smollm2
from merging.suites import generation_experts, learning_rates, package_decoder
from merging.suites.data import generation_texts
from merging.suites.data.generation_texts import GenerationTask
from merging.suites.generation_experts import Decoder, GenerationRecipe, Writer
from merging.suites.models import adapted, language
from merging.suites.suite import Rows, State, Suite
from merging.suites.testbed import update_norms
from merging.task_vectors import task_vector

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Backbone:
    """A model to be merged, and the learning rates of its experts, in ascending order (`learning_rates`)."""

    base: Callable[[GenerationRecipe], Decoder]
    learning_rates: tuple[float, ...]


def _package_decoder(recipe: GenerationRecipe) -> Decoder:
    return package_decoder.base(recipe.base_steps)


def _smollm2(recipe: GenerationRecipe) -> Decoder:
    model, tokenizer = smollm2()
    tokenizer.padding_side = "left"
    return Decoder(f"{SMOLLM2} {metadata.version(SMOLLM2)}", model, tokenizer, chat=True)


BACKBONES: dict[str, Backbone] = {
    "decoder LoRA": Backbone(_package_decoder, (1e-3, 2e-3)),
    "SmolLM2 LoRA": Backbone(_smollm2, (3e-4, 1e-3)),
}


@dataclass(frozen=True)
class GenerationSuite(Suite):
    """A suite whose rows also say how well each model predicts documents (metric "perplexity")."""

    documents: Sequence[tuple[Tensor, Tensor]] = ()  # batches of tokens and targets (B, T)

    def rows(self, labelled: Sequence[tuple[dict[str, Any], State]], pairs: Sequence[dict[str, int]] = ()) -> Rows:
        """Yield the rows of `Suite.rows`, and one with the perplexity of each model."""
        yield from super().rows(labelled, pairs)
        for columns, state in labelled:
            yield {**columns, "task": "docstrings", **self._perplexity(state)}

    def own_rows(self) -> Rows:
        """Yield the rows of `Suite.own_rows`, and the perplexities of the pretrained model and of every expert."""
        yield from super().own_rows()
        yield {"method": "pretrained", "task": "docstrings", **self._perplexity(self.pretrained)}
        for task, state in zip(self.tasks, self.experts, strict=True):
            yield {"method": "expert", "task": task, **self._perplexity(state)}

    def _perplexity(self, state: State) -> dict[str, Any]:
        value = generation_experts.perplexity(self.encoder, state, self.documents)
        return {"metric": PERPLEXITY, "value": value, "images": sum(len(tokens) for tokens, _ in self.documents)}


def check_backbones(names: Sequence[str]) -> None:
    """Raise a ValueError unless every backbone is known."""
    for name in names:
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")


@lru_cache(maxsize=1)  # several parts of an experiment ask for the same one
def suite(name: str, tasks: int, seed: int, recipe: GenerationRecipe, device: torch.device) -> Suite:
    """Return the suite of the first `tasks` tasks of a backbone, training what the cache does not hold yet.

    Its states hold only the tensors that LoRA changes. `Suite.adapters` has the folders of the experts' adapters.

    Args:
        name: an entry of BACKBONES.
        tasks: number of tasks; all, if there are fewer.
        seed: of the experts.
        recipe: how they are trained and scored.
        device: of the states.

    Raises:
        ValueError: the backbone is unknown.
        MissingResource: a package that carries the model is not installed.
    """
    check_backbones([name])
    decoder, rate = _base(name, recipe), _choice(name, recipe, device)[0]
    own = _tasks(tasks)
    found = [generation_experts.fine_tune(decoder, task, rate, seed, recipe, device) for task in own]
    folders = tuple(expert.path / "adapter" for expert in found)
    pretrained = language.parameters(decoder.model.to(device))
    experts = [_state(decoder, folder, device) for folder in folders]
    changed = [name for name, start in pretrained.items() if any(not each[name].equal(start) for each in experts)]
    states = [{name: each[name] for name in changed} for each in (pretrained, *experts)]
    limits = {"test": recipe.test_questions, "validation": recipe.validation_questions}
    facts = {"base": decoder.name, "experts": [expert.key for expert in found], "tasks": [task.key for task in own]}
    facts |= {"limits": limits, "docstrings": recipe.docstrings, "device": device.type}
    return GenerationSuite(
        cache_key(facts, suite),
        tuple(task.name for task in own),
        tuple(Writer(decoder, task).to(device) for task in own),
        states[0],
        tuple(states[1:]),
        partial(_batches, decoder, {task.name: task for task in own}, limits, device),
        folders,
        generation_experts.document_batches(decoder, generation_texts.docstrings("test")[: recipe.docstrings]),
    )


def _tasks(count: int) -> list[GenerationTask]:
    return [generation_texts.task(name) for name in generation_texts.TASKS[:count]]


@lru_cache(maxsize=1)
def _base(name: str, recipe: GenerationRecipe) -> Decoder:
    load = BACKBONES[name].base
    decoder = load(recipe)
    return replace(decoder, name=f"{decoder.name}, {cache_key({}, load)}")  # weights, and the code that reads them


def _state(decoder: Decoder, folder: Path, device: torch.device) -> State:
    return {name: tensor.to(device) for name, tensor in adapted.folded(decoder.model, folder).items()}


def _batches(
    decoder: Decoder, tasks: Mapping[str, GenerationTask], limits: Mapping[str, int], device: Any, name: str, split: str
) -> Iterable[tuple[dict[str, Tensor], Tensor]]:
    questions = tasks[name].split(split)[: limits[split]]
    loader = generation_experts.evaluation_batches(decoder, tasks[name], questions)
    return Accelerator(cpu=device.type == "cpu").prepare(loader)


# The learning rate ---------------------------------------------------------------------------------------------------


def _choice(name: str, recipe: GenerationRecipe, device: torch.device) -> tuple[float, list[dict[str, Any]]]:
    """Return the learning rate by the rule of `learning_rates`, and what it saw; the middle one without a choice."""
    rates, tasks = BACKBONES[name].learning_rates, _tasks(recipe.rate_tasks)
    if not tasks:
        return rates[(len(rates) - 1) // 2], []
    decoder, pairs = _base(name, recipe), [(rate, task) for rate in rates for task in tasks]
    keys = [generation_experts.expert(decoder, task, rate, learning_rates.SEED, recipe, device)[:2] for rate, task in
            pairs]  # fmt: skip
    build = partial(_write_rates, decoder, pairs, recipe, device)
    folder = artefact("generation_rates", {"experts": keys, "questions": recipe.validation_questions}, build).path
    seen = json.loads((folder / "rates.json").read_text())
    return learning_rates.smallest_of_the_best(seen), seen


def _write_rates(
    decoder: Decoder, pairs: Sequence[tuple[float, GenerationTask]], recipe: GenerationRecipe, device: Any, folder: Path
) -> None:
    pretrained, seen = language.parameters(decoder.model.to(device)), []
    for rate, task in pairs:
        found = generation_experts.fine_tune(decoder, task, rate, learning_rates.SEED, recipe, device)
        state = _state(decoder, found.path / "adapter", device)
        (norm,) = update_norms(pretrained, [task_vector(state, pretrained)])
        questions = task.split("validation")[: recipe.validation_questions]
        batches = generation_experts.evaluation_batches(decoder, task, questions)
        predicted, labels = evaluation.predictions(Writer(decoder, task).to(device), [state], batches)
        score = evaluation.score(predicted[0], labels)
        seen.append(dict(learning_rate=rate, task=task.name, accuracy=score, texts=len(labels), norm=norm))
    (folder / "rates.json").write_text(json.dumps(seen))


# For experiments -----------------------------------------------------------------------------------------------------


def task_names(backbone: str) -> tuple[str, ...]:
    """Return the tasks of a backbone, in the order in which suites take them."""
    return generation_texts.TASKS


def rate_rows(name: str, recipe: GenerationRecipe, device: torch.device) -> Rows:
    """Yield the rows of the choice of a learning rate (`learning_rates.rows`), if there was one."""
    yield from learning_rates.rows(*_choice(name, recipe, device))


def prepare(settings: Any, context: Any) -> None:
    """Train, in parallel processes, all experts that the cache does not hold yet, and choose their learning rates."""
    recipe, device = settings.recipe, context.device
    for name in settings.backbones:  # a base that is trained here is trained once, by this process
        _base(name, recipe)
    grids = [
        (name, task, rate, learning_rates.SEED)
        for name in settings.backbones
        for task in generation_texts.TASKS[: recipe.rate_tasks]
        for rate in BACKBONES[name].learning_rates
    ]
    _fine_tune_all(recipe, context, grids, "fine-tune experts at every rate")
    experts = [
        (name, task, _choice(name, recipe, device)[0], seed)
        for name in settings.backbones
        for task in generation_texts.TASKS[: max(settings.suites)]
        for seed in settings.seeds
    ]
    _fine_tune_all(recipe, context, experts, "fine-tune experts")


def _fine_tune_all(recipe: GenerationRecipe, context: Any, items: Sequence[tuple], description: str) -> None:
    missing = [item for item in items if not is_cached(*_expert(recipe, context.device, item))]
    context.map(partial(_fine_tune_one, recipe, context.device), missing, description)


def _expert(recipe: GenerationRecipe, device: torch.device, item: tuple[str, str, float, int]) -> tuple:
    name, task, rate, seed = item
    return generation_experts.expert(_base(name, recipe), generation_texts.task(task), rate, seed, recipe, device)


def _fine_tune_one(recipe: GenerationRecipe, device: torch.device, item: tuple[str, str, float, int]) -> None:
    artefact(*_expert(recipe, device, item))
