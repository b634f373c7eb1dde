"""What a merger decides over all tensors together before it can merge one, as TIES does: read from the plan's files."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from merging.command.changes import ranges
from merging.command.plan import Plan
from merging.mergers import merger


def decided_together(
    plan: Plan, device: torch.device, every: Callable[[Callable, Iterable], Iterable] = map
) -> Any | None:
    """Return what the plan's merger decides over all merged tensors together (global TIES), or None.

    Args:
        plan: what becomes of each tensor.
        device: where it is computed.
        every: map, or one over several threads.

    Raises:
        ValueError: a pattern gives some tensors other options than the rest, of those that decide.
    """
    own = merger(plan.recipe.method)
    if own.by_rows is None or own.by_rows.decide is None:
        return None
    steps = plan.merged
    options = [own.options | step.of_merger(plan.recipe.method) for step in steps]
    together = [own.by_rows.together(**each) for each in options]
    if not any(together):
        return None
    if odd := [step.name for step, each in zip(steps, together, strict=True) if each != together[0]]:
        same = " and one ".join(next(filter(None, together)))
        raise ValueError(f"{odd[0]!r}: global {own.title} has one {same} for all tensors; set them with '*'")
    tensors = [ranges(step, piece, device) for step in steps for piece in step.pieces]
    return own.by_rows.decide(tensors, every, **options[0])
