"""Statistics of a network's weights, without any data: norms by kind of parameter, and traces of KKᵀ.

Source: the authors of arXiv 2605.25612 log these along training, beside gradients and densities.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from sparsity.blocks import LAYOUTS, Layout, find_blocks, find_norms

KINDS = ("keys", "values", "MLP norms", "other norms", "attention", "zeroth biases", "biases", "embeddings and head")


def kinds_of_parameters(model: nn.Module, layouts: Sequence[Layout] = LAYOUTS) -> dict[str, str]:
    """Return name → kind, one of KINDS, of every parameter.

    "keys" (gates of gated MLPs among them) and "values" are the matrices of MLP blocks. Norms count with their weights
    only; "attention" is every matrix with "attn" or "attention" in its name; "biases" are all parameters whose names
    end in "bias". "embeddings and head" is what remains: embeddings, positions, patches, poolers, output matrices.

    Args:
        model: any model with MLP blocks that `find_blocks` knows.
        layouts: the kinds of layer to look for.

    Raises:
        ValueError: no MLP block.
    """
    blocks = find_blocks(model, layouts)
    special = {id(norm.weight): "other norms" for norm in find_norms(model)}
    special |= {id(block.norm.weight): "MLP norms" for block in blocks if block.norm is not None}
    special |= {id(block.value.weight): "values" for block in blocks}
    special |= {id(block.key.weight): "keys" for block in blocks}
    gates = [block.layer.get_submodule(block.layout.gate) for block in blocks if block.gated]
    special |= {id(gate.weight): "keys" for gate in gates}
    named = model.named_parameters()
    return {name: special.get(id(parameter)) or _kind(name, parameter.ndim) for name, parameter in named}


def _kind(name: str, dimensions: int) -> str:
    if "zeroth_bias" in name:
        return "zeroth biases"
    if name.endswith("bias"):
        return "biases"
    is_attention = "attn" in name.lower() or "attention" in name.lower()
    return "attention" if is_attention and dimensions > 1 else "embeddings and head"


def parameter_norms(model: nn.Module, layouts: Sequence[Layout] = LAYOUTS) -> dict[str, float]:
    """Return kind → Euclidean norm of all parameters of this kind together, in the order of KINDS.

    Args:
        model, layouts: as for `kinds_of_parameters`, which says what the kinds are.

    Raises:
        ValueError: no MLP block.
    """
    kinds, squares = kinds_of_parameters(model, layouts), defaultdict(float)
    for name, parameter in model.named_parameters():
        squares[kinds[name]] += parameter.detach().double().square().sum().item()
    return {kind: math.sqrt(squares[kind]) for kind in KINDS if kind in squares}


def key_traces(model: nn.Module, layouts: Sequence[Layout] = LAYOUTS) -> dict[str, float]:
    """Return name of the MLP block → tr(KKᵀ) = ‖K‖_F², in module order.

    Args:
        model, layouts: as for `kinds_of_parameters`.

    Raises:
        ValueError: no MLP block.
    """
    weights = {block.name: block.key.weight for block in find_blocks(model, layouts)}
    return {name: weight.detach().double().square().sum().item() for name, weight in weights.items()}
