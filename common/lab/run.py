"""What every experiment shares: flags, device, parallel processes, stages, and where its results go.

A script in experiments/ ends with

    EXPERIMENT = Experiment(__doc__, SCALES, measure, draw, compare, verdict, published="merging")

    if __name__ == "__main__":
        run(EXPERIMENT)

and that is all it knows about command lines and files.
"""

import argparse
import contextlib
import dataclasses
import datetime
import errno
import importlib.metadata
import io
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import joblib
import torch
import tyro
from accelerate import PartialState
from tqdm import tqdm

from common import cache, code
from common.command_line import one_line, why_not_writable
from common.data.hub import MissingResource
from common.lab import results
from common.lab.backends import Backend, connect
from common.lab.experiment import Experiment as Experiment
from common.lab.experiment import load_experiment
from common.progress import log_bars

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "datasets", "open_clip_torch", "accelerate",
    "peft", "safetensors", "huggingface-hub", "curvlinops-for-pytorch", "numpy", "pandas", "scipy", "scikit-learn",
    "matplotlib",
)  # fmt: skip


@dataclass(frozen=True)
class Flags:
    """Flags that all experiments share."""

    scale: Literal["smoke", "laptop", "workstation", "paper"] = "laptop"  # whose settings are the defaults below
    device: str = "auto"  # auto, cpu, cuda or cuda:0
    results_dir: Path = results.RESULTS  # where NN_name/SCALE/ is written
    jobs: int | None = None  # parallel processes; by default the number of cores on a CPU, or of the cluster, else 1
    backend: Backend = "loky"  # where they run: loky on this machine, dask or ray on a cluster (common/lab/backends.py)


