"""The Python snippets of the README run, one after the other, as a reader would paste them."""

from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

README = Path(__file__).resolve().parents[1] / "README.md"


def test_snippets():
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(README)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
    assert document.namespace["model"].keys() == document.namespace["pretrained"].keys()
