"""Repositories of the true format, made on the spot: a Hub cache with tiny CLIPs, their experts and the data sets.

File names, configuration keys, tensor names, columns, label names, splits and cards are those of the Hub; layers,
widths, vocabulary and numbers of images are small. Where each thing was read (public pages and repositories):

    fake                            true thing and its source
    ------------------------------  ---------------------------------------------------------------------------------
    base config.json                keys of openai/clip-vit-base-patch32's config.json as its copies carry them
                                    (model_type clip, logit_scale_init_value 2.6592, text eos_token_id 2, pad 1, bos 0)
    base weights pytorch_model.bin  that repository and its copies are tagged PyTorch, TensorFlow and JAX without
                                    Safetensors; tensor names with `vision_model.` and `text_model.`, position_ids
                                    buffers: checkpoints of transformers before 4.31 (keys in transformers issue 18853)
    base preprocessor_config.json   the whole file, from copies of openai/clip-vit-base-patch32 (316 bytes: size and
                                    crop_size are plain 224, feature_extractor_type CLIPFeatureExtractor)
    base tokenizer files            vocab.json, merges.txt, tokenizer.json, tokenizer_config.json,
                                    special_tokens_map.json: file lists of those copies; byte-level BPE with </w>, start
                                    and end of text as the last two ids: OpenAI CLIP, clip/simple_tokenizer.py.
                                    tokenizer.json and tokenizer_config.json as the installed CLIPTokenizer saves them
    expert files and config         file list of tanganke/clip-vit-base-patch32_sun397 (README.md, config.json,
                                    model.safetensors); keys: config.json of other CLIPVisionModels of that time;
                                    tensor names with `vision_model.` (transformers 4; card of that expert)
    SUN397 columns, names, shards   card and file list of tanganke/sun397 (data/test-00011-of-00018.parquet); three
                                    shards here
    Cars                            card and file list of tanganke/stanford_cars (two shards per split, 7 more splits)
    RESISC45                        file list of tanganke/resisc45 (data/train-00000-of-00001.parquet, 7 more splits);
                                    its card was not seen: columns and names as in its sister repositories
    EuroSAT, GTSRB                  viewers and file lists of tanganke/eurosat and tanganke/gtsrb (one file per split)
    SVHN                            file list of ufldl-stanford/svhn (cropped_digits/{train,test,extra}-*) and its
                                    dataset_infos.json (names "0" to "9" of full_numbers); two configs on the card
                                    (viewer); the columns of cropped_digits were not seen
    MNIST                           commit 77f3279 of ylecun/mnist: config mnist, mnist/{train,test}-00000-of-00001
    DTD                             card of tanganke/dtd (47 names, data/train-*, data/test-*)
    the other twelve                where each is read is said in merging/suites/data/vision_tasks.py: PCAM's files have
                                    a hash in their names, its labels are truth values; FER2013 is a web dataset
                                    (test/0.tar to 3.tar, nshards.txt; here two tars per split) without a card;
                                    Food101's test set is its split "validation"
    bases B/16 and L/14             as B/32 (patch 16 and 14; L/14 is wider)
    cache layout                    huggingface_hub: {models|datasets}--owner--name/{refs/main, snapshots/COMMIT/…}
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from merging.suites.data.vision_tasks import VISION_TASKS, VisionTask

BASE = "openai/clip-vit-base-patch32"
BASES = {BASE: (32, 32), "openai/clip-vit-base-patch16": (32, 16), "openai/clip-vit-large-patch14": (48, 14)}
TEST_ROWS, TRAIN_ROWS = 24, 160
SHARDS = {"SUN397": 3, "Cars": 2, "PCAM": 2, "FER2013": 2}
GREY = ("MNIST", "EMNIST", "FashionMNIST", "KMNIST", "FER2013")  # images of one channel
PIXELS = dict.fromkeys(GREY, (28, 28)) | {"SVHN": (32, 32), "EuroSAT": (64, 64), "Cars": (60, 40)}
CORRUPTIONS = ("contrast", "gaussian_noise")  # two of the seven further splits of Cars, RESISC45, EuroSAT, GTSRB


def make_fake_hub(
    root: Path, tasks: Sequence[str] = tuple(VISION_TASKS), bases: Sequence[str] = tuple(BASES)
) -> dict[str, str]:
    """Fill `root` with a Hub cache that holds the bases, their experts and the data sets of the tasks.

    Returns:
        The environment variables with which a process (started afterwards) sees this cache and nothing else.
    """
    for base in bases:
        write_base(root, base)
        for seed, name in enumerate(tasks):
            write_expert(root, VISION_TASKS[name].expert_id(base), seed=seed, base=base)
    for name in tasks:
        write_data(root, VISION_TASKS[name])
    return environment(root)


def environment(root: Path) -> dict[str, str]:
    """The variables that point huggingface_hub, transformers and datasets to the cache under `root`, offline."""
    return {
        "HF_HOME": str(root),
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_DATASETS_CACHE": str(root / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def repository(root: Path, kind: str, repo: str) -> Path:
    """Return the (new) snapshot folder of a repository and write refs/main, as a download does."""
    home = root / "hub" / f"{kind}s--{repo.replace('/', '--')}"
    commit = hashlib.sha1(f"{kind} {repo}".encode()).hexdigest()
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    return folder


def vision_config(width: int = 32, patch: int = 32) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "image_size": 224,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 2 * width,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": patch,
        "projection_dim": 16,
    }


def text_config() -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 24,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "projection_dim": 16,
        "vocab_size": len(_vocabulary()),
    }


def base_model(width: int = 32, patch: int = 32) -> CLIPModel:
    """The tiny base, always the same weights; every weight is large enough for merging to matter."""
    config = CLIPConfig(
        text_config=text_config(),
        vision_config=vision_config(width, patch),
        projection_dim=16,
        logit_scale_init_value=2.6592,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=weight[0].numel() ** -0.5)
            model.logit_scale.fill_(4.6052)  # ln 100, where CLIP ends up
    return model.eval()


def write_base(root: Path, repo: str = BASE) -> Path:
    """openai/clip-vit-base-patch32 in small, or one of its siblings."""
    folder = repository(root, "model", repo)
    width, patch = BASES.get(repo, BASES[BASE])
    model = base_model(width, patch)
    state = dict(model.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange((224 // patch) ** 2 + 1)[None]
    torch.save(state, folder / "pytorch_model.bin")
    _write_json(
        folder / "config.json",
        {
            "_name_or_path": repo,
            "architectures": ["CLIPModel"],
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": 16,
            "text_config": text_config(),
            "torch_dtype": "float32",
            "transformers_version": "4.16.0.dev0",
            "vision_config": vision_config(width, patch),
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": 224,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 224,
        },
    )
    _write_tokenizer(folder)
    (folder / "README.md").write_text("---\ntags:\n- vision\n---\n# Model Card: CLIP\n")
    return folder


def write_expert(root: Path, repo: str, seed: int = 0, width: int | None = None, base: str = BASE) -> Path:
    """tanganke/clip-vit-base-patch32_TASK in small: the base's tower plus a shared and a private direction."""
    folder, (own, patch) = repository(root, "model", repo), BASES[base]
    width = width or own
    shared, private = torch.Generator().manual_seed(1000), torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in base_model(width, patch).vision_model.state_dict().items():
        step = torch.randn(weight.shape, generator=shared) + torch.randn(weight.shape, generator=private)
        state[f"vision_model.{name}"] = (weight + 0.2 * weight.abs().mean().clamp_min(0.1) * step).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "config.json",
        {
            "_name_or_path": base,
            "architectures": ["CLIPVisionModel"],
            **vision_config(width, patch),
            "torch_dtype": "float32",
            "transformers_version": "4.40.1",
        },
    )
    (folder / "README.md").write_text(f"---\nbase_model:\n- {base}\nmetrics:\n- accuracy\n---\n# Model Card\n")
    return folder


