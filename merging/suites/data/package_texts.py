"""Eight classification tasks on texts that every machine has: docstrings and code of the standard library and packages.

Each task reads something different from a source file, see `READERS`: three read sentences, five expressions. Texts are
short, so that an encoder learns from them within seconds on a CPU. No file is in two splits, no text in two splits or
in two classes, and all classes are equally large. Texts differ between versions of Python and of the packages:
`TextTask.key` says which ones they were. `shifted_task` puts every task into one further domain that all of them share.
"""

import ast
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

from common.cache import artefact
from common.data import text
from merging.suites.data.parsed_sources import number, parsed_sources, split_of_file
from merging.suites.data.text_tasks import Examples, TextTask

FILES = 400  # of one package at most: torch alone has thousands
SIZES = {"test": 800, "validation": 400, "base": 2000, "train": 3000}  # largest numbers of texts per task
SHORTEST = 12  # characters of a text
LONGEST = 64  # characters: a longer sentence is cut to its beginning
LONGEST_CODE = 48  # code has more tokens per character; longer code is left out, as a cut would change its class

Labelled = Iterator[tuple[str, str]]  # texts and class names; a text whose name is no class of the task is left out

MARKUP = re.compile(r":\w+:|[`*|~]")
SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}\n", re.MULTILINE)  # of a docstring in numpy's style
ENTRY = re.compile(r"^(\S.*)\n((?:[ \t]+.*\n?)+)", re.MULTILINE)  # a parameter, and its indented description


@dataclass(frozen=True)
class Source:
    """A parsed source file; `name` is its module path, such as "torch/nn/functional.py"."""

    name: str
    lines: list[bytes]
    nodes: list[ast.AST]

    @cached_property
    def docstrings(self) -> list[str]:
        """The docstrings of modules, classes and functions."""
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in self.nodes if isinstance(node, documented)]
        return [docstring for docstring in found if docstring]

    def code(self, node: ast.expr) -> str:
        """The text of an expression; "" if it has several lines or is too long."""
        if node.lineno != node.end_lineno or node.end_col_offset - node.col_offset > LONGEST_CODE:
            return ""
        return self.lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()


def _sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, or its beginning."""
    paragraph = docstring.strip().split("\n\n")[0]
    words = " ".join(MARKUP.sub("", paragraph).split())
    return re.split(r"(?<=[.!?:])\s", words)[0][:LONGEST]


def _sections(docstring: str) -> Iterator[tuple[str, str]]:
    """Headings and bodies of a docstring in numpy's style."""
    parts = SECTION.split(docstring)
    return zip(parts[1::2], parts[2::2], strict=True)


SECTIONS = {"Parameters": "parameter", "Returns": "result", "Attributes": "attribute"}


def _sections_of_sentences(source: Source) -> Labelled:
    """Descriptions of parameters, results and so on, and the beginnings of notes."""
    for docstring in source.docstrings:
        for heading, body in _sections(docstring):
            if heading == "Notes":
                yield _sentence(body), "note"
            elif heading in SECTIONS:
                for _, description in ENTRY.findall(body):
                    yield _sentence(description), SECTIONS[heading]


TYPES = {"bool": "bool", "boolean": "bool", "int": "int", "integer": "int", "float": "float", "scalar": "float",
         "str": "str", "string": "str"}  # fmt: skip


def _types_of_parameters(source: Source) -> Labelled:
    """Descriptions of parameters, each with the type that the line above it gives."""
    for docstring in source.docstrings:
        for heading, body in _sections(docstring):
            if heading in ("Parameters", "Attributes", "Other Parameters"):
                for head, description in ENTRY.findall(body):
                    given = head.partition(":")[2].split(",")[0].strip().lower()
                    is_array = given.startswith(("array", "ndarray"))
                    yield _sentence(description), "array" if is_array else TYPES.get(given, "")


def _word_orders(source: Source) -> Labelled:
    """Sentences, half of them with two neighbouring words swapped."""
    for docstring in source.docstrings:
        words = _sentence(docstring).split()
        if len(words) >= 5:
            draw = number(" ".join(words))
            if draw % 2:
                first = 1 + draw // 2 % (len(words) - 2)
                words[first : first + 2] = words[first + 1], words[first]
            yield " ".join(words), ("original", "swapped")[draw % 2]


def _expressions(source: Source) -> Labelled:
    """Expressions, each with the kind of its outermost operation."""
    for node in source.nodes:
        if isinstance(node, ast.expr):
            yield source.code(node), type(node).__name__


def _first_arguments(source: Source) -> Labelled:
    """Calls, each with the kind of its first argument."""
    for node in source.nodes:
        if isinstance(node, ast.Call) and node.args:
            yield source.code(node), type(node.args[0]).__name__


def _numbers_of_arguments(source: Source) -> Labelled:
    """Calls, each with the number of its arguments."""
    for node in source.nodes:
        if isinstance(node, ast.Call):
            yield source.code(node), str(len(node.args) + len(node.keywords))


