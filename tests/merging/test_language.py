"""Suites of language models, on a random BERT and a random T5 and a task that both can learn."""

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.func import functional_call
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from common import cache, evaluation
from common.models.t5 import t5
from merging.suites import language, learning_rates, text_experts
from merging.suites.data.text_tasks import Examples, TextTask
from merging.suites.language import Backbone
from merging.suites.models import adapted
from merging.suites.models.language import Classifier, Generator, parameters
from merging.suites.text_experts import Base, FineTuning, TextRecipe, Trainee

CPU = torch.device("cpu")
RECIPE = TextRecipe(steps=40, t5_steps=80, batch_size=16, rank=2, probe_texts=8, validation_texts=0, test_texts=0)
KINDS = {"red": ("rose", "brick", "blood", "ruby"), "blue": ("sky", "sea", "jeans", "navy")}
OTHERS = ("a", "the", "is", "of", "on", "very", "near", "under")
NUMBERS = ("0.0", "2.0", "4.0")
WORDS = ("<pad>", "</s>", "<unk>", *KINDS, *KINDS["red"], *KINDS["blue"], *OTHERS, *NUMBERS, "colour", ":")
FULL, LORA, IA3 = FineTuning("full", 5e-3), FineTuning("lora", 2e-2), FineTuning("ia3", 5e-2)
ADAPTED = {  # ends of the names of what an adapter changes
    ("bert", "lora"): ("query.weight", "value.weight"),
    ("bert", "ia3"): (
        "key.weight", "key.bias", "value.weight", "value.bias", "0.output.dense.weight", "1.output.dense.weight",
    ),
    ("t5", "lora"): ("Attention.q.weight", "Attention.v.weight"),
    ("t5", "ia3"): ("Attention.k.weight", "Attention.v.weight", "wo.weight"),
}  # fmt: skip


def tokenizer(ending=""):
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ending:
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", model_max_length=16)


def bert():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(vocab_size=len(WORDS), max_position_embeddings=16, type_vocab_size=1)
    model = BertModel(BertConfig(initializer_range=0.2, **sizes), add_pooling_layer=False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)  # biases start from 0, and IA³ would leave them there
    return Base("bert", model, tokenizer())


def small_t5():
    torch.manual_seed(0)
    return Base("t5", t5(len(WORDS), 32, 2, heads=2, d_ff=64).eval(), tokenizer("</s>"), pooling="")


BASES = {"bert": bert, "t5": small_t5}


def draw(labels, split):
    """So many texts of each label: one word that tells it, in a random place among others."""
    generator = torch.Generator().manual_seed(["train", "validation", "test"].index(split))
    texts, targets = [], []
    for place in range(160 if split == "train" else 70):
        label = place % len(labels)
        length, at, own = torch.randint(4, (3,), generator=generator).tolist()
        words = [OTHERS[index] for index in torch.randint(len(OTHERS), (length + 1,), generator=generator)]
        words.insert(min(at, length), labels[label][own])
        texts.append((" ".join(words),))
        targets.append(label)
    return Examples(texts, targets)


def colours(name):
    return TextTask(name, tuple(KINDS), partial(draw, list(KINDS.values())), f"{name}-1", "colour : {0}")


