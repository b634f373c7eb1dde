"""Up to how many active units skipping is faster than computing everything: measured, on this machine.

Skipping takes a fixed time and some time per unit, T(s) = T₀ + s T₁ at the share s of units. Two shares are timed, and
the break-even is where T(s) reaches the time of the dense layer.
"""

import bisect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

SHARES = (1 / 64, 1 / 8)  # of units, at which skipping is timed
REPEATS = 5  # calls that are timed, of which the fastest counts

Timed = Callable[[Tensor], Tensor]


@dataclass
class BreakEven:
    """Break-even points of layers, measured once for each kind, shape, dtype, device and number of threads.

    Args:
        most_tokens: the largest number of tokens. They are measured for 1, 2, 4, … tokens and for this number; what is
            between two of these has the break-even point of the larger one.
    """

    most_tokens: int
    _known: dict[object, dict[int, float]] = field(default_factory=dict)

    def shares(
        self, kind: str, weight: Tensor, width: int, dense: Timed, skipping: Callable[[Tensor, float], Tensor]
    ) -> dict[int, float]:
        """Return number of tokens n → the largest share of units, from 0 to 1, at which skipping is faster.

        Args:
            kind: tells layers apart that skip in different ways.
            weight: of the layer.
            width: of its input.
            dense: maps tokens (n, width) to the layer's output.
            skipping: maps tokens (n, width) and a share of units to an output for which only these are computed.
        """
        key = (kind, tuple(weight.shape), weight.dtype, weight.device, torch.get_num_threads())
        if key not in self._known:
            counts = sorted({*(2**power for power in range(self.most_tokens.bit_length())), self.most_tokens})
            measured = {count: _share(weight.new_ones(count, width), dense, skipping) for count in counts}
            above = {n: counts[bisect.bisect_left(counts, n)] for n in range(1, self.most_tokens + 1)}
            self._known[key] = {n: measured[count] for n, count in above.items()}
        return self._known[key]


def _share(tokens: Tensor, dense: Timed, skipping: Callable[[Tensor, float], Tensor]) -> float:
    whole = _seconds(lambda: dense(tokens))
    few, many = (_seconds(lambda share=share: skipping(tokens, share)) for share in SHARES)
    slope = max(many - few, 1e-12) / (SHARES[1] - SHARES[0])
    return min(1.0, max(0.0, SHARES[0] + (whole - few) / slope))


def _seconds(function: Callable[[], Tensor]) -> float:
    function()
    fastest = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
