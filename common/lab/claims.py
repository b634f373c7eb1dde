"""A claim of a paper beside what was measured: one row of a result's first table, and of the index of all results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from common.lab.statistics import Interval, spread

NOT_RUN, NO_TESTBED, NOT_PUBLISHED = "not run at this scale", "no testbed", "not published"
WORDS = (  # of a verdict, from yes to no answer
    "reproduced", "direction reproduced", "in part", "not reproduced", NOT_RUN, NO_TESTBED, NOT_PUBLISHED,
)  # fmt: skip
OURS = "not in the paper"  # the source of a question that the paper does not ask
LONGEST = 90  # characters of a claim
MOST = 4  # claims of an experiment


@dataclass(frozen=True)
class Claim:
    """One claim with its answer, by the rule of its experiment.

    Args:
        source: the figure, table or section of the paper, or "not in the paper".
        claim: what is claimed, in one line that is the same at every scale.
        paper: the paper's number as text, or "not published".
        ours: what was measured, "mean ± sd (n)" or with its interval, as text.
        verdict: one of `WORDS`. "not published" where the paper claims nothing: there is nothing to reproduce.

    Raises:
        ValueError: another verdict, a verdict on a claim that is not the paper's, or a claim of more than one line.
    """

    source: str
    claim: str
    paper: str
    ours: str
    verdict: str

    def __post_init__(self) -> None:
        if self.verdict not in WORDS:
            raise ValueError(f"a verdict is one of {', '.join(WORDS)}, got {self.verdict!r}")
        if self.source == OURS and (self.verdict in WORDS[:4] or self.paper != NOT_PUBLISHED):
            raise ValueError(f"what is {OURS} has no number there and cannot be {self.verdict}: {self.claim!r}")
        if len(self.claim) > LONGEST or "\n" in self.claim:
            raise ValueError(f"a claim is one line of at most {LONGEST} characters, got {self.claim!r}")


def word(verdict: str) -> str:
    """Return the word of `WORDS` that a verdict begins with: "in part" for "reproduced in part (holding: a)".

    Raises:
        ValueError: it begins with none of them.
    """
    spelt = {f"reproduced {WORDS[2]}": WORDS[2]} | {name: name for name in WORDS}
    for beginning, name in spelt.items():
        if verdict == beginning or verdict.startswith((f"{beginning} ", f"{beginning}.", f"{beginning}:")):
            return name
    raise ValueError(f"the verdict {verdict!r} begins with none of {', '.join(WORDS)}")


def measured(values: pd.Series, unit: str = "", digits: int = 1) -> str:
    """Return "mean ± sd unit (n = number)" of one number per seed; "not measured" if there is none."""
    values = pd.Series(values).dropna()
    if values.empty:
        return "not measured"
    return f"{spread(values, digits)}{unit and ' '}{unit} (n = {len(values)})"


def intervals(found: Sequence[Interval], unit: str, n: int | None = None) -> str:
    """Return the 95 % intervals of one quantity in several settings: each of up to two, else how they are spread.

    Args:
        found: one interval for each setting.
        unit: of the numbers.
        n: seeds behind each interval, if it is not said elsewhere.
    """
    if not found:
        return "not measured"
    each = f" (n = {n}{' each' * (len(found) > 1)})" if n else ""
    if len(found) < 3 and not any(math.isinf(one.high) for one in found):
        return f"{'; '.join(map(str, found))} {unit}{each}"
    means = [one.mean for one in found]
    if any(math.isinf(one.high) for one in found):
        return f"{_span(means)} {unit} (one seed)"
    above, below = (sum(one.sign == sign for one in found) for sign in (1, -1))
    return f"{_span(means)} {unit}; above 0 in {above}, below in {below} of {len(found)}{each.replace(' each', '')}"


def _span(means: Sequence[float]) -> str:
    low, high = f"{min(means):+.1f}", f"{max(means):+.1f}"
    return low if low == high else f"{low} to {high}"


def where_run(verdict: str, own: str) -> str:
    """Return the word of one claim of several: its own, unless the experiment's verdict is that nothing can be said.

    Args:
        verdict: of the whole experiment, in full.
        own: the word of this claim by the same rule.
    """
    return next((name for name in (NOT_RUN, NO_TESTBED) if verdict.startswith(name)), own)


def of_parts(held: Sequence[bool]) -> str:
    """Return the word for a claim of several parts, each of which the rule holds to be so or not."""
    return "reproduced" if all(held) else "in part" if any(held) else "not reproduced"


def question(text: str, ours: str, verdict: str = "") -> Claim:
    """Return a question that the paper does not ask, with its answer.

    Args:
        text: the question, in one line.
        ours: what was measured.
        verdict: of the whole experiment, in full, which may say that nothing can be said.
    """
    return Claim(OURS, text, NOT_PUBLISHED, ours, where_run(verdict, NOT_PUBLISHED))
