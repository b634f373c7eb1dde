"""Progress bars where nobody watches: a log gets a line now and then, not thousands of states of one line."""

import contextlib
import sys
from collections.abc import Iterator
from functools import partialmethod
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines of a bar


class _Lines:
    """A stream to which tqdm writes states of a bar, and which passes each on as a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        """Pass on what is left of `text` without the controls that overwrite a line of a terminal."""
        if line := text.replace("\r", "").strip():
            self.stream.write(f"{line}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def log_bars() -> Iterator[None]:
    """Inside, all bars of tqdm, also those of other packages, suit what stderr is.

    On a terminal they stay as they are. Elsewhere a bar says nothing in its first `EVERY` seconds, and then writes at
    most one line in as many.
    """
    if sys.stderr.isatty():
        yield
        return
    drawn = tqdm.__init__
    options = dict(file=_Lines(sys.stderr), mininterval=EVERY, miniters=1, delay=EVERY, position=0)
    tqdm.__init__ = partialmethod(drawn, **options)  # tqdm reads TQDM_MININTERVAL only when it is imported
    try:
        yield
    finally:
        tqdm.__init__ = drawn
