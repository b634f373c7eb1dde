"""Repositories of the true format, made on the spot: a Hub cache with a tiny CLIP, its experts and the eight data sets.

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
    cache layout                    huggingface_hub: {models|datasets}--owner--name/{refs/main, snapshots/COMMIT/…}
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from merging.suites.data.vision_tasks import VISION_TASKS, VisionTask

BASE = "openai/clip-vit-base-patch32"
TEST_ROWS, TRAIN_ROWS = 24, 160
SHARDS = {"SUN397": 3, "Cars": 2}
PIXELS = {"MNIST": (28, 28), "SVHN": (32, 32), "EuroSAT": (64, 64), "Cars": (60, 40)}
CORRUPTIONS = ("contrast", "gaussian_noise")  # two of the seven further splits of Cars, RESISC45, EuroSAT, GTSRB


def make_fake_hub(root: Path, tasks: Sequence[str] = tuple(VISION_TASKS)) -> dict[str, str]:
    """Fill `root` with a Hub cache that holds the base, the experts and the data sets of the tasks.

    Returns:
        The environment variables with which a process (started afterwards) sees this cache and nothing else.
    """
    write_base(root)
    for seed, name in enumerate(tasks):
        write_expert(root, VISION_TASKS[name].expert_id(BASE), seed=seed)
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


def vision_config(width: int = 32) -> dict[str, Any]:
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
        "patch_size": 32,
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


def base_model(width: int = 32) -> CLIPModel:
    """The tiny base, always the same weights; every weight is large enough for merging to matter."""
    config = CLIPConfig(
        text_config=text_config(), vision_config=vision_config(width), projection_dim=16, logit_scale_init_value=2.6592
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
    """openai/clip-vit-base-patch32 in small."""
    folder = repository(root, "model", repo)
    model = base_model()
    state = dict(model.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    torch.save(state, folder / "pytorch_model.bin")
    _write_json(
        folder / "config.json",
        {
            "_name_or_path": BASE,
            "architectures": ["CLIPModel"],
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": 16,
            "text_config": text_config(),
            "torch_dtype": "float32",
            "transformers_version": "4.16.0.dev0",
            "vision_config": vision_config(),
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


def write_expert(root: Path, repo: str, seed: int = 0, width: int = 32) -> Path:
    """tanganke/clip-vit-base-patch32_TASK in small: the base's tower plus a shared and a private direction."""
    folder = repository(root, "model", repo)
    shared, private = torch.Generator().manual_seed(1000), torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in base_model(width).vision_model.state_dict().items():
        step = torch.randn(weight.shape, generator=shared) + torch.randn(weight.shape, generator=private)
        state[f"vision_model.{name}"] = (weight + 0.2 * weight.abs().mean().clamp_min(0.1) * step).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "config.json",
        {
            "_name_or_path": BASE,
            "architectures": ["CLIPVisionModel"],
            **vision_config(width),
            "torch_dtype": "float32",
            "transformers_version": "4.40.1",
        },
    )
    (folder / "README.md").write_text(f"---\nbase_model:\n- {BASE}\nmetrics:\n- accuracy\n---\n# Model Card\n")
    return folder


def write_data(
    root: Path,
    task: VisionTask,
    names: Sequence[str] | None = None,
    columns: tuple[str, str] = ("image", "label"),
    test_split: str = "test",
) -> Path:
    """Write a task's data set in small; `names`, `columns` and `test_split` make one that differs from the true one."""
    folder = repository(root, "dataset", task.repo)
    names = task.class_names if names is None else list(names)
    features = Features({columns[0]: Image(), columns[1]: ClassLabel(names=names)})
    splits = {"train": TRAIN_ROWS, test_split: TEST_ROWS}
    if task.name in ("Cars", "RESISC45", "EuroSAT", "GTSRB"):
        splits |= dict.fromkeys(CORRUPTIONS, 2)
    if task.name == "SVHN":
        splits["extra"] = 2
    for number, (split, rows) in enumerate(splits.items()):
        data = _rows(task, rows, len(names), columns, seed=number).cast(features)
        _write_shards(data, folder / task.folder, split, SHARDS.get(task.name, 1) if rows > 2 else 1)
    _write_card(folder, task, features, splits)
    return folder


def _rows(task: VisionTask, rows: int, classes: int, columns: tuple[str, str], seed: int) -> Dataset:
    """Images whose colour and pattern depend on the label; sorted by label, as the true files are."""
    generator = np.random.default_rng([seed, len(task.name)])
    labels = np.sort(generator.integers(0, classes, rows))
    width, height = PIXELS.get(task.name, (48, 48))
    images = []
    for label in labels:
        colour = np.random.default_rng(label).integers(0, 256, 3)
        noise = generator.integers(-40, 40, (height, width, 3))
        pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
        images.append(Picture.fromarray(pixels[..., 0] if task.name == "MNIST" else pixels))
    image, label = columns
    return Dataset.from_dict(
        {image: images, label: labels.tolist()}, features=Features({image: Image(), label: ClassLabel(classes)})
    )


def _write_shards(data: Dataset, folder: Path, split: str, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        path = folder / f"{split}-{index:05d}-of-{shards:05d}.parquet"
        data.shard(shards, index, contiguous=True).to_parquet(path)


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
