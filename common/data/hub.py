"""Public repositories of the Hugging Face Hub: the one place that downloads, and the one that checks what came.

The packages that use data sets describe them in tables. None of these descriptions is trusted: files, columns, class
names, labels and numbers of rows are compared with them, and a difference is an error of one line that names the
repository, the file and what is wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

# what `datasets` calls a format, by the last suffix of a file
FORMATS = {".parquet": "parquet", ".gz": "json", ".tar": "webdataset"}
SHARDS = "nshards.txt"  # beside the tars of a web dataset: how many there are


class MissingResource(OSError):
    """Something that is not part of this project is not available; the message is one line that says what to do."""


class HubError(MissingResource):
    """A repository of the Hub is not available."""


def snapshot(repo: str, kind: Literal["model", "dataset"], patterns: Sequence[str]) -> Path:
    """Return the local folder of a Hub repository's files, downloaded once; with HF_HUB_OFFLINE=1 from the cache only.

    Args:
        repo: owner/name.
        kind: "model" or "dataset".
        patterns: which files, as shell patterns.

    Raises:
        HubError: the repository is not available; the message is one line that says what to do.
    """
    from huggingface_hub import snapshot_download

    with _one_line_errors(repo, kind):
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(patterns)))


def commit(repo: str, kind: Literal["model", "dataset"]) -> str:
    """Return the commit of a repository whose files are read, for cache keys that have to change with the files.

    Args:
        repo, kind: as for `snapshot`.

    Raises:
        HubError: the repository is not available.
    """
    return snapshot(repo, kind, ["README.md", "*config.json"]).name


@contextmanager
def _one_line_errors(repo: str, kind: str):
    from httpx import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{kind} {repo} is gated: accept its licence on its page and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"{kind} {repo} does not exist or is private: check the name, or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{kind} {repo} has no branch main: check the name") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise HubError(f"{kind} {repo}: the Hub answered {status}: check HF_TOKEN, or try again later") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, HTTPError, ConnectionError) as error:
        raise HubError(
            f"{kind} {repo} is not in the local cache and the Hub was not reached: connect and unset HF_HUB_OFFLINE, "
            "or set HF_HOME to a cache which holds it"
        ) from error


def loose_spelling(name: str) -> str:
    """Return a class name in lower case, with single spaces in place of underscores and repeated spaces."""
    return " ".join(name.replace("_", " ").lower().split())


def load_rows(
    repo: str,
    files: str,
    columns: Mapping[str, Literal["Value", "Image", "ClassLabel"]],
    class_names: Sequence[str] = (),
    spelling: Callable[[str], str] = loose_spelling,
    card: tuple[str, str] | None = None,
) -> Any:
    """Download a split of a data set and return its rows, a `datasets.Dataset` of the named columns, checked.

    Args:
        repo: owner/name.
        files: the Parquet, gzipped JSON or tar files that hold the split, as a shell pattern. Where it has a `*`, all
            files must be there: N as NAME-00000-of-N says, or of tars as many as nshards.txt beside them says.
        columns: the columns to return, each with its type in `datasets`.
        class_names: what the ClassLabel column calls its classes, in label order.
        spelling: maps a class name to the form in which it is compared.
        card: configuration and split whose number of rows on the data card is compared with the files, where the card
            states one; None compares nothing.

    Raises:
        HubError: the repository is not available.
        ValueError: the files, the columns, the classes (number, names, order), the labels or the number of rows are
            not as expected.
    """
    from datasets import load_dataset

    count = [str(PurePosixPath(files).with_name(SHARDS))] if files.endswith(".tar") else []
    folder = snapshot(repo, "dataset", [*(["README.md"] if card else []), files, *count])
    paths = _all_files(repo, files, folder)
    rows = load_dataset(FORMATS[paths[0].suffix], data_files=[str(path) for path in paths], split="train")
    where = f"{repo}, {files}"
    for column, kind in columns.items():
        _check_column(where, rows.features, column, kind)
        if kind == "ClassLabel":
            _check_classes(where, rows, column, class_names, spelling)
    announced = _announced_rows(folder, *card) if card else None
    if announced is not None and announced != len(rows):
        raise ValueError(f"{where}: {len(rows)} rows in the files, {announced} on the data card")
    return rows.select_columns(list(columns))


def _all_files(repo: str, files: str, folder: Path) -> list[Path]:
    """Return the files of a pattern in order: `test-00003-of-00018.parquet` says how many there must be.

    Behind that number a file may have a hash: `test-00001-of-00002-3bfa172e8818685a.parquet`.
    """
    paths = sorted(folder.glob(files))
    if not paths:
        others = sorted({path.name.rsplit("-", 3)[0] for path in (folder / files).parent.glob("*.*")})
        raise ValueError(
            f"{repo} has no files {files} (in the local copy of that folder: {', '.join(others) or 'none'})"
        )
    if paths[0].suffix == ".tar":
        paths.sort(key=lambda path: (len(path.name), path.name))  # 9.tar before 10.tar
    expected = _number_of_files(paths[0]) if "*" in files else 1
    if len(paths) != expected:
        raise ValueError(f"{repo}, {files}: {len(paths)} of {expected} files; delete {folder} and run again")
    return paths


def _number_of_files(path: Path) -> int:
    """Return how many files hold the split of this one, as its name or the text beside it says."""
    if path.suffix == ".tar":
        return int(path.with_name(SHARDS).read_text())
    return int(path.stem.rsplit("-of-", 1)[1].split("-")[0])


def _check_column(where: str, features: Mapping[str, Any], column: str, kind: str) -> None:
    if column not in features:
        raise ValueError(f"{where}: no column {column!r}, the columns are {', '.join(features)}")
    if type(features[column]).__name__ != kind:
        raise ValueError(f"{where}: column {column!r} must be a {kind}, got {features[column]}")


def _check_classes(
    where: str, rows: Any, column: str, class_names: Sequence[str], spelling: Callable[[str], str]
) -> None:
    from pyarrow import compute

    names = rows.features[column].names
    if len(names) != len(class_names):
        raise ValueError(f"{where}: column {column!r} has {len(names)} classes, expected {len(class_names)}")
    for label, (found, known) in enumerate(zip(names, class_names, strict=True)):
        if spelling(found) != spelling(known):
            raise ValueError(f"{where}: label {label} is {found!r}, expected {known!r} (names or their order changed)")
    if (compute.min(rows.data.column(column)).as_py() or 0) < 0:
        raise ValueError(f"{where}: labels of -1 are hidden ones, take another split")


def _announced_rows(folder: Path, config: str, split: str) -> int | None:
    """Return the number of rows that the data card states for a split of a configuration, None if it states none."""
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    if not card.exists():
        return None
    infos = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict().get("dataset_info") or []
    for info in [infos] if isinstance(infos, dict) else infos:
        if info.get("config_name", "default") == config:
            return next((row["num_examples"] for row in info.get("splits", []) if row["name"] == split), None)
    return None


def permutation(length: int, seed: int) -> list[int]:
    """Return 0 to length − 1 in a random order that depends on the seed alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
