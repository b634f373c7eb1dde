"""What --dry-run prints: what would become of each tensor, and memory and time to expect."""

import math
import time

import torch

from merging.calibration import calibrate
from merging.command.changes import RANGE, Step
from merging.command.outputs import AdapterOutput, ModelOutput
from merging.command.plan import Plan
from merging.command.recipe import dtype_name
from merging.command.storage import Piece
from merging.command.stream import Streamer, svc_of, takes, treatment
from merging.mergers import merger, weight_average

PROGRAM = 600 * 2**20  # bytes: the interpreter with PyTorch
SAMPLE = 256  # side of the matrix that is timed
DISK = 300e6  # bytes per second that are assumed for reading and writing


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
        side = min(piece.seen[0], piece.count // piece.seen[0])
        return 4 * streamer.merger.copies * piece.count + 32 * side**2
    return 4 * RANGE * (len(step.experts) + 4)


def expected_seconds(plan: Plan, device: torch.device) -> float:
    """Return the seconds to expect with one job: a small matrix is timed, the speed of the disk is assumed.

    What is done entry by entry grows with the number of entries, what is done on matrices with m · n · min(m, n).
    """
    streamer = Streamer(plan, device)
    seconds = sum(step.size * (len(step.experts) + 2) for step in plan.steps) / DISK
    samples: dict[bool, float] = {}
    for step in plan.steps:
        for piece in step.pieces if step.pieces and step.base.count else ():
            spectral = streamer.is_spectral(step, piece) and not streamer.is_factored(step, piece)
            if spectral not in samples:
                samples[spectral] = _time_of_sample(streamer, step, spectral)
            work = piece.count * (min(piece.seen[0], piece.count // piece.seen[0]) if spectral else SAMPLE)
            seconds += samples[spectral] * work / SAMPLE**3
    return seconds


def _time_of_sample(streamer: Streamer, step: Step, spectral: bool) -> float:
    merge, options = streamer.merger, step.of_merger(streamer.plan.recipe.method)
    if not spectral and not merge.by_entry:  # all that it does not take is averaged
        merge, options = weight_average, {}
    generator = torch.Generator().manual_seed(0)
    updates = [{"": torch.randn(SAMPLE, SAMPLE, generator=generator).to(streamer.device)} for _ in step.experts]
    seconds = []
    for _ in range(2):  # the first call warms up
        start = time.perf_counter()
        merged = merge(updates, **options)
        if spectral and step.options["svc"]:
            merged = calibrate(merged, updates, svc_of(step))
        float(merged[""].sum())  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def describe(output: ModelOutput | AdapterOutput, jobs: int, device: torch.device) -> list[str]:
    """Return the lines that --dry-run prints: each tensor, what becomes of it, and memory and time to expect."""
    plan = output.plan
    lines = [f"{'tensor':60} {'shape':20} {'dtype':9} what"]
    for step in output.steps:
        shape = "×".join(map(str, step.base.shape)) or "()"
        what = _what(plan, step) if output.tensors(step) else f"{_what(plan, step)}; no place in the adapter, lost"
        lines.append(f"{step.name:60} {shape:20} {dtype_name(step.dtype):9} {what}")
    tensors = [tensor for step in output.steps for tensor in output.tensors(step)]
    size = sum(tensor.size for tensor in tensors) / 1e9
    seconds = expected_seconds(plan, device) / jobs
    lines.append(
        f"{len(tensors)} tensors, {size:.3f} GB to write, memory up to about "
        f"{expected_memory(plan, jobs) / 1e9:.2f} GB, about {max(1, round(seconds))} s"
    )
    return lines


def _what(plan: Plan, step: Step) -> str:
    if not step.change:
        return "the base's value"
    piece, method = step.pieces[0], plan.recipe.method
    parts = [method if takes(merger(method), piece) else f"mean ({method} leaves it)"]
    if step.options["svc"]:
        parts.append({"calibrated": "SVC", "vector rule": "SVC, vector rule"}.get(treatment(step, piece), "no SVC"))
    if step.options["final_scale"] != 1:
        parts.append(f"× {step.options['final_scale']:g}")
    if step.change.label or step.layout not in ("matrix", "vector"):
        stored = step.change.label or step.layout
        parts.append(f"{stored} of {len(step.pieces)}" if len(step.pieces) > 1 else stored)
    if piece.name != step.name and len(step.pieces) == 1 and not step.repeats:
        parts.append(f"tied to {piece.name}")
    if sum(each.count for each in step.pieces) < math.prod(step.change.shape(step.base)):
        parts.append(f"rows 0 to {piece.rows - 1}")
    return ", ".join(parts)
