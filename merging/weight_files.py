"""Which files of a folder are the model: where transformers looks, in its order, and never outside the folder.

Order       transformers' `from_pretrained` takes the first of these that is there: the file which config.json names as
            `transformers_weights`, model.safetensors, model.safetensors.index.json with its shards, pytorch_model.bin,
            pytorch_model.bin.index.json with its shards. So a single file goes before the shards of an older save. Then
            come OpenCLIP's names, the only index under another name, and the only file of weights under another name.
Left aside  everything else: variants (model.fp16.safetensors), consolidated.safetensors beside shards, pickles beside
            safetensors. A note says so. An index none of whose shards is there is left aside if something else is.
Parts       sub-folders with weights belong to the model if modules.json names them, as sentence-transformers writes it
            ("2_Dense"); their tensors are called PART/NAME. Those of the first module, which old versions keep in a
            sub-folder too ("0_Transformer"), have no prefix, as in models without modules. Weights in other
            sub-folders are exports of the same model, or other models, and are left aside.
Outside     an index, a configuration or a link may name what lies outside the folder. That is refused before it is
            opened. Links to the blobs of the Hub's cache are followed: its snapshots consist of them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

ORDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ENDINGS = (".safetensors", *PICKLES, ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz")
INDEX = re.compile(r".*\.index(\.\w+)?\.json")  # a variant's ends in .index.fp16.json
NO_MODEL = re.compile(r"adapter_model\..*|(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")
VARIANT = re.compile(r"(model|pytorch_model)\.(?P<name>[^.]+)\.(safetensors|bin)")


@dataclass(frozen=True)
class WeightFiles:
    """The files of weights of one folder."""

    files: tuple[Path, ...]
    index: Path | None = None
    shard_of: dict[str, str] | None = None  # tensor → file, as the index says
    notes: tuple[str, ...] = ()  # what was left aside


def find_weights(root: Path, part: str = "") -> WeightFiles | None:
    """Return the files of weights of a model's folder, or of a part of it; None where there are none.

    Args:
        root: the folder of the model, outside which nothing is opened.
        part: a sub-folder of it.

    Raises:
        ValueError: one line that names the file: an index is broken or its shards are missing, a name leads outside, or
            several files could be meant.
    """
    folder = within(root, part) if part else root
    there = sorted(
        path for path in folder.iterdir() if path.name.endswith((".safetensors", *PICKLES)) or _is_index(path)
    )
    there = [path for path in there if path.is_file() and not NO_MODEL.fullmatch(path.name)]
    candidates = _candidates(folder, there)
    if not candidates:
        return None
    empty = []
    for first in candidates:
        files, shard_of = _files_of(root, first)
        if any(path.is_file() for path in files):
            break
        empty.append(first)
    if missing := [path for path in files if not path.is_file()]:
        raise ValueError(f"{first}: names the shard {missing[0].name}, which is not there; download it")
    notes = [f"{path}: none of its shards is there; left aside" for path in empty]
    aside = [path.name for path in there if path not in (first, *files, *empty)]
    variant = f" (the variant {found['name']})" if (found := VARIANT.fullmatch(first.name)) else ""
    if aside or variant:
        rest = f"; left aside: {_shortened(aside)}" if aside else ", the only weights"
        notes.append(f"{folder}: {first.name}{variant} is taken{rest}")
    return WeightFiles(files, first if shard_of else None, shard_of, tuple(notes))


def _files_of(root: Path, first: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Return a file of weights itself, or the shards of an index, which need not be there, and the index's table."""
    within(root, first.relative_to(root))
    if not _is_index(first):
        return (first,), None
    shard_of = read_index(root, first)
    return tuple(first.parent / name for name in sorted(set(shard_of.values()))), shard_of


def is_weights(path: Path) -> bool:
    """Return whether a file holds weights, in whatever format, or is an index of them."""
    return path.name.endswith(ENDINGS) or _is_index(path)


def _is_index(path: Path) -> bool:
    return INDEX.fullmatch(path.name) is not None


