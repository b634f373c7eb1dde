"""Image classification from scratch with a Vision Transformer: settings → `Task`.

Without a download: scikit-learn's handwritten digits, and the glyph suite as one task. From the hub: Fashion-MNIST,
CIFAR-10 and ImageNet-1K (sparsity.studies.data.pictures). IMAGENET is the paper's own setting.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.cache import cache_key
from common.data import glyphs, hub
from common.training import ShuffledBatches, TrainingRecipe
from sparsity.studies.data import digits, pictures
from sparsity.studies.models.pretrained import pretrained_vit
from sparsity.studies.models.vit import vit
from sparsity.studies.task import Batch, Task, as_it_is

DEFAULTS = {  # channels, pixels, side of a patch
    "digits": (1, 8, 2),
    "glyphs": (1, 24, 6),
    "fashion_mnist": (1, 28, 7),
    "cifar10": (3, 32, 4),
    "imagenet": (3, 224, 16),
}
EMBEDDED = ("digits", "glyphs")
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class ImageTask:
    """Which images are classified, and by which ViT.

    glyph_tasks (none: all 20, 559 classes) and copies (fixed photographs of each training glyph) are for glyphs only.
    The fields after label_smoothing are for the other data sets: how training images are augmented, see
    sparsity.studies.data.pictures.
    """

    data: Literal["digits", "glyphs", "fashion_mnist", "cifar10", "imagenet"] = "glyphs"
    glyph_tasks: tuple[str, ...] = ("digits", "latin_lower", "math", "arrows", "box_drawing", "armenian")
    copies: int = 16
    width: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    pixels: int | None = None  # image side; by default the data set's own
    patch: int | None = None  # side of a patch; by default so that there are 16 tokens, 64 (cifar10), 196 (imagenet)
    pooling: Literal["avg", "token"] = "avg"
    label_smoothing: float = 0.0
    mixup: float = 0.0  # parameter of the Beta law; 0 is off. With cutmix too, each batch takes one of the two
    cutmix: float = 0.0
    randaugment: int = 0  # magnitude, from 1 to 30; 0 is off
    repeats: int = 1  # differently augmented copies of an image in its batch
    normalised: bool = True  # False leaves the pixels of the hub's images in [0, 1]
    pretrained: str = ""  # repository of a trained ViT of timm, whose sizes count; "": an untrained one of these sizes

    def __post_init__(self) -> None:
        if self.data not in DEFAULTS:
            raise ValueError(f"data must be one of {', '.join(DEFAULTS)}, got {self.data!r}")
        if unknown := [name for name in self.glyph_tasks if name not in glyphs.TASKS]:
            raise ValueError(f"unknown glyph task {unknown[0]!r}; there are {', '.join(glyphs.TASKS)}")
        for name in ("copies", "width", "depth", "heads", "mlp_ratio", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.randaugment <= 30:
            raise ValueError(f"randaugment must be from 0 to 30, got {self.randaugment}")
        if self.data in EMBEDDED:
            self._check_embedded()
        _, pixels, patch = self.shape
        if patch < 1 or pixels % patch:
            raise ValueError(f"patch must divide the image side {pixels}, got {patch}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width {self.width}, got {self.heads}")

    def _check_embedded(self) -> None:
        if self.pixels not in (None, DEFAULTS[self.data][1]):
            raise ValueError(f"{self.data} has images of {DEFAULTS[self.data][1]} pixels only, got {self.pixels}")
        off = {"mixup": 0.0, "cutmix": 0.0, "randaugment": 0, "repeats": 1, "normalised": True, "pretrained": ""}
        if on := [name for name, value in off.items() if getattr(self, name) != value]:
            raise ValueError(f"{on[0]} is not for {self.data}, whose training images are fixed")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, image side and side of a patch."""
        channels, pixels, patch = DEFAULTS[self.data]
        return channels, self.pixels or pixels, self.patch or patch


IMAGENET = ImageTask(  # the paper's: ViT-B/16 on ImageNet-1K
    "imagenet", width=768, depth=12, heads=12, pooling="token",
    label_smoothing=0.11, mixup=0.2, cutmix=1.0, randaugment=9, repeats=3,
)  # fmt: skip


def image_task(settings: ImageTask, device: torch.device) -> Task:
    """Return the task of these settings; images are drawn or read when they are first asked for.

    Batches are {"images": (B, channels, pixels, pixels), "labels": (B,)}; mixed training batches have labels (B, C),
    shares of the classes. Evaluation batches come on `device`.

    Args:
        settings: data set, network, augmentation.
        device: where evaluation batches go.

    Raises:
        OSError: the hub cannot be reached, or lacks the repository.
    """
    return _embedded_task(settings, device) if settings.data in EMBEDDED else _hub_task(settings, device)


def pixel_range(settings: ImageTask) -> tuple[Tensor, Tensor]:
    """Return the values of black and of white as the network gets them, each (channels, 1, 1)."""
    if settings.data in EMBEDDED:
        ends = torch.tensor([[-1.0], [1.0]])
    else:
        ends = torch.tensor([[0.0], [1.0]])
        if settings.normalised:
            known = pictures.PICTURES[settings.data]
            ends = (ends - torch.tensor(known.mean)) / torch.tensor(known.std)
        ends = ends.expand(2, settings.shape[0])
    black, white = ends[..., None, None]
    return black, white


