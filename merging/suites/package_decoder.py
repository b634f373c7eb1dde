"""A small language model of this project, a Llama of 0.8 M parameters: trained on sources and tasks in half a minute.

As the T5 of `merging.suites.package_t5` it has seen its experts' tasks, though only a few files, and other ones than
theirs: it knows what is asked, and answers worse than an expert. The rest of what it reads is Python source.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import training
from common.cache import artefact
from common.data import text
from merging.suites.data import generation_texts
from merging.suites.generation_experts import Decoder, NextTokens, padded, question_and_answer
from merging.suites.models import language

VOCABULARY, WIDTH, LAYERS, HEADS = 1024, 128, 3, 4
LENGTH = 64  # tokens of a row
REPEATS = 48  # how often every question is there
BATCH, RATE = 16, 4e-3


def base(steps: int) -> Decoder:
    """Return the model after `steps` steps, from the cache or else trained on the CPU."""
    keys = [generation_texts.task(name).key for name in generation_texts.TASKS]
    inputs = {"steps": steps, "tasks": keys, "versions": text.versions()}
    found = artefact("package_decoder", inputs, partial(_train, steps))
    model = _llama()
    model.load_state_dict(load_file(found.path / "model.safetensors"), strict=False)  # the file has tied tensors once
    return Decoder(f"package_decoder/{found.key}", model.eval(), _tokenizer(found.path))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=text.PAD, bos_token_id=text.END, eos_token_id=text.END,
        initializer_range=WIDTH**-0.5,  # with 0.02, the default, attention stays uniform for hundreds of steps
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = dict(zip(("pad_token", "eos_token", "unk_token"), text.SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), padding_side="left", **names)


def _train(steps: int, folder: Path) -> None:
    tasks = map(generation_texts.task, generation_texts.TASKS)
    known = [(task, *row) for task in tasks for row in task.split("base")]
    sources = [source.replace("    ", " ") for source in generation_texts.base_sources()]
    pieces = [*sources, *(f"{question}{answer}" for _, question, answer in known)]
    # Every digit and every space becomes a token, so that words have the same tokens wherever they are copied to.
    apart = (re.sub(r" |(?<=\d)(?=\d)", "\n", piece) for piece in pieces)
    text.train_bpe(apart, VOCABULARY).save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    model, recipe = _llama(), training.TrainingRecipe(steps, BATCH, RATE)
    rows = _rows(Decoder("", model, _tokenizer(folder)), sources, known)
    loader = DataLoader(rows, batch_sampler=training.ShuffledBatches(len(rows), recipe, seed=0), collate_fn=_collate)
    cpu = torch.device("cpu")
    training.fit(NextTokens(model), lambda model, batch: model(*batch), loader, recipe, cpu, "train the decoder")
    save_file(language.parameters(model), folder / "model.safetensors")


def _rows(decoder: Decoder, sources: list[str], known: list[tuple]) -> list[tuple[Tensor, Tensor]]:
    """Return rows of tokens and targets (LENGTH,): questions with answers, and sources, mixed, one behind the other.

    Of a question only the answer is learnt, of a source every token.
    """
    plain = decoder.tokenizer(sources)["input_ids"]
    pieces = [([], ids[start : start + LENGTH]) for ids in plain for start in range(0, len(ids), LENGTH)]
    pieces += REPEATS * [question_and_answer(decoder, *row) for row in known]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [padded([pieces[index]]) for index in order]
    tokens, targets = (torch.cat([part[which][0] for part in parts]).split(LENGTH) for which in (0, 1))
    return list(zip(tokens, targets, strict=True))[:-1]  # the last row is incomplete


def _collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, targets = zip(*rows, strict=True)
    return torch.stack(tokens), torch.stack(targets)
