"""The twenty vision tasks of the paper scale as public Hub repositories, with CLIP's class names and prompts.

What the table states, and where each fact was read (cards and file lists are the public pages of the repositories):

    fact                                  source
    ------------------------------------  ---------------------------------------------------------------------------
    repositories, configs, splits,        fusion_bench, config/dataset/image_classification/{test,train,val}/*.yaml and
    expert names                          config/modelpool/CLIPVisionModelPool/clip-vit-base-patch32_TA8.yaml
    columns `image`, `label`              cards of tanganke/{sun397,stanford_cars,dtd,resisc45,cifar10,cifar100,kmnist,
                                          emnist_letters}, ylecun/mnist, timm/oxford-iiit-pet, 1aurent/PatchCamelyon
                                          (a Boolean) and dpdl-benchmark/oxford_flowers102; viewers of
                                          tanganke/{gtsrb,eurosat} and nateraw/rendered-sst2; FER2013's `jpg` and
                                          `cls`: fusion_bench, dataset/fer2013.py
    folders and file names                file lists of tanganke/{sun397,stanford_cars,eurosat,gtsrb,resisc45,stl10,
                                          emnist_letters}, ufldl-stanford/svhn, ylecun/mnist, 1aurent/PatchCamelyon,
                                          dpdl-benchmark/oxford_flowers102 and clip-benchmark/wds_fer2013; cards of
                                          tanganke/{dtd,cifar10}, timm/oxford-iiit-pet
    class names in label order            fusion_bench, tasks/clip_classification/*.py, made for these same data sets;
                                          whole on the cards of tanganke/{resisc45,cifar10,emnist_letters,kmnist} and
                                          timm/oxford-iiit-pet
    prompt templates                      OpenAI CLIP, data/prompts.md (SVHN: mlfoundations/task_vectors; EMNIST, KMNIST
                                          and FashionMNIST: fusion_bench)

Names and templates are in clip_prompts.json. They are those of the heads under which the hub's experts were tuned
(fusion_bench), and agree with CLIP's prompts.md word for word, with these exceptions. EuroSAT and the pets: the ORDER,
where CLIP's page differs from the data set; the pets' names are lower case with underscores. CIFAR100: underscores, and
"cra" for "crab", as in the data set. Flowers102: three names. FER2013: one word where CLIP has several.
Food101: the data set has cheesecake before cheese plate, CLIP's page and fusion_bench the other way round. The order of
the data set's own labels counts, and every load compares the two. What no source showed is listed in each task's
`unverified`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.data import hub

VALIDATION_FRACTION, VALIDATION_SEED = 0.1, 0


@dataclass(frozen=True)
class VisionTask:
    """One task: which expert belongs to it, where its images are, and what no source confirms about it."""

    name: str
    expert: str  # the expert of base B is tanganke/B_{expert}
    repo: str
    config: str = "default"
    folder: str = "data"  # files: {folder}/{split}-00000-of-00001.parquet
    test: str = "test"  # the split that is the test set
    files: str = "{folder}/{split}-*.parquet"
    columns: tuple[str, str] = ("image", "label")
    named: bool = True  # whether the files name the classes; if not, labels are numbers or truth values
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

    def rows(self, split: str) -> Any:
        """Return all rows of "train" or "test", a `datasets.Dataset` of `image` (PIL) and `label` (int or bool).

        Raises:
            HubError: the repository cannot be reached, is gated or does not exist.
            ValueError: files, columns, number or order of the classes, or number of rows are not the expected ones.
        """
        split = self.test if split == "test" else split
        image, label = self.columns
        columns = {image: "Image", label: "ClassLabel" if self.named else "Value"}
        files = self.files.format(folder=self.folder, split=split)
        rows = hub.load_rows(self.repo, files, columns, self.class_names, card=(self.config, split))
        if not self.named:
            self._check_labels(rows, f"{self.repo}, {files}")
        renamed = {old: new for old, new in zip(self.columns, ("image", "label"), strict=True) if old != new}
        return rows.rename_columns(renamed)

    def _check_labels(self, rows: Any, where: str) -> None:
        """Raise a ValueError unless the labels, which have no names, are 0 to C − 1, or truth values of 2 classes."""
        found, count = set(rows.unique(self.columns[1])), len(self.class_names)
        if not found <= set(range(count)):  # True == 1
            raise ValueError(f"{where}: labels {min(found)} to {max(found)}, expected 0 to {count - 1}")


@cache
def _prompts() -> dict[str, dict[str, list[str]]]:
    return json.loads((Path(__file__).parent / "clip_prompts.json").read_text(encoding="utf-8"))


VISION_TASKS: dict[str, VisionTask] = {
    task.name: task
    for task in (
        VisionTask(
            "SUN397", "sun397", "tanganke/sun397",
            unverified=(
                "label names after the 41st on the data card (the order is fusion_bench's; the public viewer counts 287"
                " classes in the part it reads, every load here checks for 397)",
            ),
        ),
        VisionTask(
            "Cars", "stanford-cars", "tanganke/stanford_cars",
            unverified=("label names after the 44th on the data card (the order is fusion_bench's)",),
        ),
        VisionTask(
            "RESISC45", "resisc45", "tanganke/resisc45",
        ),
        VisionTask(
            "EuroSAT", "eurosat", "tanganke/eurosat",
            unverified=(
                "label names after the first on the data card (the order is fusion_bench's, not that of CLIP's page)",
            ),
        ),
        VisionTask(
            "SVHN", "svhn", "ufldl-stanford/svhn", config="cropped_digits", folder="cropped_digits",
            unverified=(
                "columns image and label of config cropped_digits (only the label names of full_numbers seen)",
                "OpenAI publishes no template for SVHN (this one: task_vectors and fusion_bench)",
            ),
        ),
        VisionTask(
            "GTSRB", "gtsrb", "tanganke/gtsrb",
            unverified=("label names after the 23rd on the data card (the order is fusion_bench's)",),
        ),
        VisionTask("MNIST", "mnist", "ylecun/mnist", config="mnist", folder="mnist"),
        VisionTask("DTD", "dtd", "tanganke/dtd", unverified=("number of data files (the card shows data/test-*)",)),
        VisionTask(
            "Flowers102", "oxford_flowers102", "dpdl-benchmark/oxford_flowers102",
            unverified=("label names after the 39th on the data card (the order is fusion_bench's)",),
        ),
        VisionTask("PCAM", "pcam", "1aurent/PatchCamelyon", named=False),
        VisionTask(
            "FER2013", "fer2013", "clip-benchmark/wds_fer2013", files="{split}/*.tar", columns=("jpg", "cls"),
            named=False,
            unverified=(
                "label order (fusion_bench's; the lines of the repository's classnames.txt were not seen, its 52 bytes "
                "are as many as these names take)",
            ),
        ),
        VisionTask("OxfordIIITPet", "oxford-iiit-pet", "timm/oxford-iiit-pet"),
        VisionTask(
            "STL10", "stl10", "tanganke/stl10",
            unverified=("label names on the data card (the card of a subset, Chiranjeev007/STL-10_Subset, has them)",),
        ),
        VisionTask(
            "CIFAR100", "cifar100", "tanganke/cifar100",
            unverified=("label names after the 50th on the data card (the card of uoft-cs/cifar100 has all)",),
        ),
        VisionTask("EMNIST", "emnist_letters", "tanganke/emnist_letters", config="emnist-letters",
                   folder="emnist-letters"),
        VisionTask("CIFAR10", "cifar10", "tanganke/cifar10"),
        VisionTask(
            "Food101", "food101", "ethz/food101", test="validation",
            unverified=(
                "label order on the data card (copies of it, nateraw/food101 and pt-sk/food101, have this one)",
                "which order the experts were tuned in (fusion_bench's prompts have labels 16 and 17 exchanged: up to "
                "2 of 101 classes would count as wrong)",
                "folder of the data files",
            ),
        ),
        VisionTask("FashionMNIST", "fashion_mnist", "zalando-datasets/fashion_mnist", config="fashion_mnist",
                   folder="fashion_mnist"),
        VisionTask(
            "RenderedSST2", "rendered-sst2", "nateraw/rendered-sst2",
            unverified=("names and format of the data files (the viewer shows columns, classes and splits)",),
        ),
        VisionTask("KMNIST", "kmnist", "tanganke/kmnist", config="kmnist", folder="kmnist"),
    )
}  # fmt: skip


def unverified() -> list[str]:
    """Return every fact of the table which no source confirmed, one line each: `task (repository): fact`."""
    return [f"{task.name} ({task.repo}): {fact}" for task in VISION_TASKS.values() for fact in task.unverified]


def held_out(order: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Divide a random order of training examples into those to train on and those to validate on, the last tenth.

    Source: fusion_bench, whose seed is VALIDATION_SEED. The official protocols have no validation split.
    """
    cut = len(order) - int(len(order) * VALIDATION_FRACTION)
    return order[:cut], order[cut:]


def validation_rows(task: VisionTask, limit: int | None = None) -> Any:
    """Return the images of the train split that are held out to tune choices; format and errors as `VisionTask.rows`.

    They are a random tenth (the last tenth of the files would hold the last classes only). The public experts were
    fine-tuned on the whole train split, so they have seen these images: good for choosing a scale of the merged model,
    not for measuring an expert.

    Args:
        task: an entry of VISION_TASKS.
        limit: how many images to take, in the random order; by default all.
    """
    rows = task.rows("train")
    _, validation = held_out(hub.permutation(len(rows), VALIDATION_SEED))
    return rows.select(validation[:limit])


def image_loader(rows: Any, preprocess: Callable[[Any], Tensor], batch_size: int = 128, workers: int = 0) -> DataLoader:
    """Return a loader of pairs: images (B, 3, H, W), labels (B,); `preprocess` turns a PIL image into (3, H, W)."""
    return DataLoader(rows, batch_size=batch_size, num_workers=workers, collate_fn=partial(_collate, preprocess))


def _collate(preprocess: Callable[[Any], Tensor], batch: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    images = torch.stack([preprocess(row["image"]) for row in batch])  # (B, 3, H, W)
    return images, torch.tensor([int(row["label"]) for row in batch])  # (B,)
