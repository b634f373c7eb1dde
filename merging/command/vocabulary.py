"""Rows of a vocabulary: which rows of an embedding or an output head are merged where models differ in their number."""

from collections.abc import Sequence

from merging.checkpoints import Checkpoint, Entry


def common_rows(
    entry: Entry, found: Sequence[Entry], base: Checkpoint, experts: Sequence[Checkpoint], notes: list[str]
) -> int | None:
    """Return how many rows are merged: None for all, fewer where vocabularies differ."""
    odd = [(expert, other) for expert, other in zip(experts, found, strict=False) if other.shape != entry.shape]
    if not odd:
        return None
    for expert, other in odd:
        rows_differ = entry.shape and other.shape and other.shape[1:] == entry.shape[1:]
        sizes = _vocabulary(base), _vocabulary(expert)
        if not rows_differ or (None not in sizes and sizes != (entry.shape[0], other.shape[0])):
            raise ValueError(
                f"{other.where}: shape {list(other.shape)}, and {list(entry.shape)} in {base.given}; "
                f"--set '{entry.name}:merge=false' keeps the base's"
            )
    rows = min(other.shape[0] for other in (entry, *found))
    kept = f"; rows {rows} to {entry.shape[0] - 1} are the base's" if rows < entry.shape[0] else ""
    sizes = " / ".join(str(other.shape[0]) for other in (entry, *found))
    notes.append(f"{entry.name!r}: {sizes} rows (base / experts): the first {rows} are merged{kept}")
    return rows


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    config = checkpoint.config
    nested = next((part for part in config.values() if isinstance(part, dict) and "vocab_size" in part), {})
    return config.get("vocab_size", nested.get("vocab_size"))
