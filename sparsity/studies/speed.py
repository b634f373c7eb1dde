"""What sparsity pays, measured: contenders that skip zeros beside the dense network, at a stated share of zeros.

Networks with random weights get their zeros from the biases of their keys: with K ~ N(0, 1/d) and tokens whose entries
have variance 1, as after a norm, pre-activations are N(bias, 1), and Φ(−bias) of them are not positive.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import NormalDist
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.blocks import LAYOUTS, Layout, find_blocks
from sparsity.pruned import SkippingValues, skip_zeros
from sparsity.screening import some_rows
from sparsity.studies.sparse_backward import Pattern, SparseBackwardMLP

DENSE, VALUES, SCREENED, LIKELY = "dense", "values skipped", "keys screened", "keys screened, 8 sd"
OPT = Layout("OPT", "fc1", "fc1", "activation_fn", "fc2")
KINDS = [OPT, *LAYOUTS]
MARGIN = 8.0  # standard deviations of independent rounding errors, of LIKELY


def typical_seconds(turns: pd.Series) -> float:
    """Return the lower quartile of the seconds of some turns, which other programs disturb least."""
    return turns.quantile(0.25)


class Layer(nn.Module):
    """One MLP with ReLU, d → d_ff → d, and nothing else."""

    def __init__(self, d: int, d_ff: int) -> None:
        from timm.layers import Mlp  # late: --help needs no seconds of it

        super().__init__()
        self.mlp = Mlp(d, d_ff, act_layer=nn.ReLU)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the MLP makes of tokens (…, d)."""
        return self.mlp(tokens)


@torch.no_grad()
def set_zeros(model: nn.Module, zeros: float, draw: bool = False) -> None:
    """Set the biases of all keys so that this share of activations is zero; `draw` new keys first: see above."""
    keys = [module.key for module in model.modules() if isinstance(module, SparseBackwardMLP)]
    for key in keys or [block.key for block in find_blocks(model, KINDS)]:
        if draw:
            key.weight.normal_(std=key.weight.shape[1] ** -0.5)
        key.bias.fill_(NormalDist().inv_cdf(1 - zeros))


def contenders(model: nn.Module, most_tokens: int) -> dict[str, nn.Module]:
    """Return the dense model and copies of it that skip zeros, by name.

    Args:
        model: in evaluation mode.
        most_tokens: as in `skip_zeros`.
    """
    width = find_blocks(model, KINDS)[0].key.weight.shape[1]
    options = {
        VALUES: dict(screen_keys=False),
        SCREENED: dict(),
        LIKELY: dict(margin=min(1.0, MARGIN / math.sqrt(width))),
    }
    skipping = partial(skip_zeros, most_tokens=most_tokens, layouts=KINDS)
    return {DENSE: model} | {name: skipping(copy.deepcopy(model), **own) for name, own in options.items()}


def share_zeros(models: Mapping[str, nn.Module], zeros: float) -> None:
    """Set the same share of zeros in all contenders, whose keys are the same."""
    for model in models.values():
        set_zeros(model, zeros)


