"""What experiment 07 adds: norms without parts, noise on weights, attacks, covering, and its rule."""

import math
import warnings

import pandas as pd
import pytest
import torch
from torch import nn

from common import cache
from common.training import TrainingRecipe
from sparsity.blocks import find_blocks
from sparsity.studies import ablation_tables, ablations, density_tables
from sparsity.studies.images import ImageTask, pixel_range
from sparsity.studies.lora import adapt
from sparsity.studies.measurement import curve, load, measure_snapshot
from sparsity.studies.norms_and_noise import change_norms, weight_noise, whole_weight
from sparsity.studies.robustness import ATTACK, COVERING, NOISE, attack, covering, measure_robustness
from sparsity.studies.runs import FineTuning, Run, Variant
from sparsity.studies.training import build, make_task, train

CPU = torch.device("cpu")
DIGITS = ImageTask("digits", width=16, depth=2, heads=2)
RECIPE = TrainingRecipe(12, 16, 1e-2, weight_decay=3.0)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "name, weight, bias",
    [
        ("MLP norms without bias", lambda w: (w < 1).any(), lambda b: (b == 0).all()),
        ("MLP norms fixed at 1", lambda w: (w == 1).all(), lambda b: (b == 0).all()),
        ("MLP norms bounded, with bias", lambda w: (w >= 1).all(), lambda b: (b != 0).any()),
        ("restricted norm alone", lambda w: (w >= 1).all(), lambda b: (b == 0).all()),
        ("vanilla", lambda w: (w < 1).any(), lambda b: (b != 0).any()),
    ],
)
def test_norms_train_as_their_condition_says(own_cache, name, weight, bias):
    run = Run(DIGITS, RECIPE, ablations.PLUGINS[name], log_every=12, snapshots=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a restricted norm that meets a bias warns when it is loaded
        model = load(run, train(run, CPU), CPU)
    norms = [block.norm for block in find_blocks(model)]
    assert all(weight(norm.weight) and bias(norm.bias) for norm in norms)
    assert any((block.norm1.weight != 1).any() for block in model.blocks)  # the other norms train


def test_an_unknown_change_of_norms_is_refused():
    with pytest.raises(ValueError, match="norms must be one of free, no bias"):
        change_norms(nn.Linear(2, 2), "none")


def test_noise_on_weights_is_that_of_separate_weights_for_every_token():
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Linear(32, 400), nn.ReLU(), nn.Linear(400, 8)), torch.randn(3, 5, 32)
    first, plain = model[0], model(tokens)
    with weight_noise(model, 0.5, torch.Generator().manual_seed(0)):
        change = first(tokens) - nn.functional.linear(tokens, first.weight, first.bias)
    spread = 0.5 * first.weight.norm() / math.sqrt(first.weight.numel()) * tokens.norm(dim=-1)
    assert (change.std(dim=-1) / spread - 1).abs().max() < 0.15
    assert abs(torch.corrcoef(change.flatten(0, 1)) - torch.eye(15)).max() < 0.3  # each token has its own
    assert model(tokens).equal(plain)  # none is left behind
    with weight_noise(model, 0.0):
        assert model(tokens).equal(plain)


def test_noise_counts_an_adapters_update_once():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(32, 400), nn.LayerNorm(400)), 4, 8.0)
    nn.init.normal_(model[0].lora_B["default"].weight)
    merged = model[0].base_layer.weight + 2 * model[0].lora_B["default"].weight @ model[0].lora_A["default"].weight
    assert torch.allclose(whole_weight(model[0]), merged, atol=1e-6)
    tokens = torch.randn(64, 32)
    plain = model[0](tokens)
    with weight_noise(model, 0.1):
        change = model[0](tokens) - plain
    expected = 0.1 * merged.square().mean().sqrt() * tokens.norm(dim=-1)
    assert (change.std(-1) / expected).mean().item() == pytest.approx(1, abs=0.05)


def trained_classifier(own_cache=None, steps=60):
    run = Run(DIGITS, TrainingRecipe(steps, 16, 1e-2, weight_decay=0.0), Variant(), log_every=60, snapshots=2)
    trained = train(run, CPU)
    return run, trained, make_task(DIGITS, CPU), load(run, trained, CPU)


def test_an_attack_moves_every_pixel_as_the_loss_rises(own_cache):
    _, _, task, model = trained_classifier()
    batch = next(iter(task.batches("test")))
    batch = {name: tensor[:8] for name, tensor in batch.items()}
    black, white = pixel_range(DIGITS)
    found = attack(task, model, batch, 8 / 255, black, white)["images"]
    for index in range(8):  # one image at a time
        image = batch["images"][index : index + 1].clone().requires_grad_()
        nn.functional.cross_entropy(model(image), batch["labels"][index : index + 1]).backward()
        expected = (image + 2 * 8 / 255 * image.grad.sign()).clamp(-1, 1)
        assert torch.allclose(found[index], expected[0], atol=1e-6)
    assert task.score(model, {**batch, "images": found})[0].mean() > task.score(model, batch)[0].mean()
    assert attack(task, model, batch, 0.0, black, white) is batch


