"""The runner: flags, partial runs, the settings' hash, parallel processes, stages, provenance."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common import cache
from common.lab.results import load, settings_hash
from common.lab.run import BadFlag, Context, Experiment, find_device, git_state, parse, run


def start(experiment, results_dir: Path, *flags: str) -> Path:
    return run(experiment, ["--results-dir", str(results_dir), "--device", "cpu", "--jobs", "1", *flags])


def context(jobs: int = 2) -> Context:
    return Context(settings=None, device=torch.device("cpu"), jobs=jobs, threads=2)


def test_settings_of_the_scale_go_to_its_folder_and_others_to_a_partial_sibling(experiment, tmp_path):
    full = start(experiment, tmp_path, "--scale", "workstation")
    before = {file.name: file.read_bytes() for file in full.iterdir()}
    partial = start(experiment, tmp_path, "--scale", "workstation", "--shift", "2")

    assert full == tmp_path / "90_squares" / "workstation"
    assert partial.parent == full.parent and partial.name.startswith("workstation-partial-")
    assert {file.name: file.read_bytes() for file in full.iterdir()} == before
    facts = json.loads((partial / "provenance.json").read_text())
    assert facts["partial"] and facts["settings"] == {"count": 3, "seeds": [0, 1], "shift": 2.0}
    assert partial.name.endswith(facts["settings_hash"][:8])
    assert "Partial run" in (partial / "README.md").read_text()
    assert "no evidence" in facts["verdict"]
    assert "partial" not in (tmp_path / "README.md").read_text()


def test_a_flag_that_repeats_the_scales_value_is_no_partial_run(experiment, tmp_path):
    assert start(experiment, tmp_path, "--scale", "workstation", "--seeds", "0", "1").name == "workstation"


def test_flags_begin_from_the_settings_of_the_scale(experiment):
    flags, settings = parse(experiment, ["--scale", "paper", "--seeds", "4", "5"])
    assert flags.scale == "paper"
    assert settings == dataclasses.replace(experiment.scales["paper"], seeds=(4, 5))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--scale", "huge"], "huge"),
        (["--seeds", "a"], "--seeds"),
        (["--seeds"], "--seeds"),
        (["--cuont", "3"], "--cuont"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(experiment, flags, named):
    with pytest.raises(BadFlag) as error:
        parse(experiment, flags)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_the_runner_prints_one_line_for_a_bad_flag(experiment, capsys):
    with pytest.raises(SystemExit) as stop:
        run(experiment, ["--device", "abacus"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "abacus" in lines[0]


def test_a_missing_accelerator_is_one_clear_line():
    with pytest.raises(BadFlag, match=r"--device cuda:99: .* cuda devices"):
        find_device("cuda:99")


def test_help_prints_the_docstring_and_each_setting(experiment, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(experiment, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert experiment.doc.strip() in text
    assert "--count" in text and "how many numbers" in text and "--results-dir" in text


def test_the_hash_covers_only_fields_that_differ_from_the_defaults():
    short = dataclasses.make_dataclass("Settings", [("steps", int, 10), ("seeds", tuple, (0,))], frozen=True)
    added = ("added", list, dataclasses.field(default_factory=list))
    longer = dataclasses.make_dataclass("Settings", [("steps", int, 10), ("seeds", tuple, (0,)), added])
    assert settings_hash(short()) == settings_hash(longer())
    assert settings_hash(short(steps=20)) == settings_hash(longer(steps=20))
    assert settings_hash(short(steps=20)) != settings_hash(short())
    assert settings_hash(longer(added=[1])) != settings_hash(longer())


def test_experiments_are_checked_when_they_are_defined(experiment):
    with pytest.raises(ValueError, match="scales must be"):
        dataclasses.replace(experiment, scales={"laptop": experiment.scales["laptop"]})
    unseeded = dataclasses.make_dataclass("Settings", [("count", int, 1)])
    with pytest.raises(ValueError, match="seeds"):
        dataclasses.replace(experiment, scales={name: unseeded() for name in experiment.scales})
    taken = dataclasses.make_dataclass("Settings", [("seeds", tuple, (0,)), ("device", str, "cpu")])
    with pytest.raises(ValueError, match="device"):
        parse(dataclasses.replace(experiment, scales={name: taken() for name in experiment.scales}), [])


def work(item: int) -> tuple[int, int, int]:
    """Return item, process and threads; later items finish first, and each leaves a record in the artefact cache's."""
    time.sleep(0.05 * (3 - item))
    cache.RECORDS.append({"kind": "test", "key": str(item), "hit": item % 2 == 0})
    return item, os.getpid(), torch.get_num_threads()


def test_map_runs_in_processes_keeps_the_order_and_brings_cache_records_back(monkeypatch):
    monkeypatch.setattr(cache, "RECORDS", [])
    found = context(jobs=2).map(work, range(4), "work")
    assert [item for item, _, _ in found] == [0, 1, 2, 3]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {1}
    assert sorted(record["key"] for record in cache.RECORDS) == ["0", "1", "2", "3"]


