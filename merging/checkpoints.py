"""Checkpoints on disk, read tensor by tensor without loading them.

Accepted are a folder of safetensors (single, or sharded with an index), a bare `.safetensors` file, and state dicts of
torch.save (`.bin`, `.pt`, `.pth`; sharded with an index too), the latter through `weights_only` loading alone. Nothing
is known here about architectures: a checkpoint is names, dtypes, shapes, and where the bytes are.

Safetensors format: 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}} with
offsets counted from byte 8 + N, then the data.
"""

import json
import math
import mmap
import pickle
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.hub import snapshot

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip

SAFETENSORS = ("model.safetensors", "open_clip_model.safetensors")
PICKLED = ("pytorch_model.bin", "open_clip_pytorch_model.bin")
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_ENDINGS = (".safetensors", *PICKLE_ENDINGS, ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".index.json")
HUB_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")

LARGEST_HEADER = 100_000_000  # bytes, the limit of the reference implementation
COPIED = 2**21  # entries mapped at a time
FAULT_AROUND = 2**16  # bytes: Linux maps that many about every page that is touched

_quiet = threading.Lock()


class File:
    """A file of weights: mapped when it is first read, and its pages handed back after each use."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size

    @cached_property
    def _bytes(self) -> mmap.mmap:
        with self.path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, dtype: torch.dtype, count: int, offset: int, to: torch.dtype, device: torch.device) -> Tensor:
        """Return `count` numbers from byte `offset` on as a new tensor of dtype `to`; no mapped page stays resident."""
        copy = torch.empty(count, dtype=to, device=device)
        if not count:
            return copy
        with _quiet, warnings.catch_warnings():  # "the buffer is not writable": nobody writes to it
            warnings.simplefilter("ignore", UserWarning)
            mapped = torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset)
        for start in range(0, count, COPIED):
            stop = min(start + COPIED, count)
            copy[start:stop].copy_(mapped[start:stop])
            self._release(offset + start * dtype.itemsize, (stop - start) * dtype.itemsize)
        return copy

    def _release(self, offset: int, size: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            start = max(0, offset - FAULT_AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_DONTNEED, start, min(offset + size + FAULT_AROUND, self.size) - start)


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and where its bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: File = field(repr=False, compare=False)
    offset: int = field(repr=False, compare=False)  # bytes from the start of the file

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
        return f"{self.file.path}: {self.name!r}"

    def read(
        self, start: int = 0, stop: int | None = None, to: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Return the entries from `start` to `stop` of the flattened tensor, (stop − start,), as a new tensor.

        Args:
            start, stop: a range of the flattened tensor; by default all of it.
            to: dtype of the result; by default that of the file.
            device: where the result is.
        """
        stop = self.count if stop is None else stop
        offset = self.offset + start * self.dtype.itemsize
        return self.file.read(self.dtype, stop - start, offset, to or self.dtype, torch.device(device))


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its tensors, and the folder with its other files (None for a bare file of weights)."""

    given: str  # as the user wrote it: a path or a Hub id
    folder: Path | None
    entries: Mapping[str, Entry]

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or {} where there is none."""
        path = self.folder and self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}

    @property
    def files(self) -> list[File]:
        """The files of weights, each once."""
        return list({entry.file.path: entry.file for entry in self.entries.values()}.values())


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
        checkpoint = Checkpoint(str(given), None, _entries([path], None))
    elif (path / "adapter_config.json").is_file():
        raise ValueError(f"{path}: is a peft adapter, which only an expert can be; name the model that it was made for")
    else:
        checkpoint = Checkpoint(str(given), path, _entries(*_weight_files(path)))
    if method := checkpoint.config.get("quantization_config"):
        kind = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        raise ValueError(f"{path / 'config.json'}: the weights are quantised ({kind}); dequantise the model first")
    return checkpoint


def locate(given: str | Path) -> Path:
    """Return the file or folder that is meant: the path itself, or the copy of a repository of the Hub."""
    path = Path(given)
    return path if path.exists() else _from_hub(str(given))


def _from_hub(given: str) -> Path:
    parts = given.split("/")
    if len(parts) > 2 or not all(parts) or given.startswith((".", "~")) or given.endswith(WEIGHT_ENDINGS):
        raise ValueError(f"{given}: there is no such file or folder")
    folder = snapshot(given, "model", (*HUB_TEXTS, "*.safetensors"))
    return folder if any(folder.glob("*.safetensors")) else snapshot(given, "model", (*HUB_TEXTS, "*.bin"))


