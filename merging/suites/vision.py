"""Merging suites of image encoders with frozen zero-shot heads.

Experiments name a backbone and see only `Suite`. "glyph-WIDTH" is trained on this machine, without a download (see
common.data.glyphs); "ViT-B/32", "ViT-B/16" and "ViT-L/14" are CLIP, with experts and data sets from the hub. Conditions
of the former stand behind its name: "glyph-96 own domains" gives every task a domain of its own, "glyph-96 base 1"
starts from another pretrained base (all seeds of a backbone share one).
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from common import training
from common.cache import Artefact, artefact, cache_key, is_cached
from common.data import glyphs, hub
from merging.suites.comparison import published_accuracy
from merging.suites.data import vision_tasks
from merging.suites.data.vision_tasks import VISION_TASKS
from merging.suites.models import clip as clip_models
from merging.suites.models import tiny_clip
from merging.suites.suite import Suite

Build = Callable[[Path], None]  # fills the folder of an artefact


class ZeroShot(nn.Module):
    """A classifier: `encoder` (images → features) and the frozen head (C, embed) of class embeddings."""

    def __init__(self, encoder: nn.Module, head: Tensor):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("head", head)

    def forward(self, images: Tensor) -> Tensor:
        """Return the classes (B,) with the highest inner product with the unit features."""
        return (F.normalize(self.encoder(images), dim=-1) @ self.head.T).argmax(-1)


def suite(backbone: str, tasks: int, seed: int, recipe: "GlyphRecipe", device: torch.device) -> Suite:
    """Return the suite of the first `tasks` tasks of a backbone, training whatever the cache does not hold yet.

    Args:
        backbone: "glyph-WIDTH", or an entry of CLIP.
        tasks: number of tasks.
        seed: of the experts on glyphs.
        recipe: of the models on glyphs; its width is ignored.
        device: of the states.

    Raises:
        ValueError: the backbone is unknown, or has fewer tasks.
        OSError: the hub cannot be reached, or lacks a repository.
    """
    check_suites([backbone], [tasks])
    if is_glyph(backbone):
        return glyph_suite(recipe.at(backbone), tasks, seed, device)
    return clip_suite(backbone, tasks, device)


def check_suites(backbones: Sequence[str], sizes: Sequence[int]) -> None:
    """Raise a ValueError unless every backbone is known and has suites of all these numbers of tasks."""
    for backbone in backbones:
        most = len(task_names(backbone))
        if is_glyph(backbone):
            GlyphRecipe().at(backbone)
        elif backbone not in CLIP:
            raise ValueError(f"unknown backbone {backbone!r}; there are {', '.join(CLIP)} and glyph-WIDTH")
        if bad := [size for size in sizes if not 1 <= size <= most]:
            raise ValueError(f"{backbone} has suites of 1 to {most} tasks here, got {bad[0]}")


def task_names(backbone: str) -> list[str]:
    """Return the tasks of a backbone, in the order in which suites take them."""
    return list(glyphs.TASKS if is_glyph(backbone) else VISION_TASKS)


def prepare(settings: Any, context: Any) -> None:
    """Train, in parallel processes, all glyph bases and experts of the settings that the cache does not hold yet."""
    recipes = [settings.recipe.at(backbone) for backbone in settings.backbones if is_glyph(backbone)]
    tasks = list(glyphs.TASKS)[: max(settings.suites)]
    train_all([(own, seed, task) for own in recipes for seed in settings.seeds for task in tasks], context)


def is_glyph(backbone: str) -> bool:
    """Return whether a backbone is one that is trained here on glyphs."""
    return backbone.startswith("glyph-")


STANDS_FOR = {"glyph-96": "ViT-B/32", "glyph-128": "ViT-B/16", "glyph-160": "ViT-L/14"}


def setting(backbone: str) -> str:
    """Return a text, for comparisons, that says whether a backbone's setting is the paper's."""
    if not is_glyph(backbone):
        return "hub experts"
    return f"no: stands for {STANDS_FOR[backbone]}" if backbone in STANDS_FOR else "no: glyphs"


def published_number(
    table: pd.DataFrame, backbone: str, suite: int, method: str, svc: str, peers: bool = True
) -> tuple[float, str]:
    """Return the published accuracy (%) of a merger on the CLIP that a backbone is or stands for, and its source.

    Args:
        table: `published("merging")`.
        backbone, suite, method, svc: as in the rows of a suite.
        peers: whether a number of other authors is taken if the paper has none.

    Returns:
        the number (NaN where none is known) and the source in words, empty for the paper itself.
    """
    return published_accuracy(table, f"{suite} vision tasks", STANDS_FOR.get(backbone, backbone), method, svc, peers)


def is_evidence(table: pd.DataFrame, backbones: Sequence[str]) -> bool:
    """Return whether a table holds what verdicts ask for.

    That is 8, 14 and 20 tasks of all these backbones with at least 3 seeds, or the 8 tasks of ViT-B/32.
    """
    cells = set(zip(table.backbone, table.suite, strict=True))
    wanted = {(backbone, tasks) for backbone in backbones for tasks in (8, 14, 20)}
    return ("ViT-B/32", 8) in cells or (wanted <= cells and table.seed.nunique() >= 3)


# Glyphs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GlyphRecipe:
    """How the glyph suite's base and experts are trained. `slant` and `halftone` set the downstream domain shift."""

    width: tyro.conf.Suppress[int] = 96  # this and the next two are set by the backbone's name
    base_seed: tyro.conf.Suppress[int] = 0
    own_domains: tyro.conf.Suppress[bool] = False
    pretraining_steps: int = 2000
    expert_steps: int = 200
    expert_learning_rate: float = 4e-4
    slant: float = 0.5
    halftone: float = 0.3
    wide_validation: bool = False  # tune scales on 3 faces of 2 families and train experts on 8; else on 2 and 9

    def at(self, backbone: str) -> "GlyphRecipe":
        """Return the recipe of a backbone "glyph-WIDTH", with "base SEED" or "own domains" behind it, or both.

        Raises:
            ValueError: the backbone is named otherwise, or its width is not a multiple of 32.
        """
        found = re.fullmatch(r"glyph-(\d+)( base (\d+))?( own domains)?", backbone)
        if not found or int(found[1]) % 32 or not int(found[1]):
            raise ValueError(
                f"a glyph backbone is named glyph-WIDTH, WIDTH a multiple of 32, with ' base SEED' or ' own domains' "
                f"behind it where wanted, got {backbone!r}"
            )
        return replace(self, width=int(found[1]), base_seed=int(found[3] or 0), own_domains=bool(found[4]))

    @property
    def pretraining(self) -> training.TrainingRecipe:
        """How the base is trained."""
        return training.TrainingRecipe(self.pretraining_steps, 128, 1.5e-3, warmup=0.06)

    @property
    def expert(self) -> training.TrainingRecipe:
        """How each expert is trained."""
        return training.TrainingRecipe(self.expert_steps, 64, self.expert_learning_rate)

    def style(self, task: str) -> glyphs.Style:
        """Return how the images of a downstream task look."""
        if self.own_domains:
            return glyphs.own_style(task, self.slant, self.halftone)
        return glyphs.shifted_style(self.slant, self.halftone)

    @property
    def faces(self) -> Mapping[str, tuple[str, ...]]:
        """The faces that experts are trained on, scales are tuned on and merged models are tested on, by split."""
        return glyphs.WIDE_VALIDATION if self.wide_validation else glyphs.FACES

    @property
    def validation_glyphs(self) -> int:
        """About how many photographs of a task scales are tuned on; each glyph is in one or more of them."""
        return 128 if self.wide_validation else 64


