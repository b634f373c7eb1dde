"""Clusters for `Context.map`: the same results to the bit, the same records, and one line where one cannot be had."""

import json
import os
import subprocess
import sys

import pytest
import torch

from common import cache
from common.lab import backends
from common.lab.experiment import load_experiment
from common.lab.run import BadFlag, Context, Flags, make_context, run


def trained(seed: int) -> tuple[int, list[float]]:
    """Return the process, and numbers that depend on every bit of a small least-squares fit; cached by its seed."""

    def build(folder):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(64, 8, generator=generator) for _ in range(2))
        weights = torch.zeros(8, 8)
        for _ in range(20):
            weights -= 0.01 * x.T @ (x @ weights - y)
        (folder / "weights.txt").write_text(" ".join(value.hex() for value in weights.flatten().tolist()))

    path = cache.artefact("fit", {"seed": seed}, build).path
    return os.getpid(), [float.fromhex(word) for word in (path / "weights.txt").read_text().split()]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, for this process and for those that it starts."""
    monkeypatch.setenv("EXPERIMENTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(cache, "RECORDS", [])


@pytest.fixture
def dask_cluster(own_cache, monkeypatch):
    """A scheduler and two workers of Dask in processes of their own."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        import dask

        with dask.config.set(scheduler_address=cluster.scheduler_address):
            yield cluster
            distributed.get_client().close()


@pytest.fixture
def ray_cluster(own_cache):
    """Ray on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def same_as_here(backend):
    jobs = backends.connect(backend)
    there = Context(None, torch.device("cpu"), jobs, torch.get_num_threads(), backend).map(trained, range(6), "fit")
    built = {record["key"] for record in cache.RECORDS}
    assert jobs == 2 and os.getpid() not in {process for process, _ in there}
    assert len(built) == 6 and not any(record["hit"] for record in cache.RECORDS)
    found = Context(None, torch.device("cpu"), 1, 1).map(trained, range(6), "fit")  # from the folder that all share
    assert found == [(os.getpid(), numbers) for _, numbers in there] and cache.RECORDS[-1]["hit"]
    return [numbers for _, numbers in there]


def built_here(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "another")
    return [numbers for _, numbers in Context(None, torch.device("cpu"), 1, 1).map(trained, range(6), "fit")]


def test_dask_gives_the_same_bits_as_one_process(dask_cluster, tmp_path, monkeypatch):
    assert same_as_here("dask") == built_here(tmp_path, monkeypatch)


def test_an_experiment_runs_on_dask_as_it_does_here(dask_cluster, script, tmp_path):
    folders = [
        run(load_experiment(script), ["--results-dir", str(tmp_path / name), "--device", "cpu", *flags])
        for name, flags in {"here": ["--jobs", "1"], "there": ["--backend", "dask"]}.items()
    ]
    here, there = ((folder / "data.csv").read_bytes() for folder in folders)
    assert here == there
    facts = json.loads((folders[1] / "provenance.json").read_text())
    assert (facts["backend"], facts["jobs"]) == ("dask", 2)


def test_ray_gives_the_same_bits_as_one_process(ray_cluster, tmp_path, monkeypatch):
    assert same_as_here("ray") == built_here(tmp_path, monkeypatch)


def test_processes_that_share_a_folder_build_each_artefact_once_and_the_same(own_cache, tmp_path, monkeypatch):
    """Two processes that know nothing of each other want the same six fits at the same time."""
    code = "import test_backends, sys; print([test_backends.trained(seed)[1] for seed in range(6)]); "
    code += "print(sum(not record['hit'] for record in test_backends.cache.RECORDS))"
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": path}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    (first, built), (second, also_built) = (out.splitlines() for out, _ in said)
    assert first == second and int(built) + int(also_built) == 6
    folders = sorted(entry.name for entry in (tmp_path / "cache" / "fit").iterdir() if entry.suffix != ".lock")
    assert len(folders) == 6 and not any("unfinished" in name for name in folders)
    monkeypatch.setattr(cache, "CACHE", tmp_path / "another")
    assert first == str([trained(seed)[1] for seed in range(6)])


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_missing_package_is_one_line_that_names_it(backend, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadFlag, match=f"--backend {backend} needs the package .*: pip install") as error:
        make_context(Flags(device="cpu", backend=backend), None)
    assert "\n" not in str(error.value)


def test_dask_without_an_address_or_a_scheduler_is_one_line(monkeypatch):
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")
    with pytest.raises(BadFlag, match="set DASK_SCHEDULER_ADDRESS"):
        make_context(Flags(device="cpu", backend="dask"), None)
    monkeypatch.setattr(backends, "PATIENCE", 1)
    with (
        dask.config.set(scheduler_address="tcp://127.0.0.1:9"),
        pytest.raises(BadFlag, match=r"no .* answers") as error,
    ):
        make_context(Flags(device="cpu", backend="dask"), None)
    assert "\n" not in str(error.value)


def test_this_machines_processes_need_nothing():
    assert backends.connect("loky") >= 1
    with pytest.raises(ValueError, match="--backend must be one of loky, dask, ray, got 'slurm'"):
        backends.connect("slurm")
