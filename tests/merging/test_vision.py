"""A suite scores models as one would by hand, and refuses what it does not have."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.data import glyphs
from merging.suites import vision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def suite():
    return vision.suite("glyph-32", 2, 0, vision.SMOKE, CPU)


def by_hand(suite, state, task):
    position = suite.tasks.index(task)
    suite.encoder.load_state_dict(state)
    images, labels = (torch.cat(parts) for parts in zip(*suite.batches(task, "test"), strict=True))
    with torch.no_grad():
        return (F.normalize(suite.encoder(images), dim=-1) @ suite.networks[position].head.T).argmax(1) == labels


def test_rows_are_accuracies_and_counts_of_pairs(suite):
    labelled = [({"method": "base"}, suite.pretrained), ({"method": "expert"}, suite.experts[0])]
    rows = list(suite.rows(labelled, [{"": 0, "_over_tuned": 1}] * 2))
    assert [row["task"] for row in rows] == ["digits", "digits", "latin_upper", "latin_upper"]
    for base, expert in (rows[:2], rows[2:]):
        first, second = (by_hand(suite, state, base["task"]) for _, state in labelled)
        assert base["value"] == pytest.approx(100 * first.float().mean().item()) and base["images"] == len(first)
        assert expert["gained"] == int((second & ~first).sum()) == base["lost_over_tuned"]
        assert expert["lost"] == int((first & ~second).sum()) == base["gained_over_tuned"]
        assert base["gained"] == base["lost"] == expert["gained_over_tuned"] == 0


def test_scores_are_means_over_tasks_and_experts_are_scored_on_their_own(suite):
    own = list(suite.own_rows())
    labels = [(row["method"], row["task"]) for row in own]
    assert labels == [(method, task) for method in ("pretrained", "expert") for task in ("digits", "latin_upper")]
    assert suite.scores([suite.pretrained]) == pytest.approx([(own[0]["value"] + own[1]["value"]) / 2])
    assert own[3]["value"] == pytest.approx(100 * by_hand(suite, suite.experts[1], "latin_upper").float().mean().item())


def test_experts_start_from_the_base_and_differ_from_it_and_from_each_other(suite):
    assert suite.experts[0].keys() == suite.experts[1].keys() == suite.pretrained.keys()
    weight = "transformer.resblocks.0.mlp.c_fc.weight"
    assert not suite.experts[0][weight].equal(suite.experts[1][weight])
    assert (suite.experts[0][weight] - suite.pretrained[weight]).abs().max() < 0.01


def test_a_seed_changes_the_experts_and_not_the_base(suite):
    other = vision.suite("glyph-32", 2, 1, vision.SMOKE, CPU)
    assert other.key != suite.key
    assert all(other.pretrained[name].equal(tensor) for name, tensor in suite.pretrained.items())
    assert not other.experts[0]["proj"].equal(suite.experts[0]["proj"])


@pytest.mark.parametrize(
    ("backbone", "tasks", "message"),
    [
        ("glyph-40", 2, "multiple of 32"),
        ("glyph-x", 2, "multiple of 32"),
        ("glyph-32", 21, "1 to 20 tasks"),
        ("ViT-H/14", 8, "unknown backbone"),
        ("ViT-B/32", 21, "1 to 20 tasks"),
    ],
)
def test_what_there_is_not_is_refused_by_name(backbone, tasks, message):
    with pytest.raises(ValueError, match=message):
        vision.suite(backbone, tasks, 0, vision.SMOKE, CPU)


@pytest.mark.parametrize(("wide", "copies"), [(False, 64), (True, 128)])
def test_experts_and_scales_see_the_faces_of_the_recipe(wide, copies, tmp_path, monkeypatch):
    recipe, seen = replace(vision.SMOKE.at("glyph-32"), wide_validation=wide), []
    drawn = glyphs.glyphs

    def spy(tasks, split, faces=glyphs.FACES):
        seen.append((split, tuple(faces[split])))
        return drawn(tasks, split, faces)

    monkeypatch.setattr("common.cache.CACHE", tmp_path)
    monkeypatch.setattr(glyphs, "glyphs", spy)
    suite = vision.glyph_suite(recipe, 1, 0, CPU)
    scored = ("validation", "test")
    sizes = {split: sum(len(labels) for _, labels in suite.batches("digits", split)) for split in scored}
    expected = glyphs.WIDE_VALIDATION if wide else glyphs.FACES
    splits = [(split, expected[split]) for split in ("train", *scored)]
    assert seen == [("train", glyphs.FACES["train"]), *splits]  # the base's own faces come first
    each = 10 * len(expected["validation"])  # ten digits in every face
    assert sizes == {"validation": round(copies / each) * each, "test": 2 * 10 * 5}


def test_the_split_of_faces_is_a_part_of_the_keys_and_leaves_the_base_as_it_is(suite):
    other = vision.suite("glyph-32", 2, 0, replace(vision.SMOKE, wide_validation=True), CPU)
    assert other.key != suite.key and not other.experts[0]["proj"].equal(suite.experts[0]["proj"])
    assert all(other.pretrained[name].equal(tensor) for name, tensor in suite.pretrained.items())
