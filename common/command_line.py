"""What the command lines share: an error in one line, and whether a folder can be written, known before the work."""

import os
import re
import tempfile
from pathlib import Path


def one_line(box: str) -> str:
    """Return the message of the box that tyro draws around an error, as one line without its advice on --help.

    Args:
        box: what tyro has written to stderr.
    """
    title, *lines = box.splitlines()
    sections = re.split(r"[─-]{9,}", re.sub(r"[│╭╮╰╯]", " ", "\n".join(lines)))  # -: where output is not UTF-8
    kept = (" ".join(part.split()) for part in sections if "helptext" not in part)
    kept = (part.partition(" Got errors: ")[0] for part in kept)  # one for each type of a union
    return "; ".join(part for part in kept if part) or title.strip()


def why_not_writable(folder: Path) -> str:
    """Return why no folder can be made at this path, or nothing written into one that is there; "" if it can.

    It is tried, since permissions do not tell all: a process of root has every permission, also where no file system
    takes files. What was tried leaves no trace.
    """
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not there.is_dir():
            return f"{there} is a file, in which no folder can be"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"nothing may be written into {there}"
        with tempfile.TemporaryDirectory(dir=there, prefix=".tried-"):
            return ""
    except OSError as error:
        return f"nothing can be written there ({error.strerror or error})"
