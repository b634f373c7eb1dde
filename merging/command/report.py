"""The report of a merge: one HTML page that one can send, and the numbers of every matrix as matrices.csv beside it.

It says what was merged and left out, how far the experts moved, and what merging did to the spectra before calibration
(arXiv 2602.05536), beside what it would do to unrelated updates by chance. It evaluates no task, and claims nothing of
how good the merged model is.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from common.lab import figures, page
from merging.command import findings
from merging.command.plan import Plan
from merging.command.recipe import public_name
from merging.command.shards import write_text
from merging.mergers import merger

REPORT = ("index.html", "matrices.csv")  # its files
INFLATION_BY_CHANCE = "inflation, largest σ, by chance"
WIDTH = 4.2  # inches of a figure: its text stays readable on a telephone
NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
BY_KIND = {
    "inflation, largest σ": "inflation, largest σ",
    "inflation, largest σ, by chance": "by chance",
    "overlap": "overlap of experts",
    "overlap, by chance": "by chance",
    "γ, median": "median γ",
}


def write_report(plan: Plan, notes: Sequence[Mapping[str, Any]], remarks: Sequence[str], folder: Path) -> None:
    """Write index.html and matrices.csv.

    Args:
        plan: what was merged.
        notes: one per step: "report", the numbers of its matrices, and "moves" (`merging.command.findings`).
        remarks: what was kept, left out or lost, one line each.
        folder: is made.
    """
    folder.mkdir(exist_ok=True, parents=True)
    rows = [row for note in notes for row in note["report"] or ()]
    report = Report(plan, pd.DataFrame(rows), [note["moves"] for note in notes if note.get("moves")], list(remarks))
    report.matrices.to_csv(folder / REPORT[1], index=False, float_format="%.6g")
    write_text(folder / REPORT[0], report.page())


@dataclass(frozen=True)
class Report:
    """What is known of a merge, and the page that says it."""

    plan: Plan
    matrices: pd.DataFrame  # as in matrices.csv
    moves: list[Mapping[str, Any]]  # of all merged tensors
    remarks: list[str]

    @cached_property
    def models(self) -> list[str]:
        """Public names of the base and the experts."""
        return [public_name(given) for given in (self.plan.recipe.base, *self.plan.recipe.experts)]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The matrices that the experts changed, with the place of each (`places`)."""
        if not len(self.matrices):
            return self.matrices
        changed = self.matrices[self.matrices["inflation, largest σ"] > 0].reset_index(drop=True)
        return changed.join(places(changed["tensor"]))

    def page(self) -> str:
        """Return the whole page."""
        recipe, count = self.plan.recipe, len(self.models) - 1
        title = f"Merge of {count} fine-tuned model{'s' * (count > 1)} by {merger(recipe.method).title}"
        title += " with singular value calibration" * recipe.svc
        merged = sum(bool(step.change) for step in self.plan.steps)
        lead = (
            f"{merged} of {len(self.plan.steps)} tensors of {self.models[0]} were merged. All numbers come from the "
            "weights alone: no task was evaluated, so nothing here says how good the merged model is."
        )
        parts = [f"<h1>{page.escape(title)}</h1>", page.paragraph(lead, "lead"), self._tiles(), self._models()]
        parts += [self._inflation(), self._overlap(), self._gamma()] if len(self.table) else [self._nothing()]
        return page.page(title, [*parts, self._moves(), self._left_out(), self._recipe(), self._matrices()])

    # What stands on it -----------------------------------------------------------------------------------------------

    def _tiles(self) -> str:
        if not len(self.table):
            return ""
        means, left = self.table.mean(numeric_only=True), len(self.matrices) - len(self.table)
        beside = f"left out without an update: {left}" if left else "all that have a spectrum"
        return page.tiles([
            ("Matrices diagnosed", str(len(self.table)), beside),
            ("Inflation", _number(means["inflation, largest σ"]), f"by chance {_number(means[INFLATION_BY_CHANCE])}"),
            ("Overlap of experts", _number(means["overlap"]), f"by chance {_number(means['overlap, by chance'])}"),
            ("Median γ", _number(means["γ, median"]), "applied" if self.plan.recipe.svc else "SVC was not used"),
        ])  # fmt: skip

    def _models(self) -> str:
        base, *experts = self.models
        names = [f"E{index}: {name}" for index, name in enumerate(experts, start=1)]
        return page.section("What was merged", page.listed([f"base: {base}", *names]))

    def _nothing(self) -> str:
        return page.section(
            "Spectra",
            page.paragraph("No matrix was diagnosed: what was merged has no spectrum that SVC would calibrate."),
        )

    def _inflation(self) -> str:
        words = (
            "Inflation is the largest singular value of the merged update over the mean of the experts' own: how much "
            "stronger the merged update is in its strongest direction than one expert is in its own. At 1 both are as "
            "strong. The dashed line is what the same merger makes of unrelated updates with the same singular values, "
            "in directions drawn at random (one draw for each matrix). Where a merger adds updates up, what lies above "
            "it comes from directions that the experts share."
        )
        unknown = int(self.table[INFLATION_BY_CHANCE].isna().sum())
        drawn = f"{unknown} large matrices have no chance level: the merger would need all unrelated updates in memory."
        shown = self._by_layer("inflation, largest σ", INFLATION_BY_CHANCE, "inflation", "Inflation by layer", "merged")
        said = page.paragraph(words) + (page.paragraph(drawn, "small") if unknown else "")
        return page.section("Inflation", page.beside(said, shown), self._by_kind())

    def _overlap(self) -> str:
        words = (
            "Overlap compares the leading directions (at most 8) of two experts' updates of the same matrix, averaged "
            "over all pairs: 1 if both span the same space, 0 if theirs are orthogonal. Directions drawn at random "
            "would have the dashed value, which is known exactly and not drawn. Overlap is why merging inflates; by "
            "itself it does not say whether what the experts share is useful."
        )
        if len(self.models) < 3:
            return page.section("Overlap", page.paragraph("With one expert there is no overlap between experts."))
        shown = self._by_layer("overlap", "overlap, by chance", "overlap", "Overlap by layer", "these experts")
        return page.section("Overlap of experts", page.beside(page.paragraph(words), shown))

    def _gamma(self) -> str:
        used = "SVC multiplied" if self.plan.recipe.svc else "SVC was not used; it would multiply"
        words = (
            f"{used} each direction of a merged update by a factor γ of its own. Below 1 it scales a direction back "
            "that merging counted more than once, above 1 it strengthens one that was counted less than once. The line "
            "goes from the 10 % to the 90 % quantile of all directions of a matrix, the point is the median; each is "
            "the mean over the matrices of that kind. Directions of size zero are left out."
        )
        shown = page.figure(_gamma_figure(self.table), "gamma", _alt_of_gamma(self.table), "γ by kind of matrix")
        return page.section("Calibration factors γ", page.beside(page.paragraph(words), shown))

    def _by_kind(self) -> str:
        means = self.table.groupby("kind", sort=False).mean(numeric_only=True)
        counts = self.table.groupby("kind", sort=False).size()
        rows = [
            (kind, str(counts[kind]), *(_number(row[column]) for column in BY_KIND)) for kind, row in means.iterrows()
        ]
        return page.table(["kind", "matrices", *BY_KIND.values()], rows, "Means over the matrices of each kind")

    def _by_layer(self, column: str, chance: str, name: str, caption: str, label: str) -> str:
        drawn = _layer_figure(self.table, column, chance, name, label)
        return page.figure(drawn, name, _alt(self.table, column, chance), f"{caption}: points are matrices, the line "
                           "their mean in each layer, dashed the chance level.")  # fmt: skip

    def _moves(self) -> str:
        if not self.moves:
            return ""
        products = sum(np.array(each["products"]) for each in self.moves)
        energy = sum(each["energy"] for each in self.moves)
        norms = np.sqrt(np.diag(products))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines, relative = products / np.outer(norms, norms), norms / np.sqrt(energy)
        names = [f"E{index}" for index in range(1, len(norms) + 1)]
        rows = [
            (name, _number(100 * relative[i]), *(_number(cosine) for cosine in cosines[i]))
            for i, name in enumerate(names)
        ]
        words = (
            "How far each expert moved: the norm of its update over the norm of the base's weights, over all merged "
            "tensors (of IA³ vectors, over that of the vector of ones that they started from). Cosines between the "
            "updates say whether two experts moved in the same direction as a whole: 0 is what unrelated updates "
            "have, and two experts of cosine near 0 may still share the leading directions of single matrices."
        )
        shown = page.table(["expert", "update / base, %", *(f"cosine with {name}" for name in names)], rows,
                           "Size of the updates, and cosines between them")  # fmt: skip
        drawn = page.figure(
            _moves_figure(self.moves, names), "moves",
            "Size of each expert's update over that of the base, by layer: "
            + ", ".join(f"{name} {_number(100 * relative[i])} % overall" for i, name in enumerate(names)),
            "Size of the updates by layer, in % of the base's norm",
        )  # fmt: skip
        said = page.paragraph(words) + (page.paragraph(advised) if (advised := findings.advice(self.moves)) else "")
        return page.section("How far the experts moved", page.beside(said, drawn), shown)

    def _left_out(self) -> str:
        remarks = list(self.remarks)
        for given, name in sorted(zip((self.plan.recipe.base, *self.plan.recipe.experts), self.models, strict=True),
                                  key=lambda pair: -len(pair[0])):  # fmt: skip
            remarks = [remark.replace(given, name) for remark in remarks]
        body = page.listed(remarks) if remarks else page.paragraph("Nothing: the models have the same tensors.")
        return page.section("What was kept from the base, left out or lost", body)

    def _recipe(self) -> str:
        values = self.plan.recipe.plain() | {"base": self.models[0], "experts": self.models[1:]}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        words = "The options that differ from the defaults, with public names for the models."
        return page.section("Recipe", page.paragraph(words), page.code(text, "Recipe"))

    def _matrices(self) -> str:
        words = '<p class="small">Method: <a href="https://arxiv.org/abs/2602.05536">arXiv 2602.05536</a>.</p>'
        if not len(self.matrices):
            return words
        rows = [
            [cell if isinstance(cell, str) else _number(cell) for cell in row]
            for row in self.matrices.itertuples(index=False)
        ]
        every = page.table(list(self.matrices.columns), rows, "Every matrix, before calibration, as in matrices.csv")
        return page.section(
            "Every matrix", page.folded(f"{len(rows)} matrices", every), f'<p class="small">{words}</p>'
        )


