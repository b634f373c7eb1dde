"""Scoring models: what several of them predict, in one pass over the data, and how good that is."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call


@torch.inference_mode()
def predictions(
    network: nn.Module, states: Sequence[Mapping[str, Tensor]], batches: Iterable[tuple[Any, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return what each of S models predicts, (S, n), and the labels, (n,). The data are read once for all models.

    Args:
        network: maps inputs to predicted labels (B,); its own parameters are left unchanged.
        states: S state dicts of `network.encoder` to run it with, on the device on which it runs.
        batches: yields inputs and labels (B,); a loader prepared by accelerate shares them among processes.
    """
    network.eval()
    states = [{f"encoder.{name}": tensor for name, tensor in state.items()} for state in states]
    device = next(iter(states[0].values())).device
    found, right = [], []
    for inputs, labels in batches:
        inputs = send_to_device(inputs, device)
        predicted = torch.stack([functional_call(network, state, (inputs,)) for state in states], 1)  # (B, S)
        found.append(_gather(predicted, batches))
        right.append(_gather(labels.to(device), batches))
    return torch.cat(found).T.cpu(), torch.cat(right).cpu()


def _gather(answers: Tensor, batches: Iterable) -> Tensor:
    """Collect the answers (B, …) of all processes where the loader shares its batches among them."""
    if not isinstance(batches, DataLoaderShard):
        return answers
    return Accelerator(cpu=answers.device.type == "cpu").gather_for_metrics(answers)


def metric(labels: Tensor) -> str:
    """Return the name of `score`: "Spearman" where the labels are floating-point (a regression), else "accuracy"."""
    return "Spearman" if labels.is_floating_point() else "accuracy"


def score(predicted: Tensor, labels: Tensor) -> float:
    """Return the accuracy in %, or 100 times Spearman's ρ where the labels (n,) are numbers; 0 where ρ is undefined."""
    if not labels.is_floating_point():
        return 100 * (predicted == labels).float().mean().item()
    if len(predicted.unique()) < 2:
        return 0.0
    from scipy.stats import spearmanr  # late: --help needs no seconds of it

    return 100 * float(spearmanr(predicted.numpy(), labels.numpy()).statistic)


def errors(predicted: Tensor, labels: Tensor) -> Tensor:
    """Return how far each prediction (…, n) is off: 0 or 1 for classes, the absolute difference for numbers."""
    return (predicted - labels).abs() if labels.is_floating_point() else (predicted != labels).float()
