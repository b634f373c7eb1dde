"""A sparsified model saved by its own means is loaded with its plug-ins, or whoever loads it otherwise is told."""

import copy

import pytest
import torch
from torch import nn

from sparsity import load
from sparsity.blocks import Layout, find_blocks
from sparsity.plugins import sparsify

OPTIONS = [
    {},
    dict(activation="squared_relu", zeroth_bias=False, restricted_norm=False),
    dict(activation="s_jsrelu(1.6,-1.6)", placement="output", clip=None, restricted_norm=False),
    dict(activation=None, zeroth_bias=False),
    dict(mixing_steps=4, uplift_steps=3, clip=0.5),
]


def trained(tiny, **options):
    """Two steps on, so that biases, norms and schedules stand somewhere in between."""
    with torch.no_grad():
        for block in find_blocks(tiny.model):
            block.norm.weight.uniform_(-0.5, 1.5)
    sparsify(tiny.model, **options)
    tiny.train(torch.optim.SGD(tiny.model.parameters(), lr=0.3), 2)
    return tiny


def fresh(tiny):
    """The same class, without plug-ins and with other weights."""
    torch.manual_seed(9)
    if tiny.name == "vit":
        from tests.sparsity.conftest import vit

        return vit().model
    return type(tiny.model)(tiny.model.config)


def assert_same(one, other, tiny):
    assert torch.equal(tiny.output(one.eval()), tiny.output(other.eval()))
    for model in (one, other):
        model.train()
        tiny.train(torch.optim.SGD(model.parameters(), lr=0.1), 1, model)
    for (name, tensor), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, again), name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("suffix", ["", ".pt", ".safetensors"])
def test_a_state_dict_is_loaded_with_its_plug_ins(tiny, options, suffix, tmp_path):
    trained(tiny, **options)
    plain, saved = fresh(tiny), tiny.model.state_dict()
    if suffix == ".pt":
        torch.save(saved, saved := tmp_path / "model.pt")
    elif suffix:
        from safetensors.torch import save_model

        save_model(tiny.model, str(saved := tmp_path / "model.safetensors"))
    loaded = load(plain, saved)
    assert loaded is plain
    assert_same(loaded, tiny.model, tiny)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shards", ["50GB", "5KB"])
@pytest.mark.parametrize("name", ["t5", "bert", "gpt2"])
def test_a_folder_of_save_pretrained_and_what_transformers_says_of_it(build, name, options, shards, tmp_path):
    tiny = trained(build(name), **options)
    tiny.model.save_pretrained(tmp_path, max_shard_size=shards)
    plain, info = type(tiny.model).from_pretrained(tmp_path, output_loading_info=True)
    assert "sparsity_plugins" in info["unexpected_keys"]
    assert_same(load(plain, tmp_path), tiny.model, tiny)


@pytest.mark.parametrize("options", OPTIONS)
def test_loaded_without_it_other_numbers_do_not_come_silently(tiny, options):
    state = trained(tiny, **options).model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*sparsity_plugins"):
        fresh(tiny).load_state_dict(state)
    other = sparsify(fresh(tiny), "squared_relu", zeroth_bias=False, restricted_norm=False, mixing_steps=7)
    with pytest.warns(UserWarning, match=r"saved after sparsify\(.*the model had sparsify\(.*\"mixing_steps\": 7"):
        other.load_state_dict(state, strict=False)


def test_the_loading_of_transformers_is_a_warning(build, tmp_path, caplog):
    import logging

    tiny = trained(build("gpt2"), **OPTIONS[1])
    tiny.model.save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    type(tiny.model).from_pretrained(tmp_path)
    assert "sparsity_plugins" in caplog.text and any(r.levelno >= logging.WARNING for r in caplog.records)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


def test_layouts_of_ones_own_and_parts_of_a_model():
    own = Layout("own", "up", "up", "act", "down", norms=("norm",))
    model = nn.ModuleDict({"first": nn.Sequential(Own(), Own()), "second": nn.Sequential(Own())})
    plain = copy.deepcopy(model)
    sparsify(model["first"], layouts=[own], tokens=5)
    sparsify(model["second"], "squared_relu", layouts=[own], tokens=3, placement="output")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "zeroth" in name:
                parameter.normal_()
    load(plain, model.state_dict())
    for part, tokens in (("first", 5), ("second", 3)):
        x = torch.randn(2, tokens, 8)
        assert torch.equal(plain[part](x), model[part](x))


def test_what_cannot_be_loaded_is_named(build, tmp_path):
    tiny = build("bert")
    with pytest.raises(
        ValueError, match=r"nothing here was saved by a sparsified model .*'sparsity_plugins'.*as usual"
    ):
        load(fresh(tiny), tiny.model.state_dict())
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors or pytorch_model.bin here"):
        load(fresh(tiny), tmp_path)
    state = trained(tiny).model.state_dict()
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    with pytest.raises(ValueError, match=f"what was saved has no '{name}' .1 such"):
        load(fresh(tiny), {key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ValueError, match="what was saved has, and the model has not, 'more'"):
        load(fresh(tiny), state | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match="BertForMaskedLM has no part 'inner'"):
        load(fresh(tiny), {f"inner.{key}": tensor for key, tensor in state.items()})
    with pytest.raises(ValueError, match="has its plug-ins already"):
        load(tiny.model, state)
