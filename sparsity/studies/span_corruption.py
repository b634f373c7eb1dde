"""Span corruption as a task: a T5 from scratch learns to fill in the spans that are missing from a text.

Two texts: "python" (common.data.text, no download) and "c4" (sparsity.studies.data.c4, the paper scale).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.cache import cache_key
from common.data import hub, text
from common.models import t5 as models
from common.models.t5 import IGNORED
from common.training import ShuffledBatches, TrainingRecipe
from sparsity.studies.data import c4, corruption
from sparsity.studies.task import Batch, Task, as_it_is

OVERLAP = 8  # training windows begin every raw length / 8 tokens
EVALUATION_BATCH = 128
EVALUATION_SEED = 10_000


@dataclass(frozen=True)
class SpanCorruption:
    """Which text, in which tokens, for which T5."""

    data: str = "python"  # "python" or "c4"
    vocabulary: int = 0  # ids of a BPE trained on the Python text; 0: bytes. C4 has the tokenizer of `model`
    length: int = 64  # input tokens, sentinels and END included
    width: int = 64
    depth: int = 2  # layers of the encoder, and of the decoder
    heads: int = 4
    d_ff: int = 512
    dropout: float = 0.0
    megabytes: float = 8.0  # most Python text for training
    evaluation_rows: int = 1024  # of the validation and of the test split
    documents: int = 25_600_000  # of C4
    model: str = ""  # repository whose configuration and tokenizer are taken, for "c4"; sizes above then have no effect
    pretrained: bool = False  # whether its weights are taken too


def span_corruption_task(settings: SpanCorruption, device: torch.device) -> Task:
    """Return the task of these settings; its evaluation batches are on `device`.

    Batches are {"input_ids": (B, T), "attention_mask": (B, T) 0/1, "labels": (B, S) with −100 at padding}. The loss is
    T5's own: the mean cross-entropy over target tokens in nats, sentinels and END included. It is the mean over samples
    as well, since all rows have equally many target tokens. The score is each sample's mean cross-entropy per token,
    and the share of its target tokens that are the likeliest given those before them, in %.

    Raises:
        ValueError: unknown data, or sizes that do not fit.
    """
    if settings.pretrained and settings.data != "c4":
        raise ValueError(f"pretrained=True is for c4, whose tokenizer the network knows, got data={settings.data!r}")
    if settings.data == "python":
        return _python_task(settings, device)
    if settings.data == "c4":
        return _c4_task(settings, device)
    raise ValueError(f"unknown data {settings.data!r}; there are python and c4")


def _python_task(settings: SpanCorruption, device: torch.device) -> Task:
    corpus = text.corpus(settings.megabytes, settings.vocabulary)
    shape = corruption.shape_for(settings.length)
    sentinels = corpus.vocabulary + shape.spans  # sentinels are the last ids, as in T5
    sizes = (settings.width, settings.depth, settings.heads, settings.d_ff, settings.dropout)
    rows = settings.evaluation_rows
    return Task(
        key=cache_key({"task": settings, "text": corpus.digest}, _python_task),
        model=partial(models.t5, sentinels, *sizes),
        loss=loss,
        loader=partial(_python_loader, corpus.tokens["train"], shape, sentinels),
        batches=cache(lambda split: _batches(_spread(corpus.tokens[split], shape, sentinels, rows), device)),
        score=score,
        metric="token accuracy, %",
        masks=masks,
    )


class Windows(Dataset):
    """Corrupted windows of a token stream, one every `stride` tokens; a window's corruption depends on its index."""

    def __init__(self, tokens: Tensor, shape: corruption.Shape, sentinels: int, stride: int, seed: int):
        if len(tokens) < shape.raw:
            raise ValueError(f"a text of {len(tokens)} tokens is shorter than a row of {shape.raw}: more megabytes")
        self.windows = tokens.unfold(0, shape.raw, stride)  # (N, raw), a view
        self.shape, self.sentinels, self.seed = shape, sentinels, seed

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch of these windows."""
        rows = self.windows[torch.as_tensor(indices)]
        return _batch(*corruption.corrupt(rows, indices, self.shape, self.sentinels, self.seed))


def _python_loader(
    tokens: Tensor, shape: corruption.Shape, sentinels: int, recipe: TrainingRecipe, seed: int
) -> DataLoader:
    windows = Windows(tokens, shape, sentinels, max(1, shape.raw // OVERLAP), seed)
    return DataLoader(windows, batch_sampler=ShuffledBatches(len(windows), recipe, seed), collate_fn=as_it_is)


def _c4_task(settings: SpanCorruption, device: torch.device) -> Task:
    if not settings.model:
        raise ValueError("data='c4' needs model=, the repository of a T5, such as google-t5/t5-base")
    tokenizer, shape = models.t5_tokenizer(settings.model), corruption.shape_for(settings.length)
    if shape.spans > models.SENTINELS:
        most = f"{models.SENTINELS} sentinels of the tokenizer"
        raise ValueError(f"length={settings.length} has {shape.spans} spans, more than the {most}")
    commits = [hub.commit(c4.REPOSITORY, "dataset"), hub.commit(settings.model, "model")]
    rows = partial(DocumentRows, tokenizer, shape)
    count = settings.evaluation_rows
    return Task(
        key=cache_key({"task": settings, "commits": commits}, _c4_task),
        model=partial(models.t5_trained, settings.model)
        if settings.pretrained
        else partial(models.t5_like, settings.model, len(tokenizer)),
        loss=loss,
        loader=partial(_c4_loader, rows, settings.documents, 0 if device.type == "cpu" else c4.WORKERS),
        batches=cache(
            lambda split: _batches(rows(c4.Documents(split, count), EVALUATION_SEED).__getitems__(range(count)), device)
        ),
        score=score,
        metric="token accuracy, %",
        masks=masks,
    )


class DocumentRows(Dataset):
    """Corrupted rows: the n documents of a batch are concatenated and cut into at most n rows.

    The authors pad to n rows and learn to predict the padding. Here rows that would hold padding are left out.
    """

    def __init__(self, tokenizer: Any, shape: corruption.Shape, documents: c4.Documents, seed: int):
        self.tokenizer, self.shape, self.documents, self.seed = tokenizer, shape, documents, seed

    def __len__(self) -> int:
        return len(self.documents)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the rows of these documents; the corruption of row i depends on the number of the i-th of them."""
        lines = self.tokenizer(self.documents.texts(indices), return_attention_mask=False)["input_ids"]
        tokens = torch.tensor([token for line in lines for token in line])
        count, raw = min(len(indices), len(tokens) // self.shape.raw), self.shape.raw
        if not count:
            raise ValueError(f"{len(indices)} documents have {len(tokens)} tokens, fewer than a row of {raw}")
        rows = tokens[: count * raw].view(count, raw)
        return _batch(*corruption.corrupt(rows, list(indices)[:count], self.shape, len(self.tokenizer), self.seed))


def _c4_loader(
    rows: Callable[[c4.Documents, int], DocumentRows], count: int, workers: int, recipe: TrainingRecipe, seed: int
) -> DataLoader:
    documents = c4.Documents("train", count)
    order = c4.ShardedBatches(documents, recipe, seed)
    return DataLoader(rows(documents, seed), batch_sampler=order, collate_fn=as_it_is, num_workers=workers)


def _batch(inputs: Tensor, labels: Tensor) -> Batch:
    return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}