def write_data(
    root: Path,
    task: VisionTask,
    names: Sequence[str] | None = None,
    columns: tuple[str, str] | None = None,
    test_split: str = "",
    hidden: int = 0,
) -> Path:
    """Write a task's data set in small; the other arguments make one that differs from the true one.

    Args:
        root: of the cache.
        task: an entry of VISION_TASKS.
        names: of the classes.
        columns: of images and labels.
        test_split: the name of that split.
        hidden: is added to labels without names.
    """
    folder, columns = repository(root, "dataset", task.repo), columns or task.columns
    names = task.class_names if names is None else list(names)
    kind = ClassLabel(names=names) if task.named else Value("bool" if task.name == "PCAM" and not hidden else "int64")
    features = Features({columns[0]: Image(), columns[1]: kind})
    splits = {"train": TRAIN_ROWS, test_split or task.test: TEST_ROWS}
    if task.name in ("Cars", "RESISC45", "EuroSAT", "GTSRB"):
        splits |= dict.fromkeys(CORRUPTIONS, 2)
    if task.name == "SVHN":
        splits["extra"] = 2
    for number, (split, rows) in enumerate(splits.items()):
        data, shards = _rows(task, rows, len(names), columns, number, hidden), SHARDS.get(task.name, 1)
        if task.files.endswith(".tar"):
            _write_tars(data, folder / split, columns, shards)
        else:
            places = folder / task.folder, split, shards if rows > 2 else 1
            _write_shards(data.cast(features), *places, hashed=task.name == "PCAM")
    if not task.files.endswith(".tar"):
        _write_card(folder, task, features, splits)
    return folder


