"""Checkpoints on disk, read tensor by tensor without loading them.

Accepted are a folder of safetensors (single, or sharded with an index), a bare `.safetensors` file, and state dicts of
torch.save (`.bin`, `.pt`, `.pth`; sharded with an index too), the latter through `weights_only` loading alone. Nothing
is known here about architectures: a checkpoint is names, dtypes, shapes, and where the bytes are.
"""

import json
import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
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

DEQUANTISED = ("fp8", "compressed-tensors")  # by `merging.fp8`, as far as they are 8-bit floating point

COPIED = 2**21  # entries that are read and converted at a time


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and where its bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path = field(repr=False, compare=False)
    offset: int | None = field(default=None, repr=False, compare=False)  # of its first byte in a file of torch.save

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
        return f"{self.path}: {self.name!r}"

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
        if self.offset is None:  # opened anew each time: an open file keeps in memory what was read of it
            return _opened(self.path).get_tensor(self.name).reshape(-1)[start:stop]
        place, size = self.offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        return torch.from_numpy(np.fromfile(self.path, np.uint8, size, offset=place)).view(self.dtype)


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
        checkpoint = Checkpoint(str(given), None, _entries([path], None))
    elif (path / "adapter_config.json").is_file():
        raise ValueError(f"{path}: is a peft adapter, which only an expert can be; name the model that it was made for")
    else:
        checkpoint = Checkpoint(str(given), path, _entries(*_weight_files(path)))
    if method := checkpoint.config.get("quantization_config"):
        kind = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        if kind in DEQUANTISED:
            return checkpoint
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
                raise ValueError(f"{path}: {name!r} is in {entries[name].path.name} as well; make a new index")
            elif name not in entries:
                entries[name] = entry
    for name, shard in promised.items():
        if name not in entries or entries[name].path.name != shard:
            raise ValueError(f"{index}: {name!r} is not in {shard}, as the index says; download both again")
    if not entries:
        raise ValueError(f"{index or path}: holds no tensor")
    return entries


# Safetensors ----------------------------------------------------------------------------------------------------------


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    file = _opened(path)
    slices = {name: file.get_slice(name) for name in file.offset_keys()}
    for name, stored in slices.items():
        if stored.get_dtype() not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"{path}: {name!r} has the dtype {stored.get_dtype()}, which is not one of {known}")
    return {
        name: Entry(name, DTYPES[stored.get_dtype()], tuple(stored.get_shape()), path)
        for name, stored in slices.items()
    }


def _opened(path: Path) -> safe_open:
    """Return a safetensors file whose header is sound; tensors taken from it are mapped, not read."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        reason = str(error).splitlines()[0].removeprefix("Error while deserializing header: ")
        with path.open("rb") as stream:
            is_pointer = b"git-lfs" in stream.read(80)
        hint = (
            "it is a pointer of git-lfs: run git lfs pull" if is_pointer else "truncated or damaged, download it again"
        )
        raise ValueError(f"{path}: is no complete safetensors file ({reason}); {hint}") from None


# State dicts of torch.save --------------------------------------------------------------------------------------------


def _pickled_entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of a state dict that torch.save wrote; only its index is read, and no code in it is run."""
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
    return {name: _pickled_entry(path, name, value) for name, value in _state_dict(path, state).items()}


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


def _pickled_entry(path: Path, name: str, tensor: Tensor) -> Entry:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if tensor.layout != torch.strided or dtype_code(tensor.dtype) is None or offset is None:
        raise ValueError(f"{path}: {name!r} is no plain tensor ({tensor.dtype}, {tensor.layout}); save it dense")
    if not tensor.is_contiguous():
        raise ValueError(f"{path}: {name!r} is stored with strides {tensor.stride()}; save it as .contiguous()")
    place = offset + tensor.storage_offset() * tensor.dtype.itemsize
    entry = Entry(name, tensor.dtype, tuple(tensor.shape), path, place)
    if place + entry.size > path.stat().st_size:
        raise ValueError(f"{path}: {name!r} ends behind the file: truncated; download it again")
    return entry
