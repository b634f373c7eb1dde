"""The only writer of results: table, comparison with the paper, figures, verdict, provenance; and their verification.

An experiment leaves in `results/NN_name/SCALE/`: data.csv (tidy rows), figures drawn from it, README.md, comparison.csv
where that is long, and provenance.json, which is written last, so that a folder without it is visibly unfinished.
Everything in these texts and in the pages over all results follows from data.csv, provenance.json and the script, so it
can be derived again and compared:

    python -m common.lab.results verify                          derive every committed table, verdict, page; compare
    python -m common.lab.results render                          write them again after a change of wording or style
    python -m common.lab.results list                            every experiment with its state and cost
    python -m common.lab.results headline 22_vision_merging laptop       numbers at git HEAD beside those measured now
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from common.lab import figures, index, index_page, report
from common.lab.experiment import SCALE_NAMES, Experiment
from common.lab.experiment import load_experiment as load_experiment
from common.lab.report import PUBLISHED, read_csv
from common.lab.report import published as published

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
EXPERIMENTS = ROOT / "experiments"


# Reading


def load(folder: Path) -> pd.DataFrame:
    """Return the rows of a result folder's data.csv. Text that looks like a number comes back as a number."""
    return read_csv(folder / "data.csv")


def settings_hash(settings: Any, recorded: Mapping[str, Any] | None = None) -> str:
    """Return the hash (16 hex digits) of the fields that differ from the dataclass defaults.

    A new field with a default therefore leaves the hash of earlier results as it was. Within a field that is a
    dataclass itself this takes the settings that were recorded, see `_as_recorded`.

    Args:
        settings: a dataclass.
        recorded: the settings of a provenance, if the hash is to be compared with the one that stands there.
    """
    known = plain(settings) if recorded is None else _as_recorded(settings, recorded)
    changed = {
        field.name: known[field.name]
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != _default(field)
    }
    return _sha256(json.dumps(changed, sort_keys=True).encode())[:16]


def _as_recorded(today: Any, recorded: Any) -> Any:
    """Return today's settings as plain data, without the fields that a record lacks and that have their defaults.

    A field that a dataclass got after the run, at whatever depth, so counts as having been at its default.
    """
    if dataclasses.is_dataclass(today) and isinstance(recorded, Mapping):
        values = {field: getattr(today, field.name) for field in dataclasses.fields(today)}
        return {
            field.name: _as_recorded(value, recorded.get(field.name))
            for field, value in values.items()
            if field.name in recorded or value != _default(field)
        }
    if isinstance(today, list | tuple) and isinstance(recorded, list) and len(today) == len(recorded):
        return [_as_recorded(*pair) for pair in zip(today, recorded, strict=True)]
    return plain(today)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def plain(value: Any) -> Any:
    """Return `value` as JSON would give it back: dataclasses as dicts, tuples as lists, paths as text."""

    def encode(other: Any) -> Any:
        is_value = dataclasses.is_dataclass(other) and not isinstance(other, type)
        return dataclasses.asdict(other) if is_value else str(other)

    return json.loads(json.dumps(value, default=encode))


# Folders


def _folders(results_dir: Path) -> list[Path]:
    """Return the folders results/NN_name/SCALE, partial runs left out, in order of number and scale."""
    folders = [results_dir / scale for scale in results_dir.glob("[0-9]*_*/[!.]*") if scale.is_dir()]
    order = {name: position for position, name in enumerate(SCALE_NAMES)}
    return sorted(
        (folder for folder in folders if "-partial-" not in folder.name),
        key=lambda folder: (folder.parent.name, order.get(folder.name, len(order)), folder.name),
    )


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text(encoding="utf-8"))


def _finished(results_dir: Path) -> list[Path]:
    return [folder for folder in _folders(results_dir) if (folder / "provenance.json").is_file()]


def pages(results_dir: Path, experiments_dir: Path) -> dict[str, str]:
    """Return all pages that follow from several results: file, seen from results/ → text.

    Raises:
        ValueError: a script is missing or defines no experiment.
    """
    finished = _finished(results_dir)
    facts = [_facts(folder) for folder in finished]
    found = {"README.md": index.overview(facts), "index.html": index_page.overview(facts)}
    for name, folders in itertools.groupby(finished, key=lambda folder: folder.parent.name):
        experiment = load_experiment(experiments_dir / f"{name}.py")
        title = experiment.doc.strip().split("\n\n")[0]
        found[f"{name}/README.md"] = index.experiment_page(title, [_facts(folder) for folder in folders])
        found |= {page: text(results_dir) for page, text in experiment.pages.items()}
    return found


# Writing


