"""What the command lines share: where nothing can be written, it is told before the work, and an error is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.command_line import one_line, why_not_writable

ROOT = Path(__file__).resolve().parents[2]
BOX = """\
╭─ Parsing error ──────────╮
│ Argument --rate: invalid │
│ choice 'x'               │
│ ──────────────────────── │
│ For full helptext, see   │
╰──────────────────────────╯
"""


@pytest.mark.parametrize("box", [BOX, BOX.translate(dict(zip(map(ord, "│╭╮╰╯─"), "     -", strict=True)))])
def test_a_box_becomes_one_line_without_its_advice(box):
    """Also as it is drawn where output is not UTF-8."""
    assert one_line(box) == "Argument --rate: invalid choice 'x'"


def test_a_folder_that_can_be_written_is_left_without_a_trace(tmp_path):
    assert why_not_writable(tmp_path) == "" and why_not_writable(tmp_path / "new" / "deep") == ""
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_the_reason_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert why_not_writable(tmp_path / "file" / "below") == f"{tmp_path / 'file'} is a file, in which no folder can be"
    if os.path.isdir("/proc"):  # where even root, who has every permission, can write nothing
        assert why_not_writable(Path("/proc/below")).startswith("nothing can be written there (")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a file system that takes no files")
def test_an_experiment_refuses_at_its_start_a_folder_that_it_could_not_write_at_its_end():
    script = ROOT / "experiments" / "22_vision_merging.py"
    command = [sys.executable, script, "--scale", "smoke", "--results-dir", "/proc/results"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: --results-dir /proc/results: nothing can be written there")
