"""The experts' tensors under the names and in the layout of the base's, whatever their files call them.

Three steps, each only where names still differ: as stored; under the canonical names and in the parts of
`merging.command.naming`; and under one change of prefix for the whole model ("" for "bert.", "model." for
"model.language_model."), that with which most names agree. What no rule knows stays without a partner.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from merging.checkpoints import Checkpoint, Entry
from merging.command.naming import Naming, Parts, naming
from merging.views import Transposed, joined, renamed, transposed

NUMBER = re.compile(r"(^|\.)\d+\.")  # of a layer, or an expert
PREFIXES = 16  # the most frequent ones are tried, on either side
TRIED = 2000  # names on which they are tried


@dataclass(frozen=True)
class Aligned:
    """An expert in the names and the layout of the base."""

    entries: Mapping[str, Entry]  # base's name → the expert's tensor
    left: Sequence[Entry]  # the expert's tensors of which the base takes no part


def base_parts(base: Checkpoint) -> Parts:
    """Return the parts of the base's tensors that are packed, or transposed, in its class; {} where none can be."""
    if not any(len(entry.shape) == 3 for entry in base.entries.values()):
        return {}
    parts = naming(base).parts(base.entries)
    return {name: own for name, own in parts.items() if len(own) > 1 or isinstance(own[0], Transposed)}


def align(base: Checkpoint, expert: Checkpoint) -> Aligned:
    """Return an expert's tensors under the base's names.

    Raises:
        ValueError: it shares no tensor name with the base.
    """
    ours, theirs = base.entries, expert.entries
    if ours.keys() == theirs.keys() and all(_fit(ours[name], theirs[name]) for name in ours):
        return Aligned(theirs, ())
    return _align(naming(base, expert), base, naming(expert, base), expert)


def _fit(entry: Entry, other: Entry) -> bool:
    """Return whether two tensors differ in their first dimension at most."""
    return len(entry.shape) == len(other.shape) and entry.shape[1:] == other.shape[1:]


def _align(our_naming: Naming, base: Checkpoint, their_naming: Naming, expert: Checkpoint) -> Aligned:
    ours, theirs = our_naming.parts(base.entries), their_naming.parts(expert.entries)
    owners = {part.name: (name, part) for name, own in theirs.items() for part in own}
    partners = best_prefix([part.name for own in ours.values() for part in own], owners.keys())
    found, taken = {}, set()
    for name, own in ours.items():
        if all(part.name in partners for part in own):
            others = [owners[partners[part.name]] for part in own]
            found[name] = _laid_out(base.entries[name], own, [part for _, part in others])
            taken |= {stored for stored, _ in others}
    if not found:
        raise ValueError(f"{expert.given}: shares no tensor name with {base.given}; is it of the same architecture?")
    return Aligned(found, [entry for name, entry in expert.entries.items() if name not in taken])


def _laid_out(entry: Entry, own: Sequence[Entry], parts: Sequence[Entry]) -> Entry:
    """Return an expert's parts as one tensor, as the base has it."""
    if len(parts) > 1:
        count = sum(part.count for part in parts)
        return joined(parts, entry.name, entry.shape if count == entry.count else (len(parts), *parts[0].shape))
    return transposed(parts[0], entry.name) if isinstance(own[0], Transposed) else renamed(parts[0], entry.name)


# Prefixes -------------------------------------------------------------------------------------------------------------


def best_prefix(ours: Sequence[str], theirs: Collection[str]) -> dict[str, str]:
    """Return name of ours → name of theirs under one change of prefix, or none, for all names that have a partner.

    The change is that which leads from most of the numbered layers to layers of theirs, which are never renumbered; a
    name that it leads nowhere stays as it is.
    """
    theirs = set(theirs)
    tried = [name for name in ours if NUMBER.search(name)] or ours
    tried = tried[:: -(-len(tried) // TRIED)]
    changes = [("", "")]
    if not all(name in theirs for name in tried):
        changes += [(old, new) for old in _prefixes(ours) for new in _prefixes(theirs) if old != new]
    best = max(changes, key=lambda change: len(_changed(tried, change, theirs)))  # the first of equals: as they are
    found = _changed(ours, best, theirs)
    taken = set(found.values())
    return found | {name: name for name in ours if name not in found and name in theirs and name not in taken}


def _changed(ours: Sequence[str], change: tuple[str, str], theirs: Collection[str]) -> dict[str, str]:
    """Return what a change of prefix makes of names, where that is one of theirs."""
    old, new = change
    changed = {name: new + name.removeprefix(old) for name in ours if name.startswith(old)}
    return {name: other for name, other in changed.items() if other in theirs}


def _prefixes(names: Collection[str]) -> list[str]:
    """Return what names begin with, up to their first and second dot, the most frequent first; and no prefix."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for depth in (1, 2):
            if len(parts) > depth and not any(part.isdigit() for part in parts[:depth]):
                counts[".".join(parts[:depth]) + "."] += 1
    return ["", *(prefix for prefix, _ in counts.most_common(PREFIXES))]
