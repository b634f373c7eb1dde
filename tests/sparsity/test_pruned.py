"""Inference that skips zeros gives what dense inference gives on every kind of model, dtype and call."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparsity import JSReLU, Layout, find_blocks, pruned, screening, skip_zeros, sparsify
from sparsity.activations import s_shaped
from sparsity.break_even import BreakEven
from sparsity.pruned import LONGEST_PAUSE, Pause, ScreenedKeys, SkippingValues
from sparsity.screening import Screen

OPT = Layout("OPT", "fc1", "fc1", "activation_fn", "fc2")
WIDTHS = dict(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=23)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def count(monkeypatch):
    """How often values were added up and keys screened; where it matters, tests see that skipping took place."""
    calls = {"values": 0, "keys": 0}

    def counted(kind, function):
        def call(*args):
            calls[kind] += 1
            return function(*args)

        return call

    monkeypatch.setattr(pruned, "_add_up", counted("values", pruned._add_up))
    monkeypatch.setattr(Screen, "estimate", counted("keys", Screen.estimate))
    monkeypatch.setattr(BreakEven, "shares", lambda self, *args: dict.fromkeys(range(1, self.most_tokens + 1), 1.0))
    return calls


class MLP(nn.Module):
    def __init__(self, d, d_ff, activation):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(d, d_ff), activation, nn.Linear(d_ff, d)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, d=24, d_ff=96, activation=None, bias=-0.8):
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(d), MLP(d, d_ff, activation or nn.ReLU())
        nn.init.constant_(self.mlp.fc1.bias, bias)

    def forward(self, x):
        return x + self.mlp(self.norm2(x))


def language_model(name):
    """A language model with ReLU, random weights and no dropout, and the layouts that it needs."""
    import transformers as hf

    torch.manual_seed(0)
    if name in ("t5", "gated t5"):
        kind = dict(feed_forward_proj="relu") if name == "t5" else dict(feed_forward_proj="gated-relu")
        config = hf.T5Config(d_model=32, d_kv=16, d_ff=96, num_layers=2, num_heads=2, vocab_size=23, dropout_rate=0.0,
                             decoder_start_token_id=0, **kind)  # fmt: skip
        config.dense_act_fn = "relu"
        return hf.T5ForConditionalGeneration(config).eval(), ()
    if name == "gpt2":
        config = hf.GPT2Config(vocab_size=23, n_embd=32, n_inner=96, n_layer=2, n_head=2, n_positions=64,
                               activation_function="relu", bos_token_id=0, eos_token_id=1)  # fmt: skip
        return hf.GPT2LMHeadModel(config).eval(), ()
    if name == "opt":
        config = hf.OPTConfig(**WIDTHS, ffn_dim=96, word_embed_proj_dim=32, activation_function="relu",
                              max_position_embeddings=64, dropout=0.0)  # fmt: skip
        return hf.OPTForCausalLM(config).eval(), (OPT,)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**WIDTHS, hidden_act="relu", max_position_embeddings=64)).eval(), ()


def assert_close(found, expected, dtype=torch.float32):
    assert found.dtype == expected.dtype == dtype and found.shape == expected.shape
    assert (found - expected).double().norm() <= TOLERANCE[dtype] * expected.double().norm()


# The same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["t5", "gated t5", "gpt2", "opt", "llama"])
def test_generates_the_same_with_a_cache(name, batch, count):
    model, layouts = language_model(name)
    fast = skip_zeros(copy.deepcopy(model), layouts=[*layouts, *pruned.LAYOUTS])
    prompt = torch.randint(2, 23, (batch, 5))
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, output_logits=True,
                   return_dict_in_generate=True, pad_token_id=1)  # fmt: skip
    expected, found = model.generate(prompt, **options), fast.generate(prompt, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert_close(ours, theirs)
    assert count["values"] >= 11 * 2 and (count["keys"] >= 11 * 2) == (name != "gpt2")  # Conv1D keys stay dense


@pytest.mark.parametrize("screen_keys", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (2, 2, 24), (4, 24)])
@pytest.mark.parametrize("activation", [nn.ReLU(), JSReLU(), s_shaped("jsrelu", h=0.5), s_shaped("jsrelu", 1.6, h=0.5)])
def test_values_and_keys_against_a_loop_over_units(activation, shape, screen_keys):
    layer = Layer(activation=activation).eval()
    x = torch.randn(shape)
    mlp = layer.mlp
    with torch.no_grad():
        expected = torch.zeros(shape).double() + mlp.fc2.bias
        for j in range(96):
            pre_activation = (x.double() * mlp.fc1.weight[j]).sum(-1) + mlp.fc1.bias[j]
            expected += activation(pre_activation)[..., None] * mlp.fc2.weight[:, j]
        skip_zeros(layer, screen_keys=screen_keys)
        assert_close(mlp(x), expected.float())
    assert isinstance(mlp.fc1, ScreenedKeys) == (screen_keys and not (activation(torch.linspace(-9, 0, 99)) != 0).any())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_other_dtypes_before_and_after(dtype, count):
    layer, x = Layer().eval(), torch.randn(2, 24)
    with torch.no_grad():
        expected = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert_close(skip_zeros(copy.deepcopy(layer).to(dtype))(x.to(dtype)), expected, dtype)
        assert_close(skip_zeros(layer).to(dtype)(x.to(dtype)), expected, dtype)
    assert count["values"] == 2


@pytest.mark.parametrize("bias", [-50.0, 50.0])
def test_no_unit_and_all_units(bias):
    layer, x = Layer(bias=bias).eval(), torch.randn(1, 24)
    with torch.no_grad():
        expected = layer(x)
        assert_close(skip_zeros(layer)(x), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_propagates(bad):
    layer = Layer().eval()
    x = torch.randn(2, 24)
    x[0, 3] = bad
    with torch.no_grad():
        expected = layer.mlp(x)
        found = skip_zeros(layer).mlp(x)
    assert not found[0].isfinite().any()
    assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.parametrize("placement", ["input", "output"])
@pytest.mark.parametrize("first", ["sparsify", "skip_zeros"])
def test_zeroth_biases_count(first, placement, build):
    tiny = build("t5")
    options = dict(tokens=16, placement=placement, clip=None)
    layouts = [Layout("T5, entered at its keys", "DenseReluDense.wi", "DenseReluDense.wi", "DenseReluDense.act",
                      "DenseReluDense.wo", norms=("layer_norm",)), *pruned.LAYOUTS]  # fmt: skip
    for kinds in (pruned.LAYOUTS, layouts):
        dense = copy.deepcopy(tiny.model).eval()
        if first == "skip_zeros":
            fast = sparsify(skip_zeros(copy.deepcopy(dense), layouts=kinds, most_tokens=99), layouts=kinds, **options)
        sparsify(dense, layouts=kinds, **options)
        if first == "sparsify":
            fast = skip_zeros(copy.deepcopy(dense), layouts=kinds, most_tokens=99)
        with torch.no_grad():
            for model in (dense, fast):
                for name, parameter in model.named_parameters():
                    if "zeroth_bias" in name:
                        parameter.copy_(torch.linspace(-2, 2, parameter.numel()).reshape(parameter.shape))
            assert_close(tiny.output(fast), tiny.output(dense))
            again = pickle.loads(pickle.dumps(fast))
            assert_close(tiny.output(again), tiny.output(dense))


# What stays dense ----------------------------------------------------------------------------------------------------


def test_training_is_dense_and_has_the_same_gradients(build, count):
    for name in ("t5", "gpt2"):
        tiny = build(name)
        fast = skip_zeros(copy.deepcopy(tiny.model), most_tokens=99)
        tiny.loss().backward()
        tiny.loss(fast).backward()
        for ours, theirs in zip(fast.parameters(), tiny.model.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    assert count == {"values": 0, "keys": 0}


def test_autocast_is_dense():
    layer, x = Layer().eval(), torch.randn(1, 24)
    fast = skip_zeros(copy.deepcopy(layer))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast.mlp(x), layer.mlp(x)) and fast.mlp(x).dtype == torch.bfloat16


def test_many_tokens_and_too_many_active_units_are_dense(count):
    layer = skip_zeros(Layer(bias=0.0).eval(), most_tokens=2)
    with torch.no_grad():
        layer(torch.randn(3, 24))
        assert count == {"values": 0, "keys": 0}
        layer.mlp.fc1._break_even, layer.mlp.fc2._break_even = {1: 0.1}, {1: 0.1}
        layer(torch.randn(1, 24))
    assert count == {"values": 0, "keys": 1}


def test_screens_in_vain_become_rare(count):
    layer = skip_zeros(Layer(bias=0.0).eval())
    layer.mlp.fc1._break_even = {1: 0.01}
    with torch.no_grad():
        for _ in range(1 + 2 + 4 + 8 + 16 + 3 * 32):
            layer(torch.randn(1, 24))
    assert count["keys"] == 5 + 3
    pause = Pause(LONGEST_PAUSE, 0)
    pause.follow(paid=True)
    assert all(pause.is_over() for _ in range(3))


# The bound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 8, 24, 50, 64, 100, 768])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e6])
def test_units_left_out_are_not_positive(d, scale):
    torch.manual_seed(d)
    weight = torch.randn(257, d) * torch.logspace(-3, 3, 257)[:, None] * scale
    weight[::7, 0] *= 100  # one entry that spoils the steps of its row
    weight[5] = 0
    for dtype in (torch.float32, torch.bfloat16):
        kept, tokens = weight.to(dtype), (10 * torch.randn(3, d)).to(dtype)
        bias = (torch.randn(257) * scale).to(dtype)
        estimate, possible = Screen(kept, 1.0).estimate(tokens, bias)
        exact = tokens.double() @ kept.double().T + bias
        left_out = torch.ones(257, dtype=torch.bool)
        left_out[possible] = False
        assert (exact[:, left_out] <= 0).all() and (estimate <= 0).all()
        assert left_out.any() and (len(possible) < 257)


def test_the_bound_is_that_of_cauchy_and_schwarz():
    """A unit is left out exactly if the estimate, plus the distance of the weights times the token's length, is < 0."""
    torch.manual_seed(0)
    weight, token = torch.randn(64, 64), torch.randn(1, 64).bfloat16().float()
    screen = Screen(weight, 1.0)
    steps = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    rounded = (weight / steps).round().clamp(-127, 127) * steps
    product = token.double() @ rounded.double().T
    bound = (weight - rounded).norm(dim=1) * token.norm() + 2 * product.abs() / 256
    _, possible = screen.estimate(token, None)
    sure = (product + bound < -1e-3 * bound)[0]
    unsure = (product + bound > 1e-3 * bound)[0]
    assert not set(possible.tolist()) & set(sure.nonzero()[:, 0].tolist())
    assert set(unsure.nonzero()[:, 0].tolist()) <= set(possible.tolist())
    assert sure.sum() + unsure.sum() >= 60


