"""The training loop learns, repeats itself, and says when it diverges."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common.training import RandomBatches, Recipe, decay_groups, fit

CPU = torch.device("cpu")
RECIPE = Recipe(steps=60, batch_size=16, learning_rate=0.05)


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
    for batch in RandomBatches(labels, Recipe(5, 12, 0.1), seed=0):
        assert len(labels[batch].unique()) == 12
    for batch in RandomBatches(labels % 4, Recipe(5, 12, 0.1), seed=0):
        assert (labels % 4)[batch].bincount().tolist() == [3, 3, 3, 3]
    assert len(list(RandomBatches(labels, Recipe(7, 12, 0.1), seed=0))) == 7


def test_only_matrices_decay():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 2), "linear": nn.Linear(2, 3), "norm": nn.LayerNorm(3)})
    model["norm"].weight.requires_grad_(False)
    decayed, kept = decay_groups(model, 0.1)
    assert [parameter.shape for parameter in decayed["params"]] == [(3, 2)] and decayed["weight_decay"] == 0.1
    assert len(kept["params"]) == 3 and kept["weight_decay"] == 0
