"""Merging fine-tuned models by their task vectors, and singular value calibration (SVC, arXiv 2602.05536)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merging.calibration import SVC, calibrate, diagnose
    from merging.mergers import (
        MERGERS,
        Merger,
        dare,
        iso_basis,
        iso_c,
        iso_cts,
        knots,
        lines,
        merger,
        plain_sum,
        star,
        subspace_boost,
        task_arithmetic,
        ties,
        tsv_m,
        weight_average,
        wudi,
        wudi_minimum,
    )
    from merging.norm_matching import norm_match, norm_match_low_rank
    from merging.task_vectors import apply, task_vector, weighted

__all__ = [
    "MERGERS",
    "SVC",
    "Merger",
    "apply",
    "calibrate",
    "dare",
    "diagnose",
    "iso_basis",
    "iso_c",
    "iso_cts",
    "knots",
    "lines",
    "merger",
    "norm_match",
    "norm_match_low_rank",
    "plain_sum",
    "star",
    "subspace_boost",
    "task_arithmetic",
    "task_vector",
    "ties",
    "tsv_m",
    "weight_average",
    "weighted",
    "wudi",
    "wudi_minimum",
]
HOMES = {name: "calibration" for name in ("SVC", "calibrate", "diagnose")} | {
    "apply": "task_vectors",
    "task_vector": "task_vectors",
    "weighted": "task_vectors",
    "norm_match": "norm_matching",
    "norm_match_low_rank": "norm_matching",
}  # the rest is of mergers


def __getattr__(name: str) -> Any:
    """Import what is exported when it is asked for: `python -m merging` reads its flags before PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"merging.{HOMES.get(name, 'mergers')}"), name)
