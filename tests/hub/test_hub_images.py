"""The image sets of the Hub on repositories of the true format: splits, augmentation, training, and what fails."""

from dataclasses import replace

import datasets
import huggingface_hub
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from fake_images import ROWS, label_names, write_pictures
from PIL import Image as Picture
from torchvision.transforms import v2

from common.data.hub import HubError
from common.training import TrainingRecipe, fit
from sparsity.studies import images
from sparsity.studies.data import pictures
from sparsity.studies.images import ImageTask, image_task

CPU = torch.device("cpu")
RECIPE = TrainingRecipe(steps=2, batch_size=12, learning_rate=1e-3)
SMALL = dict(width=16, depth=1, heads=2)
TASKS = {
    "fashion_mnist": ImageTask("fashion_mnist", **SMALL),
    "cifar10": ImageTask("cifar10", **SMALL),
    "imagenet": ImageTask(
        "imagenet", pixels=32, pooling="token", **SMALL,
        label_smoothing=0.11, mixup=0.2, cutmix=1.0, randaugment=9, repeats=3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache that holds the three data sets."""
    root = tmp_path_factory.mktemp("pictures")
    for name in TASKS:
        write_pictures(root, name)
    return root


def use(root, monkeypatch):
    """This process sees the cache under `root`, offline, and has read nothing yet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "datasets")
    pictures.rows.cache_clear()
    images._hub_batches.cache_clear()


@pytest.fixture
def whole(made, monkeypatch):
    use(made, monkeypatch)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    use(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_validation_comes_from_train(whole, name):
    train, validation, test = (pictures.rows(name, split) for split in ("train", "validation", "test"))
    assert len(validation) == max(1, round(ROWS["train"] * pictures.PICTURES[name].held_out))
    assert len(train) + len(validation) == ROWS["train"] and len(test) == ROWS["test"]
    found = {row["image"].tobytes() for rows in (train, validation, test) for row in rows}
    assert len(found) == ROWS["train"] + ROWS["test"]
    assert train.column_names == ["image", "label"] and min(test["label"][:]) >= 0  # not ImageNet's unlabelled split


def test_images_are_cropped_as_the_protocol_says():
    wide = Picture.new("RGB", (300, 150), (255, 0, 0))
    imagenet, cifar = pictures.PICTURES["imagenet"], pictures.PICTURES["cifar10"]
    image = pictures.transform(imagenet, 224, normalised=True, training=False)(wide)
    assert image.shape == (3, 224, 224) and type(image) is torch.Tensor
    torch.testing.assert_close(image[0], torch.full((224, 224), (1 - 0.485) / 0.229))
    plain = pictures.transform(cifar, 32, normalised=False, training=False)(Picture.new("RGB", (32, 32), (255, 0, 51)))
    torch.testing.assert_close(plain[:, 5, 7], torch.tensor([1.0, 0.0, 0.2]))
    shifted = pictures.transform(cifar, 32, normalised=False, training=True)
    whites = torch.stack([shifted(Picture.new("RGB", (32, 32), (255, 255, 255))) for _ in range(60)])
    border = 32 - whites[:, 0].amax(2).sum(1)  # black rows that the shift brought in
    assert border.max() <= 4 and len(border.unique()) > 2


def test_evaluation_takes_the_centre_of_the_image_resized_to_256():
    left_half = Picture.new("L", (512, 256))
    left_half.paste(255, (0, 0, 256, 256))
    image = pictures.transform(pictures.PICTURES["imagenet"], 224, normalised=False, training=False)(left_half)
    assert image[0].mean().item() == pytest.approx(0.5, abs=0.01) and image[0, 0, 0] == 1 and image[0, 0, -1] == 0


def test_an_epoch_has_every_image_as_often_as_it_is_repeated():
    recipe = TrainingRecipe(steps=10, batch_size=9, learning_rate=1.0)
    batches = list(pictures.RepeatedBatches(30, recipe, seed=0, repeats=3))
    items = [item for batch in batches for item in batch]
    assert torch.tensor([index for index, _ in items]).bincount().tolist() == [3] * 30
    assert all(len({index for index, _ in batch}) == 3 for batch in batches)  # all copies in one batch
    assert len({seed for _, seed in items}) == len(items)
    assert batches == list(pictures.RepeatedBatches(30, recipe, seed=0, repeats=3))
    assert batches != list(pictures.RepeatedBatches(30, recipe, seed=1, repeats=3))


def test_epochs_follow_each_other_without_a_gap():
    recipe = TrainingRecipe(steps=6, batch_size=5, learning_rate=1.0)
    indices = [index for batch in pictures.RepeatedBatches(10, recipe, seed=0) for index, _ in batch]
    assert all(sorted(indices[start : start + 10]) == list(range(10)) for start in (0, 10, 20))


def test_two_devices_share_each_batch():
    batches = pictures.RepeatedBatches(30, RECIPE, seed=0, repeats=3)
    shares = [BatchSamplerShard(batches, 2, rank, split_batches=True) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == list(batches)


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_augmentation_follows_the_seed_and_not_the_workers(whole, name):
    task = image_task(TASKS[name], CPU)
    augmentation = pictures.Augmentation(mixup=0.2, cutmix=1.0, randaugment=9)
    shape = (name, 32, augmentation, True)
    torch.manual_seed(0)
    first = list(task.loader(RECIPE, 0))
    torch.manual_seed(1)
    again = list(task.loader(RECIPE, 0))
    assert all(one["images"].equal(other["images"]) for one, other in zip(first, again, strict=True))
    alone, in_two = (list(pictures.training_loader(*shape, workers, RECIPE, 0)) for workers in (0, 2))
    for one, other in zip(alone, in_two, strict=True):
        assert one["images"].equal(other["images"]) and one["labels"].equal(other["labels"])


def test_augmentation_leaves_the_global_generator_alone(whole):
    data = pictures.Pictures(
        pictures.rows("cifar10", "train"), pictures.transform(pictures.PICTURES["cifar10"], 32, True, True, 9)
    )
    before = torch.get_rng_state()
    first, other = data[0, 1]["image"], data[0, 2]["image"]
    assert torch.get_rng_state().equal(before) and not first.equal(other)


def test_mixup_and_cutmix_take_turns_and_their_labels_are_what_is_in_the_image():
    mixers = [v2.MixUp(alpha=0.2, num_classes=4), v2.CutMix(alpha=1.0, num_classes=4)]
    pure = [{"image": torch.full((1, 16, 16), float(label)), "label": label} for label in (0, 1, 2, 3)]
    kinds = set()
    for seed in range(20):
        batch = pictures._collate(mixers, [{**row, "seed": seed} for row in pure])
        shares, values = batch["labels"], batch["images"].flatten(1)
        assert shares.shape == (4, 4)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        for value, share in zip(values, shares, strict=True):  # here the grey level is the class
            assert value.mean().item() == pytest.approx((share @ torch.arange(4.0)).item(), abs=1e-5)
        kinds.add("cut" if all(len(value.unique()) == 2 for value in values) else "mixed or whole")
    assert kinds == {"cut", "mixed or whole"}


@pytest.mark.parametrize("name", TASKS)
def test_a_network_trains_and_is_scored(whole, name):
    settings = TASKS[name]
    task = image_task(settings, CPU)
    channels, pixels, _ = settings.shape
    for batch in task.loader(RECIPE, 0):
        assert batch["images"].shape == (12, channels, pixels, pixels) and batch["images"].dtype == torch.float32
        assert batch["labels"].shape == ((12, 1000) if name == "imagenet" else (12,))
    torch.manual_seed(0)
    model = task.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = TrainingRecipe(steps=3, batch_size=12, learning_rate=1e-2, warmup=0.0)
    model = fit(model, task.loss, task.loader(recipe, 0), recipe, CPU)
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    assert "head.weight" in changed and "blocks.0.mlp.fc1.weight" in changed
    scored = [task.score(model, batch) for batch in task.batches("test")]
    losses, hits = (torch.cat(parts) for parts in zip(*scored, strict=True))
    assert losses.shape == hits.shape == (ROWS["test"],) and losses.isfinite().all()
    assert set(hits.tolist()) <= {0.0, 100.0}


def test_evaluation_is_the_same_twice_and_in_the_order_of_the_files(whole):
    task = image_task(TASKS["imagenet"], CPU)
    first, again = (list(task.batches("test")) for _ in range(2))
    assert all(one["images"].equal(other["images"]) for one, other in zip(first, again, strict=True))
    assert torch.cat([batch["labels"] for batch in first]).tolist() == pictures.rows("imagenet", "test")["label"][:]


def test_a_smoothed_loss_of_mixed_labels_is_the_formula(whole):
    task = image_task(TASKS["imagenet"], CPU)
    model, batch = task.model(), next(iter(task.loader(RECIPE, 0)))
    torch.nn.init.normal_(model.head.weight)
    logs = model(batch["images"]).log_softmax(-1)
    expected = -((0.89 * batch["labels"] + 0.11 / 1000) * logs).sum(-1).mean()
    torch.testing.assert_close(task.loss(model, batch), expected)


def test_imagenets_names_are_the_synsets_in_order():
    names = pictures.PICTURES["imagenet"].class_names
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[999].startswith("toilet tissue")
    assert len(set(label_names("imagenet"))) == 1000  # a card's names must differ, the synsets' do not
    assert [pictures._first_synonym(name) for name in ("crane2", "crane", "boa, feather")] == ["crane", "crane", "boa"]


@pytest.mark.parametrize("name", TASKS)
def test_permuted_labels_fail(empty, name):
    first, second, *rest = label_names(name)
    write_pictures(empty, name, names=[second, first, *rest])
    with pytest.raises(
        ValueError, match=rf"{pictures.PICTURES[name].repo}, \w+/train-\*.parquet: label 0 is "
    ) as caught:
        image_task(TASKS[name], CPU)
    assert "\n" not in str(caught.value)


def test_another_number_of_classes_fails(empty):
    write_pictures(empty, "imagenet", names=label_names("imagenet")[:100])
    with pytest.raises(ValueError, match="column 'label' has 100 classes, expected 1000"):
        image_task(TASKS["imagenet"], CPU)


def test_missing_rows_fail(empty):
    write_pictures(empty, "cifar10", announced=50_000)
    with pytest.raises(
        ValueError, match=r"uoft-cs/cifar10, .*/train-\*.parquet: 120 rows in the files, 50000 on the data card"
    ):
        image_task(TASKS["cifar10"], CPU)


def test_a_missing_shard_fails(empty):
    folder = write_pictures(empty, "imagenet")
    (folder / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"ILSVRC/imagenet-1k, data/train-\*.parquet: 2 of 3 files"):
        image_task(TASKS["imagenet"], CPU)


def test_another_column_fails(empty, monkeypatch):
    write_pictures(empty, "cifar10")
    renamed = replace(pictures.PICTURES["cifar10"], image="image")
    monkeypatch.setitem(pictures.PICTURES, "cifar10", renamed)
    with pytest.raises(ValueError, match="no column 'image', the columns are img, label"):
        image_task(TASKS["cifar10"], CPU)


@pytest.mark.parametrize("name", TASKS)
def test_a_data_set_that_is_not_there_says_what_to_do(empty, name):
    with pytest.raises(HubError, match="is not in the local cache and the Hub was not reached"):
        image_task(TASKS[name], CPU)


def test_unknown_splits_are_refused_and_open_facts_listed():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        pictures.rows("cifar10", "dev")
    assert len(pictures.unverified()) == sum(len(each.unverified) for each in pictures.PICTURES.values()) > 0
