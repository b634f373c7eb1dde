"""The paper's three plug-ins for a Transformer that exists already: zeroth bias, restricted norm, JSReLU.

Source: "Towards the Connection between Activation Sparsity and Flat Minima", arXiv 2605.25612. An MLP block with keys
K, values V and activation σ on the token x_t at position t (after its norm, whose weight is w) becomes

    z_t = V σ(K (x_t + b_t))    zeroth bias b_t, each entry within ±c |w|; or V σ(K x_t) + b_t (the authors' later code)
    w ≥ 1, no bias              restricted norm; in fine-tuning |w| ≥ min(step / uplift, 1), and the bias stays as it is
    σ = JSReLU                  in fine-tuning (1 − k) σ_old + k JSReLU, k = min(step / mixing, 1)

The modules themselves, and what keeps b and w within their bounds, are in sparsity/plugin_modules.py; what is refused,
in sparsity/plugin_checks.py.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from sparsity.activations import Mixture, make
from sparsity.blocks import LAYOUTS, Block, Layout, find_blocks, layers_without
from sparsity.plugin_checks import check_block, check_options, infer_tokens, norm_missing
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
from sparsity.tracing import trace_model

MARK = "sparsity_plugins"  # the buffer in which a sparsified model keeps the options of `sparsify`
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
    check_options(activation, placement, tokens, clip, mixing_steps, uplift_steps, restricted_norm)
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
        check_block(block, activation, placement if zeroth_bias else None, restricted_norm, clip, mixing_steps)
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
        options = dict(activation=activation, zeroth_bias=zeroth_bias, placement=placement, tokens=tokens, clip=clip)
        options |= dict(restricted_norm=restricted_norm, mixing_steps=mixing_steps, uplift_steps=uplift_steps)
        _mark(model, layouts, options)
    return model


def _mark(model: nn.Module, layouts: Sequence[Layout], options: dict[str, Any]) -> None:
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
    return nn.Parameter(like.detach().new_zeros(tokens or infer_tokens(model, block), block.width))


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
                raise ValueError(norm_missing(block))
            norms.append(block.norm)
    return norms


def _exempt_by_itself(name: str, parameter: nn.Parameter, exempt: Sequence[str]) -> bool:
    return (
        ("zeroth_bias" in exempt and "zeroth_bias" in name)
        or ("biases" in exempt and "bias" in name)
        or ("vectors" in exempt and parameter.ndim < 2)
    )
