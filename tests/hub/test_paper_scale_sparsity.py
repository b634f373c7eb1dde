"""experiments/03 to 07 at `--scale paper`, offline, on repositories of the true format: from download to table.

Data, recipe, variants and every line of code are the paper scale's; steps, batches and widths are not.
"""

from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from fake_images import write_pictures, write_vit
from fake_text import MODEL, write_model, write_shards, write_weights
from safetensors.torch import load_file, save_file

from common import cache
from common.data.hub import HubError
from common.lab.results import load, load_experiment
from common.lab.run import run
from sparsity.studies import images
from sparsity.studies.data import c4, pictures
from sparsity.studies.finetuning import BEFORE, FOLDED
from sparsity.studies.models.pretrained import pretrained_vit
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


def check_finetuning(data, arms):
    assert {"ReLU + L1" if "L1" in name else name for name in data.variant} == {BEFORE, "ReLU + L1", *arms}
    assert data[data.metric == "density"].value.between(0, 1).all()
    assert set(data.kept.dropna()) and data[data.kept.notna()].value.notna().all()
    test = data[(data.split == "test") & (data.metric == "density")].groupby("variant").value.mean()
    assert (test.drop(BEFORE) < 1).all()
    norms = data[(data.metric == "norm_weight") & (data.variant == "modified")]
    assert (norms[norms.step == norms.step.max()].value >= 1).all()
    return test


def test_finetuning_of_deit_on_imagenet(hub):
    paper = load_experiment(EXPERIMENTS / "04_vit_finetuning.py").scales["paper"]
    write_pictures(hub, "imagenet")
    write_vit(hub, paper.task.pretrained, 32)
    recipe = replace(paper.recipe, steps=3, batch_size=12, stairs=3, precision="no")
    task = replace(paper.task, pixels=32)
    arms = ("vanilla", "modified", FOLDED)
    brief = dict(rank=2, log_every=1, arms=arms, l1=(1.0,), kept=(1.0, 0.5))
    data = table(shrunk("04_vit_finetuning.py", task=task, recipe=recipe, **brief), hub)
    density = check_finetuning(data, arms)
    assert density[BEFORE] > 0.95 > density["vanilla"]  # GELU, which every arm leaves


def test_finetuning_of_t5_on_c4(hub, monkeypatch):
    monkeypatch.setattr(c4, "SHARD_DOCUMENTS", SHARD)
    paper = load_experiment(EXPERIMENTS / "06_t5_finetuning.py").scales["paper"]
    assert paper.task.model == MODEL and paper.task.pretrained and paper.start is None
    write_weights(write_model(hub))
    train = [c4.shard_name("train", shard) for shard in c4.Documents("train", COUNT).shards]
    write_shards(hub, [*train, c4.shard_name("validation", 0), c4.shard_name("validation", 1)], SHARD)
    task = replace(paper.task, length=32, documents=COUNT, evaluation_rows=10)
    recipe = replace(paper.recipe, steps=3, batch_size=6)
    arms = ("vanilla", "modified", FOLDED)
    brief = dict(rank=2, log_every=1, arms=arms, l1=(1.0,), kept=(1.0, 0.5))
    data = table(shrunk("06_t5_finetuning.py", task=task, recipe=recipe, **brief), hub)
    check_finetuning(data, arms)
    assert {name.split(".")[0] for name in data.layer.unique()} == {"encoder", "decoder", "all"}


def test_ablations_on_imagenet_cifar10_and_c4(hub, monkeypatch):
    monkeypatch.setattr(c4, "SHARD_DOCUMENTS", SHARD)
    write_pictures(hub, "imagenet")
    write_pictures(hub, "cifar10")
    write_model(hub)
    train = [c4.shard_name("train", shard) for shard in c4.Documents("train", COUNT).shards]
    write_shards(hub, [*train, c4.shard_name("validation", 0), c4.shard_name("validation", 1)], SHARD)
    paper = load_experiment(EXPERIMENTS / "07_ablations.py").scales["paper"]
    small, brief = dict(width=16, depth=2, heads=2, pixels=32), dict(steps=2, batch_size=12, precision="no", stairs=0)
    assert paper.noise == 0.05 and paper.epsilons == (0, 1 / 255) and paper.text.model == MODEL
    experiment = shrunk(
        "07_ablations.py",
        task=replace(paper.task, **small),
        recipe=replace(paper.recipe, **brief),
        log_every=1,
        conditions=("vanilla", "modified", "MLP norms fixed at 1", "MLP norms bounded, with bias"),
        rates=paper.rates[:2],
        batch_sizes=(6, 12),
        rates_task=replace(paper.rates_task, **small),
        rates_recipe=replace(paper.rates_recipe, **brief),
        rates_variants=("vanilla",),
        durations=(1, 2),
        factors_task=replace(paper.factors_task, **small),
        factors=replace(paper.factors, **brief),
        tuning=replace(paper.tuning, **brief),
        rank=2,
        text=replace(paper.text, length=32, documents=COUNT, evaluation_rows=10),
        text_recipe=replace(paper.text_recipe, steps=2, batch_size=6),
        text_log_every=1,
    )
    data = table(experiment, hub)
    assert set(data.part) == {"plug-ins", "2x2", "noise", "T5", "durations", "rates"}
    assert data[data.part == "rates"].setting.nunique() == 4 and data[data.part == "noise"].variant.nunique() == 6
    assert data[data.split == "test, FGSM"].groupby("size").variant.nunique().to_dict() == {0: 6, 0.00392157: 6}
    assert data[data.metric.isin(["density", "covered, keys"])].value.between(0, 1.001).all()


REPOSITORY = "timm/deit_base_patch16_224.fb_in1k"
NORMALISED = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_vit_that_does_not_fit_is_refused_in_one_line(hub):
    with pytest.raises(HubError, match=REPOSITORY):
        pretrained_vit(REPOSITORY, 32, *NORMALISED)
    folder = write_vit(hub, REPOSITORY, 32)
    assert pretrained_vit(REPOSITORY, 32, *NORMALISED).num_classes == 1000
    with pytest.raises(ValueError, match=r"was trained with mean \[0.485, 0.456, 0.406\], the images have"):
        pretrained_vit(REPOSITORY, 32, (0.5, 0.5, 0.5), NORMALISED[1])
    with pytest.raises(ValueError, match=r"was trained with input_size \[3, 32, 32\]"):
        pretrained_vit(REPOSITORY, 224, *NORMALISED)
    weights = load_file(folder / "model.safetensors")
    for name, faulty in {
        "lacks": {key: value for key, value in weights.items() if key != "norm.weight"},
        "another shape": weights | {"norm.weight": weights["norm.weight"][:-1].clone()},
        "one more": weights | {"other.weight": weights["norm.weight"].clone()},
    }.items():
        save_file(faulty, folder / "model.safetensors")
        with pytest.raises(ValueError, match="weights do not fit its config") as caught:
            pretrained_vit(REPOSITORY, 32, *NORMALISED)
        assert "\n" not in str(caught.value) and ("other" if name == "one more" else "norm.weight") in str(caught.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        pretrained_vit(REPOSITORY, 32, *NORMALISED)


def test_a_missing_data_set_ends_in_one_line(hub, capsys):
    experiment = load_experiment(EXPERIMENTS / "03_vit_from_scratch.py")
    with pytest.raises(SystemExit) as stop:
        table(experiment, hub)
    assert stop.value.code == 2
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert error.startswith("error: ") and "imagenet-1k" in error
