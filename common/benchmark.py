"""Seconds and peak memory of functions that do the same work, measured so that they can be compared."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from joblib.externals.loky import ProcessPoolExecutor

from common.memory import peak_allocated_mib


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> Iterator[tuple[int, str, float]]:
    """Yield (repeat, name, wall seconds): in each repeat every contender once, so that drift of the machine hits all.

    The caller warms up. On a GPU the clock starts and stops only when the device is idle.
    """
    for repeat in range(repeats):
        for name, function in contenders.items():
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            yield repeat, name, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(prepare: Callable[[], Any], function: Callable[[Any], Any], device: torch.device, threads: int) -> float:
    """Return by how many MiB `function(prepare())` swells memory above what it was once `prepare` was done.

    On a CPU this is resident memory of a fresh process (what an earlier call freed would be used again unseen), on
    CUDA the allocator's peak on the device.

    Args:
        prepare: makes the inputs; called where `function` is.
        function: its result counts, as it is alive at the end.
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

    Linux's own figure is asked first: that of getrusage starts with what the parent process held.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
