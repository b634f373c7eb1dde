"""Memory and time to expect of a merge, before it is run."""

import time

import torch

from merging.calibration import calibrate
from merging.mergers import MERGERS
from merging.plan import Piece, Plan, Step
from merging.streaming import BY_ENTRY, RANGE, Streamer, chosen, svc_options

PROGRAM = 600 * 2**20  # bytes: the interpreter with PyTorch
SAMPLE = 256  # side of the matrix that is timed
DISK = 300e6  # bytes a second that are assumed for reading and writing


def expected_memory(plan: Plan, jobs: int = 1) -> int:
    """Return the peak of the resident memory to expect, in bytes, for the largest tensors of all jobs.

    With K experts, in float32 copies of a matrix: K + 4 for SVC, K + 9 for the spectral mergers, whose bases are
    computed in float64 (both measured at 32000 × 1536). Other methods work on ranges of rows.
    """
    streamer = Streamer(plan, torch.device("cpu"))
    peaks = [_peak(streamer, step, piece) for step in plan.steps for piece in step.pieces]
    return PROGRAM + sum(sorted(peaks, reverse=True)[:jobs])


def _peak(streamer: Streamer, step: Step, piece: Piece) -> int:
    tasks = len(step.experts)
    if streamer.is_whole(step, piece):
        return 4 * piece.count * (tasks + (4 if streamer.by_entry(piece) else 9))
    masks = piece.count * (4 + tasks) if streamer.plan.recipe.method == "dare" else 0
    return 4 * RANGE * (tasks + 4) + masks


def expected_seconds(plan: Plan, device: torch.device) -> float:
    """Return the time to expect on one job: small matrices are timed with the same functions, the disk is assumed.

    What is done entry by entry grows with the number of entries, what is done on matrices with m · n · min(m, n).
    """
    streamer = Streamer(plan, device)
    seconds = sum(step.size * (len(step.experts) + 2) for step in plan.steps) / DISK
    samples: dict[bool, float] = {}
    for step in plan.steps:
        for piece in step.pieces if step.pieces and step.base.count else ():
            spectral = streamer.is_spectral(step, piece)
            if spectral not in samples:
                samples[spectral] = _time_of_sample(plan, step, spectral, device)
            work = piece.count * (min(piece.seen[0], piece.count // piece.seen[0]) if spectral else SAMPLE)
            seconds += samples[spectral] * work / SAMPLE**3
    return seconds


def _time_of_sample(plan: Plan, step: Step, spectral: bool, device: torch.device) -> float:
    method = plan.recipe.method if spectral or plan.recipe.method in BY_ENTRY else "weight_average"
    generator = torch.Generator().manual_seed(0)
    updates = [{"": torch.randn(SAMPLE, SAMPLE, generator=generator).to(device)} for _ in step.experts]
    seconds = []
    for _ in range(2):  # the first call warms up
        start = time.perf_counter()
        merged = MERGERS[method](updates, **chosen(step, method))
        if spectral and step.options["svc"]:
            merged = calibrate(merged, updates, **svc_options(step))
        float(merged[""].sum())  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds)
