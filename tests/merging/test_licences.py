"""The licences of the inputs' cards on the output's card."""

import pytest
import yaml
from huggingface_hub import ModelCard
from models_on_disk import experts_of, models, saved, state_of

from merging.command.licences import Licence, licence_warning, read_licence
from merging.command.main import main

APACHE, MIT = "license: apache-2.0", "license: mit"
LLAMA = "license: other\nlicense_name: llama-3-community\nlicense_link: https://example.com/licence"


def merged(tmp_path, *cards):
    """The card that a merge writes whose inputs have these front matters (None: no card)."""
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base, len(cards) - 1))
    for name, card in zip(("base", *(f"e{i}" for i in range(len(others)))), cards, strict=True):
        if card is not None:
            (tmp_path / name / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    assert main(["--base", where, "--experts", *others, "--method", "ties", "--out", str(tmp_path / "out")]) == 0
    return ModelCard.load(tmp_path / "out" / "README.md")


@pytest.mark.parametrize("cards, fields, differ", [
    ((APACHE, APACHE, APACHE), {"license": "apache-2.0"}, False),
    ((LLAMA, LLAMA, LLAMA), yaml.safe_load(LLAMA), False),
    ((APACHE, MIT, APACHE), {"license": ["apache-2.0", "mit"]}, True),
    ((APACHE, LLAMA, MIT), {"license": ["apache-2.0", "other", "mit"]}, True),
    ((LLAMA, LLAMA.replace("llama-3", "llama-4"), LLAMA), {"license": "other"}, True),
    ((APACHE, "language: en", APACHE), {"license": "apache-2.0"}, True),
    ((APACHE, "license: mit: mit", APACHE), {"license": "apache-2.0"}, True),
    ((APACHE, None, APACHE), {"license": "apache-2.0"}, False),
    ((None, None, LLAMA), yaml.safe_load(LLAMA), False),
    ((None, None, None), {}, False),
    (("license: [mit, apache-2.0]", MIT, MIT), {"license": ["mit", "apache-2.0"]}, True),
    (("language: en", "tags: [x]", ""), {}, False),
    (("license: {a: [", "license: mit: mit", "- mit"), {}, False),
])  # fmt: skip
def test_all_licences_are_named_and_a_difference_is_said(tmp_path, cards, fields, differ, capsys):
    card = merged(tmp_path, *cards)
    found = {key: value for key, value in card.data.to_dict().items() if key.startswith("license")}
    assert found == fields
    said = "licences differ (" in capsys.readouterr().err
    assert said == differ == ("licences differ (" in card.text) and str(tmp_path) not in card.content
    for stated in filter(None, cards):
        if "llama" in stated:
            assert yaml.safe_load(stated)["license_name"] in card.text and "https://example.com/licence" in card.text


def test_an_unreadable_card_states_nothing(tmp_path):
    folder = tmp_path / "model"
    saved(folder, state_of())
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")
    assert read_licence(folder) == Licence("") and read_licence(None) is None
    (folder / "README.md").unlink()
    (tmp_path / "elsewhere.md").write_text(f"---\n{MIT}\n---\n")
    (folder / "README.md").symlink_to(tmp_path / "elsewhere.md")
    assert read_licence(folder) == Licence("")
    told = licence_warning({"a": Licence("mit"), "b": None, "c": Licence(""), "d": Licence("mit")})
    assert told.startswith("licences differ (a, d: mit; c: none stated)")
