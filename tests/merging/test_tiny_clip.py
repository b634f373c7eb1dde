"""The tiny CLIP reads names as CLIP does, and has one space for images and names."""

import pytest
import torch

from common.data import glyphs
from merging.suites.models import tiny_clip


def test_names_become_different_token_lines_that_end_in_the_largest_id():
    names = [name for task in glyphs.TASKS for name in glyphs.class_names(task)]
    ids = tiny_clip.tokens(names)
    assert len({tuple(line) for line in ids.tolist()}) == len(names)
    assert (ids.amax(1) == ids.max()).all()


def test_the_tiny_clip_maps_images_and_names_to_one_space():
    model = tiny_clip.tiny_clip(32)
    head = tiny_clip.zero_shot_head(model, glyphs.class_names("digits"))
    features = model.visual(torch.zeros(2, 3, 24, 24))
    assert features.shape == (2, 32) and head.shape == (10, 32)
    assert torch.allclose(head.norm(dim=1), torch.full((10,), 14.0), rtol=1e-4)
    with pytest.raises(ValueError, match="multiple of 32"):
        tiny_clip.tiny_clip(40)
