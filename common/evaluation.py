"""Scoring models: which images a zero-shot head gets right."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from torch.func import functional_call


@torch.inference_mode()
def correct(
    encoder: nn.Module, states: Sequence[Mapping[str, Tensor]], batches: Iterable[tuple[Tensor, Tensor]], head: Tensor
) -> Tensor:
    """Return which images each of S models classifies rightly: (S, n) bool. The data are read once for all models.

    Args:
        encoder: maps images (B, 3, h, w) to features (B, embed); its own parameters are left unchanged.
        states: S state dicts to run it with, on the encoder's device.
        batches: yields images and labels (B,); a loader prepared by accelerate shares them among processes.
        head: class embeddings (C, embed); the highest inner product with the unit feature wins.
    """
    encoder.eval()
    device = head.device
    answers = []
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        features = torch.stack([functional_call(encoder, dict(state), (images,)) for state in states])  # (S, B, embed)
        right = (F.normalize(features, dim=-1) @ head.T).argmax(-1) == labels  # (S, B)
        answers.append(_gather(right.T.contiguous(), batches))
    return torch.cat(answers).T.cpu()


def _gather(right: Tensor, batches: Iterable) -> Tensor:
    """Collect (B, S) answers of all processes where the loader shares its batches among them."""
    if not isinstance(batches, DataLoaderShard):
        return right
    return Accelerator(cpu=right.device.type == "cpu").gather_for_metrics(right)
