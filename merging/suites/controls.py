"""The controls that decide what SVC is worth: one scale for each tensor, without data or with it, in place of SVC.

Every merger stands at its own scale, with SVC, norm-matched (merging.norm_matching), with SVC and all other tensors at
their mean, and at a scale tuned on validation data. Paired differences are pooled over the cells of a merger, since one
cell resolves two or three points at best and the differences in question are smaller: an interval that holds 0 is
"undecided", and its half-width says how large an effect it could have missed.
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from common.lab import figures
from common.lab.statistics import Interval, paired_interval, spread, with_bounds
from merging.suites.comparison import (
    BASE,
    BASE_NORM,
    BASE_TUNED,
    BASE_WHOLE,
    CELL,
    GAINS,
    SVC,
    SVC_MEAN,
    SVC_NORM,
    SVC_TUNED,
    TUNED_GAIN,
    by_size,
    in_order,
    merged,
    methods_of,
    named,
    variant_means,
)

NORM_GAIN, NORM_OVER_TUNED = "norm matching − base", "norm matching − tuned base"
WHOLE_OVER_TUNED = "norm matching by one number − tuned base"
SVC_OVER_NORM, SPECTRUM = "SVC − norm matching", "SVC − base, both norm-matched"
CONTROLS = {  # name → variant, and suffix of the counts gained and lost
    NORM_GAIN: (BASE_NORM, ""),
    NORM_OVER_TUNED: (BASE_NORM, "_over_tuned"),
    WHOLE_OVER_TUNED: (BASE_WHOLE, "_over_tuned"),
    SVC_OVER_NORM: (SVC, "_over_norm"),
    SPECTRUM: (SVC_NORM, "_over_norm"),
}
COLUMNS = {  # of the table of controls: heading → variants, of which the first that there is counts
    "own scale": (BASE,),
    "SVC": (SVC,),
    "norm matching": (BASE_NORM,),
    "SVC + mean of other tensors": (SVC_MEAN, SVC),  # mergers that average these tensors anyway have no such row
    "SVC + norm matching": (SVC_NORM,),
    "tuned scale": (BASE_TUNED,),
    "SVC + tuned scale": (SVC_TUNED,),
}
CAPTIONS = {
    "pooled_differences": "SVC against base over all cells together: both tuned, and both norm-matched.",
    "pooled_norm_matching": "Norm matching, which needs no data, against the tuned scale, over all cells together.",
}
REPLACES = 1.5  # points: norm matching that loses surely less than these replaces a tuned scale


def pooled(data: pd.DataFrame, wanted: Mapping[str, tuple[str, str]] | None = None) -> pd.DataFrame:
    """Return paired differences of every merger over all its cells together, in points with 95 % intervals.

    Each task counts once, with its mean over the cells (backbones and suites) that hold it; seeds, tasks and samples
    are resampled as in `paired_interval`. Cells share tasks, test samples and, per width, the pretrained model, so they
    are not resampled: the interval speaks of these cells.

    Args:
        data: the table.
        wanted: as for `comparison.differences`; by default SVC's gains and the controls. One whose variant or counts
            the table lacks is left out.

    Returns:
        One row for each merger and difference: method, condition, interval, mean, low, high, sign and cells (a number).
    """
    rows, found = named(merged(data)), []
    for method in methods_of(rows):
        for name, (row, suffix) in (wanted or GAINS | CONTROLS).items():
            own = rows[(rows.method == method) & (rows.row == row)]
            counts = [f"{count}{suffix}" for count in ("gained", "lost")]
            if own.empty or not set(counts) <= set(own) or own[counts].isna().any(axis=None):
                continue
            interval = paired_interval(_over_cells(own, counts), *counts)
            cells = len(own[CELL].drop_duplicates())
            found.append(dict(method=method, condition=name, interval=interval, sign=interval.sign, cells=cells))
    if not found:
        return pd.DataFrame(columns=["method", "condition", "interval", "mean", "low", "high", "sign", "cells"])
    return with_bounds(pd.DataFrame(found), "interval")


def _over_cells(rows: pd.DataFrame, counts: list[str]) -> pd.DataFrame:
    """Return one row for each seed and task: its samples, and the mean of the counts over the cells that hold it."""
    return rows.groupby(["seed", "task"], sort=False)[["images", *counts]].mean().reset_index()


def half_width(interval: Interval) -> float:
    """Return half the width of an interval, in points: the effect that it could just have told from none."""
    return (interval.high - interval.low) / 2


def brief(found: pd.DataFrame, condition: str) -> str:
    """Return one pooled difference of all mergers in a line: "ties +0.4 ± 0.9, …" (± half the 95 % interval)."""
    rows = found[found.condition == condition]
    return ", ".join(f"{line.method} {line.mean:+.1f} ± {half_width(line.interval):.1f}" for line in rows.itertuples())


def replaced(found: pd.DataFrame) -> dict[str, str]:
    """Return what norm matching is beside a tuned scale: method → "replaces it", "is worse" or "undecided".

    It replaces a tuned scale if the pooled interval of (norm matching − tuned base) lies above −1.5 points, and is
    worse if it lies below 0 and does not replace it.
    """
    rows = found[found.condition == NORM_OVER_TUNED]
    words = {}
    for line in rows.itertuples():
        worse = "is worse" if line.high < 0 else "undecided"
        words[line.method] = "replaces it" if line.low > -REPLACES else worse
    return words


def beside_a_tuned_scale(found: pd.DataFrame) -> str:
    """Return `replaced` as a sentence with a space behind it; "" where norm matching was not measured."""
    words = ", ".join(f"{method} {word}" for method, word in replaced(found).items())
    return f"Norm matching beside a tuned scale: {words}. " if words else ""


def tables(data: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables of a README: the controls of every cell, pooled differences, and the best merger by cell."""
    found = pooled(data)
    if found.empty:
        return {}
    texts = [f"{line.interval} (± {half_width(line.interval):.1f})" for line in found.itertuples()]
    wide = found.assign(text=texts).set_index(["method", "cells", "condition"]).text.unstack(sort=False)
    return {
        "Controls: every merger at its own scale, with SVC, norm-matched and tuned, mean of the tasks, %": _table(data),
        "Paired differences pooled over cells, points: 95 % interval (± half its width)": wide.reset_index(),
        "Best merger of each cell at tuned scales": _best(data),
    }


