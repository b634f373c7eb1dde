"""Recipes as files: their values are of the kinds that options have, and their paths lead somewhere from any folder.

Relative paths in a recipe are relative to the folder of its file, or else to the current one. `merging.yaml` is written
so: a model that was given by a relative path is named relative to the output's folder, one given by an absolute path,
or by its id on the Hub, as it was given.
"""

import os
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def located(text: str, folder: Path) -> str:
    """Return the path that a text means which a recipe in that folder holds, or the text itself, which may be an id."""
    path = folder / text
    if not text or not path.exists():
        return text
    plain = Path(os.path.normpath(path))
    return str(plain if plain.exists() and plain.samefile(path) else path)


def portable(text: str, out: Path) -> str:
    """Return how the recipe in the folder of an output names a model: what `located` takes back to it."""
    if os.path.isabs(text) or not os.path.exists(text):
        return text
    path = Path(text)  # a link to a model keeps its name
    path = path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    return os.path.relpath(path, out.resolve())


def check_value(path: Path, key: str, value: Any, hint: Any) -> None:
    """Raise a ValueError that names file and option unless the value is of the kind that the type hint says."""
    if not _is(value, hint):
        raise ValueError(f"{path}: {key} must be {_named(hint)}, got {value!r}")


def _is(value: Any, hint: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is(value, option) for option in options)
    if origin is Literal:
        return isinstance(value, str) and value in options
    if origin is tuple:
        return isinstance(value, list) and all(_is(each, options[0]) for each in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _named(hint: Any) -> str:
    names = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of texts" if get_args(hint)[0] is str else "a list of numbers"
    return names.get(hint) or " or ".join(_named(option) for option in get_args(hint))
