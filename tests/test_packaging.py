"""What is published: one version, a lock that covers every dependency, and a wheel that merges outside the clone."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MACHINES = {
    "x86-64": {"platform_machine": "x86_64", "sys_platform": "linux", "platform_system": "Linux"},
    "aarch64": {"platform_machine": "aarch64", "sys_platform": "linux", "platform_system": "Linux"},
}


def test_citation_and_changelog_have_the_version_of_pyproject():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## \[(\d[^\]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == released[0]
    assert citation["version"] == PROJECT["version"]


def locked(machine: str) -> dict[str, str]:
    """Package → version of the lines of the lock that are for a machine."""
    lines = (line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] not in ("", "#"))
    wanted = (Requirement(line) for line in lines)
    here = [one for one in wanted if not one.marker or one.marker.evaluate(MACHINES[machine])]
    names = [canonicalize_name(one.name) for one in here]
    assert len(set(names)) == len(names), "a package has two lines"
    return {name: str(one.specifier).removeprefix("==") for name, one in zip(names, here, strict=True)}


def required(machine: str) -> Iterator[Requirement]:
    """Everything that the project and its tests need on a machine, by what the packages that are installed here say."""
    environment = {**default_environment(), **MACHINES[machine]}
    given = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    waiting, seen = [Requirement(line) for line in given], set()
    while waiting:
        one = waiting.pop()
        extras = one.extras or {""}
        if not one.marker or any(one.marker.evaluate({**environment, "extra": extra}) for extra in ("", "test")):
            yield one
            if (canonicalize_name(one.name), *sorted(extras)) not in seen:
                seen.add((canonicalize_name(one.name), *sorted(extras)))
                waiting += needed_by(one.name, extras, environment)


def needed_by(package: str, extras: set[str], environment: dict[str, str]) -> list[Requirement]:
    if package in ("torch", "torchvision") and environment["platform_machine"] != "x86_64":
        return []  # an older pair than the one that is installed where the lock is written
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:  # of another machine; its own line is checked all the same
        return []
    found = [Requirement(line) for line in lines]
    applies = [
        one
        for one in found
        if not one.marker or any(one.marker.evaluate({**environment, "extra": extra}) for extra in extras)
    ]
    for one in applies:
        one.marker = None
    return applies


@pytest.mark.parametrize("machine", MACHINES)
def test_the_lock_has_a_version_in_range_of_everything_that_is_needed(machine):
    versions = locked(machine)
    unmet = {
        str(one)
        for one in required(machine)
        if not one.specifier.contains(versions.get(canonicalize_name(one.name), "missing"), prereleases=True)
    }
    assert unmet == set()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which a wheel of this tree was installed, without a network and without what it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("common", "merging", "sparsity"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=folder / "tree", check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert f"-{PROJECT['version']}-" in wheel.name
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder / "site"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    return folder / "site"


def test_the_wheel_holds_every_module_and_table(installed):
    kept = {path.relative_to(ROOT) for name in ("common", "merging", "sparsity") for path in (ROOT / name).rglob("*")}
    kept = {path for path in kept if path.suffix in (".py", ".json") and "__pycache__" not in path.parts}
    assert {path for path in kept if not (installed / path).is_file()} == set()
    assert not (installed / "tests").exists() and not (installed / "experiments").exists()


def test_the_wheel_merges_two_checkpoints_outside_the_clone(installed, tmp_path):
    base = {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.zeros(3)}
    experts = [{name: value + shift for name, value in base.items()} for shift in (1.0, 2.0)]
    for name, tensors in zip(("base", "one", "two"), (base, *experts), strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    inputs = "--base base.safetensors --experts one.safetensors two.safetensors"
    command = f"-m merging {inputs} --method task_arithmetic --scale 0.5 --out merged"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    where = subprocess.run([sys.executable, "-c", "import merging; print(merging.__file__)"], **options)
    assert where.stdout.startswith(str(installed)), where.stderr
    done = subprocess.run([sys.executable, *command.split()], **options)
    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], base[name] + 1.5) for name in base)
