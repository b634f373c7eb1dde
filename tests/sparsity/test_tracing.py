"""Which norm feeds an MLP is seen, whatever the names and whatever else the layer needs to run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsity.blocks import LAYOUTS, Layout, find_blocks
from sparsity.plugins import parameter_groups, sparsify

OWN = Layout("own", "up", "up", "act", "down", norms=("first", "second"))


class Attention(nn.Module):
    """Needs what only its model knows, and returns more than tokens."""

    def __init__(self, returns):
        super().__init__()
        self.linear, self.returns = nn.Linear(8, 8), returns

    def forward(self, x, positions):
        return self.returns(self.linear(x) + positions["all"])


class Layer(nn.Module):
    """An MLP and two norms; `path` says how tokens go through them."""

    def __init__(self, path, returns=None):
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
        self.path = path
        if returns is not None:
            self.attention = Attention(returns)

    def mlp(self, x):
        return self.down(self.act(self.up(x)))

    def forward(self, x, positions=None):
        return self.path(self, x, positions)


class Needy(Layer):
    def forward(self, x, positions):
        x = x + self.path(self, x, positions)
        return x + self.mlp(self.second(x))


def first_of(one, two, three):
    return one


def flat(layer, x, _):
    return x + layer.mlp(layer.first(x).flatten(0, -2)).view(x.shape)


FED = {
    "before": (Layer(lambda layer, x, _: x + layer.mlp(layer.first(x))), "first"),
    "the second": (Layer(lambda layer, x, _: x + layer.mlp(layer.second(layer.first(x)))), "second"),
    "behind": (Layer(lambda layer, x, _: x + layer.first(layer.mlp(x))), None),
    "beside": (Layer(lambda layer, x, _: layer.first(x) + layer.mlp(x)), None),
    "scaled on the way": (Layer(lambda layer, x, _: x + layer.mlp(2 * layer.first(x))), None),
    "not used": (Layer(lambda layer, x, _: x + layer.mlp(F.layer_norm(x, (8,)))), None),
    "dropped out on the way": (Layer(lambda layer, x, _: layer.mlp(F.dropout(layer.first(x), 0.5, layer.training))),
                               "first"),
    "flattened": (Layer(flat), "first"),
    "in chunks": (Layer(lambda layer, x, _: torch.cat([layer.mlp(c) for c in layer.first(x).split(2, 1)], 1)), "first"),
    "attention of tokens": (Needy(lambda layer, x, p: layer.attention(x, p), lambda x: x), "second"),
    "attention of pairs": (Needy(lambda layer, x, p: layer.attention(x, p)[0], lambda x: (x, None)), "second"),
    "attention of three": (Needy(lambda layer, x, p: first_of(*layer.attention(x, p)),
                                 lambda x: (x, None, None)), "second"),
}  # fmt: skip


@pytest.mark.parametrize("case", FED)
def test_the_norm_that_feeds_the_mlp_is_seen_or_none_is(case):
    layer, expected = FED[case]
    model = nn.Sequential(layer, nn.Identity()).train()
    layer.act.eval()
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    (block,) = find_blocks(model, [OWN])
    assert block.norm is (None if expected is None else layer.get_submodule(expected))
    assert modes == [module.training for module in model.modules()] and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    if expected is None:
        with pytest.raises(
            ValueError, match=r"0.up: no norm .* first and second does not enter it.*restricted_norm=False"
        ):
            sparsify(model, layouts=[OWN], tokens=4)
        with pytest.raises(ValueError, match=r"0.up: no norm"):
            parameter_groups(model, 0.1, ("mlp_norms",), [OWN])
        sparsify(model, layouts=[OWN], tokens=4, restricted_norm=False, clip=None)
    else:
        groups = parameter_groups(model, 0.1, ("mlp_norms",), [OWN])
        assert {id(p) for p in groups[1]["params"]} == {id(p) for p in layer.get_submodule(expected).parameters()}


def test_a_layer_that_cannot_be_run_by_itself_needs_an_example():
    def path(layer, x, positions):
        if positions is None or "all" not in positions:
            raise KeyError("positions of all tokens")
        return x + layer.mlp(layer.second(x + positions["all"]))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(path), Layer(path)])

        def forward(self, x, scale=1):
            for layer in self.layers:
                x = layer(scale * x, {"all": torch.ones(8)})
            return x

    model = Model()
    message = "layers.0.up: its layer could not be run by itself .*KeyError: 'positions of all tokens'.*pass example="
    with pytest.raises(ValueError, match=message):
        sparsify(model, layouts=[OWN], tokens=4)
    for example in (torch.randn(2, 4, 8), (torch.randn(2, 4, 8), 2), {"x": torch.randn(2, 4, 8)}):
        model = sparsify(Model(), layouts=[OWN], tokens=4, example=example)
        assert [layer._plugins.norm for layer in model.layers] == ["second", "second"]


def test_a_layer_on_the_meta_device_is_seen_too():
    with torch.device("meta"):
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
        )
    assert [block.norm is block.layer.norm2 for block in find_blocks(model)] == [True, True]
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("call, activation, message", [
    (lambda layer, x, _: layer.down(torch.relu(layer.up(layer.first(x)))), "jsrelu", "activation 'act' does not run"),
    (lambda layer, x, _: F.linear(layer.act(layer.up(layer.first(x))), layer.down.weight), "jsrelu",
     "value layer 'down' does not run as a module"),
    (lambda layer, x, _: layer.down(torch.relu(layer.up(layer.first(x)))), None, ""),
])  # fmt: skip
def test_functional_and_fused_code_is_refused_where_it_would_skip_a_plug_in(call, activation, message):
    model = nn.Sequential(Layer(call))
    before = repr(model)
    if not message:
        sparsify(model, activation, layouts=[OWN], tokens=4)
        return
    with pytest.raises(ValueError, match=f"0.up: its {message}"):
        sparsify(model, activation, layouts=[OWN], tokens=4)
    assert repr(model) == before


@pytest.mark.parametrize("fed, said", [("first", True), ("second", False)])
def test_a_norm_that_feeds_attention_too_is_said(fed, said, recwarn):
    def path(layer, x, positions):
        return x + layer.attention(layer.first(x), positions) + layer.mlp(getattr(layer, fed)(x))

    sparsify(nn.Sequential(Layer(path, lambda x: x)), layouts=[OWN], tokens=4)
    assert any("0.up: the norm that feeds this MLP feeds attention too" in str(one.message) for one in recwarn) == said


@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu])
def test_torchs_layer_with_a_function_gets_a_module_in_its_place(activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True, norm_first=True)
    x = torch.randn(2, 5, 8)
    sparsify(layer, tokens=5)
    inner = layer.linear1(layer.norm2(x + layer._sa_block(layer.norm1(x), None, None)))
    hidden = torch.where(inner > 0, inner + inner**2 / 2, 0)
    expected = x + layer._sa_block(layer.norm1(x), None, None) + layer.linear2(hidden)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


def test_tokens_that_come_first_are_refused():
    for layer in (nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU()),):
        with pytest.raises(ValueError, match=r"linear1: a zeroth bias needs tokens \(B, T, d\), .* batch_first=True"):
            sparsify(layer, tokens=5)
        sparsify(layer, zeroth_bias=False)


def test_layouts_of_the_library_name_each_path_once():
    names = [layout.name for layout in LAYOUTS]
    assert len(set(names)) == len(names)
