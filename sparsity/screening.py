"""Screening: which pre-activations may be positive, from a weight that is rounded to 8 bits, with a proven bound.

K̃ is K rounded to 8 bits per row, a quarter of float32's memory, and x̃ is x in bfloat16. With δ_j = K_j − K̃_j

    |p_j − p̃_j| ≤ ‖δ_j‖ ‖x̃‖ + ‖K_j‖ ‖x − x̃‖ + rounding of p̃_j                        (Cauchy–Schwarz)

so that p̃_j plus this bound ≤ 0 proves p_j ≤ 0. One token takes what it takes to read K̃.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDOFF = 2.0**-8  # of bfloat16
COLUMNS = 64  # the 8-bit product reads its operands in blocks, and beyond their ends if no block ends there
SAMPLE = 64  # entries by which a weight is known again
CHUNK = 2**18  # entries of K that each thread gathers at a time, so that they are still in its cache when it uses them


class Screen:
    """A linear layer's weight rounded to 8 bits, and how far products with it can be off.

    Args:
        weight: K, (d_ff, d), on a CPU.
        margin: the share of the error bound that is kept.
    """

    def __init__(self, weight: Tensor, margin: float) -> None:
        self.margin = margin
        self._seen = _traits(weight)
        exact = weight.detach().float()
        self.scale = (exact.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()  # (d_ff,)
        steps = self.scale.float()[:, None]
        rounded = (exact / steps).round().clamp(-127, 127)
        self.rounded = F.pad(rounded.nan_to_num(0).to(torch.int8), (0, -exact.shape[1] % COLUMNS))  # (d_ff, d padded)
        self.norm = exact.norm(dim=1)  # ‖K_j‖
        # ‖δ_j‖, and the rounding of a float32 sum of d terms
        self.error = (exact - rounded * steps).norm(dim=1) + exact.shape[1] * 2.0**-24 * self.norm

    def is_of(self, weight: Tensor) -> bool:
        """Return whether this is the screen of `weight` as it is now.

        Torch counts changes in place, but not those by way of `weight.data`: these are told by a sample of entries.
        """
        kind, sample = self._seen
        now, entries = _traits(weight)
        return kind == now and torch.equal(sample, entries)

    def estimate(self, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return estimated pre-activations, (n, d_ff), and the units that may be positive for one of the n tokens.

        Estimates of the other units are not positive.
        """
        narrow = tokens.bfloat16()
        padded = F.pad(narrow, (0, self.rounded.shape[1] - narrow.shape[1]))
        product = torch.ops.aten._weight_int8pack_mm(padded, self.rounded, self.scale).float()
        wide = narrow.float()
        bound = self.error * wide.norm(dim=1, keepdim=True)
        bound += self.norm * (tokens.float() - wide).norm(dim=1, keepdim=True)
        bound += product.abs() * (2 * ROUNDOFF)
        if bias is not None:
            product += bias
        negative = product + self.margin * bound <= 0  # False for NaN: such units are computed
        return product.clamp_(max=0).to(tokens.dtype), (~negative).any(0).nonzero()[:, 0]


def _traits(weight: Tensor) -> tuple[tuple[object, ...], Tensor]:
    version = None if weight.is_inference() else weight._version
    entries = weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLE)]
    return (version, weight.data_ptr(), weight.dtype, weight.device, weight.shape), entries.clone()


def some_rows(weight: Tensor, bias: Tensor | None, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return tokens @ weight[rows].T + bias[rows], (n, len(rows)), with only a few rows gathered at a time."""
    height = max(1, CHUNK * torch.get_num_threads() // weight.shape[1])
    parts = [F.linear(tokens, weight.index_select(0, some)) for some in rows.split(height)] or [
        tokens.new_zeros(len(tokens), 0)
    ]
    result = torch.cat(parts, 1)
    return result if bias is None else result + bias[rows]


def can_screen(weight: Tensor) -> bool:
    """Return whether torch has the 8-bit product for this weight, and whether it is right."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    try:
        factors = torch.arange(2 * COLUMNS, dtype=torch.int8).view(2, COLUMNS) - COLUMNS
        ones = torch.ones(3, COLUMNS).bfloat16()
        found = torch.ops.aten._weight_int8pack_mm(ones, factors, torch.ones(2).bfloat16()).float()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(found, factors.float().sum(1).expand(3, 2), rtol=2 * ROUNDOFF)
