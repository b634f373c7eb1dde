"""Experts on texts, trained here: an encoder with a linear head, or a T5 that writes answers; full, LoRA or IA³."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from common import training
from common.cache import Artefact, artefact
from common.models.t5 import IGNORED
from merging.suites.data.text_tasks import Examples, TextTask
from merging.suites.models import adapted, language

EVALUATION_BATCH = 64
VALIDATED = 200  # texts on which experts are validated while they are trained
POOL = 8  # batches that are sorted by length together
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # inverse penalties of the logistic regression

Tuned = Literal["full", "lora", "ia3"]


class FineTuning(NamedTuple):
    """How experts of a base are trained: everything is tuned ("full"), or an adapter ("lora", "ia3")."""

    tuned: Tuned
    learning_rate: float


@dataclass(frozen=True)
class TextRecipe:
    """How experts are trained, and on how many texts they are scored (0: on all)."""

    steps: int = 40
    t5_steps: int = 150  # in place of `steps` where the base is a T5
    batch_size: int = 32
    rank: int = 8  # of LoRA
    base_steps: int = 300  # of the T5 that is trained here
    head: float = 1e-3  # learning rate of the linear head, which starts from the probe
    rate_tasks: int = 0  # number of tasks on whose validation texts the experts' learning rate is chosen; 0: it is not
    probe_texts: int = 500
    validation_texts: int = 32
    test_texts: int = 80
    validate_every: int = (
        0  # steps: of the states after so many, an expert is that of lowest validation loss; 0: the last
    )

    def training(self, base: "Base", tuning: FineTuning) -> training.TrainingRecipe:
        """Return the recipe of an expert; adapters have no weight decay, since IA³'s vectors start from 1."""
        steps, decay = self.steps if base.pooling else self.t5_steps, 0.01 if tuning.tuned == "full" else 0.0
        return training.TrainingRecipe(steps, self.batch_size, tuning.learning_rate, weight_decay=decay)


@dataclass(frozen=True)
class Base:
    """A pretrained model with its tokenizer, and how texts become its inputs.

    Args:
        name: of the model; it stands for its weights and tokenizer in cache keys.
        model: an encoder, or a T5.
        tokenizer: one of transformers.
        pooling: of an encoder's hidden states ("mean", "cls", "last"); "" for a T5, which answers in text.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    pooling: str = "mean"

    def inputs(self, task: TextTask, texts: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
        """Return token ids and masks (B, T) of texts, padded to the longest."""
        return tokens(self.tokenizer, zip(*texts, strict=True) if self.pooling else [map(task.prompt, texts)])

    def targets(self, task: TextTask, targets: Sequence[float]) -> Tensor:
        """Return what the loss compares with: classes (B,), or the token ids of the answers (B, S), −100 at padding."""
        if self.pooling:
            return torch.tensor(targets).long()
        return answer_tokens(self.tokenizer, map(task.answer, targets))

    def labels(self, task: TextTask, targets: Sequence[float]) -> Tensor:
        """Return what predictions are compared with (B,): classes, or numbers."""
        return torch.tensor(targets).long() if task.classes else torch.tensor(targets, dtype=torch.float32)


class Trainee(nn.Module):
    """A model in training: its forward is the loss, so that several devices stay in step."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, over samples or over the tokens of the answers."""
        if targets.ndim == 1:
            return F.cross_entropy(self.network.logits(inputs), targets)
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return self.network.encoder(**read, labels=targets, use_cache=False).loss


def tokens(tokenizer: Any, fields: Iterable[Iterable[str]]) -> dict[str, Tensor]:
    """Return token ids and masks (B, T) of B texts, given as one list of texts or two (pairs)."""
    encoded = tokenizer(*map(list, fields), padding=True, truncation=True, return_tensors="pt")
    return {name: encoded[name] for name in language.READ if name in encoded}


def answer_tokens(tokenizer: Any, answers: Iterable[str]) -> Tensor:
    """Return the token ids of B answers (B, S), −100 at padding."""
    encoded = tokenizer(list(answers), padding=True, return_tensors="pt")
    return encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)


def network(base: Base, task: TextTask, head: Mapping[str, Tensor] | None) -> nn.Module:
    """Return what predicts a task's classes: the encoder under a head (weight, and bias if it has one), or a T5."""
    if head is None:
        return language.Generator(base.model, base.tokenizer, task.answers or task.classes)
    return language.Classifier(base.model, base.pooling, head["weight"], head.get("bias"))


# Data ----------------------------------------------------------------------------------------------------------------


def first(examples: Examples, count: int | None) -> Examples:
    """Return the first `count` examples (None: all), which are balanced if the task is."""
    return Examples(examples.texts[:count], examples.targets[:count])


def evaluation_batches(base: Base, task: TextTask, examples: Examples) -> DataLoader:
    """Return a loader of all examples in batches of inputs, labels (B,), short texts first."""
    order = sorted(range(len(examples.texts)), key=lambda index: sum(map(len, examples.texts[index])))
    rows = [(examples.texts[index], examples.targets[index]) for index in order]
    return DataLoader(rows, batch_size=EVALUATION_BATCH, collate_fn=partial(_scored, base, task))


