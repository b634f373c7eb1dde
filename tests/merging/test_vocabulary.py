"""Tensors that differ in their number of rows: a vocabulary only where a file says so, heads kept, the rest refused."""

import json

import pytest
import torch
import transformers
from models_on_disk import saved, state_of, weights

from merging.command.main import merge
from merging.command.recipe import Recipe

SMALL = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
VISION = SMALL | dict(image_size=8, patch_size=4, num_channels=1)


def bert(labels=2, positions=16, vocabulary=32):
    config = transformers.BertConfig(
        **SMALL, vocab_size=vocabulary, max_position_embeddings=positions, num_labels=labels
    )
    return transformers.BertForSequenceClassification(config)


def vit(labels=2, positions=8, vocabulary=None):
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**VISION | {"image_size": positions}, num_labels=labels)
    )


def clip(labels=2, positions=16, vocabulary=32):
    text = SMALL | dict(vocab_size=vocabulary, max_position_embeddings=positions, eos_token_id=2)
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return transformers.CLIPModel(config)


def llama(labels=2, positions=None, vocabulary=32, kind=transformers.LlamaForCausalLM):
    return kind(transformers.LlamaConfig(**SMALL, vocab_size=vocabulary, num_labels=labels, tie_word_embeddings=False))


def llama_classifier(labels=2, **options):
    return llama(labels, **options, kind=transformers.LlamaForSequenceClassification)


def t5(labels=2, positions=None, vocabulary=32):
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=vocabulary, num_labels=labels
    )
    return transformers.T5ForConditionalGeneration(config)


def on_disk(folder, model):
    torch.manual_seed(len(folder.name) + ord(folder.name[-1]))
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder)
    return str(folder)


def three(tmp_path, make, **sizes):
    """A base and two experts of a model, each with its own sizes, e.g. labels=(100, 10, 37)."""
    names = ("base", "e0", "e1")
    made = [make(**{key: values[index] for key, values in sizes.items()}) for index in range(3)]
    base, *experts = [on_disk(tmp_path / name, model) for name, model in zip(names, made, strict=True)]
    return base, tuple(experts)


@pytest.mark.parametrize("make", [bert, clip, llama, t5])
def test_rows_that_the_configuration_calls_a_vocabulary_are_merged_as_far_as_all_have_them(tmp_path, make, capsys):
    base, experts = three(tmp_path, make, vocabulary=(32, 40, 28))
    merge(Recipe(base, experts, "weight_average"), tmp_path / "out")
    own, *others = map(weights, (base, *experts))
    differing = [name for name in own if len({state[name].shape for state in (own, *others)}) > 1]
    assert differing and {own[name].shape[0] for name in differing} == {32}
    found = weights(tmp_path / "out")
    for name in differing:
        assert torch.allclose(found[name][:28], sum(state[name][:28] for state in others) / 2, atol=1e-6)
        assert torch.equal(found[name][28:], own[name][28:])
    assert capsys.readouterr().err.count("32 / 40 / 28 rows (base / experts): the first 28 are merged") == len(
        differing
    )


@pytest.mark.parametrize("make", [bert, vit, llama_classifier])
def test_heads_of_different_size_keep_the_base_s_and_are_said(tmp_path, make, capsys):
    base, experts = three(tmp_path, make, labels=(100, 10, 37))
    merge(Recipe(base, experts, "task_arithmetic", svc=True), tmp_path / "out")
    own, other, found = weights(base), weights(experts[0]), weights(tmp_path / "out")
    heads = [name for name in own if own[name].shape != other[name].shape]
    assert heads and all(torch.equal(found[name], own[name]) for name in heads)
    assert not any(torch.equal(found[name], own[name]) for name in own if name not in heads)
    said = capsys.readouterr().err
    for name in heads:
        assert f"{name!r}: 100 / 10 / 37 rows (base / experts), a head of each model's own; the base's is kept" in said
    with pytest.raises(ValueError, match=r"--strict: .* a head of each model's own"):
        merge(Recipe(base, experts, "task_arithmetic", strict=True), tmp_path / "strict")


