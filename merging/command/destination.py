"""Where the result goes: whether a folder can be made there, and whether the same merge stands there already."""

from pathlib import Path

import yaml

from common.command_line import why_not_writable
from merging.command.shards import Output


def destination(out: str | Path, replaced: bool = True) -> Path:
    """Return the folder that --out means, links followed, after checking that it can be written.

    Args:
        out: as the user gave it.
        replaced: whether the finished folder takes its place, and is not written where it stands.

    Raises:
        ValueError: one line that says why nothing can be written there, and what to do.
    """
    try:
        path = Path(out).resolve()
        unfinished = Output(path, ()).work
        for each in (path, unfinished):
            each.exists()  # raises where the name is too long
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a circle of links
        raise ValueError(f"--out {out}: {getattr(error, 'strerror', None) or error}; choose another folder") from None
    if replaced and path.is_mount():
        raise ValueError(f"--out {out}: is where a disk is mounted, and cannot be replaced; name a folder in it")
    if reason := why_not_writable(path.parent if replaced else path):
        raise ValueError(f"--out {out}: {reason}; choose another --out")
    if unfinished.exists() and not unfinished.is_dir():
        raise ValueError(f"--out {out}: {unfinished} is needed while it is written, and is a file; delete that")
    return path


def is_complete(out: Path, made_from: str) -> bool:
    """Return whether the same merge is there already; another one, or anything else in the folder, is refused."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = yaml.safe_load((out / "merging.yaml").read_text(encoding="utf-8"))["identity"]
    except (OSError, yaml.YAMLError, ValueError, RecursionError, TypeError, KeyError):
        raise ValueError(f"{out}: is there and holds no finished merge; choose another --out, or delete it") from None
    if found != made_from:
        raise ValueError(
            f"{out}: holds a merge by another recipe or of other input files; choose another --out, or delete it"
        )
    return True
