"""How much of two models has a partner in the other, and whether what has none is too much to leave out.

Head    what stands outside the numbered layers and is no embedding: a pooler, a classifier, an output head. Models of
        one body differ in heads, so that these are noted only. A matrix of the shape of the base's embedding that only
        an expert has is no such head, but an output head that was trained apart.
Body    everything else, and everything in a model without numbered layers. It is refused, unless the recipe says
        `partial`, if more than 1 % of the bytes of either model are body without a partner, or if tensors of the two
        bodies that are left alone have the same shape: they are the same ones under names that no rule knows.
Computed  integers, causal masks and inverse frequencies are no parameters: some versions save them, others do not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merging.checkpoints import Entry
from merging.command.kinds import is_embedding
from merging.command.names import NUMBER

SHARE = 0.01  # of a model's bytes that may be left out
COMPUTED = re.compile(r"(^|\.)((original_)?inv_freq|masked_bias)$")


@dataclass(frozen=True)
class Side:
    """One of two models: what it is called, its tensors, and those of them that have no partner in the other."""

    given: str
    entries: Mapping[str, Entry]
    alone: Sequence[Entry]
    config: Mapping[str, Any]

    def share(self, entries: Sequence[Entry]) -> float:
        """Return the share of the model's bytes that some of its tensors have."""
        return sum(entry.size for entry in entries) / max(1, sum(entry.size for entry in self.entries.values()))


def is_head(entry: Entry) -> bool:
    """Return whether a tensor is part of a head, by its name."""
    return not (NUMBER.search(entry.name) or is_embedding(entry.name))


def is_computed(entry: Entry) -> bool:
    """Return whether a tensor is no parameter: integers, inverse frequencies, masks (1, 1, n, n)."""
    mask = len(entry.shape) == 4 and entry.shape[:2] == (1, 1) and entry.shape[2] == entry.shape[3]
    return not entry.dtype.is_floating_point or mask or bool(COMPUTED.search(entry.name))


def told(base: Side, expert: Side, partial: bool, kept_too: set[str]) -> list[str]:
    """Return in one line what an expert has that its base lacks; with `partial` also what else has no partner.

    Args:
        base, expert: the two models.
        partial: whether a good part may have no partner.
        kept_too: the names of the base's tensors that the line says are kept are added to it.

    Raises:
        ValueError: one line, where more than heads have no partner, and that was not asked for (`partial`).
    """
    embeddings = {e.shape for name, e in base.entries.items() if is_embedding(name) and len(e.shape) == 2}
    layers = any(NUMBER.search(name) for name in (*base.entries, *expert.entries))
    kept = [entry for entry in base.alone if not ((layers and is_head(entry)) or is_computed(entry))]
    theirs = [entry for entry in expert.alone if not is_computed(entry)]
    left = [entry for entry in theirs if not (layers and is_head(entry)) or entry.shape in embeddings]
    alike = {entry.shape for entry in kept} & {entry.shape for entry in left} - {()}
    extra = f"{_told(expert)}: not in {base.given}; left out" if expert.alone else ""
    if not alike and base.share(kept) <= SHARE and expert.share(left) <= SHARE:
        return [extra] if extra else []
    lacking = f"{_told(base)}: not in {expert.given}; the base's value is kept" if base.alone else ""
    line = f"{'; '.join(filter(None, (extra, lacking)))} ({_reason(base, expert, bool(alike))})"
    if not partial:
        raise ValueError(f"{line}; --partial merges the rest")
    kept_too |= {entry.name for entry in base.alone}
    return [line]


def _told(side: Side) -> str:
    count = f"{len(side.alone)} tensors, " if len(side.alone) > 1 else ""
    return (
        f"{side.given}: {some([entry.name for entry in side.alone])} ({count}{side.share(side.alone):.2%} of its bytes)"
    )


def _reason(base: Side, expert: Side, alike: bool) -> str:
    """Return why so much has no partner, as far as names, shapes and configurations tell."""
    alone = {NUMBER.sub(".N.", entry.name) for side in (base, expert) for entry in side.alone}
    apart = {entry.name for side in (base, expert) for entry in side.alone}
    shared = {NUMBER.sub(".N.", name) for side in (base, expert) for name in side.entries if name not in apart}
    numbered = {name for name in alone if ".N." in name}
    kinds = [side.config.get("model_type") for side in (base, expert)]
    if numbered and numbered <= shared:
        return "another number of layers or of experts?"
    if all(kinds) and kinds[0] != kinds[1]:
        return f"another architecture ({kinds[0]} against {kinds[1]})?"
    if alike:
        return "the same tensors under names or in a layout that no rule knows?"
    return "another architecture, or modules that only one of them has?"


def some(names: Sequence[str]) -> str:
    """Return the first few names, for messages."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