def usual_weights(folder: Path) -> list[str]:
    """Return the files of weights of a folder which have the names that transformers gives them."""
    return [name for name in ORDER if (folder / name).is_file()]


def _candidates(folder: Path, there: list[Path]) -> list[Path]:
    """Return what could be the model's weights, files or indices, the first choice first."""
    named = [folder / name for name in (_named_by_config(folder), *ORDER) if name]
    if named := [path for path in dict.fromkeys(named) if path.is_file()]:
        return named
    if len(indices := [path for path in there if _is_index(path)]) == 1:
        return indices
    for ending in (".safetensors", PICKLES):
        files = [path for path in there if path.name.endswith(ending)]
        if len(files) > 1:
            raise ValueError(f"{folder}: has no index, and {len(files)} files of weights; name the one to use")
        if files:
            return files
    return []


def _named_by_config(folder: Path) -> str | None:
    config = folder / "config.json"
    named = read_config(folder).get("transformers_weights") if config.is_file() else None
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{config}: transformers_weights is {named!r}, and must be the name of a file")
    return named and str(within(folder, named).relative_to(folder))


def _shortened(names: list[str]) -> str:
    """Return names of files for a message, all shards of one save as one."""
    return ", ".join(dict.fromkeys(re.sub(r"-\d{5}-of-", "-*-of-", name) for name in names))


def parts(folder: Path) -> list[str]:
    """Return the sub-folders that modules.json names as parts of the model, in its order.

    Raises:
        ValueError: it is broken, or names what lies outside the folder.
    """
    return [path for path in _module_paths(folder) if path != "." and (folder / path).is_dir()]


def main_part(folder: Path) -> str:
    """Return the first module of modules.json, if it is in a sub-folder and has weights ("0_Transformer"), or "".

    sentence-transformers keeps there the model that other programs have in the folder itself, under the same names.
    """
    first = next(iter(_module_paths(folder)), ".")
    return first if first != "." and (folder / first).is_dir() and find_weights(folder, first) else ""


def _module_paths(folder: Path) -> list[str]:
    file = folder / "modules.json"
    if not file.is_file():
        return []
    modules = _parsed(within(folder, file.name))
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{file}: is no list of modules, as sentence-transformers writes it")
    paths = [module.get("path", "") for module in modules]
    if odd := [path for path in paths if not isinstance(path, str)]:
        raise ValueError(f"{file}: the path {odd[0]!r} is no text")
    return [str(PurePosixPath(path)) for path in dict.fromkeys(paths) if within(folder, path, file)]


def other_weights(folder: Path) -> list[str]:
    """Return the sub-folders that hold weights and are no parts of the model."""
    known = {PurePosixPath(part).parts[0] for part in parts(folder)}
    return [path.name for path in subfolders(folder) if path.name not in known and _holds_weights(path)]


