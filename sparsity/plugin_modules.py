"""Modules with plug-ins: what they compute, and the constraints and schedules that their training obeys.

`sparsity.plugins.sparsify` makes them: it swaps the class of a module of the model for a subclass that begins with one
of the mixins below, so that names of parameters and `isinstance` stay as they were. Constraints are kept by one hook on
all torch optimizers: after each step it bounds the parameters of those sparsified blocks that the optimizer trains.
Nobody has to call anything, and copies of a model keep their constraints as the model does.
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
class BlockPlugins:
    """The parts and options of one sparsified block.

    This is no `nn.Module`, or else the norm and the value layer would be registered in the model a second time. When a
    model is copied, this is copied with it and refers to the parts of the copy.
    """

    norm: nn.Module | None
    value: nn.Module
    restricted: bool  # whether the norm is: w ≥ 1
    clip: float | None  # c: zeroth biases stay within ±c |w|; None: no bound
    mixing_steps: int
    uplift_steps: int
    mixture: Mixture | None = None


@dataclass(eq=False)
class CachedTokens:
    """How many tokens a stack of layers has in its KV cache.

    The stack and the zeroth biases of its blocks share one such object: row t of a bias belongs to position t of the
    sequence, and with a cache the first token of a batch is not at position 0.
    """

    count: int = 0


# What they compute ---------------------------------------------------------------------------------------------------


class PluginMixin:
    """A module whose class `add_mixin` has swapped; when it is copied or unpickled, its class is made again."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _restore, _lineage(type(self)), self.__getstate__()


class SparsifiedBlock(PluginMixin):
    """The entrance of an MLP block with plug-ins; it holds the `BlockPlugins` and the step count of the block."""

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

    def add_zeroth_bias(self, tokens: Tensor) -> Tensor:
        """Return x_t + b_t for tokens (B, T, d), or (B, H, W, d) whose positions are counted row by row.

        Raises:
            ValueError: fewer than three dimensions, or more positions than the bias has rows.
        """
        if tokens.ndim < 3:
            shape = tuple(tokens.shape)
            raise ValueError(f"{self._path}: a zeroth bias needs tokens (B, T, d), got {shape}; pass zeroth_bias=False")
        first, rows = self._cached_tokens.count, len(self.zeroth_bias)
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


class ZerothBiasAtInput(ZerothBias, SparsifiedBlock):
    """The entrance of an MLP that adds the zeroth bias to what it reads."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.add_zeroth_bias(tokens), *args, **kwargs)


class ZerothBiasAtOutput(ZerothBias):
    """The second linear of an MLP that adds the zeroth bias to what it writes."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.add_zeroth_bias(super().forward(*args, **kwargs))


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


# Constraints and schedules -------------------------------------------------------------------------------------------

# All sparsified blocks that are alive, each with the optimizers that have stepped in its present round (`_advance`).
_SPARSIFIED: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Optimizer]]" = weakref.WeakKeyDictionary()


def keep_constraints(block: nn.Module) -> None:
    """Keep a sparsified block within its constraints from now on, whichever optimizer trains it."""
    _SPARSIFIED.setdefault(block, weakref.WeakSet())
    _register_hook()


@functools.cache
def _register_hook() -> None:
    register_optimizer_step_post_hook(_after_step)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In the blocks that the optimizer trains: advance schedules, bound all norms, and only then clip the biases."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [block for block in list(_SPARSIFIED) if any(id(own) in owned for own in _parameters(block))]
    for block in trained:
        _advance(block, optimizer)
        bound_norm(block)
    for block in trained:
        _clip_zeroth_bias(block)


def _parameters(block: nn.Module) -> Iterator[nn.Parameter]:
    plugins: BlockPlugins = block._plugins
    parts = (block, plugins.value, plugins.norm)
    return chain.from_iterable(part.parameters() for part in parts if part is not None)


def _advance(block: nn.Module, optimizer: Optimizer) -> None:
    """Count one step of the schedules if this optimizer opens a round.

    Where several optimizers share a block, each steps once per round: a round begins with the very first step, and
    then whenever an optimizer steps that has stepped in the present round already.
    """
    plugins, stepped = block._plugins, _SPARSIFIED[block]
    if "schedule_step" in block._buffers and (not stepped or optimizer in stepped):
        stepped.clear()
        block.schedule_step += 1
        if plugins.mixture is not None:
            plugins.mixture.mixing.copy_(_progress(block, plugins.mixing_steps))
    stepped.add(optimizer)


def _progress(block: nn.Module, steps: int) -> Tensor:
    """Return min(t / steps, 1), t the steps counted so far, as a tensor: reading t would wait for the device."""
    return (block.schedule_step / steps).clamp(max=1)


@torch.no_grad()
def bound_norm(block: nn.Module) -> None:
    """Bound the weight of a block's restricted norm: w ← max(w, 1); while it is lifted, |w| ← max(|w|, t / steps)."""
    plugins: BlockPlugins = block._plugins
    if not plugins.restricted:
        return
    weight = plugins.norm.weight
    if not plugins.uplift_steps:
        weight.clamp_(min=1)
        return
    lifted = torch.maximum(weight.abs(), _progress(block, plugins.uplift_steps).to(weight.dtype))
    weight.copy_(torch.where(weight < 0, -lifted, lifted))  # sign(0) = +1


def _clip_zeroth_bias(block: nn.Module) -> None:
    plugins: BlockPlugins = block._plugins
    bias = getattr(block, "zeroth_bias", getattr(plugins.value, "zeroth_bias", None))
    if bias is not None and plugins.clip is not None:
        limit = (plugins.clip * plugins.norm.weight.abs()).to(bias.dtype)
        bias.clamp_(-limit, limit)
