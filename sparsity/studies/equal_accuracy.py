"""How sparse networks are at equal accuracy: small activations of each are pruned, without training, as far as it goes.

Rows are kept × split of PRUNED × metric (density, loss, score), where `kept` is the share of an MLP's non-zero
activations that lie above its threshold; 1 is the network as it was trained. Thresholds are calibrated, and how far
they may rise is judged, on validation data.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch

from common.cache import Artefact, cached_rows
from sparsity.probes import Probe, probe
from sparsity.studies.measurement import Rows, load
from sparsity.studies.runs import RUN, Run
from sparsity.studies.training import make_task
from sparsity.thresholds import active_sizes, thresholded, thresholds

KEPT = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
PRUNED = ("pruned, validation", "pruned, test")
Margin = float | Callable[[str], float]
VIT_MARGIN = 1.0  # points of accuracy that count as none
T5_MARGIN = 0.02  # and nats per token


def measure_pruned(run: Run, trained: Artefact, device: torch.device, kept: Sequence[float] = KEPT) -> Rows:
    """Return density, loss and score on both splits of PRUNED at each threshold, from the cache where they are known.

    Args:
        run, trained: the description of a run and what `train` returned for it.
        device: where the network runs.
        kept: see above; 1 and less, in falling order.
    """
    inputs = {"run": trained.key, "device": device.type, "kept": kept}
    return cached_rows("sparsity_thresholds", inputs, partial(_measure, run, trained, device, kept))


@torch.no_grad()
def _measure(run: Run, trained: Artefact, device: torch.device, every: Sequence[float]) -> Iterator[dict[str, Any]]:
    task, model = make_task(run.task, device), load(run, trained, device)

    def score(split: str, seen: Probe | None = None) -> tuple[float, float]:
        pairs = []
        for batch in task.batches(split):
            if seen is not None and task.masks:
                seen.mask = task.masks(batch)
            pairs.append(torch.stack(task.score(model, batch), -1).double())
        return torch.cat(pairs).mean(0).tolist()

    sizes = active_sizes(model, partial(score, "validation"))
    for kept in every:
        levels = thresholds(sizes, kept)
        for name in PRUNED:
            with thresholded(model, levels), probe(model) as seen:
                loss, accuracy = score(name.removeprefix("pruned, "), seen)
            density = seen.summary(gradients=False).density.mean()
            for metric, value in {"density": density, "loss": loss, "score": accuracy}.items():
                yield {"split": name, "kept": kept, "metric": metric, "value": value}


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
    thresholds. Its own are raised step by step, and the last step before the first that loses more is taken.

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
