"""The one training loop, on accelerate: the same on a CPU, one GPU or many."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, linear warm-up over a share of the steps, cosine to 0. `batch_size` is global."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0


class RandomBatches(Sampler[list[int]]):
    """Index batches drawn with a seed: `steps` times `batch_size` samples of as many different classes as there are.

    With at least `batch_size` classes every batch holds different ones (a contrastive loss needs that); with fewer,
    each class comes equally often, up to one.
    """

    drop_last = False

    def __init__(self, labels: Tensor, recipe: Recipe, seed: int):
        self.labels, self.batch_size, self.steps, self.seed = labels, recipe.batch_size, recipe.steps, seed
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        rounds = math.ceil(self.batch_size / len(self.members))
        for _ in range(self.steps):
            orders = [torch.randperm(len(self.members), generator=generator) for _ in range(rounds)]
            draws = torch.rand(self.batch_size, generator=generator).tolist()
            chosen = [self.members[index] for index in torch.cat(orders)[: self.batch_size].tolist()]
            yield [int(members[int(draw * len(members))]) for members, draw in zip(chosen, draws, strict=True)]


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    loader: DataLoader,
    recipe: Recipe,
    device: torch.device,
    description: str | None = None,
) -> nn.Module:
    """Train `model` in place, one step for each batch of `loader`, and return it on the CPU in evaluation mode.

    Args:
        model: its parameters with `requires_grad` are trained; matrices decay, vectors and embeddings do not.
        loss: maps (model, batch) to a scalar; it must call `model(...)`, so that several devices stay in step.
        loader: yields global batches; under `accelerate launch` each device gets its share of every batch.
        recipe: optimiser and schedule.
        device: the CPU, or the kind of accelerator to use.
        description: title of the progress bar; None shows none.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    splitting = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=device.type == "cpu", dataloader_config=splitting)
    groups = decay_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, recipe.betas, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup * recipe.steps), recipe.steps)
    prepared, optimizer, loader, schedule = accelerator.prepare(model.train(), optimizer, loader, schedule)
    hidden = description is None or not accelerator.is_main_process
    for step, batch in enumerate(tqdm(loader, description, recipe.steps, disable=hidden, leave=False)):
        value = loss(prepared, batch)
        if step % 20 == 0 and not value.isfinite():
            raise FloatingPointError(f"the loss is {value.item()} at step {step}; lower learning_rate ({recipe})")
        accelerator.backward(value)
        accelerator.clip_grad_norm_(prepared.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(prepared).cpu().eval()


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into optimiser groups: matrices and kernels decay, vectors and embeddings do not."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = {name for name, parameter in named if parameter.ndim > 1 and "embedding" not in name}
    return [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]
