"""The learning rate of experts that are trained here, chosen on validation texts before anything is merged.

The rule: on the validation texts of the first few tasks, experts of seed 0 are scored at every rate of a grid. Rates at
which some expert's update has 20 % or more of the base's norm are left out: a suite of such experts is no testbed
(merging.suites.testbed). Of the others whose mean score is within one standard error of the best of them, the smallest
is taken (the one-standard-error rule: Breiman et al., Classification and Regression Trees, 1984). Without the bound it
is a choice of experts at any price: the score of a small T5's experts rises with the rate until their updates have half
of the base's norm, and what is that far from the base does not merge. No merge has a part in the choice, so that it
favours no merger and no calibration.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from common import evaluation
from common.cache import Artefact, artefact
from merging.interference import update_norms
from merging.suites import text_experts
from merging.suites.data.text_tasks import TextTask
from merging.suites.models import adapted, language
from merging.suites.testbed import LARGEST
from merging.suites.text_experts import Base, FineTuning, TextRecipe, Tuned
from merging.task_vectors import task_vector

SEED = 0  # of the experts that are compared


def choose(
    base: Base,
    tasks: Sequence[TextTask],
    tuned: Tuned,
    rates: Sequence[float],
    recipe: TextRecipe,
    device: torch.device,
) -> tuple[float, list[dict[str, Any]]]:
    """Return the learning rate that the rule above takes, and what it saw; trains what the cache does not hold yet.

    Args:
        base: what the experts start from.
        tasks: whose validation texts judge. Without any, the middle of the grid is taken.
        tuned: what is fine-tuned.
        rates: the grid, in ascending order. A single one is taken without any training.
        recipe: how experts are trained.
        device: where.

    Returns:
        the rate, and one dict for each rate and task: learning_rate, task, accuracy (%), texts (their number) and norm
        (of the update, % of the base's).
    """
    if len(rates) == 1 or not tasks:
        return rates[(len(rates) - 1) // 2], []
    keys = [text_experts.expert(base, task, FineTuning(tuned, rate), SEED, recipe, device) for rate, task in
            _pairs(rates, tasks)]  # fmt: skip
    inputs = {"experts": [(kind, own) for kind, own, _ in keys]}
    build = partial(_measure, base, tuple(tasks), tuned, tuple(rates), recipe, device)
    seen = json.loads((artefact("text_rates", inputs, build).path / "rates.json").read_text())
    return smallest_of_the_best(seen), seen


def smallest_of_the_best(seen: Sequence[Mapping[str, Any]]) -> float:
    """Return the smallest rate whose mean accuracy is within one standard error of the best mean; see the rule above.

    Args:
        seen: dicts with learning_rate, accuracy (%), texts and norm (%), one for each rate and task.

    Raises:
        ValueError: at every rate some update is too large.
    """
    table = pd.DataFrame(seen)
    table = table[table.groupby("learning_rate").norm.transform("max") < LARGEST]
    if table.empty:
        smallest = min(one["learning_rate"] for one in seen)
        raise ValueError(
            f"at {smallest:g}, the smallest of the learning rates, an expert's update already has {LARGEST:g} % of the "
            f"base's norm; take smaller rates"
        )
    share = table.accuracy / 100
    table = table.assign(variance=100**2 * share * (1 - share) / table.texts)
    by_rate = table.groupby("learning_rate")
    means, errors = by_rate.accuracy.mean(), by_rate.variance.sum().pow(0.5) / by_rate.size()
    best = means.idxmax()
    return float(min(means[means >= means[best] - errors[best]].index))


def _pairs(rates: Sequence[float], tasks: Sequence[TextTask]) -> list[tuple[float, TextTask]]:
    return [(rate, task) for rate in rates for task in tasks]


def _measure(
    base: Base,
    tasks: Sequence[TextTask],
    tuned: Tuned,
    rates: Sequence[float],
    recipe: TextRecipe,
    device: torch.device,
    folder: Path,
) -> None:
    pretrained, seen = language.parameters(base.model.to(device)), []
    for rate, task in _pairs(rates, tasks):
        found = text_experts.fine_tune(base, task, FineTuning(tuned, rate), SEED, recipe, device)
        state = expert_state(base, found, tuned, device)
        (norm,) = update_norms(pretrained, [task_vector(state, pretrained)])
        accuracy, texts = validation_accuracy(base, task, found, state)
        row = dict(learning_rate=rate, task=task.name, accuracy=accuracy, texts=texts, norm=norm)
        seen.append(row)
    if not all(math.isfinite(row["norm"]) for row in seen):
        raise ValueError(f"an expert of {base.name} is not finite; take lower learning rates than {max(rates)}")
    (folder / "rates.json").write_text(json.dumps(seen))


def expert_state(base: Base, found: Artefact, tuned: Tuned, device: torch.device) -> dict[str, Tensor]:
    """Return the state of an expert of `text_experts.fine_tune`, its adapter folded into the base."""
    if tuned != "full":
        state = adapted.folded(base.model, found.path / "adapter")
    else:
        state = load_file(found.path / "model.safetensors")
    return {name: tensor.to(device) for name, tensor in state.items()}


def validation_accuracy(base: Base, task: TextTask, found: Artefact, state: Mapping[str, Tensor]) -> tuple[float, int]:
    """Return the accuracy (%) of an expert on all validation texts of its task, and their number."""
    head = load_file(found.path / "head.safetensors") if base.pooling else None
    device = next(iter(state.values())).device
    network = text_experts.network(base, task, head).to(device)
    batches = text_experts.evaluation_batches(base, task, task.split("validation"))
    predicted, labels = evaluation.predictions(network, [state], batches)
    return evaluation.score(predicted[0], labels), len(labels)


def table(data: pd.DataFrame) -> pd.DataFrame:
    """Return, for each backbone and rate, the experts' validation accuracy and update norm, and which rate was chosen.

    Args:
        data: a table with the rows of `rows`.
    """
    own = data[data.metric.isin([ACCURACY, NORM])]
    if own.empty:
        return pd.DataFrame()
    means = own.pivot_table(index=["backbone", "learning_rate"], columns="metric", values="value", sort=False)
    chosen = own.groupby(["backbone", "learning_rate"], sort=False).chosen.first()
    table = means.round(1).assign(chosen=chosen.map({True: "yes", False: ""})).reset_index()
    order = {backbone: place for place, backbone in enumerate(dict.fromkeys(own.backbone))}
    return table.sort_values(["backbone", "learning_rate"], key=lambda column: column.replace(order), ignore_index=True)


ACCURACY, NORM = "validation accuracy of experts, %", "norm of experts' updates, % of the base's"


def rows(rate: float, seen: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what `choose` saw as rows of a table: two metrics for each rate and task."""
    return [
        dict(method="expert", task=one["task"], metric=metric, learning_rate=one["learning_rate"], value=one[name],
             images=one["texts"], chosen=one["learning_rate"] == rate)
        for one in seen
        for metric, name in {ACCURACY: "accuracy", NORM: "norm"}.items()
    ]  # fmt: skip
