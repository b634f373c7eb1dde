"""Tied tensors: two names for the same values, in one file stored once, in another twice, in a third trained apart.

Ties are found by comparing bytes. Where an expert trained apart what the base does not store, or stores as a copy,
transformers is asked which names the base's class ties: the base's value is then that of the tensor to which they are
tied, and the output is written untied, with `tie_word_embeddings: false`. Where the class takes that for more than ties
(T5 and its kin scale the logits of tied heads by 1/√d), config.json is left as it is: transformers loads a head apart
from its embedding wherever a file holds both with different values.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from merging.checkpoints import Checkpoint, Entry
from merging.command.changes import Step
from merging.command.kinds import is_embedding
from merging.command.naming import as_text, class_of, naming, naming_of
from merging.peft_files import Adapter
from merging.views import renamed

COMPARED = 2**22  # entries compared at a time


def twin_of(entry: Entry, base: Checkpoint, known: Iterable[str]) -> str | None:
    """Return the name of a tensor that is tied to this one, with the same bytes in the base, and that an expert has."""
    others = [base.entries[name] for name in known if name != entry.name]
    copy = copy_of(entry, others)
    return copy.name if copy else None


def copy_of(entry: Entry, others: Sequence[Entry]) -> Entry | None:
    """Return the first of some tensors that is a copy of a matrix, or None."""
    if len(entry.shape) < 2:
        return None
    same = (other for other in others if other.shape == entry.shape and other.dtype == entry.dtype)
    return next((other for other in same if equal(entry, other)), None)


def equal(entry: Entry, other: Entry) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes."""
    if entry.shape != other.shape or entry.dtype != other.dtype:
        return False
    if type(entry) is type(other) is Entry and (entry.path, entry.name) == (other.path, other.name):
        return True
    for start in (0, *range(64, entry.count, COMPARED)):  # nearly all pairs differ in their first entries
        stop = min(64, entry.count) if start == 0 else min(start + COMPARED, entry.count)
        if not torch.equal(entry.read(start, stop), other.read(start, stop)):
            return False
    return True


def same_values(entry: Entry, other: Entry) -> bool:
    """Return whether two tensors have the same shape and values, whatever their dtypes."""
    if entry.shape != other.shape:
        return False
    ranges = [(start, min(start + COMPARED, entry.count)) for start in range(0, entry.count, COMPARED)]
    return all(torch.equal(entry.read(*part, torch.float32), other.read(*part, torch.float32)) for part in ranges)


def with_ties(steps: list[Step], remarks: list[str]) -> list[Step]:
    """Give tied tensors, those with the same bytes in the base and in every expert, the name of the first of them."""
    groups: dict[Any, list[Step]] = {}
    for step in steps:
        if step.change and len(step.base.shape) > 1:
            start = step.base.read(0, min(64, step.base.count)).view(torch.uint8)
            groups.setdefault((step.base.shape, step.base.dtype, bytes(start.numpy())), []).append(step)
    renamed = {}
    for group in groups.values():
        for index, step in enumerate(group):
            first = next((other for other in group[:index] if _tied(step, other)), None)
            if first and first.name not in renamed:
                renamed[step.name] = first
                remarks.append(f"{step.name!r}: tied to {first.name!r}; both are merged as {first.name!r}")
    return [_merged_as(step, renamed[step.name]) if step.name in renamed else step for step in steps]


def _merged_as(step: Step, first: Step) -> Step:
    return replace(step, pieces=first.pieces, layout=first.layout, options=first.options)


def _tied(first: Step, second: Step) -> bool:
    ours, theirs = ((step.base, *step.experts) for step in (first, second))
    return all(equal(one, other) for one, other in zip(ours, theirs, strict=True))


# Trained apart --------------------------------------------------------------------------------------------------------