def test_the_bound_is_needed():
    """Along the error of a row a token is as far off as the bound says: a unit just above 0 must be left in."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    steps = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    error = weight - (weight / steps).round().clamp(-127, 127) * steps
    tokens = error.bfloat16().float()  # (64, 64), one per row
    exact = (tokens * weight).sum(1)
    bias = -exact + 0.05 * error.norm(dim=1) * tokens.norm(dim=1)
    for unit in range(64):
        _, possible = Screen(weight, 1.0).estimate(tokens[unit : unit + 1], bias)
        assert unit in possible.tolist()


def test_the_rounding_of_tokens_counts():
    """Weights that 8 bits hold exactly, tokens that bfloat16 does not hold: units just above 0 must be left in."""
    weight = torch.full((4, 64), 127.0)
    token = torch.full((1, 64), 1 + 2.0**-9 - 2.0**-12)  # bfloat16 makes it 1
    bias = -(token @ weight.T)[0] + 1
    assert (token @ weight.T + bias > 0).all() and (token.bfloat16().float() @ weight.T + bias < 0).all()
    screen = Screen(weight, 1.0)
    assert screen.error.max() < 1e-2 * screen.norm.max()
    _, possible = screen.estimate(token, bias)
    assert len(possible) == 4


def change_by_optimizer(linear):
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.SGD([linear.weight], lr=0.5).step()


def change_one_row(linear):
    with torch.no_grad():
        linear.weight[3].mul_(-1)


def change_data(linear):
    linear.weight.data.mul_(-1)


def change_by_state_dict(linear, assign=False):
    linear.load_state_dict({name: -tensor for name, tensor in linear.state_dict().items()}, assign=assign)


def change_by_assignment(linear):
    change_by_state_dict(linear, assign=True)


def put_another(linear):
    linear.weight = nn.Parameter(-linear.weight.detach())


@pytest.mark.parametrize(
    "change",
    [change_by_optimizer, change_one_row, change_data, change_by_state_dict, change_by_assignment, put_another],
)
@pytest.mark.parametrize("inference", [False, True])
def test_the_screen_follows_the_weights(change, inference):
    layer = Layer(activation=JSReLU()).eval()
    fast = copy.deepcopy(layer)
    x = torch.randn(1, 24)
    inference = inference and change not in (change_by_optimizer, change_one_row)  # these are told by the version
    with torch.inference_mode(inference):
        if inference:
            layer, fast = (pickle.loads(pickle.dumps(each)) for each in (layer, fast))  # weights of inference mode
            assert layer.mlp.fc1.weight.is_inference()
        skip_zeros(fast)
    with torch.inference_mode():
        fast(x)
    with torch.inference_mode(inference):
        for model in (layer, fast):
            change(model.mlp.fc1)
            change(model.mlp.fc2)
    with torch.inference_mode():
        assert_close(fast(x), layer(x))


# Models as objects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "gpt2", "opt", "llama"])
def test_saved_as_ever(name, tmp_path, count):
    model, layouts = language_model(name)
    kinds = [*layouts, *pruned.LAYOUTS]
    fast = skip_zeros(copy.deepcopy(model), layouts=kinds)
    before, after = model.state_dict(), fast.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    model.load_state_dict(after)
    fast.load_state_dict(before)
    fast.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.state_dict().items())
    assert all(isinstance(module, nn.Module) for module in fast.modules()) and repr(fast) == repr(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_skip_by_themselves(copied, count):
    model, _ = language_model("llama")
    fast = skip_zeros(copy.deepcopy(model))
    again = copied(fast)
    ids = torch.randint(2, 23, (1, 3))
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
        assert_close(again(ids).logits, model(ids).logits)
    assert count["values"] == count["keys"] == 2
    gates = [block.layer.mlp.up_proj for block in find_blocks(again)]
    assert all(gate._shortlist is block.key._shortlist for gate, block in zip(gates, find_blocks(again), strict=True))


def test_a_gate_computes_only_what_its_keys_left(monkeypatch):
    model, _ = language_model("llama")
    fast = skip_zeros(copy.deepcopy(model))
    seen = []
    plain = screening.some_rows
    monkeypatch.setattr(
        pruned, "some_rows", lambda weight, bias, rows, x: seen.append(len(rows)) or plain(weight, bias, rows, x)
    )
    with torch.no_grad():
        assert_close(fast(torch.tensor([[3]])).logits, model(torch.tensor([[3]])).logits)
    assert len(seen) == 4 and seen[0] == seen[1] < 96 and seen[2] == seen[3] < 96  # keys and gate of two layers
    x = torch.randn(1, 32)
    with torch.no_grad():  # a gate that is called by itself, or for other tokens, computes all
        fast.model.layers[0].mlp.gate_proj(x)
        other = torch.randn(1, 32)
        assert torch.equal(fast.model.layers[0].mlp.up_proj(other), model.model.layers[0].mlp.up_proj(other))


def test_called_again_it_measures_again():
    layer = skip_zeros(Layer().eval())
    layer.mlp.fc1._break_even = layer.mlp.fc2._break_even = {}
    kinds = [type(layer.mlp.fc1), type(layer.mlp.fc2)]
    skip_zeros(layer)
    assert layer.mlp.fc1._break_even and layer.mlp.fc2._break_even
    assert [type(layer.mlp.fc1), type(layer.mlp.fc2)] == kinds
    skip_zeros(layer, screen_keys=False)
    assert not layer.mlp.fc1._break_even and layer.mlp.fc2._break_even


def with_lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(language_model("t5")[0], LoraConfig(target_modules=["wo"]))


def with_parametrization():
    layer = Layer()
    nn.utils.parametrizations.weight_norm(layer.mlp.fc2)
    return layer


def with_own_forward():
    layer = Layer()
    layer.mlp.fc2.forward = layer.mlp.fc2.forward
    return layer


def with_own_class():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Layer()
    layer.mlp.fc2.__class__ = Scaled
    return layer


def with_integers():
    layer = Layer()
    layer.mlp.fc2.weight = nn.Parameter(layer.mlp.fc2.weight.to(torch.uint8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("build_model", "options", "message"),
    [
        (Layer, dict(margin=0), "margin must be in"),
        (Layer, dict(most_tokens=0), "most_tokens must be at least 1"),
        (lambda: Layer(activation=nn.GELU()), {}, "mlp: a GELU gives no zeros to skip"),
        (lambda: Layer(activation=nn.SiLU()), {}, "mlp: a SiLU gives no zeros to skip"),
        (lambda: Layer(activation=s_shaped("jsrelu", 1.6, 1.6)), {}, "mlp: a Shifted gives no zeros to skip"),
        (lambda: nn.Linear(3, 3), {}, "no MLP block found"),
        (with_lora, {}, "DenseReluDense: a Linear cannot skip zeros, only .* merge adapters"),
        (with_parametrization, {}, "mlp: a ParametrizedLinear cannot skip zeros"),
        (with_own_forward, {}, "mlp: a Linear has a forward of its own"),
        (with_own_class, {}, "mlp: a Scaled cannot skip zeros"),
        (with_integers, {}, "mlp: a Linear cannot skip zeros"),
    ],
)
def test_refusals(build_model, options, message):
    model = build_model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        skip_zeros(model, **options)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("hide", [with_parametrization, with_own_forward, with_own_class])
def test_keys_that_are_no_plain_linear_are_computed_as_ever(hide):
    layer = Layer(d=96, d_ff=24).eval()
    layer.mlp.fc1 = hide().mlp.fc2  # from 96 to 24
    fast = skip_zeros(copy.deepcopy(layer))
    assert isinstance(fast.mlp.fc2, SkippingValues) and not isinstance(fast.mlp.fc1, ScreenedKeys)
    with torch.no_grad():
        x = torch.randn(1, 96)
        assert_close(fast(x), layer(x))


def test_accelerates_hooks_come_on_top(count):
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer, x = Layer().eval(), torch.randn(1, 24)
    fast = skip_zeros(copy.deepcopy(layer))
    for part in (fast.mlp.fc1, fast.mlp.fc2):
        add_hook_to_module(part, ModelHook())
    with torch.no_grad():
        assert_close(fast(x), layer(x))
    assert count == {"values": 1, "keys": 1}