def test_the_range_of_pixels_is_what_the_network_sees():
    black, white = pixel_range(ImageTask("imagenet", width=16, heads=2))
    assert black.shape == white.shape == (3, 1, 1)
    assert black[0].item() == pytest.approx(-0.485 / 0.229) and white[2].item() == pytest.approx(
        0.594 / 0.225, rel=1e-3
    )
    plain = pixel_range(ImageTask("cifar10", width=16, heads=2, normalised=False))
    assert [level.flatten().tolist() for level in plain] == [[0.0] * 3, [1.0] * 3]


def test_the_least_change_of_weights_does_on_clean_tokens_what_the_attack_does(own_cache):
    _, _, task, model = trained_classifier()
    batch = next(iter(task.batches("test")))
    clean = {name: tensor[:1] for name, tensor in batch.items()}
    attacked = attack(task, model, clean, 16 / 255, *pixel_range(DIGITS))
    found = {(row["layer"], row["metric"]): row["value"] for row in covering(model, clean, attacked)}
    block, seen = find_blocks(model)[1], []
    handle = block.key.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0][0], output[0])))
    for images in (clean["images"], attacked["images"]):
        model(images)
    handle.remove()
    (tokens, before), (_, after) = seen
    change = torch.linalg.pinv(tokens.double()) @ (after - before).double()  # (in, out)
    expected = change.norm() / block.key.weight.norm()
    assert found[block.name, "least change, keys"] == pytest.approx(expected.item(), rel=1e-2)
    assert found[block.name, "covered, keys"] == pytest.approx(1, abs=1e-3)  # 16 tokens in 16 dimensions
    moved = ((after - before).norm(dim=1) / tokens.norm(dim=1)).mean() * 4 / block.key.weight.norm()
    assert found[block.name, "equal noise, keys"] == pytest.approx(moved.item(), rel=1e-4)


def test_robustness_is_measured_at_every_size(own_cache):
    run, trained, task, model = trained_classifier()
    rows = pd.DataFrame(measure_robustness((0.0, 32 / 255), (0.0, 0.5), run, trained, CPU))
    scores = rows[rows.metric == "score"].set_index(["split", "size"]).value
    right = torch.cat([task.score(model, batch)[1] for batch in task.batches("test")]).mean().item()
    assert scores[ATTACK, 0.0] == scores[NOISE, 0.0] == pytest.approx(right)
    assert scores[ATTACK, 32 / 255] < right and scores[NOISE, 0.5] < right
    assert set(rows[rows.split == COVERING].layer) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert rows[rows.metric == "density"].groupby(["split", "size"]).size().eq(2).all()


def test_noise_in_training_changes_a_run_and_no_measurement(own_cache):
    noisy = Run(DIGITS, RECIPE, Variant(noise=0.3), log_every=12, snapshots=2)
    quiet = Run(DIGITS, RECIPE, Variant(), log_every=12, snapshots=2)
    models = [load(run, train(run, CPU), CPU) for run in (noisy, quiet)]
    assert not models[0].blocks[0].mlp.fc1.weight.equal(models[1].blocks[0].mlp.fc1.weight)
    images = next(iter(make_task(DIGITS, CPU).batches("test")))["images"]
    assert models[0](images).equal(models[0](images))
    assert (
        build(make_task(DIGITS, CPU), noisy)
        .blocks[0]
        .mlp.fc1.weight.equal(build(make_task(DIGITS, CPU), quiet).blocks[0].mlp.fc1.weight)
    )


# The table ------------------------------------------------------------------------------------------------------------


