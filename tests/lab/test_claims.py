"""A claim's verdict is one of the fixed words, and numbers are written as the index shows them."""

import math

import pandas as pd
import pytest

from common.lab.claims import WORDS, Claim, intervals, measured, where_run, word
from common.lab.statistics import Interval

UP, DOWN, OPEN = Interval(2.0, 1.0, 3.0), Interval(-2.0, -3.0, -1.0), Interval(0.5, -1.0, 2.0)


def claim(**changes: str) -> Claim:
    given = dict(source="Table 1", claim="it rises", paper="+13", ours="+2.0", verdict="reproduced")
    return Claim(**given | changes)


def test_a_claim_is_plain_text_with_a_known_word():
    assert claim().verdict == "reproduced"
    with pytest.raises(ValueError, match=r"a verdict is one of reproduced, .* got 'proved'"):
        claim(verdict="proved")
    with pytest.raises(ValueError, match="at most 90 characters"):
        claim(claim="x" * 91)


@pytest.mark.parametrize("verdict", WORDS)
def test_what_is_not_in_the_paper_cannot_be_reproduced(verdict):
    given = dict(source="not in the paper", paper="not published", verdict=verdict)
    if verdict in ("reproduced", "direction reproduced", "in part", "not reproduced"):
        with pytest.raises(ValueError, match=f"cannot be {verdict}"):
            claim(**given)
    else:
        assert claim(**given).verdict == verdict
        with pytest.raises(ValueError, match="has no number there"):
            claim(**given | {"paper": "+13"})


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("reproduced", "reproduced"),
        ("reproduced: (a) in 27 of 27", "reproduced"),
        ("reproduced in part (holding: a, b). More", "in part"),
        ("direction reproduced. Digits", "direction reproduced"),
        ("not reproduced: in 3 of 9", "not reproduced"),
        ("not run at this scale", "not run at this scale"),
        ("no testbed. 0 of 3 suites are testbeds", "no testbed"),
    ],
)
def test_the_word_of_a_verdict_is_how_it_begins(verdict, expected):
    assert word(verdict) == expected


def test_a_verdict_in_other_words_has_none():
    with pytest.raises(ValueError, match="'sparser, on digits' begins with none of reproduced"):
        word("sparser, on digits")
    with pytest.raises(ValueError, match="begins with none"):
        word("reproducedly")


def test_where_nothing_can_be_said_no_claim_says_more():
    assert where_run("not run at this scale", "reproduced") == "not run at this scale"
    assert where_run("no testbed. None", "reproduced") == "no testbed"
    assert where_run("not reproduced: all", "reproduced") == "reproduced"


def test_measured_is_mean_and_deviation_over_seeds():
    assert measured(pd.Series([1.0, 2.0, 3.0, float("nan")]), "%") == "2.0 ± 1.0 % (n = 3)"
    assert measured(pd.Series([0.123]), digits=3) == "0.123 (n = 1)"
    assert measured(pd.Series([], dtype=float), "%") == "not measured"


def test_few_intervals_are_listed_and_many_counted():
    assert intervals([UP], "%", 3) == "+2.0 [+1.0, +3.0] % (n = 3)"
    assert intervals([UP, OPEN], "%", 3) == "+2.0 [+1.0, +3.0]; +0.5 [-1.0, +2.0] % (n = 3 each)"
    assert intervals([UP, DOWN, OPEN], "points") == "-2.0 to +2.0 points; above 0 in 1, below in 1 of 3"
    assert intervals([UP, DOWN, OPEN], "%", 3) == "-2.0 to +2.0 %; above 0 in 1, below in 1 of 3 (n = 3)"
    assert intervals([Interval(2.0, -math.inf, math.inf)], "%") == "+2.0 % (one seed)"
    assert intervals([], "%") == "not measured"
