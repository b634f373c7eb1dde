"""results/index.html is one well-formed page that loads nothing from elsewhere, with a row for each claim."""

import re
from html.parser import HTMLParser

import pytest

from common.lab import index_page
from common.lab.claims import WORDS

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and whether all of them are closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def facts(experiment: str, scale: str, *verdicts: str):
    claims = [
        dict(source="Table <1>", claim=f"is a < {number}?", paper="+13", ours='"2" & more', verdict=verdict)
        for number, verdict in enumerate(verdicts)
    ]
    lead = {"figure": "a_curve", "caption": 'A "curve".'}
    return dict(experiment=experiment, scale=scale, partial=False, claims=claims, lead=lead)


@pytest.fixture
def text() -> str:
    return index_page.overview(
        [
            facts("03_vit", "laptop", *WORDS),
            facts("22_merging", "laptop", "in part"),
            facts("22_merging", "paper", "in part"),
        ]
    )


def test_every_claim_is_a_row_that_the_filters_know(text):
    rows = [row for row in Page(text).all("tr") if "data-verdict" in row]
    assert [row["data-verdict"] for row in rows] == [*WORDS, "in part"]
    assert [row["data-scale"] for row in rows] == ["laptop"] * len(WORDS) + ["paper"]
    options = [option["value"] for option in Page(text).all("option")]
    assert {value for row in rows for value in (row["data-paper"], row["data-scale"], row["data-verdict"])} <= {
        *options
    }
    assert options.count("") == len(Page(text).all("select")) == 3
    assert "is a &lt; 0?" in text and "Table &lt;1&gt;" in text and '"2" & more' not in text


def test_nothing_comes_from_elsewhere(text):
    page = Page(text)
    named = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert named and not [value for value in named if re.match(r"(https?:)?//|/", value)]
    assert not page.all("link") and not re.search(r"url\(|@import|fetch\(", text)
    assert [script for script in page.all("script") if script] == []


def test_figures_enlarge_and_have_a_text(text):
    page = Page(text)
    thumbs = [link for link in page.all("a") if link.get("class") == "thumb"]
    assert (
        thumbs[-1]["href"] == "22_merging/paper/a_curve.png" and thumbs[-1]["data-page"] == "22_merging/paper/README.md"
    )
    assert thumbs[-1]["data-caption"] == '22_merging, paper. A "curve".'
    assert {image["alt"] for image in page.all("img")} == {
        "",
        'a curve: A "curve".',
    }  # the empty one is filled on opening
    assert len(page.all("dialog")) == 1 and all("aria-label" in one for one in page.all("dialog"))


def test_it_follows_the_readers_scheme_and_a_small_screen(text):
    assert "prefers-color-scheme: dark" in text and "max-width: 62rem" in text and "width=device-width" in text


def test_verdicts_on_the_papers_claims_are_counted(text):
    tiles = re.findall(r'<dt>([^<]*)</dt><dd class="value">(\d+)</dd>', text)
    assert dict(tiles) == dict.fromkeys(WORDS, "1") | {"in part": "2"}


def test_without_results_there_is_a_page_all_the_same():
    assert Page(index_page.overview([])).all("h1")
