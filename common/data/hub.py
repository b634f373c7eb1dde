"""Data of the paper scale: the eight vision tasks as public Hub repositories, and the one place that downloads.

What the table states, and where each fact was read (cards and file lists are the public pages of the repositories):

    fact                                  source
    ------------------------------------  ---------------------------------------------------------------------------
    repositories, configs, splits,        fusion_bench, config/dataset/image_classification/{test,train,val}/*.yaml and
    expert names                          config/modelpool/CLIPVisionModelPool/clip-vit-base-patch32_TA8.yaml
    columns `image`, `label`              cards of tanganke/{sun397,stanford_cars,dtd} and ylecun/mnist; viewers of
                                          tanganke/{gtsrb,eurosat}
    folders and file names                file lists of tanganke/{sun397,stanford_cars,eurosat,gtsrb,resisc45},
                                          ufldl-stanford/svhn, ylecun/mnist; card of tanganke/dtd
    class names in label order            fusion_bench, tasks/clip_classification/*.py, made for these same data sets
    prompt templates                      OpenAI CLIP, data/prompts.md (SVHN: mlfoundations/task_vectors)

Names and templates are in clip_prompts.json. They agree with CLIP's prompts.md word for word, but for the ORDER of
EuroSAT, where CLIP's page differs from the data set. The order of the data set's own labels is the one that counts, and
every load compares the two. What no source showed is listed in each task's `unverified`.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

VALIDATION_FRACTION, VALIDATION_SEED = 0.1, 0
LIMIT_SEED = 0


class MissingResource(OSError):
    """Something that is not part of this project cannot be had; the message is one line that says what to do."""


class HubError(MissingResource):
    """A repository of the Hub cannot be had."""


@dataclass(frozen=True)
class VisionTask:
    """One task: where its images are, which expert belongs to it, how many classes it has, what is not confirmed."""

    name: str
    expert: str  # the expert of base B is tanganke/B_{expert}
    repo: str
    classes: int
    config: str = "default"
    folder: str = "data"  # files: {folder}/{split}-00000-of-00001.parquet
    test_split: str = "test"
    train_split: str = "train"
    image: str = "image"
    label: str = "label"
    unverified: tuple[str, ...] = ()

    @property
    def class_names(self) -> list[str]:
        """The class names in label order, as CLIP's prompts spell them."""
        return _prompts()[self.name]["classes"]

    @property
    def templates(self) -> list[str]:
        """CLIP's prompt templates for this data set, each with one `{}` for the class name."""
        return _prompts()[self.name]["templates"]

    def expert_id(self, base_id: str) -> str:
        """Return the repository of this task's expert of a base such as openai/clip-vit-base-patch32."""
        return f"tanganke/{base_id.split('/')[-1]}_{self.expert}"


VISION_TASKS: dict[str, VisionTask] = {
    task.name: task
    for task in (
        VisionTask(
            "SUN397",
            "sun397",
            "tanganke/sun397",
            397,
            unverified=(
                "label names after the 41st on the data card (the order is fusion_bench's; the public viewer counts 287"
                " classes in the part it reads, every load here checks for 397)",
            ),
        ),
        VisionTask(
            "Cars",
            "stanford-cars",
            "tanganke/stanford_cars",
            196,
            unverified=("label names after the 44th on the data card (the order is fusion_bench's)",),
        ),
        VisionTask(
            "RESISC45",
            "resisc45",
            "tanganke/resisc45",
            45,
            unverified=(
                "columns image and label (no card seen)",
                "label names on the data card (the order is fusion_bench's)",
            ),
        ),
        VisionTask(
            "EuroSAT",
            "eurosat",
            "tanganke/eurosat",
            10,
            unverified=(
                "label names after the first on the data card (the order is fusion_bench's, not that of CLIP's page)",
            ),
        ),
        VisionTask(
            "SVHN",
            "svhn",
            "ufldl-stanford/svhn",
            10,
            config="cropped_digits",
            folder="cropped_digits",
            unverified=(
                "columns image and label of config cropped_digits (only the label names of full_numbers seen)",
                "OpenAI publishes no template for SVHN (this one: task_vectors and fusion_bench)",
            ),
        ),
        VisionTask(
            "GTSRB",
            "gtsrb",
            "tanganke/gtsrb",
            43,
            unverified=("label names after the first on the data card (the order is fusion_bench's)",),
        ),
        VisionTask("MNIST", "mnist", "ylecun/mnist", 10, config="mnist", folder="mnist"),
        VisionTask("DTD", "dtd", "tanganke/dtd", 47, unverified=("number of data files (the card shows data/test-*)",)),
    )
}


def unverified() -> list[str]:
    """Return every fact of the table which no source confirmed, one line each: `task (repository): fact`."""
    return [f"{task.name} ({task.repo}): {fact}" for task in VISION_TASKS.values() for fact in task.unverified]


def load_test_set(task: VisionTask, limit: int | None = None) -> Any:
    """Return a task's test split as a `datasets.Dataset` of `image` (PIL) and `label` (int, in class-name order).

    Args:
        task: an entry of VISION_TASKS.
        limit: a random subset of this many images with a fixed seed (the files are sorted by class); default all.

    Raises:
        HubError: the repository cannot be reached, is gated or does not exist.
        ValueError: split, columns, number or order of the classes, or the number of rows are not the expected ones.
    """
    rows = load_split(task, task.test_split)
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(permutation(len(rows), LIMIT_SEED)[:limit])


