"""Tensors that differ in their number of rows: a vocabulary, the head of a task, or something that does not fit.

Vocabulary  an embedding or an output head (or its bias) with as many rows as vocab_size in config.json says, nested
            configurations included; without config.json, as many as there are tokens in the tokenizer's files. Rows of
            padding may follow. The rows that all have are merged, the base's other rows are kept. The rows must name
            the same tokens, where both sides have a tokenizer.
Head        of a classifier: with as many rows as the configuration has labels, or by its name, and no vocabulary. It
            keeps the base's value, since its rows are classes of different tasks.
The rest    is refused: position tables of another image resolution or context length, and every other tensor. Rows are
            a vocabulary only if a file says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.checkpoints import Checkpoint, Entry
from merging.command.kinds import is_of_classes, is_of_positions, is_of_tokens

PADDING = 1024  # rows that may follow those of the tokens


def matching_rows(
    entry: Entry, found: Sequence[Entry], base: Checkpoint, experts: Sequence[Checkpoint], notes: list[str]
) -> tuple[Sequence[Entry], int | None]:
    """Return the experts' tensors, () if the base's value is kept, and how many rows of them are merged (None: all).

    Args:
        entry: a tensor of the base.
        found: the tensor of each expert, or () if there is none.
        base, experts: the models.
        notes: what is kept from the base is added to them.

    Raises:
        ValueError: the shapes differ, and the rows are neither a vocabulary nor a head's.
    """
    if all(other.shape == entry.shape for other in found):
        return found, None
    pairs = [(expert, other) for expert, other in zip(experts, found, strict=True) if other.shape != entry.shape]
    sizes = " / ".join(str(other.shape[0] if other.shape else 1) for other in (entry, *found))
    rows_differ = all(len(other.shape) == len(entry.shape) > 0 for _, other in pairs) and all(
        other.shape[1:] == entry.shape[1:] for _, other in pairs
    )
    if rows_differ and all(is_vocabulary(other, owner) for owner, other in ((base, entry), *pairs)):
        rows = min(other.shape[0] for other in (entry, *found))
        for expert, _ in pairs:
            check_tokens(base, expert, rows, entry.name)
        kept = f"; rows {rows} to {entry.shape[0] - 1} are the base's" if rows < entry.shape[0] else ""
        notes.append(f"{entry.name!r}: {sizes} rows (base / experts): the first {rows} are merged{kept}")
        return found, rows
    if rows_differ and all(_is_head(other, owner) for owner, other in ((base, entry), *pairs)):
        notes.append(f"{entry.name!r}: {sizes} rows (base / experts), a head of each model's own; the base's is kept")
        return (), None
    raise ValueError(_refusal(entry, pairs[0][1], base, rows_differ))


def _refusal(entry: Entry, other: Entry, base: Checkpoint, rows_differ: bool) -> str:
    """Return the line that says which shapes differ, why that cannot be merged, and what to do."""
    if is_of_positions(entry.name):
        reason = ", a table of positions (another image resolution or context length): resize the expert's first, or "
    elif rows_differ and is_of_tokens(entry.name):
        reason = "; no vocab_size or tokenizer of both models says that these rows are a vocabulary; "
    else:
        reason = "; "
    return (
        f"{other.where}: shape {list(other.shape)}, and {list(entry.shape)} in {base.given}{reason}"
        f"--set '{entry.name}:merge=false' keeps the base's"
    )


# What the rows are ---------------------------------------------------------------------------------------------------


def is_vocabulary(entry: Entry, owner: Checkpoint) -> bool:
    """Return whether the rows of a tensor are the tokens of the model that it belongs to."""
    if not entry.shape or is_of_positions(entry.name):
        return False
    if sizes := set(numbers(owner.config, "vocab_size")):
        padded = any(size < entry.shape[0] < size + PADDING for size in sizes) and entry.shape[0] % 8 == 0
        return entry.shape[0] in sizes or (padded and is_of_tokens(entry.name))
    tokens = owner.tokens
    return bool(tokens) and 0 <= entry.shape[0] - count(tokens) < PADDING and is_of_tokens(entry.name)


def _is_head(entry: Entry, owner: Checkpoint) -> bool:
    """Return whether the rows of a tensor are the classes of its model."""
    named = is_of_classes(entry.name)
    labels = {len(each) for each in (owner.config.get("id2label"), owner.config.get("label2id")) if each}
    labels |= set(numbers(owner.config, "num_labels")) | set(numbers(owner.config, "num_classes"))
    return entry.shape[0] in labels if named is None else named


def numbers(config: Mapping[str, Any], key: str) -> Iterator[int]:
    """Yield the values of a key in a configuration and in those nested in it (text_config, decoder, …)."""
    if isinstance(config.get(key), int):
        yield config[key]
    for part in config.values():
        if isinstance(part, dict):
            yield from numbers(part, key)


# Tokens --------------------------------------------------------------------------------------------------------------


def tokenizer_files(folder: Path | None) -> list[Path]:
    """Return the files of a folder that say what its tokens are."""
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json")
    return [folder / name for name in names if (folder / name).is_file()] if folder else []


def count(tokens: Mapping[str, int]) -> int:
    """Return the number of rows that tokens take, gaps included."""
    return max(tokens.values(), default=-1) + 1


def check_tokens(base: Checkpoint, expert: Checkpoint, rows: int, name: str) -> None:
    """Check that the first rows of a tensor of two models are the same tokens, as far as tokenizers say.

    Raises:
        ValueError: a token of the base is another one in the expert.
    """
    ours, theirs = base.tokens, expert.tokens
    if not ours or not theirs:
        return
    there = {row: token for token, row in theirs.items()}
    for token, row in sorted(ours.items(), key=lambda pair: pair[1]):
        if row < rows and there.get(row, token) != token:
            raise ValueError(
                f"{expert.given}: row {row} of its vocabulary is {there[row]!r}, and {token!r} in {base.given}; "
                f"these are other tokens, whose rows cannot be merged: --set '{name}:merge=false' keeps the base's"
            )