def _number(value: float) -> str:
    return "–" if not np.isfinite(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# Layers and kinds ----------------------------------------------------------------------------------------------------


def places(names: Sequence[str]) -> pd.DataFrame:
    """Return the place of tensors in their model: `stack` of layers, `layer`, its `position` among all, and `kind`.

    Layers are told by the first number in a name ("model.layers.3.mlp.up_proj.weight": layer 3, kind "mlp.up_proj");
    where there are several stacks of layers, the layer names its stack too. Tensors outside of all layers come last.
    """
    found = [NUMBERED.fullmatch(re.sub(r"\[\d+\]$", "[*]", name)) for name in names]
    stacks = list(dict.fromkeys(match[1] for match in found if match))
    short = {stack: f"{_telling(stack, stacks)} " if len(stacks) > 1 else "" for stack in stacks}
    keys = [(stacks.index(match[1]), int(match[2])) if match else (len(stacks), 0) for match in found]
    order = {key: position for position, key in enumerate(sorted(set(keys)))}
    rows = [
        (key[0], f"{short[match[1]]}{match[2]}" if match else "other", order[key], _kind(match[3] if match else name))
        for name, match, key in zip(names, found, keys, strict=True)
    ]
    return pd.DataFrame(rows, columns=["stack", "layer", "position", "kind"])


def _telling(stack: str, stacks: Sequence[str]) -> str:
    """Return the first part of a stack's name that not all stacks share."""
    parts = [each.split(".") for each in stacks]
    depth = next((i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), 0)
    return stack.split(".")[min(depth, stack.count("."))]


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name.removesuffix(".weight"))


