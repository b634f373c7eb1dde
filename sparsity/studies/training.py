"""Training one run: build the network, plug in, train it under the probe, keep snapshots of its weights and its curve.

Everything is cached: a killed run goes on where it was, a finished one is only read.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import training
from common.cache import Artefact, artefact
from sparsity.activations import make
from sparsity.blocks import find_blocks, find_norms
from sparsity.finetuning import fold_norms
from sparsity.plugins import parameter_groups, sparsify
from sparsity.probes import probe
from sparsity.studies.distillation import Distillation, distillation_task
from sparsity.studies.images import ImageTask, image_task
from sparsity.studies.lora import adapt
from sparsity.studies.norms_and_noise import change_norms, weight_noise
from sparsity.studies.runs import Run, Variant
from sparsity.studies.span_corruption import SpanCorruption, span_corruption_task
from sparsity.studies.task import Batch, Task

Rows = list[dict[str, Any]]


def make_task(settings: ImageTask | SpanCorruption | Distillation, device: torch.device) -> Task:
    """Return the task that the settings describe; its evaluation batches come on `device`."""
    if isinstance(settings, ImageTask):
        return image_task(settings, device)
    return (distillation_task if isinstance(settings, Distillation) else span_corruption_task)(settings, device)


def build(task: Task, run: Run, start: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return the network of a run as it is before its first step, on the CPU.

    Args:
        task: whose network it is.
        run: its variant says what is plugged in; its seed decides the initial weights, which are the same in all
            variants, and those of adapters.
        start: the weights that fine-tuning starts from; None leaves those of `task.model()`.
    """
    torch.manual_seed(run.seed)
    model = task.model()
    if start is not None:
        model.load_state_dict(start)
    if run.variant.folded:
        example = next(iter(task.batches("validation")))
        fold_norms(model, lambda model: task.score(model, _on_cpu(example))[0])
    tuning, steps = run.tuning, run.recipe.steps
    if tuning is None:
        uplift = 1 if run.variant.norms == "bounded, with bias" else 0  # so that the biases stay
        return change_norms(_plug_in(model, run.variant, uplift=uplift), run.variant.norms)
    return adapt(_plug_in(model, run.variant, tuning.mixing * steps, tuning.uplift * steps), tuning.rank, tuning.alpha)


def _on_cpu(batch: Batch) -> Batch:
    return {name: tensor.cpu() for name, tensor in batch.items()}


def _plug_in(model: nn.Module, variant: Variant, mixing: float = 0, uplift: float = 0) -> nn.Module:
    """Plug in what the network has not: one that is ReLU already, and gets no other plug-in, stays as it is."""
    activation = variant.activation
    if activation == "relu" and all(isinstance(block.activation, nn.ReLU) for block in find_blocks(model)):
        activation = None
    if activation is None and not variant.zeroth_bias and not variant.restricted_norm:
        return model
    if activation is not None and not (mixing or variant.zeroth_bias or variant.restricted_norm):
        for block in find_blocks(model):
            block.replace_activation(make(activation))
        return model
    return sparsify(
        model,
        activation=activation,
        zeroth_bias=variant.zeroth_bias,
        placement=variant.placement,
        restricted_norm=variant.restricted_norm,
        clip=variant.clip,
        mixing_steps=round(mixing) if activation is not None else 0,
        uplift_steps=round(uplift) if variant.restricted_norm else 0,
    )


