"""Writing a checkpoint tensor by tensor: headers first, then each tensor at its place, in any order, by any process.

All names, dtypes and shapes are known beforehand, so that every safetensors header can be written before the first
tensor is there. Until everything is in place two folders stand beside the output NAME:

    .NAME.partial/model….safetensors        the shards, at their full size from the start, without an index
    .NAME.journal/merge.json                the hash of what is being merged; written when the shards are there
    .NAME.journal/RANK.jsonl                one line a finished tensor: its name, the CRC-32 of its bytes, a note

The first is renamed when it is complete, so a half-written model never looks like one; then the second goes. A killed
merge finds the finished tensors in the journals, compares their checksums, and writes the others.
"""

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from merging.checkpoints import dtype_code

MARK = "merge.json"
PIECE = 2**24  # bytes read at a time when checksums are compared


@dataclass(frozen=True)
class Tensors:
    """What one output tensor looks like."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int  # bytes


@dataclass(frozen=True)
class Place:
    """Where an output tensor goes."""

    file: str
    offset: int
    size: int  # bytes


def arrange(
    tensors: Sequence[Tensors], shard_size: int, stem: str = "model"
) -> tuple[dict[str, Place], dict[str, bytes]]:
    """Return where each tensor goes and the header of each shard; a shard exceeds `shard_size` by one tensor at most.

    Args:
        tensors: in the order in which they are written.
        shard_size: bytes of data in one file.
        stem: of the files' names.

    Returns:
        name → place, and file name → header, without padding of the data but padded itself to a multiple of 8 bytes.
    """
    shards: list[list[Tensors]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.size for other in shards[-1]) + tensor.size > shard_size:
            shards.append([])
        shards[-1].append(tensor)
    places, headers = {}, {}
    for number, shard in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{part}.safetensors"
        facts: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in sorted(shard, key=lambda each: -each.dtype.itemsize):  # wide dtypes first: all aligned
            offsets = [position, position + tensor.size]
            facts[tensor.name] = dict(dtype=dtype_code(tensor.dtype), shape=list(tensor.shape), data_offsets=offsets)
            position += tensor.size
        text = json.dumps(facts, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        start = len(headers[file])
        for tensor in shard:
            places[tensor.name] = Place(file, start + facts[tensor.name]["data_offsets"][0], tensor.size)
    return places, headers


class Output:
    """A checkpoint in the making. Several threads, and several processes of different rank, may write to one."""

    def __init__(
        self,
        out: Path,
        identity: str,
        tensors: Sequence[Tensors],
        shard_size: int,
        rank: int = 0,
        stem: str = "model",
    ):
        """Begin a checkpoint, or continue one of the same identity; ranks other than 0 wait until 0 has begun it.

        Args:
            out: the folder that it will become, which is not there yet, or empty.
            identity: hash of everything that decides what is written.
            tensors: what will be written.
            shard_size: bytes of data in a file.
            rank: of this process; rank 0 makes the files, and calls `finish`.
            stem: of the files' names.

        Raises:
            ValueError: an unfinished merge of another identity is there, or another process is writing it.
            OSError: the disk is too small, or cannot be written.
        """
        self.out, self.rank = out, rank
        self.folder, self.journal = _partial(out), _journal(out)
        self.places, self._headers = arrange(tensors, shard_size, stem)
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        if rank == 0:
            self._begin(identity)
        else:
            while _identity(self.journal) != identity:
                time.sleep(0.1)
        self._lines = (self.journal / f"{rank}.jsonl").open("ab")
        if self._lines.tell():  # the last line may be torn: end it
            self._lines.write(b"\n")

    def _begin(self, identity: str) -> None:
        self.journal.mkdir(parents=True, exist_ok=True)
        self._owner = FileLock(self.journal / "lock")
        try:
            self._owner.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.out}: another process is writing this merge") from None
        found = _identity(self.journal)
        if found not in (None, identity):
            raise ValueError(
                f"{self.folder}: an unfinished merge of another recipe or of other input files; delete it and "
                f"{self.journal.name}, or choose another --out"
            )
        if found is None or not self.folder.is_dir():
            _empty_journal(self.out)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            self._make_files()
            write_text(self.journal / MARK, json.dumps({"identity": identity}))

    def _make_files(self) -> None:
        needed = sum(map(len, self._headers.values())) + sum(place.size for place in self.places.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            shutil.rmtree(self.folder)
            raise OSError(f"{self.out}: needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that disk")
        for file, header in self._headers.items():
            ends = [place.offset + place.size for place in self.places.values() if place.file == file]
            with (self.folder / file).open("wb") as stream, _on_disk(self.folder / file):
                stream.write(header)
                stream.flush()
                os.ftruncate(stream.fileno(), max([len(header), *ends]))

    def finished(self) -> dict[str, Any]:
        """Return the notes of the tensors that the journals list as written, by any rank, now or before."""
        return {name: line["note"] for name, line in self._journals().items()}

    def _journals(self) -> dict[str, dict[str, Any]]:
        lines = {}
        for path in sorted(self.journal.glob("*.jsonl")):
            for text in path.read_bytes().splitlines():
                try:
                    line = json.loads(text)
                    lines[line["name"]] = {"crc": line["crc"], "note": line["note"]}
                except (ValueError, KeyError, TypeError):  # a torn line: that tensor is written again
                    continue
        return lines

    def intact(self, names: Iterable[str]) -> set[str]:
        """Return those of the tensors (and notes) that an earlier process has written, as their checksums show."""
        lines = self._journals()
        return {name for name in names if name in lines and self._checksum(name) == lines[name]["crc"]}

    def _checksum(self, name: str) -> int:
        checksum = 0
        place = self.places.get(name, Place("", 0, 0))  # a note by itself
        for start in range(0, place.size, PIECE):
            piece = os.pread(self._file(place.file), min(PIECE, place.size - start), place.offset + start)
            checksum = zlib.crc32(piece, checksum)
        return checksum

    def _file(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self.folder / name, os.O_RDWR)
            return self._files[name]

    def write(self, name: str, pieces: Iterable[Tensor], note: Any = None) -> None:
        """Write one tensor, given as consecutive pieces of its flattened entries, and enter it in the journal.

        Args:
            name: of the tensor.
            pieces: tensors on the CPU, in the output's dtype.
            note: JSON to keep with it; read after the last piece.

        Raises:
            OSError: the disk is full, or cannot be written; names file and tensor.
        """
        place = self.places[name]
        file = self._file(place.file)
        position, checksum = place.offset, 0
        for piece in pieces:
            view = memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()) if piece.numel() else b""
            checksum = zlib.crc32(view, checksum)
            with _on_disk(f"{self.folder / place.file}: {name!r}"):
                while len(view):
                    written = os.pwrite(file, view, position)
                    position, view = position + written, view[written:]
        if position != place.offset + place.size:
            raise RuntimeError(f"{name!r}: {position - place.offset} bytes written of {place.size}")
        self.note(name, note, checksum)

    def note(self, name: str, note: Any, checksum: int = 0) -> None:
        """Enter in the journal what is to be kept until all is written; the name may be that of no tensor."""
        line = json.dumps({"name": name, "crc": checksum, "note": note}).encode() + b"\n"
        with self._lock, _on_disk(self.journal):
            self._lines.write(line)
            self._lines.flush()

    def close(self) -> None:
        """Flush this process's files to the disk and close them."""
        for file in self._files.values():
            os.fsync(file)
            os.close(file)
        self._files.clear()
        self._lines.close()

    def wait(self, names: Iterable[str], pause: float = 0.2) -> None:
        """Wait until all these tensors (and notes) are written, by whatever rank."""
        names = set(names)
        while names - self._journals().keys():
            time.sleep(pause)

    def finish(self) -> None:
        """Add the index and give the folder its name; rank 0 does it, when all tensors are there."""
        if len(self._headers) > 1:
            total = sum(place.size for place in self.places.values())
            weights = {name: place.file for name, place in sorted(self.places.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weights}
            write_text(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        os.replace(self.folder, self.out)  # over an empty folder too
        _empty_journal(self.out)
        self._owner.release()
        remove_journal(self.out)


def remove_journal(out: Path) -> None:
    """Remove what is left of the journal of a complete merge, if anything."""
    shutil.rmtree(_journal(out), ignore_errors=True)


def _empty_journal(out: Path) -> None:
    """Forget what was written, but for the lock, which says who may write."""
    for path in _journal(out).glob("*.json*"):
        path.unlink(missing_ok=True)


def _partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _journal(out: Path) -> Path:
    return out.parent / f".{out.name}.journal"


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there completely or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _identity(folder: Path) -> str | None:
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _on_disk(what: object):
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {error.strerror or error}; free some space and give the same command again") from error
