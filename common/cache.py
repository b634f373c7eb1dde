"""The artefact cache: what a run builds once (models, experts, rows), the next run finds again.

An artefact is a folder `.cache/KIND/KEY/`. Its key is the hash of the inputs it was built from and of the code that
built it, which `common.code` finds, so that changed code never meets a stale artefact (comments, docstrings and layout
do not count as changes).
It is built in a temporary sibling folder and renamed when complete: a killed run leaves nothing half-written, and two
processes never build the same artefact twice. Contents are safetensors and JSON, never pickles. The variable
EXPERIMENTS_CACHE names another place for it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from common.code import code_of

CACHE = Path(os.environ.get("EXPERIMENTS_CACHE", Path(__file__).resolve().parent.parent / ".cache"))

RECORDS: list[dict[str, Any]] = []  # what this process asked for: kind, key and whether it was there already


@dataclass(frozen=True)
class Artefact:
    """A complete artefact: its folder, its key (an input of what is built from it) and whether it was there already."""

    path: Path
    key: str
    hit: bool


def cache_key(inputs: Mapping[str, Any], *code: Any) -> str:
    """Return the hash (16 hex digits) of `inputs` (JSON, dataclasses) and of all code that `code` reaches.

    Args:
        inputs: everything the artefact depends on: settings, seed, keys of input artefacts.
        code: the function that builds it; see `common.code.code_of`.

    Raises:
        TypeError: an input is not plain data.
        ValueError: the code of a function cannot be read.
    """
    text = json.dumps(inputs, sort_keys=True, default=_plain)
    return hashlib.sha256("\0".join([text, *code_of(*code)]).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"a cache key is made of plain data and dataclasses, got {type(value).__name__}: {value!r}")


def is_cached(kind: str, inputs: Mapping[str, Any], build: Callable[[Path], None]) -> bool:
    """Return whether `artefact`, called with the same arguments, would find it; asking is not recorded."""
    return (CACHE / kind / cache_key(inputs, build)).is_dir()


def artefact(
    kind: str, inputs: Mapping[str, Any], build: Callable[[Path], None], *, resumable: bool = False
) -> Artefact:
    """Return the artefact of these inputs and of the code of `build`; if there is none, `build(folder)` makes it.

    Args:
        kind: names the folder of all artefacts of this kind.
        inputs: everything it depends on, as plain data; data that `build` holds (arguments of a partial) must be here.
        build: fills an empty folder. Every function and constant of this project that it reaches is part of the key.
        resumable: whether a build that was killed finds its folder as it left it when it is called again.

    Raises:
        TypeError, ValueError: as for `cache_key`.
    """
    key = cache_key(inputs, build)
    folder = CACHE / kind / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    with contextlib.nullcontext() if together else FileLock(folder.with_suffix(".lock")):
        hit = folder.is_dir()
        if together:  # all processes build together: none starts before all have looked
            torch.distributed.barrier()
        if not hit:
            rank = torch.distributed.get_rank() if together else 0
            unfinished = folder.with_suffix(f".unfinished-{rank}")
            if not resumable:
                shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(exist_ok=True)
            build(unfinished)
            (unfinished / "inputs.json").write_text(json.dumps(inputs, sort_keys=True, default=_plain, indent=1))
            if rank == 0:
                os.replace(unfinished, folder)
            else:
                shutil.rmtree(unfinished)
            if together:
                torch.distributed.barrier()
    RECORDS.append({"kind": kind, "key": key, "hit": hit})
    return Artefact(folder, key, hit)


def cached_rows(
    kind: str, inputs: Mapping[str, Any], build: Callable[[], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the rows that `build()` yields, from the cache if the same code made them from the same inputs.

    Args:
        kind, inputs: as for `artefact`.
        build: yields rows of plain data; its code is part of the key.
    """
    return json.loads((artefact(kind, inputs, partial(_write_rows, build)).path / "rows.json").read_text())


def _write_rows(build: Callable[[], Iterable[dict[str, Any]]], folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(list(build())))
