"""Modules with plug-ins: what they compute, and the constraints and schedules that their training obeys.

`sparsity.plugins.sparsify` makes them, by swapping the class of a module for a subclass of it. One hook on all torch
optimizers knows every plugged block that is alive; after a step it looks after those of which the optimizer owns
parameters. Nobody has to call anything, and a copy of a model is looked after like the model.
"""

import functools
import inspect
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsity.activations import Mixture

CACHE_ARGUMENTS = {"past_key_values", "cache"}  # what the forward of a stack of layers calls it, by version


@dataclass(eq=False)
class Plugins:
    """What a plugged block knows of itself. This is no module, so that the parts are not registered a second time; when
    a model is copied it is copied along, and refers to the parts of the copy."""

    norm: nn.Module | None
    value: nn.Module
    restricted: bool  # whether the norm is
    clip: float | None
    mixing_steps: int
    uplift_steps: int
    mixture: Mixture | None = None


@dataclass(eq=False)
class Past:
    """How many tokens a stack of layers has in its KV cache; the stack and its zeroth biases share it."""

    length: int = 0


# What they compute ---------------------------------------------------------------------------------------------------


class Plugged:
    """A module whose class `plug` has swapped; copies and pickles make their class anew."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _restore, type(self).__bases__, self.__getstate__()


class PluggedBlock(Plugged):
    """The entrance of an MLP block with plug-ins, which answers for the whole block."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if "schedule_step" in self._buffers:
            state_dict.setdefault(f"{prefix}schedule_step", self.schedule_step)  # torch hands each module its own dict
        super()._load_from_state_dict(state_dict, prefix, *args)


class ZerothBias(Plugged):
    """A module with a parameter `zeroth_bias` (tokens, d) for tokens that it reads or writes."""

    def add_zeroth_bias(self, tokens: Tensor) -> Tensor:  # (B, T, d), or (B, H, W, d) row by row
        if tokens.ndim < 3:
            shape = tuple(tokens.shape)
            raise ValueError(f"{self._path}: a zeroth bias needs tokens (B, T, d), got {shape}; pass zeroth_bias=False")
        first, rows = self._past.length, len(self.zeroth_bias)
        last = first + math.prod(tokens.shape[1:-1])
        if last > rows:
            raise ValueError(
                f"{self._path}: a sequence of {last} tokens is longer than the {rows} rows of the zeroth bias; "
                f"call sparsify with tokens={last} or more"
            )
        bias = self.zeroth_bias[first:last].reshape(tokens.shape[1:])
        return tokens + bias.to(tokens.dtype)  # under autocast the tokens stay as narrow as they are

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"zeroth_bias={tuple(self.zeroth_bias.shape)}")))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}zeroth_bias", torch.zeros_like(self.zeroth_bias))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PluggedInput(ZerothBias, PluggedBlock):
    """The entrance of an MLP that adds the zeroth bias to what it reads."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.add_zeroth_bias(tokens), *args, **kwargs)


class PluggedOutput(ZerothBias):
    """The second linear of an MLP that adds the zeroth bias to what it writes."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.add_zeroth_bias(super().forward(*args, **kwargs))


def plug(module: nn.Module, mixin: type[Plugged]) -> None:
    """Make `module` an instance of the subclass of its class that begins with `mixin`."""
    module.__class__ = _extended(mixin, type(module))


@functools.cache
def _extended(mixin: type, base: type) -> type:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), names)  # libraries look at class names


def _restore(mixin: type, base: type) -> nn.Module:
    extended = _extended(mixin, base)
    return extended.__new__(extended)


# The KV cache --------------------------------------------------------------------------------------------------------


def follow_past(stack: nn.Module) -> Past:
    """Return the past of a stack of layers, kept up to date if its forward takes a KV cache."""
    if not CACHE_ARGUMENTS & set(inspect.signature(stack.forward).parameters):
        return Past()
    stack._zeroth_past = Past()
    stack.register_forward_pre_hook(_read_past, with_kwargs=True)
    return stack._zeroth_past


def _read_past(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    caches = (value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length"))
    cache = next(caches, None)  # of a decoder's two caches it is self-attention's that answers
    stack._zeroth_past.length = 0 if cache is None else int(cache.get_seq_length())


# Constraints and schedules -------------------------------------------------------------------------------------------

# The plugged blocks alive, each with the optimizers that have stepped in its present round.
_LIVE: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Optimizer]]" = weakref.WeakKeyDictionary()


def watch(block: nn.Module) -> None:
    """Look after a plugged block from now on, whichever optimizer moves it."""
    _LIVE.setdefault(block, weakref.WeakSet())
    _register_hook()


@functools.cache
def _register_hook() -> None:
    register_optimizer_step_post_hook(_after_step)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In the blocks that an optimizer moves: advance schedules, bound all norms, and only then clip the biases."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    moved = [block for block in list(_LIVE) if any(id(parameter) in owned for parameter in _parameters(block))]
    for block in moved:
        _advance(block, optimizer)
        bound_norm(block)
    for block in moved:
        _clip_zeroth_bias(block)


def _parameters(block: nn.Module) -> Iterator[nn.Parameter]:
    plugins: Plugins = block._plugins
    parts = (block, plugins.value, plugins.norm)
    return chain.from_iterable(part.parameters() for part in parts if part is not None)


def _advance(block: nn.Module, optimizer: Optimizer) -> None:
    """Count one step if this optimizer opens a round: the first one, or any in which it has stepped already."""
    plugins, stepped = block._plugins, _LIVE[block]
    if "schedule_step" in block._buffers and (not stepped or optimizer in stepped):
        stepped.clear()
        block.schedule_step += 1
        if plugins.mixture is not None:
            plugins.mixture.mixing.copy_(_progress(block, plugins.mixing_steps))
    stepped.add(optimizer)


def _progress(block: nn.Module, steps: int) -> Tensor:
    """Return min(t / steps, 1) without waiting for the device."""
    return (block.schedule_step / steps).clamp(max=1)


@torch.no_grad()
def bound_norm(block: nn.Module) -> None:
    """Bound the weight of a block's restricted norm: w ← max(w, 1), or what the uplift has come to."""
    plugins: Plugins = block._plugins
    if not plugins.restricted:
        return
    weight = plugins.norm.weight
    if not plugins.uplift_steps:
        weight.clamp_(min=1)
        return
    lifted = torch.maximum(weight.abs(), _progress(block, plugins.uplift_steps).to(weight.dtype))
    weight.copy_(torch.where(weight < 0, -lifted, lifted))  # sign(0) = +1


def _clip_zeroth_bias(block: nn.Module) -> None:
    plugins: Plugins = block._plugins
    bias = getattr(block, "zeroth_bias", getattr(plugins.value, "zeroth_bias", None))
    if bias is not None and plugins.clip is not None:
        limit = (plugins.clip * plugins.norm.weight.abs()).to(bias.dtype)
        bias.clamp_(-limit, limit)
