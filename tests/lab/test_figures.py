"""The shared plot kinds draw what the table says, into small files, without touching matplotlib's global state."""

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest

from common.lab import figures
from merging import MERGERS
from merging.suites.comparison import merging_styles


@pytest.fixture(autouse=True)
def styles():
    with figures.styled(merging_styles()):
        yield


def table(seeds: int) -> pd.DataFrame:
    rows = [
        dict(suite=suite, method=method, svc=svc, tasks=tasks, seed=seed, value=tasks + seed + (svc != "none"))
        for suite in ("8 tasks", "14 tasks")
        for method in ("task_arithmetic", "ties", "unnamed")
        for svc in ("none", "output")
        for tasks in (2, 8)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def heat() -> pd.DataFrame:
    rows = [dict(layer=f"block {b}", decile=d, value=2.0 ** (b - d)) for b in range(3) for d in range(1, 5)]
    return pd.DataFrame(rows)


def test_paired_puts_means_and_seeds_where_they_are():
    (ax,) = figures.paired(table(3).query("suite == '8 tasks' and tasks == 8"), references={"experts": 12}).axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["Task Arithmetic", "TIES", "unnamed"]
    drawn = [list(line.get_xdata()) for line in ax.lines]
    assert [9, 10] in drawn  # from the mean of base to that of + SVC
    assert [8, 9, 10] in drawn and [9, 10, 11] in drawn  # the seeds of both
    assert [12, 12] in drawn


def test_forest_fills_what_is_decided():
    rows = [
        dict(item="ties", condition=condition, mean=mean, low=mean - 1, high=mean + 1)
        for condition, mean in (("own scales", 3.0), ("tuned scales", 0.5))
    ]
    (ax,) = figures.forest(pd.DataFrame(rows)).axes
    assert [2.0, 4.0] in [list(line.get_xdata()) for line in ax.lines]
    filled = {float(line.get_xdata()[0]): line.get_markerfacecolor() for line in ax.lines if line.get_marker() == "o"}
    assert filled[0.5] == "white" and filled[3.0] == figures.CYCLE[0]
    one_seed = pd.DataFrame([dict(item="ties", condition="own scales", mean=3.0, low=3.0, high=3.0)])
    figure = figures.forest(one_seed)
    assert {line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() == "o"} == {"white"}
    assert figures.explanation(figure).endswith("No bar: one value.")
    heights = [float(line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o"]
    assert heights[0] > 0 > heights[1]  # both about the item's own height


def test_lines_draw_means_and_points_by_panel():
    figure = figures.lines(table(2), x="tasks", panel="suite", xscale="log", level=1)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["8 tasks", "14 tasks"]
    means = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert [3.0, 9.0] in means  # over two seeds and both conditions
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["2", "8"]


def test_a_frontier_has_a_point_a_run_and_a_mean_a_condition():
    rows = [dict(variant=name, density=x, score=y) for name, x, y in (("a", 1, 5), ("a", 3, 7), ("b", 9, 4))]
    (ax,) = figures.frontier(pd.DataFrame(rows), x="density", y="score").axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]
    assert drawn == [([1, 3], [5, 7]), ([2.0], [6.0]), ([9.0], [4.0])]


def test_log_axes_are_labelled_with_plain_numbers():
    figure = figures.lines(table(1), x="tasks", panel="suite", yscale="log")  # values from 2 to 9
    figure.canvas.draw()
    for ax in figure.axes:
        assert ax.get_yscale() == "log"
        low, high = ax.get_ylim()
        texts = {tick.get_text() for tick in ax.get_yticklabels() if low <= tick.get_position()[1] <= high}
        assert {"2", "5"} <= texts or ax is not figure.axes[0]
    (ax,) = figures.paired(table(1).query("suite == '8 tasks'")).axes
    figures.log_axis(ax.xaxis)
    assert ax.get_xscale() == "log" and ax.get_yscale() == "linear"


@pytest.mark.parametrize("options", [{}, {"log": True}, {"centre": None}, dict(centre=None, log=True, limits=(0.1, 4))])
def test_heat_maps_hold_the_means_in_order(options):
    figure = figures.layer_heatmap(heat(), **options)
    mesh = figure.axes[0].collections[0]
    assert np.allclose(mesh.get_array().reshape(3, 4)[0], [0.5, 0.25, 0.125, 0.0625])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["block 0", "block 1", "block 2"]
    if options.get("centre", 1.0):
        neutral = matplotlib.colormaps["RdBu_r"](0.5)
        assert mesh.cmap(mesh.norm(1.0)) == pytest.approx(neutral, abs=0.02)  # counted once is the neutral colour
        assert (mesh.norm.vmin, mesh.norm.vmax) == (0.0625, 2.0)  # not what nothing has


def test_matrices_hold_the_means_in_order_of_appearance_and_leave_gaps_empty():
    cells = (("a", "z", "z", 3), ("a", "z", "b", -1.2), ("a", "b", "z", -6), ("b", "b", "b", 7))
    rows = [
        dict(panel=panel, target=target, task=task, value=value + seed)
        for panel, target, task, value in cells
        for seed in (0, 2)
    ]
    options = dict(row="target", column="task", panel="panel", cells="+z.0f", names={"z": "Z"})
    figure = figures.matrix(pd.DataFrame(rows), **options)
    first, second = figure.axes[:2]
    assert [text.get_text() for text in first.get_xticklabels()] == ["Z", "b"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["Z", "b"] and first.yaxis_inverted()
    drawn = first.collections[0].get_array().reshape(2, 2)
    assert drawn.tolist() == [[4, pytest.approx(-0.2)], [-5, None]]
    assert [text.get_text() for text in first.texts] == ["+4", "+0", "−5"]
    assert [text.get_text() for text in second.texts] == ["+8"]
    assert [patch.get_xy() for patch in first.patches] == [(0, 0), (1, 1)]  # z on Z, b on b
    mesh = first.collections[0]
    neutral = matplotlib.colormaps["RdBu_r"](0.5)
    assert mesh.cmap(mesh.norm(0.0)) == pytest.approx(neutral, abs=0.02)  # no difference is the neutral colour


def test_a_matrix_writes_what_its_colours_do_not_reach():
    rows = [dict(target=name, task=name, value=value) for name, value in (("a", -3), ("b", -40.4), ("c", 2))]
    figure = figures.matrix(pd.DataFrame(rows), row="target", column="task", limits=(-10, 10))
    assert [text.get_text() for text in figure.axes[0].texts] == ["−40"]
    assert figure.axes[0].collections[0].norm.vmin == -10


def test_at_most_three_panels_stand_beside_each_other():
    rows = [dict(x=x, method="a", panel=f"panel {panel}", value=x) for x in (1, 2) for panel in range(5)]
    figure = figures.lines(pd.DataFrame(rows), x="x", panel="panel")
    assert [ax.get_title(loc="left") for ax in figure.axes] == [f"panel {panel}" for panel in range(5)]
    assert {ax.get_subplotspec().colspan.start for ax in figure.axes} == {0, 1, 2}
    assert [ax.get_ylabel() for ax in figure.axes] == ["value", "", "", "value", ""]


def test_bands_of_what_is_never_negative_end_at_zero():
    rows = [dict(x=x, method="a", value=value) for x in (1, 2) for value in (0.0, 0.0, 3.0)]
    (ax,) = figures.lines(pd.DataFrame(rows), x="x").axes
    assert ax.collections[0].get_paths()[0].vertices[:, 1].min() == 0


def test_ours_against_published_numbers_stand_about_the_diagonal():
    rows = [dict(paper=50.0, ours=55.0, sd=1.0, item="ties", condition="base")]
    rows += [dict(paper=60.0, ours=58.0, sd=None, item="ties", condition="+ SVC")]
    figure = figures.against(pd.DataFrame(rows))
    marks = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    assert ([50.0], [55.0]) in marks and ([60.0], [58.0]) in marks and ([50.0, 60.0], [50.0, 60.0]) in marks
    assert figures.explanation(figure) == "Dashed: ours = published. Bars: ± sd over seeds. Ring: base; disc: + SVC."


def test_files_are_small_and_the_same_each_time(tmp_path):
    for name in ("a.png", "b.png"):
        figures.save(figures.paired(table(3), panel="suite"), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size < 150_000


def test_the_style_stays_in_the_figure():
    before = dict(matplotlib.rcParams)
    figure, axes = figures.new_figure(2)
    assert axes.shape == (1, 2) and not axes[0, 0].spines["top"].get_visible() and figure.axes
    assert dict(matplotlib.rcParams) == before


def test_every_merger_has_a_colour_and_a_label_of_its_own():
    assert len({figures.colour(name, -1) for name in MERGERS}) == len(MERGERS)
    assert len({figures.label(name) for name in MERGERS} - {*MERGERS}) == len(MERGERS)
    with figures.styled({"new": figures.Style("New")}):
        assert figures.label("ties") == "ties" and figures.colour("ties", 1) == figures.CYCLE[1]
        assert figures.label("new") == "New" and figures.colour("new", 2) == figures.CYCLE[2]
    assert figures.label("ties") == "TIES"


def written(figure):
    """The titles, labels and legends of a drawn figure."""
    figure.canvas.draw()
    labels = [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
    texts = [*labels, *(text for legend in figure.legends for text in legend.get_texts())]
    return [text for text in texts if text.get_text()]


LONG = {
    "none": "the base of the merger, without any calibration",
    "output": "the same merger, calibrated in output space",
}


@pytest.mark.parametrize("panel", [None, "suite"])
def test_long_names_and_labels_stay_within_the_figure(panel):
    several = table(2).query("tasks == 8")
    text = "a quantity that nobody would shorten, summed over all of its layers, nats"
    spans = several.assign(mean=several.value, low=several.value - 1, high=several.value + 1)
    more = pd.concat([several.assign(svc=name) for name in ("none", "output", "a", "b")])
    for figure in (
        figures.paired(more, panel=panel, names=LONG, xlabel="value"),
        figures.forest(spans, item="method", condition="svc", panel=panel, names=LONG, xlabel="value"),
        figures.lines(table(2), x="tasks", panel=panel, ylabel=text),
        figures.frontier(table(2), x="tasks", y="value", by="method", panel=panel, xlabel=text, ylabel=text),
    ):
        for text in written(figure):
            box, whole = text.get_window_extent(), figure.bbox
            assert box.x0 >= -1 and box.x1 <= whole.width + 1 and box.y0 >= -1 and box.y1 <= whole.height + 1, text


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e-2), (1e-6, 1e3), (0.5, 20), (3e3, 2e6)])
def test_the_labels_of_a_logarithmic_axis_do_not_touch(low, high):
    figure, axes = figures.new_figure()
    axes[0, 0].plot([low, high], [0, 1])
    figures.log_axis(axes[0, 0].xaxis)
    figure.canvas.draw()
    left, right = axes[0, 0].get_xlim()
    ticks = zip(axes[0, 0].get_xticks(), axes[0, 0].get_xticklabels(), strict=True)
    boxes = [label.get_window_extent() for at, label in ticks if left <= at <= right]
    assert len(boxes) > 1 and all(one.x1 < two.x0 for one, two in itertools.pairwise(boxes))


def test_a_forest_of_ratios_compares_with_1():
    rows = [dict(item="ties", condition="own scales", mean=mean, low=mean / 2, high=mean * 1.5) for mean in (0.5, 4.0)]
    (ax,) = figures.forest(pd.DataFrame(rows), level=1.0, log=True).axes
    assert ax.get_xscale() == "log" and [1, 1] in [list(line.get_xdata()) for line in ax.lines]
