"""What `python -m merging` does with its flags (`merging.command.flags`): open, plan, merge shard by shard, describe.

Memory: below 1 GB; SVC, TSV-M, Iso and STAR need a few copies of the largest tensor in addition, for each of --jobs.

Storage: SVC's output space is the layer's, also where weights are stored (in, out), as GPT-2's are; stacks of experts
are merged matrix by matrix; convolution kernels are (out, rest) for methods that take them, and not calibrated without
--kernels. Heads that only some models have are the base's, vocabularies of different size share their first rows: both
are reported, and refused with --strict. The rules by which names and shapes tell all that stand at the top of
`merging/command/plan.py`, `merging/command/storage.py` and `merging/command/adapter_plan.py`.
"""

import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.progress import log_bars
from merging.checkpoints import Checkpoint, locate, open_checkpoint
from merging.command.destination import destination, is_complete
from merging.command.dry_run import describe
from merging.command.findings import NORMS_AFTER_SVC
from merging.command.flags import parse
from merging.command.licences import licence_warning, licences
from merging.command.mergekit import read_mergekit
from merging.command.model_card import companions, found_out, what_to_say, write_companions
from merging.command.outputs import AdapterOutput, ModelOutput, adapter_output
from merging.command.plan import Plan, make_plan
from merging.command.push import check_push, push
from merging.command.recipe import AUTO, Recipe, identity
from merging.command.shards import Output, Shard, Write, begin, remove_leftovers, write_text
from merging.command.stream import Streamer
from merging.command.thresholds import decided_together
from merging.peft_files import CONFIG as ADAPTER_CONFIG
from merging.peft_files import Adapter, open_adapter
from merging.weight_files import other_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, after one line on stderr where something is wrong.

    Returns:
        0, or 1 for what is wrong, or 130 after Ctrl-C, as shells have it.

    Raises:
        BrokenPipeError: nobody reads what it prints.
    """
    try:
        flags = parse(sys.argv[1:] if arguments is None else arguments)
        for note in read_mergekit(flags.mergekit)[1] if flags.mergekit and _process()[0] == 0 else ():
            print(f"note: {flags.mergekit}: {note}", file=sys.stderr)
        values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(Recipe)}
        merge(Recipe(**values), flags.out, flags.jobs, flags.device, flags.dry_run, flags.report_only, flags.push)
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:
        print(f"python -m merging: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("python -m merging: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def merge(
    recipe: Recipe,
    out: str | Path,
    jobs: int = 1,
    device: str = "cpu",
    dry_run: bool = False,
    report_only: bool = False,
    to: str = "",
) -> None:
    """Merge by a recipe into a folder, continuing what an interrupted call has left.

    Args:
        recipe: what is merged and how.
        out: folder of the merged model.
        jobs: tensors merged at the same time.
        device: cpu, cuda or cuda:N.
        dry_run: print the plan only.
        report_only: write the report of that merge into `out`, and no weights.
        to: repository of the Hub, to which the finished merge is uploaded.

    Raises:
        ValueError, OSError: one line that names file and tensor, and says what to do.
    """
    recipe = dataclasses.replace(recipe, report=recipe.report or report_only)
    recipe.check()
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    if not str(out) and not dry_run:
        raise ValueError("give --out, the folder of the merged model")
    if to and report_only:
        raise ValueError("--push uploads a finished merge, and --report-only makes none; give one of them")
    out = destination(out, replaced=not report_only) if str(out) else None
    if to and not dry_run and _process()[0] == 0:
        check_push(to)
    base, *experts = open_checkpoint(recipe.base), *map(_open_expert, recipe.experts)
    plan = make_plan(recipe, base, experts)
    plan.remarks += [note for each in (base, *experts) for note in each.notes]
    if recipe.svc and recipe.final_scale == AUTO:
        plan.remarks.append(NORMS_AFTER_SVC)
    if warning := licence_warning(licences(plan)):
        plan.remarks.append(warning)
    if base.folder:
        companions(base.folder)  # refuses now what could not be copied at the end
        if aside := other_weights(base.folder) if recipe.output == "model" else ():
            plan.remarks.append(
                f"{base.given}: weights in {', '.join(aside)}: no parts of the model; not in the output"
            )
    output = adapter_output(plan) if recipe.output == "adapter" else ModelOutput(plan)
    made_from = identity(recipe, (base, *experts))
    on = _device(device)
    _tell((*plan.notes, *plan.remarks, *plan.repeated.values()) if _process()[0] == 0 else ())
    if dry_run:
        print("\n".join(describe(output, jobs, on, out)))
    elif report_only:
        _report_alone(output, out, jobs, on)
    elif is_complete(out, made_from):
        remove_leftovers(out, made_from)  # of a merge that was killed after its last step
        print(f"{out}: this recipe has made it already; nothing to do")
    else:
        _carry_out(output, out, made_from, jobs, on)
    if to and not dry_run and _process()[0] == 0:
        print(f"{out}: uploaded to {push(out, to)}")


def _open_expert(given: str) -> Checkpoint | Adapter:
    path = locate(given)
    return open_adapter(path) if (path / ADAPTER_CONFIG).is_file() else open_checkpoint(given, path)


def _process() -> tuple[int, int]:
    """Return the rank of this process, and how many share the work, as `accelerate launch` says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _carry_out(output: ModelOutput | AdapterOutput, out: Path, made_from: str, jobs: int, device: torch.device) -> None:
    """Merge shard by shard, those of this process that are not there yet; rank 0 adds the other files at the end."""
    _hand_back_freed_memory()
    rank, ranks = _process()
    shards = output.shards
    own = sorted(shards, key=lambda shard: -shard.size)[rank::ranks] if ranks > 1 else shards
    if rank == 0 and len(shards) < ranks:
        print(f"note: {len(shards)} shards keep as many of {ranks} processes busy; see --shard-size", file=sys.stderr)
    with begin(out, made_from, shards, rank, ranks) as files:
        left = [shard for shard in own if not files.is_finished(shard)]
        with log_bars(), files.attempt(), _progress(own, left, rank) as bar:
            if left or rank == 0:
                streamer = Streamer(output.plan, device, _decided(output.plan, files, device, jobs, rank))
            for shard in left:
                files.write(shard, partial(_merged, output, shard, streamer, jobs, bar))
        if rank == 0:
            notes = [note for shard_notes in files.notes() for note in shard_notes]
            write_companions(output, files.folder, made_from, out, notes)
            files.finish()
            _tell(found_out(output, notes))
            sizes = [tensor.size for shard in shards for tensor in shard.tensors]
            print(f"{out}: {len(sizes)} tensors, {sum(sizes) / 1e9:.3f} GB")


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _report_alone(output: ModelOutput | AdapterOutput, out: Path, jobs: int, device: torch.device) -> None:
    """Merge everything, write the report of it and forget the weights; rank 0 does it for all."""
    from merging.command.report import REPORT, write_report

    if _process()[0] > 0:
        return
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - set(REPORT)):
        raise ValueError(f"{out}: holds something else than a report; choose another --out for --report-only")
    _hand_back_freed_memory()
    every = lambda function, items: _in_threads(function, list(items), jobs)  # noqa: E731
    streamer = Streamer(output.plan, device, decided_together(output.plan, device, every))
    whole = Shard("", tuple(output.steps), ())
    with log_bars(), _progress([whole], [whole], 0) as bar:
        notes = _merged(output, whole, streamer, jobs, bar, lambda name, parts: collections.deque(parts, maxlen=0))
    write_report(output.plan, notes, what_to_say(output, notes), out)
    _tell(found_out(output, notes))
    print(f"{out / REPORT[0]}: the report of {len(output.plan.merged)} merged tensors; no weights were written")


