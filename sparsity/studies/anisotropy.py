"""The anisotropy experiment: second moments of what a hidden layer reads, and of its gradients, over the width p.

A residual MLP: linear to p, then blocks z + ReLU(W LN(z) + b) with a norm that has no parameters, then a classifier.
Along training each block collects, of its inputs x = LN(z) and of the gradients at its outputs, per sample,

    C ← (1 − η λ) C + (mean over the batch of x xᵀ)         η the learning rate, λ the weight decay

The authors' measures are α = tr(C)² / ‖C‖_F² and √p ‖aC − 1‖_F with a = tr C / ‖C‖_F², both divided by p. The second is
√(1 − α/p): the two are one quantity. It is the one that the Marchenko–Pastur law of ratio c and any variance has at

    α/p = 1 / (1 + c)

so that c = p/α − 1 fits that law to C by its first two moments, and what is left to see is the shape.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import spectral
from common.cache import CACHE, cached_rows
from sparsity.studies.data.digits import digits

INPUTS, GRADIENTS = "hidden inputs", "gradients at hidden outputs"
QUANTILES = 65  # of the eigenvalues that are kept
V = 0.01  # v of the authors' bounds


@dataclass(frozen=True)
class AnisotropyRun:
    """One training run: what the MLP learns, how wide it is, and how it is trained (SGD without momentum)."""

    data: Literal["digits", "fashion_mnist"]
    width: int
    weight_decay: float
    seed: int
    steps: int
    batch: int = 32
    learning_rate: float = 1e-3
    blocks: int = 4

    def __post_init__(self) -> None:
        if self.data not in ("digits", "fashion_mnist"):
            raise ValueError(f"data must be digits or fashion_mnist, got {self.data!r}")


class ResidualMLP(nn.Module):
    """The network above; `hidden` are the linears W of its blocks."""

    def __init__(self, inputs: int, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of inputs (B, features)."""
        z = self.first(x)
        for linear in self.hidden:
            z = z + F.relu(linear(F.layer_norm(z, z.shape[-1:])))
        return self.last(z)


