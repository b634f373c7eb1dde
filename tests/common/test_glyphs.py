"""The glyph suite: what a researcher would check before believing a number measured on it."""

import pytest
import torch

from common.data import glyphs


def test_twenty_tasks_of_559_different_named_classes():
    names = [name for task in glyphs.TASKS for name in glyphs.class_names(task)]
    assert len(glyphs.TASKS) == 20 and len(names) == len(set(names)) == 559
    assert glyphs.class_names("digits")[3] == "DIGIT THREE"


def test_splits_are_disjoint_designs_and_obliques_stay_with_their_uprights():
    design = {face: face.replace("Oblique", "").replace("Italic", "").rstrip("-") for split in glyphs.FACES.values()
              for face in split if "DejaVu" in face}  # fmt: skip
    sides = [{design.get(face, face) for face in faces} for faces in glyphs.FACES.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


@pytest.mark.parametrize("split", glyphs.FACES)
def test_every_class_is_in_every_split(split):
    drawn = glyphs.glyphs(["digits", "math"], split)
    assert set(drawn.labels.tolist()) == set(range(42)) and drawn.images.dtype == torch.uint8
    assert drawn.images.flatten(1).amax(1).min() > 100  # no glyph is blank


def test_photographs_are_fixed_by_their_seed():
    drawn = glyphs.glyphs(["digits"], "test")
    first, labels = glyphs.photographs(drawn, glyphs.SHIFTED, 2, seed=1)
    second, _ = glyphs.photographs(drawn, glyphs.SHIFTED, 2, seed=1)
    other, _ = glyphs.photographs(drawn, glyphs.SHIFTED, 2, seed=2)
    assert first.shape == (2 * len(drawn.labels), 3, 24, 24) and labels.shape == (len(first),)
    assert first.equal(second) and not first.equal(other)


def test_a_style_without_randomness_only_draws_the_glyph():
    still = glyphs.Style(0, 0, 0, 0, 0, 0, 0, 0, 0)
    drawn = glyphs.glyphs(["digits"], "test")
    images = glyphs.photograph(drawn.images, still, torch.Generator().manual_seed(0))
    again = glyphs.photograph(drawn.images, still, torch.Generator().manual_seed(1))
    assert images.equal(again) and images.min() >= -1 and images.max() <= 1


def test_the_half_tone_darkens_every_second_pixel_and_the_slant_moves_the_top_against_the_bottom():
    white = torch.full((1, 64, 64), 255, dtype=torch.uint8)
    still = dict(rotation=0, shear=0, scale=0, shift=0, noise=0, contrast=0, inversion=0, blur=0, stroke=0)
    image = glyphs.photograph(white, glyphs.Style(**still, halftone=0.5), torch.Generator())[0, 0]
    assert image[0, 0] == 1 and image[0, 1] == 0 and image[1, 0] == 0
    bar = torch.zeros(1, 64, 64, dtype=torch.uint8)
    bar[:, :, 30:34] = 255
    slanted = glyphs.photograph(bar, glyphs.Style(**still, slant=0.5), torch.Generator())[0, 0]
    centre = (slanted + 1) @ torch.arange(24.0) / (slanted + 1).sum(1)
    assert centre[4] > centre[12] > centre[20]


@pytest.mark.parametrize("call", [lambda: glyphs.characters("runes"), lambda: glyphs.glyphs(["digits"], "dev")])
def test_unknown_names_are_refused_with_the_known_ones(call):
    with pytest.raises(ValueError, match="there are"):
        call()


def test_every_task_has_a_domain_of_its_own_of_the_same_strength():
    styles = [glyphs.own_style(task, 0.5, 0.3) for task in glyphs.TASKS]
    assert len(set(styles)) == 20 and {abs(style.slant) for style in styles} == {0.25, 0.5}
    darkened = {
        tuple(torch.nonzero(glyphs._screen(style.screen, torch.device("cpu"))).flatten().tolist()) for style in styles
    }
    assert len(darkened) == len(glyphs.SCREENS)
    with pytest.raises(ValueError, match="unknown glyph task 'runes'"):
        glyphs.own_style("runes", 0.5, 0.3)


@pytest.mark.parametrize("screen", glyphs.SCREENS)
def test_a_screen_darkens_a_third_or_half_of_the_pixels_as_its_formula_says(screen):
    down, along, period = screen
    naive = torch.zeros(24, 24)
    for i in range(24):
        for j in range(24):
            naive[i, j] = float((down * i + along * j) % period >= period / 2)
    assert glyphs._screen(screen, torch.device("cpu")).equal(naive) and 0.3 < naive.mean() <= 0.5


def test_faces_of_merged_experts_are_disjoint_and_their_test_faces_are_the_same():
    sides, wide = [set(faces) for faces in glyphs.WIDE_VALIDATION.values()], glyphs.WIDE_VALIDATION
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert set.union(*sides) == set().union(*glyphs.FACES.values()) and wide["test"] == glyphs.FACES["test"]
    assert [len(faces) for faces in glyphs.FACES.values()] == [9, 2, 5]
    assert [len(faces) for faces in wide.values()] == [8, 3, 5]