@dataclass
class Context:
    """What `measure` gets besides its settings."""

    settings: Any
    device: torch.device
    jobs: int  # parallel processes of `map`
    threads: int  # torch threads of this process
    backend: Backend = "loky"  # where the processes run
    script: Path | None = None  # the experiment's, which the processes of `map` import
    main: bool = True  # False on all but one process under `accelerate launch`
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage

    artefact = staticmethod(cache.artefact)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to the stage `name`, and say so on stderr (not inside `map`'s processes)."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + took, 3)
            if self.main:
                tqdm.write(f"{name}: {took:.1f} s", file=sys.stderr)

    def progress(self, items: Iterable[Any], description: str) -> Iterable[Any]:
        """Return `items` behind a progress bar."""
        return self._bar(items, description)

    def _bar(self, items: Iterable[Any], description: str, total: int | None = None) -> tqdm:
        return tqdm(items, description, total, disable=not self.main, leave=False)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], description: str) -> list[Any]:
        """Return `[function(item) for item in items]`, computed in up to `jobs` processes behind a progress bar.

        On this machine each process gets its share of the threads. With one job or one item, the work is done in this
        process. This process also records what the others ask the artefact cache for. The first exception ends the map.

        Args:
            function: one of a module or of the script itself, or a partial of one: other processes import it by name.
            items: the arguments, one per call.
            description: title of the bar.
        """
        items = list(items)
        processes = min(self.jobs, len(items))
        if processes <= 1:
            with self._bar(items, description) as bar:
                return [function(item) for item in bar]
        here = self.backend == "loky"
        threads = max(1, self.threads // processes) if here else None
        options = dict(inner_max_num_threads=threads) if here else {}
        with joblib.parallel_config(self.backend, **options):
            returned = "list" if self.backend == "ray" else "generator_unordered"  # which Ray's does not have
            parallel = joblib.Parallel(processes, batch_size=1, return_as=returned)
            call = joblib.delayed(_call)
            work = ((index, pickle.dumps((function, item))) for index, item in enumerate(items))
            finished = parallel(call(self.script, index, pickled, threads) for index, pickled in work)
        found: dict[int, Any] = {}
        with self._bar(finished, description, len(items)) as bar:
            for index, result, records in bar:
                found[index] = result
                cache.RECORDS.extend(records)
        return [found[index] for index in range(len(items))]


def _call(
    script: Path | None, index: int, pickled: bytes, threads: int | None
) -> tuple[int, Any, list[dict[str, Any]]]:
    """Call a function on an item in a process of `Context.map`; both were pickled by name, so the script comes first.

    Functions of a script that were sent by value would have no file, so that their code could not be found.
    """
    if threading.current_thread() is threading.main_thread():  # not in a worker of Dask
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one ends the others
    tqdm.set_lock(threading.RLock())  # the one between processes would be reported as leaked when this one is ended
    if script and script.stem not in sys.modules:
        load_experiment(script)
        code.remember()
    function, item = pickle.loads(pickled)
    if threads:
        torch.set_num_threads(threads)
    before = len(cache.RECORDS)
    with log_bars():
        result = function(item)
    return index, result, cache.RECORDS[before:]


def run(experiment: Experiment, arguments: Sequence[str] | None = None) -> Path | None:
    """Run an experiment as the command line says, write its results and return their folder.

    Settings other than those of the scale make a partial run, which goes to a sibling folder of its own. Under
    `accelerate launch` all processes measure, one writes, and the others return None. Bad flags and failures
    outside this project (`HubError`: no connection, a missing repository; a full disk) end in one line on stderr and
    exit status 2; any other error is a mistake in this project and keeps its traceback. Ctrl-C ends in one line, too,
    with exit status 130: the cache keeps what is finished.

    Args:
        experiment: what to run.
        arguments: of the command line; by default those of this process.

    Raises:
        SystemExit: as said above; status 2 or 130.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with log_bars():
            return _run(experiment, arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        raise SystemExit(130) from None


def _run(experiment: Experiment, arguments: Sequence[str]) -> Path | None:
    if experiment.measure.__module__ == "__main__":  # the script as a module under its own name: see load_experiment
        experiment = load_experiment(experiment.script)
    code.remember()
    try:
        flags, settings = parse(experiment, arguments)
        context = dataclasses.replace(make_context(flags, settings), script=experiment.script)
        commit = git_state()
        before, start = len(cache.RECORDS), time.perf_counter()
        rows = list(experiment.measure(settings, context))
    except (OSError, BadFlag) as error:
        if isinstance(error, OSError) and not _is_the_users(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    context.seconds["total"] = round(time.perf_counter() - start, 3)
    if not context.main:
        return None
    facts = provenance(experiment, flags, context, arguments, commit, cache.RECORDS[before:])
    folder = results.write(flags.results_dir, experiment, rows, facts)
    print(results.summary(experiment, folder))
    return folder


def _is_the_users(error: OSError) -> bool:
    """Return whether the machine or the network caused an error, not a mistake in this project."""
    refused = (MissingResource, ConnectionError, TimeoutError, PermissionError)
    return isinstance(error, refused) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class BadFlag(ValueError):
    """A flag of the command line that cannot be used; the message is one line for the user."""


def parse(experiment: Experiment, arguments: Sequence[str]) -> tuple[Flags, Any]:
    """Return the runner's flags and the settings: those of the scale, changed by the flags.

    Raises:
        BadFlag: a flag is unknown, or its value is not of the flag's type or range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--scale", nargs="?", default=Flags.scale)
    scale = first.parse_known_args(arguments)[0].scale
    settings = experiment.scales.get(scale, experiment.scales[Flags.scale])
    if taken := {own.name for own in dataclasses.fields(settings)} & {own.name for own in dataclasses.fields(Flags)}:
        raise ValueError(f"settings named like the runner's own flags: {sorted(taken)}")
    unprefixed = tyro.conf.arg(name="")  # --seeds, not --settings.seeds
    both = dataclasses.make_dataclass(
        "Arguments",
        [
            ("flags", Annotated[Flags, unprefixed], field(default_factory=Flags)),
            ("settings", Annotated[type(settings), unprefixed], field(default=settings)),
        ],
    )
    if {"-h", "--help"} & set(arguments):
        print(experiment.doc.strip(), end="\n\n")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed = tyro.cli(both, args=arguments, prog=experiment.script.name, description="")
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BadFlag(one_line(box.getvalue())) from None
    except ValueError as error:  # from a check in Settings.__post_init__
        raise BadFlag(str(error)) from None
    if parsed.flags.jobs is not None and parsed.flags.jobs < 1:
        raise BadFlag(f"--jobs must be at least 1, got {parsed.flags.jobs}")
    if reason := why_not_writable(parsed.flags.results_dir.absolute()):
        raise BadFlag(f"--results-dir {parsed.flags.results_dir}: {reason}; choose another folder")
    if not parsed.settings.seeds:
        raise BadFlag("--seeds needs at least one seed")
    return parsed.flags, parsed.settings


def make_context(flags: Flags, settings: Any) -> Context:
    """Return the context for these flags: device, processes and threads of this machine."""
    device = find_device(flags.device)
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:  # each process of `accelerate launch` has a device of its own
        device = state.device
    if flags.backend == "loky":
        jobs = flags.jobs or (joblib.cpu_count() if device.type == "cpu" else 1)
        jobs = 1 if state.num_processes > 1 else jobs
    elif state.num_processes > 1:
        raise BadFlag(f"--backend {flags.backend} is not for `accelerate launch`, which has processes of its own")
    else:
        jobs = _connected(flags)
    return Context(settings, device, jobs, torch.get_num_threads(), flags.backend, main=state.is_main_process)


def _connected(flags: Flags) -> int:
    try:
        return min(connect(flags.backend), flags.jobs or sys.maxsize)
    except ValueError as error:
        raise BadFlag(str(error)) from None


def find_device(name: str) -> torch.device:
    """Return the device that `--device` names; "auto" takes CUDA if there is any, else the CPU.

    Raises:
        BadFlag: the device is unknown or not there.
    """
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}  # not MPS: it has no float64, which spectra need
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "cpu") if there[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise BadFlag(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if (device.index or 0) >= there[device.type]:
        raise BadFlag(f"--device {name}: this machine shows PyTorch {there[device.type]} {device.type} devices")
    return device


def git_state() -> dict[str, Any]:
    """Return the commit of the clone and whether anything outside results/ differs from it."""

    def git(*words: str) -> str:
        answer = subprocess.run(["git", "-C", str(results.ROOT), *words], capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else "unknown"

    changes = git("status", "--porcelain", "--", ".", ":(exclude)results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}


def provenance(
    experiment: Experiment,
    flags: Flags,
    context: Context,
    arguments: Sequence[str],
    commit: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return everything about a run that its table does not say, as plain data."""
    settings, device = context.settings, context.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    built = {f"{record['kind']}/{record['key']}" for record in records if not record["hit"]}
    asked = {f"{record['kind']}/{record['key']}" for record in records}
    return {
        "experiment": experiment.name,
        "arguments": list(arguments),
        "scale": flags.scale,
        "partial": settings != experiment.scales[flags.scale],
        "settings": results.plain(settings),
        "settings_hash": results.settings_hash(settings),
        "seeds": list(settings.seeds),
        **commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": context.seconds,
        "device": card,
        "processes": PartialState().num_processes,  # of `accelerate launch`
        "jobs": context.jobs,
        "backend": context.backend,
        "threads": context.threads,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        "cache_hits": sorted(asked - built),
        "cache_built": sorted(built),
    }


def _versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
