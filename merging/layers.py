"""Which layer a tensor belongs to, and how deep that layer lies, from its name alone.

A tensor's layer is the first number between dots in its name: 3 in "model.layers.3.mlp.experts.7.w1". The layers of
each stem ("model.layers.", "vision.blocks.") are counted by themselves, from 0. Tensors without a number (embeddings,
the head) belong to none.
"""

import re
from collections.abc import Iterable


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return the depth of each tensor, from 0 in the first layer to 1 in the last; 0 for those outside the layers."""
    layers = {name: layer_of(name) for name in names}
    last: dict[str, int] = {}
    for stem, layer in filter(None, layers.values()):
        last[stem] = max(layer, last.get(stem, 0))
    return {name: (at[1] / last[at[0]] if last[at[0]] else 1.0) if at else 0.0 for name, at in layers.items()}


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stem and the number of the layer that a tensor belongs to, or None for one outside the layers."""
    found = re.match(r"(.*?)(?<![^.])(\d+)\.", name)
    return (found[1], int(found[2])) if found else None
