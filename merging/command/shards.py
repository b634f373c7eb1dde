"""Writing a checkpoint shard by shard: the header first, then each tensor at its place, in any order, by any thread.

Names, dtypes and shapes are known beforehand, so that every shard and its header are laid out before the first tensor
is merged. Until everything is in place one folder stands beside the output NAME:

    .NAME.partial/merge.json        the hash of what is being merged, by which the same command continues it
    .NAME.partial/SHARD             a shard that is being written; whatever a killed merge left there is written again
                                    (PART+SHARD for one in a sub-folder)
    .NAME.partial/SHARD.json        what was noted while its tensors were merged, for the report and the model card
    .NAME.partial/NAME/SHARD        a finished shard: it was moved here when its last byte was on the disk
    .NAME.partial/…lock             held by the process that writes the merge, or that shard
    .NAME.partial/refused           why the merge cannot be made, if some process found that out on the way

The inner folder gets its place and name when it is complete, so that a half-written model never looks like one.

A killed merge, or one whose disk was full, stays for the same command to continue, and is never overwritten by another.
A refused one (NaN in an expert, an entry that overflows) can never be continued, for the command that mends it is
another one: it is removed at once, or, if other processes may still be writing it, by the next merge into NAME.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from merging.checkpoints import dtype_code

MARK, REFUSED = "merge.json", "refused"
Write = Callable[[str, Iterable[Tensor]], None]  # write(name, consecutive pieces of the flattened tensor)


@dataclass(frozen=True)
class TensorSpec:
    """What one output tensor looks like."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file of the output, and what makes its tensors."""

    file: str  # relative to the output's folder; parts of a model have sub-folders
    steps: tuple[Any, ...]
    tensors: tuple[TensorSpec, ...]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Bytes from the end of the header to each tensor; wide dtypes come first, so that all are aligned."""
        offsets, position = {}, 0
        for tensor in sorted(self.tensors, key=lambda each: -each.dtype.itemsize):
            offsets[tensor.name] = position
            position += tensor.size
        return offsets

    @cached_property
    def header(self) -> bytes:
        """The header of a safetensors file: its length, and JSON padded to a multiple of 8 bytes."""
        specs = {tensor.name: tensor for tensor in self.tensors}
        facts: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, start in self.offsets.items():
            spec = specs[name]
            offsets = [start, start + spec.size]
            facts[name] = dict(dtype=dtype_code(spec.dtype), shape=list(spec.shape), data_offsets=offsets)
        text = json.dumps(facts, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.size for tensor in self.tensors)


def arrange(made: Iterable[tuple[Any, Sequence[TensorSpec]]], shard_size: float, stem: str = "model") -> list[Shard]:
    """Return the files in which tensors are written; one exceeds `shard_size` only if a single step makes more.

    Args:
        made: each step with the tensors that it makes, in the order in which they are written.
        shard_size: bytes of data in one file.
        stem: of the files' names, with the sub-folder if they are in one.
    """
    groups: list[list[tuple[Any, Sequence[TensorSpec]]]] = [[]]
    filled = 0
    for step, tensors in made:
        size = sum(tensor.size for tensor in tensors)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((step, tensors))
        filled += size
    shards = []
    for number, group in enumerate(groups, start=1):
        part = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        tensors = tuple(tensor for _, own in group for tensor in own)
        shards.append(Shard(f"{stem}{part}.safetensors", tuple(step for step, _ in group), tensors))
    return shards


class Busy(ValueError):
    """Another process is writing the same."""


@contextmanager
def begin(out: Path, identity: str, shards: Sequence[Shard], rank: int = 0, ranks: int = 1) -> Iterator["Output"]:
    """Begin a checkpoint, or continue one of the same identity; ranks other than 0 wait until 0 has begun it.

    Args:
        out: the folder that it will become, which is not there yet, or empty.
        identity: hash of everything that decides what is written.
        shards: what will be written.
        rank: of this process; rank 0 calls `finish`.
        ranks: how many processes share the work.

    Raises:
        ValueError: an unfinished merge of another identity is there, or another process is writing it.
        OSError: the disk is too small, or cannot be written.
    """
    output = Output(out, tuple(shards), alone=ranks == 1)
    if rank > 0:
        while (  # what rank 0 is about to remove, or has not begun yet
            (output.work / REFUSED).exists() and _identity(output.work) != identity
        ) or (_identity(output.work) is None and not any(map(output.is_finished, shards))):
            time.sleep(0.1)
        _check_identity(output.work, identity)
        yield output
        return
    output.work.mkdir(parents=True, exist_ok=True)
    with _alone(output.work / "lock", out):
        if (output.work / REFUSED).exists():
            _clear(output)
        _check_identity(output.work, identity)
        _check_space(output)
        output.folder.mkdir(exist_ok=True)
        write_text(output.work / MARK, json.dumps({"identity": identity}))
        yield output


def _clear(output: "Output") -> None:
    """Remove a refused merge, except for the lock that this process holds; no process may be writing it still."""
    for lock in sorted(output.work.glob("*.lock")):
        with _alone(lock, output.out):
            pass
    for path in output.work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", REFUSED):
            path.unlink()
    (output.work / REFUSED).unlink()  # last: until then other ranks wait


@dataclass(frozen=True)
class Output:
    """A checkpoint in the making; processes of different rank may each write shards of it."""

    out: Path
    shards: tuple[Shard, ...]
    alone: bool = True  # whether no other process writes shards of it

    @property
    def work(self) -> Path:
        """The folder of everything that is unfinished."""
        return _work(self.out)

    @property
    def folder(self) -> Path:
        """The folder that becomes the output."""
        return self.work / self.out.name

    def is_finished(self, shard: Shard) -> bool:
        """Return whether a shard is complete on the disk, by whatever process."""
        return (self.folder / shard.file).is_file() or (self.out / shard.file).is_file()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Wrap the merging itself: if that raises a ValueError, what was written is removed, or marked as refused."""
        try:
            yield
        except Busy:
            raise
        except ValueError as refusal:
            if self.alone:
                shutil.rmtree(self.work)
            else:
                write_text(self.work / REFUSED, str(refusal))
            raise

    def write(self, shard: Shard, make: Callable[[Write], Any]) -> None:
        """Write one shard; when this returns, it is on the disk.

        Args:
            shard: one of `shards`.
            make: called with a function write(name, pieces), which it calls for each tensor of the shard, from several
                threads if it likes; pieces are on the CPU, in the output's dtype. It returns JSON to keep as a note.

        Raises:
            Busy: another process is writing this shard.
            OSError: the disk is full, or cannot be written; names file and tensor.
        """
        path, written = self.unfinished(shard), set()
        with _alone(path.with_name(f"{path.name}.lock"), self.out):
            with path.open("wb") as stream:

                def write(name: str, pieces: Iterable[Tensor]) -> None:
                    _write_tensor(path, stream.fileno(), shard, name, pieces)
                    written.add(name)

                with _on_disk(path):
                    stream.write(shard.header)
                    stream.flush()
                note = make(write)
                with _on_disk(path):
                    os.fsync(stream.fileno())
            if missing := shard.offsets.keys() - written:
                raise RuntimeError(f"{path}: {sorted(missing)[0]!r} was not written")
            write_text(self._note(shard), json.dumps(note))
            (self.folder / shard.file).parent.mkdir(exist_ok=True, parents=True)
            os.replace(path, self.folder / shard.file)

    def unfinished(self, shard: Shard) -> Path:
        """Return where a shard is while it is being written."""
        return self.work / shard.file.replace("/", "+")

    def _note(self, shard: Shard) -> Path:
        return self.work / f"{self.unfinished(shard).name}.json"

    def notes(self, pause: float = 0.2) -> list[Any]:
        """Return the notes of all shards, after waiting until all of them are written, by whatever rank.

        Raises:
            ValueError: another rank found that the merge cannot be made; this is what it said.
        """
        while not all(map(self.is_finished, self.shards)):
            if (self.work / REFUSED).is_file():
                raise ValueError((self.work / REFUSED).read_text(encoding="utf-8"))
            time.sleep(pause)
        return [json.loads(self._note(shard).read_text(encoding="utf-8")) for shard in self.shards]

    def finish(self) -> None:
        """Add the indices and give the folder its place and name; rank 0 does it, when all shards are there."""
        for folder in dict.fromkeys((self.folder / shard.file).parent for shard in self.shards):
            shards = [shard for shard in self.shards if (self.folder / shard.file).parent == folder]
            if len(shards) > 1:
                files = {tensor.name: Path(shard.file).name for shard in shards for tensor in shard.tensors}
                total = sum(tensor.size for shard in shards for tensor in shard.tensors)
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
                write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        os.replace(self.folder, self.out)  # over an empty folder too
        shutil.rmtree(self.work)


