"""The text of a result, derived from its table, its provenance and its script alone: verdict, tables, README, index.

Nothing here knows files or the time of day, so that what was written can be derived again and compared byte for byte.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from common.lab.experiment import Experiment

COMPARISON = ("quantity", "paper", "ours", "sd", "n", "same_setting")  # what an experiment's compare() returns

PUBLISHED_FOLDER = Path(__file__).resolve().parents[2] / "results" / "published"

PUBLISHED = {  # NAME of each NAME.csv in that folder → its columns
    "merging": ("suite", "backbone", "metric", "merger", "svc", "value", "source"),
    "sparsity": ("setting", "metric", "value", "source"),
    "sparsity_augmented_flatness_imagenet": ("step", "augmented_flatness_key", "L2_coefficient", "L0_coefficient"),
    "sparsity_key_gram_eigenvalues_t5_sparsified": ("step", "layer", "eig1", "eig2", "eig3"),
    "sparsity_key_gram_eigenvalues_vit_vanilla": ("epoch", "layer", "eig1", "eig2", "eig3"),
    "sparsity_marchenko_pastur_mnist": ("width", "quantity", "alpha_over_p", "anisotropy_over_p", "source"),
}


def published(name: str) -> pd.DataFrame:
    """Return the table `name` of results/published/: numbers from the papers, their authors' code or peers.

    Raises:
        ValueError: there is no such table.
    """
    if name not in PUBLISHED:
        raise ValueError(f"no published table {name!r}; there are {', '.join(PUBLISHED)}")
    return read_csv(PUBLISHED_FOLDER / f"{name}.csv")


def read_csv(source: Any) -> pd.DataFrame:
    """Return a table from a path or buffer, in which only an empty cell is missing: the text "none" is a value."""
    return pd.read_csv(source, keep_default_na=False, na_values=[""])


def verdict(experiment: Experiment, data: pd.DataFrame, provenance: Mapping[str, Any]) -> str:
    """Return the verdict by the script's rule; the smoke scale never gives one."""
    if provenance["scale"] == "smoke":
        return "no verdict at smoke scale"
    text = " ".join(experiment.verdict(data).split())
    return f"{text} (partial run: no evidence)" if provenance["partial"] else text


def comparison_row(
    quantity: str, values: Iterable[float], same_setting: str, paper: float = math.nan
) -> dict[str, Any]:
    """Return one row of an experiment's `compare`: mean, standard deviation and number of one quantity's values.

    Args:
        quantity: what was measured, with its unit; different in every row.
        values: one number per seed (or repeat); missing ones do not count.
        same_setting: whether the paper's number was measured in this setting, in words.
        paper: the published number, NaN where there is none.
    """
    ours = pd.Series(values)
    numbers = dict(paper=paper, ours=ours.mean(), sd=ours.std(), n=ours.count())
    return dict(quantity=quantity, **numbers, same_setting=same_setting)


def comparison(experiment: Experiment, data: pd.DataFrame) -> pd.DataFrame:
    """Return what the script's `compare` says, with the column `difference` = ours − paper added.

    Raises:
        ValueError: a column is missing, or a quantity occurs twice.
    """
    table = experiment.compare(data, published(experiment.published) if experiment.published else None)
    if absent := [column for column in COMPARISON if column not in table]:
        raise ValueError(f"{experiment.name}: compare() lacks the columns {absent}, got {list(table.columns)}")
    if repeated := sorted(set(table.quantity[table.quantity.duplicated()])):
        raise ValueError(f"{experiment.name}: compare() names a quantity twice: {repeated}")
    table = table.reset_index(drop=True)
    return table.assign(difference=pd.to_numeric(table.ours) - pd.to_numeric(table.paper))


def comparison_markdown(table: pd.DataFrame) -> str:
    """Return a comparison as a Markdown table: quantity | paper | ours ± sd | n | difference | same setting?"""
    rows = {
        "quantity": table.quantity,
        "paper": ["not published" if pd.isna(x) else f"{x:g}" for x in pd.to_numeric(table.paper)],
        "ours": [_with_sd(*pair) for pair in zip(table.ours, table.sd, strict=True)],
        "n": ["" if pd.isna(n) else f"{n:.0f}" for n in table.n],
        "difference": ["" if pd.isna(x) else number(x, 3, sign="+") for x in table.difference],
        "same setting?": [x if isinstance(x, str) else "yes" if x else "no" for x in table.same_setting],
    }
    return markdown(pd.DataFrame(rows))


