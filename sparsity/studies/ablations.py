"""What experiment 07 varies: plug-ins one by one, their placement and bounds, norms, rates, and noise on the weights.

Each part of the experiment is a plan: labels (part, setting, variant, seed, rate, batch) and descriptions of runs. The
conditions that experiment 03 has too are its own, so that under the same recipe its networks are found in the cache.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from common.cache import Artefact
from common.lab.figures import Style
from common.lab.run import Context
from sparsity.studies import finetuning
from sparsity.studies.density_tables import CONTROL, brief_rows
from sparsity.studies.finetuning import LIFTED
from sparsity.studies.measurement import Rows, curve, measure_all, measure_snapshot
from sparsity.studies.robustness import measure_robustness
from sparsity.studies.runs import CONTROLS, MODIFIED, VARIANTS, Plan, Run, Variant, plan_setting
from sparsity.studies.runs import STYLES as RUN_STYLES

PARTS = ("plug-ins", "2x2", "noise", "T5", "durations", "rates")
ALONE = {"restricted norm": "restricted norm alone", "JSReLU": "JSReLU alone", "zeroth bias": "zeroth bias alone"}
LEFT_OUT = {name: f"all but {name}" for name in ALONE}
PLUGINS: dict[str, Variant] = {
    **{name: VARIANTS[name] for name in ("vanilla", "modified", CONTROL)},
    **{ALONE[name]: VARIANTS[ALONE[name]] for name in ALONE},
    LEFT_OUT["restricted norm"]: replace(MODIFIED, restricted_norm=False),
    LEFT_OUT["JSReLU"]: replace(MODIFIED, activation="relu"),
    LEFT_OUT["zeroth bias"]: replace(MODIFIED, zeroth_bias=False),
    "modified, bias at output": replace(MODIFIED, placement="output"),
    "zeroth bias alone, at output": Variant(zeroth_bias=True, placement="output"),
    "modified, bias not clipped": replace(MODIFIED, clip=None),
    "MLP norms without bias": Variant(norms="no bias"),
    "MLP norms fixed at 1": Variant(norms="fixed"),
    "MLP norms bounded, with bias": Variant(restricted_norm=True, norms="bounded, with bias"),
}
FACTORS: dict[str, Variant] = {  # the authors' 2 × 2 clips no zeroth bias and restricts no norm
    "vanilla": Variant(),
    "JSReLU": Variant("jsrelu"),
    "zeroth bias": Variant(zeroth_bias=True, clip=None),
    "JSReLU and zeroth bias": Variant("jsrelu", zeroth_bias=True, clip=None),
}
LOGS = 30  # of each of the durations
NOISY = ", noise"
TUNED: dict[str, Variant] = {name: finetuning.ARMS[name] for name in ("vanilla", LIFTED, "modified")}
STYLES = RUN_STYLES | {
    LIFTED: Style("norms lifted", "#009E73"),
    f"vanilla{NOISY}": Style("vanilla, weight noise", "#4D4D4D"),
    f"{LIFTED}{NOISY}": Style("norms lifted, weight noise", "#004D40"),
    f"modified{NOISY}": Style("modified, weight noise", "#56B4E9"),
    "references": Style("vanilla and control", "#D55E00"),
    "changed": Style("with plug-ins, or norms changed", "#0072B2"),
}


def plan_plugins(setting: str, run: Run, names: Iterable[str], seeds: Sequence[int]) -> Plan:
    """Yield the runs of one setting in the conditions of PLUGINS with these names; part "plug-ins"."""
    yield from _part("plug-ins", setting, run, {name: PLUGINS[name] for name in names}, seeds)


def plan_factors(setting: str, run: Run, seeds: Sequence[int]) -> Plan:
    """Yield the runs of the 2 × 2 of JSReLU and zeroth bias; part "2x2"."""
    yield from _part("2x2", setting, run, FACTORS, seeds)


def plan_text(setting: str, run: Run, seeds: Sequence[int]) -> Plan:
    """Yield the runs of a T5: vanilla, modified and the control; part "T5"."""
    yield from _part("T5", setting, run, {name: VARIANTS[name] for name in CONTROLS[:3]}, seeds)


def plan_rates(
    data: str, run: Run, rates: Sequence[float], batch_sizes: Sequence[int], names: Sequence[str], seeds: Sequence[int]
) -> Plan:
    """Yield the runs of every learning rate and batch size at the same weight decay and the same number of images.

    Args:
        data: begins the name of each setting.
        run: its recipe has one of the rates and one of the batch sizes.
        rates, batch_sizes: each pair makes one setting. E = Σ rate × decay differs.
        names: of the variants, in VARIANTS.
        seeds: of each.
    """
    base, variants = run.recipe, {name: VARIANTS[name] for name in names}
    for rate in rates:
        for size in batch_sizes:
            steps = base.steps * base.batch_size // size
            recipe = replace(base, learning_rate=rate, batch_size=size, steps=steps)
            log_every = max(1, run.log_every * steps // base.steps)
            own = replace(run, recipe=recipe, log_every=log_every)
            yield from _part("rates", f"{data}, rate {rate:g}, batch {size}", own, variants, seeds)


def plan_durations(data: str, run: Run, durations: Sequence[int], names: Sequence[str], seeds: Sequence[int]) -> Plan:
    """Yield runs of several numbers of steps at the same learning rate, all with the same E = Σ rate × decay.

    Args:
        data: begins the name of each setting.
        run: whose weight decay × steps is that of all.
        durations: numbers of steps; each makes one setting. The schedule stretches with them.
        names: of the variants, in VARIANTS.
        seeds: of each.
    """
    base, variants = run.recipe, {name: VARIANTS[name] for name in names}
    for steps in durations:
        recipe = replace(base, steps=steps, weight_decay=base.weight_decay * base.steps / steps)
        own = replace(run, recipe=recipe, log_every=max(1, steps // LOGS))
        yield from _part("durations", f"{data}, {steps} steps, decay {recipe.weight_decay:g}", own, variants, seeds)


def plan_noise(setting: str, run: Run, size: float, seeds: Sequence[int]) -> Plan:
    """Yield runs that fine-tune the vanilla network of each seed, without noise on the weights and with; part "noise".

    Args:
        setting: its name in the table.
        run: of the vanilla arm, with `tuning`; its start gets the seed of the run.
        size: of the noise, relative to the weights.
        seeds: of each arm, and of the networks that they start from.
    """
    arms = TUNED | {f"{name}{NOISY}": replace(variant, noise=size) for name, variant in TUNED.items()}
    for labels, one in _part("noise", setting, run, arms, seeds):
        start = one.tuning.start and replace(one.tuning.start, seed=one.seed)
        yield labels, replace(one, tuning=replace(one.tuning, start=start))


def _part(part: str, setting: str, run: Run, variants: Mapping[str, Variant], seeds: Sequence[int]) -> Iterator[Any]:
    options = dict(exempt=run.exempt, log_every=run.log_every, snapshots=run.snapshots, tuning=run.tuning)
    own = dict.fromkeys(variants, seeds)
    for labels, one in plan_setting(setting, run.task, run.recipe, own, variants, **options):
        yield {"part": part, **labels, "rate": run.recipe.learning_rate, "batch": run.recipe.batch_size}, one


def measure(
    plan: Plan, context: Context, epsilons: Sequence[float], noises: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Train and measure the runs of a plan, in parallel processes, and yield the table's rows.

    Args:
        plan: labels and description of each run.
        context: of the experiment.
        epsilons, noises: sizes of attacks and of noise under which part "noise" is measured too; see
            `sparsity.studies.robustness.measure_robustness`.
    """
    for labels, (measured, logged, stood) in measure_all(plan, context, partial(_all_of_one, epsilons, noises)):
        yield from brief_rows(labels, measured, logged)
        yield from ({**labels, **row} for row in stood)


def _all_of_one(
    epsilons: Sequence[float], noises: Sequence[float], run: Run, trained: Artefact, device: torch.device
) -> tuple[Rows, Rows, Rows]:
    attacked = run.tuning is not None
    stood = measure_robustness(epsilons, noises, run, trained, device) if attacked else []
    return measure_snapshot(run, trained, device), curve(trained), stood
