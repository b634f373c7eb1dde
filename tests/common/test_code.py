"""The code that decides a result: every edit of what it reaches is seen, and no edit of anything else."""

import ast
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from common import code
from common.lab.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[2]


def forget() -> None:
    """Let `common.code` read everything anew."""
    for value in vars(code).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture
def edited(monkeypatch):
    """A function (file, edit) which lets `common.code` see that file of the clone as edit(its text)."""

    def edit(file: str, change) -> None:
        changed = {(ROOT / file).resolve(): change((ROOT / file).read_text(encoding="utf-8"))}
        original = code._text

        def text(path: Path) -> str:
            return changed.get(path) or original(path)

        forget()
        monkeypatch.setattr(code, "_text", text)

    yield edit
    monkeypatch.undo()
    forget()


def without_body(name: str):
    """An edit that replaces the body of a function, "f" or "Class.f", and leaves everything else."""

    def edit(text: str) -> str:
        tree = ast.parse(text)
        *outer, inner = name.split(".")
        nodes = tree.body
        for each in outer:
            nodes = next(node for node in nodes if getattr(node, "name", "") == each).body
        next(node for node in nodes if getattr(node, "name", "") == inner).body = ast.parse("return 0.0").body
        return ast.unparse(tree)

    return edit


def function(where: str):
    """The function "module:name" of the clone, or "NN_experiment:name"."""
    module, name = where.split(":")
    if module[0].isdigit():
        load_experiment(ROOT / "experiments" / f"{module}.py")
        return getattr(sys.modules[module], name)
    return getattr(importlib.import_module(module), name)


SWEEP, BASIS = "merging.suites.ablations:sweep_rows", "merging.suites.ablations:basis_rows"
TRAINED, MERGER = "sparsity.studies.training:_train", "merging.suites.comparison:variant_rows"
REACHED = [  # the function that builds, a file, and a function in it that the result depends on
    (BASIS, "merging/suites/reference.py", "relative_distance"),
    (BASIS, "merging/suites/ablations.py", "perturbed"),
    (SWEEP, "merging/suites/ablations.py", "scaled"),
    (SWEEP, "merging/suites/ablations.py", "_labels"),
    (TRAINED, "sparsity/studies/training.py", "_absolute_activations"),  # the penalty itself
    (TRAINED, "sparsity/studies/training.py", "Recorder._log"),  # a method
    (TRAINED, "sparsity/studies/runs.py", "Run.snapshot_steps"),  # a property
    (TRAINED, "sparsity/activations.py", "JSReLU.derivative"),  # in a table of classes
    (TRAINED, "common/training.py", "decay_groups"),
    (MERGER, "merging/mergers.py", "star"),  # in a table of functions
    (MERGER, "merging/calibration.py", "_divisor"),
    (MERGER, "common/spectral.py", "projection_coefficients"),
    (MERGER, "merging/task_vectors.py", "matrices_without"),  # builds a constant
    (MERGER, "merging/suites/suite.py", "Suite.rows"),  # of a class that only an annotation names
    (MERGER, "common/evaluation.py", "score"),
    ("merging.suites.vision:_pretrain", "common/data/glyphs.py", "photograph"),
    ("merging.suites.text_experts:_fine_tune", "merging/suites/models/language.py", "Classifier.forward"),
]


@pytest.mark.parametrize(("built_by", "file", "name"), REACHED, ids=lambda text: text.split("/")[-1])
def test_an_edit_of_what_a_result_depends_on_is_seen(built_by, file, name, edited):
    build = function(built_by)
    before = code.code_of(build)
    edited(file, without_body(name))
    assert code.code_of(build) != before


