"""What an MLP receives, seen by running its layer: names of modules do not tell whether a norm stands before it.

`trace` runs one layer on a few made-up tokens, nothing else of the model. The outputs of all norms that may feed the
MLP are replaced by marked tensors, so that it is certain whose output arrives. Only shapes and marks matter, no value
does, and the run ends at the value layer. The attention of most layers needs arguments that only its model knows; where
it fails, it is left out.
"""

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

SIDE = 4  # the made-up tokens: 16 in a row, or a map of 4 × 4

ENCODER_ARGUMENTS = ("encoder_hidden_states", "memory")  # what a decoder's layer calls the encoder's tokens


@dataclass(frozen=True)
class Parts:
    """The modules of one layer that are watched, all as attribute paths relative to it."""

    norms: tuple[str, ...]  # those that may feed the MLP
    entrance: str
    activation: str
    value: str


@dataclass
class Trace:
    """What was seen when a layer ran."""

    parts: Parts
    norm: str | None = None  # path of the norm whose output the MLP receives
    shared: bool = False  # attention receives it too, as in parallel layers
    tokens: tuple[int, ...] | None = None  # shape of what entered the layer
    entered: tuple[int, ...] | None = None  # shape of what entered the MLP; None: it did not run
    calls: int = 0  # of the MLP; more than one where it sees a sequence in chunks
    activated: bool = False  # the activation ran between the entrance and the value layer
    valued: bool = False  # the value layer ran
    error: str = ""  # why the layer could not be run, or not to its end

    @property
    def flattened(self) -> bool:
        """Whether the layer gets samples of tokens (B, T, d), and its MLP all tokens of the batch as one list."""
        return self.entered is not None and len(self.entered) == 2 < len(self.tokens)


def in_backward() -> bool:
    """Tell whether autograd runs a backward pass: a forward pass within it is a recomputation of checkpointing."""
    return torch._C._current_graph_task_id() != -1


def attribute(module: nn.Module, path: str) -> Any:
    """Return what an attribute path leads to, or None; of a module that peft trains a copy of, the copy in use."""
    found: Any = module
    for name in path.split("."):
        found = active(getattr(found, name, None))
    return found


def active(module: Any) -> Any:
    """Return the module that runs in the place of `module`: of peft's modules_to_save the trained copy."""
    if not (isinstance(module, nn.Module) and hasattr(module, "original_module")):
        return module
    copies = getattr(module, "modules_to_save", {})
    chosen = [] if module.disable_adapters else [name for name in module.active_adapters if name in copies]
    return copies[chosen[0]] if chosen else module.original_module


def trace(layer: nn.Module, parts: Parts, width: int, runner: nn.Module | None = None) -> Trace:
    """Return what the MLP of a layer receives when the layer runs on made-up tokens.

    Args:
        layer: holds all parts; on the meta device a copy with arbitrary weights is run.
        parts: where they are.
        width: d, of the tokens.
        runner: the module whose forward runs the layer, where the layer has none of its own.

    Returns:
        The trace of the first way to call the layer that reaches its MLP; else one with an `error`.
    """
    if layer.forward.__name__ == "_forward_unimplemented" and runner is not None:
        called = runner
    else:
        if any(parameter.is_meta for parameter in layer.parameters()):
            layer = copy.deepcopy(layer).to_empty(device="cpu")
        called = layer
    failed = ""
    weights = list(layer.parameters())
    like = next((weight for weight in weights if weight.is_floating_point()), weights[0])
    with _quiet(called):
        fillings = (None, "tokens", (SIDE, SIDE))
        for shape, encoder, stand_in, filling in product(_shapes(width), (True, False), _STAND_INS, fillings):
            tokens = _mark(like, shape)
            seen = Trace(parts, tokens=shape)
            with contextlib.ExitStack() as stack:
                _watch(layer, seen, stack, until_value=True)
                if stand_in is not None:
                    _leave_out_attention(layer, parts, stand_in, stack)
                try:
                    called(tokens, **_arguments(called, tokens, tokens if filling == "tokens" else filling, encoder))
                except _Enough:
                    pass
                except Exception as error:  # any at all: the call was a guess
                    seen.error = f"{type(error).__name__}: {error}".splitlines()[0]
                    failed = failed or seen.error
            if seen.entered is not None:
                return seen
    return Trace(parts, error=failed or "its MLP did not run")


def trace_model(model: nn.Module, layers: Sequence[tuple[nn.Module, Parts]], example: Any) -> list[Trace]:
    """Return the traces of several layers of a model from one run of the model on an example.

    Args:
        model: is run as `model(**example)` for a mapping, `model(*example)` for a tuple, else `model(example)`.
        layers: each with its parts.
        example: inputs of the model; its outputs are not used, and no gradient is taken.
    """
    traces = [Trace(parts) for _, parts in layers]
    with _quiet(model), contextlib.ExitStack() as stack:
        for (layer, _), seen in zip(layers, traces, strict=True):
            _watch(layer, seen, stack, until_value=False)
        if isinstance(example, Mapping):
            model(**example)
        else:
            model(*example) if isinstance(example, tuple) else model(example)
    return traces


class _Enough(Exception):
    """Ends a run of which enough was seen."""


