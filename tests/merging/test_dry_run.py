"""--dry-run on models that are too large to be read: it reads and times a part of them, and leaves nothing behind."""

import itertools
import math
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models_on_disk import experts_of, llama_shapes, models, saved, sparse, state_of

from merging.checkpoints import Entry, open_checkpoint
from merging.command import dry_run
from merging.command.main import main
from merging.command.plan import make_plan
from merging.command.recipe import Recipe
from merging.command.stream import Streamer
from merging.lowrank import LowRank
from merging.peft_files import Adapter, open_adapter, save_adapter

SMALL = dict(hidden=1024, intermediate=4096, layers=58, keys=256, vocabulary=32000)  # 2 GB in bfloat16


@pytest.fixture
def read(monkeypatch):
    """The bytes that are read, in a list of one number."""
    bytes_read, original = [0], Entry.read

    def counted(entry, start=0, stop=None, *more):
        bytes_read[0] += ((entry.count if stop is None else stop) - start) * entry.dtype.itemsize
        return original(entry, start, stop, *more)

    monkeypatch.setattr(Entry, "read", counted)
    return bytes_read


@pytest.mark.parametrize("flags", [
    ["--method", "task_arithmetic"],
    ["--method", "ties"],
    ["--method", "ties", "--set", "*:scope=global"],
    ["--method", "tsv_m", "--svc"],
])  # fmt: skip
def test_a_dry_run_of_gigabytes_reads_a_part_of_them(tmp_path, flags, read, capsys):
    base, *experts = (sparse(tmp_path / name, llama_shapes(**SMALL), i) for i, name in enumerate(("base", "e0", "e1")))
    before = sorted(tmp_path.rglob("*"))
    models = ["--base", base, "--experts", *experts, "--out", str(tmp_path / "deep" / "out"), "--dry-run"]
    assert main([*models, *flags]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    size = sum(2 * math.prod(shape) for shape in llama_shapes(**SMALL).values()) / 1e9
    last = capsys.readouterr().out.splitlines()[-1]
    numbers = r"525 tensors, (\S+) GB to read, (\S+) GB to write \(\S+ GB free.*\), "
    found = re.fullmatch(numbers + r"memory up to about \S+ GB, about \d\S* (s|min|h)", last)
    assert float(found[1]) == pytest.approx(3 * size, rel=1e-3) and float(found[2]) == pytest.approx(size, rel=1e-3)
    passes = 5 if "ties" in flags else 1  # decided, and then merged
    assert size > 1.8 and read[0] < 1.1 * passes * dry_run.TIMED * 2


def test_the_time_grows_with_what_is_written_and_with_the_matrices(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "_time_of_part", lambda *_: 1e-6)  # seconds per entry
    monkeypatch.setattr(dry_run, "_time_of_sample", lambda *_: 2.0)
    base = state_of(mlp=(300, 128), up=(128, 256), bias=(1000,))
    where, others = models(tmp_path, base, experts_of(base, 2))
    opened = open_checkpoint(where), [open_checkpoint(other) for other in others]
    recipe = Recipe(where, others, "task_arithmetic")
    entries, cubes = 300 * 128 + 128 * 256 + 1000, 300 * 128 * 128 + 256 * 128 * 128
    by_rows = dry_run.expected_seconds(make_plan(recipe, *opened), torch.device("cpu"))
    assert by_rows == pytest.approx(1e-6 * entries)
    svc = dry_run.expected_seconds(make_plan(replace(recipe, svc=True), *opened), torch.device("cpu"))
    assert svc == pytest.approx(1e-6 * (2 * entries - 1000) + 2 * cubes / 256**3)


def test_the_timed_part_is_what_the_merge_takes(tmp_path):
    """Within a factor that is far wider than what a busy machine makes of it."""
    base = {"w.weight": torch.randn(12000, 1000)}
    where, others = models(tmp_path, base, experts_of(base, 2))
    flags = ["--base", where, "--experts", *others, "--method", "task_arithmetic", "--out", str(tmp_path / "out")]
    plan = make_plan(
        Recipe(where, others, "task_arithmetic"), open_checkpoint(where), list(map(open_checkpoint, others))
    )
    expected = dry_run.expected_seconds(plan, torch.device("cpu"), tmp_path)
    start = time.perf_counter()
    assert main(flags) == 0
    assert 0.05 < expected / (time.perf_counter() - start) < 20


def adapters(tmp_path):
    """A base of one layer on disk, and two LoRA adapters of it."""
    base = {"layers.0.mlp.weight": torch.randn(96, 64)}
    where, folders = saved(tmp_path / "base", base), (tmp_path / "e0", tmp_path / "e1")
    for folder in folders:
        update = LowRank(torch.randn(96, 4), torch.randn(4, 64))
        save_adapter(Adapter("lora", {"layers.0.mlp.weight": update}), folder)
    return where, tuple(map(str, folders))


@pytest.fixture
def clock(monkeypatch):
    """A clock by which every part that is timed takes one second, whatever the machine does."""
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=partial(next, itertools.count())))


@pytest.mark.parametrize("flags", [["--method", "ties"], ["--method", "iso_c", "--svc"], ["--method", "tsv_m"]])
def test_the_time_of_a_report_is_counted(tmp_path, flags, clock):
    base = state_of(**{f"layers.{layer}.mlp": (768, 512) for layer in range(4)})
    where, others = models(tmp_path, base, experts_of(base, 3))
    recipe = Recipe(where, others, flags[1], svc="--svc" in flags)
    opened = open_checkpoint(where), [open_checkpoint(other) for other in others]
    plain, with_report = (
        dry_run.expected_seconds(make_plan(replace(recipe, report=report), *opened), torch.device("cpu"), tmp_path)
        for report in (False, True)
    )
    assert with_report > plain > 0


def test_the_time_of_a_report_on_adapters_is_counted(tmp_path, monkeypatch, clock):
    recipe = Recipe(*adapters(tmp_path), "task_arithmetic")
    opened = open_checkpoint(recipe.base), [open_adapter(Path(expert)) for expert in recipe.experts]
    seen, original = [], Streamer.low_rank
    monkeypatch.setattr(
        Streamer, "low_rank", lambda own, step, rows=None: seen.append(rows) or original(own, step, rows)
    )
    plain, with_report = (
        dry_run.expected_seconds(make_plan(replace(recipe, report=report), *opened), torch.device("cpu"))
        for report in (False, True)
    )
    assert any(rows for rows in seen) and with_report > plain > 0  # diagnosed while it was timed
