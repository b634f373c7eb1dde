"""What a merge is written as: a whole model, or an adapter of peft of one rank.

Linear layers become LoRA modules: the merged update of each, of full or low rank, is cut to the adapter's rank by SVD.
What full experts change elsewhere (embeddings, norms, biases) has no place in the adapter; it is lost, and reported.
Adapters become an adapter of their kind, LoRA of the chosen rank or IA³, which also holds whole what they hold whole.

The model's own class, built from config.json without memory for weights, says which weights belong to linear layers;
without config.json they are all matrices NAME.weight whose name does not contain "embed".
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from merging.adapters import MODULES, joint_config
from merging.command.adapter_plan import named_as_base
from merging.command.changes import IA3, Step
from merging.command.findings import moves
from merging.command.naming import as_text, class_of, naming
from merging.command.plan import Plan
from merging.command.recipe import shard_bytes
from merging.command.shards import Shard, TensorSpec, Write, arrange
from merging.command.stream import Streamer, rounded
from merging.lowrank import LowRank, extract, truncate
from merging.peft_files import Adapter, file_tensors, written_config


@dataclass(frozen=True)
class ModelOutput:
    """A whole model: every tensor of the base, those of its parts in their sub-folders."""

    plan: Plan

    @property
    def steps(self) -> list[Step]:
        """What is written."""
        return self.plan.steps

    def tensors(self, step: Step) -> list[TensorSpec]:
        """Return the tensors that a step makes."""
        part = self.plan.base.part_of(step.name)
        return [TensorSpec(step.name.removeprefix(f"{part}/"), step.dtype, step.base.shape)]

    @property
    def shards(self) -> list[Shard]:
        """The files of at most --shard-size, and the steps that make them."""
        folders: dict[str, list[Step]] = {}
        for step in self.steps:
            folders.setdefault(self.plan.base.part_of(step.name), []).append(step)
        size = shard_bytes(self.plan.recipe.shard_size)
        shards = []
        for part, steps in folders.items():
            stem = f"{part}/model" if part else "model"
            shards += arrange(((step, self.tensors(step)) for step in steps), size, stem)
        return shards

    def write(self, step: Step, streamer: Streamer, write: Write) -> dict[str, Any]:
        """Merge one step and write it; returns the numbers of its report."""
        rows = [] if self.plan.recipe.report and not step.repeats else None
        (tensor,) = self.tensors(step)
        write(tensor.name, streamer.tensor(step, rows))  # fills rows
        return {"report": rows, "moves": moves(step, streamer.device) if rows is not None else None}


@dataclass(frozen=True)
class AdapterOutput:
    """An adapter: what it will hold is known before anything is merged."""

    plan: Plan
    sketch: Adapter  # its tensors have shapes and no data (meta device)
    names: Mapping[str, str]  # base's name → name in the adapter; tensors without an entry cannot be expressed in it

    @property
    def steps(self) -> list[Step]:
        """What is merged; for the rest of the base an adapter says nothing."""
        return self.plan.merged

    def tensors(self, step: Step) -> list[TensorSpec]:
        """Return the tensors of the adapter's file that a step makes: two factors, a vector, a value, or none."""
        own = self._sketched.get(self.names.get(step.name, ""), {})
        return [TensorSpec(key, meta.dtype, tuple(meta.shape)) for key, meta in own.items()]

    @property
    def shards(self) -> list[Shard]:
        """The one file of an adapter, and the steps that make it."""
        return arrange(((step, self.tensors(step)) for step in self.steps), math.inf, "adapter_model")

    @cached_property
    def _sketched(self) -> dict[str, dict[str, torch.Tensor]]:
        return file_tensors(self.sketch)

    def config(self) -> dict[str, Any]:
        """Return adapter_config.json."""
        return written_config(self.sketch, self.plan.recipe.rank)

    def write(self, step: Step, streamer: Streamer, write: Write) -> dict[str, Any]:
        """Merge one step and write its tensors; returns its report, and how much of its energy they lose."""
        rows = [] if self.plan.recipe.report else None
        name, energy, lost = self.names.get(step.name), 0.0, 0.0
        if name in self.sketch.modules:
            energy, lost = self._write_factors(step, name, streamer, write, rows)
        elif name in self.sketch.vectors:
            (tensor,) = self.tensors(step)
            write(tensor.name, [rounded(step.name, 1 + streamer.update(step, rows), tensor.dtype)])
        elif name in self.sketch.values:
            (tensor,) = self.tensors(step)
            write(tensor.name, streamer.tensor(step, rows))
        else:
            update = streamer.update(step, rows)
            energy = sum(float(part.double().square().sum()) for part in update.reshape(-1).split(2**21))
            lost = float(energy > 0)
        shape = "×".join(map(str, step.base.shape))
        lost = dict(tensor=step.name, shape=shape, energy=energy, lost=lost)
        return {"report": rows, "moves": moves(step, streamer.device) if rows is not None else None, "lost": lost}

    def _write_factors(
        self, step: Step, name: str, streamer: Streamer, write: Write, rows: list[dict] | None
    ) -> tuple[float, float]:
        """Write the two factors of a module; returns the energy of its update, and the share that its rank loses."""
        rank = self.plan.recipe.rank
        if streamer.is_factored(step, step.pieces[0]):
            merged = streamer.low_rank(step, rows)
            update, lost = truncate(replace(merged, scale=merged.scale * step.final_scale), rank)
        else:
            update, lost = extract(streamer.update(step, rows), rank, self.sketch.modules[name].layout)
        factors = file_tensors(Adapter("lora", {name: update}))[name]
        for tensor in self.tensors(step):
            write(tensor.name, [rounded(step.name, factors[tensor.name], tensor.dtype)])
        kept = float(update.b.double().square().sum(0).square().sum())  # Σ σ²: the columns of b have the lengths √σ
        return kept / (1 - lost), lost


