"""The command as a program: what it says when files or the disk are bad, several processes, and how exact it is."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_on_disk import content, weights
from safetensors.torch import save_file

from merging import MERGERS, apply, calibrate, iso_basis, merger, task_vector
from merging.command.main import main, merge
from merging.command.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"mlp": (24, 16), "attn": (16, 16), "up": (16, 40), "bias": (24,)}


def random_state(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def models(tmp_path):
    """Folders of a base and two experts, each of two shards, and their state dicts."""
    base = random_state(0)
    states = [base, *({n: t + random_state(i, 0.1)[n] for n, t in base.items()} for i in (1, 2))]
    folders = [tmp_path / name for name in ("base", "e0", "e1")]
    for folder, state in zip(folders, states, strict=True):
        folder.mkdir()
        names, weight_map = list(state), {}
        for index in range(2):
            shard = f"model-{index + 1:05}-of-00002.safetensors"
            save_file({name: state[name] for name in names[index::2]}, folder / shard)
            weight_map |= dict.fromkeys(names[index::2], shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folders, states


def flags_of(folders, method, *more):
    base, *experts = map(str, folders)
    return ["--base", base, "--experts", *experts, "--method", method, *more]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def _truncate(folders):
    shard = folders[2] / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])


def _garble(folders):
    (folders[2] / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 200)


def _quantise(folders):
    (folders[1] / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))


def _pickle(folders):
    for path in folders[1].iterdir():
        path.unlink()
    (folders[1] / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Harmful()}))


def _remove_shard(folders):
    (folders[1] / "model-00002-of-00002.safetensors").unlink()


@pytest.mark.parametrize("spoil, message", [
    (_truncate, r"e1/model-00002-of-00002\.safetensors: is no complete .* \(incomplete.*; truncated"),
    (_garble, r"e1/model-00001-of-00002\.safetensors: is no complete safetensors file \(header too large\)"),
    (_quantise, r"e0/config\.json: the weights are quantised \(gptq\); dequantise"),
    (_pickle, r"e0/pytorch_model\.bin: (a pickle that holds more than tensors|is no complete state dict)"),
    (_remove_shard, r"e0/model\.safetensors\.index\.json: names the shard model-00002-of-00002\.safetensors"),
    (lambda folders: (folders[0].parent / "out").write_text("x"), r"out: is there and holds no finished merge"),
])  # fmt: skip
def test_bad_files_are_refused_and_nothing_is_written(models, tmp_path, spoil, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders, _ = models
    spoil(folders)
    before = sorted(tmp_path.rglob("*"))
    assert main(flags_of(folders, "ties", "--out", str(tmp_path / "out"))) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note")]
    assert re.search(message, said)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_is_named_and_the_same_command_continues(models, tmp_path, capsys, monkeypatch):
    folders, _ = models
    flags = flags_of(folders, "task_arithmetic", "--svc", "--shard-size", "2KB")
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    original, calls = os.pwrite, iter(range(2))

    def full(*arguments):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert main([*flags, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"\.out\.partial/model-.*\.safetensors: '.*\.weight': No space left on device; free some", said)
    assert not (tmp_path / "out").exists()
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_processes_of_a_launcher_share_the_shards(models, tmp_path):
    folders, _ = models
    flags = flags_of(folders, "tsv_m", "--svc", "--report", "--shard-size", "2KB")
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "merging", *flags, "--out", str(tmp_path / "two")]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert content(tmp_path / "two") == content(tmp_path / "one") and not list(tmp_path.glob(".two*"))


def in_float64(base, experts, method, svc):
    start, *ends = ({name: tensor.double() for name, tensor in state.items()} for state in (base, *experts))
    tasks = [task_vector(end, start) for end in ends]
    merged = MERGERS[method](tasks)
    if svc:
        bases = iso_basis(tasks, method) if merger(method).basis else None
        merged = calibrate(merged, tasks, alpha=merger(method).alpha, bases=bases)
    return apply(start, merged)


@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("method", MERGERS)
def test_the_error_of_float32_arithmetic_against_a_float64_merge(models, tmp_path, method, svc):
    """Relative to the merged weights: rounding of float32 where there is no spectrum, and a few times that elsewhere.

    TSV-M leaves singular values that nearly coincide, between which SVC's directions are free to turn.
    """
    folders, (base, *experts) = models
    merge(Recipe(str(folders[0]), tuple(map(str, folders[1:])), method, svc=svc, dtype="float64"), tmp_path / "out")
    spectral = svc or not MERGERS[method].by_entry
    limit = 1e-4 if svc and method == "tsv_m" else 2e-6 if spectral else 1e-7
    for name, expected in in_float64(base, experts, method, svc).items():
        error = float((weights(tmp_path / "out")[name] - expected).norm() / expected.norm())
        assert error < limit, (name, error)
