"""Checkpoints on disk, read tensor by tensor without loading them.

Accepted are a folder of safetensors (single, or sharded with an index), a bare `.safetensors` file, and state dicts of
torch.save (`.bin`, `.pt`, `.pth`; sharded with an index too), the latter through `weights_only` loading alone
(`merging.pickles`). Which files of a folder are meant is told by `merging.weight_files`. Nothing is known here about
architectures: a checkpoint is names, dtypes, shapes, and where the bytes are.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.data.hub import HubError, snapshot
from merging.pickles import places
from merging.weight_files import (
    ENDINGS,
    WeightFiles,
    find_weights,
    main_part,
    nothing_there,
    once,
    parts,
    read_index,
    read_json,
    read_tokens,
    usual_weights,
)

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip

HUB_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "README.md")

DEQUANTISED = ("fp8", "compressed-tensors")  # by `merging.fp8`, as far as they are 8-bit floating point

COPIED = 2**21  # entries that are read and converted at a time


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and where its bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path = field(repr=False, compare=False)
    offset: int = field(default=0, repr=False, compare=False)  # of its first byte in the file
    strides: tuple[int, ...] | None = field(default=None, repr=False, compare=False)  # there; None: one after the other
    stored: str = field(default="", repr=False, compare=False)  # its name in the file, if that is another

    @property
    def count(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.count * self.dtype.itemsize

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        return f"{self.path}: {(self.stored or self.name)!r}"

    def read(
        self, start: int = 0, stop: int | None = None, to: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Return the entries from `start` to `stop` of the flattened tensor, (stop − start,), as a new tensor.

        Beside the result no more than COPIED entries of the file are in memory at a time.

        Args:
            start, stop: a range of the flattened tensor; by default all of it.
            to: dtype of the result; by default that of the file.
            device: where the result is.
        """
        stop = self.count if stop is None else stop
        copy = torch.empty(stop - start, dtype=to or self.dtype, device=device)
        for first in range(start, stop, COPIED):
            last = min(first + COPIED, stop)
            copy[first - start : last - start].copy_(self._stored(first, last))
        return copy

    def _stored(self, start: int, stop: int) -> Tensor:
        """Return a range of the flattened tensor as the file holds it."""
        if self.strides is not None:
            return self._strided(start, stop)
        place, size = self.offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        return torch.from_numpy(np.fromfile(self.path, np.uint8, size, offset=place)).view(self.dtype)

    def _strided(self, start: int, stop: int) -> Tensor:
        """Return a range of the flattened tensor whose entries are scattered: whole rows are gathered from the file."""
        entries = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        size, width = entries * self.dtype.itemsize, self.count // self.shape[0]
        mapped = torch.from_numpy(np.memmap(self.path, np.uint8, "c", self.offset, (size,))).view(self.dtype)
        first = start // width
        rows = mapped.as_strided(self.shape, self.strides)[first : -(-stop // width)]
        return rows.reshape(-1)[start - first * width : stop - first * width]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its tensors, and the folder with its other files (None for a bare file of weights)."""

    given: str  # as the user wrote it: a path or a Hub id
    folder: Path | None
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = ()  # what is in the folder and was left aside
    parts: tuple[str, ...] = ()  # sub-folders whose tensors belong to the model, under the names PART/NAME
    main: str = ""  # that of them, if any, whose tensors have no prefix: the model that the others follow

    @property
    def home(self) -> Path | None:
        """The folder with configuration and tokenizer of the main part."""
        return self.folder and self.folder / self.main

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or {} where there is none."""
        return (self.home and read_json(self.home, "config.json")) or {}

    @cached_property
    def tokens(self) -> dict[str, int] | None:
        """Token → row of the tokenizer, added tokens included; None where no file lists its tokens."""
        return self.home and read_tokens(self.home)

    def part_of(self, name: str) -> str:
        """Return the sub-folder that a tensor belongs to, "" for the folder itself."""
        return max((part for part in self.parts if name.startswith(f"{part}/")), key=len, default=self.main)

    @property
    def files(self) -> list[Path]:
        """The files of weights, each once."""
        return list(dict.fromkeys(entry.path for entry in self.entries.values()))


def dtype_code(dtype: torch.dtype) -> str | None:
    """Return how safetensors headers spell a dtype, or None if they cannot."""
    return next((code for code, known in DTYPES.items() if known == dtype), None)


def open_checkpoint(given: str | Path, path: Path | None = None) -> Checkpoint:
    """Open a folder, a file or a repository of the Hub; headers are read and checked, weights are not read yet.

    Args:
        given: a path, or owner/name on the Hub where no such path exists (safetensors are preferred there).
        path: where that is, if it has been located.

    Raises:
        ValueError: one line that names the file (and the tensor), what is wrong with it, and what to do.
        HubError: a repository cannot be had.
    """
    path = path or locate(given)
    if path.is_file():
        return Checkpoint(str(given), None, _complete(file_entries(path), path))
    if (path / "adapter_config.json").is_file():
        full = ", ".join(usual_weights(path))
        hint = f", or remove adapter_config.json to take its full weights ({full})" if full else ""
        raise ValueError(
            f"{path}: is a peft adapter, which only an expert can be; name the model that it was made for{hint}"
        )
    entries, notes, known, main = {}, [], tuple(parts(path)), main_part(path)
    for part in dict.fromkeys((main, *known)):
        if found := find_weights(path, part):
            notes += found.notes
            for name, entry in _complete(_entries(found), found.index or found.files[0]).items():
                full = name if part == main else f"{part}/{name}"
                entries[full] = replace(entry, name=full, stored=name)
    if not entries:
        raise nothing_there(path)
    if main and (beside := usual_weights(path)):
        notes.append(f"{path}: the model is in {main}, as modules.json says; left aside: {', '.join(beside)}")
    checkpoint = Checkpoint(str(given), path, entries, tuple(notes), known, main)
    if method := checkpoint.config.get("quantization_config"):
        kind = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        if kind in DEQUANTISED:
            return checkpoint
        raise ValueError(
            f"{path / main / 'config.json'}: the weights are quantised ({kind}); dequantise the model first"
        )
    return checkpoint


def locate(given: str | Path) -> Path:
    """Return the file or folder that is meant: the path itself, or the copy of a repository of the Hub.

    Raises:
        ValueError: there is none, or it is neither a file nor a folder.
        HubError: a repository cannot be had.
    """
    path = Path(given)
    try:
        there = bool(str(given).strip()) and path.exists()  # "", as of an empty variable, is not the current folder
    except (OSError, ValueError):  # no name that a file could have
        raise ValueError(f"{str(given)[:200]!r}: there is no such file or folder") from None
    if there and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{given}: is neither a file nor a folder")
    return path if there else _from_hub(str(given))


def _from_hub(given: str) -> Path:
    names = given.split("/")
    if len(names) > 2 or not all(map(str.strip, names)) or given.startswith((".", "~")) or given.endswith(ENDINGS):
        raise ValueError(f"{given if given.strip() else repr(given)}: there is no such file or folder")
    try:
        return _downloaded(lambda *patterns: snapshot(given, "model", (*HUB_TEXTS, *patterns)))
    except HubError as error:
        raise HubError(f"{given}: there is no such file or folder, and on the Hub: {error}") from error


def _downloaded(fetch: Callable[..., Path]) -> Path:
    """Return the local folder of a repository with the weights that `find_weights` takes, and no others if possible.

    Args:
        fetch: downloads the files of some patterns, those that exist, and the configurations; returns the folder.
    """
    folder = fetch("model.safetensors", "adapter_model.*")
    if (folder / "adapter_config.json").is_file():
        return folder
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file():
        fetch(*(sorted(set(read_index(folder, index).values())) if index.is_file() else ["*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            fetch("*.bin")
    for part in parts(folder):
        fetch(f"{part}/*.safetensors")
        if find_weights(folder, part) is None:
            fetch(f"{part}/*.bin")
    return folder


def file_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of one file of weights, safetensors or a state dict of torch.save, by name."""
    if path.suffix == ".safetensors":
        return _safetensors_entries(path)
    found = {
        name: (place.dtype, place.shape, path, place.offset, place.strides) for name, place in places(path).items()
    }
    if odd := [name for name, (dtype, *_) in found.items() if dtype_code(dtype) is None]:
        raise ValueError(f"{path}: {odd[0]!r} is no plain tensor ({found[odd[0]][0]}); save it as one")
    return {name: Entry(name, *facts) for name, facts in found.items()}


def _entries(found: WeightFiles) -> dict[str, Entry]:
    """Return the tensors of all files; where an index says which file a tensor is in, the tensor must be there."""
    promised = found.shard_of or {}
    entries: dict[str, Entry] = {}
    for path in found.files:
        for name, entry in file_entries(path).items():
            named = found.index and found.index.parent / promised[name] if name in promised else None
            if name in entries and named is None:
                raise ValueError(f"{path}: {name!r} is in {entries[name].path.name} as well; make a new index")
            if name not in entries or named == path:
                entries[name] = entry
    for name, shard in promised.items():
        if name not in entries or entries[name].path != found.index.parent / shard:
            raise ValueError(f"{found.index}: {name!r} is not in {shard}, as the index says; download both again")
    return entries


def _complete(entries: dict[str, Entry], path: Path) -> dict[str, Entry]:
    if not entries:
        raise ValueError(f"{path}: holds no tensor")
    if 2 * (empty := sum(entry.shape == (0,) for entry in entries.values())) > len(entries):
        raise ValueError(
            f"{path}: {empty} of {len(entries)} tensors are empty, as DeepSpeed ZeRO-3 leaves them without gathering "
            "its weights; gather them (zero_to_fp32.py in the checkpoint's folder), and save the model again"
        )
    return entries


# Safetensors ----------------------------------------------------------------------------------------------------------


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    _check_sound(path)
    start, facts = _header(path)
    entries = {}
    for name, own in sorted(facts.items(), key=lambda item: item[1]["data_offsets"]):
        if own["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name!r} has the dtype {own['dtype']}, which is not one of {', '.join(DTYPES)}")
        place = start + own["data_offsets"][0]
        entries[name] = Entry(name, DTYPES[own["dtype"]], tuple(own["shape"]), path, offset=place)
    return entries


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a sound file begin, and {name: dtype, shape, offsets from there}.

    Raises:
        ValueError: a name stands twice: which of the two is meant cannot be known.
    """
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        text = stream.read(size)
    try:
        facts = json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"{path}: {error}, in its header; save it again") from None
    facts.pop("__metadata__", None)
    return 8 + size, facts


def _check_sound(path: Path) -> None:
    """Refuse a file of which the library for safetensors says that its header, or its length, is not sound."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        reason = str(error).splitlines()[0].removeprefix("Error while deserializing header: ")
        with path.open("rb") as stream:
            is_pointer = b"git-lfs" in stream.read(80)
        hint = (
            "it is a pointer of git-lfs: run git lfs pull" if is_pointer else "truncated or damaged, download it again"
        )
        raise ValueError(f"{path}: is no complete safetensors file ({reason}); {hint}") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error})") from None