SMOKE = GlyphRecipe(pretraining_steps=8, expert_steps=4)  # enough to run every line, not to learn


def pretrain(recipe: GlyphRecipe, device: torch.device, description: str | None = None) -> Artefact:
    """Return the tiny CLIP pre-trained on all 559 classes in the mild style: an artefact with model.safetensors.

    All seeds of a backbone share one base, as the paper shares one CLIP; a backbone "… base SEED" has another.
    """
    return artefact(*_base(recipe, device, description))


def _base(
    recipe: GlyphRecipe, device: torch.device, description: str | None = None
) -> tuple[str, dict[str, Any], Build]:
    """Return kind, inputs and builder of a base's artefact."""
    inputs = {"width": recipe.width, "recipe": recipe.pretraining, "seed": recipe.base_seed, "device": device.type}
    return "tiny_clip", inputs, partial(_pretrain, recipe, device, description)


def _pretrain(recipe: GlyphRecipe, device: torch.device, description: str | None, folder: Path) -> None:
    from open_clip.loss import ClipLoss  # late: --help needs no seconds of it

    seed = recipe.base_seed
    torch.manual_seed(seed)
    clip = tiny_clip.tiny_clip(recipe.width)
    drawn = glyphs.glyphs(list(glyphs.TASKS), "train")
    texts, generator, contrast = tiny_clip.tokens(drawn.names), torch.Generator().manual_seed(seed), ClipLoss()

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        images = glyphs.photograph(batch[0], glyphs.MILD, generator)
        return contrast(*model(images, texts.to(images.device)[batch[1]])[:3])

    training.fit(clip, loss, _loader(drawn, recipe.pretraining, seed), recipe.pretraining, device, description)
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, folder / "model.safetensors")


