"""Fashion-MNIST, CIFAR-10 and ImageNet-1K from the Hub, for training from scratch: splits, augmentation, batches.

What the table states, and where each fact was read:

    fact                                  source
    ------------------------------------  ---------------------------------------------------------------------------
    uoft-cs/cifar10: all of it            its card: config plain_text, columns img and label, names, 50,000 and 10,000
                                          rows, files plain_text/{train,test}-*
    zalando-datasets/fashion_mnist:       viewer of the repository; TensorFlow's catalogue of Hugging Face data sets
    columns, names, order, rows
    ILSVRC/imagenet-1k: files             public code that reads the repository: data/train-*-of-00294.parquet,
                                          data/validation-*-of-00014.parquet; labels of `test` are all -1
    ILSVRC/imagenet-1k: names             timm's table of WordNet synsets in label order; the viewer of a copy
                                          (datacomp/imagenet-1k-random20.0) shows 47 of them, 517 as "crane2"

What no source showed is listed in each set's `unverified`. ImageNet is gated, and takes about 300 GB of disk: the files
and the table that `datasets` makes of them.

The recipe for ImageNet is torchvision's, which the authors of arXiv 2605.25612 run: images resized to 256 on the
shorter side, random resized crop of 224, flip, RandAugment, then mixup or cutmix of each batch, repeated augmentation.
Every draw comes from a seed that the batch names, so it does not depend on the number of workers or on an interruption.
On several devices each mixes its own share of a batch.

Differences from the authors' runs: a hundredth of ImageNet's training images is held out; images are resized whenever
they are read, not once on disk; and the copies of an image are spread over their batch before mixing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data import hub
from common.training import TrainingRecipe

EVALUATION_BATCH = 128
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class PictureSet:
    """One data set: where its images are, how they are cropped at training, what no source confirms.

    `mean` and `std` (one value per channel) normalise pixels of [0, 1]; `held_out` is the share of the training split
    that validates. Training crops: "none"; "shifted", by up to an eighth of the side, and flipped; "resized", a random
    part of the image at random size, and flipped.
    """

    repo: str
    classes: int
    config: str
    folder: str  # files: {folder}/{split}-00000-of-00001.parquet
    crop: Literal["none", "shifted", "resized"]
    held_out: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, ...] = ()
    image: str = "image"  # the column; that of labels is called label everywhere
    test_split: str = "test"
    unverified: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names in label order."""
        return self.names or _imagenet_names()


PICTURES: dict[str, PictureSet] = {
    "fashion_mnist": PictureSet(
        "zalando-datasets/fashion_mnist", 10, "fashion_mnist", "fashion_mnist", "none", 1 / 12, (0.5,), (0.5,),
        ("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        unverified=("name of the config and of the folder with the files (as in ylecun/mnist, converted alike)",),
    ),
    "cifar10": PictureSet(
        "uoft-cs/cifar10", 10, "plain_text", "plain_text", "shifted", 1 / 10, (0.5,) * 3, (0.5,) * 3,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"), image="img",
    ),
    "imagenet": PictureSet(
        "ILSVRC/imagenet-1k", 1000, "default", "data", "resized", 1 / 100,
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), test_split="validation",
        unverified=(
            "label names on the card beyond the 47 seen (compared by their first synonym, without trailing digits)",
            "number of rows on the card (compared with the files where it states one)",
        ),
    ),
}  # fmt: skip


def unverified() -> list[str]:
    """Return every fact of the table which no source confirmed, one line each: `data set (repository): fact`."""
    return [f"{name} ({pictures.repo}): {fact}" for name, pictures in PICTURES.items() for fact in pictures.unverified]


@cache
def rows(name: str, split: str) -> Any:
    """Return a split's rows, a `datasets.Dataset` of `image` (PIL) and `label` (int).

    "validation" is held out by us from the training split, at random with a fixed seed, and "train" is the rest of it.
    "test" is the official test split (ImageNet: its validation split; that of its test split has no labels).

    Args:
        name: an entry of PICTURES.
        split: train, validation or test.

    Raises:
        HubError: the repository cannot be reached, is gated or does not exist.
        ValueError: split, columns, number or order of the classes, or the number of rows are not the expected ones.
    """
    pictures = PICTURES[name]
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}; there are train, validation, test")
    if split == "test":
        return _all_rows(pictures, pictures.test_split)
    both = _all_rows(pictures, "train")
    order = hub.permutation(len(both), HELD_OUT_SEED)
    validation = max(1, round(len(both) * pictures.held_out))
    chosen = order[:validation] if split == "validation" else order[validation:]
    return both.select(sorted(chosen))  # in file order, which reads faster


def _all_rows(pictures: PictureSet, split: str) -> Any:
    files, columns = f"{pictures.folder}/{split}-*.parquet", {pictures.image: "Image", "label": "ClassLabel"}
    card = (pictures.config, split)
    rows = hub.load_rows(pictures.repo, files, columns, pictures.class_names, _first_synonym, card)
    return rows.rename_columns({pictures.image: "image"})


