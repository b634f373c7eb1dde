"""Fine-tuning a trained network for sparsity: arms and controls, and how sparse each is at equal accuracy.

Rows of the table are (setting, variant, seed) × (split, step, layer) × metric as for training from scratch, and for
each split of PRUNED also × `kept`: the share of an MLP's non-zero activations above the threshold that stands there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from common.cache import Artefact, cached_rows
from common.lab.figures import INK, MUTED, Style
from common.lab.run import Context
from common.training import TrainingRecipe
from sparsity.probes import Probe, probe
from sparsity.studies.density_tables import finals, run_rows
from sparsity.studies.measurement import Rows, curve, load, measure_all, measure_snapshot
from sparsity.studies.runs import MODIFIED, RUN, FineTuning, Plan, Run, Variant
from sparsity.studies.training import make_task
from sparsity.thresholds import active_sizes, thresholded, thresholds

BEFORE = "before fine-tuning"
LIFTED = "norms lifted, nothing else"
FOLDED = "norms folded into keys"
ARMS: dict[str, Variant] = {
    "vanilla": Variant(),
    "modified": MODIFIED,
    LIFTED: Variant(restricted_norm=True),
    FOLDED: Variant(folded=True),
    "norms folded, then bounded": Variant(folded=True, restricted_norm=True),
    "JSReLU and zeroth bias, norms free": replace(MODIFIED, restricted_norm=False),
    "vanilla, MLP norms undecayed": Variant(exempt=("mlp_norms",)),
}
STYLES = {  # in figures
    BEFORE: Style(BEFORE, INK),
    "vanilla": Style("vanilla", MUTED),
    "modified": Style("modified", "#0072B2"),
    LIFTED: Style(LIFTED, "#009E73"),
    FOLDED: Style(FOLDED, "#CC79A7"),
    "norms folded, then bounded": Style("norms folded, then bounded", "#7A5195"),
    "JSReLU and zeroth bias, norms free": Style("JSReLU and zeroth bias, norms free", "#56B4E9"),
    "vanilla, MLP norms undecayed": Style("vanilla, MLP norms undecayed", "#D55E00"),
    "ReLU + L1, 0.03": Style("ReLU + L1, 0.03", "#E3C79B"),
    "ReLU + L1, 0.1": Style("ReLU + L1, 0.1", "#CFA15F"),
    "ReLU + L1, 0.3": Style("ReLU + L1, 0.3", "#B07C35"),
    "ReLU + L1, 1": Style("ReLU + L1, 1", "#855516"),
    "ReLU + L1, 3": Style("ReLU + L1, 3", "#573404"),
}
KEPT = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
Margin = float | Callable[[str], float]
PRUNED = ("pruned, validation", "pruned, test")


def plan_finetuning(
    setting: str, run: Run, arms: Sequence[str], seeds: Sequence[int], l1: Sequence[float] = (), before: bool = True
) -> Plan:
    """Yield the labels and the description of every run in one setting: before fine-tuning, the arms, ReLU with L1.

    Args:
        setting: its name in the table.
        run: of the vanilla arm from any seed, with `tuning`; its start gets the seed of the run.
        arms: names in ARMS.
        seeds: of each arm, and of the networks they start from.
        l1: weights of the penalty; each makes one rival, fine-tuned like vanilla.
        before: whether the networks are measured before fine-tuning too.
    """
    still: TrainingRecipe = replace(run.recipe, steps=1, learning_rate=0.0)  # no plug-in, no step
    variants = {BEFORE: (Variant(None), still)} if before else {}
    variants |= {name: (ARMS[name], run.recipe) for name in arms}
    variants |= {f"ReLU + L1, {weight:g}": (Variant(l1=weight), run.recipe) for weight in l1}
    for name, (variant, recipe) in variants.items():
        for seed in seeds:
            start = run.tuning.start and replace(run.tuning.start, seed=seed)
            tuning: FineTuning = replace(run.tuning, start=start)
            labels = dict(zip(RUN, (setting, name, seed), strict=True))
            yield labels, replace(run, recipe=recipe, variant=variant, seed=seed, tuning=tuning)


def measure(plan: Plan, context: Context) -> Iterator[dict[str, Any]]:
    """Fine-tune and measure the runs of a plan, in parallel processes, and yield the table's rows."""
    for labels, (measured, logged, pruned) in measure_all(plan, context, _all_of_one):
        yield from run_rows(labels, measured, logged)
        yield from ({**labels, "layer": "all", **row} for row in pruned)


