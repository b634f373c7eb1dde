"""Modules with plug-ins: what they compute, and the constraints and schedules that their training obeys.

`sparsity.plugins.sparsify` makes them: it swaps the class of a module of the model for a subclass that begins with one
of the mixins below, so that names of parameters and `isinstance` stay as they were. Constraints are kept by one hook on
all torch optimizers: after each step it bounds the parameters of those sparsified blocks that the optimizer trains.
Nobody has to call anything, and copies of a model keep their constraints as the model does.
"""

import functools
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsity.tracing import attribute, in_backward

CACHE_ARGUMENTS = {"past_key_values", "cache"}  # what the forward of a stack of layers calls it, by version


@dataclass(frozen=True)
class BlockPlugins:
    """What one sparsified block has, and where: attribute paths relative to its layer, which holds this record.

    Paths, not modules: whatever is put in a part's place later (peft's copy of a norm, a LoRA around a linear, a copy
    of the whole model) is found by them.
    """

    norm: str | None
    entrance: str
    activation: str
    value: str
    zeroth_bias: str | None  # the module that holds it
    restricted: bool  # whether the norm is: w ≥ 1
    clip: float | None  # c: zeroth biases stay within ±c |w|; None: no bound
    mixing_steps: int
    uplift_steps: int


@dataclass(eq=False)
class CachedTokens:
    """How many tokens a stack of layers has in its KV cache.

    The stack and the zeroth biases of its blocks share one such object: row t of a bias belongs to position t of the
    sequence, and with a cache the first token of a batch is not at position 0.
    """

    count: int = 0


@dataclass(eq=False)
class BatchShape:
    """The shape (B, T) of the samples that a layer works on, for an MLP that gets their tokens as one list (OPT)."""

    shape: tuple[int, ...] | None = None


# What they compute ---------------------------------------------------------------------------------------------------


class PluginMixin:
    """A module whose class `add_mixin` has swapped; when it is copied or unpickled, its class is made again."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _restore, _lineage(type(self)), self.__getstate__()


class SparsifiedLayer(PluginMixin):
    """A layer whose MLP has plug-ins; it holds their `BlockPlugins` and the step count of their schedules."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_constraints(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if "schedule_step" in self._buffers:
            # so that a checkpoint of the model without plug-ins loads; torch hands each module its own copy of the dict
            state_dict.setdefault(f"{prefix}schedule_step", self.schedule_step)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ZerothBias(PluginMixin):
    """A module with a parameter `zeroth_bias` (tokens, d), which is added to the tokens that it reads or writes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.biased(super().forward, *args, **kwargs)

    def biased(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a forward with the bias added to its input, or to its output."""
        raise NotImplementedError

    def add_zeroth_bias(self, tokens: Tensor) -> Tensor:
        """Return x_t + b_t for tokens (B, T, d), or (B, H, W, d) whose positions are counted row by row.

        Raises:
            ValueError: fewer than three dimensions, or more positions than the bias has rows.
        """
        shape = tokens.shape
        if tokens.ndim == 2 and self._batch_shape.shape is not None:  # one list (B·T, d)
            tokens = tokens.reshape(*self._batch_shape.shape, -1)
        if tokens.ndim < 3:
            given = tuple(tokens.shape)
            raise ValueError(f"{self._path}: a zeroth bias needs tokens (B, T, d), got {given}; pass zeroth_bias=False")
        first, rows = self._cached_tokens.count, len(self.zeroth_bias)
        last = first + math.prod(tokens.shape[1:-1])
        if last > rows:
            raise ValueError(
                f"{self._path}: a sequence of {last} tokens is longer than the {rows} rows of the zeroth bias; "
                f"call sparsify with tokens={last} or more"
            )
        bias = self.zeroth_bias[first:last].reshape(tokens.shape[1:])
        return (tokens + bias.to(tokens.dtype)).reshape(shape)  # under autocast the tokens stay as narrow as they are

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"zeroth_bias={tuple(self.zeroth_bias.shape)}")))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}zeroth_bias", torch.zeros_like(self.zeroth_bias))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ZerothBiasAtInput(ZerothBias):
    """The entrance of an MLP that adds the zeroth bias to what it reads."""

    def biased(self, forward: Callable[..., Any], tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self.add_zeroth_bias(tokens), *args, **kwargs)


