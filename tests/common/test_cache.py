"""The artefact cache: keys follow inputs and code, and nothing half-written is ever found."""

import types

import pytest

from common import cache
from common.training import Recipe


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
    keys = {cache.cache_key({"seed": seed, "recipe": Recipe(steps, 2, 0.1)}) for seed in (0, 1) for steps in (1, 2)}
    assert len(keys) == 4


def test_code_counts_and_its_comments_do_not(tmp_path):
    texts = {
        "plain": "def f(x):\n    return x + 1\n",
        "commented": '"""Text."""\ndef f(x):\n    """More."""\n    return x + 1  # why\n',
        "changed": "def f(x):\n    return x + 2\n",
    }
    keys = {name: cache.cache_key({}, [module(tmp_path, name, text).f]) for name, text in texts.items()}
    assert keys["plain"] != keys["changed"]
    bare = module(tmp_path, "bare", 'def f(x):\n    """Text."""\n    return x + 1\n')
    assert cache.cache_key({}, [bare.f]) == keys["commented"]


def test_a_failed_build_leaves_nothing_that_could_be_found():
    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.artefact("kind", {"seed": 0}, build=fail)
    assert not cache.is_cached("kind", {"seed": 0})
    whole = cache.artefact("kind", {"seed": 0}, build=lambda folder: (folder / "whole").touch())
    assert not (whole.path / "half").exists() and cache.is_cached("kind", {"seed": 0})


def test_rows_come_back_as_they_were(tmp_path):
    rows = [{"task": "digits", "value": 0.1 + 0.2, "alpha": None}]
    assert cache.cached_rows("rows", {"seed": 1}, lambda: iter(rows)) == rows
    assert cache.cached_rows("rows", {"seed": 1}, lambda: pytest.fail("built twice")) == rows


def test_inputs_that_are_no_plain_data_are_refused():
    with pytest.raises(TypeError, match="plain data"):
        cache.cache_key({"model": object()})
