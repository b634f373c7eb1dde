"""A small experiment, written as a script of its own, in a folder that is laid out as a clone is."""

from pathlib import Path

import pytest

from common.lab.results import load_experiment

SCRIPT = '''\
"""Squares of small numbers (no figure of any paper).

Claim    the mean square is above 1.
Verdict  with 2 seeds (else "not run at this scale"): "reproduced" if the mean is above 1, else "not reproduced".
Cost     nothing.
"""
from dataclasses import dataclass

import pandas as pd

from common.lab import figures
from common.lab.claims import NOT_RUN, Claim, measured, word
from common.lab.run import Experiment, run


@dataclass(frozen=True)
class Settings:
    count: int = 3          # how many numbers
    seeds: tuple[int, ...] = (0,)
    shift: float = 0.0


SCALES = {
    "smoke": Settings(count=2),
    "laptop": Settings(),
    "workstation": Settings(seeds=(0, 1)),
    "paper": Settings(count=9, seeds=(0, 1)),
}


def square(item):
    number, shift = item
    return (number + shift) ** 2


def measure(settings, context):
    with context.stage("squares"):
        items = [(number, settings.shift) for number in range(settings.count)]
        values = context.map(square, items, "squares")
    for seed in settings.seeds:
        for number, value in enumerate(values):
            yield dict(seed=seed, method="none", number=number, metric="square", value=value + seed / 3)


def draw(data):
    return {"squares": figures.lines(data, x="number")}


def compare(data, published):
    means = data.groupby("seed").value.mean()
    rows = [
        dict(quantity="mean square", paper=81.9, ours=means.mean(), sd=means.std(), n=len(means), same_setting=False),
        dict(quantity="largest square", paper=None, ours=data.value.max(), sd=None, n=1, same_setting="a | b"),
    ]
    return pd.DataFrame(rows)


def tables(data):
    return {"By number": data.pivot_table(index="number", columns="seed", values="value").reset_index()}


def verdict(data):
    if data.seed.nunique() < 2:
        return "not run at this scale"
    return "reproduced" if data.value.mean() > 1 else "not reproduced"


def claims(data):
    squares = data[data.number == 2].value
    return [
        Claim("Table 1", "the mean square is above 1", "81.9", measured(squares), word(verdict(data))),
        Claim("not in the paper", "the largest square", "not published", measured(squares.iloc[:1]), NOT_RUN),
    ]


EXPERIMENT = Experiment(
    __doc__, SCALES, measure, draw, compare, verdict, published="merging", tables=tables, claims=claims,
    captions={"squares": "Squares grow."}, pages={"squares.md": lambda folder: str(len(list(folder.glob("9*"))))},
    deviations=("numbers instead of models", "squares instead of accuracies"),
)

if __name__ == "__main__":
    run(EXPERIMENT)
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script experiments/90_squares.py in a folder of the test's own."""
    path = tmp_path / "experiments" / "90_squares.py"
    path.parent.mkdir()
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.fixture
def experiment(script):
    return load_experiment(script)


@pytest.fixture
def clean(monkeypatch):
    """Let runs believe that they come from a clean commit."""
    monkeypatch.setattr("common.lab.run.git_state", lambda: {"commit": "0123456789abcdef", "dirty": False})
