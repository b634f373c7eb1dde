"""README and manuals: Python snippets run one after the other, as a reader would paste them, and lists are whole."""

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from merging.suites.data import hub_texts, vision_tasks
from sparsity.studies.data import pictures

ROOT = Path(__file__).resolve().parents[1]
MANUALS = ("README.md", "sparsity/README.md", "merging/README.md", "common/README.md")


@pytest.mark.parametrize("manual", MANUALS)
def test_snippets(manual, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(ROOT / manual)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
    if manual in ("README.md", "merging/README.md"):
        assert document.namespace["model"].keys() == document.namespace["pretrained"].keys()


def test_the_readme_is_read_in_three_minutes():
    assert (ROOT / "README.md").stat().st_size <= 9000


@pytest.mark.parametrize("page", [*MANUALS, "experiments/README.md", "results/FINDINGS.md", "results/SCOPE.md"])
def test_links_lead_to_files_and_headings(page):
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        assert not file or (path.parent / file).exists(), f"{page}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", (path.parent / file if file else path).read_text("utf-8"), re.MULTILINE)
            known = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
            assert heading in known, f"{page}: {target}"


def test_every_experiment_is_on_the_map():
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "experiments").glob("[0-9]*.py")}
    assert scripts == set(re.findall(r"\]\((\d\d_\w+\.py)\)", text))


def test_what_could_not_be_confirmed_is_listed():
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    listed = [line[2:] for line in text.splitlines() if line.startswith("- ")]
    known = [*vision_tasks.unverified(), *pictures.unverified(), *hub_texts.unverified()]
    assert sorted(line for line in listed if not line.startswith("C4 ")) == sorted(known)