def _weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """Return the files of weights of a folder, and their index if they have one."""
    for names, ending in ((SAFETENSORS, ".safetensors"), (PICKLED, PICKLE_ENDINGS)):
        if indices := sorted(folder.glob(f"{Path(names[0]).stem}*{Path(names[0]).suffix}.index.json")):
            return _indexed(indices[0]), indices[0]
        for name in names:
            if (folder / name).is_file():
                return [folder / name], None
        found = sorted(path for path in folder.iterdir() if path.name.endswith(ending))
        found = [path for path in found if path.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
        if len(found) > 1:
            raise ValueError(f"{folder}: has no index, and {len(found)} files of weights; name the one to use")
        if found:
            return found, None
    raise ValueError(f"{folder}: holds no weights (*.safetensors, or a state dict *.bin, *.pt)")


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: is no index of shards (JSON with a weight_map); download it again") from None
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index}: names the shard {missing[0]}, which is not there; download it")
    return [index.parent / name for name in names]


def file_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of one file of weights, safetensors or a state dict of torch.save, by name."""
    return (_safetensors_entries if path.suffix == ".safetensors" else _pickled_entries)(path)


def _entries(files: Iterable[Path], index: Path | None) -> dict[str, Entry]:
    """Return the tensors of all files; where an index says which file a tensor is in, the tensor must be there."""
    promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index else {}
    entries: dict[str, Entry] = {}
    for path in files:
        for name, entry in file_entries(path).items():
            if name in entries and promised.get(name, path.name) == path.name == promised.get(name):
                entries[name] = entry
            elif name in entries and name not in promised:
                raise ValueError(f"{path}: {name!r} is in {entries[name].file.path.name} as well; make a new index")
            elif name not in entries:
                entries[name] = entry
    for name, shard in promised.items():
        if name not in entries or entries[name].file.path.name != shard:
            raise ValueError(f"{index}: {name!r} is not in {shard}, as the index says; download both again")
    if not entries:
        raise ValueError(f"{index or path}: holds no tensor")
    return entries


# Safetensors ----------------------------------------------------------------------------------------------------------


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    file = File(path)
    header, start = _header(path, file.size)
    entries, taken = {}, []
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        entry, end = _entry(file, name, facts, start)
        entries[name] = entry
        taken.append((entry.offset, end, name))
    position = start
    for begin, end, name in sorted(taken):
        if begin < position:
            raise ValueError(f"{path}: {name!r} overlaps another tensor; the header is damaged, download it again")
        position = end
    return entries


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a safetensors file and the byte at which its data starts."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            text = stream.read(80)
            hint = "is a pointer of git-lfs: run git lfs pull" if b"git-lfs" in text else "download it again"
            raise ValueError(f"{path}: {size} bytes, and a header of {length}: no complete safetensors file; {hint}")
        text = stream.read(length)
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats), 8 + length
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its safetensors header cannot be read ({error}); download it again") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return known


def _entry(file: File, name: str, facts: Any, start: int) -> tuple[Entry, int]:
    try:
        code, shape, (begin, end) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
        sound = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{file.path}: {name!r} has no dtype, shape and offsets in the header; download it again")
    if code not in DTYPES:
        raise ValueError(f"{file.path}: {name!r} has the dtype {code}, which is not one of {', '.join(DTYPES)}")
    entry = Entry(name, DTYPES[code], shape, file, start + begin)
    if end - begin != entry.size:
        raise ValueError(f"{file.path}: {name!r} {code} {list(shape)} takes {entry.size} bytes, not {end - begin}")
    if start + end > file.size:
        lost = start + end - file.size
        raise ValueError(f"{file.path}: {name!r} ends {lost} bytes behind the file: truncated; download it again")
    return entry, start + end


# State dicts of torch.save --------------------------------------------------------------------------------------------


def _pickled_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of a state dict that torch.save wrote, without running or even reading more than its index."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():  # no data, but each storage knows its place in the file
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: a pickle that holds more than tensors, which could run code when loaded; it is refused: save "
            "model.state_dict() with safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: is no complete state dict in the zip format of torch.save ({text})") from None
    file = File(path)
    return {name: _pickled_entry(file, name, value) for name, value in _state_dict(path, state).items()}


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """Return the state dict in what was loaded: itself, or what training loops wrap as "state_dict" or "model"."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        odd = (
            next((key for key, value in loaded.items() if not isinstance(value, Tensor)), "")
            if isinstance(loaded, Mapping)
            else type(loaded).__name__
        )
        raise ValueError(f"{path}: {odd!r} is no tensor, so this is no state dict; save model.state_dict() alone")
    return dict(loaded)


def _pickled_entry(file: File, name: str, tensor: Tensor) -> Entry:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if tensor.layout != torch.strided or dtype_code(tensor.dtype) is None or offset is None:
        raise ValueError(f"{file.path}: {name!r} is no plain tensor ({tensor.dtype}, {tensor.layout}); save it dense")
    if not tensor.is_contiguous():
        raise ValueError(f"{file.path}: {name!r} is stored with strides {tensor.stride()}; save it as .contiguous()")
    place = offset + tensor.storage_offset() * tensor.dtype.itemsize
    entry = Entry(name, tensor.dtype, tuple(tensor.shape), file, place)
    if place + entry.size > file.size:
        raise ValueError(f"{file.path}: {name!r} ends behind the file: truncated; download it again")
    return entry