def _loss(label_smoothing: float, model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"], label_smoothing=label_smoothing)


def _score(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits, labels = model(batch["images"]).float(), batch["labels"]  # (B, C), (B,)
    return F.cross_entropy(logits, labels, reduction="none"), 100.0 * (logits.argmax(-1) == labels)


def _network(settings: ImageTask, classes: int) -> nn.Module:
    channels, pixels, patch = settings.shape
    size = (settings.width, settings.depth, settings.heads, settings.mlp_ratio)
    return vit(pixels, patch, channels, *size, classes=classes, pooling=settings.pooling)


def _trained_network(settings: ImageTask) -> nn.Module:
    set_of_pictures = pictures.PICTURES[settings.data]
    if not settings.normalised:
        raise ValueError("pretrained needs normalised=True: the network was trained with normalised images")
    model = pretrained_vit(settings.pretrained, settings.shape[1], set_of_pictures.mean, set_of_pictures.std)
    if model.num_classes != set_of_pictures.classes:
        owner = f"model {settings.pretrained} has {model.num_classes} classes"
        raise ValueError(f"{owner}, {settings.data} has {set_of_pictures.classes}")
    return model


# Digits and glyphs: fixed tensors -----------------------------------------------------------------------------------


def _embedded_task(settings: ImageTask, device: torch.device) -> Task:
    names = settings.glyph_tasks or tuple(glyphs.TASKS)
    if settings.data == "digits":
        read, classes = digits.digits, digits.CLASSES
    else:
        read = partial(_glyph_images, names, settings.copies)
        classes = sum(len(glyphs.characters(name)) for name in names)
    fixed = {"data", "glyph_tasks", "copies", "width", "depth", "heads", "mlp_ratio", "patch", "pooling"}
    inputs = {name: value for name, value in asdict(settings).items() if name in fixed | {"label_smoothing"}}
    return Task(
        key=cache_key(inputs, _embedded_task),
        model=partial(_network, settings, classes),
        loss=partial(_loss, settings.label_smoothing),
        loader=partial(_fixed_loader, read),
        batches=partial(_fixed_batches, read, device),
        score=_score,
        metric="accuracy, %",
    )


@lru_cache(maxsize=6)  # three splits of two tasks: photographs take seconds
def _glyph_images(tasks: Sequence[str], copies: int, split: str) -> tuple[Tensor, Tensor]:
    """Return fixed photographs (N, 1, 24, 24), never inverted, and labels (N,); held-out faces get two copies each."""
    drawn = glyphs.glyphs(tasks, split)
    style = replace(glyphs.MILD, inversion=0.0)
    copies = copies if split == "train" else 2
    generator = torch.Generator().manual_seed({"train": 0, "test": 1, "validation": 2}[split])
    # the three channels of a photograph are one
    images = [glyphs.photograph(drawn.images, style, generator)[:, :1] for _ in range(copies)]
    return torch.cat(images), drawn.labels.repeat(copies)


class FixedImages(Dataset):
    """Images and labels in memory, indexed by whole batches."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"images": self.images[indices], "labels": self.labels[indices]}


def _fixed_loader(read: Callable[[str], tuple[Tensor, Tensor]], recipe: TrainingRecipe, seed: int) -> DataLoader:
    images, labels = read("train")
    sampler = ShuffledBatches(len(labels), recipe, seed)
    return DataLoader(FixedImages(images, labels), batch_sampler=sampler, collate_fn=as_it_is)


def _fixed_batches(read: Callable[[str], tuple[Tensor, Tensor]], device: torch.device, split: str) -> list[Batch]:
    images, labels = (tensor.to(device).split(EVALUATION_BATCH) for tensor in read(split))
    return [{"images": part, "labels": own} for part, own in zip(images, labels, strict=True)]


# From the hub: read and augmented on the way ------------------------------------------------------------------------


def _hub_task(settings: ImageTask, device: torch.device) -> Task:
    name, pixels = settings.data, settings.shape[1]
    for split in ("train", "validation", "test"):
        pictures.rows(name, split)  # what is missing should not cost hours first
    kinds = {"mixup", "cutmix", "randaugment", "repeats"}
    augmentation = pictures.Augmentation(**{kind: getattr(settings, kind) for kind in kinds})
    workers = pictures.workers(device)
    inputs = {"task": settings, "commit": hub.commit(pictures.PICTURES[name].repo, "dataset")}
    model = partial(_network, settings, pictures.PICTURES[name].classes)
    if settings.pretrained:
        inputs |= {"model": hub.commit(settings.pretrained, "model")}
        model = partial(_trained_network, settings)
        model()  # what is missing, or does not fit, should not cost hours first
    return Task(
        key=cache_key(inputs, _hub_task),
        model=model,
        loss=partial(_loss, settings.label_smoothing),
        loader=partial(pictures.training_loader, name, pixels, augmentation, settings.normalised, workers),
        batches=partial(_hub_batches, name, pixels, settings.normalised, device),
        score=_score,
        metric="accuracy, %",
    )


@lru_cache(maxsize=6)
def _hub_batches(name: str, pixels: int, normalised: bool, device: torch.device, split: str) -> DataLoader:
    """Return the evaluation loader of a split; under `accelerate launch` every process reads all of it."""
    loader = pictures.evaluation_loader(name, split, pixels, normalised, pictures.workers(device))
    return prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)
