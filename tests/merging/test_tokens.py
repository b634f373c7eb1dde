"""The union of vocabularies: rows, tokenizer and configuration in step, as transformers itself loads them."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from models_on_disk import content, saved, state_of, weights
from tokenizers import Tokenizer, models, pre_tokenizers

from merging import checkpoints
from merging.command import changes, plan
from merging.command import tokens as command_tokens
from merging.command.main import main, merge
from merging.command.recipe import Recipe

WORDS = [f"w{index}" for index in range(30)]
ADDED = (("<a>", "<b>"), ("<b>", "<c>", "<a>"), ())  # of three experts
SMALL = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def llama(rows, tied=False):
    config = transformers.LlamaConfig(**SMALL, vocab_size=rows, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def tied_llama(rows):
    return llama(rows, tied=True)


def bert(rows):
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, vocab_size=rows))


def gpt2(rows):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=rows))


def t5(rows):
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=rows)
    return transformers.T5ForConditionalGeneration(config)


def gemma(rows):
    text = dict(vocab_size=rows, head_dim=4, num_key_value_heads=1, **SMALL)
    vision = SMALL | dict(image_size=8, patch_size=4, num_channels=1)
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def tokenizer():
    whole = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="w0"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="w0")


def on_disk(folder, make, seed, added=(), rows=None):
    torch.manual_seed(seed)
    words = tokenizer()
    words.add_tokens([transformers.AddedToken(token, special=token == "<a>") for token in added])
    model = make(rows or len(words))
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def family(tmp_path, make, rows=None, added=ADDED):
    base = on_disk(tmp_path / "base", make, 0, rows=rows)
    return base, tuple(on_disk(tmp_path / f"e{i}", make, i + 1, own, rows) for i, own in enumerate(added))


def expected_rows(base, experts, name):
    """Mean of rows by token, in a loop: the base's tokens over all experts, added ones over those that have them."""
    states = [weights(folder)[name] for folder in experts]
    ids = [transformers.AutoTokenizer.from_pretrained(folder).get_vocab() for folder in experts]
    rows = [torch.stack([state[row] for state in states]).mean(0) for row in range(len(WORDS))]
    for token in ("<a>", "<b>", "<c>"):
        rows.append(torch.stack([s[own[token]] for s, own in zip(states, ids, strict=True) if token in own]).mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("shard_size, span", [("5GB", changes.RANGE), ("1KB", 24)])
@pytest.mark.parametrize("make", [llama, tied_llama, bert, gpt2, t5, gemma])
def test_the_output_loads_and_each_added_token_has_the_mean_of_its_rows(
    tmp_path, make, shard_size, span, monkeypatch, capsys
):
    monkeypatch.setattr(changes, "RANGE", span)
    base, experts = family(tmp_path, make)
    out = tmp_path / "out"
    merge(Recipe(base, experts, "weight_average", tokens="union", shard_size=shard_size), out)
    assert "3 tokens that experts have added are rows 30 to 32 of the vocabulary" in capsys.readouterr().err
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert [words.encode(token) for token in ("<a>", "<b>", "<c>")] == [[30], [31], [32]]
    assert words.encode("w3 <b> w7") == [3, 31, 7]
    assert "<a>" in words.all_special_tokens or words.added_tokens_decoder[30].special
    assert not words.added_tokens_decoder[31].special
    model, loading = type(make(8)).from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()) and model.get_input_embeddings().weight.shape == (33, 8)
    assert model.config.get_text_config().vocab_size == 33
    own, found = weights(base), weights(out)
    resized = [name for name in own if found[name].shape != own[name].shape]
    assert resized and found.keys() == own.keys()
    for name in resized:
        torch.testing.assert_close(found[name], expected_rows(base, experts, name), rtol=1e-5, atol=1e-6)
    for name in own.keys() - set(resized):
        expected = torch.stack([weights(folder)[name] for folder in experts]).mean(0)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_padding_takes_the_added_tokens_first(tmp_path):
    base, experts = family(tmp_path, llama, rows=32)  # 30 tokens
    base_rows = weights(base)["model.embed_tokens.weight"]
    for folder in experts:
        assert len(weights(folder)["model.embed_tokens.weight"]) == 32
    spare = family(tmp_path / "more", llama, rows=40)
    for (own, others), rows in (((base, experts[:1]), 32), (spare, 40)):
        out = tmp_path / f"out{rows}"
        merge(Recipe(own, others, "weight_average", tokens="union"), out)
        found = weights(out)["model.embed_tokens.weight"]
        assert len(found) == rows == transformers.AutoConfig.from_pretrained(out).vocab_size
    torch.testing.assert_close(found[:33], expected_rows(*spare, "model.embed_tokens.weight"), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[33:], weights(spare[0])["model.embed_tokens.weight"][33:])
    assert len(base_rows) == 32


