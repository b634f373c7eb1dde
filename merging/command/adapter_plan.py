"""What becomes of each tensor of the base when the experts are adapters of peft.

LoRA        each adapted weight is a step of kind "low rank": merged in factored form where the method has one, else,
            if it treats single entries (TIES, DARE), on b @ a by ranges of rows. A method that does neither is refused.
            A weight that an adapter leaves alone is a zero update of it.
IA³         steps of kind "vector": the vectors l are merged as updates l − 1, whatever the size of what they multiply,
            the weight and, where they act on the output, its bias. SVC gives them its rule for vectors.
The rest    biases and modules that an adapter holds whole are steps like those of full models, zero updates of the
            adapters that lack them. What the base lacks (a new head) is left out.
"""

from collections.abc import Sequence

import torch

from merging.adapters import rename_to_base
from merging.checkpoints import Entry
from merging.command.changes import RANGE
from merging.command.storage import Piece, Plan, Step, pieces, storage
from merging.mergers import merger
from merging.peft_files import Adapter, Factors


def adapter_steps(plan: Plan) -> list[Step]:
    """Return the steps of a plan whose experts are adapters, and add to its notes.

    Raises:
        ValueError: one line: adapters of different kinds, or one that does not fit the base or the others.
    """
    if len(kinds := sorted({adapter.kind for adapter in plan.experts})) > 1:
        raise ValueError(f"--experts: adapters of one kind can be merged, got {' and '.join(kinds)}")
    own = merger(plan.recipe.method)
    if "lora" in kinds and not own.factored and not own.by_entry:
        raise ValueError(
            f"--method {plan.recipe.method}: needs whole matrices, and has no form for the factors of LoRA adapters: "
            "merge the folded models instead"
        )
    adapters = [_named_as_base(plan, adapter, given) for adapter, given in _given(plan, plan.experts)]
    for adapter, given in _given(plan, adapters):
        for name in sorted(adapter.values.keys() - plan.base.entries.keys()):
            plan.notes.append(f"{given}: {name!r}: held whole, and not in {plan.base.given}; left out")
    layouts = storage(plan.base.entries)
    return [_step(plan, entry, adapters, layouts[name]) for name, entry in plan.base.entries.items()]


def _given(plan: Plan, adapters: Sequence[Adapter]) -> list[tuple[Adapter, str]]:
    return list(zip(adapters, plan.recipe.experts, strict=True))


def _named_as_base(plan: Plan, adapter: Adapter, given: str) -> Adapter:
    try:
        return rename_to_base(adapter, plan.base.entries)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from None


def _step(plan: Plan, entry: Entry, adapters: Sequence[Adapter], layout: str) -> Step:
    name = entry.name
    options = plan.recipe.of(name, len(adapters))
    weight = f"{name.removesuffix('bias')}weight" if name.endswith("bias") else name
    held = {
        "low rank": [adapter.modules.get(name) for adapter in adapters],
        "vector": [_vector(adapter, name, weight) for adapter in adapters],
        "values": [_value(adapter, entry) for adapter in adapters],
    }
    kinds = [kind for kind, experts in held.items() if any(experts)] if options["merge"] else []
    if len(kinds) > 1:
        raise ValueError(f"{name!r}: held whole, not as in the base, and adapted too; --set '{name}:merge=false'")
    dtype = plan.recipe.output_dtype(entry.dtype)
    if not kinds:
        return Step(name, entry, (), (), dtype, options["layout"] or layout, options)
    experts = held[kinds[0]]
    first = next(expert for expert in experts if expert)
    if kinds[0] == "values":
        _check_values(plan, entry, experts)
        layout = options["layout"] or layout
        return Step(name, entry, tuple(experts), pieces(entry, layout), dtype, layout, options)
    if kinds[0] == "low rank":
        _check_factors(plan, entry, experts, options)
        piece = Piece(name, 0, entry.shape, transposed=first.layout == "conv1d")
        return Step(name, entry, tuple(experts), (piece,), dtype, "low rank", options, "low rank")
    options = plan.recipe.of(weight, len(adapters)) | {"vectors": True}  # a bias goes with its weight
    spread, piece = _spread(entry, experts, adapters), Piece(weight, 0, (first.count,))
    return Step(name, entry, tuple(experts), (piece,), dtype, "IA³", options, "vector", spread)


def _value(adapter: Adapter, entry: Entry) -> Entry | None:
    """Return what an adapter holds whole; peft saves the base's own lm_head beside an adapted one: that is nothing."""
    value = adapter.values.get(entry.name)
    return None if value and entry.name in adapter.modules and _same(value, entry) else value


def _same(value: Entry, entry: Entry) -> bool:
    if value.shape != entry.shape:
        return False
    ranges = [(start, min(start + RANGE, entry.count)) for start in range(0, entry.count, RANGE)]
    return all(torch.equal(value.read(*part, torch.float32), entry.read(*part, torch.float32)) for part in ranges)


def _vector(adapter: Adapter, name: str, weight: str) -> Entry | None:
    """Return the vector that multiplies a tensor: a weight's own, or, for a bias, its weight's if on the output."""
    vector = adapter.vectors.get(weight)
    return vector if vector and (name == weight or vector.shape[1] == 1) else None


def _check_values(plan: Plan, entry: Entry, experts: Sequence[Entry | None]) -> None:
    for expert in filter(None, experts):
        if expert.shape != entry.shape or not entry.dtype.is_floating_point:
            raise ValueError(
                f"{expert.where}: {expert.dtype} {list(expert.shape)}, and {entry.dtype} {list(entry.shape)} in "
                f"{plan.base.given}; --set '{entry.name}:merge=false' keeps the base's"
            )


def _check_factors(plan: Plan, entry: Entry, experts: Sequence[Factors | None], options: dict) -> None:
    layouts = {expert.layout for expert in experts if expert}
    if len(layouts) > 1:
        raise ValueError(f"{entry.name!r}: adapters differ in how it is stored ({', '.join(sorted(layouts))})")
    for expert in filter(None, experts):
        if expert.shape != entry.shape:
            hint = " (transposed: see fan_in_fan_out)" if expert.shape == entry.shape[::-1] else ""
            raise ValueError(
                f"{expert.up.where}: an update of shape {list(expert.shape)}, and {list(entry.shape)} in "
                f"{plan.base.given}{hint}"
            )
    if options["svc"] and options["space"] == "input" and merger(plan.recipe.method).basis:
        raise ValueError(
            f"--space input: SVC of adapters after {plan.recipe.method} is defined in the output space only"
        )


def _spread(entry: Entry, experts: Sequence[Entry | None], adapters: Sequence[Adapter]) -> tuple[int, ...]:
    """Return the shape in which the vector multiplies the base's tensor, after checking that it can."""
    spreads = {
        (vector.count,) if len(entry.shape) == 1
        else vector.shape[::-1] if adapter.config.get("fan_in_fan_out") else vector.shape
        for vector, adapter in zip(experts, adapters, strict=True) if vector
    }  # fmt: skip
    spread = spreads.pop()
    fits = len(spread) == len(entry.shape) and all(
        own in (1, size) for own, size in zip(spread, entry.shape, strict=True)
    )
    if spreads or not fits:
        where = next(vector.where for vector in experts if vector)
        raise ValueError(
            f"{where}: an IA³ vector that multiplies as {list(spread)}"
            + (f", and as {list(spreads.pop())} in another adapter" if spreads else f" what is {list(entry.shape)}")
        )
    return spread
