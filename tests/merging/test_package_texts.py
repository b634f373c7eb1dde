"""Tasks on texts of installed packages: what is read from a file, what is drawn, and on which side it comes."""

import ast
from collections import Counter

import pytest

from common import cache
from common.data import text
from merging.suites.data import package_texts
from merging.suites.data.package_texts import LONGEST, READERS, SIZES, TASKS

MODULE = '''"""Tools of scipy.stats for the measurement of boxes. They are few."""


class Box:
    """A box with
    a lid.

    Parameters
    ----------
    width : float, default 1
        Size of the *base*. In metres.
    closed : bool
        Whether the lid is on.
    """

    def area(self, scale):
        """Return the area.

        Returns
        -------
        area : float
            Base times height, scaled.

        Raises
        ------
        ValueError
            If the box is open.

        Notes
        -----
        This is slow.
        """
        return max(self.sizes, "é") == scale
'''

CODE = """
if scale >= 1 and width == 2:
    total = self.width[0] * (
        scale
    )
print("é", len(boxes), sep="")
"""


def read(name, content):
    """What a task's reader finds in a file."""
    source = package_texts.Source("scipy/box.py", content.encode().splitlines(), list(ast.walk(ast.parse(content))))
    return {(words, label) for words, label in READERS[name][0](source) if words and label in READERS[name][1]}


def forget():
    package_texts.task.cache_clear()
    package_texts._tables.cache_clear()


@pytest.fixture(scope="module")
def installed():
    """Every twentieth of the installed sources."""
    return list(text.source_files())[::20]


@pytest.fixture(scope="module")
def few(installed):
    """All tasks as they are made from few files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "source_files", lambda: iter(installed))
        return package_texts._read_tasks()


@pytest.fixture
def own_cache(tmp_path, installed, monkeypatch):
    """A cache of the test's own, nothing in memory, and very few files."""
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(text, "source_files", lambda: iter(installed[::4]))
    forget()
    yield tmp_path
    forget()


def rows_of(tables):
    return [(split, words, target) for split, rows in tables.items() for words, target in rows]


@pytest.mark.parametrize("name", TASKS)
def test_classes_are_equally_large_and_no_text_comes_twice(few, name):
    classes = READERS[name][1]
    assert few[name]["train"]
    for split, rows in few[name].items():
        count = len(rows) // len(classes)
        assert count <= SIZES[split] // len(classes)
        assert [target for _, target in rows] == [*range(len(classes))] * count  # so every beginning is balanced
    words = [words.lower() for _, words, _ in rows_of(few[name])]
    assert len(set(words)) == len(words) and max(map(len, words)) <= LONGEST


def test_sentences_without_their_labels():
    described = {("Size of the base.", "parameter"), ("Whether the lid is on.", "parameter")}
    others = {("Base times height, scaled.", "result"), ("This is slow.", "note")}
    assert read("section", MODULE) == described | others
    assert read("type", MODULE) == {("Size of the base.", "float"), ("Whether the lid is on.", "bool")}
    sentences = {words for words, _ in read("word_order", MODULE)}
    assert {tuple(sorted(words.split())) for words in sentences} == {
        ("A", "a", "box", "lid.", "with"),
        ("Tools", "boxes.", "for", "measurement", "of", "of", "scipy.stats", "the"),
    }


def test_code_with_what_python_says_of_it():
    product = {("self.width[0]", "Subscript"), ("self.width", "Attribute")}  # the product itself has several lines
    condition, call = "scale >= 1 and width == 2", 'print("é", len(boxes), sep="")'
    calls = {(call, "Call"), ("len(boxes)", "Call")}
    compared = {("scale >= 1", "Compare"), ("width == 2", "Compare")}
    assert read("expression", CODE) == product | calls | compared | {(condition, "BoolOp")}
    assert read("first_argument", CODE) == {(call, "Constant"), ("len(boxes)", "Name")}
    assert read("arguments", CODE) == {(call, "3"), ("len(boxes)", "1")}
    assert read("index", CODE) == {("self.width[0]", "Constant")}
    assert read("use", CODE) == {(condition, "condition"), (call, "Expr")}


