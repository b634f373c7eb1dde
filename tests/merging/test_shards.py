"""Shards: what is written is what the safetensors library reads; a merge killed at any moment ends bit-identical."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models_on_disk import (
    assert_equal,
    content,
    experts_of,
    in_fork,
    killed,
    models,
    saved,
    state_of,
    state_of_all_dtypes,
    weights,
)
from safetensors import safe_open
from safetensors.torch import load_file

from merging.checkpoints import open_checkpoint
from merging.command import changes, stream
from merging.command.main import main, merge
from merging.command.recipe import Recipe
from merging.command.shards import TensorSpec, arrange, begin

ROOT = Path(__file__).resolve().parents[2]


def shards_of(state, size=10**9):
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    return arrange([(spec.name, [spec]) for spec in specs], size)


def made_of(state, shard, pieces=3):
    def make(write):
        for name in reversed(shard.steps):
            write(name, state[name].reshape(-1).split(pieces))
        return [f"note of {name}" for name in shard.steps]

    return make


@pytest.mark.parametrize("size, count", [(10**9, 1), (60, 4), (1, 8)])
def test_written_shards_are_read_by_the_safetensors_library(tmp_path, size, count):
    state = state_of_all_dtypes()
    shards = shards_of(state, size)
    with begin(tmp_path / "out", "id", shards) as output:
        for shard in reversed(shards):
            assert not output.is_finished(shard)
            output.write(shard, made_of(state, shard))
            assert output.is_finished(shard) and not (tmp_path / "out").exists()
        assert [note for own in output.notes() for note in own] == [f"note of {name}" for name in state]
        output.finish()
    with begin(tmp_path / "out", "id", shards, rank=1) as late:  # a process that starts when all is done
        assert all(map(late.is_finished, shards))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == count and [path.name for path in tmp_path.iterdir()] == ["out"]
    loaded = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert_equal(weights(tmp_path / "out"), state)
    for path in files:
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert [path.stat().st_size for path in files] == [shard.size for shard in shards]


def test_every_tensor_is_aligned_and_none_overlaps():
    state = state_of_all_dtypes()
    (shard,) = shards_of(state)
    assert len(shard.header) % 8 == 0
    taken = sorted((start, start + state[name].nbytes) for name, start in shard.offsets.items())
    assert taken[0][0] == 0 and len(taken) == len(state)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(taken))
    for name, tensor in state.items():
        assert (len(shard.header) + shard.offsets[name]) % tensor.dtype.itemsize == 0


def test_what_a_step_makes_stays_in_one_shard():
    down, up = (TensorSpec(name, torch.float32, (4,)) for name in ("down", "up"))
    shards = arrange([("first", [down]), ("lost", []), ("second", [up, down]), ("third", [up])], 17)
    assert [shard.steps for shard in shards] == [("first", "lost"), ("second",), ("third",)]
    assert [shard.tensors for shard in shards] == [(down,), (up, down), (up,)]
    assert [shard.file for shard in shards] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_finished_shards_stay_and_a_torn_one_is_written_again(tmp_path):
    state = state_of_all_dtypes()
    first, second, *others = shards = shards_of(state, 60)
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "out", "id", shards) as output:
        output.write(first, made_of(state, first))
        output.write(second, lambda write: [write(name, [state[name]]) for name in second.steps[:1]] + [interrupt()])
    inode = (output.folder / first.file).stat().st_ino
    with (output.work / second.file).open("ab") as stream:
        stream.write(bytes(1000))  # what was left is longer than the shard
    with begin(tmp_path / "out", "id", shards) as output:
        assert [output.is_finished(shard) for shard in shards] == [True, *[False] * len(shards[1:])]
        for shard in (second, *others):
            output.write(shard, made_of(state, shard))
        assert output.notes()[0] == [f"note of {name}" for name in first.steps]
        output.finish()
    assert_equal(weights(tmp_path / "out"), state)
    assert (tmp_path / "out" / first.file).stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupt():
    raise KeyboardInterrupt


def test_one_merge_at_a_time_and_no_other(tmp_path):
    out, shards = tmp_path / "out", shards_of(state_of_all_dtypes())
    with begin(out, "id", shards) as output:
        with pytest.raises(ValueError, match="out: another process is writing this merge"), begin(out, "id", shards):
            pass
        with (
            begin(out, "id", shards, rank=1) as other,
            pytest.raises(ValueError, match="out: another process is writing this merge"),
        ):
            output.write(shards[0], lambda write: other.write(shards[0], made_of(state_of_all_dtypes(), shards[0])))
    for rank in (0, 1):
        with (
            pytest.raises(ValueError, match=r"\.out\.partial: an unfinished merge of another recipe"),
            begin(out, "other", shards, rank),
        ):
            pass


def test_a_full_disk_is_named_before_and_during_writing(tmp_path, monkeypatch):
    state, out = state_of_all_dtypes(), tmp_path / "out"
    too_large = arrange([("huge", [TensorSpec("huge", torch.float32, (2**48,))])], 10**9)
    with pytest.raises(OSError, match=r"out: needs \d+\.\d\d GB, and .* GB are free"), begin(out, "id", too_large):
        pass
    assert not (tmp_path / ".out.partial").exists()
    (shard,) = shards = shards_of(state)

    def full(*_):
        raise OSError(28, "No space left on device")

    said = r"model\.safetensors: 'mask': No space left on device; free some space"
    with monkeypatch.context() as patched, pytest.raises(OSError, match=said), begin(out, "id", shards) as output:
        patched.setattr(os, "pwrite", full)
        output.write(shard, made_of(state, shard))
    with begin(out, "id", shards) as output:
        output.write(shard, made_of(state, shard))
        output.finish()
    assert_equal(weights(out), state)


def test_a_tensor_of_the_wrong_length_or_none_is_a_fault(tmp_path):
    (shard,) = shards = shards_of({"w": torch.ones(4)})
    with begin(tmp_path / "out", "id", shards) as output:
        with pytest.raises(RuntimeError, match="'w': 12 bytes written of 16"):
            output.write(shard, lambda write: write("w", [torch.ones(3)]))
        with pytest.raises(RuntimeError, match="'w' was not written"):
            output.write(shard, lambda write: None)
        assert not output.is_finished(shard)


# A merge that is killed, and one that is shared -----------------------------------------------------------------------


@pytest.mark.parametrize("method, options", [
    ("ties", {"set": ("*:scope=global",)}), ("dare", {}), ("task_arithmetic", {"svc": True, "report": True}),
])  # fmt: skip
def test_a_killed_merge_continues_and_ends_bit_identical(tmp_path, method, options, monkeypatch):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    monkeypatch.setattr(changes, "RANGE", 30)
    recipe = Recipe(where, others, method, shard_size="500B", **options)
    merge(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    kills = [("pwrite", 0), ("pwrite", 3), ("pwrite", 1), ("fsync", 1), ("replace", 1), ("replace", 3)]
    for function, count in kills:

        def work(function=function, count=count):
            with killed(function, count):
                merge(recipe, out)

        assert in_fork(work) == -signal.SIGKILL
        assert not out.exists() and {path.name for path in tmp_path.glob(".out*")} == {".out.partial"}
        with pytest.raises(ValueError, match="an unfinished merge of another recipe"):
            merge(Recipe(where, others, "weight_average"), out)
    assert in_fork(lambda: _killed_last(recipe, out)) == -signal.SIGKILL
    assert content(out) == content(tmp_path / "whole") and list(tmp_path.glob(".out*"))
    merge(recipe, out)
    assert content(out) == content(tmp_path / "whole") and not list(tmp_path.glob(".out*"))


def _killed_last(recipe, out):
    with killed("unlink", 0):  # the folder has its name, what stood beside it is still there
        merge(recipe, out)


def test_a_resumed_merge_writes_only_the_shards_that_are_missing(tmp_path, monkeypatch):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    recipe, out = Recipe(where, others, "weight_average", shard_size="500B"), tmp_path / "out"

    def work():
        with killed("pwrite", 3):  # in the middle of the second shard
            merge(recipe, out)

    assert in_fork(work) == -signal.SIGKILL
    names, tensor = [], stream.Streamer.tensor
    monkeypatch.setattr(
        stream.Streamer,
        "tensor",
        lambda self, step, rows=None: (names.append(step.name), tensor(self, step, rows))[1],
    )
    merge(recipe, out)
    assert names == list(open_checkpoint(where).entries)[2:]


def test_the_same_recipe_on_a_complete_output_does_nothing_and_another_is_refused(tmp_path, capsys):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    arguments = ["--base", where, "--experts", *others, "--method", "ties", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(arguments) == 0 and "has made it already" in capsys.readouterr().out
    assert main([*arguments, "--jobs", "2"]) == 0
    assert main([*arguments, "--scale", "0.5"]) == 1
    assert "out: holds a merge by another recipe" in capsys.readouterr().err
    saved(tmp_path / "e0", state_of(9))
    assert main(arguments) == 1 and "or of other input files" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    assert main([*arguments[:-1], str(tmp_path / "full")]) == 1
    assert "full: is there and holds no finished merge" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "e0", state_of(1))
    assert main([*arguments[:-1], str(tmp_path / "empty")]) == 0


def test_ranks_share_the_shards(tmp_path, monkeypatch):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    recipe = Recipe(where, others, "ties", set=("*:scope=global",), shard_size="500B")
    merge(recipe, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "3")

    def rank(number):
        os.environ["RANK"] = str(number)
        merge(recipe, tmp_path / "three")

    pids = []
    for number in (2, 1, 0):
        if (pid := os.fork()) == 0:
            status = 1
            with contextlib.suppress(BaseException):
                torch.set_num_threads(1)
                rank(number)
                status = 0
            os._exit(status)
        pids.append(pid)
        time.sleep(0.05)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_the_command_killed_at_any_moment_continues(tmp_path):
    base = state_of(**{f"layers.{index}": (60, 50) for index in range(80)})
    where, others = models(tmp_path, base, experts_of(base, 2))
    arguments = ["--base", where, "--experts", *others, "--method", "iso_c", "--svc"]
    arguments += ["--shard-size", "60KB"]  # five tensors
    command = [sys.executable, "-m", "merging", *arguments, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(list((tmp_path / ".out.partial" / "out").glob("*.safetensors"))) < 2:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
