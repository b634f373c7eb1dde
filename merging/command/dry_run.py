"""What --dry-run prints: what would become of each tensor, and memory and time to expect."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints import Entry
from merging.command.changes import RANGE, Change, Full, LoRA, Step, differences, row_ranges
from merging.command.findings import moves
from merging.command.outputs import AdapterOutput, ModelOutput
from merging.command.plan import Plan
from merging.command.recipe import dtype_name
from merging.command.storage import Piece
from merging.command.stream import Streamer, rounded, takes, treatment
from merging.mergers import merger

PROGRAM = 600 * 2**20  # bytes: the interpreter with PyTorch
SAMPLE = 256  # side of the matrix that is timed
TIMED = 300e6  # bytes that are read and written to time a part of the stream


def expected_memory(plan: Plan, jobs: int = 1) -> int:
    """Return the peak of resident memory to expect, in bytes: when all jobs have the largest tensors.

    A matrix m × n that is calibrated, or merged as a matrix, takes a few copies of it in float32 (`Merger.copies`),
    however many experts there are (they are read one by one), and its eigenproblem 32 r² bytes, r = min(m, n). The rest
    works on ranges of rows.
    """
    streamer = Streamer(plan, torch.device("cpu"))
    peaks = [_peak(streamer, step, piece) for step in plan.steps for piece in step.pieces]
    return PROGRAM + sum(sorted(peaks, reverse=True)[:jobs])


def _peak(streamer: Streamer, step: Step, piece: Piece) -> int:
    if streamer.is_factored(step, piece):
        factors = step.change.rank * sum(piece.shape)
        return 8 * 4 * factors + 4 * RANGE * 4  # factors and their bases in float64, a few of each
    if streamer.is_whole(step, piece) and piece.count > RANGE:
        height = piece.seen[0]  # kernels are (out, rest)
        copies = streamer.merger.memory(height, piece.count // height, len(step.experts))
        return round(4 * copies * piece.count) + 32 * _side(piece) ** 2
    return 4 * RANGE * (len(step.experts) + 4)


def expected_seconds(plan: Plan, device: torch.device, folder: Path | None = None) -> float:
    """Return the seconds to expect with one job, from a timed part of the stream: real files are read and merged.

    Of each kind of change a part of the largest tensor is read, merged and written; that grows with the number of
    entries. What is done on matrices comes on top: it is timed on a small one, and grows with m · n · min(m, n). Of a
    report its spectra, chance levels and sizes of updates are timed too; not so the seconds in which its page is drawn.

    Args:
        plan: what becomes of each tensor.
        device: where the arithmetic is done.
        folder: on the disk that will hold the output, where a file without a name is written; by default a temporary
            one.
    """
    streamer, seconds = Streamer(plan, device), 0.0
    kinds: dict[Any, list[Step]] = {}
    for step in plan.steps:
        if step.base.count:
            kinds.setdefault((type(step.change), bool(_spectral(streamer, step))), []).append(step)
    for (_, spectral), steps in kinds.items():
        largest = max(steps, key=lambda step: step.base.count)
        each = _time_of_part(streamer, largest, spectral, folder)
        reads = 1 + (spectral and plan.recipe.report)  # SVC is one more
        seconds += sum(each * step.base.count * (reads + (spectral and step.options["svc"])) for step in steps)
        if plan.recipe.report and largest.change:
            seconds += _time_of_findings(streamer, largest) * sum(step.base.count for step in steps)
        if spectral:
            sample = _time_of_sample(streamer, largest)
            pieces = [piece for step in steps for piece in _spectral(streamer, step)]
            seconds += sample * sum(piece.count * _side(piece) for piece in pieces) / SAMPLE**3
    return seconds


def _spectral(streamer: Streamer, step: Step) -> list[Piece]:
    """Return the pieces that are merged or calibrated as dense matrices."""
    return [
        piece for piece in step.pieces if streamer.is_spectral(step, piece) and not streamer.is_factored(step, piece)
    ]


def _side(piece: Piece) -> int:
    return min(piece.seen[0], piece.count // piece.seen[0])


def _time_of_part(streamer: Streamer, step: Step, spectral: bool, folder: Path | None) -> float:
    """Return the seconds per entry of reading, merging entry by entry, and writing the first rows of a tensor."""
    part, entries, done = *_part(step), 0
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for merged in _averaged(part, streamer.device) if spectral else streamer.tensor(part):
            file.write(merged.view(torch.uint8).numpy())
            if (done := done + merged.numel()) >= entries:
                break  # what follows is the rest of the base's tensor
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - start) / done


def _part(step: Step) -> tuple[Step, int]:
    """Return a step of the first rows of a tensor, of TIMED bytes at most, and how many entries these are."""
    entry = step.dtype.itemsize + step.base.dtype.itemsize * (1 + len(step.experts))  # bytes
    entries = max(1, int(TIMED / entry))
    pieces = tuple(_first_rows(piece, entries) for piece in step.pieces[:1])
    part = replace(step, pieces=pieces) if isinstance(step.change, Full | LoRA) else step
    return part, min(entries, pieces[0].count) if pieces else entries


def _time_of_findings(streamer: Streamer, step: Step) -> float:
    """Return the seconds per entry of what the report says of a tensor, beside the spectra of dense matrices."""
    part, entries = _part(step)
    start = time.perf_counter()
    moves(part, streamer.device)
    seconds = (time.perf_counter() - start) / entries
    if streamer.is_factored(step, step.pieces[0]):
        start = time.perf_counter()
        streamer.low_rank(step, [])
        seconds += (time.perf_counter() - start) / step.base.count
    return seconds


def _first_rows(piece: Piece, entries: int) -> Piece:
    rows = max(1, min(piece.rows, entries // max(1, piece.width)))
    return replace(piece, shape=(rows, *piece.shape[1:])) if piece.shape else piece


def _averaged(step: Step, device: torch.device) -> Iterator[Tensor]:
    """Yield what `Streamer.tensor` does, with the mean in place of a method that needs whole matrices."""
    (piece,) = step.pieces
    means = (
        (piece.start + part.start * piece.width, torch.stack(differences(step, piece, part, device)).mean(0))
        for part in row_ranges(piece)
    )
    for merged in step.change.applied(step.base, means, 1.0, device):
        yield rounded(step.name, merged, step.dtype)


class _InMemory(Change):
    """Updates that are not read from files."""

    def updates(self, base: Entry, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
        for update in self.experts:
            yield update[start:stop].to(device, copy=True)


def _time_of_sample(streamer: Streamer, step: Step) -> float:
    """Return the seconds that merging, and calibrating and diagnosing if that is done, a small matrix takes."""
    entry = Entry("sample.weight", torch.float32, (SAMPLE, SAMPLE), Path())
    generator = torch.Generator().manual_seed(0)
    change = _InMemory([torch.randn(entry.count, generator=generator) for _ in step.experts])
    sample = replace(step, base=entry, change=change, pieces=(Piece(entry.name, 0, entry.shape, "matrix"),))
    seconds = []
    for _ in range(2):  # the first call warms up
        start = time.perf_counter()
        float(streamer.update(sample, [] if streamer.plan.recipe.report else None).sum())  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def describe(
    output: ModelOutput | AdapterOutput, jobs: int, device: torch.device, out: Path | None = None
) -> list[str]:
    """Return the lines that --dry-run prints: each tensor, what becomes of it, and memory, time and disk to expect.

    Args:
        output: what would be written.
        jobs: tensors merged at the same time.
        device: where the arithmetic would be done.
        out: the folder of the output, if it is known; it need not be there.
    """
    plan = output.plan
    lines = [f"{'tensor':60} {'shape':20} {'dtype':9} what"]
    for step in output.steps:
        shape = "×".join(map(str, step.base.shape)) or "()"
        what = _what(plan, step) if output.tensors(step) else f"{_what(plan, step)}; no place in the adapter, lost"
        lines.append(f"{step.name:60} {shape:20} {dtype_name(step.dtype):9} {what}")
    folder = next((path for path in (out, *out.parents) if path.is_dir()), None) if out else None
    tensors = [tensor for step in output.steps for tensor in output.tensors(step)]
    size = sum(tensor.size for tensor in tensors) / 1e9
    read = sum(path.stat().st_size for model in (plan.base, *plan.experts) for path in model.files) / 1e9
    free = shutil.disk_usage(folder).free / 1e9 if folder else math.inf
    room = f" ({free:.3g} GB free{', too little' if free < size else ''})" if folder else ""
    memory = expected_memory(plan, jobs) / 1e9
    seconds = expected_seconds(plan, device, folder if folder and os.access(folder, os.W_OK) else None) / jobs
    lines.append(
        f"{len(tensors)} tensors, {read:.3f} GB to read, {size:.3f} GB to write{room}, memory up to about "
        f"{memory:.2f} GB, about {_duration(seconds)}"
    )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _what(plan: Plan, step: Step) -> str:
    if not step.change:
        return "the base's value"
    piece, method = step.pieces[0], plan.recipe.method
    parts = [method if takes(merger(method), piece) else f"mean ({method} leaves it)"]
    if step.options["svc"]:
        parts.append({"calibrated": "SVC", "vector rule": "SVC, vector rule"}.get(treatment(step, piece), "no SVC"))
    if step.norm_matched:
        parts.append("norm-matched")
    elif step.final_scale != 1:
        parts.append(f"× {step.final_scale:g}")
    if step.change.label or step.layout not in ("matrix", "vector"):
        stored = step.change.label or step.layout
        parts.append(f"{stored} of {len(step.pieces)}" if len(step.pieces) > 1 else stored)
    if piece.name != step.name and len(step.pieces) == 1 and not step.repeats:
        parts.append(f"tied to {piece.name}")
    if sum(each.count for each in step.pieces) < math.prod(step.change.shape(step.base)):
        parts.append(f"rows 0 to {piece.rows - 1}")
    return ", ".join(parts)
