"""Merging fine-tuned models by their task vectors, and singular value calibration (SVC, arXiv 2602.05536)."""

from merging.calibration import SVC, calibrate, diagnose
from merging.mergers import (
    MERGERS,
    Merger,
    dare,
    iso_basis,
    iso_c,
    iso_cts,
    merger,
    plain_sum,
    star,
    task_arithmetic,
    ties,
    tsv_m,
    weight_average,
)
from merging.norm_matching import norm_match, norm_match_low_rank
from merging.task_vectors import apply, task_vector

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
    "merger",
    "norm_match",
    "norm_match_low_rank",
    "plain_sum",
    "star",
    "task_arithmetic",
    "task_vector",
    "ties",
    "tsv_m",
    "weight_average",
]