@pytest.mark.parametrize("name", ["classifier", "head", "score", "fc", "head.fc", "classification_head.out_proj"])
def test_heads_are_known_by_name_in_files_without_a_configuration(tmp_path, name):
    states = [state_of(seed, **{"layers.0.mlp": (8, 8), name: (rows, 8)}) for seed, rows in enumerate((100, 10, 37))]
    states = [state | {f"{name}.bias": torch.ones(len(state[f"{name}.weight"]))} for state in states]
    base, *experts = (saved(tmp_path / f"m{index}", state) for index, state in enumerate(states))
    files = [f"{folder}/model.safetensors" for folder in (base, *experts)]
    merge(Recipe(files[0], tuple(files[1:]), "weight_average"), tmp_path / "out")
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[f"{name}.{part}"], states[0][f"{name}.{part}"]) for part in ("weight", "bias"))


@pytest.mark.parametrize("make, sizes", [
    (bert, (16, 24, 24)), (bert, (16, 16, 12)), (vit, (8, 12, 12)), (clip, (16, 16, 20)),
])  # fmt: skip
def test_position_tables_of_different_size_are_refused(tmp_path, make, sizes):
    base, experts = three(tmp_path, make, positions=sizes)
    with pytest.raises(ValueError, match=r"position_embedding.*a table of positions .* resize the expert's first"):
        merge(Recipe(base, experts, "weight_average"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "wte", "shared"])
def test_rows_of_which_no_file_says_that_they_are_a_vocabulary_are_refused(tmp_path, name):
    states = [state_of(seed, **{"mlp": (8, 8), name: (rows, 8)}) for seed, rows in enumerate((32, 40))]
    base, expert = (saved(tmp_path / f"m{index}", state) for index, state in enumerate(states))
    with pytest.raises(ValueError, match=r"no vocab_size or tokenizer of both models says .* --set"):
        merge(Recipe(base, (expert,), "weight_average"), tmp_path / "out")


@pytest.mark.parametrize("name", ["layers.0.mlp.fc", "layers.0.self_attn.k_proj", "layers.0.mlp.up_proj"])
def test_a_layer_of_another_width_is_refused(tmp_path, name):
    states = [state_of(seed, **{"mlp": (8, 8), name: (rows, 8)}) for seed, rows in enumerate((32, 40))]
    base, expert = (saved(tmp_path / f"m{index}", state) for index, state in enumerate(states))
    with pytest.raises(ValueError, match=r"shape \[40, 8\], and \[32, 8\] in .*; --set"):
        merge(Recipe(base, (expert,), "weight_average"), tmp_path / "out")


def _tokenizer_json(folder, tokens, added=()):
    added = [{"id": len(tokens) + index, "content": token} for index, token in enumerate(added)]
    vocabulary = {token: row for row, token in enumerate(tokens)}
    text = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(text))


def _unigram_json(folder, tokens, added=()):
    added = [{"id": len(tokens) + index, "content": token} for index, token in enumerate(added)]
    text = {"model": {"type": "Unigram", "vocab": [[token, -1.0] for token in tokens]}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(text))


def _vocab_json(folder, tokens, added=()):
    (folder / "vocab.json").write_text(json.dumps({token: row for row, token in enumerate(tokens)}))
    (folder / "added_tokens.json").write_text(json.dumps({t: len(tokens) + i for i, t in enumerate(added)}))


def _vocab_txt(folder, tokens, added=()):
    (folder / "vocab.txt").write_text("\n".join((*tokens, *added)) + "\n")


@pytest.mark.parametrize("write", [_tokenizer_json, _unigram_json, _vocab_json, _vocab_txt])
@pytest.mark.parametrize("padding", [0, 5])
def test_without_a_configuration_the_tokenizer_says_what_is_a_vocabulary(tmp_path, write, padding):
    tokens = [f"t{row}" for row in range(20)]
    base = saved(tmp_path / "base", state_of(0, mlp=(8, 8), embed=(20 + padding, 8)))
    expert = saved(tmp_path / "expert", state_of(1, mlp=(8, 8), embed=(23 + padding, 8)))
    write(tmp_path / "base", tokens)
    write(tmp_path / "expert", tokens, ("<a>", "<b>", "<c>"))
    merge(Recipe(base, (expert,), "weight_average"), tmp_path / "out")
    found, expected = (weights(folder)["embed.weight"] for folder in (tmp_path / "out", expert))
    torch.testing.assert_close(found, expected[: 20 + padding])
    tokens[3] = "other"
    write(tmp_path / "expert", tokens, ("<a>", "<b>", "<c>"))
    with pytest.raises(ValueError, match=r"expert: row 3 of its vocabulary is 'other', and 't3' in .*base; these are"):
        merge(Recipe(base, (expert,), "weight_average"), tmp_path / "again")
