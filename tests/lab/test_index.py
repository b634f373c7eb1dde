"""The pages over all results: each claim once, at the largest scale that answers it."""

import json

import pytest

from common.lab import index
from common.lab.results import RESULTS


def facts(experiment: str, scale: str, *verdicts: str, **changes):
    """A provenance with one claim for each verdict: claim 0, claim 1, …"""
    claims = [
        dict(source="Table 1", claim=f"claim {number}", paper="+13", ours=f"+{number} at {scale}", verdict=verdict)
        for number, verdict in enumerate(verdicts)
    ]
    lead = {"figure": "curve", "caption": "A curve."}
    known = dict(experiment=experiment, scale=scale, partial=False, seeds=[0, 1, 2], verdict="long", claims=claims)
    return known | dict(lead=lead, commit="0123456789abcdef", date="2026-11-27T00:00:00") | changes


def test_a_claim_stands_at_the_largest_scale_that_answers_it():
    laptop = facts("22_merging", "laptop", "in part", "reproduced")
    workstation = facts("22_merging", "workstation", "reproduced", "not run at this scale")
    smoke = facts("22_merging", "smoke", "not run at this scale", "not run at this scale")
    first, second = index.rows([smoke, laptop, workstation])
    assert (first.claim, first.scale, first.verdict, first.ours) == (
        "claim 0",
        "workstation",
        "reproduced",
        "+0 at workstation",
    )
    assert first.others == ("laptop",) and first.page == "22_merging/workstation/README.md"
    assert first.figure == "22_merging/workstation/curve.png" and first.caption == "A curve."
    assert (second.scale, second.verdict, second.others) == ("laptop", "reproduced", ("workstation",))


def test_a_claim_that_no_scale_answers_stands_at_the_largest():
    given = [facts("22_merging", scale, "not run at this scale") for scale in ("laptop", "paper")]
    (row,) = index.rows(given)
    assert (row.scale, row.verdict) == ("paper", "not run at this scale")


def test_partial_runs_are_no_evidence():
    assert index.rows([facts("22_merging", "paper", "reproduced", partial=True)]) == []


@pytest.mark.parametrize(
    ("name", "beginning"), [("03_vit", "Towards"), ("11_cost", "Towards"), ("21_a", "When Shared"), ("90_x", "Further")]
)
def test_the_number_of_an_experiment_says_to_which_paper_it_belongs(name, beginning):
    assert index.paper_of(name).startswith(beginning)


def test_the_overview_groups_claims_by_paper_and_links_each():
    text = index.overview(
        [facts("22_merging", "laptop", "in part", "reproduced"), facts("03_vit", "paper", "reproduced")]
    )
    first, second = text.index("## Towards"), text.index("## When Shared")
    assert first < text.index("[paper](03_vit/paper/README.md)") < second
    assert text.index("[laptop](22_merging/laptop/README.md)") > second
    assert text.count('<img src="22_merging/laptop/curve.png" width="120" alt="22_merging: curve">') == 1
    assert "| Table 1  | claim 1 | +13     | +1 at laptop | **reproduced** |" in text


def test_results_without_a_claim_are_named_and_none_are_said_to_be_none():
    text = index.overview([facts("22_merging", "laptop")])
    assert "Without a claim: [22_merging](22_merging/README.md)." in text
    assert "No results yet." in index.overview([])


def test_the_page_of_an_experiment_lists_its_scales():
    text = index.experiment_page(
        "Title\nof it", [facts("22_m", "laptop", "in part"), facts("22_m", "workstation", "reproduced")]
    )
    assert text.startswith("# 22_m\n\nTitle of it\n\n")
    assert "| [laptop](laptop/README.md)           | 3       | in part    | 0123456789 | 2026-11-27 |" in text
    assert "| Table 1  | claim 0 | +13     | +0 at workstation | reproduced | workstation |" in text
    assert "![curve](workstation/curve.png)" in text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("[0-9]*/*/provenance.json")), ids=lambda path: path.parts[-3])
def test_what_was_measured_fits_into_a_cell(path):
    cells = [claim["ours"] for claim in json.loads(path.read_text()).get("claims", ())]
    assert [cell for cell in cells if len(cell) > 60] == []
