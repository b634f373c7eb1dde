"""What becomes of each tensor of the base when the experts are adapters of peft.

LoRA        the factors of an adapted weight are merged as factors where the method has a factored form, else, if it
            treats single entries (TIES, DARE), on b @ a by ranges of rows. A method that does neither is refused.
            A weight that an adapter leaves alone is a zero update of it.
IA³         the vectors l are merged as updates l − 1, whatever the size of what they multiply: the weight and, where
            they act on the output, its bias. SVC gives them its rule for vectors.
The rest    biases and modules that an adapter holds whole are merged like tensors of full models; they are zero updates
            of the adapters that lack them. A head that the base lacks is left out; other tensors that it lacks are
            refused without `partial`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from merging.adapters import rename_to_base
from merging.checkpoints import Checkpoint, Entry
from merging.command.changes import IA3, Full, LoRA, Step
from merging.command.kinds import is_of_tokens
from merging.command.naming import naming
from merging.command.proportion import Side, told
from merging.command.recipe import Recipe
from merging.command.storage import Piece, pieces, storage
from merging.command.tied import copy_of, same_values
from merging.layers import depths
from merging.mergers import merger
from merging.peft_files import Adapter, Factors
from merging.views import Transposed, renamed


def adapter_steps(recipe: Recipe, base: Checkpoint, experts: Sequence[Adapter], notes: list[str]) -> list[Step]:
    """Return what becomes of each tensor of the base; what is left out is added to the notes.

    Raises:
        ValueError: one line: adapters of different kinds, or one that does not fit the base or the others.
    """
    if len(kinds := sorted({adapter.kind for adapter in experts})) > 1:
        raise ValueError(f"--experts: adapters of one kind can be merged, got {' and '.join(kinds)}")
    own = merger(recipe.method)
    if "lora" in kinds and not own.factored and not own.by_entry:
        raise ValueError(
            f"--method {recipe.method}: needs whole matrices, and has no form for the factors of LoRA adapters: "
            "merge the folded models instead"
        )
    adapters = [_named_as_base(given, adapter, base) for given, adapter in zip(recipe.experts, experts, strict=True)]
    for given, adapter in zip(recipe.experts, adapters, strict=True):
        notes += _left_out(given, adapter, base, recipe.partial)
    layouts, layers = storage(base.entries), depths(base.entries)
    return [_step(recipe, base, entry, adapters, layouts[name], layers) for name, entry in base.entries.items()]


def _named_as_base(given: str, adapter: Adapter, base: Checkpoint) -> Adapter:
    try:
        return named_as_base(adapter, base)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from None


def named_as_base(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter with its tensors named as the base stores them, in their order.

    An adapter has the names of the model's class, or of an older version of it; the base's file may have others
    (`merging.command.naming`), or another prefix.

    Raises:
        ValueError: a weight that is adapted has no counterpart.
    """
    if all(name in base.entries for name in (*adapter.modules, *adapter.vectors, *adapter.values)):
        return adapter
    own = naming(base)
    whole = ((name, parts[0]) for name, parts in own.parts(base.entries).items() if len(parts) == 1)
    stored = {part.name: name for name, part in whole if not isinstance(part, Transposed)}

    def known(held: Mapping[str, Any]) -> dict[str, Any]:
        names = (name if name in base.entries else stored.get(own.canonical(name), name) for name in held)
        return dict(zip(names, held.values(), strict=True))

    own_names = {kind: known(getattr(adapter, kind)) for kind in ("modules", "vectors", "values")}
    return rename_to_base(replace(adapter, **own_names), base.entries)


def _left_out(given: str, adapter: Adapter, base: Checkpoint, partial: bool) -> list[str]:
    """Return a note on what an adapter holds whole and the base lacks; refused, unless these are heads."""
    values = {name: renamed(value, name) for name, value in adapter.values.items()}
    factors = [each for pair in adapter.modules.values() for each in (pair.down, pair.up)]
    held = values | {each.where: each for each in (*factors, *adapter.vectors.values())}
    alone = [value for name, value in values.items() if name not in base.entries]
    alone = [value for value in alone if not copy_of(value, [each for each in values.values() if each is not value])]
    return told(Side(base.given, base.entries, (), base.config), Side(given, held, alone, {}), partial, set())


