"""Handwritten digits of scikit-learn (1,797 images of 8 × 8, from UCI), with a split of our own. No download."""

from functools import cache

import torch
from torch import Tensor

CLASSES = 10
SIZES = {"train": 1197, "validation": 200, "test": 400}
SPLIT_SEED = 0


@cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return a split's images (N, 1, 8, 8) in [−1, 1] and labels (N,); each digit has the same share of every split.

    Raises:
        ValueError: the split is unknown.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in SIZES:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SIZES)}")
    bunch = load_digits()
    rest, test = train_test_split(
        range(len(bunch.target)), test_size=SIZES["test"], random_state=SPLIT_SEED, stratify=bunch.target
    )
    train, validation = train_test_split(
        rest, test_size=SIZES["validation"], random_state=SPLIT_SEED, stratify=bunch.target[rest]
    )
    chosen = {"train": train, "validation": validation, "test": test}[split]
    images = torch.from_numpy(bunch.images[chosen]).float()[:, None] / 8 - 1  # grey levels are 0 to 16
    return images, torch.from_numpy(bunch.target[chosen]).long()