def _with_sd(mean: float, sd: float) -> str:
    return number(mean) if pd.isna(sd) else f"{number(mean)} ± {number(sd, 2)}"


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown: measured floats with four significant digits, chosen ones (0.3, 1e-4) as they are."""
    cells = {_text(name): [_cell(x, _is_chosen(column)) for x in column] for name, column in table.items()}
    return pd.DataFrame(cells).to_markdown(index=False, disable_numparse=True)


def _is_chosen(column: pd.Series) -> bool:
    return all(pd.isna(x) or x == float(f"{x:.3g}") for x in column if isinstance(x, float))


def _cell(value: Any, chosen: bool) -> str:
    if isinstance(value, float) and not pd.isna(value):
        return f"{value:g}" if chosen else number(value)
    return "–" if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    return str(value).replace("|", "\\|")


def number(value: float, digits: int = 4, sign: str = "") -> str:
    """Return a number as text with this many significant digits, "–" for NaN; `sign="+"` writes a plus too."""
    if pd.isna(value):
        return "–"
    if math.isfinite(value) and abs(value) >= 10 ** (digits - 1):
        return f"{value:{sign}.0f}"
    return f"{value:{sign}#.{digits}g}".rstrip(".")


def readme(experiment: Experiment, data: pd.DataFrame, provenance: Mapping[str, Any], drawn: Iterable[str]) -> str:
    """Return the text of a result's README.md; `drawn` are the figures' file stems."""
    first, *others = experiment.doc.strip().split("\n\n")
    scale, partial = provenance["scale"], provenance["partial"]
    parts = [f"# {experiment.name}, {scale}{', partial run' * partial}", " ".join(first.split())]
    if partial:
        parts.append(f"**Partial run: its settings are not those of `--scale {scale}`** (see provenance.json).")
    parts += [f"**Verdict: {verdict(experiment, data, provenance)}**", _run_line(experiment, provenance)]
    if others:
        parts += ["## Claim and rule, written before the run", "```text\n" + "\n\n".join(others).strip("\n") + "\n```"]
    parts += ["## Beside the paper", comparison_markdown(comparison(experiment, data))]
    if experiment.remarks:
        parts += ["## In words", "\n\n".join(" ".join(part.split()) for part in experiment.remarks(data).split("\n\n"))]
    for heading, table in (experiment.tables(data) if experiment.tables else {}).items():
        parts += [f"## {heading}", markdown(table)]
    if drawn := list(drawn):
        parts += ["## Figures", *(f"![{stem.replace('_', ' ')}]({stem}.png)" for stem in drawn)]
    if experiment.deviations:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(experiment.deviations, 1))
        parts += ["## Deviations from the paper", listed]
    return "\n\n".join(parts) + "\n"


def _run_line(experiment: Experiment, provenance: Mapping[str, Any]) -> str:
    seeds = ", ".join(str(seed) for seed in provenance["seeds"])
    return (
        f"Scale {provenance['scale']}; seed{'s' * (len(provenance['seeds']) != 1)} {seeds}; "
        f"{duration(provenance['seconds']['total'])}{_earlier(provenance)} on {provenance['device']}, up to "
        f"{provenance['jobs']} processes; "
        f"commit {provenance['commit'][:10]}{' with uncommitted changes' * provenance['dirty']}, "
        f"{provenance['date'][:10]}. Again: `python experiments/{experiment.name}.py --scale {provenance['scale']}`. "
        "Rows: [data.csv](data.csv). Settings, versions, times: [provenance.json](provenance.json)."
    )


def _earlier(provenance: Mapping[str, Any]) -> str:
    """Return a text that says how many artefacts came from the cache: the run's time does not include building them."""
    hits, built = (len(provenance.get(name, ())) for name in ("cache_hits", "cache_built"))
    return f" (beside {hits} of {hits + built} artefacts that earlier runs had left in the cache)" if hits else ""


def duration(seconds: float) -> str:
    """Return a time in the unit in which a person would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def index(provenances: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of results/README.md: every complete result with its verdict."""
    rows = [
        {
            "experiment": f"[{facts['experiment']}]({facts['experiment']}/{facts['scale']}/README.md)",
            "scale": facts["scale"],
            "verdict": facts["verdict"],
            "commit": facts["commit"][:10],
            "date": facts["date"][:10],
        }
        for facts in provenances
    ]
    table = markdown(pd.DataFrame(rows)) if rows else "No results yet."
    return f"# Results\n\nGenerated by `common/lab/results.py` from the results below it: do not edit.\n\n{table}\n"
