"""LoRA and IA³ on transformers' encoders, T5, GPT-2 and Llama: made, and written in peft's format, by peft itself."""

import copy
import re
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

# Ends of module names in BERT and similar encoders, in T5 and in GPT-2, whose c_attn is query, key and value in one.
QUERY_VALUE = "query|value|q|v|c_attn"
LLAMA = "(q|k|v|o|gate|up|down)_proj"  # all matrices of its layers, as is usual for language models
KEY_VALUE = "key|value|k|v|c_attn|k_proj|v_proj"
MLP_OUTPUT = r"layer\.\d+\.output\.dense|wo|mlp\.c_proj|down_proj"  # a BERT's attention has an output.dense too
LORA_SCALE = 2  # α / rank


def adapt(model: nn.Module, kind: Literal["lora", "ia3"], rank: int = 8) -> nn.Module:
    """Put an untrained adapter on a model: it computes what it did before, and only the adapter is trainable.

        LoRA   W + 2 B A on queries and values, in a Llama on all matrices of its layers; A (rank, in) is drawn from
               torch's global generator, B (out, rank) is 0
        IA³    keys, values, and the input of each MLP's second matrix, each times a vector; all vectors are 1

    Source: Hu et al., arXiv 2106.09685, section 4; Liu et al., arXiv 2205.05638, section 3.3.

    Args:
        model: it is changed in place, as peft does it; pass a copy if the model is still needed.
        kind: "lora" or "ia3".
        rank: of LoRA's updates; IA³ has none.

    Returns:
        A peft.PeftModel, which is called, and generates, as the model does.

    Raises:
        ValueError: the kind is unknown, the rank is below 1, or no module of the model has such a name.
    """
    from peft import IA3Config, LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # weights are stored as (in, out)
    if kind == "lora":
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        targets = _matching(f"{QUERY_VALUE}|{LLAMA}", model)
        config = LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=targets, fan_in_fan_out=transposed)
    elif kind == "ia3":
        targets, inputs = _matching(f"{KEY_VALUE}|{MLP_OUTPUT}", model), _matching(MLP_OUTPUT, model)
        config = IA3Config(target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=transposed)
    else:
        raise ValueError(f"unknown kind of adapter {kind!r}; there are lora and ia3")
    return get_peft_model(model, config)


def save(adapted: nn.Module, folder: str | Path) -> None:
    """Write the adapter without its base: adapter_config.json and adapter_model.safetensors.

    Args:
        adapted: what `adapt` returned.
        folder: is made if it does not exist.
    """
    # with the default, peft asks the hub whether the vocabulary has grown, if the base came from a repository
    adapted.save_pretrained(folder, save_embedding_layers=False)


def folded(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """Return the parameters of a model with an adapter folded into its weights, by peft; the model is left unchanged.

    Args:
        model: the base.
        folder: holds the adapter in peft's format.
    """
    from peft import PeftModel

    both = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    return {name: parameter.detach() for name, parameter in both.named_parameters()}


def _matching(ends: str, model: nn.Module) -> str:
    """Return the pattern of the full names with one of these ends, and check that the model has one."""
    pattern = rf"(.*\.)?({ends})"
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise ValueError(f"{type(model).__name__} has no module named {ends}: adapters know BERT, T5, GPT-2 and Llama")
    return pattern