def test_expressions_are_whole(few):
    for _, words, target in rows_of(few["expression"]):
        assert type(ast.parse(words, mode="eval").body).__name__ == READERS["expression"][1][target]


def test_half_of_the_sentences_have_two_neighbours_swapped():
    sentences = [f"alpha beta gamma delta {number} omega" for number in range(200)]
    content = "\n".join(f'def f{number}():\n    """{words}"""' for number, words in enumerate(sentences))
    found = read("word_order", content)
    swapped = [words for words, label in found if label == "swapped"]
    assert {words for words, label in found if label == "original"} <= set(sentences) and 70 < len(swapped) < 130
    for words in swapped:
        original = sentences[int(next(word for word in words.split() if word.isdigit()))]
        moved = [
            place for place, pair in enumerate(zip(words.split(), original.split(), strict=True)) if len(set(pair)) == 2
        ]
        assert len(moved) == 2 and moved[1] == moved[0] + 1 and sorted(words) == sorted(original)


def test_a_file_is_on_one_side(tmp_path, monkeypatch):
    files = []
    for number in range(300):
        path = tmp_path / f"{number}.py"
        path.write_text(f"first_function({number})\nsecond_function({number}, 0)\n")
        files.append((f"torch/{number}.py", path))
    monkeypatch.setattr(text, "source_files", lambda: iter(files))
    monkeypatch.setattr(package_texts, "READERS", {"arguments": (READERS["arguments"][0], ("1", "2"))})
    rows = rows_of(package_texts._read_tasks()["arguments"])
    sides = {}
    for split, words, _ in rows:
        assert sides.setdefault(ast.parse(words).body[0].value.args[0].value, split) == split
    counts = Counter(split for split, _, _ in rows)
    assert len(rows) == 600 and counts["train"] > counts["test"] > counts["validation"] > 0


def test_a_text_of_two_classes_is_left_out_and_one_of_two_sides_comes_once():
    found = {
        "both": {("train", "Both", "a"), ("train", "both", "b")},
        "moved": {("train", "Moved", "a"), ("test", "Moved", "a")},
        "other": {("test", "Other", "b")},
        **{f"{label} {split}": {(split, f"{label} {split}", label)} for label in "ab" for split in SIZES},
    }
    tables = package_texts._balanced(found, ("a", "b"))
    assert {split: len(rows) for split, rows in tables.items()} == {"test": 4, "validation": 2, "base": 2, "train": 2}
    drawn = {words for _, words, _ in rows_of(tables)}
    assert "Moved" in drawn and not drawn & {"Both", "both"}


def test_a_task_comes_from_the_cache_the_second_time(own_cache, monkeypatch):
    first = package_texts.task("expression")
    forget()
    monkeypatch.setattr(package_texts, "_read_tasks", None)
    second = package_texts.task("expression")
    assert second.key == first.key and second.key != package_texts.task("arguments").key
    examples = second.split("train")
    assert examples == first.split("train") and examples.texts and len(examples.texts) == len(examples.targets)
    assert all(len(fields) == 1 for fields in examples.texts)
    assert [second.answer(target) for target in examples.targets[:8]] == list(second.classes)


def test_unknown_names_are_named(own_cache):
    with pytest.raises(ValueError, match="no task 'poetry': take one of "):
        package_texts.task("poetry")
    with pytest.raises(ValueError, match="no split 'dev': take one of"):
        package_texts.task("expression").split("dev")


def test_a_shifted_task_has_the_same_texts_with_other_vowels_and_the_same_targets(own_cache):
    package_texts.shifted_task.cache_clear()
    own, shifted = package_texts.task("expression"), package_texts.shifted_task("expression")
    for split in SIZES:
        plain, moved = own.split(split), shifted.split(split)
        assert moved.targets == plain.targets and (moved.texts != plain.texts or not plain.texts)
        for (before,), (after,) in zip(plain.texts, moved.texts, strict=True):
            following = dict(zip("aeiouAEIOU", "eiouaEIOUA", strict=True))
            assert after == "".join(following.get(letter, letter) for letter in before)
    assert shifted.key != own.key and shifted.classes == own.classes
    package_texts.shifted_task.cache_clear()
