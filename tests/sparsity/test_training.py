"""One run, trained and measured: cached, resumable, the same for the same seed; measured as a naive count says."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from common import cache, training
from common.training import TrainingRecipe
from sparsity.plugins import MARK
from sparsity.studies.images import ImageTask
from sparsity.studies.measurement import curve, load, measure_snapshot
from sparsity.studies.runs import VARIANTS, Run, Variant
from sparsity.studies.span_corruption import SpanCorruption
from sparsity.studies.training import Recorder, build, make_task, train

CPU = torch.device("cpu")
DIGITS = ImageTask("digits", width=16, depth=2, heads=2)
RECIPE = TrainingRecipe(12, 16, 3e-3, weight_decay=1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


def digits_run(name="vanilla", **options):
    return Run(DIGITS, RECIPE, VARIANTS[name], **{"log_every": 4, "snapshots": 3} | options)


def test_a_run_keeps_snapshots_and_a_curve():
    run = digits_run("modified")
    trained = train(run, CPU)
    assert run.snapshot_steps == (0, 3, 12)
    assert {path.name for path in trained.path.glob("*.safetensors")} == {
        f"step-{step}.safetensors" for step in (0, 3, 12)
    }
    rows = pd.DataFrame(curve(trained))
    assert list(rows.step.unique()) == [1, 4, 8, 12]
    assert list(rows.layer.unique()) == ["blocks.0.mlp", "blocks.1.mlp", "all"]
    whole, blocks = rows[rows.layer == "all"], rows[rows.layer != "all"]
    rates = [RECIPE.learning_rate * RECIPE.rate(step) for step in range(12)]
    assert whole.decay.iloc[-1] == pytest.approx(sum(rates) * RECIPE.weight_decay)
    assert whole.loss.notna().all() and (blocks.norm_weight >= 1).all()
    assert (blocks.density_from_flatness / blocks.density - 1).abs().max() < 1e-5


def test_all_variants_start_from_the_same_weights():
    task = make_task(DIGITS, CPU)
    start = build(task, digits_run("vanilla", seed=3)).state_dict()
    for name in ("modified", "squared ReLU"):
        other = build(task, digits_run(name, seed=3)).state_dict()
        assert all(other[key].equal(tensor) for key, tensor in start.items() if key != MARK)  # their options differ


# a T5: its weights are tied
TEXT = SpanCorruption(width=16, depth=1, heads=2, d_ff=32, megabytes=0.3, evaluation_rows=16)


@pytest.mark.parametrize("task", [DIGITS, TEXT], ids=["vit", "t5"])
def test_a_killed_run_ends_as_one_that_was_not(monkeypatch, task):
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 5)
    run = Run(task, RECIPE, VARIANTS["modified"], log_every=3, snapshots=3)
    monkeypatch.setattr(cache, "CACHE", cache.CACHE / "whole")
    whole = train(run, CPU)
    monkeypatch.setattr(cache, "CACHE", cache.CACHE.parent / "killed")
    log, calls = Recorder._log, []

    def die(self, *arguments):
        calls.append(self.step)
        if self.step == 9:
            raise KeyboardInterrupt
        log(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_log", die)
        with pytest.raises(KeyboardInterrupt):
            train(run, CPU)
    again = train(run, CPU)
    assert calls == [1, 3, 6, 9] and whole.key == again.key and not again.hit
    assert curve(again) == curve(whole)
    files = sorted(path.name for path in whole.path.iterdir())
    assert files == sorted(path.name for path in again.path.iterdir())
    for path in whole.path.glob("*.safetensors"):
        assert path.read_bytes() == (again.path / path.name).read_bytes()


def test_a_snapshot_is_measured_as_a_naive_count_says():
    run = digits_run("modified")
    trained = train(run, CPU)
    model, task = load(run, trained, CPU), make_task(DIGITS, CPU)
    found = pd.DataFrame(measure_snapshot(run, trained, CPU))
    values = found[found.layer == "all"].set_index("metric").value
    active, right, losses = [], [], []

    def see(module, inputs, output):
        active.append((output.abs() > 1e-6).flatten(0, 1))

    model.blocks[1].mlp.act.register_forward_hook(see)
    with torch.no_grad():
        for batch in task.batches("test"):
            logits = model(batch["images"])
            right.append(logits.argmax(-1) == batch["labels"])
            losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
    active = torch.cat(active)
    second = found[found.layer == "blocks.1.mlp"].set_index("metric").value
    assert second.density == pytest.approx(active.float().mean().item())
    assert second.dead_units == pytest.approx(1 - active.any(0).float().mean().item())
    assert values.score == pytest.approx(100 * torch.cat(right).float().mean().item())
    assert values.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert values["loss without MLPs"] != values.loss


def test_the_l1_penalty_lowers_activations():
    strong = Run(DIGITS, TrainingRecipe(60, 16, 3e-3, weight_decay=0.0), Variant(l1=30.0), log_every=60, snapshots=2)
    norms = []
    for run in (strong, replace(strong, variant=Variant())):
        rows = pd.DataFrame(measure_snapshot(run, train(run, CPU), CPU))
        norms.append(rows[rows.metric == "activation_norm"].value.mean())
    assert norms[0] < 0.5 * norms[1]


def test_exemptions_keep_the_norms_where_they_are():
    recipe = TrainingRecipe(40, 16, 1e-2, weight_decay=5.0)
    weights = {}
    for name in ("vanilla", "vanilla, MLP norms undecayed", "vanilla, all norms undecayed"):
        run = Run(DIGITS, recipe, VARIANTS[name], log_every=40, snapshots=2)
        last = pd.DataFrame(curve(train(run, CPU))).query("step == 40")
        weights[name] = (last.norm_weight.mean(), last.other_norm_weight.mean())
    decayed, mlp, every = weights.values()
    assert mlp[0] > decayed[0] + 0.3 and every[1] > mlp[1] + 0.3


def test_text_runs_leave_padding_out():
    run = Run(TEXT, TrainingRecipe(4, 4, 3e-3), VARIANTS["modified"], exempt=("biases",), log_every=2, snapshots=2)
    rows = pd.DataFrame(measure_snapshot(run, train(run, CPU), CPU))
    layers = [name for name in rows.layer.unique() if name != "all"]
    assert [name.split(".")[0] for name in layers] == ["encoder", "decoder"]
    real = sum(batch["labels"].ne(-100).sum().item() for batch in make_task(TEXT, CPU).batches("test"))
    decoder = rows[rows.layer == layers[1]].set_index("metric").value
    assert decoder.tokens * decoder.samples == pytest.approx(real)
