"""Questions with written answers: what is read from a source file, and which answers are the same."""

import ast
import json

import pytest

from merging.suites.data import generation_texts
from merging.suites.data.generation_texts import READERS, SIZES, TASKS, integers, json_value, same_characters

SOURCE = """
    total = sum(f(x[1]))
value = table[keys[0]]
if any(rows[first]):
call(one)
    return join("a", list(b))
wrong = f(g(x]))
print(f(x)); y = (g(z))
x = f(a(b))  # a comment
"""


def test_lines_of_code_are_cut_in_front_of_what_closes_them():
    assert dict(generation_texts._closings(SOURCE)) == {
        "total = sum(f(x[1": "]))",
        "value = table[keys[0": "]]",
        "if any(rows[first": "]):",
        "print(f(x)); y = (g(z": "))",
    }


@pytest.mark.parametrize(("line", "closing"), [("f(a[b{", "}])"), ("f(a)[", "]"), ("f", ""), ("f)", ""), ("(]", "")])
def test_open_brackets_are_closed_innermost_first(line, closing):
    assert generation_texts._open_brackets(line) == closing


@pytest.mark.parametrize(
    ("read", "same", "other"),
    [
        (integers, ("1, 5, 6", "1 5 6", "[1, 05, 6]."), ("1, 6, 5", "156", "", "no number")),
        (same_characters, ("x)", " x)\n"), ("x", "x))", "")),
        (json_value, ('{"a": 1, "b": null}', ' { "b" : null, "a":1 } '), ('{"a": 1}', "{'a': 1}", "", "[" * 9999)),
    ],
)
def test_answers_are_compared_by_what_counts_in_them(read, same, other):
    assert len(set(map(read, same))) == 1 and read(same[0]) != ""
    assert not {read(same[0])} & set(map(read, other))


def test_json_must_be_the_whole_text():
    assert json_value('Here it is: {"a": 1}') == json_value('{"a": 1} {"a": 1}') == ""


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_in_two_splits_and_every_answer_reads(name):
    task = generation_texts.task(name)
    questions = {split: [question for question, _ in task.split(split)] for split in SIZES}
    assert all(60 <= len(own) <= SIZES[split] for split, own in questions.items())
    assert len(set().union(*questions.values())) == sum(map(len, questions.values()))
    assert all(task.read(answer) for split in SIZES for _, answer in task.split(split))


def test_right_answers():
    for question, answer in generation_texts.task("sort").split("test"):
        assert list(ast.literal_eval(answer)) == sorted(set(ast.literal_eval(question))) and len(question) == 10
    for question, answer in generation_texts.task("json").split("test"):
        assert json.loads(answer) == list(ast.literal_eval(question))
    for question, answer in generation_texts.task("code").split("test"):
        line = (question + answer).removeprefix(">>> ")
        assert all(line.count(opening) == line.count(closing) for opening, closing in ("()", "[]", "{}"))


def test_docstrings_of_no_file_are_in_two_splits():
    found = {split: set(generation_texts.docstrings(split)) for split in ("base", "test")}
    assert min(map(len, found.values())) > 50 and not found["base"] & found["test"]


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=f"no task 'sum': take one of {', '.join(READERS)}"):
        generation_texts.task("sum")
    with pytest.raises(ValueError, match="no split 'train2': take one of test, validation, base, train"):
        generation_texts.task("sort").split("train2")
