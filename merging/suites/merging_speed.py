"""Seconds and exactness of mergers beside the formula as it is written, how both grow, and what the table says of it.

Rows have the columns method (a merger), contender (OURS, or a dtype in which its formula is computed), part and size:
part "tower" has one matrix of each shape of a tower, whose number stands in `matrices`; the others grow one size, and
leave all else as it is: "tasks" (K), "width" (of a square matrix) and "rank" (of LoRA updates, in factored form).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from torch import Tensor

from common.lab import benchmark, figures
from merging.lowrank import LowRank, merge_low_rank
from merging.mergers import merger

OURS, START = "ours", "ours, no step"
STEPS = 300  # of WUDI, as published
PRECISIONS = {"formula, float32": torch.float32, "formula, float64": torch.float64}
FORMULA, EXACT = PRECISIONS
SECONDS, ERROR = "merging seconds", "merging error"
Formulas = Mapping[str, Callable[[Tensor], Tensor]]  # merger → its formula on the K updates (K, m, n) of a matrix
Options = Mapping[str, Mapping[str, Any]]  # merger → options of ours that its formula has too
Call = Callable[[], Any]


def random_updates(shape: Sequence[int], tasks: int, seed: int, device: torch.device) -> Tensor:
    """Return K updates (K, m, n) of weight-like size, normal entries, half of their energy shared by all."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tasks + 1, *shape, generator=generator)
    return (1e-3 * (drawn[:-1] + drawn[-1])).to(device)


def tower_rows(
    formulas: Formulas, options: Options, shape: Sequence[int], tasks: int, seed: int, repeats: int, threads: int,
    device: torch.device,
) -> Iterator[dict]:  # fmt: skip
    """Yield seconds of all contenders on one matrix, in turn, and the errors of ours and of the float32 formula."""
    updates = random_updates(shape, tasks, seed, device)
    given = {name: updates.to(dtype) for name, dtype in PRECISIONS.items()}
    for method, formula in formulas.items():
        results: dict[str, Tensor] = {}
        calls = _ours(results, method, updates, options.get(method, {}))
        calls |= {name: partial(_formula, results, name, formula, given[name]) for name in PRECISIONS}
        labels = dict(method=method, part="tower", shape=f"{shape[0]} × {shape[1]}", tasks=tasks)
        yield from _timed(calls, repeats, threads, device, labels | options.get(method, {}))
        exact = results[EXACT]
        for contender in (OURS, FORMULA):
            error = float((results[contender].double() - exact).norm() / exact.norm())
            yield labels | dict(contender=contender, metric=ERROR, value=error)


def _ours(results: dict[str, Tensor], method: str, updates: Tensor, options: Mapping[str, Any]) -> dict[str, Call]:
    """Return the calls of ours: of a merger that takes steps also without any, which tells what it prepares."""
    tasks, own = [{"weight": update} for update in updates], merger(method)

    def call() -> None:
        results[OURS] = own(tasks, **options)["weight"]

    start = {START: partial(own, tasks, **options | {"steps": 0})} if "steps" in options else {}
    return start | {OURS: call}


def _formula(results: dict[str, Tensor], name: str, formula: Callable[[Tensor], Tensor], updates: Tensor) -> None:
    results[name] = formula(updates)


def _timed(
    calls: Mapping[str, Call], repeats: int, threads: int, device: torch.device, labels: Mapping[str, Any]
) -> Iterator[dict]:
    with threadpool_limits(threads):  # also of the LAPACK behind SciPy
        for repeat, contender, seconds in benchmark.interleaved_seconds(calls, repeats, device):
            yield {**labels, "contender": contender, "repeat": repeat, "metric": SECONDS, "value": seconds}


def growth_rows(
    formulas: Formulas, options: Options, part: str, size: int, width: int, tasks: int, seed: int, repeats: int,
    threads: int, device: torch.device,
) -> Iterator[dict]:  # fmt: skip
    """Yield seconds of ours and of the float32 formula at one size of one part; of the factored form where it is rank.

    Args:
        formulas, options, seed, repeats, threads, device: as for `tower_rows`.
        part: what grows: tasks, width or rank.
        size: how far.
        width: of the square matrix, if it does not grow.
        tasks: K, if it does not grow.
    """
    tasks, width = (size if part == "tasks" else tasks), (size if part == "width" else width)
    updates = random_updates((width, width), tasks, seed, device)
    factors = _lora(width, size, tasks, seed, device)
    for method, formula in formulas.items():
        if part != "rank":
            calls = _ours({}, method, updates, options.get(method, {})) | {FORMULA: partial(formula, updates)}
        else:
            calls = {OURS: partial(merge_low_rank, factors, method)} if merger(method).factored else {}
        labels = dict(method=method, part=part, size=size, tasks=tasks)
        yield from _timed(calls, repeats, threads, device, labels | options.get(method, {}))


def _lora(width: int, rank: int, tasks: int, seed: int, device: torch.device) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    pairs = [(draw(width, rank), draw(rank, width)) for _ in range(tasks)]
    return [LowRank(b.to(device), a.to(device), 1e-3) for b, a in pairs]


# Reading the table; one from before there were such rows says nothing -------------------------------------------------

CELL = ["backbone", "threads", "tasks", "method"]
GROWING = {"tasks": "number of tasks", "width": "width", "rank": "rank of each update"}


