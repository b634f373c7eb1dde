"""The paper's three plug-ins for a Transformer that exists already: zeroth bias, restricted norm, JSReLU.

Source: "Towards the Connection between Activation Sparsity and Flat Minima", arXiv 2605.25612. An MLP block with keys
K, values V and activation σ on the token x_t at position t (after its norm, whose weight is w) becomes

    z_t = V σ(K (x_t + b_t))    zeroth bias b_t, each entry within ±c |w|; or V σ(K x_t) + b_t (the authors' later code)
    w ≥ 1, no bias              restricted norm; in fine-tuning |w| ≥ min(step / uplift, 1), and the bias stays as it is
    σ = JSReLU                  in fine-tuning (1 − k) σ_old + k JSReLU, k = min(step / mixing, 1)

The modules themselves, and what keeps b and w within their bounds, are in sparsity/plugin_modules.py.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.activations import Mixture, make
from sparsity.blocks import LAYOUTS, Block, Layout, find_blocks, layers_without
from sparsity.plugin_modules import (
    BatchShape,
    BlockPlugins,
    CachedTokens,
    SparsifiedLayer,
    ZerothBiasAtInput,
    ZerothBiasAtOutput,
    add_mixin,
    add_zeroth_bias,
    bound_norm,
    follow_batch,
    follow_cache,
    forget_bias,
    innermost,
    keep_constraints,
)
from sparsity.tracing import attribute, trace_model

MARK = "sparsity_plugins"  # the buffer in which a sparsified model keeps the options of `sparsify`
PLACEMENTS = ("input", "output")
EXEMPTIONS = ("zeroth_bias", "mlp_norms", "norms", "biases", "vectors")
# What the authors' code exempts from weight decay: nothing on the ViT; on T5 names with "bias", but no norm's weight.
PROTOCOLS: Mapping[str, tuple[str, ...]] = {"vit": (), "t5": ("biases",)}


def sparsify(
    model: nn.Module,
    activation: str | None = "jsrelu",
    *,
    zeroth_bias: bool = True,
    placement: str = "input",
    restricted_norm: bool = True,
    tokens: int | None = None,
    clip: float | None = 0.1,
    mixing_steps: int = 0,
    uplift_steps: int = 0,
    layouts: Sequence[Layout] = LAYOUTS,
    example: Any = None,
) -> nn.Module:
    """Install the plug-ins (equations above) in every MLP block of `model`, IN PLACE, and return it.

    Call it before the optimizer is made, which has to get the new parameters, and before DDP or torch.compile. Note:

    - Module paths, parameter names and classes (isinstance) stay. Each block gets a parameter `zeroth_bias`
      (tokens, d), zero at first, at the MLP's entrance or its second linear; the bias of its norm becomes a buffer of
      the same name. State dicts of the model as it was load strictly: absent zeroth biases as zero, and schedules stay;
      the biases of norms are loaded only with `uplift_steps`, and stay zero otherwise.
    - Which norm feeds an MLP is found by running its layer, by itself and on a few made-up tokens. A model whose norms
      stand elsewhere (behind the MLP, as in OLMo-2) is refused.
    - After each step of any torch optimizer that owns parameters of a block, its norm is bounded and then its zeroth
      bias clipped. Weights that are loaded and exceed the bounds are put right by the next step.
    - Weight decay acts on zeroth biases and norm weights as on any parameter: see `parameter_groups`.
    - In post-norm models (BERT) the norm before the MLP feeds the residual stream too, in parallel layers (Phi, Falcon)
      attention. It is restricted all the same; for attention there is a warning.
    - Fine-tuning, with both `mixing_steps` and `uplift_steps`, starts with exactly the outputs of the model as it was.
      A step that GradScaler skips does not count; where several optimizers share a block, a step of each of them counts
      as one. The count is saved with models that have schedules: a buffer `schedule_step` of each layer.
    - It is saved by its own means and loaded by `sparsity.load`: the buffer `sparsity_plugins` keeps the options.
    - peft: either may come first. Norms in `modules_to_save` are bounded; merging keeps the zeroth biases.
    - Row t of a zeroth bias belongs to column t of the batch, so that padding on the left shifts which token gets it.
      With a KV cache the rows go on after those of the cached tokens.

    Args:
        model: with MLP blocks that `layouts` describe.
        activation: a name in sparsity.activations.ACTIVATIONS; None keeps the model's own.
        zeroth_bias, restricted_norm: whether to install these two.
        placement: "input" adds the zeroth bias to the tokens that enter the MLP (the text), "output" to those that
            leave its second linear, before dropout (the authors' later code).
        tokens: rows of the zeroth biases, which limit the length of sequences. Default: a ViT's positions, class token
            included; 512 for T5; else the configuration's maximal positions.
        clip: c; None for no clipping (section V).
        mixing_steps: optimizer steps over which the activation is mixed in; 0: it is there at once.
        uplift_steps: optimizer steps over which norm weights are lifted to 1; the norms' biases are frozen as they
            are. 0, for training from scratch: weights below 1 are raised at once, and the norms' biases become zero.
        layouts: the kinds of layer to look for; your own go first: [Layout(...), *LAYOUTS].
        example: inputs of the model (a mapping is passed as keywords, a tuple as arguments), on which it is run once;
            needed only where a message says so, because a layer cannot be run by itself.

    Returns:
        `model` itself.

    Raises:
        ValueError: an option is out of range; there is no MLP block, or layers of the same class have none (mixtures of
            experts); a block has plug-ins already, is gated (only activation=None), no norm feeds it, its activation or
            its tokens cannot be reached, or it does not say how many tokens. The model is unchanged then.
    """
    _check_options(activation, placement, tokens, clip, mixing_steps, uplift_steps, restricted_norm)
    blocks = find_blocks(model, layouts)
    if example is not None:
        for block, seen in zip(blocks, trace_model(model, [(b.layer, b.parts) for b in blocks], example), strict=True):
            vars(block)["trace"] = seen
    if missing := layers_without(model, blocks):
        raise ValueError(
            f"{missing[0]}: no MLP that a layout describes was found in this layer, but in others of its class (a "
            f"mixture of experts?), e.g. {blocks[0].name}; describe its MLP too, layouts=[Layout(...), *LAYOUTS]"
        )
    biases = []
    for block in blocks:
        _check(block, activation, placement if zeroth_bias else None, restricted_norm, clip, mixing_steps)
        biases.append(_make_zeroth_bias(model, block, tokens) if zeroth_bias else None)
    if restricted_norm:
        _warn_of_shared_norms(blocks)
    stacks = {id(block.stack): block.stack for block in blocks} if zeroth_bias else {}
    cached = {key: follow_cache(stack) for key, stack in stacks.items()}
    for block, bias in zip(blocks, biases, strict=True):
        plugins = _install_block(block, bias, placement, restricted_norm, clip, mixing_steps, uplift_steps)
        if bias is not None:
            _install_zeroth_bias(block, placement, bias, cached[id(block.stack)])
        if activation is not None:
            _install_activation(block, plugins, make(activation))
        if restricted_norm:
            _bias_to_buffer(block.norm, keep=uplift_steps > 0)
            bound_norm(block.layer)
    if activation is not None or zeroth_bias or restricted_norm:
        _mark(
            model, layouts, activation=activation, zeroth_bias=zeroth_bias, placement=placement, tokens=tokens, clip=clip,
            restricted_norm=restricted_norm, mixing_steps=mixing_steps, uplift_steps=uplift_steps,
        )  # fmt: skip
    return model


def _mark(model: nn.Module, layouts: Sequence[Layout], **options: Any) -> None:
    """Write the options into the model's state dict, as a buffer of bytes, so that `sparsity.load` finds them there.

    A model without plug-ins that loads such a state dict meets a name that it does not expect, and says so.
    """
    if layouts is not LAYOUTS:
        options["layouts"] = [asdict(layout) for layout in layouts]
    text = json.dumps(options, sort_keys=True)
    device = next(model.parameters()).device
    model.register_buffer(MARK, torch.tensor(list(text.encode()), dtype=torch.uint8, device=device))
    model.register_load_state_dict_pre_hook(_compare_marks)


def _compare_marks(model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a state dict without the mark load; warn of one that was saved with other options."""
    own, saved = getattr(model, MARK), state_dict.get(prefix + MARK)
    if saved is not None and not torch.equal(saved.cpu(), own.cpu()):
        theirs, ours = (bytes(mark.tolist()).decode(errors="replace") for mark in (saved, own))
        warnings.warn(
            f"this state dict was saved after sparsify({theirs}), the model had sparsify({ours})", stacklevel=2
        )
    state_dict[prefix + MARK] = own


def _install_block(
    block: Block,
    bias: nn.Parameter | None,
    placement: str,
    restricted: bool,
    clip: float | None,
    mixing_steps: int,
    uplift_steps: int,
) -> BlockPlugins:
    layer, layout = block.layer, block.layout
    holder = {"input": layout.entrance, "output": layout.value}[placement] if bias is not None else None
    add_mixin(layer, SparsifiedLayer)
    layer._plugins = BlockPlugins(
        block.trace.norm, layout.entrance, layout.activation, layout.value, holder, restricted, clip, mixing_steps,
        uplift_steps,
    )  # fmt: skip
    if mixing_steps or uplift_steps:
        device = next(block.key.parameters()).device
        layer.register_buffer("schedule_step", torch.zeros((), dtype=torch.int64, device=device))
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # keeps it off its fast path for evaluation, which skips the modules
    keep_constraints(layer)
    return layer._plugins


def _make_zeroth_bias(model: nn.Module, block: Block, tokens: int | None) -> nn.Parameter:
    """Return zeros (tokens, d) in the dtype of the keys; in that of the norm, where keys are quantised to integers."""
    weights = [weight for part in (block.key, block.norm) if part is not None for weight in part.parameters()]
    like = next((weight for weight in weights if weight.is_floating_point()), None)
    if like is None:
        kind = weights[0].dtype
        raise ValueError(f"{block.name}: a zeroth bias cannot be {kind}, as the keys are; pass zeroth_bias=False")
    return nn.Parameter(like.detach().new_zeros(tokens or _infer_tokens(model, block), block.width))


def _install_zeroth_bias(block: Block, placement: str, bias: nn.Parameter, cached: CachedTokens) -> None:
    module, mixin = (
        (block.entrance, ZerothBiasAtInput) if placement == "input" else (innermost(block.value), ZerothBiasAtOutput)
    )
    batch = follow_batch(block.layer) if block.trace.flattened else BatchShape()
    add_zeroth_bias(module, mixin, bias, _cached_tokens=cached, _batch_shape=batch, _path=block.name)


def _install_activation(block: Block, plugins: BlockPlugins, activation: nn.Module) -> None:
    if plugins.mixing_steps:
        activation = Mixture(block.activation, activation).to(next(block.key.parameters()).device)
    block.replace_activation(activation.train(block.layer.training))


def _bias_to_buffer(norm: nn.Module, keep: bool) -> None:
    bias = getattr(norm, "bias", None)
    if isinstance(bias, nn.Parameter):
        del norm.bias
        norm.register_buffer("bias", bias.detach() if keep else torch.zeros_like(bias.detach()))
        if not keep:
            norm.register_load_state_dict_pre_hook(forget_bias)


def _warn_of_shared_norms(blocks: Sequence[Block]) -> None:
    shared = [block for block in blocks if block.trace.shared]
    if shared:
        warnings.warn(
            f"{shared[0].name}: the norm that feeds this MLP feeds attention too ({len(shared)} of {len(blocks)} "
            "blocks); its weights stay ≥ 1 for both, unless you pass restricted_norm=False",
            stacklevel=3,
        )


# What is asked for ---------------------------------------------------------------------------------------------------


def _check_options(
    activation: str | None,
    placement: str,
    tokens: int | None,
    clip: float | None,
    mixing_steps: int,
    uplift_steps: int,
    restricted_norm: bool,
) -> None:
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


def _check(
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
            f"({block.trace.error or 'fused or functional code?'}), so that no plug-in could be relied on; make the MLP "
            "call its modules"
        )
    if activation is not None and isinstance(block.activation, nn.Module) and not block.trace.activated:
        raise ValueError(
            f"{block.name}: its activation {block.layout.activation!r} does not run between the key and the value "
            f"layer (fused or functional code?), and would not become {activation!r}; pass activation=None"
        )


def _check_norm(block: Block) -> None:
    if block.norm is None:
        raise ValueError(f"{_norm_missing(block)}; or pass restricted_norm=False, clip=None")
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


def _norm_missing(block: Block) -> str:
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


def _infer_tokens(model: nn.Module, block: Block) -> int:
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


# Weight decay --------------------------------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    exempt: Sequence[str] = ("zeroth_bias",),
    layouts: Sequence[Layout] = LAYOUTS,
) -> list[dict[str, Any]]:
    """Return the parameters of `model`, with plug-ins or without, as optimizer groups: decayed ones and exempt ones.

    Args:
        model: its parameters that require no gradient are left out.
        weight_decay: of the parameters that decay.
        exempt: the kinds of parameter that do not decay: "zeroth_bias"; "mlp_norms", weights and biases of the norms
            that feed MLPs; "norms", those of all norms (classes with Norm in their name); "biases", parameters with
            "bias" in their name, among them zeroth biases and T5's relative positions; "vectors", parameters of fewer
            than two dimensions. PROTOCOLS["vit"] and PROTOCOLS["t5"] are what the authors exempt.
        layouts: the kinds of layer to look for, as for `sparsify`; of use for "mlp_norms" only.

    Returns:
        groups with "name" ("decayed" or "exempt"), "params" and "weight_decay", none of them empty.

    Raises:
        ValueError: an unknown word in `exempt`; or "mlp_norms" where there is no MLP, or no norm that feeds it.
    """
    for word in exempt:
        if word not in EXEMPTIONS:
            raise ValueError(f"unknown exemption {word!r}, expected some of {', '.join(EXEMPTIONS)}")
    spared = {id(parameter) for norm in _norms(model, exempt, layouts) for parameter in norm.parameters(recurse=False)}
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "exempt": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = id(parameter) in spared or _exempt_by_itself(name, parameter, exempt)
            groups["exempt" if is_exempt else "decayed"].append(parameter)
    decay = {"decayed": weight_decay, "exempt": 0.0}
    return [dict(name=name, params=params, weight_decay=decay[name]) for name, params in groups.items() if params]


def _norms(model: nn.Module, exempt: Sequence[str], layouts: Sequence[Layout]) -> list[nn.Module]:
    norms = []
    if "norms" in exempt:
        norms += [module for module in model.modules() if "Norm" in type(module).__name__ and hasattr(module, "weight")]
    if "mlp_norms" in exempt:
        for block in find_blocks(model, layouts):
            if block.norm is None:
                raise ValueError(_norm_missing(block))
            norms.append(block.norm)
    return norms


def _exempt_by_itself(name: str, parameter: nn.Parameter, exempt: Sequence[str]) -> bool:
    return (
        ("zeroth_bias" in exempt and "zeroth_bias" in name)
        or ("biases" in exempt and "bias" in name)
        or ("vectors" in exempt and parameter.ndim < 2)
    )
