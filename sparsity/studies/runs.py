"""Training runs, described: what is learned, by which recipe, with what plugged in, from which network and seed.

What the runs of an experiment differ in is a `Variant`: the vanilla network, the paper's, each plug-in alone, the
controls of weight decay, and the rivals.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.lab.figures import INK, MUTED, Style
from common.training import TrainingRecipe
from sparsity.studies.distillation import Distillation
from sparsity.studies.images import ImageTask
from sparsity.studies.span_corruption import SpanCorruption


@dataclass(frozen=True)
class Variant:
    """What is plugged into a network, and how its training differs.

    Args:
        activation: of the MLPs, a name in sparsity.activations.ACTIVATIONS; None leaves them their own.
        zeroth_bias, placement, restricted_norm, clip: as in `sparsify`.
        exempt: what weight decay leaves alone beside the protocol's own exemptions, as in `parameter_groups`.
        l1: weight, in the training loss, of the mean absolute activation, averaged over MLPs.
        folded: whether fine-tuning starts with the scales of MLP norms moved into the keys: see `fold_norms`.
        norms: what else is done to MLP norms: see `sparsity.studies.norms_and_noise.change_norms`.
        noise: on the weights of all linears in training: see `sparsity.studies.norms_and_noise.weight_noise`.
    """

    activation: str | None = "relu"
    zeroth_bias: bool = False
    placement: str = "input"
    restricted_norm: bool = False
    clip: float | None = 0.1
    exempt: tuple[str, ...] = ()
    l1: float = 0.0
    folded: bool = False
    norms: str = "free"
    noise: float = 0.0


MODIFIED = Variant("jsrelu", zeroth_bias=True, restricted_norm=True)

VARIANTS: dict[str, Variant] = {
    "vanilla": Variant(),
    "modified": MODIFIED,
    "vanilla, MLP norms undecayed": Variant(exempt=("mlp_norms",)),
    "vanilla, all norms undecayed": Variant(exempt=("norms",)),
    "modified, all norms undecayed": replace(MODIFIED, exempt=("norms",)),
    "restricted norm alone": Variant(restricted_norm=True),
    "JSReLU alone": Variant("jsrelu"),
    "zeroth bias alone": Variant(zeroth_bias=True),
    "squared ReLU": Variant("squared_relu"),
}
COMMON_DEVIATIONS = (  # of all experiments that train with plug-ins, from the paper
    "Zeroth biases stand at the MLP's input, as in the text; the later code has them at its output.",
    "Zero means |a| ≤ 1e-6. Shares are over all entries of a layer and layers weigh equally, as in the authors' code.",
)
STYLES = {  # in figures
    "vanilla": Style("vanilla", MUTED),
    "modified": Style("modified", "#0072B2"),
    "vanilla, MLP norms undecayed": Style("vanilla, MLP norms undecayed", "#D55E00"),
    "vanilla, all norms undecayed": Style("vanilla, all norms undecayed", "#E69F00"),
    "modified, all norms undecayed": Style("modified, all norms undecayed", "#56B4E9"),
    "restricted norm alone": Style("restricted norm alone", "#009E73"),
    "JSReLU alone": Style("JSReLU alone", "#7A5195"),
    "zeroth bias alone": Style("zeroth bias alone", "#CC79A7"),
    "squared ReLU": Style("squared ReLU", INK),
}
CONTROLS = tuple(VARIANTS)[:5]  # what every density table needs, with several seeds


@dataclass(frozen=True)
class FineTuning:
    """From which trained network a run starts, and how its plug-ins and adapters come into it.

    Args:
        start: the run whose last weights it starts from; None: the task's network is a trained one.
        rank: of the LoRA updates W + (alpha / rank) B A of all linears.
        alpha: see rank; 1 in the paper.
        mixing: share of the steps over which another activation is mixed in.
        uplift: share of the steps over which restricted norms are lifted to 1.
    """

    start: "Run | None" = None
    rank: int = 16
    alpha: float = 1.0
    mixing: float = 1 / 3
    uplift: float = 1 / 3


@dataclass(frozen=True)
class Run:
    """Everything that decides one training run.

    Args:
        task: what is learned.
        recipe: how.
        variant: what is plugged in.
        seed: of initial weights and of the order of the data.
        exempt: what the protocol exempts from weight decay in every variant: () in the authors' ViT, ("biases",) in T5.
        log_every: steps between two entries of the training curve.
        snapshots: how many times weights are kept, from step 0 to the last, the denser the earlier.
        tuning: where it starts; None: from scratch.
    """

    task: ImageTask | SpanCorruption | Distillation
    recipe: TrainingRecipe
    variant: Variant = Variant()
    seed: int = 0
    exempt: tuple[str, ...] = ()
    log_every: int = 100
    snapshots: int = 8
    tuning: FineTuning | None = None

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """The steps after which weights are kept."""
        shares = np.linspace(0, 1, self.snapshots) ** 2
        return tuple(sorted({round(self.recipe.steps * share) for share in shares}))


RUN = ["setting", "variant", "seed"]  # the columns of a table that tell runs apart
Plan = Iterable[tuple[dict[str, Any], Run]]  # the labels of each run in the experiment's table, and the run


def check_variants(names: Iterable[str]) -> None:
    """Raise a ValueError that says which variants there are, if one of the names is not in VARIANTS."""
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"unknown variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")


def plan_setting(
    setting: str,
    task: ImageTask | SpanCorruption,
    recipe: TrainingRecipe,
    seeds: Mapping[str, Sequence[int]],
    variants: Mapping[str, Variant] = VARIANTS,
    **options: Any,
) -> Iterator[tuple[dict[str, Any], Run]]:
    """Yield the labels (setting, variant, seed) and the description of the runs in one setting.

    Args:
        setting: its name in the table.
        task, recipe: what is learned, and how.
        seeds: name of a variant → its seeds; in this order.
        variants: where the names are looked up.
        options: further fields of `Run`.
    """
    for name, own in seeds.items():
        for seed in own:
            yield dict(zip(RUN, (setting, name, seed), strict=True)), Run(task, recipe, variants[name], seed, **options)


def plan_density_tables(
    settings: Sequence[tuple[str, ImageTask | SpanCorruption, TrainingRecipe]],
    seeds: Sequence[int],
    single_seeds: Sequence[int],
    l1: Sequence[float],
    **options: Any,
) -> Iterator[tuple[dict[str, Any], Run]]:
    """Yield the labels and the description of every run of a density table (experiments 03 and 05).

    Args:
        settings: name, task and recipe of each setting; the first is run in all variants, the others in CONTROLS[:3].
        seeds: of vanilla, modified and the controls.
        single_seeds: of each plug-in alone and of the rivals.
        l1: weights of the penalty; each makes one rival.
        options: further fields of `Run`.
    """
    for index, (setting, task, recipe) in enumerate(settings):
        own = {name: seeds if name in CONTROLS else single_seeds for name in (CONTROLS[:3] if index else VARIANTS)}
        yield from plan_rivals(setting, task, recipe, own, () if index else l1, single_seeds, **options)


def plan_rivals(
    setting: str,
    task: ImageTask | SpanCorruption,
    recipe: TrainingRecipe,
    seeds: Mapping[str, Sequence[int]],
    l1: Sequence[float],
    l1_seeds: Sequence[int],
    **options: Any,
) -> Iterator[tuple[dict[str, Any], Run]]:
    """Yield the labels and the description of the runs in one setting, and of vanilla with an L1 penalty.

    Args:
        setting, task, recipe, seeds, options: as for `plan_setting`; names are those of VARIANTS.
        l1: weights of the penalty; each makes one rival, the last to come.
        l1_seeds: of each.
    """
    penalised = {f"ReLU + L1, {weight:g}": Variant(l1=weight) for weight in l1}
    own = {**seeds, **dict.fromkeys(penalised, l1_seeds)}
    yield from plan_setting(setting, task, recipe, own, VARIANTS | penalised, **options)
