"""Under which names, and in which layout, transformers knows the tensors of a class, whatever a file calls them.

The tables are those of transformers itself, by which it loads files of older versions and other layouts: renames
(LayerNorm.gamma is LayerNorm.weight, language_model.model is model.language_model) and conversions (the experts of a
mixture one by one, or packed in one tensor). The class is built from config.json without memory for weights. Here they
give each stored tensor the names of its parts, the finest that any layout has: a packed tensor of E experts with gate
and up is 2 · E parts, each consecutive in it. What wraps a model (torch.compile, FSDP, activation checkpoints, data
parallel) is taken out of the names.

Conversions that are no stack and no concatenation (a permutation for rotary embeddings) have no such parts: what they
make keeps its stored name, and matches only what is stored likewise.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from merging.checkpoints import Checkpoint, Entry
from merging.views import part, renamed, transposed

WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")

STACKED = (["MergeModulelist", 0],)  # E tensors become the E matrices of one
PAIRED = (["MergeModulelist", 0], ["Concatenate", 1])  # and those of several lists lie beside each other in each matrix
CONCATENATED, SPLIT = (["Concatenate", 0],), (["Chunk", 0],)  # by rows; Chunk is what takes a stored one apart

Parts = Mapping[str, tuple[Entry, ...]]  # stored name → its parts under their canonical names, one behind the other


@dataclass(frozen=True)
class Naming:
    """What transformers knows of one class of models: its tables, its parameters, and which of them are tied."""

    renamings: tuple[Any, ...] = ()  # transformers' WeightRenaming
    converters: tuple[Any, ...] = ()  # transformers' WeightConverter
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of all parameters of the class; {} if unknown
    ties: Mapping[str, str] = field(default_factory=dict)  # parameter → that whose values it shares

    def parts(self, entries: Mapping[str, Entry]) -> Parts:
        """Return the parts of all tensors of a checkpoint; where two would have one name, both keep their stored ones.

        Args:
            entries: the checkpoint's tensors by stored name.
        """
        found = {name: self._parts(entries[name]) for name in sorted(entries)}  # transformers too goes by sorted names
        count = Counter(each.name for own in found.values() for each in own)
        alone = {name: own for name, own in found.items() if all(count[each.name] == 1 for each in own)}
        return {name: alone.get(name, (entry,)) for name, entry in entries.items()}

    def canonical(self, name: str) -> str:
        """Return the name that a tensor of no packed or transposed kind has in the class."""
        stored = WRAPPERS.sub("", name)
        name = self._renamed(stored)
        return stored if name not in self.shapes and stored in self.shapes else name  # as transformers

    def _renamed(self, name: str) -> str:
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def _parts(self, entry: Entry) -> tuple[Entry, ...]:
        stored = WRAPPERS.sub("", entry.name)
        name = self._renamed(stored)
        for converter in self.converters:
            converted, pattern = converter.rename_source_key(name)
            if pattern is not None:
                if converted not in self.shapes and stored in self.shapes:
                    break
                return self._source(entry, name, converted, converter)
        name = self.canonical(stored)
        for converter in self.converters:
            if (parts := _packed(entry, name, converter)) is not None:
                return parts
        return (renamed(entry, name),)

    def _source(self, entry: Entry, name: str, converted: str, converter: Any) -> tuple[Entry, ...]:
        """Return the parts of a tensor that a converter of transformers takes: itself, or what it is split into."""
        kind = _kind(converter)
        if kind in (STACKED, PAIRED, CONCATENATED):
            return (renamed(entry, name),)
        if kind == SPLIT:
            first, *others = converter.target_patterns
            names = [converted, *(converted.replace(first, other, 1) for other in others)]
            return _cut(entry, names, entry.shape)
        return (_as_in_class(entry, converted, self.shapes) if _keeps_layout(converter) else renamed(entry, name),)


def _packed(entry: Entry, name: str, converter: Any) -> tuple[Entry, ...] | None:
    """Return the parts of a tensor which a converter of transformers makes, or None where it makes others."""
    kind = _kind(converter)
    if kind not in (STACKED, PAIRED, CONCATENATED):
        return None
    back = converter.reverse_transform()
    first, pattern = back.rename_source_key(name)
    if pattern is None or r"\1" in "".join(back.target_patterns):
        return None
    names = [first.replace(back.target_patterns[0], each, 1) for each in back.target_patterns]
    if kind == CONCATENATED:
        return _cut(entry, names, entry.shape)
    if len(entry.shape) != 3:
        return None
    numbered = [each.replace("*", str(index)) for index in range(entry.shape[0]) for each in names]
    return _cut(entry, numbered, (entry.shape[0] * entry.shape[1], entry.shape[2]))


def _cut(entry: Entry, names: list[str], shape: tuple[int, ...]) -> tuple[Entry, ...]:
    """Return equal consecutive parts, by rows, of a tensor seen in that shape; itself where it cannot be cut so."""
    if not entry.count or shape[0] % len(names):
        return (entry,)
    size, own = entry.count // len(names), (shape[0] // len(names), *shape[1:])
    return tuple(part(entry, name, index * size, own) for index, name in enumerate(names))


def _kind(converter: Any) -> tuple[list, ...]:
    """Return the operations of a converter of transformers as names and dimensions; a dimension that is read off a
    configuration counts as unknown."""
    return tuple(
        [type(each).__name__, getattr(each, "dim", None)]
        if getattr(each, "num_shards_attribute", None) is None
        else ["unknown", None]
        for each in converter.operations
    )


def _keeps_layout(converter: Any) -> bool:
    """Return whether a converter changes a tensor only where its shape is not that of the class (Transpose)."""
    return all(getattr(each, "check_dims", False) for each in converter.operations)


def _as_in_class(entry: Entry, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Entry:
    """Return a tensor under its canonical name, its matrices transposed where the class has them so."""
    expected = shapes.get(name, entry.shape)
    flipped = entry.shape != expected == (*entry.shape[:-2], *entry.shape[:-3:-1])
    return transposed(entry, name) if flipped else renamed(entry, name)


# The tables of transformers -------------------------------------------------------------------------------------------


def naming(checkpoint: Checkpoint, other: Checkpoint | None = None) -> Naming:
    """Return what transformers knows of the class of a checkpoint, by its config.json, or that of another model of its
    architecture where it has none; of no class in particular where there is neither."""
    config = checkpoint.config if "model_type" in checkpoint.config or other is None else other.config
    return naming_of(config)


def naming_of(config: Mapping[str, Any]) -> Naming:
    """Return what transformers knows of the class that a configuration names."""
    return _naming(as_text(config))


def as_text(config: Mapping[str, Any]) -> str:
    """Return a configuration as JSON, the same for equal ones."""
    return json.dumps(config, sort_keys=True)


@lru_cache(maxsize=32)
def class_of(config: str) -> Any | None:
    """Return the model of a configuration, as JSON, without memory for its weights; None if transformers cannot."""
    import transformers

    values = json.loads(config)
    kind = getattr(transformers, (values.get("architectures") or [""])[0], None)
    if kind is None or "model_type" not in values:
        return None
    try:
        with torch.device("meta"):
            return kind(transformers.AutoConfig.for_model(**values))
    except Exception:  # whatever a configuration of another version makes its code raise
        return None


def _naming(config: str) -> Naming:
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:  # a version without these tables: names are matched as they are
        return Naming()
    model = class_of(config)
    if model is not None:
        table = get_model_conversion_mapping(model)
    else:
        values = json.loads(config)
        kinds = [values, *(value for value in values.values() if isinstance(value, dict))]
        known = (kind["model_type"] for kind in kinds if isinstance(kind.get("model_type"), str))
        tables = map(get_checkpoint_conversion_mapping, (*known, "legacy"))
        table = [each for table in tables for each in table or ()]
    return Naming(
        tuple(each for each in table if isinstance(each, WeightRenaming)),
        tuple(each for each in table if isinstance(each, WeightConverter)),
        {name: tuple(value.shape) for name, value in model.state_dict().items()} if model is not None else {},
        dict(getattr(model, "all_tied_weights_keys", None) or {}),
    )
