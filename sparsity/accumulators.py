"""What a probe adds up for one MLP block while the model runs: the sums, and the reductions that make them.

The entries of one token are reduced in single precision; sums over tokens and passes are kept in double precision, on
the device of the layer. Nothing is read back, which would wait for the device, before a table is asked for.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparsity import flatness

THRESHOLDS = {
    "effective_gradient_below_1e-9": 1e-9,
    "effective_gradient_below_1e-6": 1e-6,
    "effective_gradient_below_1e-3": 1e-3,
}
HISTOGRAM = (-32.0, 8.0, 160)  # of log10 g²: lowest edge, highest edge, number of bins


class Accumulator:
    """Named sums that stay on the device of their layer until they are read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.scalars: dict[tuple[str, ...], Tensor] = {}  # names → vector of their sums
        self.vectors: dict[str, Tensor] = {}

    def add(self, scalars: Mapping[str, Tensor], **counts: int) -> None:
        """Add to sums by name.

        Args:
            scalars: tensors (); those of one call are packed into one vector, so that they cost one addition.
            counts: plain numbers, such as tokens=256.
        """
        self.counts.update(counts)
        names, packed = tuple(scalars), torch.stack([wide(scalar) for scalar in scalars.values()])
        self.scalars[names] = self.scalars[names] + packed if names in self.scalars else packed

    def add_vector(self, name: str, vector: Tensor) -> None:
        """Add a vector, such as the counts of a histogram, to the one of this name."""
        self.vectors[name] = self.vectors[name] + vector if name in self.vectors else vector

    def read(self) -> dict[str, float]:
        """Return name → sum; 0 for what was never added."""
        sums: dict[str, float] = defaultdict(float, self.counts)
        for names, packed in self.scalars.items():
            sums.update(zip(names, packed.tolist(), strict=True))
        return sums


class LayerSums:
    """All sums of one MLP block.

    There is one accumulator for the forward pass, one for gradients at the key layer and one for those at the value
    layer; each counts its own samples, tokens and entries, as a pass may lack a backward pass.
    """

    def __init__(self) -> None:
        self.forward, self.key, self.value = Accumulator(), Accumulator(), Accumulator()

    @property
    def has_gradients(self) -> bool:
        return bool(self.key.counts["samples"] and self.value.counts["samples"])

    def row(self, gradients: bool) -> dict[str, float]:
        """Return the statistics of `sparsity.flatness`, those that need gradients only if `gradients`."""
        sums = self.forward.read()
        active = self.forward.vectors.get("active")
        sums["units"] = 0 if active is None else len(active)
        sums["alive"] = 0 if active is None else int(torch.count_nonzero(active))
        if math.isnan(sums["p²"]) or math.isnan(sums["a²"]):  # in comparisons NaN would count as zero
            sums |= dict.fromkeys(("active", "differentiable", "union", "alive"), math.nan)
        row = flatness.densities(sums)
        if gradients:
            key, value = self.key.read(), self.value.read()
            if math.isnan(key["η²"]) or math.isnan(row["density"]):
                key |= dict.fromkeys(("active", "η < 0", "η > 0", *THRESHOLDS), math.nan)
            row |= flatness.key_identity(key) | flatness.value_identity(value)
            row |= flatness.gradient_statistics(key, THRESHOLDS)
        return row

    def bins(self) -> dict[str, list[int]]:
        """Return the counts of the histograms of log10 g²: over all entries, and over active ones."""
        return {name: self.key.vectors[name].long().tolist() for name in ("all", "active")}


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in double precision, or in single precision on MPS, which has no double."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def squares(rows: Tensor) -> Tensor:
    """Return ‖row‖² of each row, (N, d) → (N,), in double precision."""
    return wide(torch.linalg.vector_norm(rows, dim=-1)).square()


def total(rows: Tensor) -> Tensor:
    """Return the sum of all entries, () in double precision; along rows it is taken in single precision."""
    return wide(rows.sum(-1)).sum()


def count(comparison: Callable[..., Tensor], rows: Tensor, than: float) -> Tensor:
    """Return the number of entries for which the comparison (torch.lt, torch.ne, …) with a number holds."""
    # Written as 0. and 1.: on CPUs comparisons that write bools, and counts of bools, are not vectorised.
    return total(comparison(rows, than, out=torch.empty_like(rows)))


def histogram(gradient: Tensor) -> Tensor:
    """Return the counts (bins,) of log10 g² of the entries that are not zero; see HISTOGRAM."""
    low, high, bins = HISTOGRAM
    exponents = 2 * gradient[gradient != 0].abs().log10()
    return wide(torch.histc(exponents.clamp(low, high), bins, low, high))