def trained_apart(base: Checkpoint, experts: Sequence[Checkpoint] | Sequence[Adapter]) -> dict[str, Entry]:
    """Return the tensors that the base's class ties to others, and that an expert holds or adapts by themselves.

    Args:
        base: the base.
        experts: models, or adapters.

    Returns:
        name → the base's value, that of the tensor to which it is tied; where the base stores a copy, that copy.
    """
    if not any(_may_untie(base, expert) for expert in experts):
        return {}
    own, head = naming(base), _head(base)
    stored = {part.name: name for name, parts in own.parts(base.entries).items() for part in parts}
    found = {}
    for name, source in own.ties.items():
        if (name in _fixed(base) and name != head) or source not in stored:
            continue
        tied = base.entries[stored[source]]
        if any(
            _acts_apart(expert, (name, source), tied) if isinstance(expert, Adapter) else _is_apart(base, expert, name)
            for expert in experts
        ):
            found[name] = base.entries[stored[name]] if name in stored else renamed(tied, name)
    return found


def adapted_as_one(base: Checkpoint, adapters: Sequence[Adapter], apart: Iterable[str]) -> list[str]:
    """Return the embeddings that adapters change and that stay tied to a head, so that the head changes with them.

    Args:
        base: the base.
        adapters: the experts.
        apart: as `trained_apart` finds them.
    """
    touched = {name for adapter in adapters for name in adapter.modules if is_embedding(name)}
    if not touched:
        return []
    head = _head(base)
    return [source for name, source in naming(base).ties.items() if name == head not in apart and source in touched]


def stays_configured(base: Checkpoint, names: Iterable[str]) -> bool:
    """Return whether config.json must go on tying some tensors that the output holds apart.

    So it must where the class ties them whatever it says, or computes something else without ties.

    Args:
        base: the base.
        names: as `trained_apart` finds them.
    """
    forward = inspect.unwrap(type(class_of(as_text(base.config))).forward)
    return any(name in _fixed(base) for name in names) or "tie_word_embeddings" in forward.__code__.co_names


def _fixed(base: Checkpoint) -> Mapping[str, str]:
    """Return the ties that no configuration unties."""
    return naming_of(untied(base.config)).ties


def _head(base: Checkpoint) -> str | None:
    """Return the weight that makes logits of tokens, by its name in the class of the base."""
    model = class_of(as_text(base.config))
    head = model.get_output_embeddings() if model is not None else None
    found = (f"{name}.weight" for name, module in model.named_modules() if module is head) if head else ()
    return next(iter(found), None)


def _may_untie(base: Checkpoint, expert: Checkpoint | Adapter) -> bool:
    """Return whether an expert has a matrix that the base does not store, or stores as a copy; an adapter, whether it
    acts on an embedding."""
    if isinstance(expert, Adapter):
        held = {**expert.values, **expert.modules, **expert.vectors}
        return any(name not in base.entries or is_embedding(name) for name in held)
    if any(name not in base.entries for name, entry in expert.entries.items() if len(entry.shape) == 2):
        return True
    embeddings = [entry for name, entry in base.entries.items() if is_embedding(name)]
    return any(copy_of(each, [other for other in base.entries.values() if other is not each]) for each in embeddings)


def _is_apart(base: Checkpoint, expert: Checkpoint, name: str) -> bool:
    """Return whether an expert holds a tensor that is tied in the base, and no other with the same values."""
    parts = naming(expert, base).parts(expert.entries).values()
    return name in (held := {part.name: part for own in parts for part in own}) and not _is_copy(name, held)


def _acts_apart(adapter: Adapter, names: tuple[str, str], tied: Entry) -> bool:
    """Return whether an adapter changes the first of two tied tensors by itself, or holds only one of them, trained.

    While it is trained, LoRA of the head acts on the head alone, though peft changes both where it folds it. LoRA of
    the embedding alone is folded as peft does: both stay one. What peft saved of the base beside such an update was not
    trained.
    """
    if names[0] in adapter.modules or names[0] in adapter.vectors:
        return True
    held = {name: adapter.values[name] for name in names if name in adapter.values}
    trained = [name for name, value in held.items() if not same_values(value, tied)]
    return len(trained) == 1 or (len(trained) == 2 and not _is_copy(names[0], adapter.values))


def _is_copy(name: str, held: Mapping[str, Entry]) -> bool:
    return copy_of(held[name], [entry for other, entry in held.items() if other != name]) is not None


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that ties no embeddings, nor do those that are nested in it."""
    nested = {
        key: untied(value)
        for key, value in config.items()
        if isinstance(value, dict) and "tie_word_embeddings" in value
    }
    return {**config, **nested, "tie_word_embeddings": False}
