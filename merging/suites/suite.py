"""A merging suite: one pretrained model, one expert and one frozen head per task, validation and test data.

Experiments see only `Suite` and `measure_suites`; merging.suites.vision and merging.suites.language build the suites.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common import evaluation
from merging.task_vectors import task_vector

State = dict[str, Tensor]
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Suite:
    """What merging needs: task names, one network per task that predicts labels, states of their encoder, and data.

    A network maps a batch of inputs to predicted labels (B,): classes or, for a regression, numbers. Its part
    `encoder`, the same module in all of them, is what is merged; the rest of it, its head, belongs to the task and
    stays as it is.
    """

    key: str  # a hash of everything below, for cache keys of what is measured on the suite
    tasks: tuple[str, ...]
    networks: tuple[nn.Module, ...]
    pretrained: State  # of the encoder
    experts: tuple[State, ...]
    batches: Callable[[str, str], Iterable[tuple[Any, Tensor]]]  # (task, split) → batches of inputs, labels (B,)
    adapters: tuple[Path, ...] = ()  # folders, in peft's format, of experts that are adapters

    @property
    def encoder(self) -> nn.Module:
        """What all networks share."""
        return self.networks[0].encoder

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return next(iter(self.pretrained.values())).device

    def task_vectors(self) -> list[State]:
        """Return for each task what fine-tuning changed, expert − pretrained."""
        return [task_vector(expert, self.pretrained) for expert in self.experts]

    def answers(
        self, states: Sequence[State], split: str = "test", tasks: Sequence[str] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return for each task what the S models predict, (S, n), and the labels, (n,).

        Args:
            states: S states of the encoder.
            split: "test" or "validation".
            tasks: names of those to answer; None: all.
        """
        return [
            evaluation.predictions(network, states, self.batches(task, split))
            for task, network in zip(self.tasks, self.networks, strict=True)
            if tasks is None or task in tasks
        ]

    def scores(self, states: Sequence[State], split: str = "test", tasks: Sequence[str] | None = None) -> list[float]:
        """Return the mean score (%) of each of the S models over the tasks; arguments as for `answers`."""
        answers = self.answers(states, split, tasks)
        by_task = [[evaluation.score(own, labels) for own in predicted] for predicted, labels in answers]
        return [sum(values) / len(values) for values in zip(*by_task, strict=True)]

    def rows(self, labelled: Sequence[tuple[dict[str, Any], State]], pairs: Sequence[dict[str, int]] = ()) -> Rows:
        """Yield one table row for each task and model: its labels, score (%) and number of test samples ("images").

        Args:
            labelled: labels (columns) and state of each model.
            pairs: for each model {suffix: index of another model}. The columns gained{suffix} and lost{suffix} then
                count the samples that only this model, or only the other one, gets right, for a paired comparison.
        """
        answers = self.answers([state for _, state in labelled])
        for task, (predicted, labels) in zip(self.tasks, answers, strict=True):
            errors = evaluation.errors(predicted, labels)
            for index, (columns, _) in enumerate(labelled):
                row = {**columns, "task": task, "metric": evaluation.metric(labels)}
                row |= {"value": evaluation.score(predicted[index], labels), "images": len(labels)}
                for suffix, other in pairs[index].items() if pairs else ():
                    row["gained" + suffix] = int((errors[index] < errors[other]).sum())
                    row["lost" + suffix] = int((errors[index] > errors[other]).sum())
                yield row

    def own_rows(self) -> Rows:
        """Yield the rows of the two reference models on each task: "pretrained", and the task's own "expert"."""
        states = {"pretrained": [self.pretrained] * len(self.tasks), "expert": self.experts}
        for method, models in states.items():
            for task, state in zip(self.tasks, models, strict=True):
                ((predicted, labels),) = self.answers([state], tasks=[task])
                row = {"method": method, "task": task, "metric": evaluation.metric(labels)}
                yield row | {"value": evaluation.score(predicted[0], labels), "images": len(labels)}


def measure_suites(
    kind: ModuleType,
    settings: Any,
    context: Any,
    measure: Callable[..., Iterable[dict[str, Any]]],
    parts: Sequence[tuple[Any, ...]] = ((),),
) -> Rows:
    """Train what is missing, then yield the rows of every backbone, suite and seed, measured in parallel processes.

    Args:
        kind: merging.suites.vision or merging.suites.language, which knows the backbones: `prepare(settings, context)`
            trains, `suite(backbone, tasks, seed, recipe, device)` builds, `task_names(backbone)` lists the tasks.
        settings: with backbones, suites (numbers of tasks; a backbone with fewer takes all it has), seeds and recipe.
        context: of the run, a `common.lab.run.Context`.
        measure: (settings, suite, backbone, seed, *part) → rows, to which seed, suite and backbone are added. It is a
            function of a module or script, so that other processes find it.
        parts: further arguments of `measure`, such as a merger: each part of a suite is measured independently.
    """
    with context.stage("train"):
        kind.prepare(settings, context)
    units = [
        (backbone, min(tasks, len(kind.task_names(backbone))), seed, part)
        for backbone in settings.backbones
        for tasks in sorted(settings.suites, reverse=True)
        for seed in settings.seeds
        for part in parts
    ]
    function = partial(_measure_unit, kind.suite, settings, context.device, measure)
    with context.stage("merge and measure"):
        for rows in context.map(function, list(dict.fromkeys(units)), "merge and measure"):
            yield from rows


def _measure_unit(
    build: Callable[..., Suite],
    settings: Any,
    device: torch.device,
    measure: Callable[..., Iterable[dict[str, Any]]],
    unit: tuple,
) -> list[dict[str, Any]]:
    backbone, tasks, seed, part = unit
    suite = build(backbone, tasks, seed, settings.recipe, device)
    rows = measure(settings, suite, backbone, seed, *part)
    return [{"seed": seed, "suite": tasks, "backbone": backbone, **row} for row in rows]
