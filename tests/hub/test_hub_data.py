"""The twenty data sets: what loads, in which order, and how every deviation from the known format fails."""

import pickle
import shutil

import httpx
import huggingface_hub
import pytest
import torch
from datasets import Value
from fake_hub import BASE, SHARDS, TEST_ROWS, TRAIN_ROWS, write_data
from huggingface_hub import errors

from common.data.hub import HubError, snapshot
from merging.suites.data.vision_tasks import VISION_TASKS, image_loader, unverified, validation_rows
from merging.suites.models.clip import preprocessing

MNIST, SUN397, EUROSAT = (VISION_TASKS[name] for name in ("MNIST", "SUN397", "EuroSAT"))


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_table_is_the_papers_suite():
    eight = ["SUN397", "Cars", "RESISC45", "EuroSAT", "SVHN", "GTSRB", "MNIST", "DTD"]
    fourteen = [*eight, "Flowers102", "PCAM", "FER2013", "OxfordIIITPet", "STL10", "CIFAR100"]
    twenty = [*fourteen, "EMNIST", "CIFAR10", "Food101", "FashionMNIST", "RenderedSST2", "KMNIST"]
    assert list(VISION_TASKS) == twenty
    counts = [397, 196, 45, 10, 10, 43, 10, 47, 102, 2, 7, 37, 10, 100, 26, 10, 101, 10, 2, 10]
    assert [len(task.class_names) for task in VISION_TASKS.values()] == counts
    base = "openai/clip-vit-base-patch32"
    assert VISION_TASKS["Cars"].expert_id(base) == "tanganke/clip-vit-base-patch32_stanford-cars"
    large = "openai/clip-vit-large-patch14"
    ids = [VISION_TASKS[name].expert_id(large).partition("_")[2] for name in twenty[8:]]
    assert ids == ["oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100", "emnist_letters",
                   "cifar10", "food101", "fashion_mnist", "rendered-sst2", "kmnist"]  # fmt: skip
    for task in VISION_TASKS.values():
        assert len(set(task.class_names)) == len(task.class_names)
        assert all(template.count("{}") == 1 for template in task.templates)
    assert [len(task.templates) for task in VISION_TASKS.values()] == [
        2, 8, 18, 3, 1, 3, 1, 8, 1, 1, 6, 1, 2, 18, 1, 18, 1, 2, 1, 1,
    ]  # fmt: skip
    assert VISION_TASKS["Food101"].class_names[16:18] == ["cheesecake", "cheese plate"]  # likewise
    assert EUROSAT.class_names[:2] == ["annual crop land", "forest"]  # the data set's order, not CLIP's page


def test_unverified_lists_every_open_fact():
    assert len(unverified()) == sum(len(task.unverified) for task in VISION_TASKS.values()) > 0
    assert any(line.startswith("EuroSAT (tanganke/eurosat): label names") for line in unverified())
    assert not any(line.startswith(("RESISC45", "OxfordIIITPet", "EMNIST", "KMNIST")) for line in unverified())


@pytest.mark.parametrize("name", VISION_TASKS)
def test_test_set_loads(hub, name):
    task = VISION_TASKS[name]
    rows = task.rows("test")
    assert sorted(rows.column_names) == ["image", "label"] and len(rows) == TEST_ROWS
    assert task.named == hasattr(rows.features["label"], "names")
    assert not task.named or rows.features["label"].num_classes == len(task.class_names)
    assert rows["label"][:] == sorted(rows["label"][:])  # all shards, in order
    _, labels = next(iter(image_loader(rows, lambda image: torch.zeros(3, 2, 2))))
    assert labels.dtype == torch.int64 and labels.tolist() == [int(label) for label in rows["label"][:]]


def test_several_shards_are_read(hub):
    assert SHARDS["SUN397"] > 1
    folder = snapshot(SUN397.repo, "dataset", ["data/test-*"])
    assert len(list(folder.glob("data/test-*.parquet"))) == SHARDS["SUN397"]
    assert len(SUN397.rows("test")) == TEST_ROWS


def test_validation_is_a_tenth_of_train(hub):
    rows = validation_rows(EUROSAT)
    train = EUROSAT.rows("train")
    split = torch.utils.data.random_split(
        range(TRAIN_ROWS), [TRAIN_ROWS - 16, 16], generator=torch.Generator().manual_seed(0)
    )
    assert rows["label"][:] == [train[index]["label"] for index in split[1].indices]
    assert validation_rows(EUROSAT, limit=5)["label"][:] == rows["label"][:5]
    assert len(set(rows["label"][:])) > 3


def test_loader_gives_tensors_and_labels(hub):
    rows = MNIST.rows("test").select(range(5))

    def preprocess(image):
        return torch.full((3, 2, 2), float(image.size[0]))

    batches = list(image_loader(rows, preprocess, batch_size=4))
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 2, 2), (1, 3, 2, 2)]
    assert torch.cat([labels for _, labels in batches]).tolist() == rows["label"][:]
    assert batches[0][0].unique().tolist() == [28.0]


def test_loader_can_be_sent_to_workers(hub):
    loader = image_loader(MNIST.rows("test"), preprocessing(BASE), workers=2)
    images, labels = pickle.loads(pickle.dumps(loader.collate_fn))([loader.dataset[0]])
    assert images.shape == (1, 3, 224, 224) and labels.shape == (1,) and loader.num_workers == 2


