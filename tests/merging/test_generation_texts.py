"""Questions with written answers: what is read from a source file, and which answers are the same."""

import ast
import json

import pytest

from merging.suites.data import generation_texts
from merging.suites.data.generation_texts import READERS, SIZES, TASKS, json_value, last_number, same_characters

SOURCE = '''
def fit(self, data, axis=0, *, out=None, name="x", many=(1, 2), long="a much longer text"):
    """Fit it."""
    self.data = data
    result = call(data, (axis))
    total = other
    return data.sum(
        axis)
'''


def function():
    return next(node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef))


def test_defaults_become_json_objects_if_they_are_short_constants():
    found = dict(generation_texts._defaults(function()))
    assert found == {"axis=0": '{"axis": 0}', "out=None": '{"out": null}', "name='x'": '{"name": "x"}'}


def test_defaults_of_positional_parameters_are_those_of_the_last_ones():
    (node,) = ast.parse("def f(a, b=1, /, c=True): pass").body
    assert dict(generation_texts._defaults(node)) == {"b=1": '{"b": 1}', "c=True": '{"c": true}'}


def test_lines_that_end_in_a_parameter_are_cut_in_front_of_it():
    (node,) = ast.parse(
        SOURCE.replace('axis=0, *, out=None, name="x", many=(1, 2), long="a much longer text"', "axis")
    ).body
    lines = SOURCE.splitlines()
    head = "def fit(self, data, axis):\n "
    assert dict(generation_texts._last_parameters(node, lines)) == {
        f"{head}self.data = ": "data",
        f"{head}result = call(data, (": "axis))",
    }


@pytest.mark.parametrize(
    ("read", "same", "other"),
    [
        (last_number, ("= 47", "7 + 40 is 47.", "047"), ("48", "", "no number")),
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
    assert all(int(answer) == eval(question) for question, answer in generation_texts.task("calc").split("test"))
    for question, answer in generation_texts.task("json").split("test"):
        name, _, default = question.partition("=")
        assert json.loads(answer) == {name: ast.literal_eval(default)}
    for question, answer in generation_texts.task("code").split("test"):
        head, line = question.split("\n ")
        ast.parse(f"{head} pass")
        assert answer.rstrip(")]") in head and line.strip()


def test_docstrings_of_no_file_are_in_two_splits():
    found = {split: set(generation_texts.docstrings(split)) for split in ("base", "test")}
    assert min(map(len, found.values())) > 50 and not found["base"] & found["test"]


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=f"no task 'sum': take one of {', '.join(READERS)}"):
        generation_texts.task("sum")
    with pytest.raises(ValueError, match="no split 'train2': take one of test, validation, base, train"):
        generation_texts.task("calc").split("train2")
