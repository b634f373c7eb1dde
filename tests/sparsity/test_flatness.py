import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from sparsity.activations import make
from sparsity.flatness import (
    densities,
    gradient_statistics,
    key_identity,
    ratio,
    remaining_multiply_adds,
    value_identity,
)


def layer(activation="relu", samples=3, tokens=4, width=5, units=7):
    """One MLP on random tokens with the gradients of a random loss per sample, in double precision."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, tokens, width, generator=generator, dtype=torch.float64)
    keys = torch.randn(units, width, generator=generator, dtype=torch.float64)
    values = torch.randn(width, units, generator=generator, dtype=torch.float64)
    p = (x @ keys.T - 0.5).requires_grad_()
    a = make(activation)(p)
    z = a @ values.T
    g_z = torch.autograd.grad((z.sin() * x).sum(), z, retain_graph=True)[0]
    g, eta = torch.autograd.grad(z, (a, p), g_z)
    return {"x": x, "a": a.detach(), "g": g, "η": eta, "z'": g_z}


def sums_of(seen):
    """The sums that the equations take, in loops."""
    sums = {"entries": 0, "tokens": 0, "samples": len(seen["x"]), "active": 0}
    names = ("x²η²", "x²g²", "active x²η²", "active x²g²", "marginal x²η²", "a²", "z'²", "a²z'²")
    sums |= dict.fromkeys(names, 0.0)
    for sample in range(len(seen["x"])):
        for t in range(seen["x"].shape[1]):
            x, a, g, eta, z = (seen[name][sample, t] for name in ("x", "a", "g", "η", "z'"))
            sums["tokens"] += 1
            sums["a²"] += float(a @ a)
            sums["z'²"] += float(z @ z)
            sums["a²z'²"] += float((a @ a) * (z @ z))
            for i in range(len(a)):
                sums["entries"] += 1
                sums["x²η²"] += float(x @ x * eta[i] ** 2)
                sums["x²g²"] += float(x @ x * g[i] ** 2)
                if a[i] != 0:
                    sums["active"] += 1
                    sums["active x²η²"] += float(x @ x * eta[i] ** 2)
                    sums["active x²g²"] += float(x @ x * g[i] ** 2)
    return sums


@pytest.mark.parametrize("activation", ["relu", "jsrelu", "squared_relu"])
def test_the_key_identity_gives_the_density(activation):
    seen = layer(activation)
    found = key_identity(sums_of(seen))
    assert found["density_from_flatness"] == pytest.approx((seen["a"] != 0).double().mean().item(), rel=1e-12)
    per_token = torch.einsum("bti,btj->btij", seen["η"], seen["x"]).square().sum((2, 3))  # ‖∂L/∂K‖²
    assert found["augmented_flatness_key"] == pytest.approx(per_token.sum(1).mean().item())
    passed = torch.einsum("bti,btj->btij", seen["g"], seen["x"]).square().sum((2, 3))
    assert found["augmented_flatness_linear"] == pytest.approx(passed.sum(1).mean().item())
    exact = found["coefficient_key_authors"] == pytest.approx(found["coefficient_key"])
    assert exact == (activation == "relu")


def test_the_value_identity_needs_the_weighted_mean():
    seen = layer()
    found = value_identity(sums_of(seen))
    norm = seen["a"].square().sum((1, 2)).mean().item()
    assert found["activation_norm_from_flatness"] == pytest.approx(norm, rel=1e-12)
    per_token = torch.einsum("bti,btj->btij", seen["z'"], seen["a"]).square().sum((2, 3))  # ‖∂L/∂V‖²
    assert found["augmented_flatness_value"] == pytest.approx(per_token.sum(1).mean().item())
    with_plain_mean = found["augmented_flatness_value"] / found["coefficient_value_authors"]
    assert abs(with_plain_mean / norm - 1) > 0.01


def test_marginal_entries_are_taken_from_the_numerator_alone():
    sums = {"entries": 100, "active": 20, "samples": 5, "x²η²": 50.0, "active x²η²": 40.0, "active x²g²": 10.0}
    found = key_identity(sums | {"marginal x²η²": 10.0, "x²g²": 60.0})
    assert found["augmented_flatness_key"] == 10 and found["coefficient_key"] == 2
    assert found["density_from_flatness"] == pytest.approx(40 / (100 * 2))
    assert found["coefficient_key_authors"] == 0.5


def test_densities_of_known_sums():
    sums = {"entries": 200, "tokens": 20, "samples": 4, "units": 10, "calls": 2, "active": 50, "differentiable": 60,
            "union": 1.4, "alive": 8, "p": 100.0, "p²": 250.0, "σ'²": 80.0, "x²": 40.0, "a²": 12.0}  # fmt: skip
    expected = {"density": 0.25, "derivative_density": 0.3, "union_density": 0.7, "dead_units": 0.2,
                "live_density": 0.3125, "input_norm": 2.0, "activation_norm": 3.0, "squared_derivative": 0.4,
                "squared_pre_activation": 1.25, "pre_activation_std": 1.0, "tokens": 5, "units": 10,
                "samples": 4}  # fmt: skip
    assert densities(sums) == pytest.approx(expected)


def test_gradient_statistics_of_known_sums():
    sums = {"entries": 100, "tokens": 10, "active": 20, "η < 0": 8, "η > 0": 12, "g²": 50.0, "active g²": 30.0,
            "|η|": 9.0, "η": -3.0, "η²": 4.0, "tiny": 60}  # fmt: skip
    expected = {"activation_gradient": 0.5, "activation_gradient_active": 1.5, "activation_gradient_ratio": 3.0,
                "gradient_density": 0.2, "tiny": 0.6, "effective_gradient_l1": 0.9, "effective_gradient_l2": 0.4,
                "beneficial_units": 0.8, "harmful_units": 1.2, "beneficial_sum": -0.6, "harmful_sum": 0.3}  # fmt: skip
    assert gradient_statistics(sums, ["tiny"]) == pytest.approx(expected)


def test_nothing_to_divide_by_is_nan():
    assert math.isnan(ratio(0.0, 0.0)) and math.isnan(ratio(1.0, 0)) and ratio(1.0, 4) == 0.25


def test_remaining_multiply_adds_are_those_of_a_computation_that_skips_zeros():
    seen = layer("relu", samples=1, tokens=6, width=5, units=7)
    active = seen["a"][0] != 0
    slope = active.clone()
    slope[0] = ~slope[0]  # so that the two densities and their patterns differ
    forward = backward = dense = 0
    for t in range(6):
        for i in range(7):
            for _ in range(5):
                dense += 1
                forward += 1 + int(active[t, i])  # K x, V a
                backward += int(active[t, i]) + 3 * int(slope[t, i])  # ∂V, then ∂a, ∂x, ∂K
    density, derivative_density = active.double().mean().item(), slope.double().mean().item()
    assert density != derivative_density
    found = remaining_multiply_adds(density, derivative_density)
    assert found == pytest.approx((forward / (2 * dense), backward / (4 * dense)))
    assert remaining_multiply_adds(1.0, 1.0) == (1.0, 1.0)


def test_remaining_multiply_adds_of_columns():
    table = pd.DataFrame({"density": [0.1, 0.5], "derivative_density": [0.1, 0.7]})
    forward, backward = remaining_multiply_adds(table["density"], table["derivative_density"])
    assert np.allclose(forward, [0.55, 0.75]) and np.allclose(backward, [0.1, 0.65])


def test_the_backward_shares_leave_every_gradient_as_it_is():
    """The pruned products of the docstring, against autograd."""
    torch.manual_seed(0)
    key, value = nn.Linear(5, 7).double(), nn.Linear(7, 5).double()
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    p = key(x)
    a = p.relu()
    z = value(a)
    upstream = torch.randn(5, dtype=torch.float64)
    z.backward(upstream)
    on = (p > 0).nonzero().squeeze(1)
    eta = value.weight[:, on].T @ upstream  # ∂a where σ' ≠ 0
    of_values = torch.zeros_like(value.weight)
    of_values[:, on] = torch.outer(upstream, a[on].detach())
    of_keys = torch.zeros_like(key.weight)
    of_keys[on] = torch.outer(eta, x.detach())
    assert torch.allclose(value.weight.grad, of_values) and torch.allclose(key.weight.grad, of_keys)
    assert torch.allclose(x.grad, key.weight[on].T @ eta)
    assert torch.allclose(z, value.weight[:, on] @ a[on] + value.bias)
