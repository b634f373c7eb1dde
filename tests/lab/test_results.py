"""What a run leaves behind: its files, their atomicity, and the verification that nothing was edited by hand."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from common.lab import report, results
from common.lab.results import headline, listing, load, load_experiment, problems, published, render, verify, write
from common.lab.run import Experiment, run

EXPECTED_TABLE = """\
| quantity       | paper         | ours         | n   | same setting?   |
|:---------------|:--------------|:-------------|:----|:----------------|
| mean square    | 81.9          | 1.833 ± 0.24 | 2   | no              |
| largest square | not published | 4.333        | 1   | a \\| b          |"""

EXPECTED_CLAIMS = """\
| source           | claim                      | paper         | ours              | verdict               |
|:-----------------|:---------------------------|:--------------|:------------------|:----------------------|
| Table 1          | the mean square is above 1 | 81.9          | 4.2 ± 0.2 (n = 2) | reproduced            |
| not in the paper | the largest square         | not published | 4.0 (n = 1)       | not run at this scale |"""


@pytest.fixture
def results_dir(tmp_path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def folder(experiment, results_dir, clean) -> Path:
    """A complete workstation result."""
    return start(experiment, results_dir)


def start(experiment, results_dir: Path, scale: str = "workstation") -> Path:
    return run(experiment, ["--results-dir", str(results_dir), "--device", "cpu", "--jobs", "1", "--scale", scale])


def check(results_dir: Path) -> list[str]:
    return problems(results_dir, results_dir.parent / "experiments")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_run_leaves_table_figures_text_and_provenance(folder, experiment):
    assert {file.name for file in folder.iterdir()} == {"data.csv", "README.md", "squares.png", "provenance.json"}
    first, second, *_ = (folder / "data.csv").read_text().splitlines()
    assert (first, second) == ("seed,method,number,metric,value", "0,none,0,square,0")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert EXPECTED_TABLE in text
    assert EXPECTED_CLAIMS in text and "## Verdict in full\n\nreproduced\n\n" in text
    assert text.index(EXPECTED_CLAIMS) < text.index("![squares](squares.png)\n\n*Squares grow. Lines: means;")
    assert text.index("(squares.png)") < text.index("## Claim and rule") < text.index("## All numbers")
    assert "1. numbers instead of models\n2. squares instead of accuracies" in text
    assert "### By number" in text
    assert "Claim    the mean square is above 1." in text
    assert "seeds 0, 1" in text and "commit 0123456789," in text
    assert (folder / "squares.png").stat().st_size < 150_000


def test_smoke_never_gives_a_verdict(experiment, results_dir):
    text = (start(experiment, results_dir, "smoke") / "README.md").read_text()
    assert "no verdict at smoke scale" in text and "| reproduced " not in text
    assert (
        "| Table 1          | the mean square is above 1 | 81.9          | not measured | not run at this scale |"
        in text
    )


def test_rows_may_differ_in_keys_and_hold_tensors(experiment, results_dir, monkeypatch):
    rows = [
        {"seed": 0, "method": "none", "number": 1, "value": torch.tensor(1 / 3)},
        {"seed": 1, "number": 2, "value": float("nan"), "parameters": 1_234_567},
    ]
    monkeypatch.setattr(Experiment, "script", experiment.script)
    folder = start(dataclasses.replace(experiment, measure=lambda settings, context: rows), results_dir)
    written = (folder / "data.csv").read_text()
    assert written == "seed,method,number,value,parameters\n0,none,1,0.333333,\n1,,2,,1234567\n"
    assert load(folder).method.tolist()[0] == "none"


@pytest.mark.parametrize("part", ["measure", "draw", "compare", "verdict", "claims"])
def test_a_failing_run_leaves_the_previous_result_as_it_was(folder, experiment, results_dir, monkeypatch, part):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*inputs):
        raise RuntimeError("stopped")

    monkeypatch.setattr(Experiment, "script", experiment.script)
    with pytest.raises(RuntimeError, match="stopped"):
        start(dataclasses.replace(experiment, **{part: fail}), results_dir)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    rows = set() if part == "measure" else {folder.with_name(".workstation-rows.csv")}  # what was measured is kept
    assert set(folder.parent.iterdir()) == {folder, folder.parent / "README.md"} | rows
    assert check(results_dir) == []


def test_a_mistake_in_a_figure_costs_no_rows(experiment, results_dir, monkeypatch):
    def fail(data):
        raise RuntimeError("no such column")

    monkeypatch.setattr(Experiment, "script", experiment.script)
    with pytest.raises(RuntimeError, match="no such column") as caught:
        start(dataclasses.replace(experiment, draw=fail), results_dir)
    kept = results_dir / "90_squares" / ".workstation-rows.csv"
    assert str(kept) in caught.value.__notes__[0]
    table = (start(experiment, results_dir) / "data.csv").read_text()
    assert table.startswith("seed,method,number") and not kept.exists()


def test_a_run_killed_while_it_writes_is_visibly_unfinished(folder, experiment, results_dir, monkeypatch):
    replace = results.os.replace

    def killed(source, target):
        if Path(target).name == "squares.png":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(results.os, "replace", killed)
    with pytest.raises(SystemExit, match="130"):
        start(experiment, results_dir)
    assert "90_squares/workstation: unfinished (no provenance.json)" in check(results_dir)


def test_no_rows_are_an_error(experiment, results_dir, monkeypatch):
    monkeypatch.setattr(Experiment, "script", experiment.script)
    with pytest.raises(ValueError, match="yielded no rows"):
        start(dataclasses.replace(experiment, measure=lambda settings, context: []), results_dir)
    assert not results_dir.exists()


def test_verify_passes_on_what_a_run_wrote(folder, experiment, results_dir, capsys):
    start(experiment, results_dir, "laptop")
    assert check(results_dir) == []
    with pytest.raises(SystemExit) as stop:
        verify(results_dir, results_dir.parent / "experiments")
    assert stop.value.code == 0 and capsys.readouterr().out.endswith("2 results verified\n")


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("README.md", "1.833 ± 0.24", "9.833 ± 0.24", "workstation/README.md:"),
        ("README.md", "full\n\nreproduced", "full\n\nproved", "workstation/README.md:"),
        ("data.csv", "square,4\n", "square,5\n", "workstation/provenance.json: data.csv is not the one"),
        ("data.csv", "square,4\n", "square,5\n", "workstation/README.md:"),
        ("data.csv", "value", "number2", "90_squares/workstation: "),
        ("provenance.json", '"verdict": "reproduced"', '"verdict": "proved"', "its verdict does not follow"),
        ("provenance.json", '"dirty": false', '"dirty": true', "uncommitted changes"),
        ("provenance.json", '"partial": false', '"partial": true', "a partial run"),
        ("provenance.json", '"scale": "workstation"', '"scale": "laptop"', "in the folder workstation"),
        ("provenance.json", '"ours": "4.2 ± 0.2', '"ours": "5.2 ± 0.2', "its claims do not follow"),
        ("provenance.json", '"caption": "Squares grow', '"caption": "Squares sink', "its lead does not follow"),
        ("../../README.md", "**reproduced**", "**certain**", "README.md:9: found"),
        ("../README.md", "| workstation |", "| laptop      |", "90_squares/README.md:"),
        ("../../squares.md", "1", "2", "squares.md:1: found '2', expected '1'"),
    ],
)
def test_verify_names_a_hand_edit(folder, results_dir, file, old, new, complaint):
    edit(folder / file, old, new)
    assert any(complaint in line for line in check(results_dir)), check(results_dir)


def test_verify_prints_each_problem_and_exits_with_1(folder, results_dir, capsys):
    edit(folder / "README.md", "| reproduced", "| confirmed")
    with pytest.raises(SystemExit) as stop:
        verify(results_dir, results_dir.parent / "experiments")
    assert stop.value.code == 1 and "90_squares/workstation/README.md:7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file", ["README.md", "squares.png", "data.csv", "provenance.json", "../README.md", "../../README.md"]
)
def test_verify_misses_a_deleted_file(folder, results_dir, file):
    (folder / file).unlink()
    assert check(results_dir)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("Settings(seeds=(0, 1))", "Settings(seeds=(0, 1, 2))", "settings hash"),
        ("count: int = 3", "count: int = 4", "measured with count = 3, but workstation has 4 today"),
        ("above 1, else", "above 2, else", "README.md:"),
        ("EXPERIMENT = Exp", "OTHER = Exp", "defines no EXPERIMENT"),
    ],
)
def test_verify_sees_a_script_that_moved_on(folder, script, results_dir, old, new, complaint):
    edit(script, old, new)
    assert any(complaint in line for line in check(results_dir)), check(results_dir)


def test_a_new_setting_with_a_default_voids_nothing(folder, script, results_dir):
    edit(script, "    shift: float = 0.0\n", "    shift: float = 0.0\n    added: int = 7\n")
    assert check(results_dir) == []


NESTED = """
@dataclass(frozen=True)
class Rate:
    value: float = 0.1


