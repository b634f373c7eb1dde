"""Progress bars in a log: few whole lines, and nothing of it on a terminal or afterwards."""

import itertools
import sys

import pytest
from tqdm import tqdm

from common import progress
from common.progress import log_bars


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    monkeypatch.setattr("tqdm.std.time", itertools.count(1000.0).__next__)


def test_a_log_gets_a_whole_line_in_thirty_seconds(clock, capsys):
    with log_bars():
        assert list(tqdm(range(100), "train", leave=False)) == list(range(100))
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text and text.endswith("\n")
    assert 100 / progress.EVERY - 1 <= len(lines) <= 100 / progress.EVERY + 1  # the clock is read elsewhere, too
    assert all(line.startswith("train: ") and "/100" in line for line in lines)


def test_a_short_bar_says_nothing(clock, capsys):
    with log_bars():
        for _ in tqdm(range(5), "outer"):
            list(tqdm(range(2), "inner", leave=False))
    assert capsys.readouterr().err.count("inner") == 0


def test_a_bar_by_hand_and_a_nested_one_are_lines_too(clock, capsys):
    with log_bars(), tqdm(total=90, unit="B") as bar:
        for _ in range(90):
            bar.update(1)
            list(tqdm(range(1), "inner", leave=False))
    lines = capsys.readouterr().err.splitlines()
    assert lines and all("/90" in line for line in lines)


def test_a_terminal_keeps_its_bars(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with log_bars():
        list(tqdm(range(100), "train"))
    assert capsys.readouterr().err.count("\r") > 50


def test_afterwards_tqdm_is_as_it_was(capsys):
    before = tqdm.__init__
    with pytest.raises(KeyError), log_bars():
        raise KeyError
    assert tqdm.__init__ is before