# Figures -------------------------------------------------------------------------------------------------------------


def _alt(data: pd.DataFrame, column: str, chance: str) -> str:
    means = data.groupby(["position", "layer"])[[column, chance]].mean()
    low, high = means[column].idxmin()[1], means[column].idxmax()[1]
    return (
        f"{column} by layer: mean {_number(data[column].mean())}, smallest in layer {low} "
        f"({_number(means[column].min())}), largest in layer {high} ({_number(means[column].max())}); "
        f"by chance {_number(data[chance].mean())}"
    )


def _alt_of_gamma(data: pd.DataFrame) -> str:
    medians = data.groupby("kind", sort=False)["γ, median"].mean()
    return "Median γ by kind of matrix: " + ", ".join(f"{kind} {_number(value)}" for kind, value in medians.items())


@figures.plot_style
def _layer_figure(data: pd.DataFrame, column: str, chance: str, ylabel: str, label: str) -> Figure:
    drawn, axes = figures.new_figure(width=WIDTH, height=2.8)
    ax, means = axes[0, 0], data.groupby(["stack", "position"])[[column, chance]].mean()
    ax.plot(data["position"], data[column], "o", ms=3, alpha=0.45, color=figures.CYCLE[0], mew=0)
    _line(ax, means[column], color=figures.CYCLE[0], marker="o", ms=5, label=label)
    _line(ax, means[chance], color=figures.CYCLE[1], ls=figures.DASHED, marker="_", ms=9, label="by chance")
    _layer_axis(ax, data)
    ax.set(ylabel=ylabel, ylim=(0, None))
    drawn.legend(loc="outside upper left", ncols=2)
    return drawn