def possible_share(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Return the share of units that the screen of a `Layer` cannot rule out, a mean over batches of tokens (n, d)."""
    key = model.mlp.fc1
    with torch.inference_mode():
        counts = [len(key._screen.estimate(batch, key.bias)[1]) for batch in batches]
    return sum(counts) / len(counts) / len(key.weight)


def value_layers(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the value layers alone, of the dense contender and of the one that skips values."""
    return {name: models[name].mlp.fc2 for name in (DENSE, VALUES)}


def on_fresh(function: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """Return a function without arguments that takes the next of the inputs at each call, without gradients."""
    following = itertools.cycle(inputs)

    def call() -> Any:
        with torch.inference_mode():
            return function(next(following))

    return call


def activations(count: int, units: int, zeros: float) -> list[Tensor]:
    """Return `count` different activations of one token, (1, units), of which this share is zero."""
    bias = NormalDist().inv_cdf(1 - zeros)
    return [(torch.randn(1, units) + bias).relu() for _ in range(count)]


def tokens(count: int, number: int, width: int, common: float = 0.0) -> list[Tensor]:
    """Return `count` different batches of tokens (number, width), whose entries have variance 1.

    Args:
        count: how many.
        number: of tokens in each.
        width: d.
        common: the share of the variance that all tokens of a batch have in common; tokens of one text are alike.
    """
    parts = ((torch.randn(1, width), torch.randn(number, width)) for _ in range(count))
    return [math.sqrt(common) * shared + math.sqrt(1 - common) * own for shared, own in parts]


def densities(model: nn.Module, call: Callable[[], Any]) -> tuple[float, float]:
    """Return the share of activations that are not zero, and of units that are active for some token of a pass.

    Args:
        model: with MLP blocks.
        call: runs it; the shares are means over MLPs and over the passes that this makes.
    """
    seen: list[tuple[float, float]] = []

    def note(value: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        active = inputs[0].reshape(-1, inputs[0].shape[-1]) != 0
        seen.append((active.float().mean().item(), active.any(0).float().mean().item()))

    with ExitStack() as hooks:
        for block in find_blocks(model, KINDS):
            hooks.callback(block.value.register_forward_pre_hook(note).remove)
        call()
    density, union = torch.tensor(seen).mean(0).tolist()
    return density, union


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


# Whole models --------------------------------------------------------------------------------------------------------


def opt(width: int, d_ff: int, depth: int, heads: int, vocabulary: int, positions: int) -> nn.Module:
    """Return an OPT decoder (ReLU, pre-norm) with random weights, whose pre-activations are N(bias, 1)."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=width, ffn_dim=d_ff, num_hidden_layers=depth, num_attention_heads=heads, vocab_size=vocabulary,
        word_embed_proj_dim=width, max_position_embeddings=positions, activation_function="relu", dropout=0.0,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    set_zeros(model, 0.5, draw=True)
    return model


def generate(model: nn.Module, length: int, inputs: Tensor) -> Tensor:
    """Return greedy continuations of `length` tokens of the inputs (B, T), with the model's KV cache."""
    mask = torch.ones_like(inputs)
    options = dict(max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
    return model.generate(inputs, attention_mask=mask, **options)


def with_sparse_backward(model: nn.Module) -> nn.Module:
    """Return a copy of a timm ViT, or of a `Layer`, whose MLPs have the backward pass by sparse products."""
    model = copy.deepcopy(model)
    for block in find_blocks(model, KINDS):
        block.layer.mlp = SparseBackwardMLP(block.key, block.activation, block.value)
    return model


def layer_step(layer: nn.Module, batch: Tensor, gradient: Tensor) -> None:
    """Do the forward and the backward pass of an MLP, with gradients of inputs and weights."""
    batch = batch.detach().requires_grad_()
    torch.autograd.grad(layer(batch), [batch, *layer.parameters()], gradient)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Do one training step of an image classifier: forward, backward, optimizer."""
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


# Where the time goes -------------------------------------------------------------------------------------------------


def inference_profile(layer: nn.Module, batches: Sequence[Tensor]) -> Iterator[tuple[str, float]]:
    """Yield (part, seconds) for each batch: what the parts of a screened MLP take, and those of a dense one.

    Args:
        layer: a `Layer` that `skip_zeros` has changed.
        batches: tokens (n, d).
    """
    key, value = layer.mlp.fc1, layer.mlp.fc2
    with torch.inference_mode():
        for batch in batches:
            (_, possible), seconds = _timed(lambda batch=batch: key._screen.estimate(batch, key.bias))
            yield "keys: 8-bit product and bound", seconds
            units, seconds = _timed(lambda batch=batch, rows=possible: some_rows(key.weight, key.bias, rows, batch))
            yield "keys: those left by the screen", seconds
            whole, seconds = _timed(lambda batch=batch: F.linear(batch, key.weight, key.bias))
            yield "keys, dense", seconds
            units = whole.relu()
            yield "values: those of active units", _timed(lambda units=units: SkippingValues.forward(value, units))[1]
            yield "values, dense", _timed(lambda units=units: F.linear(units, value.weight, value.bias))[1]


def backward_profile(layer: nn.Module, batch: Tensor, gradient: Tensor) -> Iterator[tuple[str, float]]:
    """Yield (part, seconds): the products of a dense step of an MLP, and the parts that stand for three of them."""
    key, value = layer.mlp.fc1, layer.mlp.fc2
    with torch.inference_mode():
        pre_activation, seconds = _timed(lambda: F.linear(batch, key.weight, key.bias))
        yield "forward, keys", seconds
        units = pre_activation.relu()
        yield "forward, values", _timed(lambda: F.linear(units, value.weight, value.bias))[1]
        inner, seconds = _timed(lambda: gradient @ value.weight)
        yield "g = Vᵀ ∂L/∂z, dense in both", seconds
        effective = inner * (units > 0)
        yield "∂L/∂x, dense", _timed(lambda: effective @ key.weight)[1]
        yield "∂L/∂K, dense", _timed(lambda: effective.T @ batch)[1]
        yield "∂L/∂V, dense", _timed(lambda: gradient.T @ units)[1]
        pattern, seconds = _timed(lambda: Pattern(units))
        yield "pattern", seconds
        values = pattern.values(effective)
        yield "∂L/∂x, sparse", _timed(lambda: pattern.times(values, key.weight))[1]
        yield "∂L/∂K, sparse", _timed(lambda: pattern.transposed_times(values, batch))[1]
        yield "∂L/∂V, sparse", _timed(lambda: pattern.transposed_times(pattern.values(units), gradient))[1]


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start