def _write_tensor(path: Path, file: int, shard: Shard, name: str, pieces: Iterable[Tensor]) -> None:
    """Write one tensor at its place in an open file."""
    start = position = len(shard.header) + shard.offsets[name]
    (size,) = (tensor.size for tensor in shard.tensors if tensor.name == name)
    for piece in pieces:
        view = memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()) if piece.numel() else b""
        with _on_disk(f"{path}: {name!r}"):
            while len(view):
                written = os.pwrite(file, view, position)
                position, view = position + written, view[written:]
    if position != start + size:
        raise RuntimeError(f"{name!r}: {position - start} bytes written of {size}")


@contextmanager
def _alone(lock: Path, out: Path) -> Iterator[None]:
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise Busy(f"{out}: another process is writing this merge") from None


def _check_identity(work: Path, identity: str) -> None:
    if _identity(work) not in (None, identity):
        raise ValueError(
            f"{work}: an unfinished merge of another recipe or of other input files; delete it, or choose another --out"
        )


def _check_space(output: Output) -> None:
    left = [shard for shard in output.shards if not output.is_finished(shard)]
    begun = [path for shard in left if (path := output.unfinished(shard)).is_file()]  # they are written again
    needed = sum(shard.size for shard in left)
    free = shutil.disk_usage(output.work).free + sum(path.stat().st_blocks * 512 for path in begun)
    if needed > free:
        if _identity(output.work) is None:  # nothing has been begun: leave nothing
            shutil.rmtree(output.work)
        raise OSError(f"{output.out}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that disk")


def remove_leftovers(out: Path, identity: str) -> None:
    """Remove what stands beside a complete merge, if it was killed after its last step."""
    if _identity(_work(out)) in (None, identity):
        shutil.rmtree(_work(out), ignore_errors=True)


def _work(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there completely or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with _on_disk(path):
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)


def _identity(work: Path) -> str | None:
    try:
        return json.loads((work / MARK).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _on_disk(what: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {error.strerror or error}; free some space and give the same command again") from error
