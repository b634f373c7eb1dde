"""The text of a result, derived from its table, its provenance and its script alone: verdict, claims, tables, README.

Nothing here knows files or the time of day, so that what was written can be derived again and compared byte for byte.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from common.lab import figures
from common.lab.claims import NOT_RUN
from common.lab.experiment import Experiment

LONG = 15  # rows: longer tables are folded, and a longer comparison becomes a figure with a file of its own
BESIDE = "paper_against_ours"  # file stem of that figure
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


def claims(experiment: Experiment, data: pd.DataFrame, provenance: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the claims with their answers as plain data; the smoke scale answers none."""
    found = [dataclasses.asdict(claim) for claim in experiment.answers(data)]
    return [claim | {"verdict": NOT_RUN} for claim in found] if provenance["scale"] == "smoke" else found


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
    """Return a comparison as a Markdown table: quantity | paper | ours ± sd | n | difference | same setting?

    The difference from the paper's number stands only where that was measured in the same setting.
    """
    same = [_is_same(x) for x in table.same_setting]
    rows = {
        "quantity": table.quantity,
        "paper": ["not published" if pd.isna(x) else f"{x:g}" for x in pd.to_numeric(table.paper)],
        "ours": [_with_sd(*pair) for pair in zip(table.ours, table.sd, strict=True)],
        "n": ["" if pd.isna(n) else f"{n:.0f}" for n in table.n],
        "difference": [
            "" if pd.isna(x) or not known else number(x, 3, sign="+")
            for x, known in zip(table.difference, same, strict=True)
        ],
        "same setting?": [x if isinstance(x, str) else "yes" if x else "no" for x in table.same_setting],
    }
    shown = pd.DataFrame(rows)
    return markdown(shown if shown.difference.any() else shown.drop(columns="difference"))


def _is_same(setting: Any) -> bool:
    return setting.startswith("yes") if isinstance(setting, str) else bool(setting)


def drawn(experiment: Experiment, data: pd.DataFrame) -> dict[str, Figure]:
    """Return all figures of a result, the one that opens its page first; a long comparison with the paper is the last.

    Raises:
        ValueError: the script names a figure that it does not draw as the one that opens the page.
    """
    found = dict(experiment.figures(data))
    lead = experiment.lead or next(iter(found), None)
    if found and lead not in found:
        raise ValueError(f"{experiment.name}: lead is {lead!r}, but the figures are {', '.join(found)}")
    known = _published_part(comparison(experiment, data))
    if len(known) > LONG:
        with figures.styled(experiment.styles):
            found[BESIDE] = figures.against(known)
    return {stem: found[stem] for stem in sorted(found, key=lambda stem: stem != lead)}


def caption(experiment: Experiment, stem: str, figure: Figure) -> str:
    """Return the line below a figure: what the script says of it, and what the marks of its kind of plot mean."""
    usual = {BESIDE: "Every quantity that has a published number."}
    known = {name: text for name, text in (usual | dict(experiment.captions)).items() if stem.startswith(name)}
    said = known[max(known, key=len)] if known else f"{stem.replace('_', ' ').capitalize()}."
    return " ".join(f"{said} {figures.explanation(figure)}".split())


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


def texts(
    experiment: Experiment, data: pd.DataFrame, provenance: Mapping[str, Any], shown: Mapping[str, Figure]
) -> dict[str, str]:
    """Return the texts of a result besides its table and provenance: file name → text; see `readme`."""
    found = {"README.md": readme(experiment, data, provenance, shown)}
    table = comparison(experiment, data)
    return found | ({"comparison.csv": comparison_csv(table)} if len(table) > LONG else {})


