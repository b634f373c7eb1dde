"""Finding the MLP blocks of a Transformer: what feeds each one, its keys, its activation, its values.

A `Layout` says where these stand in one kind of layer, by attribute paths. LAYOUTS knows those of timm, torchvision,
torch and most families of transformers; your own block takes one more: `find_blocks(model, [Layout(...), *LAYOUTS])`.
Which of a layer's norms feeds its MLP is not taken from their names, but seen (`sparsity.tracing`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.tracing import Parts, Trace, attribute, trace


@dataclass(frozen=True)
class Layout:
    """Where the parts of an MLP block stand in its layer, as attribute paths relative to the layer.

    Args:
        name: of the family, for messages.
        entrance: the module whose input is the MLP's input (the key layer itself, if nothing encloses the MLP).
        key, activation, value: first linear, activation, second linear.
        gate: the other first linear of a gated MLP (SwiGLU, GeGLU), which multiplies the activation; "" for none, and
            where one linear holds both halves.
        norms: the norms that may feed the MLP; `Block.norm` is the one that does.
    """

    name: str
    entrance: str
    key: str
    activation: str
    value: str
    gate: str = ""
    norms: tuple[str, ...] = ()


LAYOUTS: tuple[Layout, ...] = (
    Layout("timm", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", norms=("norm2", "norm")),
    Layout("timm's SwiGLU", "mlp", "mlp.fc1_g", "mlp.act", "mlp.fc2", gate="mlp.fc1_x", norms=("norm2",)),
    Layout("Hugging Face ViT, CLIP and Phi", "mlp", "mlp.fc1", "mlp.activation_fn", "mlp.fc2",
           norms=("layernorm_after", "layer_norm2", "norm2", "input_layernorm")),
    Layout("torchvision", "mlp", "mlp.0", "mlp.1", "mlp.3", norms=("ln_2", "norm2")),
    Layout("torchvision's ConvNeXt", "block.3", "block.3", "block.4", "block.5", norms=("block.2",)),
    Layout("open_clip", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", norms=("ln_2",)),
    Layout("GPT-2", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj", norms=("ln_2", "post_attention_layernorm")),
    Layout("GPT-J", "mlp", "mlp.fc_in", "mlp.act", "mlp.fc_out", norms=("ln_1",)),
    Layout("GPT-NeoX and Falcon", "mlp", "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h",
           norms=("ln_mlp", "post_attention_layernorm", "input_layernorm")),
    Layout("BLOOM", "mlp", "mlp.dense_h_to_4h", "mlp.gelu_impl", "mlp.dense_4h_to_h",
           norms=("post_attention_layernorm",)),
    Layout("OPT, BART and Whisper", "fc1", "fc1", "activation_fn", "fc2",
           norms=("final_layer_norm", "encoder_attn_layer_norm", "self_attn_layer_norm")),
    Layout("T5", "DenseReluDense", "DenseReluDense.wi", "DenseReluDense.act", "DenseReluDense.wo",
           norms=("layer_norm",)),
    Layout("gated T5", "DenseReluDense", "DenseReluDense.wi_0", "DenseReluDense.act", "DenseReluDense.wo",
           gate="DenseReluDense.wi_1", norms=("layer_norm",)),
    Layout("BERT", "intermediate", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense",
           norms=("layernorm_after", "crossattention.output.LayerNorm", "attention.output.LayerNorm",
                  "attention.LayerNorm")),
    Layout("DistilBERT", "ffn", "ffn.lin1", "ffn.activation", "ffn.lin2", norms=("sa_layer_norm",)),
    Layout("ALBERT", "ffn", "ffn", "activation", "ffn_output", norms=("attention.LayerNorm",)),
    Layout("ModernBERT", "mlp", "mlp.Wi", "mlp.act", "mlp.Wo", norms=("mlp_norm",)),
    Layout("wav2vec 2.0", "feed_forward", "feed_forward.intermediate_dense", "feed_forward.intermediate_act_fn",
           "feed_forward.output_dense", norms=("final_layer_norm", "layer_norm")),
    Layout("ConvNeXt", "pwconv1", "pwconv1", "act", "pwconv2", norms=("layernorm",)),
    Layout("torch", "linear1", "linear1", "activation", "linear2", norms=("norm3", "norm2", "norm1")),
    Layout("Llama", "mlp", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj", gate="mlp.up_proj",
           norms=("pre_feedforward_layernorm", "post_attention_layernorm", "input_layernorm")),
    Layout("Phi-3", "mlp", "mlp.gate_up_proj", "mlp.activation_fn", "mlp.down_proj",
           norms=("post_attention_layernorm",)),
    Layout("Nemotron", "mlp", "mlp.up_proj", "mlp.act_fn", "mlp.down_proj", norms=("post_attention_layernorm",)),
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One MLP block of a model; `name` is the path of its entrance in the model."""

    name: str
    layer: nn.Module
    layout: Layout
    stack: nn.Module  # the part of the model that runs all its layers one after another, such as a T5's encoder

    @property
    def entrance(self) -> nn.Module:
        return attribute(self.layer, self.layout.entrance)

    @property
    def key(self) -> nn.Module:
        return attribute(self.layer, self.layout.key)

    @property
    def activation(self) -> Any:
        """The activation; in nearly all models a module."""
        return attribute(self.layer, self.layout.activation)

    @property
    def value(self) -> nn.Module:
        return attribute(self.layer, self.layout.value)

    @property
    def gated(self) -> bool:
        """Whether something multiplies the activation: a linear of its own, or half of what the key layer computes."""
        return bool(self.layout.gate) or self.packed

    @property
    def packed(self) -> bool:
        """Whether keys and gate are one linear, which has twice as many outputs as the value layer has inputs."""
        (_, outputs), (inputs, _) = features(self.key), features(self.value)
        return not self.layout.gate and outputs is not None and inputs is not None and outputs == 2 * inputs

    @property
    def convolutional(self) -> bool:
        """Whether the MLP is one of convolutions, on maps (B, d, H, W)."""
        return isinstance(self.key, nn.Conv2d)

    @property
    def width(self) -> int | None:
        """Return d, the width of the tokens; None if the key layer does not say."""
        return features(self.key)[0]

    @property
    def parts(self) -> Parts:
        """Where the layer has what `sparsity.tracing` watches."""
        layout = self.layout
        return Parts(layout.norms, layout.entrance, layout.activation, layout.value)

    @cached_property
    def trace(self) -> Trace:
        """What the MLP receives, seen by running the layer; once per block."""
        if self.width is None:
            kind = type(self.key).__name__
            return Trace(self.parts, error=f"a {kind} does not say how wide tokens are; give it in_features")
        return trace(self.layer, self.parts, self.width, self.stack)

    @property
    def norm(self) -> nn.Module | None:
        """The norm that feeds the MLP; None if none of the layout's norms with a weight does, or it cannot be told."""
        return None if self.trace.norm is None else attribute(self.layer, self.trace.norm)

    def replace_activation(self, activation: nn.Module) -> None:
        """Put another activation in the place of the block's own."""
        owner, _, name = self.layout.activation.rpartition(".")
        setattr(attribute(self.layer, owner) if owner else self.layer, name, activation)