@dataclass(frozen=True)
class Augmentation:
    """How training images vary beyond the crop of their data set.

    mixup and cutmix are the parameters of their Beta distributions, 0 is off (with both, each batch takes one of the
    two at random); randaugment is the magnitude, from 1 to 30, 0 is off; repeats is how often a drawn image enters its
    batch.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: int = 0
    repeats: int = 1


def training_loader(
    name: str,
    pixels: int,
    augmentation: Augmentation,
    normalised: bool,
    workers: int,
    recipe: TrainingRecipe,
    seed: int,
) -> DataLoader:
    """Return a loader of `recipe.steps` batches {"images": (B, channels, pixels, pixels), "labels": (B,) or (B, C)}.

    Args:
        name: an entry of PICTURES.
        pixels: image side.
        augmentation: beyond the crop; with mixup or cutmix labels are shares of the classes.
        normalised: False leaves pixels in [0, 1].
        workers: processes that read; 0 reads in this one.
        recipe: batch size and number of batches.
        seed: of the order and of all augmentation.
    """
    from torchvision.transforms import v2  # late: --help needs no seconds of it

    found, pictures = rows(name, "train"), PICTURES[name]
    data = Pictures(found, transform(pictures, pixels, normalised, True, augmentation.randaugment))
    laws = ((v2.MixUp, augmentation.mixup), (v2.CutMix, augmentation.cutmix))
    mixers = [mixer(alpha=alpha, num_classes=pictures.classes) for mixer, alpha in laws if alpha]
    batches = RepeatedBatches(len(found), recipe, seed, augmentation.repeats)
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collate, mixers),
        pin_memory=torch.cuda.is_available(),
    )


def evaluation_loader(name: str, split: str, pixels: int, normalised: bool, workers: int) -> DataLoader:
    """Return a loader of all images of a split in order, not augmented; arguments as for `training_loader`."""
    data = Pictures(rows(name, split), transform(PICTURES[name], pixels, normalised, False))
    return DataLoader(
        data,
        EVALUATION_BATCH,
        num_workers=workers,
        collate_fn=partial(_collate, []),
        pin_memory=torch.cuda.is_available(),
    )


def workers(device: torch.device) -> int:
    """Return how many processes should read for a device: none if the model itself runs on the CPU."""
    return 0 if device.type == "cpu" else min(16, len(os.sched_getaffinity(0)))


def transform(
    pictures: PictureSet, pixels: int, normalised: bool, training: bool, randaugment: int = 0
) -> Callable[[Any], Tensor]:
    """Return a function that turns a PIL image into (channels, pixels, pixels); it draws from torch's global generator.

    Args:
        pictures: the data set.
        pixels: image side.
        normalised: False leaves pixels in [0, 1].
        training: whether to crop and augment at random.
        randaugment: its magnitude; 0 is off.
    """
    from torchvision.transforms import InterpolationMode, v2  # late: --help needs no seconds of it

    steps: list[nn.Module] = []
    if pictures.crop == "resized":  # at 224 pixels the shorter side is 256
        steps = [v2.Resize(round(pixels * 8 / 7)), v2.RandomResizedCrop(pixels) if training else v2.CenterCrop(pixels)]
    else:
        steps = [v2.Resize((pixels, pixels))]
    if training and pictures.crop == "shifted":
        steps.append(v2.RandomCrop(pixels, padding=pixels // 8))
    if training and pictures.crop != "none":
        steps.append(v2.RandomHorizontalFlip())
    if training and randaugment:
        steps.append(v2.RandAugment(magnitude=randaugment, interpolation=InterpolationMode.BILINEAR))
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    if normalised:
        steps.append(v2.Normalize(pictures.mean, pictures.std))
    return partial(_transform, "L" if len(pictures.mean) == 1 else "RGB", v2.Compose(steps))


def _transform(mode: str, steps: Callable[[Any], Tensor], image: Any) -> Tensor:
    return steps(image.convert(mode))


class RepeatedBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed of its augmentation), for as many steps as the recipe has.

    Every epoch is a new order of all `length` samples, without a break between epochs; in that order each sample stands
    `repeats` times in a row, with different seeds. A batch is then shuffled, so that neighbours, which mixup and cutmix
    pair, are seldom copies of one image.
    """

    drop_last = True

    def __init__(self, length: int, recipe: TrainingRecipe, seed: int, repeats: int = 1):
        self.length, self.repeats, self.seed = length, repeats, seed
        self.batch_size, self.steps = recipe.batch_size, recipe.steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed)
        indices = self._indices(generator)
        for _ in range(self.steps):
            drawn = list(islice(indices, self.batch_size))
            order = torch.randperm(self.batch_size, generator=generator).tolist()
            seeds = torch.randint(2**60, (self.batch_size,), generator=generator).tolist()
            yield [(drawn[place], seed) for place, seed in zip(order, seeds, strict=True)]

    def _indices(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            for index in torch.randperm(self.length, generator=generator).tolist():
                yield from [index] * self.repeats


class Pictures(Dataset):
    """Rows as tensors. An item is asked for by its index, or by (index, seed of its augmentation)."""

    def __init__(self, rows: Any, transform: Callable[[Any], Tensor]):
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = item if isinstance(item, tuple) else (item, 0)
        row = self.rows[index]
        with _seeded(seed):
            return {"image": self.transform(row["image"]), "label": row["label"], "seed": seed}


def _collate(mixers: Sequence[nn.Module], batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    images = torch.stack([row["image"] for row in batch])  # (B, channels, pixels, pixels)
    labels = torch.tensor([row["label"] for row in batch])  # (B,)
    if mixers:
        with _seeded(batch[0]["seed"] + 1):  # not the draws of the first image
            images, labels = mixers[int(torch.randint(len(mixers), ()))](images, labels)  # labels (B, C)
    return {"images": images, "labels": labels}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator within the block, and restore it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the accelerator's
        yield


@cache
def _imagenet_names() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(index) for index in range(1000))


def _first_synonym(name: str) -> str:
    """Return what stands before the first comma, without the digit that tells two cranes apart."""
    return name.split(",")[0].rstrip("0123456789").strip().lower()