def _scored(base: Base, task: TextTask, rows: Sequence[tuple]) -> tuple[dict[str, Tensor], Tensor]:
    texts, targets = zip(*rows, strict=True)
    return base.inputs(task, texts), base.labels(task, targets)


def _trained(base: Base, task: TextTask, rows: Sequence[tuple]) -> tuple[dict[str, Tensor], Tensor]:
    texts, targets = zip(*rows, strict=True)
    return base.inputs(task, texts), base.targets(task, targets)


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of indices of about equally long texts, so that little is padding.

    Pools of `POOL` batches hold each class equally often; each pool is sorted by length and cut into batches.
    """

    drop_last = False

    def __init__(self, labels: Tensor, lengths: Sequence[int], recipe: training.TrainingRecipe, seed: int):
        pools = replace(recipe, steps=math.ceil(recipe.steps / POOL), batch_size=POOL * recipe.batch_size)
        self.pools, self.lengths = training.RandomBatches(labels, pools, seed), lengths
        self.batch_size, self.steps, self.seed = recipe.batch_size, recipe.steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        generator, left = torch.Generator().manual_seed(self.seed), self.steps
        for pool in self.pools:
            pool.sort(key=self.lengths.__getitem__)
            for place in torch.randperm(POOL, generator=generator)[:left].tolist():
                yield pool[place * self.batch_size : (place + 1) * self.batch_size]
            left -= POOL


def training_batches(base: Base, task: TextTask, recipe: training.TrainingRecipe, seed: int) -> DataLoader:
    """Return a loader of `recipe.steps` batches of inputs, targets: texts of similar length, classes equally often."""
    examples = task.split("train")
    rows = list(zip(examples.texts, examples.targets, strict=True))
    lengths = [sum(map(len, text)) for text in examples.texts]
    sampler = LengthGroupedBatches(torch.tensor(examples.targets), lengths, recipe, seed)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=partial(_trained, base, task))


# The probe -----------------------------------------------------------------------------------------------------------


def probe(base: Base, task: TextTask, recipe: TextRecipe, device: torch.device) -> Artefact:
    """Return a linear probe on the frozen encoder: the head that experts start from, and its score.

    It is a logistic regression on pooled features; its penalty is chosen on validation data. The artefact holds
    head.safetensors (weight (C, d), bias (C,)) and scores.json (chance and probe in %, test: number of test texts).

    Args:
        base: with an encoder.
        task: of classes.
        recipe: how many texts the probe is fitted and scored on.
        device: where the features are computed.
    """
    texts = (recipe.probe_texts, recipe.test_texts)
    inputs = {"base": base.name, "task": task.key, "texts": texts, "device": device.type}
    return artefact("text_probe", inputs, partial(_probe, base, task, recipe, device))


def _probe(base: Base, task: TextTask, recipe: TextRecipe, device: torch.device, folder: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    limits = {"train": recipe.probe_texts, "validation": recipe.probe_texts, "test": recipe.test_texts or None}
    data = {split: features(base, task, first(task.split(split), count), device) for split, count in limits.items()}
    fitted = [LogisticRegression(C=strength, max_iter=2000).fit(*data["train"]) for strength in PROBE_STRENGTHS]
    best = max(fitted, key=lambda model: model.score(*data["validation"]))
    weight, bias = (torch.tensor(array, dtype=torch.float32) for array in (best.coef_, best.intercept_))
    if len(weight) == 1:  # of two classes only the difference is fitted
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    save_file({"weight": weight.contiguous(), "bias": bias.contiguous()}, folder / "head.safetensors")
    labels = data["test"][1]
    scores = {"chance": np.bincount(labels).max() / len(labels), "probe": best.score(*data["test"])}
    text = json.dumps({name: 100 * float(share) for name, share in scores.items()} | {"test": len(labels)})
    (folder / "scores.json").write_text(text)


@torch.inference_mode()
def features(base: Base, task: TextTask, examples: Examples, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Return the pooled features (n, d) of the frozen encoder, and the classes (n,)."""
    network = language.Classifier(base.model.to(device).eval(), base.pooling, torch.zeros(1, 1), None)
    found, labels = [], []
    for inputs, targets in evaluation_batches(base, task, examples):
        found.append(network.features({name: tensor.to(device) for name, tensor in inputs.items()}).cpu())
        labels.append(targets)
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


# Experts -------------------------------------------------------------------------------------------------------------


def expert(
    base: Base, task: TextTask, tuning: FineTuning, seed: int, recipe: TextRecipe, device: torch.device
) -> tuple[str, dict[str, Any], Callable[[Path], None]]:
    """Return kind, inputs and builder of an expert's artefact; arguments as for `fine_tune`."""
    own = {"recipe": recipe.training(base, tuning), "head": recipe.head, "probe_texts": recipe.probe_texts}
    inputs = {"base": base.name, "task": task.key, "tuned": tuning.tuned, "seed": seed, "device": device.type} | own
    inputs |= {"rank": recipe.rank} if tuning.tuned == "lora" else {}
    inputs |= {"validate_every": recipe.validate_every} if recipe.validate_every else {}
    return "text_expert", inputs, partial(_fine_tune, base, task, tuning, seed, recipe, device)


