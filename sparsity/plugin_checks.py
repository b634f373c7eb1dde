"""Whether a model can take the plug-ins that are asked for: nothing of it is changed before all of this is known.

`sparsity.plugins.sparsify` installs them. Each refusal is one line, which names the block or the option and says what
to do. How many positions a model has is found out here too.
"""

import math

import torch
from torch import Tensor, nn

from sparsity.activations import make
from sparsity.blocks import Block
from sparsity.plugin_modules import SparsifiedLayer, innermost
from sparsity.tracing import attribute

PLACEMENTS = ("input", "output")


def check_options(
    activation: str | None,
    placement: str,
    tokens: int | None,
    clip: float | None,
    mixing_steps: int,
    uplift_steps: int,
    restricted_norm: bool,
) -> None:
    """Raise for options of `sparsify` that are out of range, or that need each other."""
    if activation is not None:
        make(activation)  # raises for an unknown name
    if placement not in PLACEMENTS:
        raise ValueError(f"unknown placement {placement!r}, expected one of {', '.join(PLACEMENTS)}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be positive, got {tokens}")
    if clip is not None and not 0 <= clip < math.inf:
        raise ValueError(f"clip must be a number ≥ 0, or None for no clipping, got {clip}")
    for name, steps in (("mixing_steps", mixing_steps), ("uplift_steps", uplift_steps)):
        if steps < 0:
            raise ValueError(f"{name} must be ≥ 0, got {steps}")
    if mixing_steps and activation is None:
        raise ValueError(f"mixing_steps={mixing_steps} needs an activation to mix in, got activation=None")
    if uplift_steps and not restricted_norm:
        raise ValueError(f"uplift_steps={uplift_steps} lifts restricted norms, got restricted_norm=False")


def check_block(
    block: Block,
    activation: str | None,
    placement: str | None,
    restricted_norm: bool,
    clip: float | None,
    mixing_steps: int,
) -> None:
    """Raise if the block cannot take the plug-ins; nothing has been changed yet. No placement: no zeroth bias."""
    if isinstance(block.layer, SparsifiedLayer):
        raise ValueError(f"{block.name}: this MLP has its plug-ins already; call sparsify once, on a model without any")
    if block.gated and activation is not None:
        raise ValueError(
            f"{block.name}: this MLP is gated ({block.layout.name}) and its activation cannot be replaced by "
            f"{activation!r}; pass activation=None for zeroth bias and restricted norm (probe measures gated MLPs too)"
        )
    if mixing_steps and not isinstance(block.activation, nn.Module):
        kind = type(block.activation).__name__
        raise ValueError(f"{block.name}: a {kind} is no module, and cannot be mixed; pass mixing_steps=0")
    if block.trace.entered is None:
        raise ValueError(
            f"{block.name}: its layer could not be run by itself to see what feeds the MLP ({block.trace.error}); pass "
            "example=, inputs of the model"
        )
    _check_run(block, activation)
    if restricted_norm or (placement and clip is not None):
        _check_norm(block)
    if placement:
        _check_tokens(block, placement)


def _check_run(block: Block, activation: str | None) -> None:
    if not block.trace.valued:
        raise ValueError(
            f"{block.name}: its value layer {block.layout.value!r} does not run as a module "
            f"({block.trace.error or 'fused or functional code?'}), so that no plug-in could be relied on; make the "
            "MLP call its modules"
        )
    if activation is not None and isinstance(block.activation, nn.Module) and not block.trace.activated:
        raise ValueError(
            f"{block.name}: its activation {block.layout.activation!r} does not run between the key and the value "
            f"layer (fused or functional code?), and would not become {activation!r}; pass activation=None"
        )


def _check_norm(block: Block) -> None:
    if block.norm is None:
        raise ValueError(f"{norm_missing(block)}; or pass restricted_norm=False, clip=None")
    if not _scales_by_weight(block.norm, (1, -1, 1, 1) if block.convolutional else (1, 1, -1)):
        raise ValueError(
            f"{block.name}: {type(block.norm).__name__}, the norm that feeds this MLP, does not scale by its weight "
            "(but by 1 + weight, say), so the bounds do not fit it; pass restricted_norm=False, clip=None"
        )


