"""The variants of a merger: what they are called, adapters in their own form, and a table whose answers are known."""

import math

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from common.models.t5 import t5
from merging import MERGERS, apply, calibrate, merger, norm_match, task_vector, weight_average
from merging.adapters import Adapter, fold_adapter, load_adapter
from merging.lowrank import LowRank, merge_and_calibrate
from merging.suites import comparison
from merging.suites.comparison import (
    BASE,
    BASE_MEAN,
    BASE_NORM,
    BASE_TUNED,
    BASE_WHOLE,
    SVC,
    SVC_1,
    SVC_MEAN,
    SVC_NORM,
    SVC_TUNED,
    adapter_forms,
    dense_forms,
)
from merging.suites.models import adapted, language
from merging.suites.suite import Suite

TASKS, ALPHAS = 3, (1 / 3, 1.0)


def noise(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def lora(seed):
    return Adapter(
        "lora",
        {
            "q.weight": LowRank(
                noise(12, 2, seed=seed) + noise(12, 2, seed=9), noise(2, 20, seed=seed + 20), scale=2.0
            ),
            "v.weight": LowRank(noise(15, 3, seed=seed + 40), noise(3, 8, seed=seed + 60)),
        },
    )


def ia3(seed):
    """A vector on the outputs of k, with its bias, and one on the inputs of wo."""
    vectors = {"k.weight": 1 + 0.2 * noise(6, 1, seed=seed), "wo.weight": 1 + 0.2 * noise(1, 9, seed=seed + 20)}
    return Adapter("ia3", vectors=vectors, config={"target_modules": ["k", "wo"], "feedforward_modules": ["wo"]})


LORA_BASE = {"q.weight": noise(12, 20, seed=100), "v.weight": noise(15, 8, seed=101)}
IA3_BASE = {"k.weight": noise(6, 5, seed=102), "k.bias": noise(6, seed=103), "wo.weight": noise(4, 9, seed=104)}


def folded_updates(adapters, base):
    return [task_vector(fold_adapter(adapter, base), base) for adapter in adapters]


def relative(found, expected):
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


# Forms of a merger ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGERS)
def test_lora_merged_in_its_own_form_is_lora_merged_as_matrices(method):
    adapters = [lora(seed) for seed in range(TASKS)]
    updates = folded_updates(adapters, LORA_BASE)
    forms = adapter_forms(adapters, LORA_BASE, method, updates, 1, ALPHAS)
    dense = dense_forms(method, updates, 1, ALPHAS)
    if MERGERS[method].basis:  # their factored form is calibrated in the basis in which they are built
        dense = {alpha: merge_and_calibrate(updates, method, alpha and {"alpha": alpha}) for alpha in forms}
    assert list(forms) == [None, *ALPHAS] == list(dense)
    for alpha, update in forms.items():
        assert update.keys() == LORA_BASE.keys() and relative(update, dense[alpha]) < 1e-5
    assert relative(forms[None], forms[1 / 3]) > 1e-2


def test_dense_forms_take_the_seed_and_the_options_of_svc():
    updates = folded_updates([lora(seed) for seed in range(TASKS)], LORA_BASE)
    forms = dense_forms("dare", updates, 5, [0.5], space="input")
    merged = merger("dare")(updates, seed=5)
    assert (
        relative(forms[None], merged) == 0 == relative(forms[0.5], calibrate(merged, updates, alpha=0.5, space="input"))
    )
    assert relative(dense_forms("dare", updates, 6, [])[None], merged) > 0.1


@pytest.mark.parametrize("method", ["task_arithmetic", "weight_average", "ties", "dare"])
def test_ia3_is_calibrated_by_the_rule_for_vectors(method):
    adapters = [ia3(seed) for seed in range(TASKS)]
    forms = adapter_forms(adapters, IA3_BASE, method, folded_updates(adapters, IA3_BASE), 3, ALPHAS)
    steps = [{name: (vector - 1).flatten() for name, vector in adapter.vectors.items()} for adapter in adapters]
    merged = merger(method)(steps, **({"seed": 3} if method == "dare" else {}))
    for alpha, update in forms.items():
        for name, total in merged.items():
            shares = [float(total @ step[name] / step[name].square().sum()) for step in steps]
            gamma = 1.0 if alpha is None else TASKS / sum(shares)
            assert alpha is None or abs(gamma - 1) > 0.01
            change = (gamma * total).view(adapters[0].vectors[name].shape) * IA3_BASE[name]
            assert relative({name: update[name]}, {name: change}) < 1e-6
            if name == "k.weight":
                assert relative({"b": update["k.bias"]}, {"b": gamma * total * IA3_BASE["k.bias"]}) < 1e-6


def bert():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes), add_pooling_layer=False)


def gpt2():
    sizes = dict(n_positions=16, n_embd=16, n_layer=2, n_head=2, n_inner=40)
    return GPT2Model(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=1, **sizes))