@pytest.mark.parametrize(
    ("built_by", "file", "change"),
    [
        (SWEEP, "merging/suites/ablations.py", lambda text: text.replace("range(-8, 5)", "range(-8, 6)")),
        (SWEEP, "merging/calibration.py", lambda text: text.replace('"text_projection", "emb', '"text", "emb')),
        (TRAINED, "sparsity/probes.py", lambda text: text.replace("REDUCTIONS = (", "REDUCTIONS = ('x', ")),
    ],
)
def test_an_edit_of_a_constant_is_seen(built_by, file, change, edited):
    build = function(built_by)
    before = code.code_of(build)
    assert change((ROOT / file).read_text()) != (ROOT / file).read_text()
    edited(file, change)
    assert code.code_of(build) != before


@pytest.mark.parametrize("name", ["draw", "verdict", "compare", "tables", "measure"])
def test_an_edit_of_a_figure_or_a_verdict_leaves_rows_alone(name, edited):
    build = function("21_over_accumulation:unit_rows")
    before = code.code_of(build)
    edited("experiments/21_over_accumulation.py", without_body(name))
    assert code.code_of(build) == before


def test_an_edit_of_comments_docstrings_and_layout_leaves_rows_alone(edited):
    build = function(SWEEP)
    before = code.code_of(build)

    def reworded(text: str) -> str:
        text = text.replace('"""Return the update times a scale."""', '"""Scaled."""\n\n    # why')
        return text.replace('"""Return d_r', '"""Give d_r')

    assert "# why" in reworded((ROOT / "merging/suites/ablations.py").read_text())
    edited("merging/suites/ablations.py", reworded)
    assert code.code_of(build) == before
    edited("merging/calibration.py", reworded)
    assert code.code_of(build) == before


def test_asking_costs_well_under_a_second():
    build = function(TRAINED)
    forget()
    start = time.process_time()
    code.code_of(build)
    assert time.process_time() - start < 2  # 0.3 s where nothing else runs


# What a file may hold, in small -------------------------------------------------------------------------------------

SCRIPT = """
import functools
from functools import partial

{line}

class Base:
    def inherited(self):
        return 1

class Model(Base):
    factor = 2

    @property
    def width(self):
        return 3

    @staticmethod
    def made():
        return Model()

def decorator(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args) + 4
    return inner

def by_default():
    return 5

def in_a_table():
    return 6

def in_a_partial(x):
    return 7 + x

def added_later():
    return 8

def annotated_only() -> "Model":
    return None

def unused():
    return 9

def shadowed():
    return 10

SIZE = 11
TABLE = {{"one": in_a_table, "two": partial(in_a_partial, 1), "three": lambda: 12}}
TABLE["four"] = added_later

@decorator
def build(call=by_default):
    shadowed = [SIZE for shadowed in TABLE.values()]
    def nested():
        return 13
    return call() + Model.made().width + nested()

def texts():
    return annotated_only()
"""


def load(folder: Path, text: str, name: str):
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "number", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13], ids=lambda number: f"returns {number}, another time {100 * number}"
)
def test_each_way_of_reaching_code_is_followed(number, tmp_path):
    text = SCRIPT.format(line="")
    edit = next(f"{word}{number}" for word in ("return ", "+ ", "= ", "lambda: ") if f"{word}{number}\n" in text + "\n"
                or f"{word}{number}}}" in text or f"{word}{number} " in text)  # fmt: skip
    first = load(tmp_path, text, "first")
    second = load(tmp_path, text.replace(edit, f"{edit}00"), "second")
    assert code.code_of(first.build) != code.code_of(second.build)


@pytest.mark.parametrize("edit", ["return 9", "return 10"])
def test_what_is_not_reached_does_not_count(edit, tmp_path):
    """A function that nobody calls, and one whose name is only that of a local variable."""
    text = SCRIPT.format(line="")
    first, second = load(tmp_path, text, "first"), load(tmp_path, text.replace(edit, "return 0"), "second")
    assert code.code_of(first.build) == code.code_of(second.build)


def test_an_annotation_that_is_a_text_names_a_class(tmp_path):
    text = SCRIPT.format(line="")
    first, second = load(tmp_path, text, "first"), load(tmp_path, text.replace("factor = 2", "factor = 3"), "second")
    assert code.code_of(first.texts) != code.code_of(second.texts)