def features(linear: nn.Module) -> tuple[int | None, int | None]:
    """Return how many inputs and outputs a linear, Conv1D or convolution has, None where it does not say."""
    for names in (("in_features", "out_features"), ("nx", "nf"), ("in_channels", "out_channels")):
        if all(isinstance(getattr(linear, name, None), int) for name in names):
            return getattr(linear, names[0]), getattr(linear, names[1])
    return None, None


def find_blocks(model: nn.Module, layouts: Sequence[Layout] = LAYOUTS) -> list[Block]:
    """Return the MLP blocks of a model in module order.

    A model stacks its layers in lists. Where it has blocks in lists, an MLP of the same form outside of any is no
    block: it is an auxiliary one, of a pooling head or of relative positions.

    Args:
        model: any module; only the attribute paths of its layers matter.
        layouts: the kinds of layer that are looked for; the first that fits a layer counts.

    Raises:
        ValueError: there are none.
    """
    blocks, listed = [], []
    inside = {id(child) for module in model.modules() if _is_list(module) for child in module.children()}
    for path, layer in model.named_modules():
        layout = next((layout for layout in layouts if _fits(layer, layout)), None)
        if layout is not None:
            name = f"{path}.{layout.entrance}" if path else layout.entrance
            blocks.append(Block(name, layer, layout, _stack(model, path)))
            listed += blocks[-1:] if id(layer) in inside else []
    if not blocks:
        known = ", ".join(layout.name for layout in layouts)
        raise ValueError(
            f"no MLP block found in {type(model).__name__} (known layouts: {known}); describe your layer with "
            "sparsity.Layout and pass layouts=[Layout(...), *LAYOUTS]"
        )
    return listed or blocks


def layers_without(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """Return the paths of layers that hold none of the blocks, while a layer of the same class beside them does.

    Such layers have an MLP that no layout describes: a mixture of experts, in most models.
    """
    holding = {id(block.layer) for block in blocks}
    holds = {module: any(id(part) in holding for part in module.modules()) for module in model.modules()}
    missing = []
    for path, module in model.named_modules():
        if _is_list(module):
            children = dict(module.named_children())
            kinds = {type(child) for child in children.values() if holds[child] and not _is_list(child)}
            without = [name for name, child in children.items() if not holds[child] and type(child) in kinds]
            missing += [f"{path}.{name}" if path else name for name in without]
    return missing


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _fits(layer: nn.Module, layout: Layout) -> bool:
    linears = (layout.key, layout.value, layout.gate)
    return (
        all(hasattr(attribute(layer, path), "weight") for path in linears if path)
        and isinstance(attribute(layer, layout.entrance), nn.Module)
        and callable(attribute(layer, layout.activation))
    )


def _stack(model: nn.Module, path: str) -> nn.Module:
    """Return the module that holds the outermost list of layers which the layer at `path` is in, else the model."""
    holder = model
    for name in path.split(".") if path else ():
        inner = getattr(holder, name)
        if isinstance(inner, nn.ModuleList):
            return holder
        holder = inner
    return model


def find_norms(model: nn.Module) -> list[nn.Module]:
    """Return all norms with a weight: the modules with "Norm" in the name of their class."""
    named = (module for module in model.modules() if "Norm" in type(module).__name__)
    return [norm for norm in named if isinstance(getattr(norm, "weight", None), Tensor)]


@contextlib.contextmanager
def without_mlps(model: nn.Module, layouts: Sequence[Layout] = LAYOUTS) -> Iterator[None]:
    """Within the block every MLP of the model returns zeros: what the model still knows, it knows without them.

    Args:
        model: any model with MLP blocks that `find_blocks` knows.
        layouts: the kinds of layer to look for.

    Raises:
        ValueError: there is no MLP block.
    """
    handles = [block.value.register_forward_hook(_zeros) for block in find_blocks(model, layouts)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)
