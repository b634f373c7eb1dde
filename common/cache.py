"""The artefact cache: what a run builds once (models, experts, rows), the next run finds again.

An artefact is a folder `.cache/KIND/KEY/`. Its key is the hash of the inputs it was built from and of the code that
built it, so that changed code never meets a stale artefact (comments, docstrings and layout do not count as changes).
It is built in a temporary sibling folder and renamed when complete: a killed run leaves nothing half-written, and two
processes never build the same artefact twice. Contents are safetensors and JSON, never pickles. The variable
EXPERIMENTS_CACHE names another place for it.
"""

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import os
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

CACHE = Path(os.environ.get("EXPERIMENTS_CACHE", Path(__file__).resolve().parent.parent / ".cache"))

RECORDS: list[dict[str, Any]] = []  # what this process asked for: kind, key and whether it was there already


@dataclass(frozen=True)
class Artefact:
    """A complete artefact: its folder, its key (an input of what is built from it) and whether it was there already."""

    path: Path
    key: str
    hit: bool


def cache_key(inputs: Mapping[str, Any], sources: Iterable[Any] = ()) -> str:
    """Return the hash (16 hex digits) of `inputs` (JSON, dataclasses) and of the code of `sources`.

    Args:
        inputs: everything the artefact depends on: settings, seed, keys of input artefacts.
        sources: modules, classes or functions whose code decides what is built.

    Raises:
        TypeError: an input is not plain data.
    """
    text = json.dumps(inputs, sort_keys=True, default=_plain)
    code = [_code(source) for source in sources]
    return hashlib.sha256("\0".join([text, *code]).encode()).hexdigest()[:16]


@functools.cache  # the code as it was when this process first needed it, not what is edited meanwhile
def _code(source: Any) -> str:
    """Return the code of a module, class or function without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[:1] = [ast.Pass()]
    return ast.unparse(tree)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"a cache key is made of plain data and dataclasses, got {type(value).__name__}: {value!r}")


def is_cached(kind: str, inputs: Mapping[str, Any], sources: Sequence[Any] = ()) -> bool:
    """Return whether the artefact of these inputs and sources is there already; asking is not recorded."""
    return (CACHE / kind / cache_key(inputs, sources)).is_dir()


def artefact(
    kind: str,
    inputs: Mapping[str, Any],
    sources: Sequence[Any] = (),
    *,
    build: Callable[[Path], None],
    resumable: bool = False,
) -> Artefact:
    """Return the artefact of these inputs and sources; if there is none, `build(folder)` fills an empty folder.

    With `resumable`, a build that was killed finds its folder as it left it.
    """
    key = cache_key(inputs, sources)
    folder = CACHE / kind / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    with contextlib.nullcontext() if together else FileLock(folder.with_suffix(".lock")):
        hit = folder.is_dir()
        if together:  # all processes build with each other: none before all have looked
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
    kind: str, inputs: Mapping[str, Any], build: Callable[[], Iterable[dict[str, Any]]], sources: Sequence[Any] = ()
) -> list[dict[str, Any]]:
    """Return the rows that `build()` yields, from the cache where the same inputs and sources were measured before."""

    def write(folder: Path) -> None:
        (folder / "rows.json").write_text(json.dumps(list(build())))

    return json.loads((artefact(kind, inputs, sources, build=write).path / "rows.json").read_text())
