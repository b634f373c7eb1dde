"""What an experiment is; `common.lab.run` runs it, `common.lab.results` writes what it leaves."""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from common.lab.claims import MOST, Claim
from common.lab.figures import Style, styled

SCALE_NAMES = ("smoke", "laptop", "workstation", "paper")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One experiment: its text, its settings at each scale and the functions that make, draw and judge its table.

    Args:
        doc: the script's docstring: figure or table, claim, verdict rule, cost per scale, command.
        scales: settings (a frozen dataclass with defaults and a field `seeds`) for smoke, laptop, workstation, paper.
        measure: (settings, `common.lab.run.Context`) → rows, one dict per measurement, whose keys become the columns of
            data.csv.
        draw: table → {file stem: figure}.
        compare: (table, published table or None) → one row per number: quantity, paper (NaN: not published), ours, sd,
            n, same_setting.
        verdict: table → the verdict by the rule of the docstring ("not run at this scale" where the rule's suites or
            seeds are not in the table).
        published: which table of results/published/ `compare` gets, or None.
        tables: table → {heading: further table for the README}, optional.
        remarks: table → what it shows, in a paragraph or two whose numbers come from the table, optional.
        deviations: where the experiment departs from the paper; numbered in the README.
        styles: how the methods and conditions of its figures are written and coloured.
        claims: table → its one to four claims with their answers, by the same rule as `verdict`.
        captions: {file stem, or how it begins: one line below the figure}; what the marks of a kind of plot mean is
            said by itself.
        lead: file stem of the figure that opens the page; by default the first drawn.
        pages: {file name: results folder → text} of further pages of results/ that follow from several experiments.
    """

    doc: str
    scales: Mapping[str, Any]
    measure: Callable[[Any, Any], Iterable[Row]]
    draw: Callable[[pd.DataFrame], Mapping[str, Figure]]
    compare: Callable[[pd.DataFrame, pd.DataFrame | None], pd.DataFrame]
    verdict: Callable[[pd.DataFrame], str]
    published: str | None = None
    tables: Callable[[pd.DataFrame], Mapping[str, pd.DataFrame]] | None = None
    remarks: Callable[[pd.DataFrame], str] | None = None
    deviations: Sequence[str] = ()
    styles: Mapping[str, Style] = field(default_factory=dict)
    claims: Callable[[pd.DataFrame], Sequence[Claim]] | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    lead: str | None = None
    pages: Mapping[str, Callable[[Path], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if tuple(self.scales) != SCALE_NAMES:
            raise ValueError(f"scales must be {SCALE_NAMES}, in this order, got {tuple(self.scales)}")
        names = {setting.name for setting in dataclasses.fields(self.scales["smoke"])}
        if "seeds" not in names:
            raise ValueError(f"the settings need a field seeds, got {sorted(names)}")

    def figures(self, data: pd.DataFrame) -> Mapping[str, Figure]:
        """Return what `draw` makes of the table, in the experiment's styles."""
        with styled(self.styles):
            return self.draw(data)

    def answers(self, data: pd.DataFrame) -> Sequence[Claim]:
        """Return the claims with what the table says of them; none where the script states none.

        Raises:
            ValueError: there are more than four, or none though the script states some.
        """
        found = list(self.claims(data)) if self.claims else []
        if self.claims and not 1 <= len(found) <= MOST:
            raise ValueError(f"{self.name}: an experiment states one to {MOST} claims, got {len(found)}")
        return found

    @property
    def script(self) -> Path:
        """The file that defines the experiment."""
        return Path(self.measure.__code__.co_filename)

    @property
    def name(self) -> str:
        """NN_name, which also names the folder of its results."""
        return self.script.stem


def load_experiment(script: Path) -> Experiment:
    """Return the EXPERIMENT that a script defines, without running it.

    The script becomes a module under its own name (without ".py"), in this process and in those of `Context.map`, so
    that its functions travel between them by name, and their code is found in its file.

    Raises:
        ValueError: the script is missing or defines no EXPERIMENT, or its name is that of another module.
    """
    script = script.resolve()
    if not script.is_file():
        raise ValueError(f"there is no script {script.name} in {script.parent.name}/")
    known = sys.modules.get(script.stem)
    if known is not None and not hasattr(known, "EXPERIMENT"):
        raise ValueError(f"{script}: another module is named {script.stem}; give the script another name")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)  # so that --help finds its comments
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "EXPERIMENT"):
            raise ValueError(f"{script.name} defines no EXPERIMENT")
    except BaseException:  # as an import does
        del sys.modules[script.stem]
        raise
    return module.EXPERIMENT
