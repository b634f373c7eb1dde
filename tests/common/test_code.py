"""The code that decides a result: every edit of what it reaches is seen, and no edit of anything else."""

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
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
TABLE = {"one": in_a_table, "two": partial(in_a_partial, 1), "three": lambda: 12}
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
    text = SCRIPT
    edit = next(f"{word}{number}" for word in ("return ", "+ ", "= ", "lambda: ") if f"{word}{number}\n" in text + "\n"
                or f"{word}{number}}}" in text or f"{word}{number} " in text)  # fmt: skip
    first = load(tmp_path, text, "first")
    second = load(tmp_path, text.replace(edit, f"{edit}00"), "second")
    assert code.code_of(first.build) != code.code_of(second.build)


@pytest.mark.parametrize("edit", ["return 9", "return 10"])
def test_what_is_not_reached_does_not_count(edit, tmp_path):
    """A function that nobody calls, and one whose name is only that of a local variable."""
    text = SCRIPT
    first, second = load(tmp_path, text, "first"), load(tmp_path, text.replace(edit, "return 0"), "second")
    assert code.code_of(first.build) == code.code_of(second.build)


def test_an_annotation_that_is_a_text_names_a_class(tmp_path):
    text = SCRIPT
    first, second = load(tmp_path, text, "first"), load(tmp_path, text.replace("factor = 2", "factor = 3"), "second")
    assert code.code_of(first.texts) != code.code_of(second.texts)


def test_objects_hold_code_too(tmp_path):
    """Partials and what they are given, bound methods, tables that another file has filled."""
    module = sys.modules["held"] = load(tmp_path, SCRIPT, "held")
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


# Kinds of Python that once hid code: script.py, and the files beside it; build() depends on 111 or 222 ---------------

F = {"helper.py": "def f():\n    return 111\n"}
HIDDEN = {
    "a module imported, and changed": ("import helper\nhelper.SIZE = 3\ndef build():\n    return helper.f()", F),
    "an import that may fail": (
        "try:\n    from helper import f\nexcept ImportError:\n    f = None\ndef build():\n    return f()", F
    ),
    "two imports of one name": (
        "def build():\n    from helper import f\n    return f()\ndef other():\n    from other import f\n    return f()",
        F | {"other.py": "def f():\n    return 0\n"},
    ),
    "import *": ("from helper import *\ndef build():\n    return f()", F),
    "a package": (
        "from lib import helper\ndef build():\n    return helper.f()",
        {"lib/__init__.py": "", "lib/helper.py": F["helper.py"]},
    ),
    "a package without __init__, imported late and relatively": (
        "def build():\n    from lib.other import g\n    return g()",
        {"lib/other.py": "from .helper import f\ndef g():\n    return f()\n", "lib/helper.py": F["helper.py"]},
    ),
    "a module that is a value": (
        "import functools, helper\ndef rows(module):\n    return module.f()\nbuild = functools.partial(rows, helper)", F
    ),
    "an import of the script itself": (
        "import script\ndef f():\n    return 111\ndef build():\n    return script.f()", {}
    ),
    "another function of the same name": (
        "from helper import f\nfrom other import f as g\ndef build():\n    return f() - g()",
        F | {"other.py": "def f():\n    return 222\n"},
    ),
    "a function named like a builtin": ("def sum():\n    return 111\ndef build():\n    return sum()", {}),
    "a global of a function": ("SIZE = 111\ndef build():\n    global SIZE\n    SIZE = SIZE + 1\n    return SIZE", {}),
    "a global that another function sets": (
        "SIZE = 1\ndef setup():\n    global SIZE\n    SIZE = 111\nsetup()\ndef build():\n    return SIZE", {}
    ),
    "a comprehension over its own variable's name": (
        "def x():\n    return [111]\ndef build():\n    return [x for x in x()]", {}
    ),
    "a name bound in a comprehension": ("ALL = [LAST := x for x in (1, 111)]\ndef build():\n    return LAST", {}),
    "the rest of a match": (
        "match {'a': 111}:\n    case {**rest}:\n        pass\ndef build():\n    return rest", {}
    ),
    "a call that changes its argument": ("ORDER = [3]\nlist.append(ORDER, 111)\ndef build():\n    return ORDER", {}),
    "a function of the main guard": (
        "if __name__ != '__main__':\n    def f():\n        return 111\ndef build():\n    return f()", {}
    ),
    "what an instance holds": (
        "import functools\nclass A:\n    def __init__(self, f):\n        self.f = f\ndef f():\n    return 111\n"
        "def rows(a):\n    return a.f()\nbuild = functools.partial(rows, A(f))", {}
    ),
    "what a torch module holds": (
        "import functools, torch\nclass A(torch.nn.Module):\n    def forward(self):\n        return 111\n"
        "def rows(a):\n    return a()\nbuild = functools.partial(rows, torch.nn.Sequential(A()))", {}
    ),
    "what is registered by decorators": (
        "import functools\n@functools.singledispatch\ndef f(x):\n    return 0\n@f.register\ndef _(x: int):\n"
        "    return 111\ndef build():\n    return f(3)", {}
    ),
    "a class that another file changes": (
        "import helper, other\ndef build():\n    return helper.A().f()",
        {"helper.py": "class A:\n    pass\n", "other.py": "import helper\nhelper.A.f = lambda self: 111\n"},
    ),
    "a function that another file replaces": (
        "import helper, other\ndef build():\n    return helper.f()",
        {"helper.py": "def f():\n    return 0\n", "other.py": "import helper\nhelper.f = lambda: 111\n"},
    ),
    "a text within an annotation": ("class A:\n    size = 111\ndef build() -> list['A']:\n    return []", {}),
}  # fmt: skip


