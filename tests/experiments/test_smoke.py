"""Every experiment runs end to end at smoke scale, by path, as a user would run it; one of each paper in processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.lab.results import load, load_experiment, problems

ROOT = Path(__file__).resolve().parents[2]
TWO_PROCESSES = ("03_vit_from_scratch", "22_vision_merging")  # a second process costs each script seconds of imports
SCRIPTS = sorted((ROOT / "experiments").glob("[0-9]*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_smoke(script, tmp_path):
    jobs = "2" if script.stem in TWO_PROCESSES else "1"
    flags = ["--scale", "smoke", "--device", "cpu", "--jobs", jobs, "--results-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no verdict at smoke scale" in done.stdout

    folder = tmp_path / script.stem / "smoke"
    facts = json.loads((folder / "provenance.json").read_text())
    data = load(folder)
    assert not facts["partial"] and facts["scale"] == "smoke" and "seed" in data
    figures = load_experiment(script).draw(data)
    assert figures and all((folder / f"{stem}.png").stat().st_size < 150_000 for stem in figures)
    # derived again from its own table; that a checkout under development is "dirty" does not matter here
    assert [line for line in problems(tmp_path) if "dirty" not in line] == []