def _table(data: pd.DataFrame) -> pd.DataFrame:
    means, lines = variant_means(merged(data)), []
    for cell, part in in_order(means, CELL).groupby(CELL, sort=False):
        known = dict(list(part.groupby("row").value))
        line = dict(zip(CELL, cell, strict=True))
        for heading, variants in COLUMNS.items():
            line |= next(({heading: spread(known[row])} for row in variants if row in known), {})
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _best(data: pd.DataFrame) -> pd.DataFrame:
    means = variant_means(merged(data))
    means = means[means.row.isin([BASE_TUNED, SVC_TUNED])]
    means = means.groupby([*CELL, "row"], sort=False).value.mean().reset_index()
    best = means.loc[means.groupby(["backbone", "suite"], sort=False).value.idxmax()]
    return best.assign(value=best.value.map("{:.1f}".format)).rename(columns={"row": "variant", "value": "accuracy, %"})


def over_bases(data: pd.DataFrame, condition: str) -> pd.DataFrame:
    """Return a pooled difference on every pretrained base, and its mean ± standard deviation over bases, as text.

    Args:
        data: a table whose backbones differ in their pretrained base alone.
        condition: one of `GAINS` or `CONTROLS`.

    Returns:
        One row for each merger: method, one column for each backbone ("+0.4 ± 0.9", ± half the 95 % interval) and
        "over bases".
    """
    lines = []
    found = {name: pooled(data[data.backbone == name]) for name in by_size(data.backbone)}
    for method in methods_of(data):
        line, means = {"method": method}, []
        for backbone, rows in found.items():
            for own in rows[(rows.method == method) & (rows.condition == condition)].itertuples():
                line[backbone] = f"{own.mean:+.1f} ± {half_width(own.interval):.1f}"
                means.append(own.mean)
        lines.append(line | {"over bases": spread(pd.Series(means))})
    return pd.DataFrame(lines).fillna("")


SHOWN = {  # stem of a figure → differences; at own scales the sum gains too much from SVC to be drawn beside others
    "pooled_differences": (TUNED_GAIN, SPECTRUM),
    "pooled_norm_matching": (NORM_OVER_TUNED, WHOLE_OVER_TUNED),
}


def draw(data: pd.DataFrame) -> dict[str, Figure]:
    """Return figures of pooled differences: SVC against base; norm matching, where measured, against a tuned scale."""
    return _drawn(pooled(data).assign(panel="All cells together"))


def draw_by_backbone(data: pd.DataFrame) -> dict[str, Figure]:
    """Return the same figures with one panel for each backbone."""
    parts = [pooled(data[data.backbone == name]).assign(panel=name) for name in by_size(data.backbone)]
    return _drawn(pd.concat(parts, ignore_index=True))


def _drawn(found: pd.DataFrame) -> dict[str, Figure]:
    label = "difference in mean accuracy, points"
    parts = {stem: found[found.condition.isin(conditions)] for stem, conditions in SHOWN.items()}
    return {
        stem: figures.forest(rows, item="method", panel="panel", xlabel=label)
        for stem, rows in parts.items()
        if len(rows)
    }