def code_of_script(folder: Path, files: dict, monkeypatch) -> tuple[str, ...]:
    """Return the code of build() in script.py, one of these files, which lie in a folder outside of the clone."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            return code.code_of(importlib.import_module("script").build)
        finally:
            for name in set(sys.modules) - before:
                if str(folder) in str(getattr(sys.modules[name], "__spec__", "")):
                    del sys.modules[name]


@pytest.mark.parametrize("kind", HIDDEN)
def test_no_kind_of_python_hides_code(kind, tmp_path, monkeypatch):
    script, others = HIDDEN[kind]
    files = {"script.py": script} | others
    swap = {"111": "222", "222": "111"}
    edited = {name: re.sub("111|222", lambda found: swap[found[0]], text) for name, text in files.items()}
    first = code_of_script(tmp_path / "first", files, monkeypatch)
    assert first != code_of_script(tmp_path / "second", edited, monkeypatch)
    assert first == code_of_script(tmp_path / "with spaces", files, monkeypatch)


@pytest.mark.parametrize(
    ("files", "old", "new"),
    [
        ({"script.py": b"\xef\xbb\xbfdef build():\n    return 1\n"}, "", ""),  # a byte order mark
        ({"script.py": "# coding: latin-1\ndef build():\n    return '\xe9'\n".encode("latin-1")}, "", ""),
        ({"script.py": "def build(x: 'in cm' = 1) -> 'number of rows':\n    return x\n"}, "", ""),
        ({"script.py": "import functools, os\nbuild = functools.partial(print, os.path.join)\n"}, "", ""),  # frozen
        (
            {
                "script.py": "import helper\ndef build():\n    return helper.x\n",
                "helper.py": "try:\n    from other import x\nexcept ImportError:\n    pass\n",
                "other.py": "try:\n    from helper import x\nexcept ImportError:\n    pass\n",
            },
            "",
            "",
        ),
        ({"script.py": "class A:\n    size = 1\n    'In cm.'\ndef build():\n    return A\n"}, "cm", "mm"),
        (
            {"script.py": "def run(x):\n    return x\nbuild = run\nif __name__ == '__main__':\n    run(111)\n"},
            "111",
            "222",
        ),
    ],
    ids=["byte order mark", "latin-1", "remark as annotation", "frozen", "circle", "text under a field", "main guard"],
)
def test_nothing_else_counts_and_all_python_is_read(files, old, new, tmp_path, monkeypatch):
    edited = {name: text.replace(old, new) if old else text for name, text in files.items()}
    first = code_of_script(tmp_path / "first", files, monkeypatch)
    assert first == code_of_script(tmp_path / "second", edited, monkeypatch)


# A script outside of the clone, in processes -------------------------------------------------------------------------

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
