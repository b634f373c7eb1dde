"""The scale λ of a finished update, chosen on validation data: the control for every claim about merging."""

from collections.abc import Callable, Sequence

COARSE = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)


def tune_scale(
    score: Callable[[Sequence[float]], Sequence[float]], coarse: Sequence[float] = COARSE, refinements: int = 2
) -> float:
    """Return the scale λ > 0 with the highest validation score, from a geometric grid and ever closer neighbours.

    The scale multiplies the FINISHED update (`apply(pretrained, update, scale)`), after calibration: before it, a scale
    is only another α. The default looks at 11 scales and ends with steps of 2^¼; the smaller scale wins a tie.

    Args:
        score: maps scales to scores, higher is better; it is called once for each round of the search, so that it can
            evaluate all scales of a round in one pass over the data.
        coarse: the grid of the first round, a constant factor apart.
        refinements: how many times the best scale's two neighbours, at half the logarithmic distance, are tried.

    Raises:
        ValueError: the grid holds fewer than two scales, or one that is not positive.
    """
    if len(coarse) < 2 or min(coarse) <= 0:
        raise ValueError(f"coarse must hold at least two positive scales, got {tuple(coarse)}")
    scores = dict(zip(coarse, score(coarse), strict=True))
    factor = coarse[1] / coarse[0]
    for _ in range(refinements):
        factor **= 0.5
        best = _best(scores)
        fresh = [scale for scale in (best / factor, best * factor) if scale not in scores]
        scores |= zip(fresh, score(fresh), strict=True)
    return _best(scores)


def _best(scores: dict[float, float]) -> float:
    return max(sorted(scores), key=scores.__getitem__)
