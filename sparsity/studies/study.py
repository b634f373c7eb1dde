"""One run of the study: build the network, plug in, train it under the probe with snapshots, measure it on test data.

What a run differs in is a `Variant`: the vanilla network, the paper's, each plug-in alone, the controls of weight
decay, and the rivals. Everything is cached: a killed run goes on where it was, a finished one is only read.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import training
from common.cache import Artefact, artefact, cached_rows
from common.training import Recipe
from sparsity.blocks import find_blocks, find_norms, without_mlps
from sparsity.plugins import parameter_groups, sparsify
from sparsity.probes import probe
from sparsity.studies.images import ImageTask, image_task
from sparsity.studies.span_corruption import SpanCorruption, span_corruption_task
from sparsity.studies.task import Task

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """What is plugged into a network and how it is trained differently.

    Args:
        activation: of the MLPs, a name in sparsity.activations.ACTIVATIONS.
        zeroth_bias, placement, restricted_norm, clip: as in `sparsify`.
        exempt: what weight decay leaves alone beside the protocol's own exemptions, as in `parameter_groups`.
        l1: weight of the mean absolute activation, averaged over MLPs, in the training loss.
    """

    activation: str = "relu"
    zeroth_bias: bool = False
    placement: str = "input"
    restricted_norm: bool = False
    clip: float | None = 0.1
    exempt: tuple[str, ...] = ()
    l1: float = 0.0


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
CONTROLS = tuple(VARIANTS)[:5]  # what every density table needs, with several seeds


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
    """

    task: ImageTask | SpanCorruption
    recipe: Recipe
    variant: Variant = VARIANTS["vanilla"]
    seed: int = 0
    exempt: tuple[str, ...] = ()
    log_every: int = 100
    snapshots: int = 8

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """The steps after which weights are kept."""
        shares = np.linspace(0, 1, self.snapshots) ** 2
        return tuple(sorted({round(self.recipe.steps * share) for share in shares}))


def plan(
    cells: Sequence[tuple[str, ImageTask | SpanCorruption, Recipe]],
    seeds: Sequence[int],
    single_seeds: Sequence[int],
    l1: Sequence[float],
    **options: Any,
) -> Iterator[tuple[dict[str, Any], Run]]:
    """Yield the labels (setting, variant, seed) and the description of every run of an experiment.

    Args:
        cells: name, task and recipe of each setting; the first is run in all variants, the others in CONTROLS[:3].
        seeds: of vanilla, modified and the controls.
        single_seeds: of each plug-in alone and of the rivals.
        l1: weights of the penalty, a rival each.
        options: of `Run`.
    """
    rivals = {f"ReLU + L1, {weight:g}": Variant(l1=weight) for weight in l1}
    for index, (setting, task, recipe) in enumerate(cells):
        for name, variant in {**VARIANTS, **rivals}.items():
            if index == 0 or name in CONTROLS[:3]:
                for seed in seeds if name in CONTROLS else single_seeds:
                    labels = {"setting": setting, "variant": name, "seed": seed}
                    yield labels, Run(task, recipe, variant, seed, **options)


def make_task(settings: ImageTask | SpanCorruption, device: torch.device) -> Task:
    """Return the task that the settings describe."""
    return image_task(settings, device) if isinstance(settings, ImageTask) else span_corruption_task(settings, device)


def build(task: Task, variant: Variant, seed: int = 0) -> nn.Module:
    """Return the untrained network of a variant; the same seed gives all variants the same initial weights."""
    torch.manual_seed(seed)
    return sparsify(
        task.model(),
        activation=variant.activation,
        zeroth_bias=variant.zeroth_bias,
        placement=variant.placement,
        restricted_norm=variant.restricted_norm,
        clip=variant.clip,
    )


# Training ------------------------------------------------------------------------------------------------------------


def train(run: Run, device: torch.device, description: str | None = None) -> Artefact:
    """Return the trained network: an artefact with step-N.safetensors for each snapshot and curve.json."""
    task = make_task(run.task, device)
    inputs = {name: getattr(run, name) for name in ("recipe", "variant", "seed", "exempt", "log_every", "snapshots")}

    inputs |= {"task": task.key, "device": device.type}
    # checkpoints of networks with tied weights hold them once, which accelerate says on every save
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    return artefact("sparsity_run", inputs, partial(_train, run, task, device, description), resumable=True)