def subfolders(folder: Path) -> Iterator[Path]:
    """Yield the sub-folders that are not hidden, links left out."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield path


def _holds_weights(folder: Path) -> bool:
    return any(is_weights(path) and not NO_MODEL.fullmatch(path.name) for path in folder.iterdir())


def nothing_there(folder: Path) -> ValueError:
    """Return what to say of a folder without weights: the models and adapters in its sub-folders, if there are any."""
    if any(path.name.startswith("adapter_model.") for path in folder.iterdir()):
        return ValueError(f"{folder}: holds an adapter without adapter_config.json; put that beside it")
    inside = list(subfolders(folder))
    adapters = [path.name for path in inside if (path / "adapter_config.json").is_file()]
    models = [path.name for path in inside if path.name not in adapters and _holds_weights(path)]
    for kind, names in (("adapters", adapters), ("models", models)):
        if names:
            named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            return ValueError(
                f"{folder}: holds no weights itself, but the {kind} {named}: name one, {folder / names[0]}"
            )
    return ValueError(f"{folder}: holds no weights (*.safetensors, or a state dict *.bin, *.pt)")


# What is not trusted --------------------------------------------------------------------------------------------------


def within(folder: Path, name: str | Path, named_by: Path | None = None) -> Path:
    """Return the path of a file in a folder, which need not exist; nothing is opened.

    Args:
        folder: the folder.
        name: relative to it, as some file of the folder names it.
        named_by: that file, for the message.

    Raises:
        ValueError: it leads outside, by its name or by a link other than those of the Hub's cache.
    """
    told = f"{named_by or folder}: names {str(name)[:200]!r}"
    if "\0" in str(name) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{told}, which is not inside the folder; it is not opened")
    path = folder / name
    try:
        path.is_symlink()
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a circle of links, or a name that is too long
        raise ValueError(f"{told}, which cannot be a file") from None
    if target.is_relative_to(home) or _is_blob(target, home):
        return path
    raise ValueError(f"{path}: is a link to {target}, outside the folder; it is not opened: put the file there itself")


def _is_blob(target: Path, home: Path) -> bool:
    """Return whether a file is one of the Hub's cache: of the repository whose snapshot `home` is, or of any other."""
    from huggingface_hub import constants

    snapshots = next((up for up in (home, *home.parents) if up.name == "snapshots"), None)
    cache = Path(constants.HF_HUB_CACHE).resolve()
    own = snapshots is not None and target.is_relative_to(snapshots.parent / "blobs")
    return own or (target.parent.name == "blobs" and target.is_relative_to(cache))


def read_index(root: Path, index: Path) -> dict[str, str]:
    """Return tensor → path of its shard, relative to the index, each inside `root`.

    Raises:
        ValueError: it is no index, names a tensor twice, or leads outside.
    """
    found = _parsed(index, unique=True)
    shard_of = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index}: is no index of shards (JSON with a weight_map); download it again")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not shard:
            raise ValueError(f"{index}: the shard of {name!r} is {shard!r}, which is no name of a file")
    for shard in sorted(set(shard_of.values())):
        within(root, index.parent.relative_to(root) / shard, index)
    return shard_of


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a configuration of a folder.

    Raises:
        ValueError: it is no mapping, or lies outside the folder.
    """
    config = _parsed(file := within(folder, name))
    if not isinstance(config, dict):
        raise ValueError(f"{file}: is no mapping from options to values; download it again")
    return config


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Return what a file of a folder holds, None where there is no such file; refuses what `read_config` does."""
    return read_config(folder, name) if (folder / name).is_file() else None


def read_tokens(folder: Path) -> dict[str, int] | None:
    """Return token → row of the tokenizer in a folder, added tokens included; None where no file lists its tokens.

    Raises:
        ValueError: a file of the tokenizer is damaged, or lies outside the folder.
    """
    names = ("tokenizer.json", "vocab.json", "vocab.txt")
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        return None
    file = within(folder, name)
    try:
        if name == "vocab.txt":
            tokens = {line: row for row, line in enumerate(file.read_text(encoding="utf-8").splitlines())}
        else:
            whole = read_config(folder, name)
            tokens = _listed(whole) if name == "tokenizer.json" else dict(whole)
        tokens |= read_json(folder, "added_tokens.json") or {} if name != "tokenizer.json" else {}
        if odd := [token for token, row in tokens.items() if not isinstance(row, int) or row < 0]:
            raise TypeError(f"the row of {odd[0]!r} is {tokens[odd[0]]!r}")
    except (TypeError, AttributeError, LookupError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: lists no tokens with their rows ({error}); download it again") from None
    return tokens


def _listed(whole: Mapping[str, Any]) -> dict[str, int]:
    """Return token → row of a tokenizer.json."""
    model = whole.get("model", {}).get("vocab", {})
    tokens = dict(model) if isinstance(model, dict) else {piece[0]: row for row, piece in enumerate(model)}
    return tokens | {each["content"]: each["id"] for each in whole.get("added_tokens", ())}


def _parsed(file: Path, unique: bool = False) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once if unique else None)
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands of times
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{file}: is no sound JSON ({reason}); download it again") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict, refusing names that stand in it twice (for `json.loads`)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} stands in it twice")
    return found
