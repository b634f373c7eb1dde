"""The plot style, the colours, and the kinds of plot that experiments share.

All functions take a tidy table and the names of its columns and return a matplotlib Figure with its own canvas (they
touch no pyplot state). If there are several seeds, they are drawn as points beside their mean.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

INK, MUTED, FAINT = "#222222", "#8A8A8A", "#DDDDDD"
DASHED = (0, (4, 3))

# Okabe and Ito's palette, which colour-blind readers can tell apart, and three darker relatives.
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31", "#4D4D4D", "#004D40")

STYLE = {
    "font.size": 9, "text.color": INK, "figure.dpi": 150, "lines.linewidth": 1.8,
    "axes.labelsize": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6,
    "xtick.color": MUTED, "xtick.labelcolor": INK, "xtick.labelsize": 8.5,
    "ytick.color": MUTED, "ytick.labelcolor": INK, "ytick.labelsize": 8.5,
    "legend.frameon": False, "legend.fontsize": 8.5,
}  # fmt: skip

plot_style = matplotlib.rc_context(STYLE)  # a decorator for functions that draw, and a context manager


@dataclass(frozen=True)
class Style:
    """How a method or condition is written and coloured in figures."""

    label: str
    colour: str | None = None  # None: the next one of the palette


_STYLES: ContextVar[Mapping[str, Style]] = ContextVar("styles", default=MappingProxyType({}))


@contextmanager
def styled(styles: Mapping[str, Style]) -> Iterator[None]:
    """Within the block, let all plots use these styles: {name of a method or condition: style}."""
    token = _STYLES.set(styles)
    try:
        yield
    finally:
        _STYLES.reset(token)


def colour(name: Any, position: int = 0) -> str:
    """Return the colour of a method or condition; a name without one takes that of the palette at `position`."""
    return _own_colour(name) or CYCLE[position % len(CYCLE)]


def _own_colour(name: Any) -> str | None:
    style = _STYLES.get().get(str(name))
    return style and style.colour


def label(name: Any, names: Mapping[Any, str] | None = None) -> str:
    """Return how a method or condition is written in a figure; `names` take precedence over `styled`."""
    style = _STYLES.get().get(str(name))
    return (names or {}).get(name, style.label if style else str(name))


@plot_style
def new_figure(
    columns: int = 1, rows: int = 1, width: float = 4.2, height: float = 3.0, **shared: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure in the common style and its axes (rows, columns), each `width` × `height` inches.

    `shared` goes to `Figure.subplots` (sharex, sharey, …).
    """
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the same bytes for the same drawing (no date, no version inside)."""
    figure.savefig(path, dpi=150, metadata={"Software": None}, facecolor="white", pil_kwargs={"optimize": True})


def explain(figure: Figure, marks: str) -> Figure:
    """Return the figure with a line that says what its marks mean, for `explanation`."""
    figure.set_label(marks)
    return figure


def explanation(figure: Figure) -> str:
    """Return what the marks of a figure mean, in a line for its caption; "" where it says nothing."""
    return figure.get_label()


def log_axis(axis: Axis) -> None:
    """Make a drawn axis (`ax.xaxis`, `ax.yaxis`) logarithmic, with labels such as 0.5, 1, 2, not powers of ten."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")  # type: ignore[attr-defined]
    low, high = sorted(axis.get_view_interval())
    short = low >= 1e-3 and high <= 1e4  # longer labels would run into each other
    steps = (1, 2, 5) if high < 100 * low else (1, 3) if high < 2000 * low and short else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axis.set_minor_locator(NullLocator())


def _legend_above(figure: Figure, handles: list[Line2D], texts: list[str]) -> None:
    """Write a legend above the panels, in as many columns as the figure is wide enough for."""
    inches = 0.5 + 0.068 * max(map(len, texts))  # of a handle and a text at the style's size
    columns = max(1, min(len(texts), int(figure.get_figwidth() / inches)))
    figure.legend(handles, texts, loc="outside upper right", ncols=columns, handletextpad=0.4)


def _wrapped(text: str, inches: float) -> str:
    """Return the label of an axis in as many lines as its length needs."""
    return text if "\n" in text else textwrap.fill(text, max(12, int(inches / 0.072)), break_long_words=False)


ACROSS = 3  # panels beside each other; further ones go below


