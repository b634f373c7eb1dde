"""The training loop learns, repeats itself, and says when it diverges."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common import training
from common.training import RandomBatches, ShuffledBatches, TrainingRecipe, decay_groups, fit

CPU = torch.device("cpu")
RECIPE = TrainingRecipe(steps=60, batch_size=16, learning_rate=0.05)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def train(seed=0, recipe=RECIPE, loss=cross_entropy):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    inputs = F.one_hot(labels, 3) + 0.3 * torch.randn(120, 3, generator=generator)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(inputs, labels), batch_sampler=RandomBatches(labels, recipe, seed))
    model = fit(nn.Linear(3, 3), loss, loader, recipe, CPU)
    return model, (model(inputs).argmax(1) == labels).float().mean()


def test_it_learns_and_leaves_the_model_in_evaluation_mode():
    model, accuracy = train()
    assert accuracy > 0.95 and not model.training


def test_the_same_seed_gives_the_same_model_and_another_one_another():
    first, second, other = train(0)[0].weight, train(0)[0].weight, train(1)[0].weight
    assert first.equal(second) and not first.equal(other)


def test_a_diverged_loss_names_the_step_and_the_recipe():
    with pytest.raises(FloatingPointError, match=r"at step 0.*learning_rate"):
        train(loss=lambda model, batch: cross_entropy(model, batch) * float("nan"))


def test_batches_hold_different_classes_or_all_classes_equally_often():
    labels = torch.arange(40) % 20
    for batch in RandomBatches(labels, TrainingRecipe(5, 12, 0.1), seed=0):
        assert len(labels[batch].unique()) == 12
    for batch in RandomBatches(labels % 4, TrainingRecipe(5, 12, 0.1), seed=0):
        assert (labels % 4)[batch].bincount().tolist() == [3, 3, 3, 3]
    assert len(list(RandomBatches(labels, TrainingRecipe(7, 12, 0.1), seed=0))) == 7


def test_only_matrices_decay():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 2), "linear": nn.Linear(2, 3), "norm": nn.LayerNorm(3)})
    model["norm"].weight.requires_grad_(False)
    decayed, kept = decay_groups(model, 0.1)
    assert [parameter.shape for parameter in decayed["params"]] == [(3, 2)] and decayed["weight_decay"] == 0.1
    assert len(kept["params"]) == 3 and kept["weight_decay"] == 0


class Log:
    """Remembers the steps and losses it saw; stops the run at a step, as a kill would."""

    def __init__(self, stop: int = 0):
        self.seen, self.stop = [], stop

    def __call__(self, step, loss, optimizer):
        self.seen.append((step, loss.item(), optimizer.param_groups[0]["lr"]))
        if step == self.stop:
            raise KeyboardInterrupt

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = [tuple(entry) for entry in state["seen"]]


def resumable(folder, log, recipe=RECIPE, dropout=0.3):
    inputs, labels = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 3))
    loader = DataLoader(TensorDataset(inputs, labels), batch_sampler=ShuffledBatches(50, recipe, seed=0))
    return fit(model, cross_entropy, loader, recipe, CPU, after_step=log, checkpoint=folder)


@pytest.mark.parametrize("stop", [7, 27, 59])
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 10)
    whole, log = Log(), Log(stop)
    expected = resumable(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path / "killed", log)
    kept = [state.name for state in (tmp_path / "killed").glob("*")]
    assert kept == ([] if stop < 10 else [f"step-{stop // 10 * 10}"])
    torch.manual_seed(99)  # the state of the generators is part of a checkpoint
    again = Log()
    found = resumable(tmp_path / "killed", again)
    assert again.seen == whole.seen and [step for step, _, _ in again.seen] == list(range(1, 61))
    assert all(expected.state_dict()[name].equal(tensor) for name, tensor in found.state_dict().items())
    assert not (tmp_path / "killed").exists()


def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 10)
    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path / "run", Log(27))
    (tmp_path / "run" / "step-20").rename(tmp_path / "run" / "unfinished-20")
    log = Log()
    resumable(tmp_path / "run", log)
    assert log.seen[0][0] == 1


def test_shuffled_batches_are_epochs_of_seeded_orders():
    recipe = TrainingRecipe(7, 4, 0.1)
    batches = list(ShuffledBatches(14, recipe, seed=0))
    assert len(batches) == 7 and {len(batch) for batch in batches} == {4}
    first, second = [[i for batch in epoch for i in batch] for epoch in (batches[:3], batches[3:6])]
    assert len(set(first)) == len(set(second)) == 12 and first != second
    assert batches == list(ShuffledBatches(14, recipe, seed=0)) != list(ShuffledBatches(14, recipe, seed=1))
    with pytest.raises(ValueError, match="holds 4 samples, but there are only 3"):
        ShuffledBatches(3, recipe, seed=0)


def test_schedules():
    cosine = TrainingRecipe(100, 1, 1.0, warmup=0.1)
    assert [cosine.rate(step) for step in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-9)
    root = TrainingRecipe(100, 1, 1.0, warmup=0.1, schedule="inverse_sqrt")
    # the T5 protocol: lr · min(t/W, √(W/t)) with t counted from 1
    assert [root.rate(t - 1) for t in range(1, 101)] == pytest.approx(
        [min(t / 10, (10 / t) ** 0.5) for t in range(1, 101)]
    )
    assert TrainingRecipe(100, 1, 1.0, schedule="constant").rate(99) == 1
    stairs = TrainingRecipe(100, 1, 1.0, warmup=0, stairs=4)
    assert [stairs.rate(step) for step in (0, 24, 25, 49, 99)] == pytest.approx(
        [1, 1, *[0.5 * (1 + math.cos(math.pi * t / 4)) for t in (1, 1, 3)]]
    )


def test_parameter_groups_of_ones_own():
    rates = []

    def groups(model):
        return [{"params": list(model.parameters()), "lr": 0.5}]

    def after(step, loss, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])

    data = TensorDataset(torch.eye(4)[:, :3], torch.arange(4) % 3)
    recipe = TrainingRecipe(steps=20, batch_size=4, learning_rate=0.05)
    loader = DataLoader(data, batch_sampler=ShuffledBatches(4, recipe, 0))
    fit(nn.Linear(3, 3), cross_entropy, loader, recipe, CPU, groups=groups, after_step=after)
    assert max(rates) == 0.5
