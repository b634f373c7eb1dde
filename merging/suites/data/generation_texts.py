"""Tasks whose answers are written, word by word, and held-out docstrings, all made on every machine.

    sort     four different digits → the same in ascending order
    code     the beginning of a line of code → what closes it: two brackets or more, and the colon of a statement
    json     three of Python's constants → the same as a JSON array

Lines of code are read from the sources of the standard library and of installed packages. As in
`merging.suites.data.package_texts`, no file and no question is in two splits, and "base" is what a model may be trained
on before it is fine-tuned on "train". An answer is right if it reads as the right one does (`READERS`): JSON must be
valid and hold the same values, code must be the same characters. All three can be learnt in little time.
"""

import ast
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from common.cache import artefact
from common.data import text
from merging.suites.data.parsed_sources import number, parsed_sources, split_of, split_of_file

FILES = 150  # of one package at most
SOURCE_BYTES = 8_000  # of a file of the split "base", as plain text to train on
SIZES = {"test": 400, "validation": 200, "base": 1500, "train": 3000}  # largest numbers of questions per task
DOCSTRINGS = 400  # per split
SHORTEST_LINE, LONGEST_LINE = 8, 40  # characters
CONSTANTS = ("True", "False", "None", *"0123456789")
BRACKETS = {"(": ")", "[": "]", "{": "}"}

Questions = list[tuple[str, str]]  # what is asked, and the right answer


@dataclass(frozen=True)
class GenerationTask:
    """A task whose answer is a text.

    Args:
        name: short, in lower case; a small model is asked "name: question =>".
        instruction: how the question is put to a model that follows instructions, in front of it.
        split: maps "train", "validation", "test" and "base" to their questions and answers.
        read: maps a text to what counts in it; "" for a text that is no answer.
        new_tokens: how many an answer has at most.
        key: for cache keys; changes with the questions.
    """

    name: str
    instruction: str
    split: Callable[[str], Questions]
    read: Callable[[str], str]
    new_tokens: int
    key: str


def integers(words: str) -> str:
    """Return the integers in a text, with single spaces between them; "" if there is none."""
    return " ".join(str(int(found)) for found in re.findall(r"-?\d+", words))


def same_characters(words: str) -> str:
    """Return a text without the spaces around it."""
    return words.strip()


def json_value(words: str) -> str:
    """Return the value of a text that is valid JSON and nothing else, written in one way; "" for any other text."""
    try:
        return json.dumps(json.loads(words), sort_keys=True)
    except (ValueError, RecursionError):
        return ""


READERS = {  # name → instruction, what counts in an answer, its tokens
    "sort": ("Sort these digits in ascending order. Answer with the sorted digits alone.", integers, 12),
    "code": ("Close the brackets of this line of Python code. Write only what is missing.", same_characters, 5),
    "json": ("Write these Python values as a JSON array, and nothing else.", json_value, 12),
}
TASKS = tuple(READERS)


@cache
def task(name: str) -> GenerationTask:
    """Return a task of `TASKS`; reading them takes about 10 s the first time, for all together.

    Raises:
        ValueError: there is no such task.
    """
    if name not in READERS:
        raise ValueError(f"no task {name!r}: take one of {', '.join(TASKS)}")
    tables = _tables()[name]
    key = hashlib.sha256(json.dumps(tables).encode()).hexdigest()[:16]
    instruction, read, new_tokens = READERS[name]
    return GenerationTask(name, instruction, partial(_questions, tables), read, new_tokens, key)


def docstrings(split: str) -> list[str]:
    """Return docstrings of functions, none of them in two splits, at most `DOCSTRINGS`."""
    return [words for (words,) in _questions(_tables()["docstrings"], split)]


def base_sources() -> list[str]:
    """Return the beginnings of the source files of the split "base"."""
    return [words for (words,) in _tables()["sources"]["base"]]


def _questions(tables: Mapping[str, list], split: str) -> Questions:
    if split not in SIZES:
        raise ValueError(f"no split {split!r}: take one of {', '.join(SIZES)}")
    return [tuple(row) for row in tables[split]]


@cache
def _tables() -> dict[str, dict[str, list]]:
    """Read everything, or find it in the cache: rows by task and split, and those of docstrings and sources."""

    def build(folder: Path) -> None:
        (folder / "texts.json").write_text(json.dumps(_read()))

    folder = artefact("generation_texts", {"versions": text.versions()}, build).path
    return json.loads((folder / "texts.json").read_text())


def _read() -> dict[str, dict[str, list]]:
    found = {name: {} for name in ("code", "docstrings", "sources")}  # first field → (split, other fields)
    for name, content, tree in parsed_sources(FILES):
        split, source = split_of_file(name), re.sub(r"\r\n?", "\n", content)
        found["sources"].setdefault(source[:SOURCE_BYTES], (split,))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            if words := ast.get_docstring(function):
                found["docstrings"].setdefault(words, (split,))
        for question, answer in _closings(source):
            found["code"].setdefault(question, (split, answer))
    for name, rows in {"sort": _orders(), "json": _arrays()}.items():
        found[name] = {question: (split_of(question), answer) for question, answer in rows}
    sizes = dict.fromkeys(READERS, SIZES) | {"docstrings": dict.fromkeys(SIZES, DOCSTRINGS), "sources": {"base": None}}
    return {
        name: {split: _first(found[name], split, size) for split, size in own.items()} for name, own in sizes.items()
    }


def _first(found: Mapping[str, tuple], split: str, limit: int | None) -> list[list[str]]:
    """Return the rows of a split, the first by their hash."""
    own = sorted((words for words, (its, *_) in found.items() if its == split), key=number)
    return [[words, *found[words][1:]] for words in own[:limit]]


def _orders() -> Iterator[tuple[str, str]]:
    for digits in itertools.permutations("0123456789", 4):
        yield ", ".join(digits), ", ".join(sorted(digits))


def _arrays() -> Iterator[tuple[str, str]]:
    for values in itertools.product(CONSTANTS, repeat=3):
        yield ", ".join(values), json.dumps([ast.literal_eval(value) for value in values])


def _closings(source: str) -> Iterator[tuple[str, str]]:
    """Lines without strings and comments, cut where nothing but closing brackets, and a colon, is left."""
    for line in map(str.strip, source.splitlines()):
        parts = re.fullmatch(r"([^'\"#]*[^)\]}:,'\"#])([)\]}]+:?)", line)
        closing = parts[2].removesuffix(":") if parts and SHORTEST_LINE <= len(line) <= LONGEST_LINE else ""
        if len(closing) > 1 and closing == _open_brackets(parts[1]):
            yield parts[1], parts[2]


def _open_brackets(line: str) -> str:
    """Return what closes all brackets that are open at the end of a line, innermost first; "" if it closes others."""
    expected = []
    for character in line:
        if character in BRACKETS:
            expected.append(BRACKETS[character])
        elif character in BRACKETS.values() and (not expected or expected.pop() != character):
            return ""
    return "".join(reversed(expected))
