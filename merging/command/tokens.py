"""The union of vocabularies (--tokens union): the base's tokens, and behind them those that experts have added.

Rows        the base's tokens keep their rows and are merged as ever, wherever an expert has them. Each added token gets
            the mean of the rows of the experts that have it: it has no row in the base, so that there is no update of
            it to merge. Embeddings and output heads, weights and biases, tied or not, are treated alike.
Order       added tokens follow the base's last token, expert by expert in the order of their rows. They take the rows
            of padding that the base has there; what is left of the padding stays the base's.
Matching    by token, where tokenizers list them (tokenizer.json; vocab.json or vocab.txt with added_tokens.json). An
            expert without a tokenizer has the base's tokens, and none besides. Without any tokenizer rows are matched
            by position, and no more than one expert may have rows that the base lacks.
Output      the base's tokenizer with the added tokens, and vocab_size in config.json in step.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from merging.checkpoints import Checkpoint, Entry
from merging.command.kinds import is_of_tokens
from merging.command.shards import write_text
from merging.command.vocabulary import count, is_vocabulary, numbers
from merging.views import Rows
from merging.weight_files import read_json


@dataclass(frozen=True)
class Added:
    """A token that experts have and the base lacks, or a row where there is no tokenizer."""

    row: int  # in the output
    rows: Mapping[int, int]  # expert → row there
    facts: Mapping[str, Any] = field(default_factory=dict)  # as in tokenizer.json, without the row; {} for a mere row


@dataclass(frozen=True)
class Union:
    """What the rows of the output are."""

    first: int  # rows of the base's tokens
    added: tuple[Added, ...]
    places: tuple[Sequence[int], ...]  # per expert: its row for each row of the base's tokens

    def __str__(self) -> str:
        """Say which rows are added, for messages."""
        last = self.added[-1].row
        return f"{len(self.added)} tokens that experts have added are rows {self.first} to {last} of the vocabulary"

    def size(self, rows: int) -> int:
        """Return the number of rows of an output tensor that has `rows` in the base."""
        return max(rows, self.added[-1].row + 1)


# Which tokens are where ----------------------------------------------------------------------------------------------


def union(base: Checkpoint, experts: Sequence[Checkpoint]) -> Union | None:
    """Return what the rows of the output are, or None if no expert has a token or row that the base lacks.

    Raises:
        ValueError: one line: tokens cannot be matched, or an expert's tokenizer is no extension of the base's.
    """
    ours, theirs = base.tokens, [expert.tokens for expert in experts]
    if ours is None:
        if named := [expert.given for expert, tokens in zip(experts, theirs, strict=True) if tokens]:
            raise ValueError(f"--tokens union: {named[0]} has a tokenizer, and {base.given} none; add the base's")
        return _by_position(base, experts)
    first, found, added = count(ours), [], {}
    for index, (expert, tokens) in enumerate(zip(experts, theirs, strict=True)):
        if tokens is None:
            found.append(range(first))
            continue
        if missing := sorted(ours.keys() - tokens.keys(), key=ours.__getitem__):
            raise ValueError(
                f"--tokens union: the tokenizer of {expert.given} lacks {missing[0]!r}, which {base.given} has; "
                "only tokenizers that add tokens to the base's can be united"
            )
        places = list(range(first))  # rows between tokens stay where they are
        for token, row in ours.items():
            places[row] = tokens[token]
        found.append(places)
        facts = _facts(expert)
        for token in sorted(tokens.keys() - ours.keys(), key=tokens.__getitem__):
            if token not in facts:
                raise ValueError(
                    f"--tokens union: {token!r} of {expert.given} is no added token, but one of the model inside its "
                    "tokenizer; only added tokens can be united"
                )
            rows, _ = added.setdefault(token, ({}, facts[token]))
            rows[index] = tokens[token]
    together = [Added(first + place, *each) for place, each in enumerate(added.values())]
    return _checked(base, Union(first, tuple(together), tuple(found))) if together else None


def _by_position(base: Checkpoint, experts: Sequence[Checkpoint]) -> Union | None:
    """Return the union of rows where no model has a tokenizer: the rows that one expert has beyond the base's."""
    rows = [_rows(each) for each in (base, *experts)]
    if None in rows:
        given = (base, *experts)[rows.index(None)].given
        raise ValueError(f"--tokens union: {given} has no tokenizer, and no vocab_size in config.json")
    longer = [index for index, size in enumerate(rows[1:]) if size > rows[0]]
    if len(longer) > 1:
        first, second = (experts[index].given for index in longer[:2])
        raise ValueError(
            f"--tokens union: {first} and {second} both have rows that {base.given} lacks, and no tokenizer says of "
            "which tokens; add the tokenizers of all models"
        )
    added = [Added(row, {index: row}) for index in longer for row in range(rows[0], rows[1 + index])]
    return Union(rows[0], tuple(added), (range(rows[0]),) * len(experts)) if added else None


def _rows(owner: Checkpoint) -> int | None:
    """Return the number of rows of a model's vocabulary."""
    sizes = [e.shape[0] for e in owner.entries.values() if is_of_tokens(e.name) and is_vocabulary(e, owner)]
    return max(sizes, default=None)