@pytest.mark.parametrize("method, svc", [("task_arithmetic", True), ("ties", False), ("tsv_m", True), ("dare", False)])
def test_the_base_s_tokens_are_merged_as_without_added_ones(tmp_path, method, svc):
    base, experts = family(tmp_path, llama)
    options = {"seed": 0} if method == "dare" else {}
    for tokens in ("base", "union"):
        merge(Recipe(base, experts, method, svc=svc, tokens=tokens, **options), tmp_path / f"out-{tokens}")
    plain, united = (weights(tmp_path / f"out-{tokens}") for tokens in ("base", "union"))
    for name, tensor in plain.items():
        torch.testing.assert_close(united[name][: len(tensor)], tensor, rtol=0, atol=0)
    assert united["lm_head.weight"].shape == (33, 8)


def test_experts_whose_tokens_stand_in_other_rows_are_matched_by_token(tmp_path):
    base, experts = family(tmp_path, llama, added=((), ()))
    path = tmp_path / "e0" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["w3"], vocabulary["w9"] = vocabulary["w9"], vocabulary["w3"]
    path.write_text(json.dumps(values))
    on_disk(tmp_path / "e1", llama, 7, ("<z>",))
    merge(Recipe(base, experts, "weight_average", tokens="union"), tmp_path / "out")
    first, second, found = (weights(folder)["lm_head.weight"] for folder in (*experts, tmp_path / "out"))
    torch.testing.assert_close(found[3], (first[9] + second[3]) / 2)
    torch.testing.assert_close(found[9], (first[3] + second[9]) / 2)
    torch.testing.assert_close(found[30], second[30])


def test_without_any_tokenizer_one_expert_may_have_more_rows(tmp_path):
    base = saved(tmp_path / "base", state_of(0, mlp=(8, 8), embed=(20, 8)), vocab_size=20)
    same = saved(tmp_path / "same", state_of(1, mlp=(8, 8), embed=(20, 8)), vocab_size=20)
    more = saved(tmp_path / "more", state_of(2, mlp=(8, 8), embed=(23, 8)), vocab_size=23)
    merge(Recipe(base, (same, more), "weight_average", tokens="union"), tmp_path / "out")
    found = weights(tmp_path / "out")["embed.weight"]
    states = [weights(folder)["embed.weight"] for folder in (same, more)]
    torch.testing.assert_close(found[:20], (states[0] + states[1][:20]) / 2)
    assert torch.equal(found[20:], states[1][20:])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 23
    again = saved(tmp_path / "again", state_of(3, mlp=(8, 8), embed=(21, 8)), vocab_size=21)
    with pytest.raises(ValueError, match=r"more and .*again both have rows that .*base lacks, and no tokenizer says"):
        merge(Recipe(base, (more, again), "weight_average", tokens="union"), tmp_path / "refused")