@dataclass(frozen=True)
class Recipe:
    steps: int = 5
    rates: tuple[Rate, ...] = (Rate(), Rate(0.2))


@dataclass(frozen=True)
class Settings:
    recipe: Recipe = Recipe()
"""


@pytest.fixture(params=["Settings(", "Settings(recipe=Recipe(steps=6), "], ids=["default recipe", "own recipe"])
def nested(script, results_dir, clean, request):
    """A workstation result of a script whose settings hold a recipe, which holds rates."""
    edit(script, "@dataclass(frozen=True)\nclass Settings:\n", NESTED.lstrip("\n"))
    edit(script, '"workstation": Settings(', f'"workstation": {request.param}')
    start(load_experiment(script), results_dir)
    assert check(results_dir) == []
    return script


@pytest.mark.parametrize("place", ["    steps: int = 5\n", "    value: float = 0.1\n"], ids=["recipe", "rate"])
def test_a_new_nested_setting_counts_as_having_been_at_its_default(nested, results_dir, place):
    edit(nested, place, f"{place}    added: tuple[int, ...] = (7,)\n")
    assert check(results_dir) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("steps: int = 5\n", "steps: int = 5\n    added: int = 7\n", "recipe.added = (not recorded)"),
        ("value: float = 0.1\n", "value: float = 0.1\n    added: int = 7\n", "measured with recipe"),
        ("value: float = 0.1\n", "value: float = 0.3\n", "measured with recipe"),
    ],
)
def test_a_new_nested_setting_that_is_not_at_its_default_voids_the_result(nested, results_dir, old, new, complaint):
    edit(nested, old, new)
    if "added" in new:
        text = nested.read_text()
        text = text.replace("recipe: Recipe = Recipe()", "recipe: Recipe = Recipe(added=8)")
        text = text.replace("Recipe(steps=6)", "Recipe(steps=6, added=8)")
        if "value" in old:
            text = text.replace("Recipe(added=8)", "Recipe(rates=(Rate(added=8), Rate(0.2)))")
            text = text.replace("steps=6, added=8", "steps=6, rates=(Rate(added=8), Rate(0.2))")
        nested.write_text(text)
    assert any(complaint in line for line in check(results_dir)), check(results_dir)


@pytest.mark.parametrize("setting", ["steps", "rates"])
def test_a_nested_setting_that_is_gone_or_another_voids_the_result(nested, results_dir, setting):
    facts = results_dir / "90_squares" / "workstation" / "provenance.json"
    recorded = json.loads(facts.read_text())
    recorded["settings"]["recipe"] |= {"steps": 4} if setting == "steps" else {"gone": 1}
    facts.write_text(json.dumps(recorded))
    found = "recipe.steps = 4, but workstation has" if setting == "steps" else "recipe.gone = 1, but workstation has"
    assert any(f"measured with {found}" in line for line in check(results_dir)), check(results_dir)


def test_verify_wants_the_script(folder, script, results_dir):
    script.unlink()
    assert any("there is no script 90_squares.py" in line for line in check(results_dir))


def test_partial_runs_are_no_business_of_verify(experiment, results_dir, folder):
    run(experiment, ["--results-dir", str(results_dir), "--device", "cpu", "--scale", "smoke", "--count", "1"])
    assert check(results_dir) == []


def test_render_follows_a_change_of_wording_without_a_rerun(folder, script, results_dir):
    edit(script, "squares instead of accuracies", "squares, not accuracies")
    edit(script, '{"squares": ', '{"parabola": ')
    assert check(results_dir)
    render(results_dir, script.parent)
    assert check(results_dir) == []
    assert (folder / "parabola.png").is_file() and not (folder / "squares.png").exists()


def test_render_refuses_an_edited_table(folder, script, results_dir):
    edit(folder / "data.csv", "square,4\n", "square,5\n")
    with pytest.raises(SystemExit, match="not the one that was measured"):
        render(results_dir, script.parent)
    assert "1.833" in (folder / "README.md").read_text()


def test_headline_shows_the_committed_numbers_beside_the_new_ones(folder, experiment, script, results_dir, capsys):
    def git(*words: str) -> None:
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
        subprocess.run(["git", "-C", str(results_dir.parent), *identity, *words], check=True, capture_output=True)

    git("init")
    headline("90_squares", "workstation", results_dir, script.parent)
    assert "nothing committed at HEAD" in capsys.readouterr().out
    git("add", ".")
    git("commit", "-m", "results")
    edit(folder / "data.csv", "square,4\n", "square,10\n")
    headline("90_squares", "workstation", results_dir, script.parent)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["quantity", "HEAD", "now", "difference"] in lines
    assert ["largest square", "4.333", "10.00", "5.667"] in lines


@pytest.mark.parametrize(
    ("name", "said"), [("99", "there is no experiment '99'; there are"), ("", "holds no data.csv")]
)
def test_headline_of_nothing_is_one_line(name, said, experiment, tmp_path):
    """A name that is none, and a folder in which nothing was measured."""
    with pytest.raises(SystemExit, match=said):
        headline(name or experiment.name, "laptop", tmp_path, experiment.script.parent, tmp_path / "nope")


def test_headline_takes_new_numbers_from_another_folder_and_says_what_the_rule_needs(experiment, tmp_path, capsys):
    """What `make reproduce` prints at its end, of a scale at which the rule does not judge."""
    results, new = tmp_path / "results", tmp_path / ".reproduced"
    results.mkdir()
    facts = dict(scale="laptop", partial=False, settings_hash="0" * 16, seeds=[0], seconds={"total": 1.0}, jobs=1)
    rows = [dict(seed=0, method="none", number=3, metric="square", value=9.0)]
    facts |= dict(experiment=experiment.name, device="cpu", commit="0" * 40, dirty=False, date="2026-01-01")
    write(new, experiment, rows, facts)
    headline(experiment.name, "laptop", results, experiment.script.parent, new)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| largest square") and "9" in line for line in lines)
    assert lines[-1] == "Verdict: not run at this scale. Measured; the rule needs more: with 2 seeds."
    assert list(results.iterdir()) == []


def test_the_list_says_what_is_done_stale_and_missing(folder, experiment, script, results_dir, capsys):
    listing(results_dir, script.parent)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "90_squares  Squares of small numbers (no figure of any paper)."
    assert lines[1].split() == ["laptop", "missing"] and lines[3].split() == ["paper", "missing"]
    assert re.fullmatch(r"    workstation  done \(0 s, 1 process, \d{4}-\d\d-\d\d\)", lines[2])
    assert lines[4].split() == ["cost", "nothing."]
    script.write_text(script.read_text().replace("Settings(seeds=(0, 1))", "Settings(count=4, seeds=(0, 1))"))
    (results_dir / "90_squares" / "laptop").mkdir()
    listing(results_dir, script.parent)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["laptop", "unfinished"] and "stale: settings hash" in lines[2]


def test_a_comparison_needs_its_columns_and_one_row_a_quantity(experiment, folder):
    data = load(folder)
    lacking = dataclasses.replace(experiment, compare=lambda data, published: pd.DataFrame({"quantity": ["a"]}))
    with pytest.raises(ValueError, match=r"lacks the columns \['paper'"):
        report.comparison(lacking, data)
    twice = dataclasses.replace(experiment, compare=lambda *given: pd.concat([experiment.compare(*given)] * 2))
    with pytest.raises(ValueError, match="twice"):
        report.comparison(twice, data)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (81.9, 4, "81.90"),
        (1027.44, 4, "1027"),
        (0.01234567, 4, "0.01235"),
        (999.97, 4, "1000"),
        (float("nan"), 4, "–"),
        (-3.14159, 3, "-3.14"),
        (0.0, 2, "0.0"),
        (float("inf"), 4, "inf"),
    ],
)
def test_numbers_have_significant_digits(value, digits, text):
    assert report.number(value, digits) == text


def test_published_tables_load_and_verify(tmp_path):
    table = published("merging")
    row = table.query("merger == 'task_arithmetic' and svc == 'output' and backbone == 'ViT-B/32'")
    assert row.value.tolist() == [81.9]
    with pytest.raises(ValueError, match=r"no published table 'mergin'.*merging"):
        published("mergin")
    shutil.copytree(report.PUBLISHED_FOLDER, tmp_path / "published")
    assert problems(tmp_path, tmp_path) == []
    edit(tmp_path / "published" / "merging.csv", "backbone", "model")
    edit(tmp_path / "published" / "sparsity.csv", ",36,", ",,")
    (tmp_path / "published" / "other.csv").write_text("a,b\n1,2\n")
    assert sorted(line.split(":")[0] for line in problems(tmp_path, tmp_path)) == [
        "published/merging.csv", "published/other.csv", "published/sparsity.csv",
    ]  # fmt: skip


def test_a_script_without_a_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no script"):
        load_experiment(tmp_path / "experiments" / "91_absent.py")


def test_provenance_is_plain_json(folder):
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["experiment"] == "90_squares" and facts["seeds"] == [0, 1]
    assert list(facts)[-2:] == ["claims", "lead"]
    assert facts["lead"] == {"figure": "squares", "caption": "Squares grow. Lines: means; bands: ± sd; points: seeds."}


def test_remarks_are_written_from_the_table(experiment, tmp_path, clean):
    said = dataclasses.replace(experiment, remarks=lambda data: f"The largest is\n{data.value.max():g}.\n\nNo more.")
    folder = run(said, ["--scale", "laptop", "--jobs", "1", "--results-dir", str(tmp_path / "results")])
    text = (folder / "README.md").read_text()
    assert "## In words\n\nThe largest is 4.\n\nNo more.\n\n" in text


def long(experiment, known: int) -> Experiment:
    """The experiment with a comparison of twenty quantities, of which some have a published number."""

    def compare(data, published):
        rows = [dict(quantity=f"q{i}", ours=i + 0.5, sd=0.1, n=2, same_setting=i % 2 == 0) for i in range(20)]
        return pd.DataFrame(rows).assign(paper=[float(i) if i < known else None for i in range(20)])

    return dataclasses.replace(experiment, compare=compare)


def test_a_long_comparison_is_a_file_and_a_figure(experiment, results_dir, clean, monkeypatch):
    monkeypatch.setattr(Experiment, "script", experiment.script)
    folder = start(long(experiment, known=16), results_dir)
    text = (folder / "README.md").read_text()
    assert "All 20 quantities, with sd and n: [comparison.csv](comparison.csv)." in text and "| q1 " not in text
    assert (folder / f"{report.BESIDE}.png").is_file() and f"({report.BESIDE}.png)" in text
    lines = (folder / "comparison.csv").read_text().splitlines()
    assert (
        lines[0] == "quantity,paper,ours,sd,n,same_setting" and lines[3] == "q2,2,2.5,0.1,2,True" and len(lines) == 21
    )


def test_of_a_long_comparison_with_few_published_numbers_those_are_shown(experiment, results_dir, clean, monkeypatch):
    monkeypatch.setattr(Experiment, "script", experiment.script)
    folder = start(long(experiment, known=2), results_dir)
    text = (folder / "README.md").read_text()
    assert "| q0         | 0       | 0.5000 ± 0.10 | 2   | +0.500       | yes             |" in text
    assert "| q1         | 1       | 1.500 ± 0.10  | 2   |              | no              |" in text  # another setting
    assert "| q2 " not in text and not (folder / f"{report.BESIDE}.png").exists()


def test_a_comparison_that_is_edited_or_left_over_is_found(folder, results_dir):
    (folder / "comparison.csv").write_text("quantity\n")
    assert any("workstation/comparison.csv:1: found 'quantity'" in line for line in check(results_dir))
    render(results_dir, results_dir.parent / "experiments")
    assert not (folder / "comparison.csv").exists() and check(results_dir) == []


def test_a_long_table_is_folded(experiment, folder):
    many = dataclasses.replace(experiment, tables=lambda data: {"Many": pd.DataFrame({"x": range(16)})})
    data, facts = load(folder), json.loads((folder / "provenance.json").read_text())
    text = report.readme(many, data, facts, report.drawn(many, data))
    assert "### Many\n\n<details>\n<summary>16 rows</summary>\n\n| x   |\n" in text


def test_the_figure_that_opens_the_page_is_one_that_is_drawn(experiment, folder):
    data = load(folder)
    two = dataclasses.replace(
        experiment, draw=lambda data: experiment.draw(data) | {"cubes": experiment.draw(data)["squares"]}
    )
    assert list(report.drawn(dataclasses.replace(two, lead="cubes"), data)) == ["cubes", "squares"]
    with pytest.raises(ValueError, match="lead is 'roots', but the figures are squares"):
        report.drawn(dataclasses.replace(experiment, lead="roots"), data)


def test_an_experiment_states_one_to_four_claims(experiment, folder):
    data = load(folder)
    for count in (0, 5):
        stated = dataclasses.replace(experiment, claims=lambda data, count=count: experiment.claims(data)[:1] * count)
        with pytest.raises(ValueError, match=f"one to 4 claims, got {count}"):
            stated.answers(data)
