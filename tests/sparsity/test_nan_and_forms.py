"""Probes on broken numbers, and on MLPs of other forms: packed gates, convolutions, auxiliary MLPs, experts."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsity.blocks import find_blocks
from sparsity.plugins import sparsify
from sparsity.probes import probe


class Mlp(nn.Module):
    """timm's form, of linears or of 1 × 1 convolutions, with or without a gate in the same linear."""

    def __init__(self, packed=False, convolution=None):
        super().__init__()
        torch.manual_seed(0)
        linear = nn.Linear if convolution is None else partial(nn.Conv2d, kernel_size=convolution, padding="same")
        self.fc1, self.act, self.fc2 = linear(6, 24 if packed else 12), nn.ReLU(), linear(12, 6)
        self.packed = packed

    def forward(self, x):
        hidden = self.fc1(x)
        if self.packed:
            hidden, gate = hidden.chunk(2, -1)
            return self.fc2(self.act(hidden) * gate)
        return self.fc2(self.act(hidden))


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.mlp = Mlp(**options)

    def forward(self, x):
        return x + self.mlp(x)


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# NaN -----------------------------------------------------------------------------------------------------------------


def nan_in_the_input(model, x):
    x[1, 2, 3] = math.nan


def nan_in_the_keys(model, x):
    with torch.no_grad():
        model[1].mlp.fc1.weight[0, 0] = math.nan


def nan_of_the_activation(model, x):
    model[1].mlp.act = Broken()


class Broken(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x, x * math.nan)

    def derivative(self, x):
        return (x > 0).to(x.dtype)


@pytest.mark.parametrize("spoil", [nan_in_the_input, nan_in_the_keys, nan_of_the_activation])
@pytest.mark.parametrize("gradients", [True, False])
def test_nan_stays_nan_and_is_said_once(spoil, gradients):
    model, x = nn.Sequential(Layer(), Layer()), data(4, 5, 6)
    spoil(model, x)
    with probe(model) as p:
        loss = model(x).square().sum()
        if gradients:
            loss.backward()
    with pytest.warns(UserWarning, match="mlp: activations were NaN, and so are the statistics of [12] of 2 layers"):
        row = p.summary().loc["1.mlp"]
    counted = ["density", "derivative_density", "union_density", "dead_units", "live_density"]
    counted += ["gradient_density", "beneficial_units", "effective_gradient_below_1e-3"] if gradients else []
    assert row[counted].isna().all() and row["samples"] == 4
    first = p.summary(gradients=False).loc["0.mlp"]
    assert math.isnan(first["density"]) == (spoil is nan_in_the_input)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.summary()


def test_infinite_activations_are_no_nan():
    model, x = nn.Sequential(Layer()), data(4, 5, 6)
    x[0, 0] = 1e38
    with probe(model) as p, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        assert 0 < p.summary().loc["0.mlp", "density"] < 1


# Forms ---------------------------------------------------------------------------------------------------------------


def test_a_packed_gate_is_a_gate():
    model = nn.Sequential(Layer(packed=True))
    (block,) = find_blocks(model)
    assert block.packed and block.gated and not find_blocks(nn.Sequential(Layer()))[0].gated
    with pytest.raises(ValueError, match=r"0.mlp: this MLP is gated \(timm\).*pass activation=None"):
        sparsify(model, tokens=5)
    x = data(4, 5, 6)
    with probe(model) as p:
        model(x).square().sum(1).mean().backward()
    hidden = F.linear(x, block.key.weight, block.key.bias)[..., :12]
    row = p.summary().loc["0.mlp"]
    assert row["units"] == 12 and row["density"] == pytest.approx((hidden > 1e-6).double().mean().item())
    assert row["density_from_flatness"] == pytest.approx(row["density"], rel=1e-5)


@pytest.mark.parametrize("mask", [False, True])
def test_convolutions_of_one_pixel_are_linears_of_each_token(mask):
    convolved, linear = nn.Sequential(Layer(convolution=1)), nn.Sequential(Layer())
    with torch.no_grad():
        for one, other in ((convolved[0].mlp.fc1, linear[0].mlp.fc1), (convolved[0].mlp.fc2, linear[0].mlp.fc2)):
            other.weight.copy_(one.weight[:, :, 0, 0])
            other.bias.copy_(one.bias)
    maps = data(4, 6, 3, 5)
    tables = []
    for model, x in ((convolved, maps), (linear, maps.movedim(1, -1))):
        with probe(model, mask=torch.arange(60).view(4, 3, 5) % 3 > 0 if mask else None, histograms=True) as p:
            model(x).square().sum((1, 2, 3)).mean().backward()
        tables.append((p.summary().to_numpy(), p.histogram()["all"].sum()))
    assert tables[0][0] == pytest.approx(tables[1][0], rel=1e-5) and tables[0][1] == tables[1][1]


@pytest.mark.parametrize("model, message", [
    (nn.Sequential(Layer(convolution=3)), r"0.mlp: Conv2d.* mixes tokens or splits channels"),
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, activation=nn.ReLU()), 1),
     r"layers.0.linear1: this layer takes \(T, B, d\), .* batch_first=True"),
])  # fmt: skip
def test_what_is_no_list_of_tokens_is_not_measured(model, message):
    with pytest.raises(ValueError, match=message), probe(model):
        pass


class Pooled(nn.Module):
    """Layers, and auxiliary MLPs of the same form: of relative positions in each layer, of pooling at the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Layer(), Layer()])
        for layer in self.blocks:
            layer.positions = Layer()
        self.pool = Layer()

    def forward(self, x):
        for layer in self.blocks:
            x = layer(x + layer.positions(x))
        return self.pool(x.mean(1))


def test_auxiliary_mlps_are_no_blocks():
    model = Pooled()
    assert [block.name for block in find_blocks(model)] == ["blocks.0.mlp", "blocks.1.mlp"]
    sparsify(model, tokens=5, restricted_norm=False, clip=None)
    assert isinstance(model.pool.mlp.act, nn.ReLU) and isinstance(model.blocks[1].positions.mlp.act, nn.ReLU)
    model(data(4, 5, 6))
    assert [block.name for block in find_blocks(Layer())] == ["mlp"]


def test_a_model_measured_in_part_says_so():
    class Experts(Layer):
        """The class of its neighbours, with another MLP."""

        def __init__(self, routed):
            super().__init__()
            if routed:
                self.mlp = nn.ModuleDict({"expert": Mlp()})

        def forward(self, x):
            return x + (self.mlp["expert"] if isinstance(self.mlp, nn.ModuleDict) else self.mlp)(x)

    model = nn.Sequential(Experts(False), Experts(True), Experts(True))
    with pytest.warns(UserWarning, match="^1 and 1 more layers have no MLP that a layout describes"), probe(model) as p:
        model(data(4, 5, 6))
    assert list(p.summary().index) == ["0.mlp"]
    with pytest.raises(ValueError, match=r"^1: no MLP that a layout describes .* e.g. 0.mlp"):
        sparsify(model, tokens=5, restricted_norm=False, clip=None)
