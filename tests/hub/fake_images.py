"""Fashion-MNIST, CIFAR-10 and ImageNet-1K in small: files, columns, label names, splits and cards of the true format.

Where each thing was read: see sparsity.studies.data.pictures. ImageNet's images are JPEG files of many sizes, some of
them grey or CMYK; its label 517 is "crane2", since 134 is "crane"; its `test` split has no labels (-1).
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from fake_hub import repository
from PIL import Image as Picture
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from sparsity.studies.data.pictures import PICTURES

ROWS = {"train": 120, "validation": 24, "test": 24}
SHARDS = {"train": 3, "validation": 2, "test": 1}
SPLITS = {"fashion_mnist": ("train", "test"), "cifar10": ("train", "test"), "imagenet": tuple(ROWS)}


def label_names(name: str) -> list[str]:
    """The names on the true card, in order."""
    names = list(PICTURES[name].class_names)
    if name == "imagenet":
        names[517] = "crane2"  # names on a card differ from each other, those of the synsets do not
    return names


def write_pictures(root: Path, name: str, names: Sequence[str] | None = None, announced: int | None = None) -> Path:
    """Write one data set into the Hub cache under `root`; `names` and `announced` make one unlike the true one."""
    pictures = PICTURES[name]
    folder = repository(root, "dataset", pictures.repo)
    names = label_names(name) if names is None else list(names)
    features = Features({pictures.image: Image(), "label": ClassLabel(names=names)})
    (folder / pictures.folder).mkdir(exist_ok=True)
    for number, split in enumerate(SPLITS[name]):
        generator = np.random.default_rng(number)
        labels = generator.integers(0, len(names), ROWS[split])
        images = [{"bytes": _file(name, int(label), place, generator)} for place, label in enumerate(labels)]
        labels = [-1] * len(labels) if (name, split) == ("imagenet", "test") else labels.tolist()
        data = Dataset.from_dict({pictures.image: images, "label": labels}, features=features)
        shards = SHARDS[split] if name == "imagenet" else 1
        for index in range(shards):
            path = folder / pictures.folder / f"{split}-{index:05d}-of-{shards:05d}.parquet"
            data.shard(shards, index, contiguous=True).to_parquet(path)
    _write_card(folder, name, features, announced)
    return folder


def _file(name: str, label: int, place: int, generator: np.random.Generator) -> bytes:
    """An encoded image whose colour depends on its label."""
    width, height = {"fashion_mnist": (28, 28), "cifar10": (32, 32)}.get(name, (60 + place % 7, 40 + place % 5))
    colour = np.random.default_rng(label).integers(40, 216, 3)
    pixels = np.clip(colour + generator.integers(-40, 40, (height, width, 3)), 0, 255).astype(np.uint8)
    image = Picture.fromarray(pixels[..., 0] if name == "fashion_mnist" else pixels)
    if name == "imagenet":
        image = image.convert({0: "L", 1: "CMYK"}.get(place % 20, "RGB"))
    file = io.BytesIO()
    image.save(file, "JPEG" if name == "imagenet" else "PNG")
    return file.getvalue()


def _write_card(folder: Path, name: str, features: Features, announced: int | None) -> None:
    pictures = PICTURES[name]
    splits = [{"name": split, "num_examples": announced or ROWS[split]} for split in SPLITS[name]]
    info = {"features": features._to_yaml_list(), "splits": splits}
    if pictures.config != "default":
        info["config_name"] = pictures.config
    files = [{"split": split, "path": f"{pictures.folder}/{split}-*"} for split in SPLITS[name]]
    card = {"dataset_info": info, "configs": [{"config_name": pictures.config, "data_files": files}]}
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{text}---\n# {name}\n", encoding="utf-8")


def write_vit(root: Path, repo: str, pixels: int) -> Path:
    """Write a small ViT under the name of one of timm's repositories, by timm itself; `pixels` is the image side."""
    name, _, tag = repo.removeprefix("timm/").partition(".")
    sizes = dict(img_size=pixels, embed_dim=16, depth=2, num_heads=2)
    torch.manual_seed(0)
    model = timm.create_model(name, **sizes)
    folder = repository(root, "model", repo)
    shape = {"tag": tag, "input_size": [3, pixels, pixels], "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    save_for_hf(model, folder, model_config=model.pretrained_cfg | shape, model_args=sizes, safe_serialization=True)
    return folder