def test_objects_hold_code_too(tmp_path):
    """Partials and what they are given, bound methods, tables that another file has filled."""
    module = sys.modules["held"] = load(tmp_path, SCRIPT.format(line=""), "held")
    try:
        whole = code.code_of(module.build)
        assert set(whole) <= set(code.code_of(functools.partial(print, module.build)))
        assert set(code.code_of(module.Model)) <= set(code.code_of(module.Model().inherited))
        other = load(tmp_path, "def stranger():\n    return 14\n", "other")
        module.TABLE["five"] = other.stranger
        assert set(code.code_of(module.build)) - set(whole) == {"def stranger():\n    return 14"}
    finally:
        del sys.modules["held"]


def test_an_import_inside_of_a_function_is_followed(tmp_path):
    local = "def build():\n    from common.evaluation import score\n    return score\n"
    assert any("def score(" in text for text in code.code_of(load(tmp_path, local, "local").build))


def test_installed_packages_are_not_read():
    assert code.code_of(json.dumps, functools.partial(textwrap.dedent)) == ()


def test_a_function_without_a_file_is_refused():
    scope: dict = {"__name__": "nowhere"}
    exec(compile("def build():\n    return 1\n", "<dynamic-code>", "exec"), scope)
    with pytest.raises(ValueError, match=r"build has no file \(<dynamic-code>\)"):
        code.code_of(scope["build"])


# A script outside the clone, in processes ----------------------------------------------------------------------------

OUTSIDE = '''\
"""Cubes (no figure of any paper)."""
from dataclasses import dataclass
from functools import partial

import pandas as pd

from common.cache import cached_rows
from common.lab import figures
from common.lab.experiment import Experiment
from common.lab.run import run
from helper import power


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1)


def rows(seed):
    yield dict(seed=seed, method="none", metric="cube", value=power(seed + 1))


def one(settings, seed):
    return cached_rows("cubes", {"seed": seed}, partial(rows, seed))


def measure(settings, context):
    for found in context.map(partial(one, settings), settings.seeds, "cubes"):
        yield from found


def draw(data):
    return {"cubes": figures.lines(data, x="seed")}


def compare(data, published):
    return pd.DataFrame([dict(quantity="mean", paper=None, ours=data.value.mean(), sd=None, n=2, same_setting="no")])


def verdict(data):
    return "not run at this scale"


SCALES = dict.fromkeys(("smoke", "laptop", "workstation", "paper"), Settings())
EXPERIMENT = Experiment(__doc__, SCALES, measure, draw, compare, verdict)

if __name__ == "__main__":
    run(EXPERIMENT)
'''
LAUNCHERS = {
    "two processes of a map": ([], ["--jobs", "2"]),
    "accelerate launch": (["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"], []),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_outside_of_the_clone_never_meets_stale_rows(launcher, tmp_path):
    script, helper = tmp_path / "91_cubes.py", tmp_path / "helper.py"
    before, after = LAUNCHERS[launcher]
    command = [sys.executable, *before, str(script), "--device", "cpu", "--results-dir", str(tmp_path / "out"), *after]
    environment = os.environ | {"EXPERIMENTS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1"}

    def start(power: str, figure: str = "") -> tuple[list[float], set[str]]:
        script.write_text(OUTSIDE.replace('x="seed")', f'x="seed"{figure})'), encoding="utf-8")
        helper.write_text(f"def power(x):\n    return {power}\n", encoding="utf-8")
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "out" / "91_cubes" / "laptop"
        values = [float(line.rsplit(",", 1)[1]) for line in (folder / "data.csv").read_text().splitlines()[1:]]
        return values, set(json.loads((folder / "provenance.json").read_text())["cache_built"])

    values, built = start("x**3")
    assert values == [1, 8] and len(built) == 2
    assert start("x**3", figure=", ylabel='cube'") == ([1, 8], set())
    values, rebuilt = start("x**3 + 1")
    assert values == [2, 9] and len(rebuilt) == 2 and not rebuilt & built
