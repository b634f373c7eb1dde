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

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.checkpoints import Checkpoint, Entry

PADDING = 1024  # rows that may follow those of the tokens
OF_TOKENS = re.compile(r"embed|wte|shared|lm_head|predictions|decoder\.(weight|bias)$")
POSITIONS = re.compile(r"pos_?emb|position|wpe\b|pos_bias|embed_pos")
HEADS = re.compile(r"(^|[._])(classifiers?|heads?|score|fc|logits?|logits_proj|qa_outputs|cls|label\w*)([._]|$)")


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
            check_tokens(base, expert, rows)
        kept = f"; rows {rows} to {entry.shape[0] - 1} are the base's" if rows < entry.shape[0] else ""
        notes.append(f"{entry.name!r}: {sizes} rows (base / experts): the first {rows} are merged{kept}")
        return found, rows
    if rows_differ and all(_is_head(other, owner) for owner, other in ((base, entry), *pairs)):
        notes.append(f"{entry.name!r}: {sizes} rows (base / experts), a head of each model's own; the base's is kept")
        return (), None
    raise ValueError(_refusal(entry, pairs[0][1], base, rows_differ))


def _refusal(entry: Entry, other: Entry, base: Checkpoint, rows_differ: bool) -> str:
    """Return the line that says which shapes differ, why that cannot be merged, and what to do."""
    if POSITIONS.search(entry.name):
        reason = ", a table of positions (another image resolution or context length): resize the expert's first, or "
    elif rows_differ and OF_TOKENS.search(entry.name):
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
    if not entry.shape or POSITIONS.search(entry.name):
        return False
    if sizes := set(_numbers(owner.config, "vocab_size")):
        padded = any(size < entry.shape[0] < size + PADDING for size in sizes) and entry.shape[0] % 8 == 0
        return entry.shape[0] in sizes or (padded and _is_of_tokens(entry))
    tokens = tokens_of(owner)
    return bool(tokens) and 0 <= entry.shape[0] - _count(tokens) < PADDING and _is_of_tokens(entry)


def _is_of_tokens(entry: Entry) -> bool:
    """Return whether the name is that of an embedding of tokens or of an output head."""
    return bool(OF_TOKENS.search(entry.name)) and not re.search(r"classif|token_type|patch", entry.name)


def _is_head(entry: Entry, owner: Checkpoint) -> bool:
    """Return whether the rows of a tensor are the classes of its model."""
    if POSITIONS.search(entry.name) or OF_TOKENS.search(entry.name):
        return False
    labels = {len(each) for each in (owner.config.get("id2label"), owner.config.get("label2id")) if each}
    labels |= set(_numbers(owner.config, "num_labels")) | set(_numbers(owner.config, "num_classes"))
    in_a_layer = re.search(r"\.\d+\.", entry.name)
    return entry.shape[0] in labels or bool(HEADS.search(entry.name) and not in_a_layer)


def _numbers(config: Mapping[str, Any], key: str) -> Iterator[int]:
    """Yield the values of a key in a configuration and in those nested in it (text_config, decoder, …)."""
    if isinstance(config.get(key), int):
        yield config[key]
    for part in config.values():
        if isinstance(part, dict):
            yield from _numbers(part, key)


# Tokens --------------------------------------------------------------------------------------------------------------


def tokens_of(owner: Checkpoint) -> dict[str, int] | None:
    """Return token → row of a model's tokenizer, added tokens included, or None where no file lists its tokens.

    Raises:
        ValueError: a file of the tokenizer is damaged.
    """
    folder = owner.folder
    if folder is None:
        return None
    if whole := _json(folder / "tokenizer.json"):
        model = whole.get("model", {}).get("vocab", {})
        tokens = dict(model) if isinstance(model, dict) else {piece[0]: row for row, piece in enumerate(model)}
        return tokens | {each["content"]: each["id"] for each in whole.get("added_tokens", ())}
    if words := _json(folder / "vocab.json"):
        return words | (_json(folder / "added_tokens.json") or {})
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return {line: row for row, line in enumerate(lines)} | (_json(folder / "added_tokens.json") or {})
    return None


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no JSON object; download it again")
    return found


def _count(tokens: Mapping[str, int]) -> int:
    """Return the number of rows that tokens take, gaps included."""
    return max(tokens.values(), default=-1) + 1


def check_tokens(base: Checkpoint, expert: Checkpoint, rows: int) -> None:
    """Check that the first rows of two models name the same tokens, as far as tokenizers say.

    Raises:
        ValueError: a token of the base is another one in the expert.
    """
    ours, theirs = tokens_of(base), tokens_of(expert)
    if not ours or not theirs:
        return
    there = {row: token for token, row in theirs.items()}
    for token, row in sorted(ours.items(), key=lambda pair: pair[1]):
        if row < rows and there.get(row, token) != token:
            raise ValueError(
                f"{expert.given}: row {row} of its vocabulary is {there[row]!r}, and {token!r} in {base.given}; "
                "these are other tokens, whose rows cannot be merged"
            )
