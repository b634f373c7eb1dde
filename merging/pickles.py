"""State dicts of torch.save: where their tensors are in the file. No weights are read, and no code in them is run.

Both formats are known: the zip archive that PyTorch writes since version 1.6, and the row of pickles before it
(`_use_new_zipfile_serialization=False`), in which the bytes of all storages follow one after the other, each after its
number of entries (8 bytes). Tensors may share a storage, and may be views of it with any strides.
"""

import pickle
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the old format


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file of torch.save."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte
    strides: tuple[int, ...] | None  # in entries; None: they follow one another


def places(path: Path) -> dict[str, Place]:
    """Return the tensors of a state dict that torch.save wrote, by name.

    Raises:
        ValueError: one line: it is damaged, holds more than tensors, or tensors that are not dense.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    with _one_line_errors(path), FakeTensorMode():  # no data, but each storage knows its place in the file
        state = torch.load(path, map_location="cpu", weights_only=True) if is_zip else _old_format(path)
    size = path.stat().st_size
    return {name: _place(path, size, name, value) for name, value in _state_dict(path, state).items()}


@contextmanager
def _one_line_errors(path: Path):
    try:
        yield
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: a pickle that holds more than tensors, which could run code when loaded; it is refused: save "
            "model.state_dict() with safetensors"
        ) from None
    except Exception as error:  # a hostile pickle can make the reader fail in any way
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: is no complete state dict of torch.save ({text}); download it again") from None


def _old_format(path: Path) -> Any:
    """Return what a file of the old format holds, its storages without data but with their places in the file."""
    from torch import _weights_only_unpickler as restricted

    storages: dict[str, torch.UntypedStorage] = {}

    def storage_of(saved: tuple) -> torch.storage.TypedStorage:
        _, kind, key, _, count, view = saved
        if view is not None:
            raise ValueError("views of storages, as PyTorch before version 0.4 wrote them: save it again")
        if key not in storages:
            storages[key] = torch.UntypedStorage(count * kind.dtype.itemsize, device="meta")
            counts[key] = count
        return torch.storage.TypedStorage(wrap_storage=storages[key], dtype=kind.dtype, _internal=True)

    counts: dict[str, int] = {}
    with path.open("rb") as file:
        if restricted.load(file) != MAGIC:
            raise ValueError("neither a zip archive nor the older format")
        restricted.load(file), restricted.load(file)  # version of the format, facts of the machine
        unpickler = restricted.Unpickler(file)
        unpickler.persistent_load = storage_of
        state = unpickler.load()
        keys = restricted.load(file)
        place = file.tell()
        for key in keys:
            file.seek(place)
            if int.from_bytes(file.read(8), "little") != counts[key]:
                raise ValueError("a storage has another size than its tensors")
            storages[key]._checkpoint_offset = place + 8
            place += 8 + storages[key].nbytes()
    return state


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """Return the state dict in what was loaded: itself, or what training loops wrap as "state_dict" or "model"."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: {type(loaded).__name__!r} is no state dict; save model.state_dict() alone")
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key!r} is no tensor, so this is no state dict; save model.state_dict() alone")
        if not isinstance(key, str):
            raise ValueError(f"{path}: {key!r} is no name of a tensor, so this is no state dict of a module")
    return dict(loaded)


def _place(path: Path, size: int, name: str, tensor: Tensor) -> Place:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if tensor.layout != torch.strided or offset is None:
        raise ValueError(f"{path}: {name!r} is no plain tensor ({tensor.dtype}, {tensor.layout}); save it dense")
    shape, strides = tuple(tensor.shape), tensor.stride()
    last = sum((own - 1) * stride for own, stride in zip(shape, strides, strict=True)) if tensor.numel() else -1
    end = (tensor.storage_offset() + last + 1) * tensor.dtype.itemsize
    if end > tensor.untyped_storage().nbytes() or offset + end > size:
        raise ValueError(f"{path}: {name!r} ends behind the file: truncated; download it again")
    place = offset + tensor.storage_offset() * tensor.dtype.itemsize
    return Place(tensor.dtype, shape, place, None if tensor.is_contiguous() else strides)
