"""The rules of the house, read from the source text: who may import whom, and that imports do no work."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from common.lab.experiment import SCALE_NAMES, load_experiment
from merging import MERGERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "merging", "sparsity")
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
LIBRARY = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FORBIDDEN = {
    "common": {"merging", "sparsity", "experiments", "tests"},
    "merging": {"sparsity", "experiments", "tests"},
    "sparsity": {"merging", "experiments", "tests"},
    "experiments": {"experiments", "tests"},
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> set[str]:
    """The top-level names of everything a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, also inside functions and for annotations alone."""
    known, found = {module(other) for other in LIBRARY}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in full}
    return found & known


def faults(tree: ast.AST) -> list[str]:
    """Star imports, and uses of sys.path."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"line {node.lineno}: star import")
        if isinstance(node, ast.Attribute) and node.attr == "path" and ast.unparse(node.value) == "sys":
            found.append(f"line {node.lineno}: sys.path")
    return found


# What a module may call when it is imported, besides classes: calls that build small constants.
CALLS_AT_IMPORT = {
    "Path", "TypeVar", "frozenset", "tuple", "dict", "set", "range", "sorted", "field", "partial", "MappingProxyType",
    "re.compile", "matplotlib.rc_context", "resolve", "logging.getLogger", "dataclass", "replace",
    "matrices_without",                                 # builds a predicate over tensor names
    "merging_styles",                                   # a table of labels and colours
    "os.environ.get",                                   # where the cache is
}  # fmt: skip


def calls(node: ast.AST) -> list[ast.Call]:
    """The calls that executing a statement makes; those inside a lambda come later."""
    children = [] if isinstance(node, ast.Lambda) else ast.iter_child_nodes(node)
    return [node] * isinstance(node, ast.Call) + [call for child in children for call in calls(child)]


def work_at_import(tree: ast.Module) -> list[str]:
    """Statements of a module's top level that do more than define: loops, and calls that build no constant."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.For | ast.While | ast.With | ast.Try):
            found.append(f"line {node.lineno}: {type(node).__name__.lower()} at import")
        for call in calls(node):
            called = ast.unparse(call.func)
            known = called in CALLS_AT_IMPORT or called.split(".")[-1] in CALLS_AT_IMPORT
            if not known and not called.split(".")[-1][:1].isupper():  # classes make values
                found.append(f"line {call.lineno}: {called}(…) at import")
    return found


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS, ids=name)
def test_imports_run_only_downwards(path):
    package = path.relative_to(ROOT).parts[0]
    assert not imported(ast.parse(path.read_text())) & FORBIDDEN[package]


def test_no_import_runs_in_a_circle():
    order = TopologicalSorter({module(path): imports(path) for path in LIBRARY})
    assert set(order.static_order()) == {module(path) for path in LIBRARY}  # a circle raises, and is named


WORKBENCHES = {"merging": ("merging.suites", "merging.command"), "sparsity": ("sparsity.studies",), "common": ()}
PAPER = [path for path in LIBRARY if path.parent.parent == ROOT and path.name != "__main__.py"]


@pytest.mark.parametrize("path", PAPER, ids=name)
def test_what_a_paper_invented_needs_neither_its_workbench_nor_its_command(path):
    benches = (*WORKBENCHES[path.parent.name], "common.lab")
    assert [other for other in imports(path) if other.startswith(benches)] == []


def test_the_core_knows_neither_paper():
    """Neither a paper's arXiv number nor the name of a merger, a plug-in or a suite."""
    own = re.compile(r"2602\.05536|2605\.25612|task_arithmetic|tsv_m|iso_c|glyph-\d|zeroth|jsrelu", re.IGNORECASE)
    core = [path for path in LIBRARY if module(path).startswith("common") and path.name != "__init__.py"]
    assert {name(path): sorted(set(found)) for path in core if (found := own.findall(path.read_text()))} == {}


def named_mergers(tree: ast.AST) -> list[str]:
    """Strings that are a merger's name: code that compares with one, or looks one up, knows that merger."""
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [f"line {node.lineno}: {node.value}" for node in texts if node.value in MERGERS]


def foreign_privates(tree: ast.AST) -> list[str]:
    """Names with a leading underscore that belong to another module of this project."""
    found, modules = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            modules |= {alias.asname or alias.name for alias in node.names}
            found += [f"line {node.lineno}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and ast.unparse(node.value) in modules:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


KNOW_MERGERS = {  # the table, what is exported, and what another program calls them
    ROOT / "merging" / "mergers.py", ROOT / "merging" / "__init__.py", ROOT / "merging" / "command" / "mergekit.py",
}  # fmt: skip


@pytest.mark.parametrize("path", [path for path in LIBRARY if path not in KNOW_MERGERS], ids=name)
def test_no_merger_is_known_by_its_name_outside_the_table(path):
    assert named_mergers(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS, ids=name)
def test_no_module_uses_the_private_names_of_another(path):
    assert foreign_privates(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS + TESTS, ids=name)
def test_no_star_imports_and_no_edits_of_the_search_path(path):
    assert faults(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", LIBRARY + EXPERIMENTS, ids=name)
def test_importing_does_no_work(path):
    assert work_at_import(ast.parse(path.read_text())) == []


def test_the_rules_see_what_they_forbid():
    bad = "import sys\nfrom merging import *\nsys.path.insert(0, '.')\nx = compute()\nfor i in x: pass\n"
    tree = ast.parse(bad + "y = lambda: compute()\n")
    assert imported(tree) == {"sys", "merging"}
    assert faults(tree) == ["line 2: star import", "line 3: sys.path"]
    assert [line.split(":")[0] for line in work_at_import(tree)] == ["line 3", "line 4", "line 5"]
    tree = ast.parse("from merging import mergers\nfrom common.x import _y\nmergers._z\nz = m in ('ties', 'x')\n")
    assert foreign_privates(tree) == ["line 2: _y", "line 3: mergers._z"] and named_mergers(tree) == ["line 4: ties"]


def test_experiments_holds_numbered_scripts_their_manual_and_launch_configurations():
    ignored = {"__pycache__", "accelerate", "README.md"}
    names = {path.name for path in (ROOT / "experiments").iterdir()} - ignored
    assert [entry for entry in names if not re.fullmatch(r"\d\d_[a-z0-9_]+\.py", entry)] == []
    numbers = [path.name[:2] for path in EXPERIMENTS]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_every_experiment_states_claim_rule_cost_and_its_four_scales(path):
    experiment = load_experiment(path)
    assert tuple(experiment.scales) == SCALE_NAMES
    for word in ("Claim", "Verdict", "Cost", "Run"):
        assert re.search(rf"^{word}\b", experiment.doc, re.MULTILINE), f"the docstring lacks a line {word}"
    assert f"python experiments/{path.name}" in experiment.doc
    assert experiment.claims, "it states no claims: see common/lab/claims.py"


def test_only_one_place_loads_pretrained_models():
    users = [name(path) for path in LIBRARY + EXPERIMENTS if "from_pretrained(" in path.read_text()]
    assert users == ["common/models/hub.py", "merging/suites/models/adapted.py"]  # the second is peft's own
