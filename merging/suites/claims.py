"""Answers to the paper's claims about SVC, in the words of `common.lab.claims`, from the rows of `comparison`."""

import pandas as pd

from common.lab.claims import NO_TESTBED, NOT_RUN, Claim, question, where_run
from common.lab.report import published
from merging.suites import comparison, testbed
from merging.suites.comparison import SVC_GAIN, TUNED_GAIN


def signs_in_words(signs: pd.Series, seeds: int) -> str:
    """Return how often intervals lie above and below 0: "above in 5, below in 4 of 54 cells (n = 3)"."""
    above, below = ((signs == sign).sum() for sign in (1, -1))
    return f"above in {above}, below in {below} of {len(signs)} cells (n = {seeds})"


def published_gain(suite: str, backbone: str, method: str) -> str:
    """Return the paper's numbers of a merger without and with SVC: "+13.0 (68.9 → 81.9)"."""
    known, where = published("merging"), (suite, backbone, method)
    base, svc = (comparison.published_accuracy(known, *where, name, peers=False)[0] for name in ("none", "output"))
    return f"{svc - base:+.1f} ({base:.1f} → {svc:.1f})"


def gain_of_one(data: pd.DataFrame, where: dict[str, object], verdict: str, **texts: str) -> Claim:
    """Return a claim on what SVC gains a single merger at its own scale, in one cell.

    The direction is reproduced where the whole 95 % interval lies above 0; how large a gain has to be no rule says.

    Args:
        data: the table.
        where: backbone, suite and method of the cell.
        verdict: of the whole experiment.
        **texts: source, claim and paper of the claim.
    """
    found = comparison.gains(data)
    found = found[found.condition == SVC_GAIN]
    own = found[(found[list(where)] == pd.Series(where)).all(axis=1)]
    if own.empty:
        return Claim(**texts, ours="not measured", verdict=NOT_RUN)
    row = own.iloc[0]
    answer = "direction reproduced" if row.sign == 1 else "not reproduced"
    answer = where_run(verdict, NO_TESTBED if testbed.on_testbeds(data, own).empty else answer)
    return Claim(**texts, ours=f"{row.interval} points (n = {data.seed.nunique()}; {row.backbone})", verdict=answer)


def at_tuned_scales(gains: pd.DataFrame, seeds: int, verdict: str) -> Claim:
    """Return what becomes of SVC's gain where both models have the scale that is best on validation data.

    Args:
        gains: `comparison.gains` of the cells that count.
        seeds: their number.
        verdict: of the whole experiment.
    """
    signs = gains.sign[gains.condition == TUNED_GAIN]
    text = "Does +SVC raise accuracy where both scales are tuned on validation data?"
    return question(text, signs_in_words(signs, seeds), verdict)