def of_tower(data: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of part "tower"."""
    return data[data.part == "tower"] if "part" in data else data[:0]


def whole_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows of seconds, those of a merger that took n steps at all STEPS of them: t_0 + (t_n − t_0) · STEPS / n.

    t_0 is the time without any step, 0 for a formula, which prepares nothing.
    """
    rows = rows[rows.metric == SECONDS]
    if "steps" not in rows:
        return rows
    keys = ["backbone", "threads", "tasks", "method", "part", "shape", "size", "repeat", "seed"]
    keys = [key for key in keys if key in rows]
    start = rows.loc[rows.contender == START, [*keys, "value"]]
    rows = rows[rows.contender != START].merge(start, on=keys, how="left", suffixes=("", "_start"))
    before = rows.value_start.where(rows.contender == OURS, 0)
    stretched = (before + (rows.value - before) * STEPS / rows.steps).clip(lower=rows.value)
    return rows.assign(value=rows.value.where(rows.steps.isna(), stretched))


def tower_table(data: pd.DataFrame) -> pd.DataFrame:
    """Return seconds of a whole tower by contender, `ratio` = ours / float32 formula, and the largest errors.

    Repeats and seeds are averaged; the seconds of one matrix of each shape count as often as the tower has the shape.
    """
    rows = of_tower(data)
    if rows.empty:
        return rows
    seconds = whole_runs(rows).assign(value=lambda own: own.value * own.matrices)
    means = seconds.groupby([*CELL, "shape", "contender"], sort=False).value.mean()
    table = means.groupby([*CELL, "contender"], sort=False).sum().unstack(sort=False)
    errors = rows[rows.metric == ERROR].groupby([*CELL, "contender"], sort=False).value.max().unstack(sort=False)
    table = table.assign(ratio=table[OURS] / table[FORMULA])
    return table.join(errors.add_suffix(", error")).reset_index().astype({"tasks": int})


def ratios(data: pd.DataFrame) -> dict[str, float]:
    """Return quantity in words → ours / float32 formula on a whole tower."""
    return {
        f"time of {row['method']} / its {FORMULA}: {row['backbone']}, {row['tasks']} tasks, "
        f"{threads_text(row['threads'])}": row["ratio"]
        for row in tower_table(data).to_dict("records")
    }


def exponents(data: pd.DataFrame) -> pd.DataFrame:
    """Return the slope of log seconds over log size for every merger, contender and part, from medians."""
    found = middle(data[data.part.isin(GROWING)]).groupby(["method", "contender", "part"], sort=False)
    slopes = found.apply(
        lambda own: np.polyfit(np.log(own["size"]), np.log(own.value), 1)[0] if len(own) > 1 else np.nan
    )
    return slopes.map("{:.2f}".format).unstack(sort=False).rename(columns=GROWING).fillna("–").reset_index()


def middle(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the medians over repeats and seeds of seconds of growth."""
    keys = ["part", "method", "contender", "threads", "size"]
    return whole_runs(rows).groupby(keys, sort=False).value.median().reset_index()


def tables(data: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables of a README: whole towers, single shapes, exponents."""
    tower = tower_table(data)
    if tower.empty:
        return {}
    rows = of_tower(data)
    means = whole_runs(rows).groupby([*CELL, "shape", "contender"], sort=False).value.mean().unstack(sort=False)
    errors = [column for column in tower if column.endswith("error")]
    tower[errors] = tower[errors].map("{:.1e}".format)
    return {
        "Mergers on a tower: seconds, ours / float32 formula, largest relative error": tower,
        "Mergers, ours / float32 formula on one matrix": (means[OURS] / means[FORMULA])
        .unstack(sort=False)
        .reset_index(),
        "Mergers: exponents of growth (slope of log seconds over log size)": exponents(data),
    }


def draw(data: pd.DataFrame) -> dict[str, Figure]:
    """Return the figures: time over that of the float32 formula by shape, and growth on logarithmic axes."""
    tower = of_tower(data)
    if tower.empty:
        return {}
    tower = whole_runs(tower).rename(columns={"shape": "form"})
    keys = ["threads", "tasks", "method", "form", "repeat", "seed"]
    tower = tower.merge(tower[tower.contender == FORMULA][[*keys, "value"]], on=keys, suffixes=("", "_formula"))
    panel = tower.form + ", " + tower.tasks.astype(int).astype(str) + " tasks, " + tower.threads.map(threads_text)
    tower = tower.assign(ratio=tower.value / tower.value_formula, panel=panel)
    label = "time / time of the float32 formula"
    shown = dict(condition="contender", value="ratio", start=FORMULA, panel="panel", xlabel=label, log=True)
    drawn = {"mergers_over_formula": figures.paired(tower, **shown)}
    scales = dict(panel="contender", ylabel="seconds", xscale="log", yscale="log")
    for part, quantity in GROWING.items():
        rows = middle(data[data.part == part])
        drawn[f"mergers_growth_with_{part}"] = figures.lines(rows, x="size", xlabel=quantity, **scales)
    return drawn


def sentence(data: pd.DataFrame, backbone: str, goal: float) -> str:
    """Return which mergers take at most `goal` of the float32 formula's time at its exactness or better, always."""
    if "part" not in data:
        return ""
    tower = tower_table(data)
    tower = tower[tower.backbone == backbone]
    if tower.empty:
        return "Mergers: not run"
    within, missed = [], []
    for method, rows in tower.groupby("method", sort=False):
        share = f"{method} {rows.ratio.max():.2f}"
        if (worse := rows[f"{OURS}, error"] > rows[f"{FORMULA}, error"]).any():
            missed.append(f"{share}, less exact in {worse.sum()} of {len(rows)}")
        else:
            (within if rows.ratio.max() <= goal else missed).append(share)
    head = f"Mergers within {goal} of the float32 formula's time, and as exact: {', '.join(within) or 'none'}"
    return f"{head}; not: {', '.join(missed)}" if missed else head


def threads_text(threads: float) -> str:
    """Return "1 thread", "2 threads"."""
    return f"{threads:.0f} thread{'s' * (threads != 1)}"
