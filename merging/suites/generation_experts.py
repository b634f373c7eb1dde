"""Experts that write their answers, trained here: LoRA on a language model, scored by what it writes greedily."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from common import training
from common.cache import Artefact, artefact
from common.models.t5 import IGNORED
from merging.suites.data.generation_texts import GenerationTask, Questions
from merging.suites.models import adapted

EVALUATION_BATCH = 128
DOCSTRING_TOKENS = 64  # a longer one is cut
DOCSTRING_BATCH = 16


@dataclass(frozen=True)
class GenerationRecipe:
    """How experts are trained, and on how many questions and docstrings they are scored."""

    steps: int = 160
    batch_size: int = 32
    rank: int = 8  # of LoRA
    base_steps: int = 200  # of the decoder that is trained here
    rate_tasks: int = 3  # number of tasks whose validation questions choose the learning rate; 0: it is not chosen
    validation_questions: int = 48
    test_questions: int = 100
    docstrings: int = 48

    def training(self, learning_rate: float) -> training.TrainingRecipe:
        """Return the recipe of an expert; LoRA has no weight decay, as everywhere in this project."""
        return training.TrainingRecipe(self.steps, self.batch_size, learning_rate, weight_decay=0.0)


@dataclass(frozen=True)
class Decoder:
    """A language model with its tokenizer.

    Args:
        name: of the model; it stands for its weights and tokenizer in cache keys.
        model: a causal language model.
        tokenizer: one of transformers, which pads on the left.
        chat: whether it was tuned to follow instructions, and is asked through its chat template.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    chat: bool = False

    def prompt(self, task: GenerationTask, question: str) -> str:
        """Return what the model reads before it answers."""
        if not self.chat:
            return f"{task.name}: {question} =>"
        message = {"role": "user", "content": f"{task.instruction}\n\n{question}"}
        return self.tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

    def prompts(self, task: GenerationTask, questions: Iterable[str]) -> dict[str, Tensor]:
        """Return token ids and masks (B, T) of questions, padded on the left."""
        words = [self.prompt(task, question) for question in questions]
        encoded = self.tokenizer(words, padding=True, add_special_tokens=False, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class Writer(nn.Module):
    """Answers a batch of questions greedily; what it predicts of each is the number that stands for the answer.

    Args:
        decoder: whose model answers; as in every network of a suite, `encoder` is the part that is merged.
        task: says what counts in an answer, and how long it may be.
    """

    def __init__(self, decoder: Decoder, task: GenerationTask):
        super().__init__()
        self.encoder, self.tokenizer, self.task = decoder.model, decoder.tokenizer, task

    def texts(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Return what the model writes after each prompt, special tokens removed."""
        tokens = self.encoder.generate(
            **batch,
            max_new_tokens=self.task.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return `number_of` what is written (B,) int64, −1 for what is no answer.

        Args:
            batch: input_ids and attention_mask (B, T), padded on the left.
        """
        read = [self.task.read(words) for words in self.texts(batch)]
        found = [number_of(words) if words else -1 for words in read]
        return torch.tensor(found, device=batch["input_ids"].device)


def number_of(words: str) -> int:
    """Return a number in [0, 2⁵⁶) for a text, a hash of it: equal texts have equal numbers, others in effect never."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")


class NextTokens(nn.Module):
    """A language model in training: its forward is the loss, so that several devices stay in step."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats over the targets (B, T) that are not −100."""
        return self.model(input_ids=tokens, labels=targets, use_cache=False).loss


# Data ----------------------------------------------------------------------------------------------------------------


def question_and_answer(decoder: Decoder, task: GenerationTask, question: str, answer: str) -> tuple[list, list]:
    """Return the token ids of a prompt, and those of its answer with the end behind them."""
    space = "" if decoder.chat else " "  # a chat template ends in a line break
    encode = partial(decoder.tokenizer, add_special_tokens=False)
    ids = encode(decoder.prompt(task, question))["input_ids"], encode(f"{space}{answer}")["input_ids"]
    return ids[0], [*ids[1], decoder.tokenizer.eos_token_id]


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Return tokens and targets (B, T) of rows of given and of learnt tokens; given ones and padding are no targets.

    Rows are padded on the right, where causal attention needs no mask.
    """
    longest = max(len(given) + len(learnt) for given, learnt in rows)
    tokens = [given + learnt + [0] * (longest - len(given) - len(learnt)) for given, learnt in rows]
    targets = [
        [IGNORED] * len(given) + learnt + [IGNORED] * (longest - len(given) - len(learnt)) for given, learnt in rows
    ]
    return torch.tensor(tokens), torch.tensor(targets)


def training_batches(decoder: Decoder, task: GenerationTask, recipe: training.TrainingRecipe, seed: int) -> DataLoader:
    """Return a loader of `recipe.steps` batches of tokens and targets: questions, and answers to be learnt."""
    rows = [question_and_answer(decoder, task, *row) for row in task.split("train")]
    return DataLoader(rows, batch_sampler=training.ShuffledBatches(len(rows), recipe, seed), collate_fn=padded)


def evaluation_batches(decoder: Decoder, task: GenerationTask, questions: Questions) -> DataLoader:
    """Return a loader of all questions: batches of prompts, and the numbers (B,) of the right answers."""
    rows = sorted(questions, key=lambda row: len(row[0]))
    return DataLoader(rows, batch_size=EVALUATION_BATCH, collate_fn=partial(_scored, decoder, task))


def _scored(decoder: Decoder, task: GenerationTask, rows: Questions) -> tuple[dict[str, Tensor], Tensor]:
    questions, answers = zip(*rows, strict=True)
    return decoder.prompts(task, questions), torch.tensor([number_of(task.read(answer)) for answer in answers])


def document_batches(decoder: Decoder, documents: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Return batches of tokens and targets (B, T) of documents, short ones first."""
    ids = [decoder.tokenizer(words)["input_ids"][:DOCSTRING_TOKENS] for words in documents]
    ids.sort(key=len)
    starts = range(0, len(ids), DOCSTRING_BATCH)
    return [padded([(row[:1], row[1:]) for row in ids[start : start + DOCSTRING_BATCH]]) for start in starts]


@torch.inference_mode()
def perplexity(model: nn.Module, state: Mapping[str, Tensor], batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return exp of the mean cross-entropy per token of documents under a model run with another state.

    Args:
        model: a causal language model; its own parameters are left unchanged.
        state: the tensors that differ, on the device of the model.
        batches: tokens and targets (B, T).
    """
    device, total, count = next(iter(state.values())).device, 0.0, 0
    for tokens, targets in send_to_device(list(batches), device):
        logits = functional_call(model, dict(state), (), {"input_ids": tokens, "use_cache": False}).logits
        sums = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), reduction="sum")
        total, count = total + float(sums), count + int((targets[:, 1:] != IGNORED).sum())
    return math.exp(min(total / count, 700.0))


# Experts -------------------------------------------------------------------------------------------------------------


def expert(
    decoder: Decoder, task: GenerationTask, learning_rate: float, seed: int, recipe: GenerationRecipe, device: Any
) -> tuple[str, dict[str, Any], Callable[[Path], None]]:
    """Return kind, inputs and builder of an expert's artefact; arguments as for `fine_tune`."""
    inputs = {"base": decoder.name, "task": task.key, "recipe": recipe.training(learning_rate), "rank": recipe.rank}
    inputs |= {"seed": seed, "device": device.type}
    return "generation_expert", inputs, partial(_fine_tune, decoder, task, learning_rate, seed, recipe, device)


def fine_tune(
    decoder: Decoder, task: GenerationTask, learning_rate: float, seed: int, recipe: GenerationRecipe, device: Any
) -> Artefact:
    """Return a task's expert; the artefact holds adapter/, in peft's format.

    Args:
        decoder: what it starts from.
        task: what it learns.
        learning_rate: at the end of warm-up.
        seed: of the data's order and of LoRA's start.
        recipe: further settings.
        device: where it is trained.
    """
    return artefact(*expert(decoder, task, learning_rate, seed, recipe, device))


def _fine_tune(
    decoder: Decoder,
    task: GenerationTask,
    learning_rate: float,
    seed: int,
    recipe: GenerationRecipe,
    device: Any,
    folder: Path,
) -> None:
    torch.manual_seed(seed)
    model, own = adapted.adapt(copy.deepcopy(decoder.model), "lora", recipe.rank), recipe.training(learning_rate)
    loader = training_batches(decoder, task, own, seed)
    training.fit(NextTokens(model), lambda model, batch: model(*batch), loader, own, device)
    adapted.save(model, folder / "adapter")
