"""Span corruption against its definition, token by token; and the task that a T5 learns from it."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from common import cache
from common.data import text
from common.models.t5 import t5
from common.training import TrainingRecipe, fit
from sparsity.studies.data.corruption import Shape, corrupt, shape_for
from sparsity.studies.span_corruption import SpanCorruption, Windows, span_corruption_task

CPU = torch.device("cpu")
TINY = SpanCorruption(length=24, width=16, depth=1, heads=2, d_ff=32, megabytes=0.05, evaluation_rows=150)
RECIPE = TrainingRecipe(steps=30, batch_size=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "CACHE", tmp_path_factory.mktemp("cache"))
        text.corpus.cache_clear()
        yield span_corruption_task(TINY, CPU)
    text.corpus.cache_clear()


# Corruption ----------------------------------------------------------------------------------------------------------


def spelled_out(inputs, targets, sentinels):
    """Read a target's spans and put them back into the input; also the spans themselves, in order."""
    assert inputs[-1] == targets[-1] == text.END
    spans, order = {}, []
    for token in targets[:-1]:
        if token >= sentinels - 100:
            order.append(token)
            spans[token] = []
        else:
            spans[order[-1]].append(token)
    raw = []
    for token in inputs[:-1]:
        raw.extend(spans.pop(token) if token >= sentinels - 100 else [token])
    assert not spans
    return raw, order


@settings(deadline=None, derandomize=True, max_examples=80)
@given(raw=st.integers(2, 90), share=st.floats(0.01, 0.7), seed=st.integers(0, 2**62), data=st.data())
def test_target_and_input_hold_the_row_between_them(raw, share, seed, data):
    noise = min(max(round(share * raw), 1), raw - 1)
    shape = Shape(raw, noise, data.draw(st.integers(1, min(noise, raw - noise))))
    rows = torch.randint(3, 400, (5, raw), generator=torch.Generator().manual_seed(seed))
    inputs, targets = corrupt(rows, range(7, 12), shape, sentinels=500, seed=seed)
    assert inputs.shape == (5, shape.input) and targets.shape == (5, shape.target)
    assert inputs.dtype == targets.dtype == torch.int64
    for row, kept, gone in zip(rows.tolist(), inputs.tolist(), targets.tolist(), strict=True):
        rebuilt, order = spelled_out(kept, gone, 500)
        assert rebuilt == row and order == [499 - span for span in range(shape.spans)]
        assert kept[0] < 400 and gone[0] == 499  # a row begins with a kept span, and ends with noise:
        assert kept[-2] == 500 - shape.spans


def test_a_rows_corruption_depends_on_seed_and_index_alone():
    shape = shape_for(64)
    rows = torch.randint(3, 259, (6, shape.raw))
    inputs, targets = corrupt(rows, [5, 0, 7, 99, 10**9, 2], shape, 262, seed=3)
    for row, index in enumerate([5, 0, 7, 99, 10**9, 2]):
        alone = corrupt(rows[row : row + 1], [index], shape, 262, seed=3)
        assert torch.equal(alone[0][0], inputs[row]) and torch.equal(alone[1][0], targets[row])
    same_rows = rows[:1].expand(2000, -1)
    across_indices = corrupt(same_rows, range(2000), shape, 262, seed=3)[0]
    across_seeds = torch.cat([corrupt(rows[:1], [5], shape, 262, seed)[0] for seed in range(200)])
    assert len(across_indices.unique(dim=0)) > 1900 and len(across_seeds.unique(dim=0)) > 195


def test_all_ways_to_place_the_spans_are_equally_likely():
    shape, draws = Shape(raw=9, noise=4, spans=2), 12_000
    rows = torch.arange(10, 19).expand(draws, -1)
    inputs, _ = corrupt(rows, range(draws), shape, 100, seed=0)
    counts = Counter(tuple(row) for row in inputs.tolist())
    ways = math.comb(4, 1) * math.comb(3, 1)  # two kept spans of 5 tokens, two noisy ones of 4
    assert len(counts) == ways
    squares = sum((count - draws / ways) ** 2 / (draws / ways) for count in counts.values())
    assert squares < 31.3  # chi-square of 11 degrees of freedom, p = .001


def naive_shape(length):
    """The longest raw text whose input fits, tried one by one as T5's code does it."""
    fitting = None
    for raw in range(2, 2 * length + 10):
        noise = min(max(round(raw * 0.15), 1), raw - 1)
        spans = max(round(noise / 3), 1)
        if raw - noise + spans + 1 <= length:
            fitting = Shape(raw, noise, spans)
    return fitting


def test_shapes_are_t5s():
    assert (shape_for(512).raw, shape_for(512).input, shape_for(512).target) == (568, 512, 114)
    assert (shape_for(64).raw, shape_for(64).input, shape_for(64).target) == (70, 64, 14)
    for length in range(3, 700):
        found = shape_for(length)
        assert found == naive_shape(length) and found.input == length  # so nothing is padded
    dense = shape_for(100, noise=0.6, mean_span=1.0)  # more spans than kept tokens there cannot be
    assert dense.spans == dense.raw - dense.noise and dense.input == 2 * dense.spans + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((2,), "length must be at least 3 .*got 2"),
        ((64, 0.0), "noise must be in .0, 1. .* got 0.0"),
        ((64, 0.15, 0.5), "mean_span at least 1, got 0.15 and 0.5"),
    ],
)
def test_shapes_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        shape_for(*options)


def test_rows_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"expected rows of shape \(2, 70\), got \(2, 64\)"):
        corrupt(torch.ones(2, 64), [0, 1], shape_for(64), 262, 0)


