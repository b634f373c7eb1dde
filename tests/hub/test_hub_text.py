"""T5-Base on C4, offline on repositories of the true format: from the download call to trained steps."""

import json
import math
from itertools import pairwise

import datasets
import huggingface_hub
import pytest
import torch
from fake_text import CONFIG, MODEL, write_model, write_shards

from common.data.hub import HubError
from common.data.text import END
from common.models.t5 import t5_like, t5_tokenizer
from common.training import TrainingRecipe, fit
from sparsity.studies.data import c4
from sparsity.studies.span_corruption import SpanCorruption, span_corruption_task

CPU = torch.device("cpu")
SHARD, COUNT = 12, 30  # documents of a shard, documents of the task: two shards and a half
SETTINGS = SpanCorruption("c4", length=32, documents=COUNT, evaluation_rows=10, model=MODEL)
RECIPE = TrainingRecipe(steps=2, batch_size=6, learning_rate=1e-2, schedule="inverse_sqrt")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with the model and the shards that the settings need, and no more; this process sees it, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(c4, "SHARD_DOCUMENTS", SHARD)
    write_model(tmp_path)
    train = [c4.shard_name("train", shard) for shard in c4.Documents("train", COUNT).shards]
    write_shards(tmp_path, [*train, c4.shard_name("validation", 0), c4.shard_name("validation", 1)], SHARD)
    return tmp_path


def test_two_steps_of_training_and_a_score(hub):
    task = span_corruption_task(SETTINGS, CPU)
    torch.manual_seed(0)
    model = task.model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fit(model, task.loss, task.loader(RECIPE, 0), RECIPE, CPU)
    moved = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert "encoder.block.1.layer.1.DenseReluDense.wi.weight" in moved and "shared.weight" in moved
    for split in ("validation", "test"):
        scores = [task.score(model, batch) for batch in task.batches(split)]
        loss, accuracy = (torch.cat(parts) for parts in zip(*scores, strict=True))
        assert loss.shape == accuracy.shape and len(loss) > 5
        assert loss.isfinite().all() and (accuracy >= 0).all() and (accuracy <= 100).all()


def test_the_model_is_the_repositorys_configuration_from_scratch(hub):
    tokenizer = t5_tokenizer(MODEL)
    torch.manual_seed(1)
    model = t5_like(MODEL, len(tokenizer))
    torch.manual_seed(1)
    assert torch.equal(t5_like(MODEL, len(tokenizer)).shared.weight, model.shared.weight)
    config = model.config
    assert (config.d_model, config.d_ff, config.num_layers, config.dropout_rate) == (16, 48, 2, 0.1)
    assert config.dense_act_fn == "relu" and not config.is_gated_act and model.lm_head.weight is model.shared.weight
    assert model.shared.weight.shape[0] == len(tokenizer) != CONFIG["vocab_size"]