class ZerothBiasAtOutput(ZerothBias):
    """The second linear of an MLP that adds the zeroth bias to what it writes."""

    def biased(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self.add_zeroth_bias(forward(*args, **kwargs))


def add_zeroth_bias(module: nn.Module, mixin: type[ZerothBias], bias: nn.Parameter, **shared: Any) -> None:
    """Give a module a zeroth bias; one whose instance has a forward of its own, which hides the class's, adds it too.

    Libraries put such forwards there (accelerate's hooks, patches by fused kernels). accelerate keeps the one that it
    found in `_old_forward`, calls it and puts it back later, so that this is the one to change.

    Args:
        module: its class is swapped.
        mixin: where the bias is added.
        bias: (tokens, d).
        shared: further attributes.
    """
    add_mixin(module, mixin)
    module.zeroth_bias = bias
    vars(module).update(shared)
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    if name in vars(module):
        vars(module)[name] = functools.partial(module.biased, vars(module)[name])


def add_mixin(module: nn.Module, mixin: type[PluginMixin]) -> None:
    """Swap the class of `module`, C, for a subclass of (mixin, C) with the name of C; the module itself stays."""
    module.__class__ = _extended(mixin, type(module))


def add_innermost_mixin(module: nn.Module, mixin: type[PluginMixin]) -> None:
    """Swap the class of `module` as `add_mixin` does, with `mixin` below the mixins that it has: `super` goes to it."""
    *outer, plain = _lineage(type(module))
    module.__class__ = _descendant(*outer, mixin, plain)


def _lineage(kind: type) -> tuple[type, ...]:
    """Return the mixins of a class that `add_mixin` made, the outermost first, and the class without them."""
    if not issubclass(kind, PluginMixin):
        return (kind,)
    mixin, base = kind.__bases__
    return mixin, *_lineage(base)


def _descendant(*lineage: type) -> type:
    *mixins, kind = lineage
    for mixin in reversed(mixins):
        kind = _extended(mixin, kind)
    return kind


@functools.cache
def _extended(mixin: type, base: type) -> type:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names)  # the same name, as libraries compare class names


def _restore(*lineage: type) -> nn.Module:
    kind = _descendant(*lineage)
    return kind.__new__(kind)


# The KV cache --------------------------------------------------------------------------------------------------------


def follow_cache(stack: nn.Module) -> CachedTokens:
    """Return how many tokens the KV cache of a stack of layers holds; kept up to date if its forward takes a cache."""
    if not CACHE_ARGUMENTS & set(inspect.signature(stack.forward).parameters):
        return CachedTokens()
    stack._cached_tokens = CachedTokens()
    stack.register_forward_pre_hook(_read_cache, with_kwargs=True)
    return stack._cached_tokens


