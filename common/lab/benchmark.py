"""Seconds and peak memory of functions and commands that do the same work, measured so that they can be compared."""

import contextlib
import math
import os
import pstats
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from joblib.externals.loky import ProcessPoolExecutor

from common.lab.memory import peak_allocated_mib


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> Iterator[tuple[int, str, float]]:
    """Yield (repeat, name, wall seconds): each repeat calls every function once, so that all share a machine's drift.

    Warming up is left to the caller. On a GPU the clock starts and stops only when the device is idle.

    Args:
        contenders: name → function.
        repeats: how many times each function is called.
        device: on which the functions compute.
    """
    for repeat in range(repeats):
        for name, function in contenders.items():
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            yield repeat, name, time.perf_counter() - start


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Return the wall seconds of one call."""
    [(_, _, seconds)] = interleaved_seconds({"": function}, 1, device)
    return seconds


def warm_up(function: Callable[[], Any], device: torch.device) -> float:
    """Call a function three times; return how many seconds the first call, which compiles, took beyond the last."""
    seconds = [seconds_of(function, device) for _ in range(3)]
    return seconds[0] - seconds[-1]


@contextlib.contextmanager
def cold_compiler() -> Iterator[None]:
    """Let torch.compile start from nothing, so that its seconds do not depend on what was compiled before."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(prepare: Callable[[], Any], function: Callable[[Any], Any], device: torch.device, threads: int) -> float:
    """Return how many MiB `function(inputs)` takes at its peak, on top of `inputs = prepare()` and all that was there.

    On a CPU this is resident memory of a fresh process (in this one, memory that an earlier call freed would be reused
    without being counted), on CUDA the allocator's peak on the device.

    Args:
        prepare: makes the inputs, in the same process.
        function: its result counts too, because it is alive at the end.
        device: where the memory is.
        threads: torch threads of the fresh process.
    """
    if device.type == "cuda":
        return peak_allocated_mib(partial(function, prepare()), device)
    with ProcessPoolExecutor(1) as fresh:
        return fresh.submit(_peak_resident, prepare, function, threads).result()


def _peak_resident(prepare: Callable[[], Any], function: Callable[[Any], Any], threads: int) -> float:
    torch.set_num_threads(threads)
    inputs = prepare()
    with contextlib.suppress(OSError):  # Linux: forget the peaks of imports and of `prepare`
        Path("/proc/self/clear_refs").write_text("5")
    before = _highest_resident()
    result = function(inputs)
    peak = _highest_resident() - before
    del result
    return peak / 2**20


def _highest_resident() -> int:
    """Return the most bytes that were ever resident in this process.

    Linux's own figure comes first: that of getrusage starts with what the parent process held.
    """
    for size in _memory("self", "VmHWM"):
        return size
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory(process: int | str, field: str) -> list[int]:
    """Return [bytes of a field of /proc/PROCESS/status], or [] if there is no such file."""
    with contextlib.suppress(OSError):  # no such file system, or the process has ended
        text = Path(f"/proc/{process}/status").read_text()
        return [int(kibibytes) * 1024 for kibibytes in re.findall(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)]
    return []


@dataclass(frozen=True)
class Usage:
    """The time and memory that a command took."""

    seconds: float  # wall time from start to exit
    peak_mib: float  # the most memory that was ever resident, mapped pages of files included
    anonymous_mib: float  # the most that was seen, less pages of files, which the system may drop at any time


def run_command(command: Sequence[str | Path], threads: int) -> Usage:
    """Run a command as a process of its own, to its end, and return the time and memory that it took.

    Memory is that of the process itself, without its children, and is read every 10 ms. Linux keeps the highest
    `peak_mib`, so that it cannot be missed; a short peak of `anonymous_mib` can. Both are NaN where there is no /proc.

    Args:
        command: program and arguments.
        threads: of OpenMP and MKL.

    Raises:
        ChildProcessError: the command failed; the message has the last line that it printed.
    """
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    peak, anonymous = [], []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        start = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                peak += _memory(process.pid, "VmHWM")
                anonymous += _memory(process.pid, "RssAnon")
                time.sleep(0.01)
        seconds = time.perf_counter() - start
        printed.seek(0)
        last = ([line for line in printed if line.strip()] or ["it printed nothing"])[-1].strip()
    if process.returncode:
        raise ChildProcessError(f"{Path(command[0]).name} ended with status {process.returncode}: {last}")
    return Usage(seconds, *(max(sizes, default=math.nan) / 2**20 for sizes in (peak, anonymous)))


def profile_module(
    module: str, arguments: Sequence[str | Path], groups: Mapping[str, str], threads: int
) -> dict[str, float]:
    """Run `python -m module`, in a process of its own and to its end, and return where its main thread's seconds go.

    The profiler slows Python down, and not what it calls in C: shares are right where most of the time is spent there.

    Args:
        module: name of the module.
        arguments: of its command line.
        groups: {name: regular expression that finds the functions of a group, as the profiler spells them}; the first
            that fits counts. Seconds are those of the functions themselves, without what they call.
        threads: of OpenMP and MKL.

    Returns:
        The seconds of each group, in the order of `groups`, and under "rest" those of all other functions.

    Raises:
        ChildProcessError: as `run_command` does.
    """
    with tempfile.NamedTemporaryFile() as file:
        run_command([sys.executable, "-m", "cProfile", "-o", file.name, "-m", module, *arguments], threads)
        found = pstats.Stats(file.name).stats  # type: ignore[attr-defined]
    seconds = dict.fromkeys((*groups, "rest"), 0.0)
    for function, (_, _, own, _, _) in found.items():
        spelt = pstats.func_std_string(function)  # type: ignore[attr-defined]
        seconds[next((name for name, pattern in groups.items() if re.search(pattern, spelt)), "rest")] += own
    return seconds