MODELS = {"bert": bert, "gpt2": gpt2, "t5": lambda: t5(50, 16, 2, heads=2, d_ff=40)}


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_folded_as_peft_does_it(name, kind, tmp_path):
    torch.manual_seed(0)
    base = MODELS[name]()
    start = {key: tensor.clone() for key, tensor in language.parameters(base).items()}
    model = MODELS[name]()
    model.load_state_dict(base.state_dict())
    trained = adapted.adapt(model, kind, rank=3)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    adapted.save(trained, tmp_path)
    ours, theirs = fold_adapter(load_adapter(tmp_path), start), adapted.folded(base, tmp_path)
    changed = [key for key in start if not theirs[key].equal(start[key])]
    assert changed == [key for key in start if not ours[key].equal(start[key])] and len(changed) >= 2
    for key in start:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
        assert language.parameters(base)[key].equal(start[key])  # left unchanged


# Labels ---------------------------------------------------------------------------------------------------------------


def dense_updates():
    return [
        {"weight": noise(6, 5, seed=seed), "bias": noise(6, seed=seed + 10), "embedding": noise(4, 5, seed=seed + 20)}
        for seed in range(TASKS)
    ]


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "weight_average"])
def test_the_variants_of_a_merger(method):
    asked = []

    def score(update, scales):
        """A quarter of the norm is best."""
        asked.extend(scales)
        return [-abs(float(torch.tensor(scale * 4).log2())) for scale in scales]

    updates = dense_updates()
    found = comparison.variants(method, updates, 0, score)
    published = 1.0 if method == "tsv_m" else 1 / TASKS
    with_mean = ["mean"] if method == "task_arithmetic" else []  # the others average these tensors anyway
    expected = [
        (svc, alpha, rule, 0.25 if rule == "validation" else 1.0, others)
        for svc, alpha in [("none", None), ("output", published)]
        for rule, others in [
            ("fixed", "own"),
            ("validation", "own"),
            *(("fixed", own) for own in with_mean),
            ("norm", "own"),
            *([("norm, whole", "own")] if svc == "none" else []),
        ]
    ]
    expected += [] if method == "tsv_m" else [("output", 1.0, "fixed", 1.0, "own")]
    columns = ("svc", "alpha", "scale_rule", "scale", "others")
    assert [tuple(labels[column] for column in columns) for labels, _ in found] == expected
    assert len(asked) == 2 * 11  # once for the base, once for the calibrated merger
    forms, mean = dense_forms(method, updates, 0, [published, 1.0]), weight_average(updates)
    for labels, update in found:
        own = forms[labels["alpha"]]
        if labels["scale_rule"].startswith("norm"):
            own = norm_match(own, updates, whole=labels["scale_rule"] == "norm, whole")
        others = mean if labels["others"] == "mean" else own
        assert update["weight"].equal(own["weight"])
        assert update["bias"].equal(others["bias"]) and update["embedding"].equal(others["embedding"])


