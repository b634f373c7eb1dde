"""`make check-method`: nothing is lacking of what the tables hold, and what a careless addition lacks is named."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from merging import MERGERS, Merger, merger
from sparsity.activations import ACTIVATIONS

SCRIPT = Path(__file__).resolve().parent / "check_method.py"
CHECK = runpy.run_path(str(SCRIPT))


def lacking(name):
    return [what for word, what in CHECK["findings"](name) if word == "lacks"]


@pytest.mark.parametrize("name", [*MERGERS, *ACTIVATIONS])
def test_what_the_tables_hold_lacks_nothing(name):
    assert lacking(name) == []


def test_what_a_bare_function_lacks_is_named(monkeypatch):
    def median(task_vectors):
        return {name: torch.stack([task[name] for task in task_vectors]).median(0).values for name in task_vectors[0]}

    monkeypatch.setitem(MERGERS, "third_value", median)
    said = "\n".join(lacking("third_value"))
    words = ("a record", "same name", "docstring", "title", "colour", "__all__", "no task vectors", "a manual", "tests")
    assert [word for word in words if word not in said] == []
    assert any(word == "note" and "by_entry=True would" in what for word, what in CHECK["findings"]("third_value"))


def test_a_record_that_says_what_is_not_true_is_found(monkeypatch):
    whole = merger("tsv_m").merge
    monkeypatch.setitem(MERGERS, "third_value", Merger(whole, "Third value", "#123456", by_entry=True, published=True))
    said = "\n".join(lacking("third_value"))
    assert "by_entry=True with ranges" in said and "published=True" in said

    def spoilt(task_vectors):
        """Return the first task's update, and change it."""
        first = {name: tensor.add_(1) for name, tensor in task_vectors[0].items()}
        return {name: tensor.float() for name, tensor in first.items()}

    monkeypatch.setitem(MERGERS, "third_value", Merger(spoilt, "Third value", "#123456", by_entry=True, factored=True))
    said = "\n".join(lacking("third_value"))
    words = ("unchanged", "dtype of the updates", "these checks need: RuntimeError")  # float64 factors, float32 core
    assert [word for word in words if word not in said] == []


def test_an_activation_with_a_wrong_derivative_is_found(monkeypatch):
    class Steep(nn.Module):
        def forward(self, x):
            return x.clamp(min=0).float() ** 3

        def derivative(self, x):
            return 2 * x.clamp(min=0) ** 2

    monkeypatch.setitem(ACTIVATIONS, "steep", Steep)
    said = "\n".join(lacking("steep"))
    assert "dtype of x" in said and "autograd's" in said and "bfloat16" in said and "formula" in said


def test_an_unknown_name_is_one_line_that_says_where_it_belongs():
    command = [sys.executable, SCRIPT, "medain"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}  # as make does: tests/ has a merging too
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "medain" in done.stderr and "MERGERS" in done.stderr
