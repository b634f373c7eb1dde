"""The curvature of one model's loss as rows of a table, and the few images on which it is measured."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from common import hessian
from common.hessian import Risk
from common.sharpness import adaptive_sharpness, noise_sharpness


def curvature_rows(risk: Risk, kinds: Mapping[str, str], probes: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield traces by matrix, then the largest eigenvalue of the Hessian, sharpness under relative steps, and the loss.

    Args:
        risk: the loss as a function of some matrices of a model; see `common.hessian`.
        kinds: name of the metric → kind of matrix, as `hessian.per_block` takes it.
        probes: random vectors per Hessian trace, draws of labels for a sampled Fisher, draws of noise.
        seed: of the probes.

    Yields:
        matrix, metric, value; for a trace also its standard error (`error`) and the mean square of the weights.
        What is of the whole has the matrix "all".
    """
    for metric, kind in kinds.items():
        table = hessian.per_block(risk, kind, probes, seed, at_once=16)
        for name, found in table.iterrows():
            weights = risk.parameters[name].detach().square().mean().item()
            yield dict(matrix=name, metric=metric, value=found.trace, error=found.standard_error, mean_square=weights)
    top = hessian.top_eigenvalues(risk, seed=seed, tolerance=0.02).item()
    yield dict(matrix="all", metric="largest eigenvalue", value=top)
    noisy = noise_sharpness(risk, draws=max(probes, 2), seed=seed)
    yield dict(matrix="all", metric="noise sharpness", value=noisy.mean, error=noisy.standard_error)
    yield dict(matrix="all", metric="adaptive sharpness", value=adaptive_sharpness(risk))
    yield dict(matrix="all", metric="loss", value=hessian.mean_loss(risk))


def evenly_spaced(
    batches: Iterable[tuple[Tensor, Tensor]], count: int, among: int = 512
) -> list[tuple[Tensor, Tensor]]:
    """Return one batch of `count` samples, evenly spaced over the first ones, since data sets may be sorted by class.

    Args:
        batches: inputs (B, …) and labels (B,).
        count: how many samples to take; all, if there are fewer.
        among: batches are read until there are at least this many samples to choose from.
    """
    inputs, labels, seen = [], [], 0
    for some, own in batches:
        inputs.append(some)
        labels.append(own)
        seen += len(own)
        if seen >= among:
            break
    picked = torch.linspace(0, seen - 1, min(count, seen), device=labels[0].device).round().long()
    return [(torch.cat(inputs)[picked], torch.cat(labels)[picked])]
