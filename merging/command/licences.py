"""Licences: what the cards of the merged models state, brought together on the card of the output.

A merge is made from all of its models, so that it stands under all of their licences at once. Which terms that leaves
is for the user to judge; where cards state different licences, or one states none, that is said. A model without a
card, as training leaves it in a folder, says nothing about its licence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.checkpoints import Checkpoint
from merging.command.plan import Plan
from merging.weight_files import within


@dataclass(frozen=True)
class Licence:
    """The licence fields at the top of a model's card."""

    id: str  # as the Hub spells it: apache-2.0, llama3.1, …, or other; "" where the card states none
    name: str = ""  # of one that the Hub has no id for
    link: str = ""

    def __str__(self) -> str:
        """Return it for a table: its name in place of "other", with the link."""
        name = f"{self.id} ({self.name})" if self.name else self.id or "none stated"
        return f"{name}, {self.link}" if self.link else name


def licences(plan: Plan) -> dict[str, Licence | None]:
    """Return each model's licence by the name that the user gave it; None for one without a card."""
    models = zip((plan.recipe.base, *plan.recipe.experts), (plan.base, *plan.experts), strict=True)
    return {given: read_licence(_folder(model)) for given, model in models}


def _folder(model: Any) -> Path | None:
    if isinstance(model, Checkpoint):
        return model.folder
    return model.files[0].parent if model.files else None


def read_licence(folder: Path | None) -> Licence | None:
    """Return what README.md in a folder states, None where there is none; a card that is broken states nothing."""
    try:
        card = within(folder, "README.md") if folder else None
        if card is None or not card.is_file():
            return None
        from huggingface_hub import ModelCard

        stated = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a card is free text, which can break its reader in any way
        return Licence("")
    ids = stated.get("license")
    ids = [str(each) for each in (ids if isinstance(ids, list) else [ids]) if each]
    name, link = (str(stated.get(key) or "") for key in ("license_name", "license_link"))
    return Licence(", ".join(ids), name, link) if ids else Licence("")


def licence_fields(found: Mapping[str, Licence | None]) -> dict[str, Any]:
    """Return the licence fields of the output's card: all ids, and name and link where there is one licence only."""
    stated = list(dict.fromkeys(licence for licence in found.values() if licence and licence.id))
    ids = list(dict.fromkeys(each for licence in stated for each in licence.id.split(", ")))
    fields: dict[str, Any] = {"license": ids[0] if len(ids) == 1 else ids} if ids else {}
    if len(stated) == 1:
        fields |= {f"license_{key}": value for key in ("name", "link") if (value := getattr(stated[0], key))}
    return fields


def licence_warning(found: Mapping[str, Licence | None]) -> str | None:
    """Return what to warn of, None where all cards state the same licence, or none of them any."""
    groups: dict[Licence, list[str]] = {}
    for given, licence in found.items():
        if licence:
            groups.setdefault(licence, []).append(given)
    if len(groups) < 2:
        return None
    told = "; ".join(f"{', '.join(givens)}: {licence}" for licence, givens in groups.items())
    return f"licences differ ({told}): the merge stands under all of them; check that they allow it"
