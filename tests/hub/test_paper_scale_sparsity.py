"""experiments/03 and 05 at `--scale paper`, offline, on repositories of the true format: from download to table.

Data, recipe, variants and every line of code are the paper scale's; steps, batches and widths are not.
"""

from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from fake_images import write_pictures
from fake_text import MODEL, write_model, write_shards

from common import cache
from common.lab.results import load, load_experiment
from common.lab.run import run
from sparsity.studies import images
from sparsity.studies.data import c4, pictures
from sparsity.studies.runs import VARIANTS

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SHARD, COUNT = 12, 30


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """This process sees the cache under tmp_path, offline, and keeps its artefacts there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(cache, "CACHE", tmp_path / "artefacts")
    pictures.rows.cache_clear()
    images._hub_batches.cache_clear()
    return tmp_path


def shrunk(script, **changes):
    """The experiment with a smaller paper scale."""
    experiment = load_experiment(EXPERIMENTS / script)
    return replace(experiment, scales={**experiment.scales, "paper": replace(experiment.scales["paper"], **changes)})


def table(experiment, folder):
    flags = ["--scale", "paper", "--device", "cpu", "--jobs", "1", "--results-dir", str(folder / "results")]
    return load(run(experiment, flags))


def check(data):
    assert {name.split(",")[0] if "L1" in name else name for name in data.variant} == {*VARIANTS, "ReLU + L1"}
    test = data[(data.split == "test") & (data.metric == "density")]
    assert test.value.between(0, 1).all() and len(test) == len(data.variant.unique()) * test.layer.nunique()
    norms = data[(data.metric == "norm_weight") & (data.variant == "modified")]
    assert (norms.value >= 1).all()


def test_imagenet(hub):
    paper = load_experiment(EXPERIMENTS / "03_vit_from_scratch.py").scales["paper"]
    write_pictures(hub, "imagenet")
    task = replace(paper.task, pixels=32, heads=2)
    recipe = replace(paper.recipe, steps=2, batch_size=12, stairs=2, precision="no")
    experiment = shrunk("03_vit_from_scratch.py", task=task, recipe=recipe, sizes=((16, 2),), log_every=1)
    data = table(experiment, hub)
    check(data)
    assert set(data.setting) == {"imagenet, d 16, 2 layers, decay 0.3"}


def test_c4(hub, monkeypatch):
    monkeypatch.setattr(c4, "SHARD_DOCUMENTS", SHARD)
    write_model(hub)
    train = [c4.shard_name("train", shard) for shard in c4.Documents("train", COUNT).shards]
    write_shards(hub, [*train, c4.shard_name("validation", 0), c4.shard_name("validation", 1)], SHARD)
    paper = load_experiment(EXPERIMENTS / "05_t5_from_scratch.py").scales["paper"]
    assert paper.task.model == MODEL
    task = replace(paper.task, length=32, documents=COUNT, evaluation_rows=10)
    recipes = tuple(replace(recipe, steps=2, batch_size=6) for recipe in paper.recipes)
    data = table(shrunk("05_t5_from_scratch.py", task=task, recipes=recipes, log_every=1), hub)
    check(data)
    assert (
        data[data.layer.str.contains("decoder")].layer.nunique()
        == data[data.layer.str.contains("encoder")].layer.nunique()
    )


def test_a_missing_data_set_ends_in_one_line(hub, capsys):
    experiment = load_experiment(EXPERIMENTS / "03_vit_from_scratch.py")
    with pytest.raises(SystemExit) as stop:
        table(experiment, hub)
    assert stop.value.code == 2
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert error.startswith("error: ") and "imagenet-1k" in error
