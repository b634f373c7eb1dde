"""Whole adapters of peft: merged (LoRA in factored form, IA³ as vectors), folded into a base, made of a full expert.

LoRA stays low-rank all the way, and the output space of SVC is that of the layer (`merging.lowrank`). IA³ vectors l are
merged as updates τ = l − 1, for 1 is what they start from. What an adapter holds whole (biases, modules_to_save) is
merged as an update of the base's tensor, densely.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common.spectral import working
from merging.calibration import SVC
from merging.layers import depths
from merging.lowrank import extract, fold, merge_and_calibrate, merge_low_rank, zero_like
from merging.mergers import merger
from merging.peft_files import OF_MODULES, Adapter, load_adapter, save_adapter
from merging.task_vectors import Predicate, TaskVector, check_finite, matrices_without

__all__ = [
    "Adapter",
    "extract_adapter",
    "fold_adapter",
    "load_adapter",
    "merge_adapters",
    "rename_to_base",
    "save_adapter",
]

MODULES = matrices_without("embed")


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str,
    svc: SVC | Mapping[str, Any] | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
    final_scale: float = 1.0,
    **options: Any,
) -> Adapter:
    """Return the merged adapter of K adapters of one base, LoRA in factored form; the inputs are left unchanged.

    The same as merging the K folded models, tensor by tensor (`merge_low_rank`). A tensor which an adapter leaves alone
    is a zero update of that task. IA³ vectors are merged as updates τ = l − 1; SVC gives them its rule for vectors,
    γ = K / Σ_i s_i with s_i = <τ, τ_i> / ‖τ_i‖². Every merger can do that; the spectral ones take the mean of vectors.

    Args:
        adapters: K adapters of one kind.
        method: a merger; for LoRA one that has a factored form.
        svc: the options of SVC ({} for its defaults), or None for no calibration.
        base: state dict; only the tensors that adapters hold whole (biases, modules_to_save) are read from it.
        final_scale: factor of the finished update, after calibration.
        **options: of the merger.

    Raises:
        ValueError: the adapters differ in kind or shapes, a tensor that is held whole is not in the base, or an option
            is out of range.
    """
    check_finite("final_scale", final_scale)
    if len(kinds := {adapter.kind for adapter in adapters}) != 1:
        raise ValueError(f"expected adapters of one kind, got {', '.join(sorted(kinds)) or 'none'}")
    modules, layers = {}, depths(_union(adapters, "modules"))
    for name, like in _union(adapters, "modules").items():
        updates = [adapter.modules.get(name, zero_like(like)) for adapter in adapters]
        own = merger(method).known(depth=layers[name]) | options
        merged = merge_low_rank(updates, method, svc, name=name, **own)
        modules[name] = replace(merged, scale=final_scale * merged.scale)

    def merge(held: str, start: Mapping[str, Tensor], vectors: bool) -> dict[str, Tensor]:
        """Merge tensors that are held whole, as updates of `start`."""
        like = _union(adapters, held)
        tasks = [_updates(getattr(adapter, held), start, vectors) for adapter in adapters]
        merged = merge_and_calibrate(tasks, method, svc, vectors=vectors, **options) if like else {}
        ends = {name: working(start[name]) + final_scale * merged[name].reshape(start[name].shape) for name in like}
        return {name: end.to(like[name].dtype) for name, end in ends.items()}

    ones = {name: torch.ones_like(vector) for name, vector in _union(adapters, "vectors").items()}
    vectors, values = merge("vectors", ones, True), merge("values", _starts(adapters, base), False)
    return Adapter(kinds.pop(), modules, vectors, values, joint_config(adapters))


def _union(adapters: Sequence[Adapter], held: str) -> dict[str, Any]:
    """Return name → the first adapter's entry, over all names that any adapter holds."""
    return {name: entry for adapter in reversed(adapters) for name, entry in getattr(adapter, held).items()}


def _updates(values: Mapping[str, Tensor], starts: Mapping[str, Tensor], flat: bool) -> dict[str, Tensor]:
    updates = {}
    for name, start in starts.items():
        value = values.get(name, start)
        if value.shape != start.shape:
            raise ValueError(f"{name!r}: shape {tuple(value.shape)} in an adapter, expected {tuple(start.shape)}")
        updates[name] = working(value) - working(start)
    return {name: update.flatten() for name, update in updates.items()} if flat else updates


