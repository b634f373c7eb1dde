"""Timing takes turns, peak memory is what a call adds to its inputs, and a command's memory is its own."""

import sys
from functools import partial

import pytest
import torch

from common.lab.benchmark import interleaved_seconds, peak_mib, profile_module, run_command

CPU = torch.device("cpu")
MIB = 2**18  # float32 numbers


def test_contenders_take_turns():
    called = []
    contenders = {name: partial(called.append, name) for name in "ab"}
    found = list(interleaved_seconds(contenders, 3, CPU))
    assert called == ["a", "b"] * 3
    assert [(repeat, name) for repeat, name, _ in found] == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert all(seconds >= 0 for *_, seconds in found)


def test_peak_counts_what_was_freed_again_and_the_result_but_not_the_inputs():
    torch.ones(300 * MIB).sum()  # this process's own peak is not the fresh one's
    peak = peak_mib(lambda: torch.ones(200 * MIB), lambda inputs: torch.ones(100 * MIB).cumsum(0)[-1:].clone(), CPU, 1)
    assert 195 < peak < 260, peak
    kept = peak_mib(lambda: torch.ones(200 * MIB), lambda inputs: torch.ones(64 * MIB), CPU, 1)
    assert 60 < kept < 110, kept


def test_threads_are_those_asked_for():
    def check(inputs):
        assert torch.get_num_threads() == 3

    peak_mib(lambda: None, check, CPU, 3)


def test_a_command_is_charged_what_it_takes_itself(tmp_path):
    held = torch.ones(300 * MIB)  # of this process, from which the command descends
    file = tmp_path / "file"
    file.write_bytes(bytes(80 * 2**20))
    script = (
        "import mmap, sys, time; filled = b'1' * (100 * 2**20); time.sleep(0.5);"  # or the sampling might miss it
        "del filled; filled = b'1' * (50 * 2**20);"
        "file = open(sys.argv[1], 'r+b'); mapped = mmap.mmap(file.fileno(), 0); sum(mapped[::4096]); time.sleep(0.3)"
    )
    used = run_command([sys.executable, "-c", script, file], threads=1)
    assert 135 < used.peak_mib < 180, used  # 50 filled + 80 mapped; what was freed in between is used again
    assert 95 < used.anonymous_mib < 130, used
    assert 0.8 < used.seconds < 20
    assert held.sum() == 300 * MIB


def test_a_command_gets_its_threads():
    script = "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '3')"
    run_command([sys.executable, "-c", script], threads=3)


def test_a_failing_command_is_named_with_its_last_line():
    script = "import sys; print('reading'); print('no such model\\n', file=sys.stderr); sys.exit(3)"
    with pytest.raises(ChildProcessError, match=r"python.* ended with status 3: no such model$"):
        run_command([sys.executable, "-c", script], threads=1)


def test_a_profile_tells_where_the_seconds_of_a_module_go(tmp_path, monkeypatch):
    lines = ("import sys, time", "time.sleep(0.3)", "('word ' * 20_000_000).split()", "assert sys.argv[1] == 'given'")
    (tmp_path / "work.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = profile_module("work", ["given"], {"waiting": r"time\.sleep", "splitting": r"'split' of 'str'"}, threads=1)
    assert list(found) == ["waiting", "splitting", "rest"]
    assert 0.29 < found["waiting"] < 0.6 and found["splitting"] > 0.1, found