def train(run: Run, device: torch.device, description: str | None = None) -> Artefact:
    """Return the trained network: an artefact with step-N.safetensors for each snapshot and curve.json.

    Args:
        run: what is trained, and how.
        device: the CPU, or the kind of accelerator to use.
        description: title of the progress bar; None shows none.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    task = make_task(run.task, device)
    inputs = {
        name: getattr(run, name) for name in ("recipe", "variant", "seed", "exempt", "log_every", "snapshots", "tuning")
    }
    inputs |= {"task": task.key, "device": device.type}
    # checkpoints of networks with tied weights hold them once, which accelerate says on every save
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    start = None
    if run.tuning and run.tuning.start:
        first = train(run.tuning.start, device, description)
        inputs |= {"start": first.key}
        start = first.path / f"step-{run.tuning.start.recipe.steps}.safetensors"
    return artefact("sparsity_run", inputs, partial(_train, run, task, start, device, description), resumable=True)


def _train(
    run: Run, task: Task, start: Path | None, device: torch.device, description: str | None, folder: Path
) -> None:
    model = build(task, run, load_file(start) if start else None)
    recorder = Recorder(model, run, folder)

    def loss(prepared: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        recorder.see(task.masks(batch) if task.masks else None)
        with weight_noise(model, run.variant.noise):
            if not run.variant.l1:
                return task.loss(prepared, batch)
            with _absolute_activations(model) as means:
                value = task.loss(prepared, batch)
            return value + run.variant.l1 * torch.stack(means).mean()

    groups = partial(parameter_groups, weight_decay=run.recipe.weight_decay, exempt=run.exempt + run.variant.exempt)
    training.fit(
        model,
        loss,
        task.loader(run.recipe, run.seed),
        run.recipe,
        device,
        description,
        groups,
        recorder,
        checkpoint=folder.with_suffix(".unfinished-0") / "checkpoint",  # the main process's folder, for all processes
    )
    (folder / "curve.json").write_text(json.dumps(recorder.rows))


class Recorder:
    """The training curve and the snapshots of a run; `common.training.fit` calls it after every step.

    The first step, and every step whose number is a multiple of `log_every`, runs under the probe. For each of them
    `rows` gets one dict per MLP block, with the probe's statistics and the mean |weight| of its norm ("norm_weight"),
    and one for the whole network (layer "all"): training loss, learning rate, E = Σ learning rate × weight decay over
    the steps so far ("decay"), and the mean |weight| of the norms that feed no MLP ("other_norm_weight").
    """

    def __init__(self, model: nn.Module, run: Run, folder: Path):
        self.model, self.run, self.folder = model, run, folder
        self.blocks = find_blocks(model)
        fed = {id(block.norm) for block in self.blocks}
        self.others = [norm for norm in find_norms(model) if id(norm) not in fed]
        self.rows: Rows = []
        self.decay, self.step, self.scale = 0.0, 0, 1.0
        self.open: Any = None
        self.probe: Any = None
        self._snapshot()
        self._open_probe(first=True)

    def see(self, masks: Mapping[str, Tensor] | None) -> None:
        """Tell the probe, if the coming step has one, which positions of the batch hold real tokens."""
        if self.probe is not None:
            self.probe.mask = masks

    def __call__(self, step: int, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.step = step
        decayed = next(group for group in optimizer.param_groups if group["name"] == "decayed")
        self.decay += decayed["lr"] * decayed["weight_decay"]
        if self.probe is not None:
            self._log(loss.item(), decayed["lr"])
            self._close_probe()
        self._snapshot()
        scaler = getattr(optimizer, "scaler", None)  # accelerate's optimizer has one in fp16 training
        self.scale = scaler.get_scale() if scaler is not None else 1.0
        self._open_probe()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of the run has to keep."""
        return {"rows": self.rows, "decay": self.decay, "step": self.step, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._close_probe()
        self.rows, self.decay, self.step, self.scale = (state[name] for name in ("rows", "decay", "step", "scale"))
        self._open_probe()

    def _log(self, loss: float, rate: float) -> None:
        summary = self.probe.summary()
        for block, (layer, statistics) in zip(self.blocks, summary.iterrows(), strict=True):
            weight = block.norm.weight.detach().abs().mean().item() if block.norm is not None else float("nan")
            self.rows.append({"step": self.step, "layer": layer, **statistics.to_dict(), "norm_weight": weight})
        others = [norm.weight.detach().abs().mean().item() for norm in self.others]
        row = {"loss": loss, "learning_rate": rate, "decay": self.decay, "other_norm_weight": float(np.mean(others))}
        self.rows.append({"step": self.step, "layer": "all", **row})

    def _open_probe(self, first: bool = False) -> None:
        if first or (self.step + 1) % self.run.log_every == 0:
            self.open = probe(self.model, grad_scale=self.scale)
            self.probe = self.open.__enter__()

    def _close_probe(self) -> None:
        if self.probe is not None:
            self.open.__exit__(None, None, None)
            self.open = self.probe = None

    def _snapshot(self) -> None:
        if self.step in self.run.snapshot_steps:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(_without_ties(state), self.folder / f"step-{self.step}.safetensors")


def _without_ties(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, copied where one shares its memory with an earlier one: safetensors refuses shared memory."""
    seen: set[int] = set()
    free = {}
    for name, tensor in state.items():
        free[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return free


@contextmanager
def _absolute_activations(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the mean absolute activation of every MLP during the forward passes within the block."""
    means: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Tensor) -> None:
        means.append(output.abs().mean())

    handles = [block.activation.register_forward_hook(collect) for block in find_blocks(model)]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()
