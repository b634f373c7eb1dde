"""Sharpness under relative steps: known on a quadratic, and the same for every scale of the weights."""

import pytest
import torch
from torch import nn

from common.risk import empirical_risk
from common.sharpness import adaptive_sharpness, noise_sharpness

BEST = [0.5, -1.0, 2.0]  # weights at which the loss is 0


def linear(weights):
    """The risk mean (w · x − y)² of a linear model."""
    model = nn.Linear(len(weights), 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([weights], dtype=torch.float64)
    return model


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor(BEST, dtype=torch.float64)
    return [(x[:40], y[:40]), (x[40:], y[40:])]


def test_noise_gains_what_the_quadratic_says():
    risk = empirical_risk(linear(BEST), batches(), loss=nn.MSELoss())
    x = torch.cat([inputs for inputs, _ in batches()])
    exact = 0.1**2 * (torch.tensor(BEST, dtype=torch.float64) ** 2 * x.square().mean(0)).sum().item()
    found = noise_sharpness(risk, 0.1, draws=4000)
    assert abs(found.mean - exact) < 4 * found.standard_error and found.standard_error < 0.05 * exact
    assert found.samples == 4000


def test_no_rescaling_changes_either():
    """A hidden unit whose inputs are multiplied by c and whose outputs are divided by c is the same function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    data = [(torch.randn(32, 3, dtype=torch.float64), torch.randint(2, (32,)))]
    found = []
    for factor in (1.0, 30.0):
        with torch.no_grad():
            model[0].weight.mul_(factor), model[0].bias.mul_(factor), model[2].weight.div_(factor)
        risk = empirical_risk(model, data, ["*.weight"])
        found.append((noise_sharpness(risk, seed=3).mean, adaptive_sharpness(risk)))
    assert found[0] == pytest.approx(found[1], rel=1e-9) and min(found[0]) > 0


def test_the_adaptive_step_is_the_steepest_of_its_norm():
    weights = [0.2, -1.5, 1.0]
    risk = empirical_risk(linear(weights), batches(), loss=nn.MSELoss())
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    w = torch.tensor(weights, dtype=torch.float64)
    gradient = 2 * ((x @ w - y)[:, None] * x).mean(0)
    step = 0.3 * w**2 * gradient / (w * gradient).norm()
    exact = ((x @ (w + step) - y).square().mean() - (x @ w - y).square().mean()).item()
    assert adaptive_sharpness(risk, 0.3) == pytest.approx(exact, rel=1e-9)


def test_weights_gradients_and_modes_stay_as_they_were():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    risk = empirical_risk(model, [(torch.randn(8, 3), torch.randint(2, (8,)))])
    assert noise_sharpness(risk) == noise_sharpness(risk)
    adaptive_sharpness(risk)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].training and all(parameter.grad is None for parameter in model.parameters())


def test_a_flat_loss_has_no_direction():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    assert adaptive_sharpness(empirical_risk(model, [(torch.randn(8, 3), torch.randint(2, (8,)))])) == 0.0


@pytest.mark.parametrize("call", [lambda r: noise_sharpness(r, 0), lambda r: noise_sharpness(r, draws=1),
                                  lambda r: adaptive_sharpness(r, -1)])  # fmt: skip
def test_wrong_sizes_are_refused(call):
    risk = empirical_risk(nn.Linear(3, 2), [(torch.randn(8, 3), torch.randint(2, (8,)))])
    with pytest.raises(ValueError, match="must be above 0"):
        call(risk)
