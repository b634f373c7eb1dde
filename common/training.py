"""The one training loop, on accelerate: the same on a CPU, one GPU or many. A killed run can be continued."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

CHECKPOINT_STEPS = 500  # between two checkpoints of a run that keeps any


@dataclass(frozen=True)
class TrainingRecipe:
    """How a model is trained: AdamW under a schedule of the learning rate. `batch_size` is global.

    `warmup` is a share of the steps, W of them. The rate rises linearly to `learning_rate` and then falls as a half
    cosine to 0 ("cosine"), as √(W/t) ("inverse_sqrt"), or not at all ("constant"). With `stairs` > 0 it changes only
    that many times during the run (once per epoch, in many recipes). `clip` bounds the norm of the gradient.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    schedule: Literal["cosine", "inverse_sqrt", "constant"] = "cosine"
    stairs: int = 0
    precision: Literal["no", "fp16", "bf16"] = "no"

    def rate(self, step: int) -> float:
        """Return the learning rate of a step as a share of `learning_rate`."""
        rise = round(self.warmup * self.steps)
        if self.stairs:
            length = math.ceil(self.steps / self.stairs)
            step = step // length * length
        if step < rise:
            # the inverse square root is continuous with its rise: min((t + 1) / W, 1)
            return (step + 1) / rise if self.schedule == "inverse_sqrt" else step / rise
        if self.schedule == "inverse_sqrt":
            return math.sqrt(max(rise, 1) / (step + 1))
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))


class RandomBatches(Sampler[list[int]]):
    """Batches of random indices in which every class comes equally often, as far as that is possible.

    With at least `batch_size` classes no class comes twice in a batch (a contrastive loss needs that); with fewer, the
    numbers of their samples in a batch differ by at most one. The seed decides all `recipe.steps` batches.
    """

    drop_last = False  # read by accelerate when it shares batches among processes; no batch is incomplete here

    def __init__(self, labels: Tensor, recipe: TrainingRecipe, seed: int):
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


class ShuffledBatches(Sampler[list[int]]):
    """Batches of indices: every epoch all `length` samples in a new seeded order, without its incomplete last batch.

    Raises:
        ValueError: there are fewer samples than a batch holds.
    """

    drop_last = True  # read by accelerate when it shares batches among processes

    def __init__(self, length: int, recipe: TrainingRecipe, seed: int):
        if length < recipe.batch_size:
            raise ValueError(f"a batch holds {recipe.batch_size} samples, but there are only {length}")
        self.length, self.batch_size, self.steps, self.seed = length, recipe.batch_size, recipe.steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        generator, batches = torch.Generator().manual_seed(self.seed), self.length // self.batch_size
        for step in range(self.steps):
            if step % batches == 0:
                order = torch.randperm(self.length, generator=generator)
            start = step % batches * self.batch_size
            yield order[start : start + self.batch_size].tolist()


def fit(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    loader: DataLoader,
    recipe: TrainingRecipe,
    device: torch.device,
    description: str | None = None,
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
    after_step: Callable[[int, Tensor, torch.optim.Optimizer], None] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Train `model` in place, one step for each batch of `loader`, and return it on the CPU in evaluation mode.

    Args:
        model: its parameters with `requires_grad` are trained.
        loss: maps (model, batch) to a scalar; it must call `model(...)`, so that several devices stay in step.
        loader: yields `recipe.steps` global batches; under `accelerate launch` each device gets its share of each.
        recipe: optimiser and schedule.
        device: the CPU, or the kind of accelerator to use.
        description: title of the progress bar; None shows none.
        groups: maps the model to AdamW's parameter groups; by default matrices decay, vectors and embeddings do not.
        after_step: called with (steps done, loss of the step, optimizer) after each step, before gradients are zeroed.
            Where it has state_dict and load_state_dict, its state is part of a checkpoint.
        checkpoint: a folder in which the run's state is kept from time to time; where it holds one, the run goes on
            from there, with the same result as if it had never stopped. It is removed at the end.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    splitting = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        dataloader_config=splitting,
        mixed_precision=recipe.precision,
        step_scheduler_with_optimizer=False,
    )
    groups = groups or partial(decay_groups, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups(model), recipe.learning_rate, recipe.betas, fused=True)
    schedule = LambdaLR(optimizer, recipe.rate)
    prepared, optimizer, loader, schedule = accelerator.prepare(model.train(), optimizer, loader, schedule)
    if hasattr(after_step, "load_state_dict"):
        accelerator.register_for_checkpointing(after_step)
    kept = _states(checkpoint) if checkpoint else {}
    done = max(kept, default=0)
    batches = accelerator.skip_first_batches(loader, done) if done else loader
    hidden = description is None or not accelerator.is_main_process
    for batch in tqdm(batches, description, recipe.steps, initial=done, disable=hidden, leave=False):
        if kept:  # only now: starting the loader draws from the random generators whose state is restored here
            accelerator.load_state(str(kept[done]))
            kept = {}
        value = loss(prepared, batch)
        if done % 20 == 0 and not value.isfinite():
            raise FloatingPointError(f"the loss is {value.item()} at step {done}; lower learning_rate ({recipe})")
        accelerator.backward(value)
        accelerator.clip_grad_norm_(prepared.parameters(), recipe.clip)
        optimizer.step()
        done += 1
        if after_step:
            after_step(done, value.detach(), optimizer)
        schedule.step()
        optimizer.zero_grad()
        if checkpoint and done % CHECKPOINT_STEPS == 0 and done < recipe.steps:
            _save(accelerator, checkpoint, done)
    if checkpoint and accelerator.is_main_process:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return accelerator.unwrap_model(prepared).cpu().eval()


def _save(accelerator: Accelerator, folder: Path, done: int) -> None:
    """Keep the state after `done` steps; the state kept before it is removed once the new one is complete."""
    accelerator.save_state(str(folder / f"unfinished-{done}"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        old = _states(folder)
        os.replace(folder / f"unfinished-{done}", folder / f"step-{done}")
        for state in old.values():
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


def _states(folder: Path) -> dict[int, Path]:
    """Return the complete states in a folder by the number of steps done."""
    return {int(state.name.removeprefix("step-")): state for state in folder.glob("step-*")}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into optimiser groups: matrices and kernels decay, vectors and embeddings do not."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = {name for name, parameter in named if parameter.ndim > 1 and "embedding" not in name}
    return [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]