def _progress(own: Sequence[Shard], left: Sequence[Shard], rank: int) -> tqdm:
    total, still = (sum(step.size for shard in shards for step in shard.steps) for shards in (own, left))
    count = sum(len(shard.steps) for shard in own)
    options = dict(unit="B", unit_scale=True, desc=f"{count} tensors", disable=rank > 0)
    return tqdm(total=total, initial=total - still, **options)


def _merged(
    output: ModelOutput | AdapterOutput, shard: Shard, streamer: Streamer, jobs: int, bar: tqdm, write: Write
) -> list[dict[str, Any]]:
    """Merge and write the tensors of one shard; returns one note per step."""
    notes = {}
    for step, note in _in_threads(lambda step: (step, output.write(step, streamer, write)), shard.steps, jobs):
        notes[step.name] = note
        bar.set_postfix_str(step.name, refresh=False)
        bar.update(step.size)
    return [notes[step.name] for step in shard.steps]


def _hand_back_freed_memory() -> None:
    """Let glibc return freed matrices to the system at once, and keep what a few ranges of rows take.

    By itself it keeps freed blocks of up to 32 MiB for later, and gives back the end of its heap whenever that is free,
    only to ask for the same pages again for the next range.
    """
    with contextlib.suppress(OSError, AttributeError):  # other C libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**24)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**26)  # M_TRIM_THRESHOLD


def _decided(plan: Plan, files: Output, device: torch.device, jobs: int, rank: int) -> Any | None:
    """Return what the method decides over all tensors together; rank 0 computes it once and keeps it for a restart."""
    path = files.work / "decided.json"
    every = lambda function, items: _in_threads(function, list(items), jobs)  # noqa: E731
    if rank == 0 and not path.exists():
        write_text(path, json.dumps(decided_together(plan, device, every)))
    while not path.exists():
        time.sleep(0.1)
    return json.loads(path.read_text(encoding="utf-8"))


def _in_threads(function: Callable, items: Iterable, jobs: int) -> Iterator:
    """Yield the function's results as they come; with several jobs the cores are shared out among threads."""
    if jobs == 1:
        yield from map(function, items)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        waiting = {pool.submit(function, item) for item in items}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name}: this machine has no such device for PyTorch")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device
