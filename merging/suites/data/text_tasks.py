"""What a classification task on texts is, whether its texts come from installed packages or from the hub."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Examples:
    """Texts, each a tuple of one field or of two (a pair of sentences), and the target of each."""

    texts: list[tuple[str, ...]]
    targets: list[float]  # index of the class; a number where there are no classes


@dataclass(frozen=True)
class TextTask:
    """A task on texts.

    Args:
        name: short, in lower case.
        classes: names in the order of the targets; () for a regression (STS-B), which is scored by Spearman's ρ.
        split: maps "train", "validation" and "test" to their examples.
        key: for cache keys; changes with the texts.
        template: what a text-to-text model reads: {0} and {1} stand for the fields.
        answers: what it should write for each class; by default the names of the classes.
    """

    name: str
    classes: tuple[str, ...]
    split: Callable[[str], Examples]
    key: str
    template: str = "{0}"
    answers: tuple[str, ...] = ()

    def prompt(self, text: tuple[str, ...]) -> str:
        """Return what a text-to-text model reads."""
        return self.template.format(*text)

    def answer(self, target: float) -> str:
        """Return what a text-to-text model should write; a regression's number is rounded to 0.2, as for T5."""
        if self.classes:
            return (self.answers or self.classes)[int(target)]
        return f"{round(target * 5) / 5:.1f}"