def _step(
    recipe: Recipe,
    base: Checkpoint,
    entry: Entry,
    adapters: Sequence[Adapter],
    layout: str,
    layers: Mapping[str, float],
) -> Step:
    name = entry.name
    options, dtype = recipe.of(name, len(adapters), layers[name]), recipe.output_dtype(entry.dtype)
    layout = options["layout"] or layout
    weight = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
    factors = [adapter.modules.get(name) for adapter in adapters]
    vectors = [_vector(adapter, name, weight) for adapter in adapters]
    values = [_value(adapter, entry) for adapter in adapters]
    held = sum(any(experts) for experts in (factors, vectors, values)) if options["merge"] else 0
    if held > 1:
        raise ValueError(f"{name!r}: held whole, not as in the base, and adapted too; --set '{name}:merge=false'")
    if not held:
        return Step(entry, None, (), dtype, layout, options)
    if any(factors):
        layout = _layout_of(base, entry, factors)
        _check_space(recipe, options)
        return Step(entry, LoRA(factors), pieces(entry, layout), dtype, layout, options)
    if any(vectors):
        change = IA3(vectors, _spread(entry, vectors, adapters))
        count = next(vector.count for vector in vectors if vector)
        options = recipe.of(weight, len(adapters), layers[name]) | {"vectors": True}  # a bias goes with its weight
        return Step(entry, change, (Piece(weight, 0, (count,), "vector"),), dtype, layout, options)
    _check_values(base, entry, values)
    return Step(entry, Full(values), pieces(entry, layout), dtype, layout, options)


def _value(adapter: Adapter, entry: Entry) -> Entry | None:
    """Return what an adapter holds whole; the base's own lm_head, saved by peft beside its update, is left out."""
    value = adapter.values.get(entry.name)
    return None if value and entry.name in adapter.modules and same_values(value, entry) else value


def _vector(adapter: Adapter, name: str, weight: str) -> Entry | None:
    """Return the vector that multiplies a tensor: a weight's own, or, for a bias, its weight's if on the output."""
    vector = adapter.vectors.get(weight)
    return vector if vector and (name == weight or vector.shape[1] == 1) else None


def _check_values(base: Checkpoint, entry: Entry, values: Sequence[Entry | None]) -> None:
    for value in filter(None, values):
        if value.shape != entry.shape or not entry.dtype.is_floating_point:
            _check_vocabulary(base, entry, value.where, value.shape)
            raise ValueError(
                f"{value.where}: {value.dtype} {list(value.shape)}, and {entry.dtype} {list(entry.shape)} in "
                f"{base.given}; --set '{entry.name}:merge=false' keeps the base's"
            )


def _layout_of(base: Checkpoint, entry: Entry, factors: Sequence[Factors | None]) -> str:
    """Return how the weight of some factors is stored, after checking that all adapters mean the same weight."""
    layouts = {each.layout for each in factors if each}
    if len(layouts) > 1:
        raise ValueError(f"{entry.name!r}: adapters differ in how it is stored ({', '.join(sorted(layouts))})")
    for each in filter(None, factors):
        if each.shape != entry.shape:
            _check_vocabulary(base, entry, each.up.where, each.shape)
            hint = " (transposed: see fan_in_fan_out)" if each.shape == entry.shape[::-1] else ""
            raise ValueError(
                f"{each.up.where}: an update of shape {list(each.shape)}, and {list(entry.shape)} in {base.given}{hint}"
            )
    return layouts.pop()


def _check_vocabulary(base: Checkpoint, entry: Entry, where: str, shape: Sequence[int]) -> None:
    """Raise what is to be done where an adapter was made after its model got more rows for tokens than the base has."""
    other_rows = len(shape) == len(entry.shape) > 0 and shape[0] != entry.shape[0] and shape[1:] == entry.shape[1:]
    if other_rows and is_of_tokens(entry.name):
        raise ValueError(
            f"{where}: {shape[0]} rows, and {entry.name!r} in {base.given} has {entry.shape[0]}: the adapter was made "
            f"after its model's vocabulary was resized; save that base, model.resize_token_embeddings({shape[0]}), "
            "and merge on it"
        )


def _check_space(recipe: Recipe, options: Mapping[str, Any]) -> None:
    if options["svc"] and options["space"] == "input" and merger(recipe.method).basis:
        raise ValueError(f"--space input: SVC of adapters after {recipe.method} is defined in the output space only")


def _spread(entry: Entry, vectors: Sequence[Entry | None], adapters: Sequence[Adapter]) -> tuple[int, ...]:
    """Return the shape in which the vector multiplies the base's tensor, after checking that it can."""
    spreads = {
        (vector.count,) if len(entry.shape) == 1
        else vector.shape[::-1] if adapter.config.get("fan_in_fan_out") else vector.shape
        for vector, adapter in zip(vectors, adapters, strict=True) if vector
    }  # fmt: skip
    spread = spreads.pop()
    fits = len(spread) == len(entry.shape) and all(
        own in (1, size) for own, size in zip(spread, entry.shape, strict=True)
    )
    if spreads or not fits:
        where = next(vector.where for vector in vectors if vector)
        raise ValueError(
            f"{where}: an IA³ vector that multiplies as {list(spread)}"
            + (f", and as {list(spreads.pop())} in another adapter" if spreads else f" what is {list(entry.shape)}")
        )
    return spread
