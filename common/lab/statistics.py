"""Paired comparison of two models over seeds, tasks and images."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Interval:
    """A mean difference with its 95 % interval, in percentage points or, for a relative change, in %."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 where the whole interval is above 0, −1 where it is below, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high as a figure can draw them: the mean itself where the interval of one seed is unbounded."""
        return (self.low, self.high) if math.isfinite(self.high) else (self.mean, self.mean)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.mean:+.1f} (one seed)"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_interval(
    cells: pd.DataFrame, gained: str = "gained", lost: str = "lost", draws: int = 1000, seed: int = 0
) -> Interval:
    """Return the mean accuracy difference of two models, in percentage points, by a paired hierarchical bootstrap.

    Each draw resamples seeds and tasks, which are crossed, with replacement, and then the images of every chosen cell.
    Of a pair of models only three counts of a cell matter: the images that the first gets right and the second wrong
    (gained), the reverse (lost), and all. Percentile interval; with one seed it holds for that seed only.

    Args:
        cells: one row for each seed and task, with columns seed, task, images (their number) and the two below.
        gained, lost: names of the columns of these counts.
        draws: bootstrap samples.
        seed: of the bootstrap's own generator, fixed so that the same table gives the same interval.

    Raises:
        ValueError: cells are missing, doubled or empty.
    """
    grids = [cells.pivot(index="seed", columns="task", values=column) for column in ("images", gained, lost)]
    if grids[0].empty or any(grid.isna().any(axis=None) for grid in grids):
        raise ValueError(f"{gained}/{lost}: expected counts for every seed and task, got {len(cells)} rows with gaps")
    counts = (np.ascontiguousarray(grid.to_numpy(float)) for grid in grids)
    return Interval(*_bootstrap(grids[0].shape, *(grid.tobytes() for grid in counts), draws, seed))


@lru_cache(maxsize=10_000)  # verdict, claims, tables and figures of a result ask for the same intervals
def _bootstrap(
    shape: tuple[int, int], of_images: bytes, of_up: bytes, of_down: bytes, draws: int, seed: int
) -> tuple[float, float, float]:
    """Return mean, low and high of `paired_interval` from counts (seeds, tasks) as the bytes of float64 arrays."""
    images, up, down = (np.frombuffer(grid).reshape(shape) for grid in (of_images, of_up, of_down))
    shares = np.stack([up / images, down / images, 1 - (up + down) / images], -1)  # (seeds, tasks, 3)
    generator = np.random.default_rng(seed)
    rows = generator.integers(images.shape[0], size=(draws, images.shape[0], 1))
    columns = generator.integers(images.shape[1], size=(draws, 1, images.shape[1]))
    counts = generator.multinomial(images[rows, columns].astype(int), shares[rows, columns])
    means = 100 * ((counts[..., 0] - counts[..., 1]) / images[rows, columns]).mean((1, 2))  # (draws,)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(100 * ((up - down) / images).mean()), float(low), float(high)


def with_bounds(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the table with the columns mean, low and high of the intervals in a column (what a forest plot needs)."""
    bounds = [{"mean": x.mean, "low": x.low, "high": x.high} for x in table[column]]
    return table.join(pd.DataFrame(bounds, index=table.index))


def spread(values: pd.Series, digits: int = 1) -> str:
    """Return "mean ± standard deviation" of one number per seed; the mean alone where there is one seed."""
    values = values.dropna()
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def significant(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of means with its numbers to three significant digits, and its index as columns."""
    return table.map("{:.3g}".format).reset_index()


def relative_change(first: pd.Series, second: pd.Series) -> Interval:
    """Return by how many % the second of two positive quantities differs from the first, paired by seed.

    Args:
        first, second: positive values indexed by seed; only seeds that have both count.

    Raises:
        ValueError: no seed has both.
    """
    ratios = (second / first).dropna()
    if ratios.empty:
        raise ValueError(f"no seed has both: {list(first.index)} and {list(second.index)}")
    return change_from_one(ratios)


def change_from_one(ratios: pd.Series) -> Interval:
    """Return by how many % the geometric mean of positive ratios, one per seed, differs from 1.

    The interval is Student's on the logarithms of the ratios: it holds for further seeds, data and settings being the
    same. With one seed it is unbounded.
    """
    logs = _student(np.log(ratios))
    return Interval(*map(_percent, (logs.mean, logs.low, logs.high)))


def mean_difference(first: pd.Series, second: pd.Series) -> Interval:
    """Return by how much the second of two quantities is larger on average than the first, paired by seed.

    The interval is Student's on the differences, in the unit of the quantities; with one seed it is unbounded.

    Args:
        first, second: values indexed by seed; only seeds that have both count.

    Raises:
        ValueError: no seed has both.
    """
    differences = (second - first).dropna()
    if differences.empty:
        raise ValueError(f"no seed has both: {list(first.index)} and {list(second.index)}")
    return _student(differences)


def _student(values: pd.Series) -> Interval:
    mean, reach = float(values.mean()), math.inf
    if len(values) > 1:
        from scipy import stats  # late: --help needs no seconds of it

        reach = float(stats.t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values)))
    return Interval(mean, mean - reach, mean + reach)


def _percent(logarithm: float) -> float:
    return 100 * math.expm1(logarithm) if logarithm < 700 else math.inf