def _check_tokens(block: Block, placement: str) -> None:
    """Raise if row t of a zeroth bias would not meet token t."""
    chunked = [getattr(module, "chunk_size_feed_forward", 0) for module in block.layer.modules()]
    if any(chunked):
        raise ValueError(
            f"{block.name}: with chunk_size_feed_forward={max(chunked)} the MLP sees pieces of "
            "sequences, and a zeroth bias cannot tell which; set it to 0, or pass zeroth_bias=False"
        )
    if block.convolutional:
        raise ValueError(f"{block.name}: a zeroth bias needs tokens, this MLP convolves maps; pass zeroth_bias=False")
    if any(getattr(module, "batch_first", True) is False for module in block.layer.children()):
        raise ValueError(
            f"{block.name}: a zeroth bias needs tokens (B, T, d), and this layer takes (T, B, d); make it with "
            "batch_first=True, or pass zeroth_bias=False"
        )
    given, entered = (math.prod(shape) for shape in (block.trace.tokens, block.trace.entered))
    if given != entered:
        raise ValueError(
            f"{block.name}: this MLP receives {block.trace.entered} of what its layer gets, {block.trace.tokens}, and "
            "a zeroth bias cannot tell which tokens those are; pass zeroth_bias=False"
        )
    if placement == "input" and innermost(block.entrance) is not block.entrance:
        raise ValueError(
            f"{block.name}: a zeroth bias before this linear would be lost when its adapter is merged; leave it out of "
            "the adapter's targets, or pass placement='output'"
        )


def norm_missing(block: Block) -> str:
    """Return the message that no norm feeds a block."""
    there = [path for path in block.layout.norms if attribute(block.layer, path) is not None]
    why = f"its layer could not be run by itself: {block.trace.error}; " if block.trace.entered is None else ""
    why = why or (f"the output of {' and '.join(there)} does not enter it; " if there else "")
    return (
        f"{block.name}: no norm with a weight was found that feeds this MLP ({block.layout.name}); {why}say where it "
        "is, layouts=[Layout(..., norms=(...)), *LAYOUTS]"
    )


@torch.no_grad()
def _scales_by_weight(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether the norm's output is zero if its parameters are: a norm that scales by 1 + weight fails."""
    weight = norm.weight
    token = torch.linspace(-1, 1, weight.numel(), device=weight.device).to(weight.dtype)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in norm.named_parameters()}
    output = torch.func.functional_call(norm, zeros, (token.reshape(shape),))
    return output.is_meta or not output.any()


# Positions -----------------------------------------------------------------------------------------------------------


def infer_tokens(model: nn.Module, block: Block) -> int:
    """Return the number of positions: by the first rule that fits a module around the block, innermost first."""
    parts = block.name.split(".")
    around = [model.get_submodule(".".join(parts[:count])) for count in reversed(range(len(parts)))]
    found = (rule(module) for rule in _POSITIONS for module in around)
    tokens = next((count for count in found if isinstance(count, int)), None)
    if tokens is None:
        raise ValueError(f"{block.name}: cannot infer the positions of {type(model).__name__}; pass tokens=")
    return tokens


def _timm_positions(module: nn.Module) -> int | None:
    patches = getattr(getattr(module, "patch_embed", None), "num_patches", None)
    return None if patches is None else patches + getattr(module, "num_prefix_tokens", 0)


def _torchvision_positions(module: nn.Module) -> int | None:
    return getattr(module, "seq_length", None)


def _vision_tower_positions(module: nn.Module) -> int | None:
    """Of transformers' models: CLIP and SigLIP hold the number, ViT and DeiT a position embedding per position."""
    embeddings = getattr(module, "embeddings", None)
    rows = getattr(embeddings, "position_embeddings", None)
    return rows.shape[-2] if isinstance(rows, Tensor) else getattr(embeddings, "num_positions", None)


def _open_clip_positions(module: nn.Module) -> int | None:
    rows = getattr(module, "positional_embedding", None)
    return len(rows) if isinstance(rows, Tensor) and rows.ndim == 2 else None


def _embedded_positions(module: nn.Module) -> int | None:
    """Of transformers' OPT, BART and Whisper: a table of positions per stack, with rows in front that are none."""
    table = getattr(module, "embed_positions", None)
    return table.num_embeddings - getattr(table, "offset", 0) if isinstance(table, nn.Embedding) else None


def _resolution(module: nn.Module) -> int | None:
    """Of timm's Swin: the map's height × width, stage by stage."""
    sides = getattr(module, "input_resolution", None)
    return math.prod(sides) if isinstance(sides, tuple | list) else None


def _configured_positions(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    if "t5" in str(getattr(config, "model_type", "")):
        return 512  # its relative positions have no maximum
    return getattr(config, "max_position_embeddings", None)


_POSITIONS = (
    _resolution,
    _timm_positions,
    _torchvision_positions,
    _vision_tower_positions,
    _open_clip_positions,
    _embedded_positions,
    _configured_positions,
)
