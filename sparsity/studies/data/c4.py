"""C4 (English), the text of the paper scale: documents from the shards of a public Hub repository, as they are needed.

What is stated here, and where each fact was read (public pages):

    fact                                    source
    --------------------------------------  -------------------------------------------------------------------------
    columns text, timestamp, url (strings)  card of allenai/c4, config en
    364,868,892 + 364,608 documents         the same card
    1024 + 8 shards, file names             public scripts that read en/c4-train.00000-of-01024.json.gz and
                                            en/c4-validation.00000-of-00008.json.gz from allenai/c4
    356,317 documents in a shard            card of a copy of one shard, and 364,868,892 / 1024 = 356,317.3; other
                                            shards were not counted: a shorter one is an error

C4 has no test split: validation is the second validation shard, test the first.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler

from common.data import hub
from common.training import TrainingRecipe

REPOSITORY = "allenai/c4"
SHARDS = {"train": 1024, "validation": 8}
SHARD_DOCUMENTS = 356_317
CHOICE_SEED = 42  # of the shards that are taken when not all documents are
EVALUATION_SHARD = {"test": 0, "validation": 1}
OPEN_SHARDS = 2
WORKERS = 8  # loader processes, if the model is on a GPU


class Documents:
    """The first `count` documents of a split, by number; a shard is downloaded when one of its documents is read.

    The training shards are taken in a random order with a fixed seed. One is 0.3 GB to download and 0.8 GB unpacked
    (in the cache of `datasets`).

    Raises:
        ValueError: an unknown split, or more documents than it has.
    """

    def __init__(self, split: str, count: int):
        if split not in ("train", *EVALUATION_SHARD):
            raise ValueError(f"unknown split {split!r}; there are train, {', '.join(EVALUATION_SHARD)}")
        self.kind = "train" if split == "train" else "validation"
        if split == "train":
            self.shards = hub.permutation(SHARDS["train"], CHOICE_SEED)[: math.ceil(count / SHARD_DOCUMENTS)]
        else:
            self.shards = [EVALUATION_SHARD[split]]
        most = len(self.shards) * SHARD_DOCUMENTS
        if not 0 < count <= most:
            raise ValueError(f"split {split} of C4: documents must be 1 to {most}, got {count}")
        self.count = count
        self._open: dict[int, Any] = {}  # the shards read last

    def __len__(self) -> int:
        return self.count

    def texts(self, numbers: Sequence[int]) -> list[str]:
        """Return the texts of these documents."""
        places = [divmod(number, SHARD_DOCUMENTS) for number in numbers]
        return [self._shard(shard)[row] for shard, row in places]

    def _shard(self, position: int) -> Any:
        """Return the column of texts of a shard."""
        if position not in self._open:
            if len(self._open) == OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            needed = min(SHARD_DOCUMENTS, self.count - position * SHARD_DOCUMENTS)
            self._open[position] = _read(shard_name(self.kind, self.shards[position]), needed)
        return self._open[position]


def shard_name(kind: str, index: int) -> str:
    """Return the path of a shard in the repository."""
    return f"en/c4-{kind}.{index:05d}-of-{SHARDS[kind]:05d}.json.gz"


def _read(name: str, needed: int) -> Any:
    """Return the column of texts of a shard, which must hold at least as many as needed."""
    rows = hub.load_rows(REPOSITORY, name, {"text": "Value"})
    if len(rows) < needed:
        raise ValueError(f"{REPOSITORY}, {name}: {len(rows)} documents, expected at least {needed}")
    return rows["text"]


class ShardedBatches(Sampler[list[int]]):
    """Batches of indices: every epoch the shards in a new seeded order, and the documents of each in another.

    So a run needs one shard after the other, and can be continued without reading the documents of earlier batches.

    Raises:
        ValueError: there are fewer documents than a batch holds.
    """

    drop_last = True

    def __init__(self, documents: Documents, recipe: TrainingRecipe, seed: int):
        if len(documents) < recipe.batch_size:
            raise ValueError(f"a batch holds {recipe.batch_size} documents, but there are only {len(documents)}")
        self.count, self.shards = len(documents), len(documents.shards)
        self.batch_size, self.steps, self.seed = recipe.batch_size, recipe.steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        numbers = self._numbers()
        for _ in range(self.steps):
            yield list(islice(numbers, self.batch_size))

    def _numbers(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for shard in torch.randperm(self.shards, generator=generator).tolist():
                first = shard * SHARD_DOCUMENTS
                size = min(SHARD_DOCUMENTS, self.count - first)
                yield from (first + torch.randperm(size, generator=generator)).tolist()
