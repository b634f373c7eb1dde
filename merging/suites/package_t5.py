"""A small T5 of this project: trained on text-to-text tasks from the texts of installed packages, in half a minute.

Like Flan-T5, it has seen its experts' tasks in the same format, though only a few files, and other ones than theirs:
it understands the questions, and scores far below an expert.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from common import training
from common.cache import artefact
from common.data import text
from common.models import t5
from merging.suites import text_experts
from merging.suites.data import package_texts
from merging.suites.models import language
from merging.suites.text_experts import Base, Trainee

VOCABULARY = 4096
SIZES = (128, 2, 4, 512)  # width, layers of encoder and of decoder, heads, units of an MLP


def base(steps: int = 300) -> Base:
    """Return the T5 after `steps` steps on all tasks together, from the cache or else trained on the CPU.

    Source of the recipe: Chung et al., arXiv 2210.11416, in small: supervised tasks in one text-to-text format.
    """
    tasks = [package_texts.task(name) for name in package_texts.TASKS]
    inputs = {"steps": steps, "tasks": [task.key for task in tasks]}
    found = artefact("package_t5", inputs, partial(_train, steps))
    model = t5.t5(VOCABULARY, *SIZES)
    model.load_state_dict(load_file(found.path / "model.safetensors"), strict=False)  # the file has tied tensors once
    return Base(f"package_t5/{found.key}", model.eval(), _tokenizer(found.path), pooling="")


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = dict(zip(("pad_token", "eos_token", "unk_token"), text.SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=64, **names)


def _train(steps: int, folder: Path) -> None:
    rows = []  # (prompt, answer) of all tasks
    for task in map(package_texts.task, package_texts.TASKS):
        examples = task.split("base")
        rows += zip(map(task.prompt, examples.texts), map(task.answer, examples.targets), strict=True)
    text.train_bpe(itertools.chain.from_iterable(rows), VOCABULARY, ending=True).save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    model, recipe = t5.t5(VOCABULARY, *SIZES), training.TrainingRecipe(steps, 32, 2e-3)
    network = language.Generator(model, _tokenizer(folder), ())
    sampler = training.ShuffledBatches(len(rows), recipe, seed=0)
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=partial(_collate, network.tokenizer))
    cpu = torch.device("cpu")
    training.fit(Trainee(network), lambda model, batch: model(*batch), loader, recipe, cpu, "train the T5")
    save_file(language.parameters(model), folder / "model.safetensors")


def _collate(tokenizer: Any, rows: list[tuple[str, str]]) -> tuple[dict[str, Tensor], Tensor]:
    prompts, answers = zip(*rows, strict=True)
    return text_experts.tokens(tokenizer, [prompts]), text_experts.answer_tokens(tokenizer, answers)
