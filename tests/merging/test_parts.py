"""Models of several parts, each with weights in a folder of its own, as sentence-transformers saves them."""

import json
import shutil
import signal

import pytest
import torch
import transformers
from models_on_disk import assert_close, assert_equal, content, in_fork, killed, weights
from safetensors.torch import load_file, save_file

from merging.checkpoints import open_checkpoint
from merging.command.main import main, merge
from merging.command.recipe import Recipe

TYPES = "sentence_transformers.models."
CONFIG = transformers.BertConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=12,
)  # fmt: skip


def sentence_encoder(folder, seed, root="", dense="model.safetensors", shard="1GB"):
    """A transformer, pooling, and a dense layer of its own weights; `root` is where the transformer is."""
    torch.manual_seed(seed)
    model, projection = transformers.BertModel(CONFIG), torch.nn.Linear(8, 6)
    model.save_pretrained(folder / root, max_shard_size=shard)
    (folder / root / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]) + "\n"
    )
    transformers.BertTokenizer(str(folder / root / "vocab.txt")).save_pretrained(folder / root)
    for path, config in {"1_Pooling": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}, "2_Dense": {
        "in_features": 8, "out_features": 6, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh",
    }}.items():  # fmt: skip
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
    state = {f"linear.{name}": tensor.detach() for name, tensor in projection.named_parameters()}
    save = save_file if dense.endswith(".safetensors") else torch.save
    save(state, folder / "2_Dense" / dense)
    modules = [("0", root, "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Dense", "Dense")]
    listed = [
        {"idx": i, "name": name, "path": path, "type": TYPES + kind} for i, (name, path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config_sentence_transformers.json").write_text('{"__version__": {}}')
    return model.state_dict() | {f"2_Dense/{name}": tensor for name, tensor in state.items()}


def plain(folder, seed):
    """The transformer of `sentence_encoder` alone, as transformers saves it."""
    torch.manual_seed(seed)
    model = transformers.BertModel(CONFIG)
    model.save_pretrained(folder)
    return model.state_dict()


def three(tmp_path, **options):
    """The states of a base and two experts, by the names that the plan gives their tensors, and where they are."""
    states = [sentence_encoder(tmp_path / name, seed, **options) for seed, name in enumerate(("base", "e0", "e1"))]
    return states, Recipe(str(tmp_path / "base"), (str(tmp_path / "e0"), str(tmp_path / "e1")), "weight_average")


@pytest.mark.parametrize("options", [
    {}, {"dense": "pytorch_model.bin"}, {"root": "0_Transformer"}, {"root": "0_Transformer", "shard": "2KB"},
], ids=str)  # fmt: skip
def test_the_parts_are_merged_by_the_same_recipe_and_keep_their_folders(tmp_path, options):
    (base, *experts), recipe = three(tmp_path, **options)
    merge(recipe, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert found.entries.keys() == base.keys()
    read = {name: entry.read().reshape(entry.shape) for name, entry in found.entries.items()}
    assert_close(read, {name: (experts[0][name] + experts[1][name]) / 2 for name in base})
    assert load_file(tmp_path / "out" / "2_Dense" / "model.safetensors").keys() == {"linear.weight", "linear.bias"}
    kept = {
        path.relative_to(tmp_path / "base")
        for path in (tmp_path / "base").rglob("*")
        if path.suffix in (".json", ".txt")
    }
    there = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert {path for path in kept if not path.name.endswith("index.json")} <= there
    assert "library_name: sentence-transformers" in (tmp_path / "out" / "README.md").read_text()


def old(folder, seed):
    return sentence_encoder(folder, seed, root="0_Transformer")


@pytest.mark.parametrize("of_base, of_experts", [
    (old, plain), (old, sentence_encoder), (sentence_encoder, old), (sentence_encoder, plain), (plain, old),
])  # fmt: skip
def test_old_and_new_layouts_and_plain_transformers_match(tmp_path, of_base, of_experts, capsys):
    base = of_base(tmp_path / "base", 0)
    experts = [of_experts(tmp_path / f"e{seed}", seed) for seed in (1, 2)]
    flags = ["--base", str(tmp_path / "base"), "--experts", str(tmp_path / "e1"), str(tmp_path / "e2")]
    assert main([*flags, "--partial", "--method", "weight_average", "--out", str(tmp_path / "out")]) == 0
    found = open_checkpoint(tmp_path / "out")
    expected = {n: (experts[0][n] + experts[1][n]) / 2 if n in experts[0] else tensor for n, tensor in base.items()}
    assert_close({name: entry.read().reshape(entry.shape) for name, entry in found.entries.items()}, expected)
    assert (tmp_path / "out" / "0_Transformer" / "model.safetensors").is_file() == (of_base is old)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert all("2_Dense" in note and "embeddings" not in note for note in notes)
    assert len(notes) == (0 if {of_base, of_experts} == {old, sentence_encoder} else 2 if of_base is plain else 1)


def test_weights_beside_an_old_layout_are_left_aside(tmp_path, capsys):
    _, recipe = three(tmp_path, root="0_Transformer")
    save_file({"other": torch.ones(2)}, tmp_path / "base" / "model.safetensors")
    merge(recipe, tmp_path / "out")
    assert "base: the model is in 0_Transformer, as modules.json says; left aside: model.sa" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("options", [{}, {"root": "0_Transformer"}], ids=str)
def test_sentence_transformers_loads_the_output(tmp_path, options):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    (base, *experts), recipe = three(tmp_path, **options)
    merge(recipe, tmp_path / "out")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    mean = {name: (experts[0][name] + experts[1][name]) / 2 for name in base}
    assert_close(
        dict(loaded[2].state_dict()), {n.removeprefix("2_Dense/"): t for n, t in mean.items() if "2_Dense" in n}
    )
    assert loaded.encode(["a b", "c"]).shape == (2, 6)


def test_sharded_parts_of_a_killed_merge_end_bit_identical(tmp_path):
    _, recipe = three(tmp_path)
    recipe = Recipe(recipe.base, recipe.experts, "ties", shard_size="200B")
    merge(recipe, tmp_path / "whole")
    for function, count in (("pwrite", 20), ("replace", 3), ("pwrite", 1)):

        def work(function=function, count=count):
            with killed(function, count):
                merge(recipe, tmp_path / "out")

        assert in_fork(work) == -signal.SIGKILL and not (tmp_path / "out").exists()
    merge(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert content(tmp_path / "out" / "2_Dense") == content(tmp_path / "whole" / "2_Dense")
    index = json.loads((tmp_path / "out" / "2_Dense" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {"linear.weight", "linear.bias"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "e0", "e1", "out", "whole"]


def test_a_part_that_the_experts_lack_is_the_bases_and_that_is_said(tmp_path, capsys):
    (base, *_), recipe = three(tmp_path)
    for expert in recipe.experts:
        shutil.rmtree(f"{expert}/2_Dense")
    command = ["--base", recipe.base, "--experts", *recipe.experts, "--method", "ties", "--out", str(tmp_path / "out")]
    if main(command) == 0:  # or refused, if that is a large part of the base
        assert "'2_Dense/linear.weight': in no expert; the base's value is kept" in capsys.readouterr().err
        expected = {name.removeprefix("2_Dense/"): t for name, t in base.items() if "2_Dense" in name}
        assert_equal(load_file(tmp_path / "out" / "2_Dense" / "model.safetensors"), expected)
    else:
        assert "2_Dense/linear.weight" in capsys.readouterr().err


def test_exports_in_other_folders_are_not_taken_along_and_that_is_said(tmp_path, capsys):
    _, recipe = three(tmp_path)
    for name, file in (("onnx", "model.onnx"), ("openvino", "openvino_model.bin"), ("logs", "events.txt")):
        (tmp_path / "base" / name).mkdir()
        (tmp_path / "base" / name / file).write_text("x")
    command = ["--base", recipe.base, "--experts", *recipe.experts, "--method", "ties", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "base: weights in onnx, openvino: no parts of the model; not in the output" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("on*")) and not list((tmp_path / "out").glob("openvino/*"))
    assert (tmp_path / "out" / "logs" / "events.txt").is_file()


@pytest.mark.parametrize("options", [{}, {"root": "0_Transformer"}], ids=str)
def test_an_adapter_holds_no_other_parts(tmp_path, options):
    _, recipe = three(tmp_path, **options)
    merge(Recipe(recipe.base, recipe.experts, "ties", output="adapter", rank=2), tmp_path / "out")
    names = weights(tmp_path / "out").keys()
    assert any("encoder.layer.0" in name for name in names) and not any("2_Dense" in name for name in names)
    assert "2_Dense/linear.weight" in (tmp_path / "out" / "energy_lost.csv").read_text()