def fine_tune(
    base: Base, task: TextTask, tuning: FineTuning, seed: int, recipe: TextRecipe, device: torch.device
) -> Artefact:
    """Return a task's expert. The artefact holds model.safetensors or adapter/, and head.safetensors for an encoder.

    With `recipe.validate_every` it also holds progress.json: steps done, and the validation loss (nats) after them.

    Args:
        base: what it starts from.
        task: what it learns.
        tuning: what is tuned, and how fast.
        seed: of the data's order and of LoRA's start.
        recipe: further settings.
        device: where it is trained.
    """
    return artefact(*expert(base, task, tuning, seed, recipe, device))


def _fine_tune(
    base: Base,
    task: TextTask,
    tuning: FineTuning,
    seed: int,
    recipe: TextRecipe,
    device: torch.device,
    folder: Path,
) -> None:
    torch.manual_seed(seed)
    model, own = copy.deepcopy(base.model), recipe.training(base, tuning)
    model = model if tuning.tuned == "full" else adapted.adapt(model, tuning.tuned, recipe.rank)
    network = language.Generator(model, base.tokenizer, task.answers or task.classes)
    if base.pooling:
        head = load_file(probe(base, task, recipe, device).path / "head.safetensors")
        network = language.Classifier(model, base.pooling, head["weight"], head["bias"])
    loader = training_batches(base, task, own, seed)
    groups = partial(_groups, head_rate=recipe.head, weight_decay=own.weight_decay)
    trainee = Trainee(network)
    lowest = Lowest(trainee, _validation_batches(base, task), recipe.validate_every) if recipe.validate_every else None
    training.fit(trainee, lambda model, batch: model(*batch), loader, own, device, groups=groups, after_step=lowest)
    if lowest:
        lowest.restore()
        (folder / "progress.json").write_text(json.dumps(lowest.seen))
    if tuning.tuned == "full":
        save_file(language.parameters(trainee.network.encoder), folder / "model.safetensors")
    else:
        adapted.save(trainee.network.encoder, folder / "adapter")
    if base.pooling:
        weights = {"weight": trainee.network.head_weight.detach(), "bias": trainee.network.head_bias.detach()}
        save_file(weights, folder / "head.safetensors")


class Lowest:
    """Keeps the state of a model at its lowest validation loss; called after each step of `training.fit`.

    Args:
        model: in training; its forward takes a batch and returns the mean loss.
        batches: of the validation data.
        every: after how many steps the loss is looked at; it is once before the first step, too, which is no state of
            an expert.
    """

    def __init__(self, model: nn.Module, batches: Sequence[tuple[Any, Tensor]], every: int):
        self.model, self.batches, self.every = model, batches, every
        self.seen: list[tuple[int, float]] = []  # steps done, loss in nats
        self.state: dict[str, Tensor] = {}
        self._look(0)

    def __call__(self, done: int, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        if done % self.every == 0:
            self._look(done)

    def restore(self) -> None:
        """Give the model the kept state, on the device where the model is."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.state:
                    parameter.copy_(self.state[name])

    def _look(self, done: int) -> None:
        loss = self._loss()
        if done and all(loss < before for steps, before in self.seen if steps):
            named = self.model.named_parameters()
            self.state = {name: tensor.detach().clone() for name, tensor in named if tensor.requires_grad}
        self.seen.append((done, loss))

    @torch.no_grad()
    def _loss(self) -> float:
        training_mode, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()
        batches = [send_to_device(batch, device) for batch in self.batches]
        total = sum(float(self.model(inputs, targets)) * len(targets) for inputs, targets in batches)
        self.model.train(training_mode)
        return total / sum(len(targets) for _, targets in batches)


def _validation_batches(base: Base, task: TextTask) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return batches of inputs and targets of the task's first validation texts, VALIDATED at most."""
    examples = first(task.split("validation"), VALIDATED)
    rows = sorted(zip(examples.texts, examples.targets, strict=True), key=lambda row: sum(map(len, row[0])))
    starts = range(0, len(rows), EVALUATION_BATCH)
    return [_trained(base, task, rows[start : start + EVALUATION_BATCH]) for start in starts]


def _groups(model: nn.Module, head_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups in which the head has its own learning rate and no weight decay."""
    heads = [parameter for name, parameter in model.named_parameters() if ".head_" in name]
    known = {id(parameter) for parameter in heads}
    groups = training.decay_groups(model, weight_decay)
    groups = [group | {"params": [p for p in group["params"] if id(p) not in known]} for group in groups]
    return groups + ([{"params": heads, "weight_decay": 0.0, "lr": head_rate}] if heads else [])
