"""A pretrained language model distilled into itself, so that its MLPs may change while what it computes should not.

The network is MiniLM from an installed package (GELU), the text that of common.data.text: nothing is downloaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.cache import cache_key
from common.data import text
from common.models.minilm import MINILM, minilm
from common.training import ShuffledBatches, TrainingRecipe
from sparsity.studies.task import Batch, Task, as_it_is

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Distillation:
    """How much text, and in windows of how many tokens ([CLS] and [SEP] included)."""

    length: int = 64
    megabytes: float = 2.0  # most text for training
    evaluation_rows: int = 128  # of the validation and of the test split


def distillation_task(settings: Distillation, device: torch.device) -> Task:
    """Return the task of these settings; its evaluation batches are on `device`.

    Batches are {"input_ids": (B, T)} without padding; those for evaluation have the original's final states "states"
    (B, T, d) too. The loss is 1 − cosine between the final states of a token in the
    network and in the original, a mean over tokens. The score is 100 × the cosine of the sentence embeddings, which are
    means over tokens, in %.

    Raises:
        MissingResource: the package with MiniLM is not installed.
        ValueError: the text is shorter than a window, or a batch.
    """
    corpus = text.corpus(settings.megabytes)
    versions = {"text": corpus.digest, "model": metadata.version(MINILM)}
    windows = partial(_windows, settings.length, settings.megabytes)
    original = cache(lambda: minilm()[0].requires_grad_(False).to(device))
    return Task(
        key=cache_key({"task": settings, **versions}, distillation_task),
        model=lambda: minilm()[0],
        loss=lambda model, batch: _errors(model, original, batch)[0].mean(),
        loader=partial(_loader, windows),
        batches=cache(partial(_batches, windows, settings.evaluation_rows, original, device)),
        score=lambda model, batch: _errors(model, original, batch),
        metric="cosine with the original, %",
    )


def _errors(model: nn.Module, original: Callable[[], nn.Module], batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each sample's 1 − cosine of states, a mean over tokens, and 100 × the cosine of its embeddings: (B,)."""
    wanted = batch["states"] if "states" in batch else _states(original(), batch["input_ids"])  # (B, T, d)
    found = model(batch["input_ids"]).last_hidden_state
    losses = 1 - F.cosine_similarity(found, wanted, dim=-1).mean(1)
    return losses, 100 * F.cosine_similarity(found.mean(1), wanted.mean(1), dim=-1)


@torch.no_grad()
def _states(original: nn.Module, tokens: Tensor) -> Tensor:
    return original(tokens).last_hidden_state


@cache
def _windows(length: int, megabytes: float, split: str) -> Tensor:
    """Return the text of a split, tokenised for MiniLM, in windows that do not overlap: (N, length)."""
    symbols = text.corpus(megabytes).tokens[split]  # bytes + SPECIAL, every file ended by END
    characters = bytes((symbols[symbols >= text.SPECIAL] - text.SPECIAL).to(torch.uint8).tolist())
    _, tokenizer = minilm()
    lines = characters.decode("utf-8", "replace").splitlines()
    ids = tokenizer(lines, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for line in ids for token in line])
    inner = stream[: len(stream) // (length - 2) * (length - 2)].view(-1, length - 2)
    ends = [inner.new_full((len(inner), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return torch.cat([ends[0], inner, ends[1]], 1)


class Rows(Dataset):
    """Windows of tokens, indexed by whole batches."""

    def __init__(self, windows: Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the batch of these windows."""
        return {"input_ids": self.windows[torch.as_tensor(indices)]}


def _loader(windows: partial, recipe: TrainingRecipe, seed: int) -> DataLoader:
    rows = Rows(windows("train"))
    return DataLoader(rows, batch_sampler=ShuffledBatches(len(rows), recipe, seed), collate_fn=as_it_is)


def _batches(
    windows: partial, count: int, original: Callable[[], nn.Module], device: torch.device, split: str
) -> list[Batch]:
    found = windows(split)
    picks = torch.linspace(0, len(found) - 1, min(count, len(found))).round().long()  # spread over the text
    parts = found[picks].to(device).split(EVALUATION_BATCH)
    return [{"input_ids": part, "states": _states(original(), part)} for part in parts]