def fine_tune(recipe: GlyphRecipe, task: str, seed: int, device: torch.device) -> Artefact:
    """Return the task's expert: the image encoder fine-tuned under the frozen zero-shot head; model.safetensors."""
    pretrain(recipe, device)  # not inside the expert's own build: other experts wait for the same base
    return artefact(*_expert(recipe, task, seed, device))


def _expert(recipe: GlyphRecipe, task: str, seed: int, device: torch.device) -> tuple[str, dict[str, Any], Build]:
    """Return kind, inputs and builder of an expert's artefact."""
    _, *base = _base(recipe, device)
    inputs = {
        "task": task,
        "seed": seed,
        "recipe": recipe.expert,
        "style": recipe.style(task),
        "faces": recipe.faces["train"],
        "base": cache_key(*base),
    }
    return "glyph_expert", inputs, partial(_fine_tune, recipe, task, seed, device)


def _fine_tune(recipe: GlyphRecipe, task: str, seed: int, device: torch.device, folder: Path) -> None:
    clip = load_clip(recipe.width, pretrain(recipe, device).path)
    head = tiny_clip.zero_shot_head(clip, glyphs.class_names(task))
    style, generator = recipe.style(task), torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        images, labels = glyphs.photograph(batch[0], style, generator), batch[1]
        return F.cross_entropy(F.normalize(model(images), dim=-1) @ head.to(images.device).T, labels)

    drawn = glyphs.glyphs([task], "train", recipe.faces)
    encoder = training.fit(clip.visual, loss, _loader(drawn, recipe.expert, seed), recipe.expert, device)
    save_file(
        {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, folder / "model.safetensors"
    )


def _loader(drawn: glyphs.Glyphs, recipe: training.TrainingRecipe, seed: int) -> DataLoader:
    dataset = TensorDataset(drawn.images, drawn.labels)
    return DataLoader(dataset, batch_sampler=training.RandomBatches(drawn.labels, recipe, seed))


def load_clip(width: int, folder: Path) -> nn.Module:
    """Load a tiny CLIP from an artefact's folder."""
    clip = tiny_clip.tiny_clip(width)
    clip.load_state_dict(load_file(folder / "model.safetensors"))
    return clip.eval()


def glyph_suite(recipe: GlyphRecipe, tasks: int, seed: int, device: torch.device) -> Suite:
    """Return the suite of the first `tasks` (of 20) glyph tasks, training whatever the cache does not hold yet."""
    bare = zero_shot_suite(recipe, tasks, device)
    artefacts = [fine_tune(recipe, name, seed, device) for name in bare.tasks]
    experts = tuple(load_file(expert.path / "model.safetensors", str(device)) for expert in artefacts)
    return replace(bare, key=cache_key({"experts": [expert.key for expert in artefacts]}, glyph_suite), experts=experts)


def zero_shot_suite(recipe: GlyphRecipe, tasks: int, device: torch.device) -> Suite:
    """Return the suite of the first `tasks` glyph tasks without experts: only the base is trained."""
    names = tuple(glyphs.TASKS)[:tasks]
    base = pretrain(recipe, device)
    model = load_clip(recipe.width, base.path)
    heads = [tiny_clip.zero_shot_head(model, glyphs.class_names(name)) for name in names]
    pretrained = {name: tensor.detach().clone().to(device) for name, tensor in model.visual.state_dict().items()}
    inputs = {"base": base.key, "styles": [recipe.style(name) for name in names], "tasks": names}
    inputs |= {"faces": recipe.faces, "validation": recipe.validation_glyphs}
    key = cache_key(inputs, zero_shot_suite)
    networks = tuple(ZeroShot(model.visual, head).to(device) for head in heads)
    return Suite(key, names, networks, pretrained, (), _GlyphBatches(recipe, device))


class _GlyphBatches:
    """Fixed photographs of each task: the same images for every model and seed, made once and kept."""

    def __init__(self, recipe: GlyphRecipe, device: torch.device):
        self.recipe, self.device, self.made = recipe, device, {}

    def __call__(self, task: str, split: str, batch_size: int = 512) -> list[tuple[Tensor, ...]]:
        if (task, split) not in self.made:
            drawn = glyphs.glyphs([task], split, self.recipe.faces)
            copies = 2 if split == "test" else max(1, round(self.recipe.validation_glyphs / len(drawn.labels)))
            style, seed = self.recipe.style(task), 1 if split == "test" else 2
            images, labels = glyphs.photographs(drawn, style, copies, seed)
            self.made[task, split] = (images.to(self.device), labels.to(self.device))
        return list(zip(*(tensor.split(batch_size) for tensor in self.made[task, split]), strict=True))


def train_all(recipes_seeds_tasks: Sequence[tuple[GlyphRecipe, int, str]], context: Any) -> None:
    """Train, in parallel processes, the bases and experts of these (recipe, seed, task) that are not cached yet."""
    experts = [
        (recipe, seed, task)
        for recipe, seed, task in recipes_seeds_tasks
        if not is_cached(*_expert(recipe, task, seed, context.device))
    ]
    own = {(recipe.width, recipe.base_seed, recipe.pretraining): recipe for recipe, _, _ in recipes_seeds_tasks}
    recipes = own.values()
    bases = [recipe for recipe in recipes if not is_cached(*_base(recipe, context.device))]
    context.map(partial(_pretrain_one, context.device), bases, "pre-train")
    context.map(partial(_fine_tune_one, context.device), experts, "fine-tune experts")


def _pretrain_one(device: torch.device, recipe: GlyphRecipe) -> str:
    return pretrain(recipe, device, "pre-train").key


def _fine_tune_one(device: torch.device, item: tuple[GlyphRecipe, int, str]) -> str:
    recipe, seed, task = item
    return fine_tune(recipe, task, seed, device).key


# CLIP ----------------------------------------------------------------------------------------------------------------

CLIP = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
}
VALIDATION_IMAGES = 512  # per task, of the held-out part of its training split