def readme(
    experiment: Experiment, data: pd.DataFrame, provenance: Mapping[str, Any], shown: Mapping[str, Figure]
) -> str:
    """Return the text of a result's README.md: claims and one figure, then rule and words, then all numbers.

    Args:
        experiment, data: of the result.
        provenance: with the verdict and the claims that follow from the data.
        shown: what `drawn` returns.
    """
    first, *others = experiment.doc.strip().split("\n\n")
    scale, partial = provenance["scale"], provenance["partial"]
    parts = [f"# {experiment.name}, {scale}{', partial run' * partial}", " ".join(first.split())]
    if partial:
        parts.append(f"**Partial run: its settings are not those of `--scale {scale}`** (see provenance.json).")
    answered, full = provenance["claims"], provenance["verdict"]
    parts += [markdown(pd.DataFrame(answered))] if answered else [f"**Verdict: {full}**"]
    pictures = [picture(stem, caption(experiment, stem, figure)) for stem, figure in shown.items()]
    parts += [*pictures[:1], _run_line(experiment, provenance)]
    if others:
        parts += ["## Claim and rule, written before the run", "```text\n" + "\n\n".join(others).strip("\n") + "\n```"]
    if answered:
        parts += ["## Verdict in full", full]
    if experiment.remarks:
        parts += ["## In words", "\n\n".join(" ".join(part.split()) for part in experiment.remarks(data).split("\n\n"))]
    if experiment.deviations:
        listed = "\n".join(f"{number}. {text}" for number, text in enumerate(experiment.deviations, 1))
        parts += ["## Deviations from the paper", listed]
    parts += ["## All numbers", "### Beside the paper", *_beside_the_paper(comparison(experiment, data))]
    for heading, table in (experiment.tables(data) if experiment.tables else {}).items():
        parts += [f"### {heading}", _folded(table)]
    if pictures[1:]:
        parts += ["## Further figures", *pictures[1:]]
    return "\n\n".join(parts) + "\n"


def picture(stem: str, line: str) -> str:
    """Return a figure in Markdown with its caption below it."""
    return f"![{stem.replace('_', ' ')}]({stem}.png)\n\n*{line.replace('*', chr(92) + '*')}*"


def _beside_the_paper(table: pd.DataFrame) -> list[str]:
    """Return a comparison; of a long one only the rows that have a number of the paper, if these are few."""
    if len(table) <= LONG:
        return [comparison_markdown(table)]
    known = _published_part(table)
    every = f"All {len(table)} quantities, with sd and n: [comparison.csv](comparison.csv)."
    if known.empty:
        return [f"The paper has no number to compare with. {every}"]
    if len(known) > LONG:
        return [f"{every} The {len(known)} that have a published number: figure {BESIDE.replace('_', ' ')} below."]
    return [comparison_markdown(known), every]


def _published_part(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.paper.notna() & table.ours.notna()]


def comparison_csv(table: pd.DataFrame) -> str:
    """Return a comparison as CSV, numbers to six significant digits."""
    return table[[*COMPARISON]].to_csv(index=False, lineterminator="\n", float_format="%.6g")


def _folded(table: pd.DataFrame) -> str:
    """Return a table in Markdown; one of many rows opens when its line is clicked."""
    if len(table) <= LONG:
        return markdown(table)
    return f"<details>\n<summary>{len(table)} rows</summary>\n\n{markdown(table)}\n\n</details>"


def _run_line(experiment: Experiment, provenance: Mapping[str, Any]) -> str:
    seeds = ", ".join(str(seed) for seed in provenance["seeds"])
    return (
        f"Scale {provenance['scale']}; seed{'s' * (len(provenance['seeds']) != 1)} {seeds}; "
        f"{_duration(provenance['seconds']['total'])}{_earlier(provenance)} on {provenance['device']}, up to "
        f"{provenance['jobs']} processes; "
        f"commit {provenance['commit'][:10]}{' with uncommitted changes' * provenance['dirty']}, "
        f"{provenance['date'][:10]}. Again: `python experiments/{experiment.name}.py --scale {provenance['scale']}`. "
        "Rows: [data.csv](data.csv). Settings, versions, times: [provenance.json](provenance.json)."
    )


def _earlier(provenance: Mapping[str, Any]) -> str:
    """Return a text that says how many artefacts came from the cache: the run's time does not include building them."""
    hits, built = (len(provenance.get(name, ())) for name in ("cache_hits", "cache_built"))
    return f" (beside {hits} of {hits + built} artefacts that earlier runs had left in the cache)" if hits else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