def _rows(task: VisionTask, rows: int, classes: int, columns: tuple[str, str], seed: int, hidden: int) -> Dataset:
    """Images whose colour and pattern depend on the label; sorted by label, as the true files are."""
    generator = np.random.default_rng([seed, len(task.name)])
    labels = np.sort(generator.integers(0, classes, rows))
    width, height = PIXELS.get(task.name, (48, 48))
    images = []
    for label in labels:
        colour = np.random.default_rng(label).integers(0, 256, 3)
        noise = generator.integers(-40, 40, (height, width, 3))
        pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
        images.append(Picture.fromarray(pixels[..., 0] if task.name in GREY else pixels))
    image, label = columns
    kind, found = ClassLabel(classes) if task.named else Value("int64"), (labels + hidden).tolist()
    return Dataset.from_dict({image: images, label: found}, features=Features({image: Image(), label: kind}))


def _write_shards(data: Dataset, folder: Path, split: str, shards: int, hashed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        name = f"{split}-{index:05d}-of-{shards:05d}"
        end = f"-{hashlib.sha256(name.encode()).hexdigest()[:16]}" if hashed else ""
        data.shard(shards, index, contiguous=True).to_parquet(folder / f"{name}{end}.parquet")


def _write_tars(data: Dataset, folder: Path, columns: tuple[str, str], shards: int) -> None:
    """A web dataset: of each sample KEY.jpg and KEY.cls, a number as text; nshards.txt says how many tars there are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nshards.txt").write_text(str(shards))
    image, label = columns
    for index in range(shards):
        with tarfile.open(folder / f"{index}.tar", "w") as tar:
            for row, sample in enumerate(data.shard(shards, index, contiguous=True)):
                picture = io.BytesIO()
                sample[image].save(picture, format="JPEG")
                parts = {image: picture.getvalue(), label: str(sample[label]).encode()}
                for end, content in parts.items():
                    member = tarfile.TarInfo(f"s{index:03d}{row:05d}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _write_card(folder: Path, task: VisionTask, features: Features, splits: dict[str, int]) -> None:
    info = {
        "features": features._to_yaml_list(),
        "splits": [{"name": name, "num_bytes": 1000 * rows, "num_examples": rows} for name, rows in splits.items()],
        "download_size": 1000,
        "dataset_size": 1000,
    }
    files = [{"split": split, "path": f"{task.folder}/{split}-*"} for split in splits]
    if task.config != "default":
        info["config_name"] = task.config
    card: dict[str, Any] = {
        "dataset_info": info,
        "configs": [{"config_name": task.config, "data_files": files}],
    }
    if task.name == "SVHN":  # two configs: the card has a list
        other = {
            "config_name": "full_numbers",
            "features": [{"name": "image", "dtype": "image"}],
            "splits": [{"name": "test", "num_bytes": 1, "num_examples": 13068}],
        }
        card["dataset_info"] = [other, info]
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{text}---\n# {task.name}\n", encoding="utf-8")


def _vocabulary() -> dict[str, int]:
    symbols = list(bytes_to_unicode().values())
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in _merges())]
    return {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


def _merges() -> list[tuple[str, str]]:
    return [("t", "h"), ("th", "e</w>"), ("p", "h"), ("o", "f</w>"), ("ph", "o"), ("t", "o</w>"), ("pho", "to</w>")]


def _write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt as CLIP's, tokenizer.json and tokenizer_config.json as CLIPTokenizer saves them."""
    CLIPTokenizer(vocab=_vocabulary(), merges=_merges(), model_max_length=77).save_pretrained(folder)
    _write_json(folder / "vocab.json", _vocabulary())
    lines = ["#version: 0.2", *(" ".join(pair) for pair in _merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    end = {"content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    start = {**end, "content": "<|startoftext|>"}
    _write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": "<|endoftext|>",
        },
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
