"""Experts that change nothing, or that are given twice: they are merged as they are given, and that is said.

A copy is told by its bytes: by the files themselves, by a few blocks of each, and only where all of these agree by
reading both to the end. Values that are equal in files which differ (another dtype, other shards) are found where the
sizes of updates are measured anyway, for a report.
"""

import filecmp
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from merging.checkpoints import Checkpoint
from merging.peft_files import Adapter

SAMPLES, BLOCK = 64, 4096  # of a file: blocks that are compared first, and bytes of each
NOTHING, TWICE = "an update of zero, which counts as an expert and dilutes means", "one expert that counts twice"


def repeats(names: Sequence[str], base: Checkpoint, experts: Sequence[Checkpoint | Adapter]) -> dict[int, str]:
    """Return a line for each expert that is the base itself, trained nothing, or is another one again, by its index.

    Args:
        names: of the experts, as the user gave them.
        base: the base.
        experts: models, or adapters.
    """
    said = {}
    for index, (name, expert) in enumerate(zip(names, experts, strict=True)):
        if isinstance(expert, Adapter) and _is_idle(expert):
            said[index] = f"{name}: is an adapter that changes nothing: {NOTHING}"
        elif _same(expert.files, base.files):
            said[index] = f"{name}: is the base itself: {NOTHING}"
    for i, j in combinations(range(len(names)), 2):
        if j not in said and _same(experts[i].files, experts[j].files):
            said[j] = (
                f"{names[j]}: {'is given twice' if names[i] == names[j] else f'is the same as {names[i]}'}: {TWICE}"
            )
    return said


def unmoved(names: Sequence[str], moves: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return a line for each expert that moved no tensor, or whose updates are those of another, by its index.

    Args:
        names: of the experts.
        moves: of all merged tensors (`merging.command.findings.moves`).
    """
    products = np.array([each["products"] for each in moves]).reshape(-1, len(names), len(names))
    said = {i: f"{name}: moved no tensor: {NOTHING}" for i, name in enumerate(names) if not products[:, i, i].any()}
    for i, j in combinations(range(len(names)), 2):
        alike = (products[:, i, i] == products[:, i, j]) & (products[:, i, j] == products[:, j, j])
        if j not in said and alike.all():
            said[j] = f"{names[j]}: moved every tensor as {names[i]} did: {TWICE}"
    return said


def _is_idle(adapter: Adapter) -> bool:
    """Return whether an adapter leaves its base as it is: LoRA with a factor of zeros, IA³ of ones."""
    pairs = (bool(each.up.read().any() and each.down.read().any()) for each in adapter.modules.values())
    vectors = (bool((each.read() != 1).any()) for each in adapter.vectors.values())
    return not (adapter.values or any(pairs) or any(vectors))


def _same(files: Sequence[Path], others: Sequence[Path]) -> bool:
    pairs = list(zip(files, others, strict=False))
    return len(files) == len(others) and all(
        all(agree(file, other) for file, other in pairs) for agree in (_agree_in_size, _agree_in_blocks, _agree)
    )


def _agree_in_size(file: Path, other: Path) -> bool:
    return file.stat().st_size == other.stat().st_size


def _agree_in_blocks(file: Path, other: Path) -> bool:
    if file.samefile(other):
        return True
    size = file.stat().st_size
    with file.open("rb") as ours, other.open("rb") as theirs:
        for start in np.linspace(0, max(0, size - BLOCK), SAMPLES).astype(int).tolist():
            ours.seek(start)
            theirs.seek(start)
            if ours.read(BLOCK) != theirs.read(BLOCK):
                return False
    return True


def _agree(file: Path, other: Path) -> bool:
    return file.samefile(other) or filecmp.cmp(file, other, shallow=False)
