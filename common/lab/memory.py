"""The peak of what a call allocates, to the byte, on top of what is alive already; for calls that were warmed up.

`common.lab.benchmark.peak_mib` asks the operating system instead. That sees all memory, but only in a fresh process,
since memory that an earlier call freed is reused without being counted. So it counts what a
function's compilation takes as a part of what the function takes.
"""

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_allocated_mib(function: Callable[[], Any], device: torch.device) -> float:
    """Return how many MiB of tensors `function()` has in torch's allocator at its peak, besides those alive before.

    On a CPU torch's profiler lists every allocation and release. The list has neither the memory that libraries
    allocate themselves (MKL's buffers) nor the release of what was alive before. On CUDA it is the allocator's peak.

    Args:
        function: called once.
        device: where its tensors are.
    """
    if device.type == "cuda":
        return _peak_cuda(function, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]) for event in events if event["name"] == "[memory]"]
    sizes = [change["Bytes"] for _, change in sorted(changes, key=lambda pair: pair[0]) if change["Device Type"] == 0]
    return max(accumulate(sizes, initial=0)) / 2**20


def _peak_cuda(function: Callable[[], Any], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def state_mib(optimizer: torch.optim.Optimizer) -> float:
    """Return the MiB of all parameters of an optimizer and of what it keeps for them, such as Adam's moments."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *moments)) / 2**20