def test_rows_are_the_batchs_documents_joined_and_cut(hub):
    tokenizer = t5_tokenizer(MODEL)
    (batch, _) = span_corruption_task(SETTINGS, CPU).loader(RECIPE, 3)
    documents = c4.Documents("train", COUNT)
    numbers = next(iter(c4.ShardedBatches(documents, RECIPE, 3)))
    tokens = [token for text in documents.texts(numbers) for token in tokenizer(text)["input_ids"]]
    assert tokens.count(END) == len(numbers)
    raw = 34  # 5 of noise in 2 spans: 29 + 2 + END = 32
    assert batch["input_ids"].shape == (6, 32) and batch["labels"].shape == (6, 5 + 2 + 1)
    first = len(tokenizer) - 100  # ids of sentinels are above
    for row, (inputs, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        assert inputs[-1] == labels[-1] == END
        spans = {}
        for token in labels[:-1]:
            if token >= first:
                spans[token] = []
            else:
                spans[max(spans, key=list(spans).index)].append(token)
        rebuilt = [token for place in inputs[:-1] for token in (spans[place] if place >= first else [place])]
        assert rebuilt == tokens[row * raw : (row + 1) * raw]
        assert list(spans) == [len(tokenizer) - 1, len(tokenizer) - 2]


def test_documents_come_shard_by_shard_each_once_an_epoch(hub):
    documents = c4.Documents("train", COUNT)
    batches = list(c4.ShardedBatches(documents, TrainingRecipe(steps=10, batch_size=6, learning_rate=1.0), 0))
    numbers = [number for batch in batches for number in batch]
    assert sorted(numbers[:COUNT]) == sorted(numbers[COUNT:]) == list(range(COUNT))
    visited = [number // SHARD for number in numbers[:COUNT]]
    assert sum(one != other for one, other in pairwise(visited)) == len(documents.shards) - 1
    assert numbers[:COUNT] != numbers[COUNT:]
    other = list(c4.ShardedBatches(documents, TrainingRecipe(steps=10, batch_size=6, learning_rate=1.0), 1))
    assert other != batches
    names = [c4.shard_name("train", shard) for shard in documents.shards]
    for number, text in zip(range(COUNT), documents.texts(range(COUNT)), strict=True):
        assert text.startswith(f"{names[number // SHARD]} {number % SHARD}\n")


def test_loader_processes_change_nothing(hub, monkeypatch):
    monkeypatch.setattr(c4, "WORKERS", 2)
    beside_a_gpu = span_corruption_task(SETTINGS, torch.device("cuda")).loader(RECIPE, 0)
    assert beside_a_gpu.num_workers == 2
    for ours, theirs in zip(span_corruption_task(SETTINGS, CPU).loader(RECIPE, 0), beside_a_gpu, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"]) and torch.equal(ours["labels"], theirs["labels"])


def test_only_the_shards_that_are_read_are_needed(hub):
    documents = c4.Documents("train", COUNT)
    names = [c4.shard_name("train", shard) for shard in documents.shards]
    for name in names[1:]:
        next((hub / "hub").glob(f"datasets--*/snapshots/*/{name}")).unlink()
    assert documents.texts([3])[0].startswith(f"{names[0]} 3\n")
    with pytest.raises(ValueError, match=rf"allenai/c4 has no files {names[2]}"):
        documents.texts([2 * SHARD])


def test_shards_and_documents_of_the_paper():
    documents = c4.Documents("train", 25_600_000)
    assert len(documents.shards) == len(set(documents.shards)) == math.ceil(25_600_000 / 356_317) == 72
    assert c4.shard_name("train", 7) == "en/c4-train.00007-of-01024.json.gz"
    assert c4.shard_name("validation", 1) == "en/c4-validation.00001-of-00008.json.gz"


def test_bad_repositories_and_settings_are_named(hub):
    name = c4.shard_name("validation", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c4, "SHARD_DOCUMENTS", 20)
        with pytest.raises(ValueError, match=rf"{name}: 12 documents, expected at least 20"):
            c4.Documents("test", 20).texts([0])
    write_shards(hub, [name], SHARD + 1, columns=("content", "timestamp", "url"))
    with pytest.raises(ValueError, match=r"no column 'text', the columns are content, timestamp, url"):
        c4.Documents("test", 3).texts([0])
    with pytest.raises(ValueError, match="documents must be 1 to 12, got 13"):
        c4.Documents("test", 13)
    with pytest.raises(ValueError, match="unknown split 'tset'; there are train, test, validation"):
        c4.Documents("tset", 1)
    with pytest.raises(ValueError, match="a batch holds 6 documents, but there are only 5"):
        c4.ShardedBatches(c4.Documents("train", 5), RECIPE, 0)
    with pytest.raises(ValueError, match="needs model="):
        span_corruption_task(SpanCorruption("c4"), CPU)
    with pytest.raises(ValueError, match="length=4096 has 227 spans, more than the 100 sentinels"):
        span_corruption_task(SpanCorruption("c4", length=4096, model=MODEL), CPU)
    with pytest.raises(ValueError, match=r"1 documents have .* tokens, fewer than a row of 568"):
        few = TrainingRecipe(steps=1, batch_size=1, learning_rate=1.0)
        next(iter(span_corruption_task(SpanCorruption("c4", length=512, documents=1, model=MODEL), CPU).loader(few, 0)))


def test_a_model_that_is_no_t5_or_not_there_is_named(hub):
    folder = next((hub / "hub").glob("models--google-t5--t5-base/snapshots/*"))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "bert"}))
    with pytest.raises(ValueError, match="google-t5/t5-base is of type 'bert', expected 't5'"):
        t5_like(MODEL, 100)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[0], vocabulary[1] = vocabulary[1], vocabulary[0]
    tokenizer["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"ids of <pad>, </s>, <extra_id_0> are \(1, 0, .*expected \(0, 1"):
        t5_tokenizer(MODEL)
    with pytest.raises(HubError, match="model google-t5/t5-huge is not in the local cache"):
        t5_tokenizer("google-t5/t5-huge")
