"""The work that no merge of files can leave out: all inputs are read, and one model is written; nothing is computed.

    python -m merging.suites.copy_floor --models BASE EXPERT … --shard-size 5GB --out DIR

It reads with what `python -m merging` reads with, range by range, and writes with what that writes with, shard by shard
and on to the disk, so that a merge cannot be faster. What it writes is the base.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro
from torch import Tensor

from merging.checkpoints import Entry, open_checkpoint
from merging.command.changes import RANGE
from merging.command.recipe import shard_bytes
from merging.command.shards import TensorSpec, Write, arrange, begin


def copy(models: tuple[str, ...], out: Path, shard_size: str = "5GB") -> None:
    """Read all models, which have the same tensors, and write the first of them.

    Args:
        models: folders or files.
        out: folder of the copy.
        shard_size: of its files.
    """
    base, *experts = map(open_checkpoint, models)
    specs = ((name, [TensorSpec(name, entry.dtype, entry.shape)]) for name, entry in base.entries.items())
    shards = arrange(specs, shard_bytes(shard_size))

    def write_all(names: Sequence[str], write: Write) -> None:
        for name in names:
            write(name, _read(base.entries[name], [expert.entries[name] for expert in experts]))

    with begin(out, "copy", shards) as files:
        for shard in shards:
            files.write(shard, lambda write, names=shard.steps: write_all(names, write))
        files.finish()


def _read(entry: Entry, others: Sequence[Entry]) -> Iterator[Tensor]:
    for start in range(0, entry.count, RANGE):
        stop = min(start + RANGE, entry.count)
        for other in others:
            other.read(start, stop)
        yield entry.read(start, stop)


if __name__ == "__main__":
    tyro.cli(copy)
