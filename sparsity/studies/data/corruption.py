"""T5's span corruption: spans of a text are replaced by sentinels, and the target spells out what was there.

    raw       t₀ t₁ t₂ t₃ t₄ t₅ t₆ t₇ t₈           (spans t₂t₃ and t₇t₈ are noise)
    input     t₀ t₁ <0> t₄ t₅ t₆ <1> END
    target    <0> t₂ t₃ <1> t₇ t₈ END

Source: Raffel et al., arXiv 1910.10683, section 3.1.4, and the `random_spans_noise_mask` of its code: noise is 15 % of
the tokens in spans of 3 on average, lengths of noise and of kept spans are uniform over all ways to divide their
totals, a row begins with a kept span and ends with noise. Every row of one raw length then has the same number of
input and of target tokens: nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.data.text import END

NOISE, MEAN_SPAN = 0.15, 3.0


@dataclass(frozen=True)
class Shape:
    """Tokens per row: `raw`, of which `noise` in `spans` spans; `input` and `target` count sentinels and END too."""

    raw: int
    noise: int
    spans: int

    @property
    def input(self) -> int:
        """Tokens of an input."""
        return self.raw - self.noise + self.spans + 1

    @property
    def target(self) -> int:
        """Tokens of a target."""
        return self.noise + self.spans + 1


def shape_for(length: int, noise: float = NOISE, mean_span: float = MEAN_SPAN) -> Shape:
    """Return the shape of the longest rows whose inputs have at most `length` tokens (568 raw tokens for 512).

    noise tokens = round(noise · raw), spans = round(noise tokens / mean_span), at least one of each.

    Args:
        length: largest number of tokens of an input, sentinels and END included.
        noise: share of the raw tokens that is replaced, in (0, 1).
        mean_span: mean length of a span that is replaced, in tokens; at least 1.

    Raises:
        ValueError: not even one span fits, or a share or length is out of range.
    """
    if not (0 < noise < 1 and mean_span >= 1):
        raise ValueError(f"noise must be in (0, 1) and mean_span at least 1, got {noise} and {mean_span}")
    if length < 3:
        raise ValueError(f"length must be at least 3 (a kept token, a sentinel, END), got {length}")
    raw = 2
    while _shape(raw + 1, noise, mean_span).input <= length:
        raw += 1
    return _shape(raw, noise, mean_span)


def _shape(raw: int, noise: float, mean_span: float) -> Shape:
    tokens = min(max(round(raw * noise), 1), raw - 1)
    return Shape(raw, tokens, min(max(round(tokens / mean_span), 1), raw - tokens))


def corrupt(rows: Tensor, indices: Sequence[int], shape: Shape, sentinels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Corrupt rows of tokens, each in a way that depends on the seed and its own index alone.

    Args:
        rows: (B, raw) token ids.
        indices: B numbers, one per row, such as its place in the data set.
        shape: of the rows.
        sentinels: the id after that of the first sentinel; span k is marked by the id `sentinels` − 1 − k.
        seed: of the spans.

    Returns:
        Inputs (B, shape.input) and targets (B, shape.target), int64.

    Raises:
        ValueError: the rows do not have the shape's length.
    """
    if rows.shape != (len(indices), shape.raw):
        raise ValueError(f"expected rows of shape {(len(indices), shape.raw)}, got {tuple(rows.shape)}")
    tokens, size = rows.numpy().astype(np.int64), len(indices)
    draws = _draws(seed, indices, shape.raw)  # (B, raw) uint64
    kept = _composition(draws[:, shape.noise :], shape.raw - shape.noise, shape.spans)  # (B, spans)
    noisy = _composition(draws[:, : shape.noise], shape.noise, shape.spans)
    ends = np.stack([kept, noisy], 2).reshape(size, -1).cumsum(1)  # (B, 2·spans): kept, noisy, kept, …
    first = np.zeros((size, shape.raw), bool)  # first token of each span
    first[:, 0] = True
    np.put_along_axis(first, ends[:, :-1], True, axis=1)
    span = first.cumsum(1) - 1  # even: kept, odd: noise
    noise, marks = span % 2 == 1, sentinels - 1 - span // 2
    inputs = np.where(noise, marks, tokens)[~noise | first].reshape(size, -1)
    targets = np.where(noise, tokens, marks)[noise | first].reshape(size, -1)
    end = np.full((size, 1), END)
    return tuple(torch.from_numpy(np.concatenate([part, end], 1)) for part in (inputs, targets))


def _composition(draws: np.ndarray, total: int, parts: int) -> np.ndarray:
    """Divide `total` into `parts` positive numbers, all ways equally likely: (B, parts)."""
    cuts = np.sort(draws[:, : total - 1].argsort(1)[:, : parts - 1], 1) + 1  # parts − 1 of 1 … total − 1
    size = len(draws)
    edges = np.concatenate([np.zeros((size, 1), int), cuts, np.full((size, 1), total)], 1)
    return np.diff(edges, axis=1)


def _draws(seed: int, indices: Sequence[int], count: int) -> np.ndarray:
    """Random (B, count) uint64, a pure function of seed, index and column: splitmix64 of each counter."""
    start = _mix(_mix(np.array([seed], np.uint64)) + np.array(indices, np.uint64))  # (B,)
    return _mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