def write(
    results_dir: Path, experiment: Experiment, rows: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> Path:
    """Write one complete result and the pages over all, and return its folder; a failure leaves the previous result.

    Args:
        results_dir: usually `results/` of the clone.
        experiment: the experiment that measured.
        rows: one mapping per measurement; columns appear in the order of their first use.
        provenance: as `common.lab.run` collects it; a partial run's folder carries the hash of its settings.

    Raises:
        ValueError: there are no rows.
    """
    suffix = f"-partial-{provenance['settings_hash'][:8]}" if provenance["partial"] else ""
    folder = results_dir / experiment.name / f"{provenance['scale']}{suffix}"
    table = pd.DataFrame([{name: _cell(value) for name, value in row.items()} for row in rows], dtype=object)
    if table.empty:
        raise ValueError(f"{experiment.name}: measure() yielded no rows")
    csv, rescued = table.to_csv(index=False, lineterminator="\n"), folder.with_name(f".{folder.name}-rows.csv")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _replace(rescued, csv)  # hours of rows outlive a mistake in a figure
    try:
        _write(folder, experiment, csv, provenance)
    except Exception as error:
        error.add_note(f"the measured rows are kept in {rescued}")
        raise
    rescued.unlink()
    _write_pages(results_dir, experiment.script.parent)
    return folder


def _write_pages(results_dir: Path, experiments_dir: Path) -> None:
    for page, text in pages(results_dir, experiments_dir).items():
        _replace(results_dir / page, text)


def _cell(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # of a tensor or numpy scalar
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else f"{value:.6g}"


def _write(folder: Path, experiment: Experiment, csv: str, provenance: Mapping[str, Any]) -> None:
    data = read_csv(io.StringIO(csv))  # as a reader of data.csv will see it
    drawn = report.drawn(experiment, data)
    facts = {**provenance, "data_sha256": _sha256(csv.encode()), **_derived(experiment, data, provenance, drawn)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary)
        (new / "data.csv").write_text(csv, encoding="utf-8")
        for name, text in report.texts(experiment, data, facts, drawn).items():
            (new / name).write_text(text, encoding="utf-8")
        for stem, figure in drawn.items():
            figures.save(figure, new / f"{stem}.png")
        (new / "provenance.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _swap(new, folder)


def _derived(
    experiment: Experiment, data: pd.DataFrame, provenance: Mapping[str, Any], drawn: Mapping[str, Figure]
) -> dict[str, Any]:
    """Return what a provenance holds that follows from the table: verdict, claims, and the figure to open with."""
    stem = next(iter(drawn), None)
    lead = stem and {"figure": stem, "caption": report.caption(experiment, stem, drawn[stem])}
    answers = report.claims(experiment, data, provenance)
    return {"verdict": report.verdict(experiment, data, provenance), "claims": answers, "lead": lead}


def _swap(new: Path, folder: Path) -> None:
    """Move a complete result into place; from the first line to the last the folder is visibly unfinished."""
    folder.mkdir(exist_ok=True)
    (folder / "provenance.json").unlink(missing_ok=True)
    for stale in [*folder.glob("*.png"), folder / "comparison.csv"]:
        stale.unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == "provenance.json"):
        os.replace(file, folder / file.name)


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def summary(experiment: Experiment, folder: Path) -> str:
    """Return what a run prints at its end: claims (the comparison where there are none), verdict and folder."""
    if claims := _facts(folder)["claims"]:
        table = report.markdown(pd.DataFrame(claims))
    else:
        table = report.comparison_markdown(report.comparison(experiment, load(folder)))
    return f"\n{table}\n\n{_judged(experiment, folder)}\nResults: {folder}/README.md"


def _judged(experiment: Experiment, folder: Path) -> str:
    """Return a line with the verdict; if the rule does not judge this scale, with what it asks for, from its text."""
    verdict = _facts(folder)["verdict"]
    asked = re.search(r'Verdict (.*?) \((?:else|none:) "not run at this scale"', " ".join(experiment.doc.split()))
    if not verdict.startswith("not run at this scale") or not asked:
        return f"Verdict: {verdict}"
    return f"Verdict: {verdict}. Measured; the rule needs more: {asked[1]}."


# Commands


def problems(results_dir: Path = RESULTS, experiments_dir: Path = EXPERIMENTS) -> list[str]:
    """Return one line for each file that does not follow from its data, provenance and script; empty if all do."""
    found = [line for folder in _folders(results_dir) for line in _folder_problems(folder, experiments_dir)]
    if (results_dir / "README.md").is_file() or _folders(results_dir):
        found += _page_problems(results_dir, experiments_dir)
    for path in sorted((results_dir / "published").glob("*.csv")):
        found += _published_problems(path)
    return found


def _page_problems(results_dir: Path, experiments_dir: Path) -> Iterator[str]:
    try:
        derived = pages(results_dir, experiments_dir)
    except Exception as error:  # any failure to derive a page again is worth a line
        yield f"README.md: {type(error).__name__}: {error}"
        return
    for page, text in derived.items():
        yield from _difference(page, results_dir / page, text)


def _folder_problems(folder: Path, experiments_dir: Path) -> Iterator[str]:
    where = f"{folder.parent.name}/{folder.name}"
    if not (folder / "provenance.json").is_file():
        yield f"{where}: unfinished (no provenance.json)"
        return
    try:
        provenance = _facts(folder)
        experiment = load_experiment(experiments_dir / f"{folder.parent.name}.py")
        yield from (f"{where}/provenance.json: {line}" for line in _stale(provenance, experiment, folder))
        data = load(folder)
        drawn = report.drawn(experiment, data)
        derived = _derived(experiment, data, provenance, drawn)
        for name, value in derived.items():
            if name not in provenance or provenance[name] != value:
                do = "do" if name == "claims" else "does"
                yield f"{where}/provenance.json: its {name} {do} not follow from data.csv"
        texts = report.texts(experiment, data, {**provenance, **derived}, drawn)
        for name in dict.fromkeys([*texts, *(file.name for file in folder.glob("comparison.csv"))]):
            yield from _difference(f"{where}/{name}", folder / name, texts.get(name, ""))
        yield from (f"{where}/{stem}.png: missing" for stem in drawn if not (folder / f"{stem}.png").is_file())
    except Exception as error:  # any failure to derive a result again is worth a line
        yield f"{where}: {type(error).__name__}: {error}"


def _stale(provenance: Mapping[str, Any], experiment: Experiment, folder: Path) -> Iterator[str]:
    """Yield each reason why a committed result is no evidence for today's script."""
    if provenance["partial"] or provenance["scale"] != folder.name:
        yield f"a {'partial ' * provenance['partial']}run of scale {provenance['scale']}, in the folder {folder.name}"
    if provenance["dirty"]:
        yield "measured with uncommitted changes (dirty)"
    if provenance["data_sha256"] != _sha256((folder / "data.csv").read_bytes()):
        yield "data.csv is not the one that was measured (its hash differs)"
    settings = experiment.scales[folder.name]
    recorded = provenance["settings"]
    if provenance["settings_hash"] != (today := settings_hash(settings, recorded)):
        yield f"settings hash {provenance['settings_hash']}, but {folder.name} is {today} today"
    known = _as_recorded(settings, recorded)
    for name in filter(known.__contains__, recorded):  # the hash misses changed defaults
        for setting, old, new in _changes(name, recorded[name], known[name]):
            yield f"measured with {setting} = {old}, but {folder.name} has {new} today"


def _changes(name: str, recorded: Any, today: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting that was another one in a record: its dotted name, the recorded and today's value."""
    if isinstance(recorded, Mapping) and isinstance(today, Mapping):
        for key in dict.fromkeys([*recorded, *today]):
            yield from _changes(f"{name}.{key}", recorded.get(key, "(not recorded)"), today.get(key, "(no setting)"))
    elif recorded != today:
        yield name, recorded, today


def _difference(where: str, path: Path, expected: str) -> list[str]:
    """Return the first line in which a file differs from the text that it should hold."""
    if not path.is_file():
        return [f"{where}: missing"]
    found = path.read_bytes().decode(errors="replace")
    if found == expected:
        return []
    lines = itertools.zip_longest(found.split("\n"), expected.split("\n"), fillvalue="<end of file>")
    line, (ours, theirs) = next((i, pair) for i, pair in enumerate(lines, 1) if pair[0] != pair[1])
    return [f"{where}:{line}: found {ours!r}, expected {theirs!r}"]


def _published_problems(path: Path) -> Iterator[str]:
    try:
        table = read_csv(path)
    except (ValueError, UnicodeDecodeError) as error:
        yield f"published/{path.name}: unreadable ({error})"
        return
    if tuple(table.columns) != PUBLISHED.get(path.stem):
        yield f"published/{path.name}: columns {list(table.columns)}, expected {PUBLISHED.get(path.stem)}"
    elif table.empty or table.isna().any(axis=None):
        yield f"published/{path.name}: {'no rows' if table.empty else 'an empty cell'}"


def verify(results_dir: Path = RESULTS, experiments_dir: Path = EXPERIMENTS) -> None:
    """Derive every committed table, verdict and page again; print each difference, and exit with status 1 if any."""
    found = problems(results_dir, experiments_dir)
    print("\n".join(found) or f"{len(_folders(results_dir))} results verified")
    sys.exit(bool(found))


def render(results_dir: Path = RESULTS, experiments_dir: Path = EXPERIMENTS) -> None:
    """Write every text, figure and page again from data.csv, after a change of wording or style: no rerun.

    Raises:
        SystemExit: a data.csv is not the one that was measured.
    """
    for folder in _finished(results_dir):
        csv = (folder / "data.csv").read_bytes()
        if _sha256(csv) != _facts(folder)["data_sha256"]:
            raise SystemExit(f"error: {folder}/data.csv is not the one that was measured: restore it or measure again")
        _write(folder, load_experiment(experiments_dir / f"{folder.parent.name}.py"), csv.decode(), _facts(folder))
    _write_pages(results_dir, experiments_dir)


def headline(
    name: str,
    scale: str,
    /,
    results_dir: Path = RESULTS,
    experiments_dir: Path = EXPERIMENTS,
    measured_dir: Path | None = None,
) -> None:
    """Print an experiment's comparison as committed (git HEAD) beside the one measured now, and the verdict of this.

    What was measured now is in `measured_dir`, by default in the working tree.

    Raises:
        SystemExit: there is no such experiment, or nothing was measured.
    """
    measured = (measured_dir or results_dir) / name / scale
    if not (experiments_dir / f"{name}.py").is_file():
        known = ", ".join(sorted(script.stem for script in experiments_dir.glob("[0-9]*.py")))
        raise SystemExit(f"error: there is no experiment {name!r}; there are {known}")
    if not (measured / "data.csv").is_file():
        raise SystemExit(f"error: {measured} holds no data.csv: run experiments/{name}.py --scale {scale} first")
    experiment = load_experiment(experiments_dir / f"{name}.py")
    show = ["git", "-C", str(results_dir), "show", f"HEAD:./{name}/{scale}/data.csv"]
    committed = subprocess.run(show, capture_output=True, text=True, check=False)
    now = report.comparison(experiment, load(measured))[["quantity", "ours"]]
    if committed.returncode:
        print(f"\n{name}, {scale}: nothing committed at HEAD to compare with; measured now:\n")
        print(report.markdown(now.rename(columns={"ours": "now"})), _judged(experiment, measured), sep="\n\n")
        return
    before = report.comparison(experiment, read_csv(io.StringIO(committed.stdout)))[["quantity", "ours"]]
    both = before.merge(now, on="quantity", how="outer", suffixes=("_before", "_now"))
    order = list(dict.fromkeys([*now.quantity, *before.quantity]))  # pandas sorts an outer join by its keys
    both = both.set_index("quantity").loc[order].reset_index()
    both = both.assign(difference=both.ours_now - both.ours_before)
    print(f"\n{name}, {scale}: committed at HEAD beside measured now\n")
    shown = report.markdown(both.rename(columns={"ours_before": "HEAD", "ours_now": "now"}))
    print(shown, _judged(experiment, measured), sep="\n\n")


def listing(results_dir: Path = RESULTS, experiments_dir: Path = EXPERIMENTS) -> None:
    """Print every experiment: what it regenerates, its state and the time that it took at each scale, and its cost.

    "stale" are results that are no evidence for today's script, with the first reason; "done" are the others.
    """
    for script in sorted(experiments_dir.glob("[0-9]*.py")):
        experiment = load_experiment(script)
        first, *_ = experiment.doc.strip().split("\n\n")
        cost = re.search(r"^Cost +(.*?)(?=^\S|\Z)", experiment.doc, re.MULTILINE | re.DOTALL)
        print(f"{experiment.name}  {' '.join(first.split())}")
        for scale in SCALE_NAMES[1:]:  # smoke is never committed
            print(f"    {scale:<12} {_state(experiment, results_dir / experiment.name / scale)}")
        print(f"    {'cost':<12} {' '.join(cost[1].split()) if cost else 'not stated'}\n")


def _state(experiment: Experiment, folder: Path) -> str:
    if not (folder / "provenance.json").is_file():
        return "unfinished" if folder.is_dir() else "missing"
    facts = _facts(folder)
    filled = " with parts from the cache" if facts["cache_hits"] else ""
    processes = f"{facts['jobs']} process{'es' * (facts['jobs'] > 1)}"
    took = f"{report.duration(facts['seconds']['total'])}{filled}, {processes}, {facts['date'][:10]}"
    reason = next(_stale(facts, experiment, folder), "")
    return f"stale: {reason}" if reason else f"done ({took})"


if __name__ == "__main__":
    import tyro

    commands = {"verify": verify, "render": render, "headline": headline, "list": listing}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
