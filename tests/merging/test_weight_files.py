"""Which files of a folder are taken for the model: those that transformers takes, and none outside the folder."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from models_on_disk import saved, state_of, weights
from safetensors.torch import save_file

from merging import checkpoints
from merging.checkpoints import open_checkpoint
from merging.command.main import main

CONFIG = transformers.LlamaConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=20, tie_word_embeddings=False,
)  # fmt: skip


def model(seed):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(CONFIG)


def single(folder, seed):
    save_file(model(seed).state_dict(), folder / "model.safetensors", {"format": "pt"})


def shards(folder, seed, stem="model", ending="safetensors"):
    state, table = model(seed).state_dict(), {}
    for part in (1, 2):
        file = f"{stem}-{part:05}-of-00002.{ending}"
        own = {name: state[name] for name in list(state)[part - 1 :: 2]}
        save_file(own, folder / file, {"format": "pt"}) if ending == "safetensors" else torch.save(own, folder / file)
        table |= dict.fromkeys(own, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def bin_shards(folder, seed):
    shards(folder, seed, "pytorch_model", "bin")


def pickled(folder, seed):
    torch.save(model(seed).state_dict(), folder / "pytorch_model.bin")


def variant(folder, seed):
    save_file(model(seed).half().state_dict(), folder / "model.fp16.safetensors", {"format": "pt"})


def variant_shards(folder, seed):
    shards(folder, seed, "model.fp16")
    (folder / "model.fp16.safetensors.index.json").rename(folder / "model.safetensors.index.fp16.json")


def consolidated(folder, seed):
    save_file({f"native.{n}": t for n, t in model(seed).state_dict().items()}, folder / "consolidated.safetensors")


def open_clip(folder, seed):
    save_file({f"visual.{n}": t for n, t in model(seed).state_dict().items()}, folder / "open_clip_model.safetensors")


def named_by_config(folder, seed):
    save_file(model(seed).state_dict(), folder / "best.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "best.safetensors"}))


def of_a_trainer(folder, seed):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt"):
        torch.save({"state": seed}, folder / name)


@pytest.mark.parametrize("savings, note", [
    ([single], None),
    ([single, of_a_trainer], None),
    ([pickled, of_a_trainer], None),
    ([shards], None),
    ([bin_shards], None),
    ([single, shards], r"model\.safetensors is taken; left aside: model-\*-of-00002\.safetensors, model\."),
    ([shards, consolidated], r"model\.safetensors\.index\.json is taken; left aside: consolidated\.safetensors"),
    ([single, pickled, variant], r"model\.safetensors is taken; left aside: model\.fp16\.safetensors, pytorch_model"),
    ([shards, variant_shards], r"index\.json is taken; left aside: model\.fp16-\*-of-00002\.safetensors, model\."),
    ([shards, pickled], r"model\.safetensors\.index\.json is taken; left aside: pytorch_model\.bin"),
    ([pickled, bin_shards], r"pytorch_model\.bin is taken; left aside: pytorch_model-"),
    ([pickled, open_clip], r"pytorch_model\.bin is taken; left aside: open_clip_model\.safetensors"),
    ([named_by_config, single, shards], r"best\.safetensors is taken; left aside: model-.*, model\.safetensors"),
])  # fmt: skip
def test_what_transformers_loads_is_taken_and_the_rest_is_said(tmp_path, savings, note):
    CONFIG.save_pretrained(tmp_path)
    for seed, save in enumerate(savings):
        save(tmp_path, seed)
    taken = open_checkpoint(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert taken.entries.keys() == loaded.keys()
    for name, entry in taken.entries.items():
        assert torch.equal(entry.read(to=torch.float32).reshape(entry.shape), loaded[name].float()), name
    assert (note is None) == (not taken.notes)
    if note:
        assert re.search(note, taken.notes[0])


def test_the_command_says_what_it_left_aside(tmp_path, capsys):
    base, e0, e1 = (tmp_path / name for name in ("base", "e0", "e1"))
    for seed, folder in enumerate((base, e0, e1)):
        folder.mkdir()
        CONFIG.save_pretrained(folder)
        single(folder, seed)
    shards(e0, 5)
    command = ["--base", str(base), "--experts", str(e0), str(e1), "--method", "weight_average"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert f"note: {e0}: model.safetensors is taken; left aside: model-" in capsys.readouterr().err
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.allclose(tensor, (model(1).state_dict()[name] + model(2).state_dict()[name]) / 2, atol=1e-6), name
    assert "- e0: model.safetensors is taken" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("other", [pickled, bin_shards, open_clip])
def test_an_index_without_any_of_its_shards_is_left_aside(tmp_path, other):
    shards(tmp_path, 0)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    other(tmp_path, 1)
    taken = open_checkpoint(tmp_path)
    name = "visual.model.norm.weight" if other is open_clip else "lm_head.weight"
    assert taken.entries[name].path.name in {path.name for path in tmp_path.iterdir()}
    assert any("none of its shards is there; left aside" in note for note in taken.notes)


@pytest.mark.parametrize("save", [variant, variant_shards, consolidated])
def test_the_only_weights_are_taken_whatever_their_name(tmp_path, save):
    save(tmp_path, 0)
    assert len(open_checkpoint(tmp_path).entries) == len(model(0).state_dict())


def test_incomplete_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere/x\.safetensors: there is no such file"):
        open_checkpoint(tmp_path / "nowhere" / "x.safetensors")
    shards(tmp_path, 0)
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": table | {"more": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json: 'more' is not in model-00001-of-00002\.safetensors"):
        open_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match="has no index, and 2 files of weights"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": table}))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the shard model-00002-of-00002\.safetensors, which is not there"):
        open_checkpoint(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the shard model-00001-of-00002\.safetensors, which is not there"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_model_that_zero_3_left_empty_is_named(tmp_path, save):
    state = {name: torch.empty(0) if tensor.dim() > 1 else tensor for name, tensor in model(0).state_dict().items()}
    save(state, tmp_path / ("pytorch_model.bin" if save is torch.save else "model.safetensors"))
    with pytest.raises(ValueError, match=r"(pytorch_)?model\..*: \d+ of 12 tensors are empty, .*zero_to_fp32\.py"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["adapters", "models"])
def test_the_parent_of_several_models_or_adapters_names_them(tmp_path, kind):
    for name in ("first", "second"):
        saved(tmp_path / name, state_of())
        if kind == "adapters":
            (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    with pytest.raises(ValueError, match=rf"holds no weights itself, but the {kind} first, second: name one, .*/first"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("savings, taken", [
    ([single, consolidated, variant, pickled], ["model.safetensors"]),
    ([shards, consolidated, variant, variant_shards, pickled], ["model-00001-of-00002.safetensors",
                                                                "model-00002-of-00002.safetensors"]),
    ([pickled], ["pytorch_model.bin"]),
    ([bin_shards], ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
    ([open_clip], ["open_clip_model.safetensors"]),
    ([consolidated], ["consolidated.safetensors"]),
])  # fmt: skip
@pytest.mark.parametrize("dense", [None, "model.safetensors", "pytorch_model.bin"])
def test_of_a_repository_only_what_is_taken_is_downloaded(tmp_path, monkeypatch, savings, taken, dense):
    remote, local = tmp_path / "remote", tmp_path / "local"
    for folder in (remote, local):
        folder.mkdir()
    CONFIG.save_pretrained(remote)
    for save in savings:
        save(remote, 0)
    (remote / "onnx").mkdir()
    (remote / "onnx" / "weights.bin").write_bytes(b"x")
    if dense:
        (remote / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        (remote / "2_Dense").mkdir()
        (remote / "2_Dense" / "config.json").write_text("{}")
        save = save_file if dense == "model.safetensors" else torch.save
        save({"linear.weight": torch.ones(2, 2)}, remote / "2_Dense" / dense)

    def snapshot(repo, kind, patterns):
        names = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=list(patterns)):
            (local / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(remote / name, local / name)
        return local

    monkeypatch.setattr(checkpoints, "snapshot", snapshot)
    opened = open_checkpoint("owner/name")
    assert {str(path.relative_to(local)) for path in opened.files} == {*taken, *([f"2_Dense/{dense}"] if dense else [])}
    if len(savings) > 1:
        there = {
            str(path.relative_to(local)) for path in local.rglob("*") if path.name.endswith((".bin", ".safetensors"))
        }
        assert there == {str(path.relative_to(local)) for path in opened.files}


# What is not trusted --------------------------------------------------------------------------------------------------

OPENED: list[str] = []
sys.addaudithook(lambda event, facts: OPENED.append(str(facts[0])) if event == "open" else None)


@pytest.fixture
def opened(monkeypatch):
    """The paths that are opened, by Python or by the safetensors library."""
    real = checkpoints.safe_open
    monkeypatch.setattr(checkpoints, "safe_open", lambda path, *more: (OPENED.append(str(path)), real(path, *more))[1])
    OPENED.clear()
    return OPENED


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    saved(folder, state_of())
    (folder / "secret.json").write_text('{"secret": "hidden"}')
    return folder


def index_of(folder, shard, file="model.safetensors.index.json"):
    (folder / file).write_text(json.dumps({"weight_map": {name: shard for name in state_of()}}))


def _absolute(folder, outside):
    index_of(folder, str(outside / "model.safetensors"))


def _upwards(folder, outside):
    index_of(folder, "../outside/model.safetensors")


def _upwards_inside(folder, outside):
    index_of(folder, "sub/../../outside/model.safetensors")


def _linked_file(folder, outside):
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")


def _linked_shard(folder, outside):
    (folder / "shard.safetensors").symlink_to(outside / "model.safetensors")
    index_of(folder, "shard.safetensors")


def _linked_folder(folder, outside):
    (folder / "sub").symlink_to(outside)
    index_of(folder, "sub/model.safetensors")


def _linked_index(folder, outside):
    (folder / "model.safetensors.index.json").symlink_to(outside / "secret.json")


def _linked_config(folder, outside):
    saved(folder, state_of())
    (folder / "config.json").symlink_to(outside / "secret.json")


def _named_by_config(folder, outside):
    (folder / "config.json").write_text(json.dumps({"transformers_weights": "../outside/model.safetensors"}))


def _named_by_modules(folder, outside):
    saved(folder, state_of())
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": "../outside"}]))


def _circle(folder, outside):
    (folder / "a.safetensors").symlink_to(folder / "b.safetensors")
    (folder / "b.safetensors").symlink_to(folder / "a.safetensors")
    index_of(folder, "a.safetensors")


def _zero_byte(folder, outside):
    index_of(folder, "a\0.safetensors")


def _long_name(folder, outside):
    index_of(folder, "a" * 5000 + ".safetensors")


@pytest.mark.parametrize("spoil", [
    _absolute, _upwards, _upwards_inside, _linked_file, _linked_shard, _linked_folder, _linked_index, _linked_config,
    _named_by_config, _named_by_modules, _circle, _zero_byte, _long_name,
])  # fmt: skip
def test_what_lies_outside_the_folder_is_refused_and_not_opened(tmp_path, outside, opened, spoil, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    spoil(folder, outside)
    opened.clear()
    command = ["--base", saved(tmp_path / "base", state_of()), "--method", "ties", "--out", str(tmp_path / "out")]
    assert main([*command, "--experts", str(folder), str(folder)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert str(folder) in said and len(said) < 600 and "hidden" not in said
    assert str(tmp_path / "base" / "model.safetensors") in opened  # the record works
    assert not [path for path in opened if os.path.realpath(path).startswith(str(outside))]


def test_links_of_the_hubs_cache_are_followed(tmp_path, monkeypatch):
    repository = tmp_path / "models--owner--name"
    saved(repository / "blobs", state_of())
    (repository / "blobs" / "model.safetensors").rename(repository / "blobs" / "0123")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    assert open_checkpoint(snapshot).entries.keys() == state_of().keys()
    (tmp_path / "local").mkdir()  # as earlier versions of the Hub's library downloaded into a folder
    (tmp_path / "local" / "model.safetensors").symlink_to(repository / "blobs" / "0123")
    with pytest.raises(ValueError, match="is a link to"):
        open_checkpoint(tmp_path / "local")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert open_checkpoint(tmp_path / "local").entries.keys() == state_of().keys()
    (tmp_path / "link").symlink_to(snapshot)  # a folder that the user names may itself be a link
    assert open_checkpoint(tmp_path / "link").entries.keys() == state_of().keys()


@pytest.mark.parametrize("text, message", [
    ("{}", "is no index of shards"),
    ("[]", "is no index of shards"),
    ("3", "is no index of shards"),
    ('{"weight_map": 3}', "is no index of shards"),
    ('{"weight_map": ["a"]}', "is no index of shards"),
    ('{"weight_map": {}}', "is no index of shards"),
    ('{"weight_map": {"w": 3}}', "the shard of 'w' is 3, which is no name of a file"),
    ('{"weight_map": {"w": ["a"]}}', r"the shard of 'w' is \['a'\], which is no name"),
    ('{"weight_map": {"w": null}}', "the shard of 'w' is None"),
    ('{"weight_map": {"w": ""}}', "the shard of 'w' is ''"),
    ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', r"is no sound JSON \('w' stands in it twice\)"),
    ('{"weight_map": ', "is no sound JSON"),
    ("[" * 100_000, "is no sound JSON"),
    (b"\xff\xfe", "is no sound JSON"),
])  # fmt: skip
def test_broken_indices_are_named(tmp_path, text, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: {message}") as raised:
        open_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("file", ["config.json", "modules.json"])
@pytest.mark.parametrize(
    "text", ["3", '"x"', "{", "[" * 100_000, '{"transformers_weights": []}', '[{"path": 3}]', "[3]"]
)
def test_broken_configurations_are_named(tmp_path, file, text):
    saved(tmp_path, state_of())
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{file}: ") as raised:
        open_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)
