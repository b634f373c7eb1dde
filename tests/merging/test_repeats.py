"""Experts that change nothing, or are given twice, are merged, and that is said, once."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from models_on_disk import assert_close, experts_of, models, saved, state_of, weights

from merging.checkpoints import open_checkpoint
from merging.command import repeats
from merging.command.main import main
from merging.lowrank import LowRank
from merging.peft_files import Adapter, save_adapter

BASE = {"layers.0.mlp.weight": (12, 8), "layers.1.mlp.weight": (12, 8)}


def said(capsys, *flags):
    assert main(list(flags)) == 0
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def _itself(folder, other):
    return other


def _link(folder, other):
    folder.symlink_to(other)
    return str(folder)


def _hard_link(folder, other):
    shutil.copytree(other, folder, copy_function=os.link)
    return str(folder)


def _copy(folder, other):
    shutil.copytree(other, folder)
    return str(folder)


def _other_dtype(folder, other):
    return saved(folder, {name: tensor.double() for name, tensor in weights(other).items()})


@pytest.mark.parametrize("svc", [(), ("--svc", "--report")])
@pytest.mark.parametrize("again", [_itself, _link, _hard_link, _copy])
def test_the_base_among_the_experts_is_merged_and_said(tmp_path, again, svc, capsys):
    state = state_of()
    base, (expert,) = models(tmp_path, state, experts_of(state, 1))
    copy = again(tmp_path / "copy", base)
    flags = ["--base", base, "--experts", expert, copy, "--method", "weight_average", "--out", str(tmp_path / "out")]
    assert said(capsys, *flags, *svc) == [f"note: {copy}: is the base itself: {repeats.NOTHING}"]
    assert "is the base itself" in (tmp_path / "out" / "README.md").read_text()
    if not svc:
        expected = {name: (tensor + state[name]) / 2 for name, tensor in weights(expert).items()}
        assert_close(weights(tmp_path / "out"), expected)


@pytest.mark.parametrize("again", [_itself, _link, _hard_link, _copy])
def test_an_expert_that_is_given_twice_counts_twice_and_that_is_said(tmp_path, again, capsys):
    state = state_of()
    base, (first, second) = models(tmp_path, state, experts_of(state, 2))
    copy = again(tmp_path / "copy", first)
    flags = ["--base", base, "--experts", first, second, copy, "--method", "weight_average"]
    (note,) = said(capsys, *flags, "--out", str(tmp_path / "out"))
    words = "is given twice" if copy == first else f"is the same as {first}"
    assert note == f"note: {copy}: {words}: {repeats.TWICE}"
    once, other = weights(first), weights(second)
    assert_close(weights(tmp_path / "out"), {name: (2 * once[name] + other[name]) / 3 for name in once})


def test_values_in_other_files_are_found_where_sizes_are_measured(tmp_path, capsys):
    state = state_of()
    base, (first, second) = models(tmp_path, state, experts_of(state, 2))
    copies = [_other_dtype(tmp_path / name, other) for name, other in (("a", base), ("b", first))]
    flags = ["--base", base, "--experts", first, second, *copies, "--method", "weight_average"]
    assert said(capsys, *flags, "--out", str(tmp_path / "out")) == []
    assert said(capsys, *flags, "--report", "--out", str(tmp_path / "out2")) == [
        f"note: {copies[0]}: moved no tensor: {repeats.NOTHING}",
        f"note: {copies[1]}: moved every tensor as {first} did: {repeats.TWICE}",
    ]
    assert len(said(capsys, *flags, "--report-only", "--out", str(tmp_path / "out3"))) == 2
    assert "moved no tensor" in (tmp_path / "out2" / "report" / "index.html").read_text()


def test_models_that_differ_in_their_last_bytes_alone_are_no_copies(tmp_path, capsys):
    state = state_of(a=(300, 400), z=(300, 400))
    other = {name: tensor.clone() for name, tensor in state.items()}
    other["z.weight"][299, 200] += 1
    base, experts = models(tmp_path, state, [other, other])
    changed = weights(experts[1])
    changed["a.weight"][1, 1] += 1
    saved(Path(experts[1]), changed)
    flags = ["--base", base, "--experts", *experts, "--method", "weight_average", "--out", str(tmp_path / "out")]
    assert said(capsys, *flags) == []


def test_of_different_models_a_few_blocks_are_read(tmp_path, monkeypatch):
    state = state_of()
    base, experts = models(tmp_path, state, experts_of(state, 2))
    monkeypatch.setattr(repeats.filecmp, "cmp", lambda *_, **__: pytest.fail("read to the end"))
    assert repeats.repeats(experts, open_checkpoint(base), [open_checkpoint(each) for each in experts]) == {}


def lora(folder, up):
    save_adapter(Adapter("lora", {"layers.0.mlp.weight": LowRank(up, torch.ones(2, 8))}), folder, rank=2)
    return str(folder)


def ia3(folder, vector):
    save_adapter(Adapter("ia3", vectors={"layers.0.mlp.weight": vector}), folder)
    return str(folder)


@pytest.mark.parametrize("make, trained, fresh", [
    (lora, torch.randn(12, 2), torch.zeros(12, 2)), (ia3, torch.randn(12, 1), torch.ones(12, 1)),
])  # fmt: skip
def test_an_adapter_that_changes_nothing_is_said(tmp_path, make, trained, fresh, capsys):
    base = saved(tmp_path / "base", {name: torch.randn(shape) for name, shape in BASE.items()})
    experts = make(tmp_path / "e0", trained), make(tmp_path / "e1", fresh)
    flags = ["--base", base, "--experts", *experts, "--method", "weight_average", "--report"]
    notes = said(capsys, *flags, "--out", str(tmp_path / "out"))
    assert notes == [f"note: {experts[1]}: is an adapter that changes nothing: {repeats.NOTHING}"]
