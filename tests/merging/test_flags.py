"""Flags mean the same however they are written, and no flag is lost."""

import pytest
from models_on_disk import experts_of, models, state_of, weights

from merging.command.flags import parse
from merging.command.main import main

FLAGS = ["--base", "b", "--experts", "e", "f", "--method", "ties", "--final-scale", "0.5"]


@pytest.mark.parametrize("written", [
    ["--base=b", "--experts", "e", "f", "--method=ties", "--final-scale=0.5"],
    ["--base", "b", "--experts=e", "--experts=f", "--method", "ties", "--final_scale", "0.5"],
    ["--base", "b", "--experts", "e", "--method", "ties", "--experts", "f", "--final_scale=0.5"],
])  # fmt: skip
def test_a_flag_may_have_its_value_behind_an_equals_sign(written):
    assert parse(written) == parse(FLAGS)


def test_every_set_counts_however_it_is_written():
    texts = ("*a*:scale=0.1", "*b*:scale=0.2", "*c*:final_scale=1")
    ways = (["--set", *texts], [f"--set={text}" for text in texts], ["--set", *texts[:2], f"--set={texts[2]}"])
    assert [parse([*FLAGS, *way]).set for way in ways] == [texts] * 3


@pytest.mark.parametrize("way", [["--recipe", "{}"], ["--recipe={}"]])
def test_a_recipe_is_read_however_it_is_named(tmp_path, way):
    state = state_of()
    base, experts = models(tmp_path, state, experts_of(state, 2))
    flags = ["--base", base, "--experts", *experts, "--method", "task_arithmetic", "--scale", "0.7"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    recipe = [text.format(tmp_path / "out" / "merging.yaml") for text in way]
    assert main([*recipe, "--base", base, "--final-scale", "1", "--out", str(tmp_path / "again")]) == 0
    for name, tensor in weights(tmp_path / "again").items():
        assert tensor.equal(weights(tmp_path / "out")[name])


@pytest.mark.parametrize("flags, message", [
    (["--recipe", "a.yaml", "--mergekit", "b.yaml"], "--recipe a.yaml --mergekit b.yaml: a merge follows one recipe"),
    (["--recipe=a.yaml", "--recipe", "b.yaml"], "--recipe a.yaml --recipe b.yaml: a merge follows one recipe"),
    (["--recipe", "none.yaml"], "--recipe none.yaml: there is no such file"),
    (["--mergekit=none.yaml"], "--mergekit none.yaml: there is no such file"),
    (["--recipe", "."], "--recipe .: is a folder; name the file in it"),
    (["--mergekit=."], "--mergekit .: is a folder; name the file in it"),
])  # fmt: skip
def test_two_recipes_or_a_missing_one_are_refused_in_one_line(flags, message, capsys):
    assert main([*flags, "--out", "out"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m merging: {message}")
