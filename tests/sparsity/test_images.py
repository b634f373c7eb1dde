"""Image tasks: fixed splits, reproducible batches, and scores that agree with a recount."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.data import glyphs
from common.training import TrainingRecipe, fit
from sparsity.studies.data import digits
from sparsity.studies.images import IMAGENET, ImageTask, image_task

CPU = torch.device("cpu")
RECIPE = TrainingRecipe(steps=40, batch_size=32, learning_rate=3e-3)
DIGITS = ImageTask("digits", width=32, depth=2)
GLYPHS = ImageTask("glyphs", ("digits", "math"), copies=2, width=32, depth=1)


def test_digits_have_fixed_disjoint_stratified_splits():
    found = {split: digits.digits(split) for split in digits.SIZES}
    assert {split: len(labels) for split, (_, labels) in found.items()} == digits.SIZES
    for split, (images, labels) in found.items():
        assert images.shape == (len(labels), 1, 8, 8) and images.min() == -1 and images.max() == 1
        shares = labels.bincount(minlength=10) / len(labels)
        assert (shares - 0.1).abs().max() < 0.01, split
    every = torch.cat([images.flatten(1) for images, _ in found.values()])
    assert len(every) == 1797 == len(every.unique(dim=0))  # no image on two sides


def test_an_unknown_split_of_the_digits_is_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'; there are train, validation, test"):
        digits.digits("dev")


@pytest.mark.parametrize(("settings", "pixels", "classes"), [(DIGITS, 8, 10), (GLYPHS, 24, 42)])
def test_batches_fit_the_network(settings, pixels, classes):
    task = image_task(settings, CPU)
    model = task.model()
    batches = list(task.loader(RECIPE, 0))
    assert len(batches) == RECIPE.steps
    assert all(batch["images"].shape == (32, 1, pixels, pixels) and batch["labels"].shape == (32,) for batch in batches)
    assert model(batches[0]["images"]).shape == (32, classes)
    assert task.loss(model, batches[0]).item() == pytest.approx(torch.tensor(float(classes)).log().item())  # zero head


def test_the_order_of_training_batches_is_the_seeds():
    task = image_task(DIGITS, CPU)
    first, again, other = (next(iter(task.loader(RECIPE, seed)))["labels"] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_an_epoch_of_glyphs_is_the_fixed_photographs_of_the_training_faces():
    task = image_task(GLYPHS, CPU)
    drawn = glyphs.glyphs(GLYPHS.glyph_tasks, "train")
    length = 2 * len(drawn.labels)
    epoch = TrainingRecipe(steps=2, batch_size=length, learning_rate=1.0)
    first, second = (batch["images"].flatten(1) for batch in task.loader(epoch, 0))
    assert first.unique(dim=0).equal(second.unique(dim=0)) and len(first.unique(dim=0)) == length
    counts = task.loader(epoch, 0).dataset.labels.bincount()
    assert counts.equal(2 * drawn.labels.bincount())


def test_no_glyph_is_inverted_and_every_split_has_every_class():
    task = image_task(GLYPHS, CPU)
    for split, faces in glyphs.FACES.items():
        batches = list(task.batches(split))
        images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("images", "labels"))
        assert set(labels.tolist()) == set(range(42)) and len(labels) <= 2 * 42 * len(faces)
        assert (images.flatten(1).median(1).values < 0).all()  # the background is dark


def test_no_glyph_tasks_are_all_of_them():
    assert image_task(ImageTask(glyph_tasks=(), width=8, depth=1, heads=1), CPU).model().head.out_features == 559


def test_scores_are_losses_and_hits_of_each_image():
    task = image_task(replace(DIGITS, label_smoothing=0.1), CPU)
    model = fit(task.model(), task.loss, task.loader(RECIPE, 0), RECIPE, CPU)
    batch = next(iter(task.batches("test")))
    losses, hits = task.score(model, batch)
    logits = model(batch["images"])
    for index in range(0, 400, 50):
        probabilities, label = logits[index].softmax(-1), batch["labels"][index]
        assert losses[index].item() == pytest.approx(-probabilities[label].log().item(), abs=1e-5)  # not smoothed
        assert hits[index].item() == 100.0 * (probabilities.argmax() == label)
    smoothed = 0.9 * F.cross_entropy(logits, batch["labels"]) - 0.1 * logits.log_softmax(-1).mean()
    torch.testing.assert_close(task.loss(model, batch), smoothed)


def test_a_few_steps_learn_digits():
    task = image_task(DIGITS, CPU)
    recipe = replace(RECIPE, steps=150)
    torch.manual_seed(0)
    model = fit(task.model(), task.loss, task.loader(recipe, 0), recipe, CPU)
    hits = torch.cat([task.score(model, batch)[1] for batch in task.batches("validation")])
    assert hits.mean() > 50  # chance is 10 %


def test_the_key_follows_what_decides_and_nothing_else():
    key = image_task(GLYPHS, CPU).key
    changes = [{"copies": 3}, {"width": 64}, {"pooling": "token"}, {"label_smoothing": 0.1}, {"glyph_tasks": ("math",)}]
    assert len({key, *(image_task(replace(GLYPHS, **change), CPU).key for change in changes)}) == 6
    assert image_task(replace(GLYPHS), CPU).key == key


def test_imagenet_is_the_papers_network_and_augmentation():
    assert IMAGENET.shape == (3, 224, 16) and (IMAGENET.width, IMAGENET.depth, IMAGENET.heads) == (768, 12, 12)
    assert (IMAGENET.mixup, IMAGENET.cutmix, IMAGENET.randaugment, IMAGENET.repeats) == (0.2, 1.0, 9, 3)
    assert IMAGENET.label_smoothing == 0.11 and IMAGENET.pooling == "token"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(data="svhn"), "data must be one of digits, glyphs, fashion_mnist, cifar10, imagenet, got 'svhn'"),
        (dict(glyph_tasks=("runes",)), "unknown glyph task 'runes'"),
        (dict(copies=0), "copies must be at least 1, got 0"),
        (dict(patch=5), "patch must divide the image side 24, got 5"),
        (dict(heads=3), "heads must divide width 64, got 3"),
        (dict(label_smoothing=1.0), "label_smoothing must be at least 0 and below 1"),
        (dict(mixup=0.2), "mixup is not for glyphs, whose training images are fixed"),
        (dict(data="digits", pixels=16), "digits has images of 8 pixels only, got 16"),
        (dict(data="cifar10", mixup=-1.0), "mixup must not be negative, got -1.0"),
        (dict(data="cifar10", randaugment=31), "randaugment must be from 0 to 30, got 31"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageTask(**settings)