def _columns(count: int) -> int:
    return 2 if count == 4 else min(count, ACROSS)


def _grid(count: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes for `count` panels, at most three beside each other; options of `new_figure`."""
    columns = _columns(count)
    figure, axes = new_figure(columns, math.ceil(count / columns), **options)
    for spare in axes.flat[count:]:
        spare.remove()
    for ax in axes.flat[max(count - columns, 0) : count]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def _panels(data: pd.DataFrame, panel: str | None, names: Mapping[Any, str] | None) -> list[tuple[str, pd.DataFrame]]:
    if panel is None:
        return [("", data)]
    groups = data.groupby(panel, sort=False)
    titles = {name: label(name, names) for name, _ in groups}
    wrapped = {name: text if "\n" in text else textwrap.fill(text, 26) for name, text in titles.items()}
    return [(wrapped[name], part) for name, part in groups]


@plot_style
def paired(
    data: pd.DataFrame,
    *,
    item: str = "method",
    condition: str = "svc",
    value: str = "value",
    start: Any = "none",
    panel: str | None = None,
    xlabel: str = "",
    names: Mapping[Any, str] | None = None,
    references: Mapping[str, float] | None = None,
    log: bool = False,
    sharex: bool = False,
) -> Figure:
    """Draw for each item where it is in the `start` condition (open circle) and in every other one (filled circles).

    Circles are means; where a condition has several rows (seeds), they are ticks below its circle.

    Args:
        data: one row per measurement; items from top to bottom in order of appearance.
        item, condition, value, panel: column names; one panel of axes for each value of `panel`.
        start: the condition to compare with.
        xlabel: what `value` is, with its unit.
        names: how items, conditions and panels are written, if not as `styled` says.
        references: vertical lines, {text: value}.
        log: whether the axis of values is logarithmic.
        sharex: whether all panels have the same axis of values.
    """
    panels = _panels(data, panel, names)
    items, conditions = list(data[item].unique()), list(data[condition].unique())
    width = 3.3 if len(panels) > 1 else 5.6
    figure, axes = _grid(len(panels), width=width, height=0.36 * len(items) + 1.2, sharey=True, sharex=sharex)
    for ax, (title, part) in zip(axes, panels, strict=True):
        for row, name in enumerate(items):
            rows = {key: group[value] for key, group in part[part[item] == name].groupby(condition)}
            _paired_row(ax, -row, {key: rows[key] for key in conditions if key in rows}, start, conditions)
        for text, at in (references or {}).items():
            ax.axvline(at, color=MUTED, linewidth=1, linestyle=DASHED, zorder=0)
            ax.text(at, -len(items) + 0.45, f"{text} ", rotation=90, ha="right", va="bottom", fontsize=7.5, color=MUTED)
        ax.set(title=title, xlabel=xlabel)
        if log:
            log_axis(ax.xaxis)
        _items_axis(ax, [label(name, names) for name in items])
    handles = [Line2D([], [], **_circle(key, start, conditions)) for key in conditions]
    texts = [label(key, names) for key in conditions]
    _legend_above(figure, handles, texts)
    ticks = " Ticks: seeds." if data.groupby([item, condition, *[panel] * (panel is not None)]).size().max() > 1 else ""
    return explain(figure, f"Ring: {label(start, names)}; discs: the others; means.{ticks}")


def _items_axis(ax: Axes, texts: list[str]) -> None:
    """Write item i at height −i."""
    ax.set_ylim(-len(texts) + 0.4, 0.6)
    ax.set_yticks([-row for row in range(len(texts))], texts)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def _paired_row(ax: Axes, height: float, rows: Mapping[Any, pd.Series], start: Any, conditions: list[Any]) -> None:
    means = {key: values.mean() for key, values in rows.items()}
    if start in means:
        ends = [min(means.values()), max(means.values())]
        ax.plot(ends, [height, height], color=FAINT, linewidth=3, solid_capstyle="round", zorder=1)
    for key, values in rows.items():
        circle = _circle(key, start, conditions)
        ax.plot(means[key], height, zorder=4 if key == start else 3, **circle)  # the ring stays visible around a disc
        if len(values) > 1:
            ax.plot(values, np.full(len(values), height - 0.27), "|", ms=5, mew=1.1, color=circle["color"], zorder=2)


def _circle(key: Any, start: Any, conditions: list[Any]) -> dict[str, Any]:
    others = [condition for condition in conditions if condition != start]
    tone = (_own_colour(key) or MUTED) if key == start else colour(key, others.index(key))
    if key == start:
        return {"marker": "o", "ls": "", "ms": 9, "mew": 1.6, "color": tone, "mfc": "none"}
    return {"marker": "o", "ls": "", "ms": 6, "mew": 1.0, "color": tone, "mfc": tone}


@plot_style
def forest(
    data: pd.DataFrame,
    *,
    item: str = "item",
    condition: str = "condition",
    panel: str | None = None,
    xlabel: str = "",
    names: Mapping[Any, str] | None = None,
    level: float = 0.0,
    bars: str = "95 % intervals",
    log: bool = False,
) -> Figure:
    """Draw intervals as bars about their means, filled where the whole interval is on one side of `level`.

    Args:
        data: one row per interval, with columns mean, low and high; items from top to bottom in order of appearance.
        item, condition, panel: column names; the conditions of an item lie below each other, each in its colour.
        xlabel: what the intervals are of, with its unit.
        names: how items, conditions and panels are written, if not as `styled` says.
        level: the vertical line to compare with (0: no difference).
        bars: what the intervals are.
        log: whether the axis of values is logarithmic, as of ratios (with level=1).

    Panels share their axis unless one would lose its intervals on that of another, four times as wide.
    """
    panels = _panels(data, panel, names)
    items, conditions = list(data[item].unique()), list(data[condition].unique())
    size = dict(width=3.3 if len(panels) > 1 else 5.6, height=(0.1 + 0.1 * len(conditions)) * len(items) + 1.2)
    spans = [max(part.high.max(), level) - min(part.low.min(), level) for _, part in panels]
    alike = max(spans) <= 4 * min(spans)
    figure, axes = _grid(len(panels), sharey=True, sharex=alike, **size)
    tones = {name: colour(name, position) for position, name in enumerate(conditions)}
    for ax, (title, part) in zip(axes, panels, strict=True):
        ax.axvline(level, color=MUTED, linewidth=1, zorder=1)
        own = {name: [key for key in conditions if key in set(rows)] for name, rows in part.groupby(item)[condition]}
        for row in part.to_dict("records"):
            beside = own[row[item]]  # the conditions that this item has
            below = (beside.index(row[condition]) + 0.5) / len(beside) - 0.5
            height = -items.index(row[item]) - 0.6 * below
            tone, low, high = tones[row[condition]], row["low"], row["high"]
            decided = low != high and (low > level or high < level)  # one seed, without an interval, decides nothing
            ax.plot([low, high], [height, height], color=tone, linewidth=1.6, zorder=2)
            ax.plot(row["mean"], height, "o", ms=4.5, mew=1.3, color=tone, mfc=tone if decided else "white", zorder=3)
        ax.set(title=title, xlabel=xlabel)
        if log:
            log_axis(ax.xaxis)
        _items_axis(ax, [label(name, names) for name in items])
    handles = [Line2D([], [], color=tone, marker="o", ms=4.5) for tone in tones.values()]
    texts = [label(name, names) for name in conditions]
    _legend_above(figure, handles, texts)
    text = f"Bars: {bars} about their means; filled: all of it is on one side of {level:.3g}."
    text += " No bar: one value." if (data.low == data.high).any() else ""
    text += "" if alike else " Axes differ."
    return explain(figure, text)


@plot_style
def lines(
    data: pd.DataFrame,
    *,
    x: str,
    y: str = "value",
    by: str = "method",
    panel: str | None = None,
    xlabel: str = "",
    ylabel: str = "",
    xscale: str = "linear",
    yscale: str = "linear",
    names: Mapping[Any, str] | None = None,
    level: float | None = None,
) -> Figure:
    """Draw y over x, one line for each value of `by`: the mean over rows (seeds), with the rows as points, and ± sd.

    Args:
        data: one row per measurement.
        x, y, by, panel: column names; one panel of axes for each value of `panel`.
        xlabel, ylabel: quantities with their units.
        xscale, yscale: linear or log.
        names: how values of `by` and `panel` are written, if not as `styled` says.
        level: a horizontal line to compare with (1: counted once).
    """
    panels, groups = _panels(data, panel, names), list(data[by].unique())
    many = len(groups) > 8  # lines that have to be told apart
    width = (4.2 if many else 3.3) if len(panels) > 1 else 4.6
    figure, axes = _grid(len(panels), width=width, height=4.2 if many else 3.0, sharey=True)
    ticks = sorted(data[x].unique())
    for ax, (title, part) in zip(axes, panels, strict=True):
        if level is not None:
            ax.axhline(level, color=MUTED, linewidth=1, linestyle=DASHED, zorder=1)
        for position, name in enumerate(groups):
            _line(ax, part[part[by] == name], x, y, colour(name, position), log=yscale == "log")
        ax.set(title=title, xlabel=xlabel or x, xscale=xscale, yscale=yscale)
        if xscale == "log" and len(ticks) <= 10:  # few values: label them instead of powers of ten
            ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            ax.xaxis.set_minor_locator(NullLocator())
        elif xscale == "linear" and all(float(tick).is_integer() for tick in ticks):
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if yscale == "log":
        log_axis(axes[0].yaxis)  # shared by all panels
    for ax in axes[:: _columns(len(panels))]:
        ax.set_ylabel(_wrapped(ylabel or y, 2.4))
    handles = [Line2D([], [], color=colour(name, position)) for position, name in enumerate(groups)]
    figure.legend(handles, [label(name, names) for name in groups], loc="outside right upper")
    several = data.groupby([x, by, *[panel] * (panel is not None)]).size().max() > 1
    return explain(figure, "Lines: means; bands: ± sd; points: seeds." if several else "")


def _line(ax: Axes, rows: pd.DataFrame, x: str, y: str, tone: str, log: bool = False) -> None:
    stats = rows.groupby(x)[y].agg(["mean", "std", "count"])
    several = (stats["count"] > 1).any()
    marker = "o" if len(stats) <= 25 and not several else ""
    ax.plot(stats.index, stats["mean"], color=tone, marker=marker, ms=4)
    if several:
        low, high = stats["mean"] - stats["std"], stats["mean"] + stats["std"]
        low = stats["mean"] ** 2 / high if log else low  # as far below the mean as above it, and never below 0
        low = low.clip(lower=0) if (rows[y] >= 0).all() else low  # what cannot be negative has no band there
        ax.fill_between(stats.index, low, high, color=tone, alpha=0.15, linewidth=0)
        ax.plot(rows[x], rows[y], "o", ms=2.6, color=tone, alpha=0.7, mew=0)


@plot_style
def frontier(
    data: pd.DataFrame,
    *,
    x: str,
    y: str,
    by: str = "variant",
    panel: str | None = None,
    xlabel: str = "",
    ylabel: str = "",
    names: Mapping[Any, str] | None = None,
) -> Figure:
    """Draw a cost x against a gain y: for each condition a large point at its mean (x, y), a small one for each row.

    Args:
        data: one row per run.
        x, y, by, panel: column names; one panel for each value of `panel`, with its own limits.
        xlabel, ylabel: what x and y are, with their units.
        names: how values of `by` and `panel` are written, if not as `styled` says.
    """
    panels, groups = _panels(data, panel, names), list(data[by].unique())
    figure, axes = _grid(len(panels), width=3.6 if len(panels) > 1 else 4.6, height=3.3)
    markers = "osD^vP*Xp<d>hH"
    shapes = {name: markers[position % len(markers)] for position, name in enumerate(groups)}
    for ax, (title, part) in zip(axes, panels, strict=True):
        for position, name in enumerate(groups):
            rows, tone = part[part[by] == name], colour(name, position)
            if len(rows) > 1:
                ax.plot(rows[x], rows[y], shapes[name], ms=3, mew=0, alpha=0.5, color=tone)
            ax.plot(rows[x].mean(), rows[y].mean(), shapes[name], ms=8, mew=0.8, mec="white", color=tone)
        ax.set(title=title, xlabel=_wrapped(xlabel or x, 3.2))
        ax.margins(0.1)
    for ax in axes[:: _columns(len(panels))]:
        ax.set_ylabel(_wrapped(ylabel or y, 2.6))
    handles = [Line2D([], [], ls="", marker=shapes[name], ms=7, color=colour(name, i)) for i, name in enumerate(groups)]
    figure.legend(handles, [label(name, names) for name in groups], loc="outside right upper")
    return explain(figure, "Large marks: means of a condition; small ones: its runs.")


@plot_style
def against(data: pd.DataFrame) -> Figure:
    """Draw ours against a published number, a point for each row, about the diagonal on which both are equal.

    Args:
        data: a comparison, with columns paper, ours and sd; if it has them, `item` chooses the colour, and `condition`
            whether a mark is hollow (the first condition) or filled.
    """
    data = data.assign(**{name: "" for name in ("item", "condition") if name not in data})
    items, conditions = list(data["item"].unique()), list(data.condition.unique())
    figure, axes = new_figure(width=5.2, height=4.2)
    ax = axes[0, 0]
    for row in data.to_dict("records"):
        tone = colour(row["item"], items.index(row["item"]))
        face = "white" if len(conditions) > 1 and row["condition"] == conditions[0] else tone
        error = None if pd.isna(row["sd"]) else row["sd"]
        ax.errorbar(row["paper"], row["ours"], error, fmt="o", ms=5.5, mew=1.3, color=tone, mfc=face, elinewidth=1)
    ends = [data[["paper", "ours"]].min(axis=None), data[["paper", "ours"]].max(axis=None)]
    ax.plot(ends, ends, color=MUTED, linewidth=1, linestyle=DASHED, zorder=0)
    ax.set(xlabel="published", ylabel="ours (mean ± sd over seeds)", aspect="equal")
    if len(items) > 1:
        tones = [colour(name, position) for position, name in enumerate(items)]
        handles = [Line2D([], [], ls="", marker="o", ms=5, color=tone) for tone in tones]
        figure.legend(handles, [label(name) for name in items], loc="outside right upper")
    marks = f" Ring: {label(conditions[0])}; disc: {', '.join(map(label, conditions[1:]))}." if conditions[1:] else ""
    return explain(figure, f"Dashed: ours = published. Bars: ± sd over seeds.{marks}")


@plot_style
def layer_heatmap(
    data: pd.DataFrame,
    *,
    layer: str = "layer",
    direction: str = "decile",
    value: str = "value",
    panel: str | None = None,
    centre: float | None = 1.0,
    log: bool = False,
    xlabel: str = "decile of directions (1: largest σ)",
    text: str = "",
    limits: tuple[float, float] | None = None,
    names: Mapping[Any, str] | None = None,
) -> Figure:
    """Draw a mean over (layer × group of spectral directions) as colours, one panel for each value of `panel`.

    Args:
        data: one row per measurement; layers from top to bottom in order of appearance.
        layer, direction, value, panel: column names.
        centre: value of the neutral colour (1: counted once); None: a scale without a centre.
        log: colours in proportion to the logarithm (values > 0).
        xlabel: what the columns are.
        text: what the colours are.
        limits: smallest and largest coloured value; by default those of the table.
        names: how values of `panel` are written, if not as `styled` says.
    """
    panels = _panels(data, panel, names)
    layers, groups = list(data[layer].unique()), sorted(data[direction].unique())
    means = [part.groupby([layer, direction])[value].mean().unstack() for _, part in panels]
    means = [mean.reindex(index=layers, columns=groups) for mean in means]
    low, high = limits or (min(np.nanmin(mean) for mean in means), max(np.nanmax(mean) for mean in means))
    norm, palette = _colour_scale(low, high, centre, log)
    width = 0.26 * len(groups) + (2.6 if len(panels) == 1 else 1.1)
    figure, axes = new_figure(len(panels), width=width, height=0.19 * len(layers) + 1.1, sharey=True)
    for ax, (title, _), mean in zip(axes[0], panels, means, strict=True):
        cells = np.ma.masked_invalid(mean.to_numpy(float))
        image = ax.pcolormesh(cells, norm=norm, cmap=palette, edgecolors="white", linewidth=0.4)
        ax.set_xticks(np.arange(len(groups)) + 0.5, [str(group) for group in groups])
        ax.set_yticks(np.arange(len(layers)) + 0.5, [str(name) for name in layers])
        ax.tick_params(length=0, labelsize=7)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.set_title(title)
    axes[0, 0].invert_yaxis()  # shared by all panels: the first layer on top
    figure.supxlabel(xlabel, fontsize=9)
    bar = figure.colorbar(image, ax=axes[0].tolist(), label=text or value, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    if log:
        bar.set_ticks(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
        bar.minorticks_off()
    return figure


@plot_style
def matrix(
    data: pd.DataFrame,
    *,
    row: str,
    column: str,
    value: str = "value",
    panel: str | None = None,
    centre: float | None = 0.0,
    cells: str = "",
    xlabel: str = "",
    ylabel: str = "",
    text: str = "",
    names: Mapping[Any, str] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw a mean over (row × column) as colours, one panel for each value of `panel`; missing cells stay empty.

    A cell whose row and column have the same name (a task against itself) is outlined.

    Args:
        data: one row per measurement; rows from top to bottom and columns from left to right in order of appearance.
        row, column, value, panel: column names of the table.
        centre: value of the neutral colour (0: no difference); None: a scale without a centre.
        cells: how the means are written into their cells ("+z.0f"); "" leaves them out.
        xlabel, ylabel: what columns and rows are.
        text: what the colours are, with its unit.
        names: how rows, columns and panels are written, if not as `styled` says.
        limits: smallest and largest coloured value, by default those of the table; means beyond them are written.
    """
    panels = _panels(data, panel, names)
    rows, columns = list(data[row].unique()), list(data[column].unique())
    means = [part.groupby([row, column])[value].mean().unstack() for _, part in panels]
    means = [mean.reindex(index=rows, columns=columns) for mean in means]
    ends = min(np.nanmin(m) for m in means), max(np.nanmax(m) for m in means)
    low, high = limits or ends
    norm, palette = _colour_scale(low, high, centre, log=False)
    size = dict(width=0.32 * len(columns) + (2.6 if len(panels) == 1 else 1.2), height=0.21 * len(rows) + 1.7)
    figure, axes = new_figure(len(panels), sharey=True, **size)
    for ax, (title, _), mean in zip(axes[0], panels, means, strict=True):
        shown = np.ma.masked_invalid(mean.to_numpy(float))
        image = ax.pcolormesh(shown, norm=norm, cmap=palette, edgecolors="white", linewidth=0.4)
        for y, name in enumerate(rows):  # outline where a name meets itself
            if name in columns:
                ax.add_patch(Rectangle((columns.index(name), y), 1, 1, fill=False, edgecolor=INK, linewidth=0.7))
        for (y, x), number in np.ma.ndenumerate(shown):  # without the missing ones
            if cells or not low <= number <= high:
                red, green, blue, _ = image.cmap(norm(number))
                tone = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
                written = f"{number:{cells or '.0f'}}".replace("-", "−")
                ax.text(x + 0.5, y + 0.5, written, ha="center", va="center", fontsize=6, color=tone)
        ax.set_xticks(np.arange(len(columns)) + 0.5, [label(name, names) for name in columns], rotation=90)
        ax.set_yticks(np.arange(len(rows)) + 0.5, [label(name, names) for name in rows])
        ax.tick_params(length=0, labelsize=7.5)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.set(title=title, xlabel=xlabel)
    axes[0, 0].invert_yaxis()  # shared by all panels: the first row on top
    axes[0, 0].set_ylabel(ylabel)
    beyond = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = beyond[bool(ends[0] < low), bool(ends[1] > high)]
    bar = figure.colorbar(image, ax=axes[0].tolist(), label=text or value, pad=0.02, aspect=30, extend=extend)
    bar.outline.set_visible(False)
    return figure


def _colour_scale(low: float, high: float, centre: float | None, log: bool) -> tuple[Normalize, Colormap]:
    """Return norm and colour map from `low` to `high`: diverging about `centre`, where there is one, else sequential.

    Equal distances from the centre get equal strength; of the diverging map only what lies between the ends is used.
    """
    low, high = (low, high) if centre is None else (min(low, centre), max(high, centre))
    norm = LogNorm(low, high) if log else Normalize(low, high)
    if centre is None:
        return norm, colormaps["viridis"]
    ends = np.log([low / centre, high / centre]) if log else np.array([low, high]) - centre
    first, last = 0.5 + 0.5 * ends / max(*abs(ends), 1e-9)
    return norm, ListedColormap(colormaps["RdBu_r"](np.linspace(first, last, 256)))