def _train(run: Run, task: Task, device: torch.device, description: str | None, folder: Path) -> None:
    model = build(task, run.variant, run.seed)
    recorder = Recorder(model, run, folder)

    def loss(prepared: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        recorder.see(task.masks(batch) if task.masks else None)
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
    """The training curve and the snapshots of a run; called after every step of `common.training.fit`.

    Every `log_every` steps that one step runs under the probe. `rows` gets one dict for each MLP block, with the
    probe's statistics and the mean |weight| of its norm, and one for the whole network (layer "all") with training
    loss, learning rate, E = Σ lr · weight decay so far, and the mean |weight| of the norms that feed no MLP.
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
        """Tell the probe, where there is one, which positions of the coming batch are real."""
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
        scaler = getattr(optimizer, "scaler", None)  # of mixed precision
        self.scale = scaler.get_scale() if scaler is not None else 1.0
        self._open_probe()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "decay": self.decay, "step": self.step, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
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
    """Return copies of the tensors that share memory with an earlier one, as safetensors asks."""
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


# Reading and measuring -----------------------------------------------------------------------------------------------


def curve(trained: Artefact) -> Rows:
    """Return the training curve of a run: see `Recorder`."""
    return json.loads((trained.path / "curve.json").read_text())


def load(run: Run, trained: Artefact, device: torch.device, step: int | None = None) -> nn.Module:
    """Return the network of a snapshot (by default the last) in evaluation mode."""
    step = run.recipe.steps if step is None else step
    model = build(make_task(run.task, device), run.variant)
    model.load_state_dict(load_file(trained.path / f"step-{step}.safetensors"))
    return model.to(device).eval()


def measure(run: Run, trained: Artefact, device: torch.device, split: str = "test", step: int | None = None) -> Rows:
    """Return what a snapshot does on held-out data: rows (layer, metric, value), from the cache where known.

    Layer "all" has the loss, the task's metric, and both with the MLPs switched off; each MLP block has the probe's
    statistics over the whole split, gradients among them (per sample, of the evaluation loss).
    """
    step = run.recipe.steps if step is None else step
    inputs = {"run": trained.key, "split": split, "step": step, "device": device.type}
    return cached_rows("sparsity_measured", inputs, partial(_measure, run, trained, device, split, step))


def _measure(run: Run, trained: Artefact, device: torch.device, split: str, step: int) -> Iterator[dict[str, Any]]:
    task, model = make_task(run.task, device), load(run, trained, device, step)
    whole, alone = [], []
    with probe(model, reduction="sum") as seen:
        for batch in task.batches(split):
            seen.mask = task.masks(batch) if task.masks else None
            losses, scores = task.score(model, batch)
            losses.sum().backward()
            model.zero_grad()
            whole.append(torch.stack([losses.detach(), scores.detach()], -1).double())
    with without_mlps(model), torch.no_grad():
        alone = [torch.stack(task.score(model, batch), -1).double() for batch in task.batches(split)]
    for suffix, pairs in {"": whole, " without MLPs": alone}.items():
        loss, score = torch.cat(pairs).mean(0).tolist()
        yield {"layer": "all", "metric": f"loss{suffix}", "value": loss}
        yield {"layer": "all", "metric": f"score{suffix}", "value": score}
    for layer, statistics in seen.summary().iterrows():
        yield from ({"layer": layer, "metric": name, "value": value} for name, value in statistics.items())


def measure_with_curve(run: Run, trained: Artefact, device: torch.device) -> tuple[Rows, Rows]:
    """Return what the trained network does on test data, and its training curve."""
    return measure(run, trained, device), curve(trained)


def measure_all(
    runs: Sequence[Run], context: Any, measure_one: Callable[[Run, Artefact, torch.device], Rows] = measure
) -> list[Rows]:
    """Train and measure, in parallel processes, every run; what is cached is only read."""
    return context.map(partial(_measure_one, context.device, measure_one), runs, "train and measure")


def _measure_one(device: torch.device, measure_one: Callable[..., Rows], run: Run) -> Rows:
    return measure_one(run, train(run, device), device)