# The task ------------------------------------------------------------------------------------------------------------


def test_batches_are_corrupted_windows_of_their_own_split(task):
    corpus, shape = text.corpus(TINY.megabytes), shape_for(TINY.length)
    sentinels = corpus.vocabulary + shape.spans
    for split in ("validation", "test"):
        batches = list(task.batches(split))
        rows = torch.cat([batch["input_ids"] for batch in batches])
        whole = corpus.tokens[split].tolist()
        assert rows.shape == (150, 24) and [len(batch["labels"]) for batch in batches] == [128, 22]
        places = set()
        for batch in batches:
            for kept, gone in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                raw, _ = spelled_out_short(kept, gone, corpus.vocabulary)
                start = next(i for i in range(0, len(whole), shape.raw)
                             if i not in places and whole[i : i + shape.raw] == raw)  # fmt: skip
                places.add(start)
        assert len(places) == 150 and rows.max() == sentinels - 1


def spelled_out_short(kept, gone, vocabulary):
    """As `spelled_out`, with the few sentinels of a byte vocabulary."""
    shift = 1000
    moved = [[token + shift if token >= vocabulary else token for token in part] for part in (kept, gone)]
    return spelled_out(*moved, vocabulary + shift + 100)


def test_training_batches_follow_the_seed_and_can_be_skipped(task):
    first, again, other = (list(task.loader(RECIPE, seed)) for seed in (0, 0, 1))
    assert len(first) == RECIPE.steps and first[0]["input_ids"].shape == (8, 24)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["labels"], other[0]["labels"])
    rest = list(skip_first_batches(task.loader(RECIPE, 0), 20))
    assert len(rest) == 10 and torch.equal(rest[0]["input_ids"], first[20]["input_ids"])


def test_windows_overlap_and_cover_the_text():
    tokens, shape = torch.arange(3, 203, dtype=torch.int16), shape_for(24)
    windows = Windows(tokens, shape, 300, stride=5, seed=0)
    assert len(windows) == (200 - shape.raw) // 5 + 1
    batch = windows.__getitems__([0, 4])
    for row, start in enumerate((0, 20)):
        raw, _ = spelled_out(batch["input_ids"][row].tolist(), batch["labels"][row].tolist(), 300)
        assert raw == list(range(3 + start, 3 + start + shape.raw))
    with pytest.raises(ValueError, match="a text of 10 tokens is shorter than a row of 26"):
        Windows(tokens[:10], shape, 300, 5, 0)


def test_score_and_loss_are_t5s_cross_entropy(task):
    torch.manual_seed(0)
    model = task.model().eval()
    batch = dict(task.batches("test")[1])
    batch["labels"] = batch["labels"].clone()
    batch["labels"][3, 4:] = -100  # as if padded
    loss, accuracy = task.score(model, batch)
    for row in (0, 3):
        labels = batch["labels"][row][batch["labels"][row] != -100]
        fed = torch.cat([torch.tensor([0]), labels[:-1]])
        logits = model(input_ids=batch["input_ids"][row : row + 1], decoder_input_ids=fed[None]).logits[0]
        assert loss[row].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        right = [int(one.argmax() == label) for one, label in zip(logits, labels, strict=True)]
        assert accuracy[row].item() == pytest.approx(100 * sum(right) / len(right))
    whole = task.batches("test")[1]
    assert task.loss(model, whole).item() == pytest.approx(task.score(model, whole)[0].mean().item(), rel=1e-5)
    masks = task.masks(batch)
    assert masks["encoder"].all() and masks["decoder"].dtype == torch.bool
    assert torch.equal(masks["decoder"], batch["labels"] != -100)


def test_a_t5_learns(task):
    torch.manual_seed(0)
    model = task.model().eval()

    def validation_loss():
        with torch.no_grad():
            return torch.cat([task.score(model, batch)[0] for batch in task.batches("validation")]).mean().item()

    before = validation_loss()
    fit(model, task.loss, task.loader(RECIPE, 0), RECIPE, CPU)
    assert validation_loss() < before - 1


def test_the_model_is_a_small_t5():
    torch.manual_seed(0)
    model = t5(vocabulary=270, width=16, depth=2, heads=4, d_ff=32, dropout=0.25)
    torch.manual_seed(0)
    assert torch.equal(t5(270, 16, 2, 4, 32).shared.weight, model.shared.weight)
    assert model.lm_head.weight is model.shared.weight and model.shared.weight.shape == (270, 16)
    assert len(model.encoder.block) == len(model.decoder.block) == 2
    mlp = model.decoder.block[1].layer[2].DenseReluDense
    assert mlp.wi.weight.shape == (32, 16) and isinstance(mlp.act, torch.nn.ReLU) and mlp.dropout.p == 0.25
    with pytest.raises(ValueError, match="width must be a multiple of heads, got width 10 and 4 heads"):
        t5(270, 10, 1, 4, 32)


def test_the_key_follows_settings_and_text(task, monkeypatch):
    assert span_corruption_task(TINY, CPU).key == task.key
    assert span_corruption_task(SpanCorruption(**{**vars(TINY), "depth": 2}), CPU).key != task.key
    corpus = text.corpus(TINY.megabytes)
    monkeypatch.setattr(text, "corpus", lambda *_: text.Corpus(corpus.tokens, corpus.vocabulary, "another"))
    assert span_corruption_task(TINY, CPU).key != task.key


def test_unknown_data_is_named():
    with pytest.raises(ValueError, match="unknown data 'pyhton'; there are python and c4"):
        span_corruption_task(SpanCorruption("pyhton"), CPU)
