"""The search for λ."""

import pytest

from merging.tuning import COARSE, tune_scale


@pytest.mark.parametrize("peak", [0.09, 0.3, 1.0, 1.2, 3.0])
def test_it_finds_the_peak_of_a_smooth_curve_within_its_step(peak):
    def score(scales):
        return [-abs(scale / peak - 1) for scale in scales]

    found = tune_scale(score)
    assert peak / 2**0.25 <= found <= peak * 2**0.25


def test_it_looks_at_eleven_scales_in_three_rounds_and_never_twice():
    rounds = []

    def score(scales):
        rounds.append(list(scales))
        return [-((scale - 0.3) ** 2) for scale in scales]

    tune_scale(score)
    seen = [scale for scales in rounds for scale in scales]
    assert [len(scales) for scales in rounds] == [7, 2, 2] and len(set(seen)) == len(seen) == 11


def test_the_smaller_scale_wins_a_tie():
    assert tune_scale(lambda scales: [1.0] * len(scales)) < min(COARSE)


@pytest.mark.parametrize("coarse", [(), (1.0,), (0.0, 1.0), (-1.0, 1.0)])
def test_a_grid_without_scales_is_refused(coarse):
    with pytest.raises(ValueError, match="coarse"):
        tune_scale(lambda scales: [0.0] * len(scales), coarse)