class Sign(nn.Module):
    """Two classes, by the sign of a linear function: the smallest network with something to merge."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 6).double()

    def forward(self, inputs):
        return (self.encoder(inputs).sum(1) > 0).long()


def test_rows_are_paired_with_the_base_of_their_rule_and_with_the_tuned_base():
    network, inputs = Sign(), noise(40, 5, seed=50)
    data = {
        split: [(inputs * sign, (inputs.sum(1) > 0).long())] for split, sign in {"validation": -1, "test": 1}.items()
    }
    start = {"weight": noise(6, 5, seed=60), "bias": noise(6, seed=61)}
    updates = [{name: update[name] for name in start} for update in dense_updates()]
    experts = tuple(apply(start, update) for update in updates)
    suite = Suite("key", ("one", "two", "three"), (network,) * 3, start, experts, lambda task, split: data[split])
    rows = list(comparison.variant_rows(suite, "task_arithmetic", 0))
    found = comparison.variants("task_arithmetic", updates, 0, lambda *a: comparison.validation_scores(suite, *a))
    assert len(rows) == 3 * len(found) and {row["method"] for row in rows} == {"task_arithmetic"}
    right = []
    for labels, update in found:
        network.encoder.load_state_dict(apply(start, update, labels["scale"]))
        right.append(network(inputs) == data["test"][0][1])
    rules = [labels["scale_rule"] for labels, _ in found]
    for index, (row, (labels, _)) in enumerate(zip(rows, found, strict=False)):
        assert row.items() >= labels.items() and row["value"] == pytest.approx(
            100 * right[index].double().mean().item()
        )
        bases = {"": 1 if rules[index] == "validation" else 0, "_over_tuned": 1, "_over_norm": rules.index("norm")}
        for suffix, base in bases.items():
            assert row["gained" + suffix] == int((right[index] & ~right[base]).sum())
            assert row["lost" + suffix] == int((~right[index] & right[base]).sum())


# Reading the table ----------------------------------------------------------------------------------------------------

LABELS = {  # name → svc, α, rule, others
    BASE: ("none", None, "fixed", "own"),
    BASE_TUNED: ("none", None, "validation", "own"),
    BASE_MEAN: ("none", None, "fixed", "mean"),
    SVC: ("output", 0.5, "fixed", "own"),
    SVC_TUNED: ("output", 0.5, "validation", "own"),
    SVC_MEAN: ("output", 0.5, "fixed", "mean"),
    SVC_1: ("output", 1.0, "fixed", "own"),
    BASE_NORM: ("none", None, "norm", "own"),
    BASE_WHOLE: ("none", None, "norm, whole", "own"),
    SVC_NORM: ("output", 0.5, "norm", "own"),
}
VALUES = {BASE: 60.0, BASE_TUNED: 64.0, BASE_MEAN: 58.0, SVC: 70.0, SVC_TUNED: 63.0, SVC_MEAN: 66.0, SVC_1: 68.0}
VALUES |= {BASE_NORM: 65.0, BASE_WHOLE: 62.0, SVC_NORM: 67.0}


def table():
    """Two tasks of 100 samples and two seeds; the second seed, and the second task, score 10 points more."""
    rows = []
    for seed, task in [(0, "a"), (0, "b"), (1, "a"), (1, "b")]:
        more = 10 * seed + 10 * (task == "b")
        cell = {"seed": seed, "task": task, "backbone": "B", "suite": 2, "metric": "accuracy", "images": 100}
        rows += [cell | {"method": "pretrained", "value": 40 + more}, cell | {"method": "expert", "value": 80.0}]
        for name, (svc, alpha, rule, others) in LABELS.items():
            base = BASE_TUNED if rule == "validation" else BASE
            change, over_tuned = VALUES[name] - VALUES[base], VALUES[name] - VALUES[BASE_TUNED]
            counts = {"gained": max(change, 0), "lost": max(-change, 0)}
            counts |= {"gained_over_tuned": max(over_tuned, 0), "lost_over_tuned": max(-over_tuned, 0)}
            over_norm = VALUES[name] - VALUES[BASE_NORM]
            counts |= {"gained_over_norm": max(over_norm, 0), "lost_over_norm": max(-over_norm, 0)}
            scale = 0.5 + seed if rule == "validation" else 1.0
            labels = {"svc": svc, "alpha": alpha, "scale_rule": rule, "others": others, "scale": scale}
            rows.append(cell | {"method": "task_arithmetic", "value": VALUES[name] + more} | labels | counts)
    return pd.DataFrame(rows)


def test_variants_get_their_names():
    data = table()
    merged = comparison.named(data)[data.method == "task_arithmetic"]
    assert list(merged.row) == list(LABELS) * 4
    means = comparison.variant_means(data).set_index(["method", "row", "seed"]).value
    for name, value in VALUES.items():
        assert [means["task_arithmetic", name, seed] for seed in (0, 1)] == [value + 5, value + 15]
    assert means["expert", BASE, 0] == 80 and means["pretrained", BASE, 1] == 55


def test_at_one_task_and_for_tsv_m_the_published_alpha_is_one():
    data = table().assign(alpha=table().alpha.replace(0.5, 1.0))
    merged = data[data.method == "task_arithmetic"]
    for changed in ({"suite": 1}, {"method": "tsv_m"}):
        found = comparison.named(merged.assign(**changed)[merged.svc == "output"])
        assert set(found.row) == {SVC, SVC_TUNED, SVC_MEAN, SVC_NORM}


def test_intervals_are_paired_differences():
    found = comparison.gains(table())
    assert set(zip(*(found[key] for key in comparison.CELL), strict=True)) == {("B", 2, "task_arithmetic")}
    gains = {"SVC − base": 10, "SVC − tuned base": 6, "tuned SVC − tuned base": -1}
    assert list(found.condition) == list(gains)
    for row, mean in zip(found.itertuples(), gains.values(), strict=True):
        assert row.mean == row.interval.mean == pytest.approx(mean)
        assert row.low == row.interval.low < mean < row.interval.high == row.high
    assert list(found.sign) == [1, 1, -1 if found.high.iloc[2] < 0 else 0]
    (line,) = comparison.wide(found).to_dict("records")
    assert line == {"backbone": "B", "suite": 2, "method": "task_arithmetic"} | {
        name: str(interval) for name, interval in zip(found.condition, found.interval, strict=True)
    }


def test_the_tables_of_a_readme():
    shown = comparison.tables(table())
    every = shown["Accuracy of every variant, B: mean of the tasks (share of the experts' accuracy), %"]
    assert list(every.method) == ["pretrained", "expert"] + len(LABELS) * ["task_arithmetic"]
    assert list(every.row) == ["", "", *comparison.ORDER]
    cells = every.set_index(["method", "row"])["2 tasks"]
    assert cells["task_arithmetic", SVC] == "80.0 ± 7.1 (100.0)"  # seeds: 75 and 85 of 80
    assert cells["expert", ""] == "80.0 ± 0.0 (100.0)" and cells["pretrained", ""] == "50.0 ± 7.1 (62.5)"
    (scales,) = shown["Scales chosen on validation (mean over seeds)"].groupby("backbone")
    assert set(scales[1].task_arithmetic) == {1.0} and list(scales[1].svc) == ["none", "output"]
    tasks = shown["Task by task, 2 tasks, B, %"].set_index(["method", "row"])
    assert tasks.loc[("task_arithmetic", SVC), ["a", "b"]].tolist() == [75.0, 85.0]
    assert len(tasks) == 4  # references and merger, the merger with and without SVC


def test_the_comparison_takes_base_and_svc_and_names_another_source():
    def number(published, backbone, suite, method, svc):
        return (69.0, "") if svc == "output" else (50.0, "fusion_bench")

    means = comparison.variant_means(table())
    lines = comparison.compared(means, pd.DataFrame(), number, lambda backbone: "hub experts").set_index("quantity")
    assert len(lines) == 4
    ours = lines.loc["2 tasks, B: task_arithmetic + SVC"]
    assert (ours.paper, ours.ours, ours.n, ours.same_setting) == (69, 80, 2, "hub experts")
    assert ours.sd == pytest.approx(50**0.5)
    assert lines.loc["2 tasks, B: task_arithmetic"].same_setting == "hub experts; not the paper's: fusion_bench"


def test_words_for_signs():
    signs = pd.Series([1, 1, 0, -1])
    assert comparison.counted(signs) == "above in 2 and below in 1 of 4"
    assert comparison.beats(signs) == "does not beat a tuned scale"
    assert comparison.beats(pd.Series([1, 1, 0])) == "beats a tuned scale in part"
    assert comparison.beats(pd.Series([1, 1])) == "beats a tuned scale"


# Orders, differences and published numbers ----------------------------------------------------------------------------


def test_tables_are_sorted_by_size_by_the_mergers_and_by_a_given_order():
    rows = [("glyph-128", "ties", 8, "b"), ("glyph-96", "expert", 14, "a"), ("glyph-96", "task_arithmetic", 8, "a")]
    table = pd.DataFrame([*rows, ("glyph-96", "task_arithmetic", 8, "b")], columns=[*"xyzr"])
    table = table.rename(columns=dict(x="backbone", y="method", z="suite", r="row"))
    found = comparison.in_order(table, ["backbone", "suite", "method", "row"], row=("b", "a"))
    assert found.backbone.tolist() == ["glyph-96"] * 3 + ["glyph-128"] and found.suite.tolist() == [8, 8, 14, 8]
    assert found.row.tolist() == ["b", "a", "a", "b"]
    assert comparison.in_order(table, ["method"]).method.tolist() == ["expert", *["task_arithmetic"] * 2, "ties"]
    assert comparison.in_order(table, ["method"]).row.tolist() == ["a", "a", "b", "b"]  # equal ones stay as they were


def test_differences_of_any_cells_and_counts():
    rows = comparison.named(table()).query("method == 'task_arithmetic'").assign(learning_rate=float("nan"))
    wanted = {"one": (SVC, ""), "other": (SVC, "_over_tuned"), "absent": ("no such row", "")}
    found = comparison.differences(rows, wanted, ["backbone", "learning_rate"])
    assert found.condition.tolist() == ["one", "other"] and found["mean"].tolist() == pytest.approx([10, 6])
    assert list(comparison.wide(found, ["backbone", "learning_rate"])) == ["backbone", "learning_rate", "one", "other"]


def test_the_papers_number_comes_first_and_others_where_they_are_wanted():
    columns = ["suite", "backbone", "merger", "svc", "value", "source"]
    cell = ("8 vision tasks", "ViT-B/32")
    published = pd.DataFrame(
        [
            (*cell, "ties", "none", 71.0, "fusion_bench"),
            (*cell, "ties", "none", 72.6, "arXiv 2602.05536"),
            (*cell, "fine_tuned", "none", 90.3, "fusion_bench"),
        ],
        columns=columns,
    )
    assert comparison.published_accuracy(published, *cell, "ties", "none") == (72.6, "")
    assert comparison.published_accuracy(published, *cell, "expert", "none") == (90.3, "fusion_bench")
    for model, svc in (("ties", "output"), ("expert", "none")):
        value, source = comparison.published_accuracy(published, *cell, model, svc, peers=False)
        assert math.isnan(value) and source == ""
