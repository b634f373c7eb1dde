"""What becomes of each tensor: which tensors of the experts belong to it, how it is stored, whether it is merged.

No list of architectures: everything is read off names, shapes and, where two tensors may be tied, bytes.

Names       experts may be stored under other names and in another layout than the base: what transformers knows of its
            class is used, and a prefix added, dropped or changed (`merging.command.naming`, `merging.command.names`).
Missing     a tensor that no expert has (another head) keeps the base's value; one that some have and others lack is
            refused, unless nothing was trained in it. Tensors that only experts have are left out. A tied copy that
            one side does not store is found by comparing bytes.
Proportion  heads may differ; if more than 1 % of the bytes of the rest have no partner, or left-out and kept tensors
            fit each other by shape, it is refused without `partial` (`merging.command.proportion`).
Rows        where tensors differ in their number of rows, `merging.command.vocabulary` says what is merged.
8 bits      weights with scales are read as what they stand for (`merging.fp8`); other quantised ones are refused.
Tied        an output head that the base ties and an expert trained apart is written (`merging.command.tied`).
Repeats     an expert that is the base, or is given twice, is merged so, and told (`merging.command.repeats`).
Integers    keep the base's value; where experts differ in more than a single counter, that is refused. They may be
            absent from some experts, and so may what a model computes by itself (inv_freq).
Adapters    are planned by `merging.command.adapter_plan`; how tensors are stored is told by `merging.command.storage`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from merging.checkpoints import Checkpoint, Entry
from merging.command.adapter_plan import adapter_steps
from merging.command.changes import Full, Step
from merging.command.names import align, base_parts
from merging.command.proportion import Side, is_computed, some, told
from merging.command.recipe import Recipe
from merging.command.repeats import repeats
from merging.command.storage import pieces, storage
from merging.command.tied import adapted_as_one, copy_of, equal, stays_configured, trained_apart, twin_of, with_ties
from merging.command.tokens import Union, union, united_rows
from merging.command.vocabulary import matching_rows
from merging.fp8 import Scaled, dequantised
from merging.layers import depths
from merging.peft_files import Adapter


@dataclass
class Plan:
    """All tensors of the base, in the order of its files, and what has to be said about them."""

    recipe: Recipe
    base: Checkpoint
    experts: tuple[Checkpoint, ...] | tuple[Adapter, ...]
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what differs between the models, and is refused by --strict
    remarks: list[str] = field(default_factory=list)  # tied tensors, and what else is only told
    repeated: dict[int, str] = field(default_factory=dict)  # experts that change nothing, or that are given again
    joint: Union | None = None  # the vocabulary of the output, where it is not the base's
    untied: bool = False  # whether the output's configuration has to untie what the base's ties

    @property
    def merged(self) -> list[Step]:
        """The steps that merge something, each update once."""
        return [step for step in self.steps if step.change and not step.repeats]


def make_plan(recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint] | Sequence[Adapter]) -> Plan:
    """Decide what becomes of each tensor of the base; experts are models, or adapters as `open_adapter` returns them.

    Raises:
        ValueError: one line that names file and tensor; with `recipe.strict` for everything that would be a note.
    """
    base, experts = dequantised(base), [each if isinstance(each, Adapter) else dequantised(each) for each in experts]
    plan = Plan(recipe, base, tuple(experts), repeated=repeats(recipe.experts, base, experts))
    for model in (base, *experts):
        if not isinstance(model, Adapter) and any(isinstance(entry, Scaled) for entry in model.entries.values()):
            plan.remarks.append(f"{model.given}: 8-bit weights, read as weight · scale; nothing is written in 8 bits")
    adapters = [isinstance(expert, Adapter) for expert in experts]
    if apart := trained_apart(base, experts):
        base = plan.base = replace(base, entries={**apart, **base.entries})
        plan.untied = not stays_configured(base, apart)
        still = "" if plan.untied else ", though config.json ties it, as its class needs"
        plan.remarks.append(f"{some(list(apart))}: tied in {base.given}, and trained apart; written untied{still}")
    if any(adapters) and not all(adapters):
        odd = recipe.experts[adapters.index(False)]
        raise ValueError(f"{odd}: is no adapter, and other experts are; fold those into the base first, one by one")
    if any(adapters) and (one := adapted_as_one(base, experts, apart)):
        plan.remarks.append(
            f"{some(one)}: adapted, and tied to the head, which changes with it, as where peft folds it; while it was "
            "trained the head did not"
        )
    if any(adapters) and recipe.tokens == "union":
        raise ValueError(f"--tokens union: {recipe.experts[0]} is an adapter; fold adapters into full models first")
    plan.steps = adapter_steps(recipe, base, experts, plan.notes) if any(adapters) else _model_steps(plan)
    if odd := recipe.unmatched(base.entries):
        packed = next((step.name for step in plan.steps for piece in step.pieces if odd[0].matches(piece.name)), None)
        hint = f" itself, but a part of {packed!r}, whose parts share their options" if packed else ""
        raise ValueError(f"--set {odd[0].text!r}: matches no tensor of {base.given}{hint}")
    if not any(step.change for step in plan.steps):
        raise ValueError(f"{base.given}: no tensor is merged; the experts share none with it")
    if recipe.strict and plan.notes:
        raise ValueError(f"--strict: {plan.notes[0]}" + _more(len(plan.notes) - 1))
    return plan


def _model_steps(plan: Plan) -> list[Step]:
    recipe, base, experts = plan.recipe, plan.base, plan.experts
    layers = depths(base.entries)
    options = {name: recipe.of(name, len(experts), layers[name]) for name in base.entries}
    wanted = {name for name, own in options.items() if own["merge"]}
    said: set[str] = set()
    aligned = [_aligned(base, expert, plan, wanted, said) for expert in experts]
    joint = plan.joint = union(base, experts) if recipe.tokens == "union" else None
    plan.remarks += [str(joint)] if joint else []
    layouts, packed, steps, kept = storage(base.entries), base_parts(base), [], []
    for name, entry in base.entries.items():
        own, parts = options[name], packed.get(name, ())
        found = _partners(name, entry, plan, aligned, kept) if name in wanted else ()
        if joint and (united := united_rows(entry, found, base, experts, joint)):
            entry, found, rows = united
        else:
            found, rows = matching_rows(entry, found, base, experts, plan.notes)
        layout = own["layout"] or ("transposed stack" if len(parts) == 1 else layouts[name])
        change, parts = (Full(found), pieces(entry, layout, rows, parts)) if found else (None, ())
        steps.append(Step(entry, change, parts, recipe.output_dtype(entry.dtype), layout, own))
    if kept := [name for name in kept if name not in said]:
        plan.notes.append(f"{base.given}: {some(kept)}: in no expert; the base's value is kept")
    return with_ties(steps, plan.remarks)


# Which tensors belong together ---------------------------------------------------------------------------------------


def _aligned(
    base: Checkpoint, expert: Checkpoint, plan: Plan, wanted: Collection[str], said: set[str]
) -> Mapping[str, Entry]:
    """Return base name → the expert's tensor, also of tied ones that it does not store; what is left out is noted.

    What a note says is kept of the base is added to `said`.

    Raises:
        ValueError: too much of the two models has no partner.
    """
    found = align(base, expert)
    copies = [entry.name for entry in found.left if copy_of(entry, list(found.entries.values()))]
    if copies:
        plan.remarks.append(f"{expert.given}: {some(copies)}: a tied copy, not stored in {base.given}; left out")
    missing = [entry for name, entry in base.entries.items() if name not in found.entries]
    twins = {entry.name: twin for entry in missing if (twin := twin_of(entry, base, found.entries))}
    alone = [entry for entry in missing if entry.name in wanted and entry.name not in twins]
    sides = (
        Side(base.given, base.entries, alone, base.config),
        Side(expert.given, expert.entries, [e for e in found.left if e.name not in copies], expert.config),
    )
    plan.notes += told(*sides, plan.recipe.partial, said)
    return {**found.entries, **{name: found.entries[twin] for name, twin in twins.items()}}


def _partners(
    name: str, entry: Entry, plan: Plan, aligned: Sequence[Mapping[str, Entry]], kept: list[str]
) -> tuple[Entry, ...]:
    """Return each expert's tensor for one of the base, or () if the base's value is kept."""
    base, found = plan.base, [known.get(name) for known in aligned]
    there = list(filter(None, found))
    for other in there:
        if other.dtype.is_floating_point != entry.dtype.is_floating_point:
            raise ValueError(f"{other.where}: {other.dtype}, and {entry.dtype} in {base.given}; they cannot be merged")
        if any(each.dtype.is_floating_point and each.dtype.itemsize == 1 for each in (entry, other)):
            raise ValueError(f"{other.where}: stored as {other.dtype}, which is quantised; dequantise the model first")
    if not there:
        kept.append(name)
        return ()
    if len(there) == len(found) and not entry.dtype.is_floating_point:
        return _same_integers(entry, there)
    if len(there) < len(found):
        if is_computed(entry):
            plan.notes.append(f"{base.given}: {name!r}: not in all experts, and no parameter; the base's value is kept")
        elif not plan.recipe.partial and not all(equal(entry, other) for other in there):  # nothing was trained
            odd = plan.experts[found.index(None)].given
            raise ValueError(
                f"{odd}: lacks {name!r}, which other experts have; --set '{name}:merge=false' keeps the base's"
            )
        return ()
    return tuple(there)


def _same_integers(entry: Entry, found: Sequence[Entry]) -> tuple[Entry, ...]:
    """Return (): integers keep the base's value, which must be that of all experts, except for single counters."""
    for other in found:
        if entry.count > 1 and not equal(entry, other):
            raise ValueError(
                f"{other.where}: {other.dtype} and different from the base's; integers cannot be merged (quantised? "
                f"dequantise first): --set '{entry.name}:merge=false' keeps the base's"
            )
    return ()


# Words ---------------------------------------------------------------------------------------------------------------


def _more(count: int) -> str:
    return f" (and {count} more)" if count else ""