@lru_cache(maxsize=1)  # several parts of an experiment ask for the same one, and it takes minutes to load
def clip_suite(backbone: str, tasks: int, device: torch.device) -> Suite:
    """Return a suite of the paper: CLIP's image encoder, the hub's experts, zero-shot heads and test sets.

    The states are those of the vision tower; the projection behind it is frozen, as in the experts' fine-tuning.

    Args:
        backbone: an entry of CLIP.
        tasks: how many, in the order of VISION_TASKS.
        device: of the states.

    Raises:
        OSError: the hub cannot be reached or a repository is missing; the message says what to do.
    """
    rows = list(VISION_TASKS.values())[:tasks]
    base = clip_models.clip_vision(CLIP[backbone])
    tower = base.tower.state_dict()
    experts = [clip_models.clip_expert_state(row.expert_id(CLIP[backbone]), like=tower) for row in rows]
    heads = [clip_models.zero_shot_head(CLIP[backbone], row.class_names, row.templates, device) for row in rows]
    states = [{f"tower.{name}": tensor.to(device) for name, tensor in state.items()} for state in (tower, *experts)]
    batches = partial(_clip_batches, CLIP[backbone], device)
    for row in rows:  # a missing data set should be an error now, not after hours
        batches(row.name, "test"), batches(row.name, "validation")
    models = [CLIP[backbone], *(row.expert_id(CLIP[backbone]) for row in rows)]
    commits = [hub.commit(model, "model") for model in models] + [hub.commit(row.repo, "dataset") for row in rows]
    inputs = {"models": models, "tasks": [row.name for row in rows], "commits": commits, "device": device.type}
    inputs |= {"prompts": [(row.class_names, row.templates) for row in rows]}  # they make the heads
    key = cache_key(inputs, clip_suite)
    networks = tuple(ZeroShot(base, head).to(device) for head in heads)
    return Suite(key, tuple(row.name for row in rows), networks, states[0], tuple(states[1:]), batches)


@cache
def _clip_batches(model_id: str, device: torch.device, task: str, split: str) -> DataLoader:
    row = VISION_TASKS[task]
    images = row.rows("test") if split == "test" else vision_tasks.validation_rows(row, VALIDATION_IMAGES)
    workers = 0 if device.type == "cpu" else min(8, len(os.sched_getaffinity(0)))
    loader = vision_tasks.image_loader(images, clip_models.preprocessing(model_id), workers=workers)
    return Accelerator(cpu=device.type == "cpu").prepare(loader)