def adapter_output(plan: Plan) -> AdapterOutput:
    """Return what the adapter of a merge will hold.

    Raises:
        ValueError: the rank is missing, or there is one for IA³; or no tensor has a place in an adapter.
    """
    from_adapters = isinstance(plan.experts[0], Adapter)
    ia3 = from_adapters and plan.experts[0].kind == "ia3"
    if ia3 == (plan.recipe.rank is not None):
        raise ValueError("--rank: IA³ has no rank" if ia3 else "--output adapter: give --rank, that of its modules")
    names, modules, vectors, values = {}, {}, {}, {}
    if from_adapters:
        names = _names_of_adapters(plan)
        layouts = {step.name: step.layout for step in plan.merged if step.change.factored}
    else:
        layouts, names = linear_layers(plan)
    dtype = plan.recipe.output_dtype(torch.float32)
    for step in plan.merged:
        name = names.get(step.name)
        if name is None:
            continue
        if step.name in layouts:
            modules[name] = _sketched(step.base.shape, plan.recipe.rank, layouts[step.name], dtype)
        elif isinstance(step.change, IA3):
            shape = next(filter(None, step.experts)).shape
            vectors[name] = torch.empty(shape, dtype=dtype, device="meta")
        else:
            values[name] = torch.empty(step.base.shape, dtype=step.dtype, device="meta")
    if not (modules or vectors or values):
        raise ValueError(f"{plan.base.given}: no merged tensor has a place in an adapter; write a model instead")
    config = joint_config(plan.experts) if from_adapters else {"base_model_name_or_path": plan.recipe.base}
    output = AdapterOutput(plan, Adapter("ia3" if ia3 else "lora", modules, vectors, values, config), names)
    output.config()  # refuses what peft cannot state before anything is merged
    return output


def _sketched(shape: tuple[int, int], rank: int, layout: str, dtype: torch.dtype) -> LowRank:
    b, a = (torch.empty(size, dtype=dtype, device="meta") for size in ((shape[0], rank), (rank, shape[1])))
    return LowRank(b, a, layout=layout)


def _names_of_adapters(plan: Plan) -> dict[str, str]:
    """Return base's name → name in the adapters; where they differ, that in the first adapter which has it."""
    names = {}
    for adapter in reversed(plan.experts):
        renamed = named_as_base(adapter, plan.base)
        for held in ("modules", "vectors", "values"):
            names |= dict(zip(getattr(renamed, held), getattr(adapter, held), strict=True))
    return names


def linear_layers(plan: Plan) -> tuple[dict[str, str], dict[str, str]]:
    """Return which merged tensors are weights of linear layers.

    Returns:
        name → "matrix" or "transposed", of these two the one that more weights have (peft states it once for all
        modules); and name → the weight's name in the model's class.
    """
    known = dict(_linear_modules(plan.base.config))
    layouts, names = {}, {}
    for step in plan.merged:
        matrix = step.layout in ("matrix", "transposed") and step.name.endswith(".weight")
        matrix = matrix and plan.base.part_of(step.name) == plan.base.main  # peft's names are those of the main part
        if not matrix or (not known and not MODULES(step.name, torch.empty(step.base.shape, device="meta"))):
            continue
        name = naming(plan.base).canonical(step.name)
        longer = (each for each in known if each.endswith(f".{name}"))
        own = name if name in known else next(longer, None)
        if own or not known:
            layouts[step.name] = known[own] if own else step.layout
            names[step.name] = own or step.name
    found = list(layouts.values())
    most = max(("matrix", "transposed"), key=found.count)
    kept = {name: layout for name, layout in layouts.items() if layout == most}
    return kept, {name: names[name] for name in kept}


def _linear_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield weight and layout of all linear layers of the class that config.json names; nothing where it names none."""
    from transformers.pytorch_utils import Conv1D

    model = class_of(as_text(config))
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, torch.nn.Linear):
            yield f"{name}.weight", "matrix"
        elif isinstance(module, Conv1D):
            yield f"{name}.weight", "transposed"