def runs(part, setting, densities, seeds=3, rate=3e-3, batch=16, decay=2.0, steps=100, weight=None):
    """Rows of made-up runs in one setting, {condition: density}, which differ a little from seed to seed."""
    rows = []
    for variant, density in densities.items():
        for seed in range(seeds):
            own = density * (1 + 0.01 * (seed - 1) * (1 + len(variant) % 3))
            labels = dict(part=part, setting=setting, variant=variant, seed=seed, rate=rate, batch=batch)
            metrics = (*density_tables.TEST_METRICS, "score", "loss")
            rows += [{**labels, "split": "test", "layer": "a", "metric": name, "value": own} for name in metrics]
            for step, value in ((1, 9.0), (steps // 10, 2 * own), (steps - 9, own), (steps, own)):
                for name in density_tables.CURVE_METRICS:
                    logged = {"decay": decay, "norm_weight": weight or value}.get(name, value)
                    row = {"split": "train", "step": step, "layer": "all", "metric": name, "value": logged}
                    rows.append(labels | row)
    return rows


PLUGINS = {
    "vanilla": 0.2, "modified": 0.1, density_tables.CONTROL: 0.11, "restricted norm alone": 0.12, "JSReLU alone": 0.199,
    "zeroth bias alone": 0.22, "all but restricted norm": 0.2, "all but JSReLU": 0.13, "all but zeroth bias": 0.1,
}  # fmt: skip


def test_the_head_names_what_helps_alone_and_on_top():
    text = ablation_tables.verdict(pd.DataFrame(runs("plug-ins", "s", PLUGINS)))
    assert text.startswith("sparser alone and on top of the others: restricted norm. ")
    assert "modified / vanilla -50.0" in text and "JSReLU alone / vanilla -0.5" in text
    assert "zeroth bias alone / vanilla +10.0" in text
    assert ablation_tables.verdict(pd.DataFrame(runs("plug-ins", "s", PLUGINS, seeds=2))) == "not run at this scale"
    helpful = PLUGINS | {"JSReLU alone": 0.15, "zeroth bias alone": 0.25}
    text = ablation_tables.verdict(pd.DataFrame(runs("plug-ins", "s", helpful)))
    assert text.startswith("sparser alone and on top of the others: restricted norm, JSReLU. ")


@pytest.mark.parametrize("modified, word", [(0.1, "beyond 36 %"), (0.15, "sparser"), (0.2, "equal"), (0.3, "denser")])
def test_the_t5_is_judged_by_the_papers_figure(modified, word):
    text = {"vanilla": 0.2, "modified": modified, density_tables.CONTROL: 0.2}
    rows = runs("plug-ins", "s", PLUGINS) + runs("T5", "t", text)
    assert f"; T5 at low E: {word}. " in ablation_tables.verdict(pd.DataFrame(rows))


def test_cells_of_the_same_decay_are_compared():
    rows = runs("plug-ins", "s", PLUGINS)
    for rate, batch, decay, density in ((1e-3, 16, 1.0, 0.3), (4e-3, 64, 1.005, 0.15), (4e-3, 16, 4.0, 0.1)):
        densities = {"vanilla": density, "modified": density / 2}
        rows += runs("rates", f"digits, rate {rate:g}, batch {batch}", densities, 3, rate, batch, decay)
    data = pd.DataFrame(rows)
    text = ablation_tables.verdict(data)
    assert "rates: modified / vanilla sparser in 3 of 3 cells" in text
    assert "vanilla at equal E 1, rate 0.004, batch 64 / rate 0.001, batch 16 -50.0" in text
    assert "batch 16 / rate" not in text  # no other cells share their E
    assert "**Rates at equal E.**" in ablation_tables.remarks(data)


@pytest.mark.parametrize(
    "densities, weights, said",
    [
        ((0.2, 0.2, 0.201), (0.3, 0.3, 0.31), "decides density, decides |w|"),
        ((0.3, 0.2, 0.1), (0.3, 0.3, 0.31), "does not decide density, decides |w|"),
        ((0.2, 0.2, 0.201), (0.3, 0.2, 0.1), "decides density, does not decide |w|"),
    ],
)
def test_durations_say_whether_their_common_decay_decides(densities, weights, said):
    rows = runs("plug-ins", "s", PLUGINS)
    for steps, density, weight in zip((300, 1200, 2400), densities, weights, strict=True):
        both = {"vanilla": density, "modified": density}
        rows += runs("durations", f"digits, {steps} steps", both, 3, 3e-3, 16, 2.2, steps, weight)
    data = pd.DataFrame(rows)
    text = ablation_tables.verdict(data)
    assert f"; E by itself: {said}. " in text
    assert "modified / vanilla equal in 3 of 3 cells" in text
    change = 100 * (densities[2] / densities[0] - 1)
    assert f"vanilla at equal E 2.2, 2400 steps / 300 steps {change:+.1f}" in text
    assert len(ablation_tables.tables(data)["durations: changes between settings of the same E, % [95 %]"]) == 6
    assert {"density_by_duration", "norms_by_duration"} <= set(ablation_tables.draw(data))
    assert list(ablation_tables.results(data).query("part == 'durations'").steps.unique()) == [300, 1200, 2400]


def test_durations_that_differ_from_seed_to_seed_leave_it_open():
    rows = runs("plug-ins", "s", PLUGINS)
    for steps, factor in ((300, 1), (1200, 1.3)):
        own = runs("durations", f"digits, {steps} steps", {"vanilla": 0.2}, 3, decay=2.2, steps=steps, weight=0.3)
        for row in own:
            if row["seed"] == 0 and row["metric"] in ("density", "norm_weight"):
                row["value"] *= factor
        rows += own
    assert "; E by itself: density undecided, |w| undecided. " in ablation_tables.verdict(pd.DataFrame(rows))


def test_all_durations_have_the_same_decay_in_sum():
    base = Run(DIGITS, TrainingRecipe(1200, 16, 3e-3, weight_decay=1.25), log_every=40)
    plan = [run for _, run in ablations.plan_durations("digits", base, (300, 1200, 2400), ("vanilla",), (0,))]
    assert plan[1] == base
    assert [(run.recipe.steps, run.log_every) for run in plan] == [(300, 10), (1200, 40), (2400, 80)]
    sums = [run.recipe.weight_decay * sum(map(run.recipe.rate, range(run.recipe.steps))) for run in plan]
    assert sums == pytest.approx([sums[0]] * 3, rel=0.01)


def test_brief_rows_say_what_the_whole_ones_say(own_cache):
    run, trained, _, _ = trained_classifier()
    measured, logged = measure_snapshot(run, trained, CPU), curve(trained)
    labels = dict(setting="s", variant="vanilla", seed=0)
    whole, brief = (
        pd.DataFrame(rows(labels, measured, logged)) for rows in (density_tables.run_rows, density_tables.brief_rows)
    )
    assert len(brief) < len(whole)
    pd.testing.assert_frame_equal(density_tables.finals(brief), density_tables.finals(whole), check_like=True)


def test_the_last_tenth_of_training_stands_beside_the_whole():
    table = ablation_tables.results(pd.DataFrame(runs("plug-ins", "s", {"vanilla": 0.2}, seeds=1)))
    own = density_tables.finals(pd.DataFrame(runs("plug-ins", "s", {"vanilla": 0.2}, seeds=1))).density[0]
    assert table.late_density[0] == pytest.approx(own) and table.training_density[0] == pytest.approx(4 / 3 * own)
    assert (table.part[0], table.rate[0], table.batch[0]) == ("plug-ins", 3e-3, 16)


def test_densities_have_intervals_over_seeds():
    found = ablation_tables.percent(pd.Series([0.1, 0.1, 0.1]))
    assert (found.mean, found.low, found.high) == pytest.approx((10, 10, 10))
    wide = ablation_tables.percent(pd.Series([0.1, 0.2]))
    assert wide.mean == pytest.approx(100 * 0.02**0.5) and wide.low < 10 and wide.high > 20
    assert (
        ablation_tables.cell(wide).startswith("14.1 [")
        and ablation_tables.cell(ablation_tables.percent(pd.Series([0.1]))) == "10.0"
    )


def test_the_grid_has_every_pair_at_the_same_number_of_images():
    base = Run(DIGITS, TrainingRecipe(1200, 16, 3e-3, weight_decay=1.25), log_every=40)
    plan = list(ablations.plan_rates("digits", base, (1e-3, 3e-3), (16, 64), ("vanilla",), (0,)))
    assert {(run.recipe.learning_rate, run.recipe.batch_size) for _, run in plan} == {
        (rate, size) for rate in (1e-3, 3e-3) for size in (16, 64)
    }
    assert {run.recipe.steps * run.recipe.batch_size for _, run in plan} == {19_200}
    assert next(run for labels, run in plan if (labels["rate"], labels["batch"]) == (3e-3, 16)) == base


def test_noisy_arms_start_from_the_vanilla_network_of_their_seed():
    start = Run(DIGITS, RECIPE)
    base = Run(DIGITS, RECIPE, tuning=FineTuning(start, 4), snapshots=2)
    plan = list(ablations.plan_noise("s", base, 0.05, (0, 1)))
    assert len(plan) == 12
    for labels, run in plan:
        assert run.tuning.start == Run(DIGITS, RECIPE, seed=labels["seed"])
        assert run.variant.noise == (0.05 if labels["variant"].endswith(", noise") else 0)


def test_a_table_of_one_part_has_its_figures_and_tables():
    data = pd.DataFrame(runs("plug-ins", "s", PLUGINS))
    assert set(ablation_tables.draw(data)) == {"density_by_condition", "density_and_accuracy"}
    assert all(name.startswith("plug-ins: ") for name in ablation_tables.tables(data))
    lines = ablation_tables.compare(data, None, lambda part: "no").set_index("quantity")
    line = lines.loc["change of density (test), %: modified against vanilla; s"]
    assert line.paper == -36 and line.ours == pytest.approx(-50, abs=0.5) and line.n == 3