def _all_of_one(run: Run, trained: Artefact, device: torch.device) -> tuple[Rows, Rows, Rows]:
    inputs = {"run": trained.key, "device": device.type, "kept": KEPT}
    pruned = cached_rows("sparsity_thresholds", inputs, partial(_pruned, run, trained, device))
    return measure_snapshot(run, trained, device), curve(trained), pruned


@torch.no_grad()
def _pruned(run: Run, trained: Artefact, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield density, loss and score on both splits of PRUNED at each threshold; calibrated on validation data."""
    task, model = make_task(run.task, device), load(run, trained, device)

    def score(split: str, seen: Probe | None = None) -> tuple[float, float]:
        pairs = []
        for batch in task.batches(split):
            if seen is not None and task.masks:
                seen.mask = task.masks(batch)
            pairs.append(torch.stack(task.score(model, batch), -1).double())
        return torch.cat(pairs).mean(0).tolist()

    sizes = active_sizes(model, partial(score, "validation"))
    for kept in KEPT:
        levels = thresholds(sizes, kept)
        for name in PRUNED:
            with thresholded(model, levels), probe(model) as seen:
                loss, accuracy = score(name.removeprefix("pruned, "), seen)
            density = seen.summary(gradients=False).density.mean()
            for metric, value in {"density": density, "loss": loss, "score": accuracy}.items():
                yield {"split": name, "kept": kept, "metric": metric, "value": value}


# At equal accuracy ---------------------------------------------------------------------------------------------------


def frontier(data: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and threshold: kept, and density, loss and score on both splits of PRUNED."""
    rows = data[data.split.isin(PRUNED)].assign(
        column=lambda rows: rows.metric + rows.split.str.removeprefix("pruned,")
    )
    return rows.pivot(index=[*RUN, "kept"], columns="column", values="value").reset_index()


def margin_of(margin: Margin, setting: str) -> float:
    """Return the margin of a setting."""
    return margin(setting) if callable(margin) else margin


def equal_accuracy(data: pd.DataFrame, metric: str, margin: Margin) -> pd.DataFrame:
    """Return each run's density at equal accuracy: thresholds raised as far as validation data allow, then tested.

    An arm may lose up to `margin` against what the vanilla arm of its setting and seed has on validation data without
    thresholds. Its own are raised step by step (KEPT), and the last step before the first that loses more is taken.

    Args:
        data: the experiment's table.
        metric: "score", or "loss", which is the better the lower.
        margin: in the metric's units; or maps the name of a setting to it.

    Returns:
        one row per run: setting, variant, seed, kept, equal_density and equal_score on test data; NaN where the arm
        loses more than the margin without any threshold.
    """
    table, sign = frontier(data), -1 if metric == "loss" else 1
    whole = table[(table.variant == "vanilla") & (table.kept == 1)].set_index(["setting", "seed"])
    allowed = [margin_of(margin, setting) for setting, _ in whole.index]
    floor = sign * whole[f"{metric} validation"] - allowed
    rows = []
    for keys, part in table.groupby(RUN, sort=False):
        if (keys[0], keys[2]) not in floor.index:
            continue
        part = part.sort_values("kept", ascending=False)
        good = part[(sign * part[f"{metric} validation"] >= floor[keys[0], keys[2]]).cummin()]
        found = {"kept": float("nan"), "equal_density": float("nan"), "equal_score": float("nan")}
        if len(good):
            best = good.iloc[-1]
            found = {"kept": best.kept, "equal_density": best["density test"], "equal_score": best[f"{metric} test"]}
        rows.append(dict(zip(RUN, keys, strict=True)) | found)
    return pd.DataFrame(rows)


def results(data: pd.DataFrame, metric: str, margin: Margin) -> pd.DataFrame:
    """Return one row per run, in the table's order: `finals`, and the density at equal accuracy beside them."""
    order = list(dict.fromkeys(zip(data.setting, data.variant, data.seed, strict=True)))
    table = finals(data).merge(equal_accuracy(data, metric, margin), on=RUN, how="left").set_index(RUN)
    return table.loc[order].reset_index()