def _indices(source: Source) -> Labelled:
    """Subscripted expressions, each with the kind of its index."""
    for node in source.nodes:
        if isinstance(node, ast.Subscript):
            yield source.code(node), type(node.slice).__name__


def _uses(source: Source) -> Labelled:
    """Expressions, each with the statement that it stands in."""
    for node in source.nodes:
        if isinstance(node, ast.If | ast.While):
            yield source.code(node.test), "condition"
        elif isinstance(node, ast.For):
            yield source.code(node.iter), "loop"
        elif isinstance(node, ast.Assign | ast.Return | ast.Expr) and node.value:
            yield source.code(node.value), type(node).__name__


READERS = {
    "index": (_indices, ("Name", "Constant", "Attribute", "Call", "BinOp", "Slice", "Tuple", "UnaryOp")),
    "first_argument": (
        _first_arguments,
        ("Name", "Constant", "Attribute", "Call", "Subscript", "BinOp", "List", "JoinedStr"),
    ),
    "expression": (
        _expressions,
        ("Call", "Attribute", "Subscript", "BinOp", "Compare", "BoolOp", "IfExp", "ListComp"),
    ),
    "type": (_types_of_parameters, ("bool", "int", "float", "str", "array")),
    "arguments": (_numbers_of_arguments, ("0", "1", "2", "3", "4")),
    "section": (_sections_of_sentences, ("parameter", "result", "attribute", "note")),
    "use": (_uses, ("condition", "loop", "Assign", "Return", "Expr")),
    "word_order": (_word_orders, ("original", "swapped")),
}
TASKS = tuple(READERS)


@cache
def task(name: str) -> TextTask:
    """Return a task of `TASKS`; reading them takes about 20 s the first time, for all together.

    Raises:
        ValueError: there is no such task.
    """
    if name not in READERS:
        raise ValueError(f"no task {name!r}: take one of {', '.join(TASKS)}")
    tables = _tables()[name]
    key = hashlib.sha256(json.dumps(tables).encode()).hexdigest()[:16]
    return TextTask(name, READERS[name][1], partial(_examples, tables), key, template=f"{name}: {{0}}")


VOWELS = ("aeiouAEIOU", "eiouaEIOUA")  # and what replaces them


@cache
def shifted_task(name: str) -> TextTask:
    """Return the task with every vowel of its texts replaced by the next one: "return the value" → "ritarn thi velai".

    One domain shift for all tasks: nothing is lost, but a model that knows English and code has to learn to read again,
    and every expert learns the same. As in the glyph suite the experts so share directions.

    Raises:
        ValueError: there is no such task.
    """
    own, moved = task(name), str.maketrans(*VOWELS)

    def split(which: str) -> Examples:
        examples = own.split(which)
        return replace(examples, texts=[tuple(field.translate(moved) for field in text) for text in examples.texts])

    return replace(own, split=split, key=f"{own.key}, next vowels")


def _examples(tables: Mapping[str, list], split: str) -> Examples:
    if split not in tables:
        raise ValueError(f"no split {split!r}: take one of {', '.join(SIZES)}")
    return Examples([(words,) for words, _ in tables[split]], [float(target) for _, target in tables[split]])


@cache
def _tables() -> dict[str, dict[str, list]]:
    """Read all tasks, or find them in the cache: text and index of its class, by task and split."""

    def build(folder: Path) -> None:
        (folder / "tasks.json").write_text(json.dumps(_read_tasks()))

    folder = artefact("package_texts", {"versions": text.versions()}, build).path
    return json.loads((folder / "tasks.json").read_text())


def _read_tasks() -> dict[str, dict[str, list]]:
    found = {name: {} for name in READERS}  # text in lower case → splits with (text, class)
    for name, content, tree in parsed_sources(FILES):
        source, split = Source(name, content.encode().splitlines(), list(ast.walk(tree))), split_of_file(name)
        for task_name, (read, classes) in READERS.items():
            for words, label in read(source):
                if label in classes and len(words) >= SHORTEST:
                    found[task_name].setdefault(words.lower(), set()).add((split, words, label))
    return {name: _balanced(found[name], classes) for name, (_, classes) in READERS.items()}


def _balanced(found: Mapping[str, set], classes: tuple[str, ...]) -> dict[str, list]:
    """Draw equally many texts of each class by their hash; any beginning of the list is balanced too."""
    texts = defaultdict(list)
    for places in found.values():
        if len({label for _, _, label in places}) == 1:
            split, words, label = min(places)  # one of its spellings, in one split
            texts[split, label].append(words)
    tables = {}
    for split, size in SIZES.items():
        count = min(size // len(classes), *(len(texts[split, label]) for label in classes))
        columns = [sorted(texts[split, label], key=number)[:count] for label in classes]
        tables[split] = [(words, target) for row in zip(*columns, strict=True) for target, words in enumerate(row)]
    return tables