def test_nothing_added_is_the_same_merge(tmp_path):
    base, experts = family(tmp_path, llama, added=((), ()))
    for tokens in ("base", "union"):
        merge(Recipe(base, experts, "ties", tokens=tokens), tmp_path / f"out-{tokens}")
    first, second = (content(tmp_path / f"out-{tokens}") for tokens in ("base", "union"))
    odd = {name for name in first if first[name] != second[name]}
    assert first.keys() == second.keys() and odd == {"README.md", "merging.yaml"}


def _without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _in_the_model(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["new"] = 33
    path.write_text(json.dumps(values))


def _other_words(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w5"', '"v5"'))


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: _without_tokenizer(folder.parent / "base"), r"e0 has a tokenizer, and .*base none; add the base's"),
    (_in_the_model, r"'new' of .*e1 is no added token, but one of the model inside its tokenizer"),
    (_other_words, r"the tokenizer of .*e1 lacks 'w5', which .*base has; only tokenizers that add tokens"),
    (lambda folder: on_disk(folder, llama, 1, ("<a>", "<b>"), rows=31), r"'lm_head\.weight': 31 rows, and 32 tokens"),
])  # fmt: skip
def test_what_cannot_be_united_is_refused_in_one_line(tmp_path, spoil, message, capsys):
    base, experts = family(tmp_path, llama)
    spoil(tmp_path / "e1")
    flags = ["--base", base, "--experts", *experts, "--method", "ties", "--tokens", "union"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m merging: ")]
    assert len(said) == 1 and re.search(message, said[0]), said
    assert not (tmp_path / "out").exists()


def test_adapters_and_kept_embeddings_are_refused(tmp_path):
    base, experts = family(tmp_path, llama)
    with pytest.raises(ValueError, match="an adapter cannot hold added rows"):
        merge(Recipe(base, experts, "ties", tokens="union", output="adapter", rank=2), tmp_path / "out")
    with pytest.raises(ValueError, match=r"'lm_head\.weight': rows are added to it, and it is not merged"):
        merge(Recipe(base, experts, "ties", tokens="union", set=("lm_head.weight:merge=false",)), tmp_path / "out")
    from peft import LoraConfig, get_peft_model

    get_peft_model(llama(30), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"--tokens union: .*adapter is an adapter; fold adapters into full models"):
        merge(Recipe(base, (str(tmp_path / "adapter"),), "ties", tokens="union"), tmp_path / "out")


def test_each_tokenizer_is_read_once_and_united_once(tmp_path, monkeypatch):
    """However many tensors have rows of tokens, and though the output's tokenizer is written at the end."""
    recipe = Recipe(*family(tmp_path, llama), "weight_average", tokens="union")
    read, united = [], []
    tokens, joint = checkpoints.read_tokens, plan.union
    monkeypatch.setattr(checkpoints, "read_tokens", lambda folder: read.append(folder) or tokens(folder))
    monkeypatch.setattr(plan, "union", lambda *models: united.append(models) or joint(*models))
    monkeypatch.setattr(command_tokens, "union", lambda *models: united.append(models) or joint(*models))
    merge(recipe, tmp_path / "out")
    assert sorted(read) == sorted(map(Path, (recipe.base, *recipe.experts))) and len(united) == 1


@pytest.mark.parametrize("text", [
    '{"model": null}', '{"model": {"vocab": 3}}', '{"model": {"vocab": [[]]}}', '{"model": {"vocab": {"a": "b"}}}',
    '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}', '{"added_tokens": null}', "[1]", "{",
    '{"model": {"vocab": {"a": -1}}}',
])  # fmt: skip
def test_a_broken_tokenizer_is_refused_in_one_line_that_names_it(tmp_path, text, capsys):
    base, experts = family(tmp_path, llama)
    (Path(experts[1]) / "tokenizer.json").write_text(text)
    flags = ["--base", base, "--experts", *experts, "--method", "weight_average", "--tokens", "union"]
    capsys.readouterr()  # transformers' own progress
    assert main([*flags, "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m merging: {experts[1]}/tokenizer.json: ") and "download it again" in line