def load_validation_set(task: VisionTask, limit: int | None = None) -> Any:
    """Return held-out-by-us images of the train split, for choices that are tuned; same format as `load_test_set`.

    The official protocol has no validation split. This one is fusion_bench's: a random tenth of the train split, seed 0
    (the last tenth would hold the last classes only). The public experts were fine-tuned on the train split and so have
    seen these images: good for choosing a scale of the merged model, not for measuring an expert.

    Args, Raises: as `load_test_set`; `limit` takes the first images of the random order.
    """
    rows = load_split(task, task.train_split)
    held_out = permutation(len(rows), VALIDATION_SEED)[len(rows) - int(len(rows) * VALIDATION_FRACTION) :]
    return rows.select(held_out[:limit])


def image_loader(rows: Any, preprocess: Callable[[Any], Tensor], batch_size: int = 128, workers: int = 0) -> DataLoader:
    """Iterate over rows as pairs: images (B, 3, H, W), labels (B,); `preprocess` makes (3, H, W) of a PIL image."""
    return DataLoader(rows, batch_size=batch_size, num_workers=workers, collate_fn=partial(_collate, preprocess))


def _collate(preprocess: Callable[[Any], Tensor], batch: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    images = torch.stack([preprocess(row["image"]) for row in batch])  # (B, 3, H, W)
    return images, torch.tensor([row["label"] for row in batch])  # (B,)


def snapshot(repo: str, kind: Literal["model", "dataset"], patterns: Sequence[str]) -> Path:
    """Return the local folder of a Hub repository's files, downloaded once; with HF_HUB_OFFLINE=1 from the cache only.

    Args:
        repo: owner/name.
        kind: "model" or "dataset".
        patterns: which files, as shell patterns.

    Raises:
        HubError: one line that says what to do.
    """
    from huggingface_hub import snapshot_download

    with _one_line_errors(repo, kind):
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(patterns)))


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


def load_split(source: Any, split: str, spelling: Callable[[str], str] | None = None) -> Any:
    """Return all rows of a split as a `datasets.Dataset` of `image` (PIL) and `label` (int), after all checks.

    Args:
        source: a `VisionTask`, or whatever else has its repo, config, folder, image, label, classes and class_names.
        split: as the files name it.
        spelling: what of a class name is compared with the known one; by default all but case, spaces and underscores.

    Raises:
        HubError: the repository cannot be had.
        ValueError: split, columns, number or order of the classes, or the number of rows are not the expected ones.
    """
    from datasets import load_dataset

    folder = snapshot(source.repo, "dataset", ["README.md", f"{source.folder}/{split}-*.parquet"])
    files = _data_files(source, split, folder)
    rows = load_dataset("parquet", data_files={split: files}, split=split)
    _check_schema(source, split, rows.features, spelling or _spelling)
    announced = announced_rows(source, split, folder)
    if announced is not None and announced != len(rows):
        raise ValueError(f"{source.repo}, split {split}: {len(rows)} rows in the files, {announced} on the data card")
    rows = rows.select_columns([source.image, source.label])
    renamed = {source.image: "image", source.label: "label"}
    return rows.rename_columns({old: new for old, new in renamed.items() if old != new})


def _data_files(source: Any, split: str, folder: Path) -> list[str]:
    """The split's shards in order, all of them: `test-00003-of-00018.parquet` says how many there must be."""
    files = sorted((folder / source.folder).glob(f"{split}-*-of-*.parquet"))
    if not files:
        there = sorted({path.name.rsplit("-", 3)[0] for path in (folder / source.folder).glob("*.parquet")})
        raise ValueError(
            f"{source.repo} has no files {source.folder}/{split}-*.parquet for split {split}"
            f" (splits in the local copy: {', '.join(there) or 'none'})"
        )
    expected = int(files[0].stem.rsplit("-", 1)[1])
    if len(files) != expected:
        what = f"{source.repo}, split {split}"
        raise ValueError(f"{what}: {len(files)} of {expected} files; delete {folder} and run again")
    return [str(path) for path in files]


def announced_rows(source: Any, split: str, folder: Path) -> int | None:
    """The number of rows which the card's YAML states for the split, or None where it states none."""
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    if not card.exists():
        return None
    infos = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict().get("dataset_info") or []
    for info in [infos] if isinstance(infos, dict) else infos:
        if info.get("config_name", "default") == source.config:
            return next((row["num_examples"] for row in info.get("splits", []) if row["name"] == split), None)
    return None


def _check_schema(source: Any, split: str, features: Any, spelling: Callable[[str], str]) -> None:
    from datasets import ClassLabel, Image

    where = f"{source.repo}, split {split}"
    for column, kind in ((source.image, Image), (source.label, ClassLabel)):
        if column not in features:
            raise ValueError(f"{where}: no column {column!r}, the columns are {', '.join(features)}")
        if not isinstance(features[column], kind):
            raise ValueError(f"{where}: column {column!r} must be a {kind.__name__}, got {features[column]}")
    names = features[source.label].names
    if len(names) != source.classes:
        raise ValueError(f"{where}: column {source.label!r} has {len(names)} classes, expected {source.classes}")
    for index, (found, known) in enumerate(zip(names, source.class_names, strict=True)):
        if spelling(found) != spelling(known):
            raise ValueError(f"{where}: label {index} is {found!r}, expected {known!r} (names or their order changed)")


def _spelling(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def permutation(length: int, seed: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def _prompts() -> dict[str, dict[str, list[str]]]:
    return json.loads((Path(__file__).parent / "clip_prompts.json").read_text(encoding="utf-8"))