@contextlib.contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Run without gradients, compilation, dropout and torch's fused layers; restore all of it afterwards."""
    modes = {each: each.training for each in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    # A model can be compiled only if dynamo is there; to import it for this would take over a second.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for each, mode in modes.items():
            each.training = mode


def _shapes(width: int) -> list[tuple[int, ...]]:
    return [(1, SIDE * SIDE, width), (1, SIDE, SIDE, width), (1, width, SIDE, SIDE), (1, 1, width), (SIDE, width)]


_STAND_INS: tuple[Callable[[Tensor], Any] | None, ...] = (
    None,  # attention itself
    lambda tokens: tokens,
    lambda tokens: (tokens, None),
    lambda tokens: (tokens, None, None),
)


def _mark(like: Tensor, shape: Sequence[int], offset: float = 0.0) -> Tensor:
    """Return a tensor whose tokens all differ from each other, and from those of another offset."""
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    entries = torch.linspace(-1, 1, torch.Size(shape).numel(), device=like.device) + offset
    return entries.reshape(shape).to(dtype)


def _watch(layer: nn.Module, seen: Trace, stack: contextlib.ExitStack, until_value: bool) -> None:
    """Hook the parts of a layer so that `seen` is filled when it runs; closing the stack removes the hooks."""
    parts, marks = seen.parts, {}

    def mark(path: str, offset: float) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            marks[path] = _mark(output, output.shape, offset), module.weight.numel()
            return marks[path][0]

        return hook

    def source(inputs: Any) -> str | None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        found = (path for path, (marked, width) in marks.items() for t in tensors if _is_from(t, marked, width))
        return next(found, None)

    def layer_begins(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        seen.tokens = tuple(tensors[0].shape) if tensors else seen.tokens

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = (*args, *kwargs.values())
        seen.entered, seen.calls = tuple(inputs[0].shape), seen.calls + 1
        seen.norm = source(inputs[:1])

    def activate(module: nn.Module, args: Any, output: Any) -> None:
        seen.activated = True

    def value(module: nn.Module, args: Any) -> None:
        seen.valued = True
        if until_value:
            raise _Enough

    fed: set[str] = set()

    def other(module: nn.Module, args: Any, kwargs: Any) -> None:
        fed.add(source((*args, *kwargs.values())) or "")

    def conclude() -> None:
        seen.shared = seen.norm is not None and seen.norm in fed

    stack.callback(conclude)
    keep = lambda handle: stack.callback(handle.remove)  # noqa: E731
    keep(layer.register_forward_pre_hook(layer_begins, with_kwargs=True))
    for index, path in enumerate(parts.norms):
        norm = attribute(layer, path)
        if isinstance(norm, nn.Module) and isinstance(getattr(norm, "weight", None), Tensor):
            keep(norm.register_forward_hook(mark(path, 4.0 * (index + 1))))
    for child in _attention(layer, parts).values():
        keep(child.register_forward_pre_hook(other, with_kwargs=True))
    keep(attribute(layer, parts.entrance).register_forward_pre_hook(enter, with_kwargs=True))
    if isinstance(activation := attribute(layer, parts.activation), nn.Module):
        keep(activation.register_forward_hook(activate))
    keep(attribute(layer, parts.value).register_forward_pre_hook(value))


def _is_from(tokens: Tensor, marked: Tensor, width: int) -> bool:
    """Tell whether all of some tokens are among the marked ones, in whatever order and shape."""
    rows, known = _rows(tokens, width), _rows(marked, width)
    if rows is None or known is None or not len(rows):
        return False
    if rows.shape == known.shape and torch.equal(rows, known.to(rows.dtype)):
        return True
    return bool((rows[:SIDE, None] == known.to(rows.dtype)[None]).all(-1).any(1).all())


def _rows(tokens: Tensor, width: int) -> Tensor | None:
    if tokens.ndim and tokens.shape[-1] == width:
        return tokens.reshape(-1, width)
    return tokens.movedim(1, -1).reshape(-1, width) if tokens.ndim == 4 and tokens.shape[1] == width else None


def _attention(layer: nn.Module, parts: Parts) -> dict[str, nn.Module]:
    """Return the outermost modules in a layer that have children, and hold no part of the MLP: attention, mostly."""
    held = (*parts.norms, parts.entrance, parts.activation, parts.value)
    found: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        inside = any(f"{path}.".startswith(f"{other}.") for other in (*found, *held))
        holds_part = any(f"{part}.".startswith(f"{path}." if path else "") for part in held)
        if not inside and not holds_part and any(True for _ in module.children()):
            found[path] = module
    return found


def _leave_out_attention(
    layer: nn.Module, parts: Parts, stand_in: Callable[[Tensor], Any], stack: contextlib.ExitStack
) -> None:
    """Let the layer's attention return its input, in the form that `stand_in` gives it."""

    def skip(*args: Any, **kwargs: Any) -> Any:
        return stand_in(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    for child in _attention(layer, parts).values():
        own = vars(child).get("forward")
        stack.callback(child.__dict__.pop, "forward") if own is None else stack.callback(setattr, child, "forward", own)
        child.forward = skip


def _arguments(module: nn.Module, tokens: Tensor, filling: Any, encoder: bool) -> dict[str, Any]:
    """Return a filling for each argument after the first that has no default, and tokens of an encoder if asked for.

    Without these a decoder's layer leaves out its attention to them, and with it perhaps the norm before the MLP.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {each.name: filling for each in parameters if each.default is each.empty and each.kind in kinds}
    from_encoder = {each.name: tokens for each in parameters if each.name in ENCODER_ARGUMENTS}
    return found | (from_encoder if encoder else {})