class SecondMoments:
    """C of the inputs and of the gradients of some linears, collected by hooks.

    Args:
        linears: layers p → p.
        kept: 1 − η λ.
    """

    def __init__(self, linears: nn.ModuleList, kept: float) -> None:
        self.kept = kept
        self.sums = {(index, kind): 0.0 for index in range(len(linears)) for kind in (INPUTS, GRADIENTS)}
        for index, linear in enumerate(linears):
            linear.register_forward_hook(partial(self._see, index))

    def _see(self, index: int, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._add((index, INPUTS), inputs[0].detach())
            output.register_hook(lambda gradient: self._add((index, GRADIENTS), len(gradient) * gradient))

    def _add(self, key: tuple[int, str], rows: Tensor) -> None:
        """Count a batch of vectors (B, p); gradients of a mean loss come here times B: those of each sample's own."""
        self.sums[key] = self.kept * self.sums[key] + rows.T @ rows / len(rows)


def alpha_over_p(moments: Tensor) -> float:
    """Return α/p = tr(C)² / (p ‖C‖_F²) of C (p, p): 1 if all eigenvalues are equal, 1/p if one of them is all."""
    scaled = moments.double() / moments.double().trace()
    return 1 / (len(moments) * scaled.square().sum().item())


def bounds(alpha: float, anisotropy: float, width: int, ratio: float) -> tuple[float, float]:
    """Return the authors' bounds on real and imaginary part, √2 α Q / (c √v) and √2 α² Q / (c v^1.5), v = 0.01, with

        Q = √(c + (2√2 + 3) c α / v + c A / v + c / (v p))

    Args:
        alpha, anisotropy: α and A, both divided by p as the authors log them.
        width: p.
        ratio: c = p / (batch size × steps).
    """
    inner = ratio * (1 + (2 * math.sqrt(2) + 3) * alpha / V + anisotropy / V + 1 / (V * width))
    root = math.sqrt(2) * alpha * math.sqrt(inner) / (ratio * math.sqrt(V))
    return root, root * alpha / V


def distance_to_law(eigenvalues: Tensor, ratio: float, variance: float) -> float:
    """Return the largest distance between the distribution of the eigenvalues and the Marchenko–Pastur law's, 0 to 1.

    The law has a share 1 − 1/ratio at exactly 0 if ratio > 1; eigenvalues below `variance` / 1000 count as zero.

    Args:
        eigenvalues: (p,), not negative.
        ratio, variance: of the law.
    """
    low, high = spectral.marchenko_pastur_edges(ratio, variance)
    angle = torch.linspace(0, math.pi, 20001, dtype=torch.float64)  # takes the edges out of the density
    grid = (low + high) / 2 - (high - low) / 2 * angle.cos()
    slope = spectral.marchenko_pastur_density(grid, ratio, variance) * (high - low) / 2 * angle.sin()
    at_zero = torch.tensor([max(0.0, 1 - 1 / ratio)], dtype=torch.float64)
    law = torch.cat([at_zero, at_zero, at_zero + torch.cumulative_trapezoid(slope, angle)])
    places = torch.cat([torch.tensor([min(low, variance / 1000)], dtype=torch.float64), grid])
    counted = torch.searchsorted(eigenvalues.double().sort().values, places, right=True) / len(eigenvalues)
    return (counted - law).abs().max().item()


def measure_anisotropy(run: AnisotropyRun) -> list[dict[str, Any]]:
    """Return rows (layer, quantity, metric, value) of a training run, from the cache where they are known.

    Metrics of each block and of INPUTS and GRADIENTS: "alpha over p", "anisotropy over p", "bound, real" and "…,
    imaginary", "ratio" c of the fitted law, "distance" to it, "distance, nominal" to the law whose ratio is p over the
    number of samples and whose variance fits the median, and "above noise", the share of the trace beyond its upper
    edge. For "eigenvalue" there are also `quantile`s, in units of the mean. Layer −1 has the test accuracy.
    """
    return cached_rows("anisotropy", {"run": run}, partial(_measure, run))


def _measure(run: AnisotropyRun) -> Iterator[dict[str, Any]]:
    torch.manual_seed(run.seed)
    images, labels = _pictures(run.data, "train")
    model = ResidualMLP(images.shape[1], run.width, run.blocks, 10)
    moments = SecondMoments(model.hidden, 1 - run.learning_rate * run.weight_decay)
    optimizer = torch.optim.SGD(model.parameters(), run.learning_rate, weight_decay=run.weight_decay)
    order = torch.cat([torch.randperm(len(images)) for _ in range(math.ceil(run.steps * run.batch / len(images)))])
    for step in range(run.steps):
        rows = order[step * run.batch : (step + 1) * run.batch]
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    test, classes = _pictures(run.data, "test")
    with torch.no_grad():
        accuracy = (model(test).argmax(1) == classes).float().mean().item()
    yield {"layer": -1, "quantity": "", "metric": "accuracy", "value": accuracy}
    for (layer, quantity), moment in moments.sums.items():
        for row in _statistics(moment, run):
            yield {"layer": layer, "quantity": quantity, **row}


def _statistics(moment: Tensor, run: AnisotropyRun) -> Iterator[dict[str, Any]]:
    width, samples = len(moment), run.steps * run.batch
    alpha, nominal = alpha_over_p(moment), len(moment) / samples
    anisotropy = math.sqrt(max(0.0, 1 - alpha))
    real, imaginary = bounds(alpha, anisotropy, width, nominal)
    eigenvalues = torch.linalg.eigvalsh(moment.double()).clamp(min=0)
    eigenvalues = eigenvalues / eigenvalues.mean()
    fitted = 1 / alpha - 1
    level = max(spectral.fit_noise_level(eigenvalues, nominal).item(), 1e-12)
    _, edge = spectral.marchenko_pastur_edges(nominal, level)
    found = {
        "alpha over p": alpha, "anisotropy over p": anisotropy, "bound, real": real, "bound, imaginary": imaginary,
        "ratio": fitted, "distance": distance_to_law(eigenvalues, fitted, 1.0),
        "distance, nominal": distance_to_law(eigenvalues, nominal, level),
        "above noise": (eigenvalues[eigenvalues > edge].sum() / eigenvalues.sum()).item(),
    }  # fmt: skip
    for metric, value in found.items():
        yield {"metric": metric, "value": value}
    shares = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    for share, value in zip(shares.tolist(), eigenvalues.quantile(shares).tolist(), strict=True):
        yield {"metric": "eigenvalue", "quantile": share, "value": value}


def _pictures(data: str, split: str) -> tuple[Tensor, Tensor]:
    """Return a split's images (N, features) and labels (N,)."""
    if data == "digits":
        images, labels = digits(split)
        return images.flatten(1), labels
    from torchvision.datasets import FashionMNIST

    pictures = FashionMNIST(CACHE / "torchvision", train=split == "train", download=True)
    padded = F.pad(pictures.data.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)  # 32 × 32
    return padded.flatten(1), pictures.targets