def test_map_runs_here_with_one_job_or_one_item(monkeypatch):
    monkeypatch.setattr(cache, "RECORDS", [])
    assert {process for _, process, _ in context(jobs=1).map(work, range(2), "work")} == {os.getpid()}
    assert context(jobs=2).map(work, [3], "work")[0][1] == os.getpid()
    assert context(jobs=2).map(work, [], "work") == []


def inverse(number: float) -> float:
    return 1 / number


def test_an_exception_in_a_process_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        context(jobs=2).map(inverse, [1, 0], "divide")


def test_stages_add_up_under_their_name():
    here = context()
    for _ in range(2):
        with here.stage("first"):
            pass
    with pytest.raises(KeyError), here.stage("second"):
        raise KeyError
    assert list(here.seconds) == ["first", "second"] and min(here.seconds.values()) >= 0


def test_a_script_runs_by_path_with_processes_for_functions_of_its_own(script, tmp_path):
    command = [sys.executable, str(script), "--device", "cpu", "--jobs", "2", "--results-dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Verdict: not run at this scale. Measured; the rule needs more: with 2 seeds.\n" in done.stdout
    assert "not published" in done.stdout
    assert "\r" not in done.stderr  # no states of bars in a log
    assert re.fullmatch(r"squares: \d+\.\d s", done.stderr.splitlines()[-1])
    folder = tmp_path / "out" / "90_squares" / "laptop"
    assert load(folder).value.tolist() == [0, 1, 4]
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["arguments"] == command[2:]
    assert facts["jobs"] == 2 and {"squares", "total"} <= facts["seconds"].keys()
    assert {"python", "torch", "numpy"} <= facts["versions"].keys()


SLOW = '''\
"""Waits until it is interrupted."""
import os
import time
from dataclasses import dataclass
from common.lab.run import Experiment, run


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)


def wait(item):
    print(os.getpid(), flush=True)
    time.sleep(600)


def measure(settings, context):
    yield from context.map(wait, range(4), "wait")


EXPERIMENT = Experiment(
    __doc__, dict.fromkeys(("smoke", "laptop", "workstation", "paper"), Settings()), measure, None, None, None
)

if __name__ == "__main__":
    run(EXPERIMENT)
'''


@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_run_ends_in_one_line_and_leaves_no_process(jobs, tmp_path):
    (tmp_path / "91_slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "91_slow.py"), "--device", "cpu", "--jobs", str(jobs)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes, cwd=tmp_path, start_new_session=True) as process:
        working = [int(process.stdout.readline()) for _ in range(jobs)]
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        try:
            _, said = process.communicate(timeout=120)
        finally:  # or the tests would wait for it
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert said == "interrupted; the same command goes on from what is finished\n"
    deadline = time.monotonic() + 10
    while alive := [one for one in working if _runs(one)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.1)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.is_file() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_provenance_names_each_artefact_as_hit_or_built(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RECORDS", [{"kind": "base", "key": "old", "hit": True}])

    def measure(settings, context):
        asked = (("a", False), ("a", True), ("b", True))
        cache.RECORDS.extend({"kind": "expert", "key": key, "hit": hit} for key, hit in asked)
        return experiment.measure(settings, context)

    monkeypatch.setattr(Experiment, "script", experiment.script)
    folder = start(dataclasses.replace(experiment, measure=measure), tmp_path)
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["cache_hits"] == ["expert/b"] and facts["cache_built"] == ["expert/a"]


def test_an_unreachable_file_ends_in_one_line(experiment, tmp_path, monkeypatch, capsys):
    def measure(settings, context):
        raise ConnectionError("no connection to the hub:\nset HF_HOME to a filled cache")
        yield

    monkeypatch.setattr(Experiment, "script", experiment.script)
    with pytest.raises(SystemExit) as stop:
        start(dataclasses.replace(experiment, measure=measure), tmp_path)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no connection to the hub: set HF_HOME to a filled cache\n"


@pytest.mark.parametrize("error", [OSError("could not get source code"), FileNotFoundError("step-3.safetensors")])
def test_a_mistake_of_this_project_is_not_dressed_up_as_the_users(experiment, tmp_path, monkeypatch, error):
    def measure(settings, context):
        raise error
        yield

    monkeypatch.setattr(Experiment, "script", experiment.script)
    with pytest.raises(type(error), match=str(error)):
        start(dataclasses.replace(experiment, measure=measure), tmp_path)


def test_dirty_means_changes_outside_results(tmp_path, monkeypatch):
    monkeypatch.setattr("common.lab.results.ROOT", tmp_path)
    assert git_state() == {"commit": "unknown", "dirty": True}

    def git(*words: str) -> None:
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    (tmp_path / "code.py").write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "data.csv").write_text("1\n")
    state = git_state()
    assert len(state["commit"]) == 40 and not state["dirty"]
    (tmp_path / "code.py").write_text("2\n")
    assert git_state() == {**state, "dirty": True}