def test_renamed_column_fails(own_hub):
    write_data(own_hub, MNIST, columns=("picture", "label"))
    with pytest.raises(
        ValueError, match=r"ylecun/mnist, mnist/test-\*.parquet: no column 'image'.* picture, label"
    ) as caught:
        MNIST.rows("test")
    one_line(caught)


def test_label_column_without_names_fails(own_hub):
    path = snapshot(MNIST.repo, "dataset", ["mnist/test-*"]) / "mnist" / "test-00000-of-00001.parquet"
    MNIST.rows("test").cast_column("label", Value("int64")).to_parquet(path)
    with pytest.raises(ValueError, match="column 'label' must be a ClassLabel, got Value") as caught:
        MNIST.rows("test")
    one_line(caught)


@pytest.mark.parametrize("name", ["PCAM", "FER2013"])
def test_labels_without_names_must_be_in_range(own_hub, name):
    task = VISION_TASKS[name]
    write_data(own_hub, task, hidden=1)
    with pytest.raises(ValueError, match=f"labels 1 to {len(task.class_names)}, expected 0 to") as caught:
        task.rows("test")
    assert task.repo in one_line(caught)


@pytest.mark.parametrize(("name", "file"), [("PCAM", "data/test-00001-*.parquet"), ("FER2013", "test/1.tar")])
def test_all_files_of_a_split_must_be_there(own_hub, name, file):
    task = VISION_TASKS[name]
    (path,) = snapshot(task.repo, "dataset", [file]).glob(file)
    path.unlink()
    with pytest.raises(ValueError, match=f"{task.repo}, .*: 1 of 2 files; delete") as caught:
        task.rows("test")
    one_line(caught)


@pytest.mark.parametrize("name", [name for name, task in VISION_TASKS.items() if task.named])
def test_permuted_labels_fail(own_hub, name):
    task = VISION_TASKS[name]
    names = task.class_names
    names = [*names[:-2], names[-1], names[-2]]
    write_data(own_hub, task, names=names)
    with pytest.raises(ValueError, match=f"label {len(names) - 2} is ") as caught:
        task.rows("test")
    assert task.repo in one_line(caught)


def test_alphabetical_labels_of_eurosat_fail(own_hub):
    write_data(own_hub, EUROSAT, names=sorted(EUROSAT.class_names))
    with pytest.raises(ValueError, match="label 1 is 'brushland or shrubland', expected 'forest'"):
        EUROSAT.rows("test")


def test_spelling_of_labels_may_differ(own_hub):
    task = VISION_TASKS["RESISC45"]
    write_data(own_hub, task, names=[name.replace(" ", "_") for name in task.class_names])
    assert len(task.rows("test")) == TEST_ROWS


def test_other_number_of_classes_fails(own_hub):
    write_data(own_hub, MNIST, names=MNIST.class_names[:9])
    with pytest.raises(ValueError, match="column 'label' has 9 classes, expected 10") as caught:
        MNIST.rows("test")
    one_line(caught)


def test_other_split_name_fails(own_hub):
    for path in snapshot(MNIST.repo, "dataset", ["mnist/*"]).glob("mnist/test-*"):
        path.unlink()
    write_data(own_hub, MNIST, test_split="validation")
    message = r"ylecun/mnist has no files mnist/test-\*.parquet .*train, validation"
    with pytest.raises(ValueError, match=message) as caught:
        MNIST.rows("test")
    one_line(caught)


def test_missing_shard_fails(own_hub):
    folder = snapshot(SUN397.repo, "dataset", ["data/test-*"])
    (folder / "data" / f"test-00001-of-{SHARDS['SUN397']:05d}.parquet").unlink()
    with pytest.raises(ValueError, match=r"tanganke/sun397, data/test-\*.parquet: 2 of 3 files") as caught:
        SUN397.rows("test")
    one_line(caught)


def test_other_number_of_rows_than_on_the_card_fails(own_hub):
    card = snapshot(VISION_TASKS["SVHN"].repo, "dataset", ["README.md"]) / "README.md"
    card.write_text(card.read_text().replace("num_examples: 24\n", "num_examples: 26032\n"))
    with pytest.raises(
        ValueError, match=r"cropped_digits/test-\*.parquet: 24 rows in the files, 26032 on the data card"
    ) as caught:
        VISION_TASKS["SVHN"].rows("test")
    one_line(caught)


def test_repository_that_is_not_cached_fails_offline(own_hub):
    shutil.rmtree(own_hub / "hub" / "datasets--tanganke--dtd")
    with pytest.raises(HubError, match=r"dataset tanganke/dtd is not in the local cache.*HF_HOME") as caught:
        VISION_TASKS["DTD"].rows("test")
    one_line(caught)


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/api"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errors.GatedRepoError("403\nforbidden", response=response(403)), "is gated: accept its licence.*HF_TOKEN"),
        (errors.RepositoryNotFoundError("401\nwho?", response=response(401)), "does not exist or is private"),
        (errors.RevisionNotFoundError("404\nbranch", response=response(404)), "has no branch main"),
        (errors.HfHubHTTPError("503\nlater", response=response(503)), "the Hub answered 503: check HF_TOKEN"),
        (httpx.ConnectError("no route\nto host"), "the Hub was not reached.*HF_HOME"),
        (errors.LocalEntryNotFoundError("long\nexplanation"), "the Hub was not reached.*HF_HOME"),
    ],
)
def test_hub_errors_say_what_to_do_in_one_line(monkeypatch, error, advice):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError, match=advice) as caught:
        MNIST.rows("test")
    assert "dataset ylecun/mnist" in one_line(caught)
