"""How a trained classifier of images stands attacks on its inputs and noise on its weights, and how the two compare.

The attack is one step of the sign of the gradient (FGSM), as in the authors' scripts for arXiv 2605.25612. "Covering"
is theirs too: what an attack does to a linear, ΔZ = X' Wᵀ − X Wᵀ on the tokens X (T, in) of one image, could a change
of its weights do on the clean tokens; the least such change is (X⁺ ΔZ)ᵀ, and its size tells how flat a network has to
be for the attack to do nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.cache import Artefact, cached_rows
from common.lab.curvature import evenly_spaced
from sparsity.blocks import find_blocks
from sparsity.probes import probe
from sparsity.studies.images import pixel_range
from sparsity.studies.measurement import Rows, load
from sparsity.studies.norms_and_noise import weight_noise, whole_weight
from sparsity.studies.runs import Run
from sparsity.studies.task import Batch, Task
from sparsity.studies.training import make_task

ATTACK, NOISE, COVERING = "test, FGSM", "test, weight noise", "covering of FGSM"  # the splits of the table
COVERED_IMAGES = 64  # of which covering is measured: T × in matrices are inverted for each
NOISE_SEED = 0


def measure_robustness(
    epsilons: Sequence[float], noises: Sequence[float], run: Run, trained: Artefact, device: torch.device
) -> Rows:
    """Return what attacks and noise do to the last snapshot on test images: rows (split, size, layer, metric, value).

    Under ATTACK (size: ε, a share of the range from black to white) and NOISE (size: relative noise on the weights of
    all linears) layer "all" has loss and score, and each MLP block its density. Under COVERING, of keys and values of
    each MLP block, as medians over images: "least change, keys": ‖X⁺ ΔZ‖ / ‖W‖; "covered, keys": the share of ‖ΔZ‖²
    that it does, 1 where the tokens are independent; and "equal noise, keys": the size of weight noise that moves the
    outputs as far, the mean over tokens of ‖Δz_t‖ / ‖x_t‖ · √in / ‖W‖.

    Args:
        epsilons, noises: sizes of attacks and of noise; 0 is what happens without.
        run, trained: the description of an image task's run and what `train` returned for it.
        device: where the network runs.
    """
    inputs = {"run": trained.key, "epsilons": epsilons, "noises": noises, "device": device.type}
    return cached_rows("sparsity_robustness", inputs, partial(_measure, epsilons, noises, run, trained, device))


def _measure(
    epsilons: Sequence[float], noises: Sequence[float], run: Run, trained: Artefact, device: torch.device
) -> Iterator[dict[str, Any]]:
    task, model = make_task(run.task, device), load(run, trained, device).requires_grad_(False)
    black, white = (level.to(device) for level in pixel_range(run.task))
    for size in epsilons:
        attacked = (attack(task, model, batch, size, black, white) for batch in task.batches("test"))
        yield from ({"split": ATTACK, "size": size, **row} for row in _scores(task, model, attacked))
    generator = torch.Generator(device).manual_seed(NOISE_SEED)
    for size in noises:
        with weight_noise(model, size, generator):
            found = list(_scores(task, model, task.batches("test")))
        yield from ({"split": NOISE, "size": size, **row} for row in found)
    batches = ((batch["images"], batch["labels"]) for batch in task.batches("test"))
    images, labels = evenly_spaced(batches, COVERED_IMAGES)[0]
    clean = {"images": images, "labels": labels}
    for size in filter(None, epsilons):
        found = covering(model, clean, attack(task, model, clean, size, black, white))
        yield from ({"split": COVERING, "size": size, **row} for row in found)


def attack(task: Task, model: nn.Module, batch: Batch, size: float, black: Tensor, white: Tensor) -> Batch:
    """Return the batch with each pixel moved by `size` times the range, in the direction in which the loss rises.

    Args:
        task: whose loss per sample it is.
        model: attacked in evaluation mode.
        batch: images (B, channels, H, W) and labels (B,).
        size: ε, a share of the range; 1/255 in the authors' code.
        black, white: the ends of the range, (channels, 1, 1). A pixel leaves it only where it was outside before.
    """
    if not size:
        return batch
    images = batch["images"].clone().requires_grad_()
    losses, _ = task.score(model, {**batch, "images": images})
    (slope,) = torch.autograd.grad(losses.sum(), images)
    images = images.detach()
    moved = images + size * (white - black) * slope.sign()
    return {**batch, "images": moved.clamp(torch.minimum(images, black), torch.maximum(images, white))}


def _scores(task: Task, model: nn.Module, batches: Any) -> Iterator[dict[str, Any]]:
    pairs = []
    with probe(model, reduction="sum") as seen:
        for batch in batches:
            with torch.no_grad():
                pairs.append(torch.stack(task.score(model, batch), -1).double())
    loss, score = torch.cat(pairs).mean(0).tolist()
    yield {"layer": "all", "metric": "loss", "value": loss}
    yield {"layer": "all", "metric": "score", "value": score}
    for layer, density in seen.summary(gradients=False).density.items():
        yield {"layer": layer, "metric": "density", "value": density}


@torch.no_grad()
def covering(model: nn.Module, clean: Batch, attacked: Batch) -> Iterator[dict[str, Any]]:
    """Yield how large a change of weights does on clean tokens what an attack does: see `measure_robustness`.

    Args:
        model: in evaluation mode.
        clean, attacked: the same images without and with the attack.
    """
    with _linears_seen(model) as first:
        model(clean["images"])
    with _linears_seen(model) as second:
        model(attacked["images"])
    for (layer, name), (weight, tokens, outputs) in first.items():
        change = second[layer, name][2] - outputs  # (B, T, out)
        left, values, _ = torch.linalg.svd(tokens, full_matrices=False)  # (B, T, r), (B, r)
        smallest = values[:, :1] * max(tokens.shape[1:]) * torch.finfo(values.dtype).eps
        spanned = torch.where(values > smallest, 1.0, 0.0)
        inside = spanned[..., None] * (left.mT @ change)  # (B, r, out)
        least = (inside / values.clamp(min=smallest)[..., None]).nan_to_num(0).norm(dim=(1, 2))  # ‖X⁺ ΔZ‖
        share = inside.square().sum((1, 2)) / change.square().sum((1, 2))
        moved = (change.norm(dim=2) / tokens.norm(dim=2)).nan_to_num(0, 0, 0).mean(1)  # no token, no noise: 0 / 0
        size = weight.norm()
        found = {"least change": least / size, "covered": share, "equal noise": moved * weight.shape[1] ** 0.5 / size}
        for metric, values in found.items():
            yield {"layer": layer, "metric": f"{metric}, {name}", "value": values.nanmedian().item()}


@contextmanager
def _linears_seen(model: nn.Module) -> Iterator[dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]]:
    """Collect weight, input (B, T, in) and output (B, T, out) of both linears of every MLP block in a forward pass."""
    found: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}

    def see(place: tuple[str, str], module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found[place] = whole_weight(module), inputs[0], output

    handles = [
        module.register_forward_hook(partial(see, (block.name, name)))
        for block in find_blocks(model)
        for name, module in (("keys", block.key), ("values", block.value))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