def brightness(name):
    """A regression: 0, 2 and 4."""

    def split(which):
        examples = draw([KINDS["red"], KINDS["blue"], ("very", "near", "under", "on")], which)
        return replace(examples, targets=[2.0 * target for target in examples.targets])

    return TextTask(name, (), split, f"{name}-1", "colour : {0}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    forget()
    yield
    forget()


def forget():
    language.suite.cache_clear()
    language._base.cache_clear()


def make_suite(monkeypatch, name, way, task=colours, seed=0, tasks=2, recipe=RECIPE):
    backbone = Backbone(lambda recipe: BASES[name](), ("one", "two"), task, way.tuned, (way.learning_rate,))
    monkeypatch.setitem(language.BACKBONES, name, backbone)
    return language.suite(name, tasks, seed, recipe, CPU)


# The probe ------------------------------------------------------------------------------------------------------------


def test_the_probe_is_a_logistic_regression_on_means_of_hidden_states():
    base, task, recipe = bert(), colours("one"), replace(RECIPE, probe_texts=30, test_texts=50)

    def reference(split, count):
        examples, rows = task.split(split), []
        for (text,) in examples.texts[:count]:
            with torch.no_grad():
                rows.append(base.model(**base.tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0))
        return torch.stack(rows).numpy(), examples.targets[:count]

    data = {split: reference(split, count) for split, count in dict(train=30, validation=30, test=50).items()}
    fits = [
        LogisticRegression(C=penalty, max_iter=2000).fit(*data["train"]) for penalty in text_experts.PROBE_STRENGTHS
    ]
    best = max(fits, key=lambda fit: fit.score(*data["validation"]))
    found = text_experts.probe(base, task, recipe, CPU)
    head, scores = load_file(found.path / "head.safetensors"), json.loads((found.path / "scores.json").read_text())
    assert scores == {"chance": 50.0, "probe": pytest.approx(100 * best.score(*data["test"])), "test": 50}
    logits = torch.tensor(data["test"][0]) @ head["weight"].T + head["bias"]
    expected = torch.tensor(best.predict_proba(data["test"][0]), dtype=torch.float32)
    torch.testing.assert_close(logits.softmax(1), expected, atol=1e-3, rtol=0)


# Training -------------------------------------------------------------------------------------------------------------


def loss_and_accuracy(base, state, task, head):
    """Of the whole test set."""
    network = Generator(base.model, base.tokenizer, task.classes)
    if head:
        network = Classifier(base.model, base.pooling, head["weight"], head["bias"])
    rows = task.split("test")
    inputs, targets = base.inputs(task, rows.texts), base.targets(task, rows.targets)
    with torch.no_grad():
        loss = functional_call(
            Trainee(network), {f"network.encoder.{name}": t for name, t in state.items()}, (inputs, targets)
        )
    predicted, right = evaluation.predictions(network, [state], [(inputs, base.labels(task, rows.targets))])
    return loss.item(), evaluation.score(predicted[0], right)


@pytest.mark.parametrize("way", [FULL, LORA, IA3], ids=lambda way: way.tuned)
@pytest.mark.parametrize("name", BASES)
def test_an_expert_learns_its_task_and_changes_what_it_may(name, way, monkeypatch):
    suite = make_suite(monkeypatch, name, way, tasks=1)
    base, task = language._base(name, RECIPE), colours("one")
    start = parameters(BASES[name]().model)
    if way.tuned == "full":
        assert suite.pretrained.keys() == start.keys() and not suite.adapters
    else:
        assert list(suite.pretrained) == [key for key in start if key.endswith(ADAPTED[name, way.tuned])]
        assert (suite.adapters[0] / "adapter_config.json").exists()
    assert all(suite.pretrained[key].equal(start[key]) for key in suite.pretrained)
    assert all(not suite.experts[0][key].equal(start[key]) for key in suite.pretrained)
    head = None
    if base.pooling:
        probe = load_file(text_experts.probe(base, task, RECIPE, CPU).path / "head.safetensors")
        head = load_file(text_experts.fine_tune(base, task, way, 0, RECIPE, CPU).path / "head.safetensors")
        assert all(not head[key].equal(probe[key]) for key in probe)
        first = loss_and_accuracy(base, suite.pretrained, task, probe)
    else:
        first = loss_and_accuracy(base, suite.pretrained, task, None)
    last = loss_and_accuracy(base, suite.experts[0], task, head)
    assert last[0] < first[0]
    if way.tuned == "full":  # a random model has little that an adapter could use
        assert last[1] > max(first[1], 50) + 5


def test_batches_hold_each_class_equally_often_and_texts_of_like_length():
    base, task, recipe = bert(), colours("one"), RECIPE.training(bert(), FULL)
    batches = list(text_experts.training_batches(base, task, replace(recipe, steps=16), 0))
    assert len(batches) == 16
    counts = [torch.cat([targets for _, targets in batches[at : at + 8]]).bincount() for at in (0, 8)]
    assert [count.tolist() for count in counts] == [[64, 64], [64, 64]]
    lengths = torch.stack([inputs["attention_mask"].sum(1).float() for inputs, _ in batches])  # (steps, B)
    assert lengths.std(1).mean() < 0.5 * lengths.std()
    again = text_experts.training_batches(base, task, replace(recipe, steps=16), 0)
    other = text_experts.training_batches(base, task, replace(recipe, steps=16), 1)
    first, same, different = (next(iter(loader))[0]["input_ids"] for loader in (batches, again, other))
    assert first.equal(same) and not first.equal(different)


# Suites ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_what_a_suite_predicts_is_what_a_loaded_state_says_of_one_text_after_the_other(name, monkeypatch):
    recipe = replace(RECIPE, test_texts=12)
    suite, base = make_suite(monkeypatch, name, FULL, recipe=recipe), language._base(name, recipe)
    examples = text_experts.first(colours("one").split("test"), 12)
    states = [suite.pretrained, *suite.experts]
    for position, (predicted, right) in enumerate(suite.answers(states)):
        assert predicted.shape == (3, 12) and len(set(predicted[position + 1].tolist())) > 1
        network = copy.deepcopy(suite.networks[position])
        order = sorted(range(12), key=lambda index: len(examples.texts[index][0]))
        assert right.tolist() == [examples.targets[index] for index in order]
        for state, found in zip(states, predicted, strict=True):
            network.encoder.load_state_dict(state, strict=False)
            with torch.no_grad():
                alone = [network(base.inputs(colours("one"), [examples.texts[index]])).item() for index in order]
            assert found.tolist() == alone
    assert all(suite.pretrained[key].equal(start) for key, start in parameters(BASES[name]().model).items())


def test_limits_and_the_rows_of_references(monkeypatch):
    recipe = replace(RECIPE, test_texts=20, validation_texts=10)
    suite = make_suite(monkeypatch, "bert", FULL, recipe=recipe)
    sizes = {split: sum(len(labels) for _, labels in suite.batches("one", split)) for split in ("test", "validation")}
    assert sizes == {"test": 20, "validation": 10}
    rows = list(language.probe_rows("bert", suite, recipe))
    assert [(row["method"], row["task"]) for row in rows] == [
        (m, t) for t in ("one", "two") for m in ("chance", "probe")
    ]
    assert {row["images"] for row in rows} == {20}
    own = list(suite.own_rows())
    assert {row["images"] for row in own} == {20} and {row["metric"] for row in own} == {"accuracy"}


def test_a_regression_is_scored_by_rank(monkeypatch):
    suite = make_suite(monkeypatch, "t5", FULL, brightness, tasks=1)
    ((predicted, right),) = suite.answers([suite.experts[0]])
    assert right.dtype == predicted.dtype == torch.float32 and set(right.tolist()) == {0.0, 2.0, 4.0}
    rows = {row["method"]: row for row in suite.own_rows()}
    assert {row["metric"] for row in rows.values()} == {"Spearman"}
    assert rows["expert"]["value"] == pytest.approx(100 * spearmanr(predicted[0], right).statistic) and not math.isnan(
        rows["expert"]["value"]
    )
    assert rows["expert"]["value"] > max(rows["pretrained"]["value"], 30)


def test_nothing_is_trained_twice_and_every_setting_counts(monkeypatch):
    first = make_suite(monkeypatch, "bert", LORA, tasks=1)
    records = len(cache.RECORDS)
    forget()
    again = make_suite(monkeypatch, "bert", LORA, tasks=1)
    assert all(record["hit"] for record in cache.RECORDS[records:]) and len(cache.RECORDS) > records
    assert again.key == first.key
    assert all(one[key].equal(two[key]) for one, two in zip(first.experts, again.experts, strict=True) for key in one)
    others = [make_suite(monkeypatch, "bert", LORA, seed=1, tasks=1)]
    for way, recipe in [
        (LORA, replace(RECIPE, rank=3)),
        (FineTuning("lora", 1e-3), RECIPE),
        (LORA, replace(RECIPE, test_texts=9)),
    ]:
        forget()
        others.append(make_suite(monkeypatch, "bert", way, tasks=1, recipe=recipe))
    assert len({suite.key for suite in (first, *others)}) == 5


def test_what_there_is_not_is_named():
    known = r"there are MiniLM, MiniLM shifted, MiniLM LoRA, .*T0-3B IA³"
    with pytest.raises(ValueError, match=f"unknown backbone 'BERT-huge'; {known}"):
        language.check_backbones(["MiniLM", "BERT-huge"])


# The choice of a learning rate ----------------------------------------------------------------------------------------


def seen_at(rates, texts=400):
    """What two tasks would have shown: rate → mean accuracy, the tasks 10 points apart."""
    return [
        dict(learning_rate=rate, task=task, accuracy=mean + 5 * sign, texts=texts, norm=1.0)
        for rate, mean in rates.items()
        for task, sign in (("one", 1), ("two", -1))
    ]


@pytest.mark.parametrize(
    ("rates", "texts", "chosen"),
    [
        ({1e-3: 60.0, 2e-3: 69.0, 4e-3: 70.0}, 400, 2e-3),  # the standard error of 70 is 1.6
        ({1e-3: 68.5, 2e-3: 69.0, 4e-3: 70.0}, 400, 1e-3),
        ({1e-3: 68.3, 2e-3: 69.0, 4e-3: 70.0}, 400, 2e-3),
        ({1e-3: 60.0, 2e-3: 69.0, 4e-3: 70.0}, 4000, 4e-3),  # 0.5
        ({4e-3: 70.0, 1e-3: 70.0}, 400, 1e-3),
        ({1e-3: 100.0 - 5, 2e-3: 20.0}, 400, 1e-3),
    ],
)
def test_the_smallest_rate_within_one_standard_error_of_the_best_is_taken(rates, texts, chosen):
    seen = seen_at(rates, texts)
    best = max(rates.values())
    errors = [math.sqrt(share * (1 - share) / texts) for share in ((best + 5) / 100, (best - 5) / 100)]
    standard_error = 100 * math.sqrt(sum(error**2 for error in errors)) / 2
    by_hand = min(rate for rate, mean in rates.items() if mean >= best - standard_error)
    assert learning_rates.smallest_of_the_best(seen) == by_hand == chosen


@pytest.mark.parametrize("norms", [{8e-3: 25.0}, {8e-3: 20.0, 4e-3: 19.9}, {8e-3: 60.0, 4e-3: 33.0, 2e-3: 21.0}])
def test_a_rate_at_which_some_expert_leaves_the_neighbourhood_of_the_base_is_not_taken(norms):
    seen = seen_at({1e-3: 50.0, 2e-3: 60.0, 4e-3: 70.0, 8e-3: 80.0})
    for one in seen:
        one["norm"] = norms.get(one["learning_rate"], 1.0) if one["task"] == "two" else 1.0
    allowed = [one["learning_rate"] for one in seen if norms.get(one["learning_rate"], 0.0) < 20]
    assert learning_rates.smallest_of_the_best(seen) == max(allowed)  # each rate is 10 points above the one before
    with pytest.raises(ValueError, match=r"at 0\.001, the smallest of the learning rates, .*take smaller rates"):
        learning_rates.smallest_of_the_best([one | {"norm": 20.0} for one in seen])


@pytest.mark.parametrize("name", BASES)
def test_a_grid_is_judged_on_validation_texts_and_a_single_rate_trains_nothing(name, monkeypatch):
    base, task, grid = BASES[name](), colours("one"), (1e-5, 1e-4)
    recipe = replace(RECIPE, rate_tasks=1)
    rate, seen = learning_rates.choose(base, [task], "lora", grid, recipe, CPU)
    assert rate in grid and [one["learning_rate"] for one in seen] == list(grid)
    for one in seen:
        how = FineTuning("lora", one["learning_rate"])
        found = text_experts.fine_tune(base, task, how, learning_rates.SEED, recipe, CPU)
        state = adapted.folded(base.model, found.path / "adapter")
        start = parameters(base.model)
        changed = [key for key in start if not state[key].equal(start[key])]
        norm = sum(float((state[key] - start[key]).double().square().sum()) for key in changed) ** 0.5
        base_norm = sum(float(start[key].double().square().sum()) for key in changed) ** 0.5
        assert one["norm"] == pytest.approx(100 * norm / base_norm, rel=1e-5)
        rows = task.split("validation")
        head = load_file(found.path / "head.safetensors") if base.pooling else None
        network = text_experts.network(base, task, head)
        network.encoder.load_state_dict(state, strict=False)
        with torch.no_grad():
            right = network(base.inputs(task, rows.texts)) == base.labels(task, rows.targets)
        assert one["accuracy"] == pytest.approx(100 * right.float().mean().item()) and one["texts"] == len(right)
    table = pd.DataFrame(learning_rates.rows(rate, seen)).assign(backbone=name)
    shown = learning_rates.table(table)
    assert list(shown.learning_rate) == list(grid) and list(shown.chosen) == ["yes" * (one == rate) for one in grid]
    monkeypatch.setattr(text_experts, "fine_tune", None)
    assert learning_rates.choose(base, [task], "lora", (3e-3,), recipe, CPU) == (3e-3, [])
    for rates in [(1.0, 2.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0, 4.0)]:  # without tasks nothing is chosen
        assert learning_rates.choose(base, [], "lora", rates, recipe, CPU) == (rates[(len(rates) - 1) // 2], [])


def test_fixed_rates_are_those_that_have_been_used():
    used = {"MiniLM": 3e-4, "MiniLM LoRA": 2e-3, "MiniLM IA³": 1e-2, "T5": 1e-3, "BERT": 2e-5, "T0-3B IA³": 3e-3}
    for name, rate in used.items():
        grid = language.BACKBONES[name].learning_rates
        assert list(grid) == sorted(grid) and learning_rates.choose(None, [], "full", grid, RECIPE, CPU)[0] == rate


def test_a_suite_is_made_of_experts_at_the_chosen_rate(monkeypatch):
    backbone = Backbone(lambda recipe: bert(), ("one", "two"), colours, "lora", (1e-3, 2e-2))
    monkeypatch.setitem(language.BACKBONES, "bert", backbone)
    monkeypatch.setattr(learning_rates, "smallest_of_the_best", lambda seen: 2e-2)
    recipe = replace(RECIPE, rate_tasks=1)
    suite = language.suite("bert", 1, 1, recipe, CPU)
    assert language.tuning("bert", recipe, CPU) == FineTuning("lora", 2e-2)
    forget()
    alone = make_suite(monkeypatch, "bert", FineTuning("lora", 2e-2), seed=1, tasks=1, recipe=recipe)
    assert all(suite.experts[0][key].equal(alone.experts[0][key]) for key in suite.pretrained)


# Validation while training -------------------------------------------------------------------------------------------


class Point(torch.nn.Module):
    """A model whose loss is the square of its only parameter."""

    def __init__(self):
        super().__init__()
        self.place, self.fixed = torch.nn.Parameter(torch.tensor(4.0)), torch.nn.Parameter(torch.tensor(9.0))
        self.fixed.requires_grad_(False)

    def forward(self, inputs, targets):
        assert not self.training
        return self.place**2


def test_the_state_of_lowest_validation_loss_is_kept():
    model = Point()
    lowest = text_experts.Lowest(model, [({}, torch.zeros(3)), ({}, torch.zeros(1))], every=2)
    for done, place in enumerate([3.0, 2.0, 0.5, 1.0, -1.0, 5.0], start=1):
        model.place.data.fill_(place)
        lowest(done, torch.tensor(0.0), None)
    assert lowest.seen == [(0, 16.0), (2, 4.0), (4, 1.0), (6, 25.0)] and model.training
    model.fixed.data.fill_(7.0)
    lowest.restore()
    assert (model.place.item(), model.fixed.item()) == (1.0, 7.0)  # what is not trained is left alone


@pytest.mark.parametrize("way", [FULL, LORA])
@pytest.mark.parametrize("name", BASES)
def test_an_expert_is_the_state_of_lowest_validation_loss(name, way, monkeypatch):
    """Also where it is not the last: at this rate a whole BERT gets worse again."""
    base, task = BASES[name](), colours("a")
    recipe = replace(RECIPE, steps=30, t5_steps=30, validate_every=5)
    found = text_experts.fine_tune(base, task, FineTuning(way.tuned, 0.3), 0, recipe, CPU).path
    seen = json.loads((found / "progress.json").read_text())
    assert [step for step, _ in seen] == list(range(0, 31, 5))
    head = load_file(found / "head.safetensors") if base.pooling else None
    state = (
        load_file(found / "model.safetensors") if way.tuned == "full" else adapted.folded(base.model, found / "adapter")
    )
    network = copy.deepcopy(text_experts.network(base, task, head))
    network.encoder.load_state_dict(state, strict=False)
    batches = text_experts._validation_batches(base, task)
    with torch.no_grad():
        losses = [float(Trainee(network.eval())(*batch)) * len(batch[1]) for batch in batches]
    lowest = min(loss for step, loss in seen if step)
    assert sum(losses) / sum(len(batch[1]) for batch in batches) == pytest.approx(lowest, rel=1e-4)
    if (name, way) == ("bert", FULL):
        assert seen[-1][1] > lowest


def test_progress_is_in_the_rows_and_the_table(monkeypatch):
    recipe = replace(RECIPE, steps=10, validate_every=5)
    suite = make_suite(monkeypatch, "bert", FULL, recipe=recipe)
    rows = pd.DataFrame(language.progress_rows("bert", suite, 0, recipe)).assign(backbone="bert", seed=0)
    assert set(rows.task) == set(suite.tasks) and set(rows.step) == {0, 5, 10} and (rows.value > 0).all()
    later = rows.assign(seed=1, value=rows.value.where(rows.step != 5, 0.01))
    table = language.progress_table(pd.concat([rows, later])).set_index("task")
    first, line = rows[rows.task == suite.tasks[0]].set_index("step").value, table.loc[suite.tasks[0]]
    trained = first.drop(0)  # what an expert never is: it may have the lowest loss of all
    assert line["before"] == f"{first[0]:.3f} ± 0.000"
    assert line["lowest"].startswith(f"{(trained.min() + 0.01) / 2:.3f} ± ")
    assert line["step of the lowest"].startswith(f"{(trained.idxmin() + 5) / 2:.0f} ± ")
    assert line["falling"] == f"{int(trained.idxmin() == 10)} of 2"
    worse = rows.assign(value=rows.value.where(rows.step == 0, rows.value + 9))
    spoilt = language.progress_table(worse).set_index("task").loc[suite.tasks[0]]
    assert float(spoilt["lowest"]) > float(spoilt["before"])
    assert list(language.progress_rows("bert", suite, 0, RECIPE)) == []
