"""The artefact cache: keys follow inputs and code, and nothing half-written is ever found."""

import types

import pytest

from common import cache
from common.training import TrainingRecipe


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


def module(tmp_path, name, text):
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    made = types.ModuleType(name)
    made.__file__ = str(path)
    exec(compile(text, str(path), "exec"), made.__dict__)
    return made


def test_a_second_call_finds_the_artefact_and_does_not_build_again(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "model.txt").write_text("weights")

    first = cache.artefact("kind", {"seed": 0}, build=build)
    second = cache.artefact("kind", {"seed": 0}, build=build)
    assert not first.hit and second.hit and len(built) == 1
    assert (second.path / "model.txt").read_text() == "weights"
    assert [record["hit"] for record in cache.RECORDS[-2:]] == [False, True]


def test_every_input_counts(tmp_path):
    keys = {
        cache.cache_key({"seed": seed, "recipe": TrainingRecipe(steps, 2, 0.1)}) for seed in (0, 1) for steps in (1, 2)
    }
    assert len(keys) == 4


def test_code_counts_and_its_comments_do_not(tmp_path):
    texts = {
        "plain": "def f(x):\n    return x + 1\n",
        "commented": '"""Text."""\ndef f(x):\n    """More."""\n    return x + 1  # why\n',
        "changed": "def f(x):\n    return x + 2\n",
    }
    keys = {name: cache.cache_key({}, module(tmp_path, name, text).f) for name, text in texts.items()}
    assert keys["plain"] != keys["changed"]
    bare = module(tmp_path, "bare", 'def f(x):\n    """Text."""\n    return x + 1\n')
    assert cache.cache_key({}, bare.f) == keys["commented"]


def test_a_failed_build_leaves_nothing_that_could_be_found():
    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.artefact("kind", {"seed": 0}, build=fail)
    assert not cache.is_cached("kind", {"seed": 0}, fail)
    failing = True

    def fail_once(folder):
        (folder / ("half" if failing else "whole")).touch()
        if failing:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.artefact("kind", {"seed": 1}, fail_once)
    failing = False
    whole = cache.artefact("kind", {"seed": 1}, fail_once)
    assert not (whole.path / "half").exists() and cache.is_cached("kind", {"seed": 1}, fail_once)


def test_rows_come_back_as_they_were(tmp_path):
    rows, calls = [{"task": "digits", "value": 0.1 + 0.2, "alpha": None}], []

    def build():
        calls.append(1)
        return iter(rows)

    assert cache.cached_rows("rows", {"seed": 1}, build) == rows
    assert cache.cached_rows("rows", {"seed": 1}, build) == rows and len(calls) == 1


def test_other_code_builds_again(tmp_path):
    """Two functions of the same name and inputs: what the first one made is nothing to the second."""
    first = module(tmp_path, "first", "def rows():\n    return [{'value': 1}]\n").rows
    second = module(tmp_path, "second", "def rows():\n    return [{'value': 2}]\n").rows
    assert [cache.cached_rows("rows", {}, build)[0]["value"] for build in (first, second, first)] == [1, 2, 1]


def test_inputs_that_are_no_plain_data_are_refused():
    with pytest.raises(TypeError, match="plain data"):
        cache.cache_key({"model": object()})
