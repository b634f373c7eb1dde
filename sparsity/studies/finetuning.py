"""Fine-tuning a trained network for sparsity: arms and controls.

Rows of the table are (setting, variant, seed) × (split, step, layer) × metric as for training from scratch, and those
of `sparsity.studies.equal_accuracy`, which say how sparse each arm is at equal accuracy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch

from common.cache import Artefact
from common.lab.figures import INK, MUTED, Style
from common.lab.run import Context
from common.training import TrainingRecipe
from sparsity.studies.density_tables import finals, run_rows
from sparsity.studies.equal_accuracy import Margin, equal_accuracy, measure_pruned
from sparsity.studies.measurement import Rows, curve, measure_all, measure_snapshot
from sparsity.studies.runs import MODIFIED, RUN, FineTuning, Plan, Run, Variant

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


def measure(plan: Plan, context: Context, kept: Sequence[float]) -> Iterator[dict]:
    """Fine-tune and measure the runs of a plan, in parallel processes, and yield the table's rows.

    Args:
        plan: see `plan_finetuning`.
        context: of the experiment.
        kept: thresholds under which each network is measured too; see `sparsity.studies.equal_accuracy`.
    """
    for labels, (measured, logged, pruned) in measure_all(plan, context, partial(_all_of_one, tuple(kept))):
        yield from run_rows(labels, measured, logged)
        yield from ({**labels, "layer": "all", **row} for row in pruned)


def _all_of_one(kept: Sequence[float], run: Run, trained: Artefact, device: torch.device) -> tuple[Rows, Rows, Rows]:
    return measure_snapshot(run, trained, device), curve(trained), measure_pruned(run, trained, device, kept)


def results(data: pd.DataFrame, metric: str, margin: Margin) -> pd.DataFrame:
    """Return one row per run, in the table's order: `finals`, and the density at equal accuracy beside them."""
    order = list(dict.fromkeys(zip(data.setting, data.variant, data.seed, strict=True)))
    table = finals(data).merge(equal_accuracy(data, metric, margin), on=RUN, how="left").set_index(RUN)
    return table.loc[order].reset_index()
