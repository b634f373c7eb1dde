"""What a reader takes home: how much sparser the plug-ins are at equal accuracy, and what that is worth in time.

One table over experiments 03 to 07 and 10, derived from their committed rows alone. "As trained" compares two networks
as training left them, with the change of accuracy beside; "at equal accuracy" prunes both by thresholds on activations
without further training (`sparsity.studies.equal_accuracy`), each as far as validation data allow; against pruned
vanilla, modified stands as trained. What no committed row says is "not measured".
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common.lab import report, results
from common.lab.statistics import Interval, mean_difference, relative_change, spread
from sparsity.studies.density_tables import CONTROL, finals
from sparsity.studies.equal_accuracy import PRUNED, T5_MARGIN, VIT_MARGIN, equal_accuracy
from sparsity.studies.finetuning_tables import EQUIVALENT, relation
from sparsity.studies.runs import RUN
from sparsity.studies.speed import SCREENED, typical_seconds

MISSING = "not measured"
SPEED = "10_sparsity_speed/laptop"
SHAPE = "4096 × 11008"  # of the MLP whose milliseconds stand in the table


@dataclass(frozen=True)
class Source:
    """A committed table: what was trained, how, what equal accuracy means there, and which part of it counts."""

    folder: str
    network: str
    training: str
    metric: str
    margin: float
    part: str = ""


SOURCES = (
    Source("03_vit_from_scratch/laptop", "ViT", "from scratch", "score", VIT_MARGIN),
    Source("03_vit_from_scratch/workstation", "ViT", "from scratch", "score", VIT_MARGIN),
    Source("04_vit_finetuning/laptop", "ViT", "fine-tuned", "score", VIT_MARGIN),
    Source("04_vit_finetuning/workstation", "ViT", "fine-tuned", "score", VIT_MARGIN),
    Source("05_t5_from_scratch/laptop", "T5", "from scratch", "loss", T5_MARGIN),
    Source("07_ablations/laptop", "T5", "from scratch", "loss", T5_MARGIN, part="T5"),
    Source("05_t5_from_scratch/workstation", "T5", "from scratch", "loss", T5_MARGIN),
    Source("06_t5_finetuning/laptop", "T5", "fine-tuned", "loss", T5_MARGIN),
    Source("06_t5_finetuning/workstation", "T5", "fine-tuned", "loss", T5_MARGIN),
)
RIVALS = {
    "vanilla": "(a) vanilla",
    CONTROL: "(b) vanilla, MLP norms undecayed",
    "penalised": "(c) ReLU + L1, the strongest",
    "pruned": "(d) vanilla, pruned",
}
AS_TRAINED, EQUAL = "as trained", "at equal accuracy"


def comparisons(results_dir: Path = results.RESULTS) -> pd.DataFrame:
    """Return the change of test density of modified against each rival, a row per setting, rival and way to compare.

    Args:
        results_dir: where the folders of SOURCES are; those that are not there are left out.

    Returns:
        the columns network, training, setting, rival (a key of RIVALS), way (AS_TRAINED or EQUAL), found: the interval
        in %, paired by seed, or None; and text: the interval and what it says, or why there is none.
    """
    rows = []
    for source, setting, runs in _settings(results_dir):
        labels = {"network": source.network, "training": source.training, "setting": setting}
        for rival, way, found, text in _changes(runs):
            rows.append({**labels, "rival": rival, "way": way, "found": found, "text": text})
    return pd.DataFrame(rows, columns=["network", "training", "setting", "rival", "way", "found", "text"])


def table(results_dir: Path = results.RESULTS) -> pd.DataFrame:
    """Return the table, a row per setting: changes of density in % [95 % over seeds], accuracy, and milliseconds.

    Args:
        results_dir: as for `comparisons`.
    """
    seconds = _speed(results_dir)
    rows = []
    for source, setting, runs in _settings(results_dir):
        unit = "loss, nats" if source.metric == "loss" else "accuracy, points"
        by_seed = runs.pivot(index="seed", columns="variant", values=source.metric)
        lost = mean_difference(by_seed["vanilla"], by_seed["modified"])
        row = {"network": f"{source.network}, {source.training}", "setting": setting}
        row |= {"E": f"{runs.E.mean():.2g}", "seeds": str(by_seed[["vanilla", "modified"]].dropna().shape[0])}
        row |= {"modified − vanilla": f"{unit}: {_digits(lost, 3 if source.metric == 'loss' else 1)}"}
        cells: dict[str, list[str]] = {heading: [] for heading in RIVALS.values()}
        for rival, way, _, text in _changes(runs):
            cells[RIVALS[rival]] += [f"{way} {text}"] if text != MISSING else []
        row |= {heading: "; ".join(texts) or MISSING for heading, texts in cells.items()}
        rows.append(row | {f"MLP {SHAPE}, one token, ms": _milliseconds(seconds, runs)})
    return pd.DataFrame(rows)


def page(results_dir: Path = results.RESULTS) -> str:
    """Return `sentences` and `table` as a page in Markdown, with what their words mean.

    Args:
        results_dir: as for `comparisons`.
    """
    return "\n\n".join(
        [
            "# Sparsity at equal accuracy",
            "How much sparser the three plug-ins together are than what else makes a network sparse, and what that is "
            "worth in time: derived from the rows of experiments 03 to 07 and 10.",
            sentences(results_dir),
            report.markdown(table(results_dir)),
            f"Cells: change of test density of modified against the rival, % [95 % interval over seeds, paired]. "
            f'"{AS_TRAINED}" compares both as training left them; "{EQUAL}" raises thresholds on the activations of '
            f"both, without training, until validation data show {VIT_MARGIN:g} point of accuracy or {T5_MARGIN:g} "
            "nats a token lost against vanilla without any; in column (d) vanilla alone is pruned so. Intervals are "
            f"not corrected for their number; within ±{EQUIVALENT:g} % two count as equal. Milliseconds are those of "
            f"an MLP {SHAPE} at the densities of the row, as experiment 10 measured it with random weights, keys "
            "screened by the proven bound, one thread, between the shares of zeros that it measured; the networks of "
            "the rows themselves are too narrow to gain anything.",
        ]
    )


def sentences(results_dir: Path = results.RESULTS) -> str:
    """Return in words, by network and training, what the table says, and where the plug-ins are worth having.

    They are worth having in a setting where the whole interval lies below 0 against every rival that was measured, at
    equal accuracy where that was, and where the control or pruned vanilla is among these; not worth having where one
    lies above 0.

    Args:
        results_dir: as for `comparisons`.
    """
    seen = comparisons(results_dir)
    seen, texts = seen[seen.text != MISSING], []
    for (network, training), own in seen.groupby(["network", "training"], sort=False):
        parts = []
        for (rival, way), rows in own.groupby(["rival", "way"], sort=False):
            words = rows.found.map(lambda found: relation(found) if found else "not reached").value_counts()
            listed = ", ".join(f"{word} in {count}" for word, count in words.items())
            parts.append(f"{RIVALS[rival]} {way}: {listed} of {len(rows)}")
        texts.append(f"**{network}, {training}.** {'; '.join(parts)}.")
    answers: dict[str, list[str]] = {"worth": [], "not worth": [], "undecided": []}
    for (network, training, setting), own in seen.groupby(["network", "training", "setting"], sort=False):
        answers[_worth(own)].append(f"{network} {training}, {setting}")
    count = sum(map(len, answers.values()))
    named = {answer: f" ({'; '.join(settings)})" * bool(settings) for answer, settings in answers.items()}
    texts.append(
        f"**Worth having**, certainly sparser than every rival that was measured: in {len(answers['worth'])} of "
        f"{count} settings{named['worth']}. Certainly denser than one of them: in {len(answers['not worth'])}"
        f"{named['not worth']}. Undecided: in {len(answers['undecided'])}."
    )
    return "\n\n".join(texts)


def _worth(rows: pd.DataFrame) -> str:
    equal = rows[rows.way == EQUAL]
    decisive = pd.concat([equal, rows[(rows.way == AS_TRAINED) & ~rows.rival.isin(equal.rival)]])
    signs = [found.sign if found is not None else 0 for found in decisive.found]
    if any(sign > 0 for sign in signs):
        return "not worth"
    judged = decisive.rival.isin([CONTROL, "pruned"]).any()
    return "worth" if judged and all(sign < 0 for sign in signs) else "undecided"


def _settings(results_dir: Path) -> Iterator[tuple[Source, str, pd.DataFrame]]:
    """Yield each setting that has vanilla and modified: its source, its name, and a row per run."""
    for source in SOURCES:
        folder = results_dir / source.folder
        if not (folder / "data.csv").exists():
            continue
        data = results.load(folder)
        data = data[data.part == source.part] if source.part else data
        runs = finals(data)
        if data.split.isin(PRUNED).any():
            runs = runs.merge(equal_accuracy(data, source.metric, source.margin), on=RUN, how="left")
        else:
            runs = runs.assign(equal_density=np.nan)
        for setting in dict.fromkeys(data.setting):
            own = runs[runs.setting == setting]
            if {"vanilla", "modified"} <= set(own.variant) and setting.split(",")[0] != "MiniLM":
                yield source, setting, own


def _changes(runs: pd.DataFrame) -> Iterator[tuple[str, str, Interval | None, str]]:
    """Yield rival, way, and the change of density of modified against it in one setting, with its text."""
    trained = runs.pivot(index="seed", columns="variant", values="density")
    pruned = runs.pivot(index="seed", columns="variant", values="equal_density")
    penalised = sorted((name for name in trained if name.startswith("ReLU + L1")), key=lambda name: float(name[11:]))
    for rival in RIVALS:
        name = {"penalised": penalised[-1] if penalised else "", "pruned": "vanilla"}.get(rival, rival)
        if rival == "pruned":
            yield rival, EQUAL, *_change(trained, pruned.get(name), trained.modified)
        else:
            yield rival, AS_TRAINED, *_change(trained, trained.get(name), trained.modified)
            yield rival, EQUAL, *_change(trained, pruned.get(name), pruned.modified)


def _change(trained: pd.DataFrame, first: pd.Series | None, second: pd.Series) -> tuple[Interval | None, str]:
    """Return the relative change and its text; no change unless all runs that have thresholds reach equal accuracy."""
    if first is None or first.isna().all() or second.isna().all():
        return None, MISSING
    there = trained[first.name].notna() & trained.modified.notna()
    for values, name in ((second, "modified"), (first, first.name)):
        if short := int(values[there].isna().sum()):
            return None, f"not reached by {name} in {short} of {int(there.sum())} runs"
    found = relative_change(first, second)
    return found, f"{found}: {relation(found)}"


def _digits(found: Interval, digits: int) -> str:
    if np.isinf(found.high):
        return f"{found.mean:+.{digits}f} (one seed)"
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def _speed(results_dir: Path) -> pd.Series | None:
    """Return milliseconds of the MLP by the share of zeros, from 0.5 on, as experiment 10 measured them."""
    folder = results_dir / SPEED
    if not (folder / "data.csv").exists():
        return None
    data = results.load(folder)
    rows = data[(data.part == "MLP, one token") & (data["shape"] == SHAPE) & (data.threads == 1)]
    rows = rows[(rows.contender == SCREENED) & (rows.metric == "seconds")]
    return 1000 * rows.groupby("zeros").value.agg(typical_seconds)


def _milliseconds(measured: pd.Series | None, runs: pd.DataFrame) -> str:
    """Return the time of one token at the densities of vanilla, modified and pruned vanilla, between measured ones."""
    if measured is None:
        return MISSING
    vanilla, modified = (runs[runs.variant == name] for name in ("vanilla", "modified"))
    texts = []
    for name, values in {
        "vanilla": vanilla.density,
        "modified": modified.density,
        "vanilla, pruned": vanilla.equal_density,
    }.items():
        zeros = 1 - values.dropna()
        if len(zeros) and zeros.between(measured.index.min(), measured.index.max()).all():
            times = pd.Series(np.interp(zeros, measured.index, measured.to_numpy()))
            texts.append(f"{name} {spread(times)}")
        else:
            texts.append(f"{name} {MISSING}")
    return "; ".join(texts)