def _starts(adapters: Sequence[Adapter], base: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the base's tensors of all that adapters hold whole, under the adapters' names."""
    whole = [adapter for adapter in adapters if adapter.values]
    if whole and base is None:
        name = next(iter(whole[0].values))
        raise ValueError(f"{name!r} is held whole by an adapter: its update needs `base`, or drop it from `values`")
    starts = {}
    for adapter in whole:
        for name, known in zip(adapter.values, rename_to_base(adapter, base).values, strict=True):
            if known not in base:
                raise ValueError(f"{name!r} is held whole, but is not in the base: drop it from the adapter's `values`")
            starts[name] = base[known].to(adapter.values[name].device)
    return starts


def joint_config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the first adapter's configuration, with what any of them holds whole."""
    whole = sorted({module for adapter in adapters for module in adapter.config.get("modules_to_save") or ()}) or None
    biases = next((bias for adapter in adapters if (bias := adapter.config.get("bias", "none")) != "none"), "none")
    return {**adapters[0].config, "modules_to_save": whole, "bias": biases}


# Folding -------------------------------------------------------------------------------------------------------------


def fold_adapter(adapter: Adapter, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's state dict with the adapter in its weights; all others are shared, not copied.

    LoRA: W + s B A. IA³: l ⊙ W, and the bias with it unless the module is a feed-forward one (l on its input). Tensors
    that the adapter holds whole replace the base's, and are added where the base has none (a new head).

    Raises:
        ValueError: the base lacks a weight, or one has another shape.
    """
    adapter = rename_to_base(adapter, base)
    state = dict(base)
    for name, value in adapter.values.items():
        if name in base and base[name].shape != value.shape:
            raise ValueError(
                f"{name!r}: shape {tuple(value.shape)} in the adapter, {tuple(base[name].shape)} in the base"
            )
        state[name] = value.to(base[name].dtype) if name in base else value
    for name, update in adapter.modules.items():
        state[name] = fold(update, state[name], name)
    for name, vector in adapter.vectors.items():
        state[name] = _rescaled(name, state[name], vector.T if adapter.config.get("fan_in_fan_out") else vector)
        bias = name.removesuffix("weight") + "bias"
        if bias in state and vector.shape[1] == 1:  # on the output
            state[bias] = _rescaled(bias, state[bias], vector.flatten())
    return state


def _rescaled(name: str, tensor: Tensor, vector: Tensor) -> Tensor:
    sizes = zip(vector.shape, tensor.shape, strict=False)
    if vector.ndim != tensor.ndim or any(own not in (1, size) for own, size in sizes):
        raise ValueError(f"{name!r}: an IA³ vector of shape {tuple(vector.shape)}, the base's {tuple(tensor.shape)}")
    return (working(tensor) * working(vector).to(tensor.device)).to(tensor.dtype)


def rename_to_base(adapter: Adapter, names: Collection[str]) -> Adapter:
    """Return the adapter with its tensors named as in the base, where the two differ by a prefix ("bert.", "model.").

    A model with a head wraps the base that it was made from, so that names get a prefix, or lose it. One prefix must
    fit all weights that are adapted. Values without a counterpart (a new head) keep their names.

    Raises:
        ValueError: no prefix fits, or several do.
    """
    targets = [*adapter.modules, *adapter.vectors]
    if all(target in names for target in targets):
        return adapter
    changes = [
        (dropped, added)
        for dropped, added in _prefix_changes(targets[0], names)
        if all(added + target.removeprefix(dropped) in names for target in targets)
    ]
    if len(changes) != 1:
        lacking = next(target for target in targets if target not in names)
        raise ValueError(f"the base has no tensor {lacking!r}, nor one change of prefix that fits all adapted weights")
    ((dropped, added),) = changes
    renamed = {
        held: {added + name.removeprefix(dropped): entry for name, entry in getattr(adapter, held).items()}
        for held in ("modules", "vectors")
    }
    new_names = {name: added + name.removeprefix(dropped) for name in adapter.values}
    values = {new if (new := new_names[name]) in names else name: value for name, value in adapter.values.items()}
    return replace(adapter, **renamed, values=values)


def _prefix_changes(target: str, names: Collection[str]) -> list[tuple[str, str]]:
    """Return every (prefix to drop, prefix to add) that makes a name of `target`."""
    longer = [("", name.removesuffix(target)) for name in names if name.endswith(f".{target}")]
    return longer + [(target.removesuffix(name), "") for name in names if target.endswith(f".{name}")]


def extract_adapter(
    expert: TaskVector,
    rank: int,
    *,
    matrices: Predicate = MODULES,
    layouts: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Return the rank-r LoRA adapter that is nearest to a full expert, and the share of each tensor's energy it loses.

    Args:
        expert: a task vector, full-rank updates included.
        rank: of every module.
        matrices: which tensors become modules, of those that are named "….weight"; the others are lost as a whole.
        layouts: name → "transposed" (or "conv1d", after the modules that store it so) or "embedding"; all others are
            "matrix".
        config: entries of adapter_config.json, such as base_model_name_or_path and task_type.

    Returns:
        the adapter, and name → share of ‖τ‖_F² that is lost, for every floating-point tensor of the expert.
    """
    modules, lost = {}, {}
    for name, update in expert.items():
        if not update.is_floating_point():
            continue
        if update.ndim == 2 and name.endswith(".weight") and matrices(name, update):
            layout = (layouts or {}).get(name, "matrix")
            modules[name], lost[name] = extract(update, rank, OF_MODULES.get(layout, layout))
        else:
            lost[name] = float(bool(update.any()))
    return Adapter("lora", modules, config=dict(config or {})), lost