def _spread(tokens: Tensor, shape: corruption.Shape, sentinels: int, rows: int) -> Batch:
    """At most `rows` windows that do not overlap, spread evenly over the text, in one batch."""
    windows = Windows(tokens, shape, sentinels, shape.raw, EVALUATION_SEED)
    picks = torch.linspace(0, len(windows) - 1, min(rows, len(windows))).round().long()
    return windows.__getitems__(picks.tolist())


def _batches(rows: Batch, device: torch.device) -> Iterable[Batch]:
    """Cut one large batch into evaluation batches on the device."""
    parts = {name: tensor.to(device).split(EVALUATION_BATCH) for name, tensor in rows.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the target tokens of a batch, in nats."""
    return model(**batch, use_cache=False).loss


def score(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cross-entropy per target token (nats) and its share of tokens predicted right (%)."""
    labels = batch["labels"]
    logits = model(**batch, use_cache=False).logits.float()  # (B, S, V)
    real = labels != IGNORED
    entropy = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")  # (B, S)
    right = (logits.argmax(2) == labels) & real
    count = real.sum(1)
    return entropy.sum(1) / count, 100 * right.sum(1) / count


def masks(batch: Batch) -> Mapping[str, Tensor]:
    """Return where tokens are real in the two halves of a T5: {"encoder": (B, T) bool, "decoder": (B, S) bool}."""
    return {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != IGNORED}
