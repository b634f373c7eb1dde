"""Finding the MLP blocks of a Transformer: what feeds each one, its keys, its activation, its values.

A `Layout` says where these stand in one kind of layer, by attribute paths. LAYOUTS knows timm, torchvision, T5 and the
BERT and GPT families; a block of your own takes one more entry: `find_blocks(model, [Layout(...), *LAYOUTS])`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where the parts of an MLP block stand in its layer, as attribute paths relative to the layer.

    Args:
        name: of the family, for messages.
        entrance: the module whose input is the MLP's input (the key layer itself, if nothing encloses the MLP).
        key, activation, value: first linear, activation, second linear.
        gate: the other first linear of a gated MLP (SwiGLU, GeGLU), which multiplies the activation; "" for none.
        norms: the norm that feeds the MLP and nothing else; the first of these paths that exists is taken.
        post_norms: the same where the norm's output also goes into the residual (BERT).
        otherwise: names of classes that have these paths too, but whose norm does not stand before the MLP.
    """

    name: str
    entrance: str
    key: str
    activation: str
    value: str
    gate: str = ""
    norms: tuple[str, ...] = ()
    post_norms: tuple[str, ...] = ()
    otherwise: tuple[str, ...] = ()


LAYOUTS: tuple[Layout, ...] = (
    Layout("timm", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", norms=("norm2",),
           otherwise=("ResPostBlock", "SwinTransformerV2Block")),
    Layout("Hugging Face ViT and CLIP", "mlp", "mlp.fc1", "mlp.activation_fn", "mlp.fc2",
           norms=("layernorm_after", "layer_norm2")),
    Layout("torchvision", "mlp", "mlp.0", "mlp.1", "mlp.3", norms=("ln_2",)),
    Layout("open_clip", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", norms=("ln_2",)),
    Layout("GPT-2", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj", norms=("ln_2",)),
    Layout("T5", "DenseReluDense", "DenseReluDense.wi", "DenseReluDense.act", "DenseReluDense.wo",
           norms=("layer_norm",)),
    Layout("gated T5", "DenseReluDense", "DenseReluDense.wi_0", "DenseReluDense.act", "DenseReluDense.wo",
           gate="DenseReluDense.wi_1", norms=("layer_norm",)),
    Layout("BERT", "intermediate", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense",
           norms=("layernorm_after",), post_norms=("attention.output.LayerNorm",)),
    Layout("DistilBERT", "ffn", "ffn.lin1", "ffn.activation", "ffn.lin2", post_norms=("sa_layer_norm",)),
    Layout("Llama", "mlp", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj", gate="mlp.up_proj",
           norms=("pre_feedforward_layernorm", "post_attention_layernorm")),
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
        return self.layer.get_submodule(self.layout.entrance)

    @property
    def key(self) -> nn.Module:
        return self.layer.get_submodule(self.layout.key)

    @property
    def activation(self) -> Any:
        """The activation; in nearly all models a module."""
        return _attribute(self.layer, self.layout.activation)

    @property
    def value(self) -> nn.Module:
        return self.layer.get_submodule(self.layout.value)

    @property
    def gated(self) -> bool:
        return bool(self.layout.gate)

    @property
    def norm(self) -> nn.Module | None:
        """The norm that feeds the MLP, or None where no norm with a weight is found."""
        if type(self.layer).__name__ in self.layout.otherwise:
            return None
        found = (_attribute(self.layer, path) for path in (*self.layout.norms, *self.layout.post_norms))
        return next((norm for norm in found if isinstance(getattr(norm, "weight", None), Tensor)), None)

    def replace_activation(self, activation: nn.Module) -> None:
        """Put another activation in the place of the block's own."""
        owner, _, name = self.layout.activation.rpartition(".")
        setattr(self.layer.get_submodule(owner), name, activation)


def find_blocks(model: nn.Module, layouts: Sequence[Layout] = LAYOUTS) -> list[Block]:
    """Return the MLP blocks of a model in module order.

    Args:
        model: any module; only the attribute paths of its layers matter.
        layouts: the kinds of layer that are looked for; the first that fits a layer counts.

    Raises:
        ValueError: there are none.
    """
    blocks = []
    for path, layer in model.named_modules():
        layout = next((layout for layout in layouts if _fits(layer, layout)), None)
        if layout is not None:
            name = f"{path}.{layout.entrance}" if path else layout.entrance
            blocks.append(Block(name, layer, layout, _stack(model, path)))
    if not blocks:
        known = ", ".join(layout.name for layout in layouts)
        raise ValueError(
            f"no MLP block found in {type(model).__name__} (known layouts: {known}); describe your layer with "
            "sparsity.Layout and pass layouts=[Layout(...), *LAYOUTS]"
        )
    return blocks


def _fits(layer: nn.Module, layout: Layout) -> bool:
    paths = (layout.entrance, layout.key, layout.activation, layout.value, layout.gate)
    return all(_attribute(layer, path) is not None for path in paths if path)


def _attribute(module: nn.Module, path: str) -> Any:
    """Return what an attribute path leads to, or None."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


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