def _read_cache(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    caches = (value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length"))
    cache = next(caches, None)  # an encoder-decoder cache answers with the length of its self-attention
    stack._cached_tokens.count = 0 if cache is None else int(cache.get_seq_length())


# Flattened tokens ----------------------------------------------------------------------------------------------------


def follow_batch(layer: nn.Module) -> BatchShape:
    """Return the shape of the samples that a layer works on, kept up to date by a hook."""
    layer._batch_shape = BatchShape()
    layer.register_forward_pre_hook(_read_shape, with_kwargs=True)
    return layer._batch_shape


def _read_shape(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens = next(iter((*args, *kwargs.values())))
    layer._batch_shape.shape = tuple(tokens.shape[:-1])


# Constraints and schedules -------------------------------------------------------------------------------------------

# All sparsified layers that are alive, each with the optimizers that have stepped in its present round (`_advance`).
_SPARSIFIED: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Optimizer]]" = weakref.WeakKeyDictionary()


def keep_constraints(layer: nn.Module) -> None:
    """Keep a sparsified layer within its constraints from now on, whichever optimizer trains it."""
    _SPARSIFIED.setdefault(layer, weakref.WeakSet())
    _register_hook()


@functools.cache
def _register_hook() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep constraints after a step: at the end of the backward pass if the step was one within it.

    An optimizer per parameter may step as soon as its gradient has come. The weights of other parameters that are to be
    bounded are still needed by the backward pass then.
    """
    # A fused optimizer is called by GradScaler even if it has to skip the step, which is known on the device alone.
    found_inf = getattr(optimizer, "found_inf", None)
    if in_backward():
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _constrain(optimizer, found_inf))
    else:
        _constrain(optimizer, found_inf)


@torch.no_grad()
def _constrain(optimizer: Optimizer, found_inf: Tensor | None) -> None:
    """In the layers that the optimizer trains: advance schedules, bound all norms, and only then clip the biases."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [layer for layer in list(_SPARSIFIED) if any(id(own) in owned for own in _parameters(layer))]
    scheduled = [layer for layer in trained if "schedule_step" in layer._buffers]
    if not (scheduled and found_inf is not None and found_inf.item()):
        for layer in scheduled:
            _advance(layer, optimizer)
    for layer in trained:
        bound_norm(layer)
    for layer in trained:
        _clip_zeroth_bias(layer)


def _parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    plugins: BlockPlugins = layer._plugins
    paths = (plugins.entrance, plugins.value, plugins.norm)
    return chain.from_iterable(attribute(layer, path).parameters() for path in paths if path is not None)


def _advance(layer: nn.Module, optimizer: Optimizer) -> None:
    """Count one step of the schedules if this optimizer opens a round.

    Where several optimizers share a layer, each steps once per round: a round begins with the very first step, and
    then whenever an optimizer steps that has stepped in the present round already.
    """
    plugins, stepped = layer._plugins, _SPARSIFIED[layer]
    if not stepped or optimizer in stepped:
        stepped.clear()
        layer.schedule_step += 1
        if plugins.mixing_steps:
            attribute(layer, plugins.activation).mixing.copy_(_progress(layer, plugins.mixing_steps))
    stepped.add(optimizer)


def _progress(layer: nn.Module, steps: int) -> Tensor:
    """Return min(t / steps, 1), t the steps counted so far, as a tensor: reading t would wait for the device."""
    return (layer.schedule_step / steps).clamp(max=1)


@torch.no_grad()
def bound_norm(layer: nn.Module) -> None:
    """Bound the weight of a layer's restricted norm: w ← max(w, 1); while it is lifted, |w| ← max(|w|, t / steps)."""
    plugins: BlockPlugins = layer._plugins
    if not plugins.restricted:
        return
    weight = attribute(layer, plugins.norm).weight
    if not plugins.uplift_steps:
        weight.clamp_(min=1)
        return
    lifted = torch.maximum(weight.abs(), _progress(layer, plugins.uplift_steps).to(weight.dtype))
    weight.copy_(torch.where(weight < 0, -lifted, lifted))  # sign(0) = +1


def _clip_zeroth_bias(layer: nn.Module) -> None:
    plugins: BlockPlugins = layer._plugins
    if plugins.zeroth_bias is None:
        return
    holder = innermost(attribute(layer, plugins.zeroth_bias))
    if holder is not attribute(layer, plugins.zeroth_bias) and plugins.zeroth_bias == plugins.entrance:
        raise RuntimeError(
            f"{holder._path}: an adapter was put around this linear after sparsify, and does not see its zeroth bias; "
            "leave it out of the adapter's targets, or pass placement='output'"
        )
    if plugins.clip is not None:
        limit = (plugins.clip * attribute(layer, plugins.norm).weight.abs()).to(holder.zeroth_bias.dtype)
        holder.zeroth_bias.clamp_(-limit, limit)


def innermost(linear: nn.Module) -> nn.Module:
    """Return the linear that peft's adapters have been put around: it is the one that stays when they are merged."""
    while isinstance(getattr(linear, "base_layer", None), nn.Module):
        linear = linear.base_layer
    return linear


def forget_bias(norm: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """As a hook before a state dict is loaded: keep the bias of a restricted norm at zero, and say so."""
    bias = state_dict.get(f"{prefix}bias")
    if bias is not None and bias.any():
        warnings.warn(
            "this state dict has biases of norms that sparsify restricted; they stay zero (to keep them, fine-tune: "
            "pass uplift_steps)",
            stacklevel=2,
        )
        state_dict[f"{prefix}bias"] = torch.zeros_like(bias)
