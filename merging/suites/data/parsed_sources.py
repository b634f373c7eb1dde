"""Python sources that every machine has, parsed, and the place that a hash gives to a text: tasks are made of these."""

import ast
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator

from common.data import text

FILE_BYTES = 150_000  # longer files are generated, or tables
# "base" is what a model may be trained on before it is fine-tuned on "train"
SHARES = {"test": 0.2, "validation": 0.1, "base": 0.2, "train": 0.5}  # of the files


def parsed_sources(most: int) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield module path, content and syntax tree of at most `most` files of each package, in the order of their hash.

    Args:
        most: files of one package; torch alone has thousands.
    """
    taken = Counter()
    for name, path in sorted(text.source_files(), key=lambda item: number(item[0])):
        package = name.split("/")[0]
        if taken[package] == most or path.stat().st_size > FILE_BYTES:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of invalid escapes in others' code
                content = path.read_bytes().decode()
                tree = ast.parse(content)
        except (SyntaxError, ValueError):  # templates, and other encodings
            continue
        taken[package] += 1
        yield name, content, tree


def split_of_file(name: str) -> str:
    """Return the split of a source file, by its module path."""
    return split_of(f"{name}/split")


def split_of(words: str) -> str:
    """Return the split in which the hash of a text places it."""
    return text.split_at(number(words) / 2**32, SHARES)


def number(words: str) -> int:
    """Return a number in [0, 2³²), a hash of the words."""
    return int(hashlib.sha256(words.encode()).hexdigest()[:8], 16)
