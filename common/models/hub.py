"""Pretrained models and tokenizers of transformers: the one place that loads them, and checks what was loaded.

Left alone, `from_pretrained` fills what it does not find with random numbers, or with an empty vocabulary, and ignores
what it does not know. Here each of these is an error of one line that names the repository and the tensor.
"""

import json
import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data.hub import snapshot

OLD_BUFFERS = r"attn\.masked_bias$"  # constants of old checkpoints; transformers itself ignores the others


def model_folder(model_id: str) -> Path:
    """Return the local folder with configuration, tokenizer and weights (safetensors if there are any, else the .bin).

    Raises:
        HubError: the repository is not available.
        ValueError: it holds no weights.
    """
    folder = snapshot(model_id, "model", ["*.json", "vocab.txt", "merges.txt", "model*.safetensors"])
    if not list(folder.glob("model*.safetensors")):
        folder = snapshot(model_id, "model", ["pytorch_model*.bin"])
        if not list(folder.glob("pytorch_model*.bin")):
            raise ValueError(f"model {model_id} has neither model.safetensors nor pytorch_model.bin in {folder}")
    return folder


def configuration(folder: Path, model_id: str, model_type: str) -> dict[str, Any]:
    """Return what the folder's config.json says.

    Args:
        folder: as `model_folder` returns it.
        model_id: what errors call the model.
        model_type: the type that it has to be: "bert", "gpt2", "t5", …

    Raises:
        ValueError: it describes a model of another type.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != model_type:
        raise ValueError(f"model {model_id} is of type {config.get('model_type')!r}, expected {model_type!r}")
    return config


def load_model(kind: str, folder: Path, model_id: str, beside: str | None = None, **options: Any) -> nn.Module:
    """Load a model in float32 and evaluation mode, every tensor from the folder's files.

    Args:
        kind: a class of transformers, such as "BertModel".
        folder: holds config.json and the weights, as `model_folder` returns it.
        model_id: what errors call the model.
        beside: regular expression for the beginning of the names of tensors that the files may hold although the class
            does not have them (heads, poolers); None allows no such tensor.
        options: further arguments of the class's `from_pretrained`.

    Raises:
        ValueError: config.json describes another kind of model, or the files lack a tensor of it, hold it in another
            shape, or hold one that it does not have.
    """
    import transformers

    found = getattr(transformers, kind)
    configuration(folder, model_id, found.config_class.model_type)
    with _quiet():
        model, report = found.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model {model_id} lacks {len(missing)} tensors of {kind}, the first is {missing[0]}")
    for name, shape, expected in sorted(report["mismatched_keys"]):
        sizes = f"{tuple(shape)}, its config.json says {tuple(expected)}"
        raise ValueError(f"model {model_id}: tensor {name} has shape {sizes}")
    unknown = [name for name in report["unexpected_keys"] if not re.search(OLD_BUFFERS, name)]
    if unknown := sorted(name for name in unknown if beside is None or not re.match(beside, name)):
        raise ValueError(f"model {model_id} has {len(unknown)} tensors that {kind} has not, the first is {unknown[0]}")
    return model.eval()


def load_tokenizer(kind: str, folder: Path, model_id: str, **options: Any) -> Any:
    """Load a tokenizer from a folder.

    Args:
        kind: a class of transformers, such as "BertTokenizer".
        folder: holds tokenizer.json, or the files from which this class can make it.
        model_id: what errors call the model.
        options: further arguments of the class's `from_pretrained`.

    Raises:
        ValueError: the folder has no such files.
    """
    import transformers

    found = getattr(transformers, kind)
    sources = [name for name in found.vocab_files_names.values() if name != "tokenizer.json"]
    if not (folder / "tokenizer.json").exists() and not all((folder / name).exists() for name in sources):
        raise ValueError(f"model {model_id} has no tokenizer: neither tokenizer.json nor {' and '.join(sources)}")
    return found.from_pretrained(folder, **options)


def load_gguf(kind: str, file: Path, model_id: str) -> tuple[nn.Module, Any]:
    """Load a model, in float32 and evaluation mode, and its tokenizer from a file of llama.cpp's format (GGUF).

    Quantised weights become the numbers that their bits stand for. The package gguf has to be installed.

    Args:
        kind: a class of transformers, such as "LlamaForCausalLM".
        file: holds configuration, tokenizer and weights.
        model_id: what errors call the model.

    Raises:
        ValueError: it is no such file, or of another kind of model, or lacks tensors of it.
    """
    import transformers

    found = getattr(transformers, kind)
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # transformers and gguf raise all sorts
            raise ValueError(f"model {model_id}: {file} is no GGUF file that transformers can read") from error
        if not isinstance(config, found.config_class):
            expected = found.config_class.model_type
            raise ValueError(f"model {model_id} is of type {config.model_type!r}, expected {expected!r}")
        options = dict(gguf_file=file.name, dtype=torch.float32, output_loading_info=True)
        model, report = found.from_pretrained(file.parent, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model {model_id} lacks {len(missing)} tensors of {kind}, the first is {missing[0]}")
    return model.eval(), tokenizer


def check_fits(model_id: str, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Check that an expert has the tensors of its base: the same names and shapes.

    Args:
        model_id: what errors call the expert.
        state: the expert's tensors.
        like: the base's.

    Raises:
        ValueError: one of them lacks a tensor, or the expert has it in another shape; the message names the first.
    """
    for name in sorted(like.keys() ^ state.keys()):
        owner = "base" if name in like else "expert"
        raise ValueError(f"expert {model_id} does not fit the base: only the {owner} has the tensor {name}")
    for name, tensor in like.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"expert {model_id} does not fit the base: {name} has shape {tuple(state[name].shape)},"
                f" the base's has {tuple(tensor.shape)}"
            )


@contextmanager
def _quiet():
    """Let transformers show neither a progress bar nor its report on tensors: what matters in it is raised."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