@figures.plot_style
def _gamma_figure(data: pd.DataFrame) -> Figure:
    kinds = data.groupby("kind", sort=False)[["γ, 10 % quantile", "γ, median", "γ, 90 % quantile"]].mean()
    drawn, axes = figures.new_figure(width=WIDTH, height=0.9 + 0.24 * len(kinds))
    ax, rows = axes[0, 0], range(len(kinds))
    ax.axvline(1, color=figures.MUTED, lw=1, ls=figures.DASHED)
    ax.hlines(rows, kinds.iloc[:, 0], kinds.iloc[:, 2], color=figures.CYCLE[0], lw=3, alpha=0.45)
    ax.plot(kinds["γ, median"], rows, "o", color=figures.CYCLE[0], ms=6)
    ax.set(xlabel="γ", xlim=(0, None), ylim=(len(kinds) - 0.4, -0.6), yticks=list(rows))
    ax.set_yticklabels([kind if len(kind) < 26 else f"…{kind[-24:]}" for kind in kinds.index])
    return drawn


@figures.plot_style
def _moves_figure(moves: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> Figure:
    data = places([each["tensor"] for each in moves])
    data["energy"] = [each["energy"] for each in moves]
    for index, name in enumerate(experts):
        data[name] = [each["products"][index][index] for each in moves]
    sums = data.groupby(["stack", "position"])[["energy", *experts]].sum()
    drawn, axes = figures.new_figure(width=WIDTH, height=2.8)
    for index, name in enumerate(experts):
        values = 100 * np.sqrt(sums[name] / sums["energy"].where(sums["energy"] > 0))
        _line(axes[0, 0], values, color=figures.colour(name, index), marker="o", ms=4, label=name)
    _layer_axis(axes[0, 0], data)
    axes[0, 0].set(ylabel="update / base, %", ylim=(0, None))
    drawn.legend(loc="outside upper left", ncols=6)
    return drawn


def _line(ax: Any, values: pd.Series, label: str, **style: Any) -> None:
    """Draw values by (stack, position): a line for each stack of layers, all of one label."""
    for _, part in values.groupby(level="stack"):
        ax.plot(part.index.get_level_values("position"), part, label=label, **style)
        label = ""


def _layer_axis(ax: Any, data: pd.DataFrame) -> None:
    """Name the layers on the x-axis, as many as there is room for."""
    labels = data.drop_duplicates("position").set_index("position")["layer"].sort_index()
    room = max(1, 48 // (max(map(len, labels)) + 1))
    shown = labels.iloc[:: max(1, -(-len(labels) // room))]
    ax.xaxis.set_major_locator(FixedLocator(list(shown.index)))
    ax.set_xticks(list(shown.index), list(shown))
    ax.set(xlabel="layer", xlim=(-0.5, len(labels) - 0.5))
