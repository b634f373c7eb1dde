"""Fine-tuning for sparsity with LoRA: what trains beside the adapters, and where the scale of a norm stands.

Protocol of arXiv 2605.25612 (the authors' code): from a trained network, LoRA on every linear; all biases, the weights
of norms and the zeroth biases train, positions and class tokens do not.

    model = sparsify(model, mixing_steps=3000, uplift_steps=3000)
    model = get_peft_model(model, LoraConfig(r=192, lora_alpha=1, target_modules="all-linear"))
    unfreeze(model)                       # the optimizer comes after this
    …
    model = model.merge_and_unload()      # peft's save_pretrained keeps the adapters alone, and none of the others
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparsity.blocks import LAYOUTS, Block, find_blocks

TOLERANCE = 1e-3  # relative change of outputs that is rounding


def unfreeze(model: nn.Module) -> list[str]:
    """Let zeroth biases, the weights of norms and all biases of `model` train, and return their names.

    peft freezes all that is not an adapter. Its own ways round that do not fit: `bias="all"` spares zeroth biases and
    norms, and `modules_to_save` trains a copy of a norm. Parameters called `bias` count, of whichever module, and
    weights of modules with Norm in the name of their class; a T5's relative positions count as positions.

    Args:
        model: with peft's adapters or without; a `PeftModel` or the model inside it.

    Raises:
        ValueError: there is no such parameter, or one of them holds no floating-point numbers (it is quantised).
    """
    norms = {id(module.weight) for module in model.modules() if _is_norm(module)}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in ("bias", "zeroth_bias") or id(parameter) in norms
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has neither norms with weights nor biases: nothing to unfreeze")
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is of type {parameter.dtype} and cannot train; load the model unquantised")
    for parameter in found.values():
        parameter.requires_grad_(True)
    return list(found)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)


@torch.no_grad()
def fold_norms(model: nn.Module, outputs: Callable[[nn.Module], Tensor]) -> nn.Module:
    """Move the scale of the norms that feed MLPs into the keys, IN PLACE, and return the model: the same function.

    With norm(x) = w ⊙ x̂ + β, keys K and their bias c: K ← K diag(|w|), w ← sign(w) with sign(0) = 1, c ← c + K β and
    β ← 0. Then |w| = 1, as a restricted norm has it, although nothing that the network computes has changed.

    Args:
        model: in which the norms feed nothing but the keys: the attribute paths of a layer do not tell, hence the next.
        outputs: maps the model to its outputs on some example, with which the result is compared.

    Raises:
        ValueError: the outputs change, since norms feed the residual stream or attention too; an MLP has no norm, is
            gated, or its keys are no `nn.Linear`; a norm has a bias and the keys have none. The model is unchanged.
    """
    blocks = find_blocks(model, LAYOUTS)
    for block in blocks:
        _check_foldable(block)
    training, state = model.training, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = outputs(model.eval())
    _fold(blocks)
    change = (outputs(model) - before).norm() / before.norm()
    model.train(training)
    if not change < TOLERANCE:
        model.load_state_dict(state)
        raise ValueError(
            f"{blocks[0].name}: folding norms into keys changes the outputs of {type(model).__name__} by "
            f"{100 * change:.1g} %: its norms feed more than the MLPs, and cannot be folded"
        )
    return model


def _fold(blocks: Sequence[Block]) -> None:
    for block in blocks:
        norm, key = block.norm, block.key
        if getattr(norm, "bias", None) is not None:
            key.bias += key.weight @ norm.bias
            norm.bias.zero_()
        key.weight *= norm.weight.abs()  # (d_ff, d) · (d,)
        norm.weight.copy_(torch.where(norm.weight < 0, -1.0, 1.0))


def _check_foldable(block: Block) -> None:
    if block.norm is None:
        raise ValueError(f"{block.name}: no norm with a weight was found that feeds this MLP, so there is none to fold")
    if block.gated or not isinstance(block.key, nn.Linear):
        raise ValueError(f"{block.name}: its norm feeds more than one linear, or a {type(block.key).__name__}")
    if getattr(block.norm, "bias", None) is not None and block.key.bias is None:
        raise ValueError(f"{block.name}: the bias of its norm has no place in keys without a bias")
