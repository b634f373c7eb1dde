"""LoRA as the paper's fine-tuning has it: on every linear, with biases, norms and zeroth biases trained beside it."""

from torch import nn

from sparsity.finetuning import unfreeze


def adapt(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """Put LoRA on every linear of a network, IN PLACE, unfreeze what trains beside it, and return the network.

    The updates W + (alpha / rank) B A begin at 0; A is drawn from torch's global generator. The output layer of a T5,
    which is its embeddings, gets none. Attribute paths stay, so that probes and plug-ins find the MLPs.

    Args:
        model: with its plug-ins.
        rank, alpha: of the updates; at most 192 and 1 in the paper (arXiv 2605.25612, the authors' code).
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    model = inject_adapter_in_model(config, model)
    unfreeze(model)
    return model