def _facts(owner: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return what is known of each added token of a model, in the words of tokenizer.json, without its row."""
    whole = read_json(owner.home, "tokenizer.json")
    listed = whole.get("added_tokens", ()) if whole else ()
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    known = {token: {"content": token, **plain} for token in read_json(owner.home, "added_tokens.json") or ()}
    return known | {
        each["content"]: {key: value for key, value in {**plain, **each}.items() if key != "id"} for each in listed
    }


def _checked(base: Checkpoint, joint: Union) -> Union:
    """Check that the tokenizers library gives each added token its row."""
    if not (base.home / "tokenizer.json").is_file():
        return joint
    tokenizer = Tokenizer.from_str(json.dumps(_extended(read_json(base.home, "tokenizer.json"), joint)))
    for each in joint.added:
        token = each.facts["content"]
        if tokenizer.token_to_id(token) != each.row:
            raise ValueError(
                f"--tokens union: the tokenizer of {base.given} gives {token!r} the row {tokenizer.token_to_id(token)}"
                f", not {each.row}: its rows have gaps; resize the experts to the base's tokens"
            )
    return joint


# Tensors -------------------------------------------------------------------------------------------------------------


def united_rows(
    entry: Entry, found: Sequence[Entry], base: Checkpoint, experts: Sequence[Checkpoint], joint: Union
) -> tuple[Entry, Sequence[Entry], int] | None:
    """Return the base's and the experts' tensor with the rows of the union, and how many are merged; None for others.

    Args:
        entry: a tensor of the base.
        found: the tensor of each expert, or ().
        base, experts: the models.
        joint: what the rows of the output are.

    Raises:
        ValueError: no expert has the tensor, or one has fewer rows than tokens.
    """
    if not (is_of_tokens(entry.name) and is_vocabulary(entry, base)):
        return None
    if not found:
        raise ValueError(f"--tokens union: {entry.where}: rows are added to it, and it is not merged, or in no expert")
    for index, other in enumerate(found):
        wanted = max([*joint.places[index], *(each.rows[index] for each in joint.added if index in each.rows)]) + 1
        if other.shape[1:] != entry.shape[1:] or len(other.shape) != len(entry.shape):
            raise ValueError(f"{other.where}: shape {list(other.shape)}, and {list(entry.shape)} in {base.given}")
        if other.shape[0] < wanted:
            raise ValueError(f"{other.where}: {other.shape[0]} rows, and {wanted} tokens in {experts[index].given}")
    shape = (joint.size(entry.shape[0]), *entry.shape[1:])
    behind = _behind(entry, found, joint)
    own = Rows(entry.name, entry.dtype, shape, entry.path, runs=((joint.first, ((entry, 0),)), *behind))
    others = [
        Rows(other.name, other.dtype, shape, other.path, runs=(*_runs(other, places), *behind))
        for other, places in zip(found, joint.places, strict=True)
    ]
    return own, others, joint.first


def _runs(entry: Entry, places: Sequence[int]) -> list[tuple[int, tuple[tuple[Entry, int], ...]]]:
    """Return rows of a tensor as runs, of which each is as long as its rows follow each other."""
    runs: list[tuple[int, int]] = []  # (number, first row)
    for row in places:
        if runs and sum(runs[-1]) == row:
            runs[-1] = (runs[-1][0] + 1, runs[-1][1])
        else:
            runs.append((1, row))
    return [(number, ((entry, first),)) for number, first in runs]


def _behind(entry: Entry, found: Sequence[Entry], joint: Union) -> list[tuple[int, tuple[tuple[Entry, int], ...]]]:
    """Return what follows the rows of the base's tokens: means of the experts' rows, and the rest of the padding."""
    means = [(1, tuple((found[index], row) for index, row in each.rows.items())) for each in joint.added]
    end = joint.first + len(means)
    return means + ([(entry.shape[0] - end, ((entry, end),))] if entry.shape[0] > end else [])


# What is written -----------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, base: Checkpoint, joint: Union) -> None:
    """Add the tokens of the experts to the files of the base's tokenizer and configuration that are in a folder."""
    rows, configured = _rows(base) or joint.first, set(numbers(base.config, "vocab_size"))
    size = rows if rows in configured else max((each for each in configured if each < rows), default=rows)  # padded
    for name, change in (
        ("tokenizer.json", lambda values: _extended(values, joint)),
        ("tokenizer_config.json", lambda values: _with_decoder(values, joint)),
        ("config.json", lambda values: _resized(values, size, joint.size(rows))),
    ):
        if values := read_json(folder, name):
            write_text(folder / name, json.dumps(change(values), indent=2, ensure_ascii=False) + "\n")
    tokens = {each.facts["content"]: each.row for each in joint.added if each.facts}
    legacy = read_json(folder, "added_tokens.json")
    if tokens and (legacy is not None or not (folder / "tokenizer.json").is_file()):
        text = json.dumps({**(legacy or {}), **tokens}, indent=2, ensure_ascii=False)
        write_text(folder / "added_tokens.json", text + "\n")


def _extended(values: dict[str, Any], joint: Union) -> dict[str, Any]:
    added = [{"id": each.row, **each.facts} for each in joint.added if each.facts]
    return values | {"added_tokens": [*values.get("added_tokens", ()), *added]}


def _with_decoder(values: dict[str, Any], joint: Union) -> dict[str, Any]:
    if "added_tokens_decoder" not in values:
        return values
    added = {str(each.row): dict(each.facts) for each in joint.added if each.facts}
    return values | {"added_tokens_decoder": values["added_tokens_decoder"] | added}


def _resized(values: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    """Return a configuration in which every vocab_size of the old number of rows, nested ones too, is the new one."""
    changed = {key: _resized(value, old, new) if isinstance(value, dict) else value for key, value in values.items()}
    return changed | {"vocab_size": new} if values.get("vocab_size") == old else changed
