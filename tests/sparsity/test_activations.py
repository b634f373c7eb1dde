"""Activations: against the formulas of the paper written with `if`, and against autograd, to second order."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from transformers.activations import ACT2FN

from sparsity.activations import (
    ACTIVATIONS,
    JSReLU,
    Mixture,
    Shifted,
    SquaredReLU,
    SShaped,
    derivative,
    jsrelu,
    make,
    s_shaped,
    shifted_name,
)

SECTION_V = [(name, dx, dy) for name in ("squared_relu", "jsrelu") for dx in (1.6, -1.6) for dy in (1.6, -1.6)]


def half_mixed(first=None, second=None, k=0.25):
    mixture = Mixture(first or nn.ReLU(), second or JSReLU())
    mixture.set_mixing(k)
    return mixture


def every_activation():
    yield from ((name, make(name)) for name in ACTIVATIONS)
    yield from ((f"s_{name}{dx:+}{dy:+}", s_shaped(name, dx, dy)) for name, dx, dy in SECTION_V)
    yield "mixture", half_mixed()
    yield "mixture with gelu", half_mixed(nn.GELU(), SquaredReLU())
    yield "shifted silu", Shifted(nn.SiLU(), 0.3, -0.2)


ALL = dict(every_activation())


def naive(name, p, derivative=False):
    """The formulas of the paper on one number."""
    if p <= 0:
        return 0.0
    value, slope = {"relu": (p, 1.0), "jsrelu": (p + p * p / 2, p + 1), "squared_relu": (p * p, 2 * p)}[name]
    return slope if derivative else value


def grid(dtype=torch.float64):
    """Numbers on both sides of every kink and none on one: kinks are at 0, ±1.5 and those shifted by ±1.6."""
    return torch.linspace(-6.03, 6.01, 302, dtype=dtype)


# The formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "jsrelu", "squared_relu"])
def test_values_and_derivatives_are_the_papers(name):
    x = torch.cat([grid(), torch.tensor([0.0, -0.0, 1e-300, -1e-300, 1e6, -1e6], dtype=torch.float64)])
    expected = torch.tensor([naive(name, p) for p in x.tolist()], dtype=torch.float64)
    slopes = torch.tensor([naive(name, p, derivative=True) for p in x.tolist()], dtype=torch.float64)
    assert torch.allclose(make(name)(x), expected, rtol=1e-15, atol=0)
    assert torch.allclose(derivative(make(name), x), slopes, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name, dx, dy", SECTION_V)
def test_the_shifted_s_shapes_of_section_v(name, dx, dy):
    x, h = grid(), 1.5
    activation = s_shaped(name, dx, dy)
    expected = [naive(name, p - dx - h) - naive(name, -(p - dx) - h) + dy for p in x.tolist()]
    slopes = [naive(name, p - dx - h, True) + naive(name, -(p - dx) - h, True) for p in x.tolist()]
    assert torch.allclose(activation(x), torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(derivative(activation, x), torch.tensor(slopes, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, dx, dy", SECTION_V)
def test_an_s_shape_is_flat_exactly_where_the_shifted_input_is_at_most_h(name, dx, dy, dtype):
    x = torch.cat([grid(dtype), torch.tensor([dx - 1.5, dx + 1.5, dx], dtype=dtype)])
    activation = s_shaped(name, dx, dy)
    flat = (x - dx).abs() <= 1.5
    assert torch.equal(derivative(activation, x) == 0, flat)
    assert torch.equal(activation(x)[flat], torch.full_like(x[flat], dy))
    assert 0 < flat.sum() < len(x)


def test_s_shapes_are_odd_before_they_are_shifted():
    for name in ("s_jsrelu", "s_squared_relu"):
        activation, x = make(name), grid()
        assert torch.equal(activation(-x), -activation(x)) and activation(x).any()


@pytest.mark.parametrize("name", ALL)
def test_derivative_is_what_autograd_gives(name):
    activation = ALL[name]
    x = grid().requires_grad_()
    (expected,) = torch.autograd.grad(activation(x).sum(), x)
    assert torch.allclose(derivative(activation, x), expected, rtol=1e-12, atol=0)
    assert not derivative(activation, x).requires_grad


@pytest.mark.parametrize("name", ["relu", "jsrelu", "squared_relu", "mixture"])
def test_at_zero_the_derivative_is_zero_for_autograd_too(name):
    x = torch.zeros(3).requires_grad_()
    ALL[name](x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3)) and torch.equal(derivative(ALL[name], x), torch.zeros(3))


@pytest.mark.parametrize("name", ALL)
def test_shape_and_dtype_stay(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 4, dtype=dtype)
        for result in (ALL[name](x), derivative(ALL[name], x)):
            assert result.shape == x.shape and result.dtype == dtype
    assert ALL[name](torch.empty(0, 4)).shape == derivative(ALL[name], torch.empty(0, 4)).shape == (0, 4)


# JSReLU: orders, transforms, precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_first_and_second_order_against_finite_differences(name):
    x = grid()[::7].clone().requires_grad_()
    assert gradcheck(ALL[name], x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(ALL[name], x, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_second_derivatives_of_jsrelu_by_every_route():
    x, tangent = torch.tensor([-2.0, 0.5, 0.0, 3.0]), torch.tensor([1.0, 2.0, 4.0, -1.0])
    first, second = torch.tensor([0.0, 1.5, 0.0, 4.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])

    def total(x):
        return jsrelu(x).sum()

    assert torch.equal(grad(total)(x), first)
    value, push = jvp(jsrelu, (x,), (tangent,))
    assert torch.equal(value, jsrelu(x)) and torch.equal(push, first * tangent)
    assert torch.equal(jvp(grad(total), (x,), (tangent,))[1], second * tangent)  # forward over reverse
    assert torch.equal(grad(lambda x: grad(total)(x) @ tangent)(x), second * tangent)  # reverse over reverse
    assert torch.equal(torch.func.hessian(total)(x), second.diag())
    assert torch.equal(torch.autograd.functional.hessian(total, x), second.diag())
    assert torch.equal(vmap(vmap(grad(jsrelu)))(x.view(2, 2)), first.view(2, 2))
    assert torch.equal(vmap(jsrelu, in_dims=1, out_dims=1)(x.view(2, 2)), jsrelu(x).view(2, 2))


def test_a_hessian_vector_product_through_a_network():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(5, 8), act, nn.Linear(8, 2)).double() for act in (JSReLU(), Composed())]
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(6, 5, dtype=torch.float64)
    products = []
    for network in networks:
        gradients = torch.autograd.grad(network(x).square().sum(), network.parameters(), create_graph=True)
        inner = sum((gradient * gradient.detach().cos()).sum() for gradient in gradients)
        products.append(torch.cat([part.flatten() for part in torch.autograd.grad(inner, network.parameters())]))
    assert torch.allclose(*products, rtol=1e-12) and products[0].norm() > 1


class Composed(nn.Module):
    """JSReLU from torch's own operations."""

    def forward(self, x):
        return torch.where(x > 0, x + x * x / 2, torch.zeros_like(x))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8, 1e-5, 1e-3, 0.1, 1.0, 1e2, 1e4, 1e9, 1e18])
def test_single_precision_loses_nothing_at_any_size(size):
    x = (size * torch.tensor([-1.0, 1.0, 1.234567, 3.7])).requires_grad_()
    jsrelu(x).sum().backward()
    exact = torch.tensor([naive("jsrelu", p) for p in x.tolist()], dtype=torch.float64)
    slope = torch.tensor([naive("jsrelu", p, derivative=True) for p in x.tolist()], dtype=torch.float64)
    ulp = torch.finfo(torch.float32).eps
    assert torch.allclose(jsrelu(x).double(), exact, rtol=ulp, atol=0)
    assert torch.allclose(x.grad.double(), slope, rtol=ulp, atol=0)
    assert torch.equal(jsrelu(x) > 0, x > 0)  # no active entry becomes zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_values_and_gradients_are_the_exact_ones_rounded_once(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[every.isfinite() & (every.abs() < (1e18 if dtype == torch.bfloat16 else 350))].requires_grad_()
    value = jsrelu(x)
    value.backward(torch.ones_like(x))
    exact = x.detach().double()
    assert torch.equal(value, (exact.relu() + exact.relu().square() / 2).to(dtype))
    assert torch.equal(x.grad, torch.where(exact > 0, exact + 1, 0).to(dtype))
    assert torch.equal(derivative(JSReLU(), x), x.grad)


def test_large_negative_infinite_and_undefined_inputs():
    x = torch.tensor([-1e38, -math.inf, math.inf, math.nan, 3e19]).requires_grad_()
    value = jsrelu(x)
    value.backward(torch.ones_like(x))
    assert torch.equal(value[:3].detach(), torch.tensor([0.0, 0.0, math.inf])) and value[3].isnan()
    assert torch.equal(x.grad[:2], torch.zeros(2))
    assert value[4].isinf() and x.grad[4] == 3e19  # σ overflows before σ' does


def test_autocast_keeps_the_dtype_that_comes_in():
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = layer(torch.randn(3, 4))
        result = jsrelu(hidden)
    result.float().sum().backward()
    assert result.dtype == hidden.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert torch.equal(result, jsrelu(hidden)) and layer.weight.grad.any()


def test_compiles_without_a_graph_break_and_gives_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(JSReLU()), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8).requires_grad_()
    upstream = torch.randn(4, 8)
    (fast,) = torch.autograd.grad(compiled(x), x, upstream)
    (slow,) = torch.autograd.grad(jsrelu(x), x, upstream)
    assert torch.equal(compiled(x), jsrelu(x)) and torch.allclose(fast, slow, rtol=1e-6, atol=0)


# derivative() of other modules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "quick_gelu", "silu", "relu", "relu2", "relu6", "mish", "tanh"])
def test_derivative_of_the_activations_of_transformers(name):
    activation, x = ACT2FN[name], grid().requires_grad_()
    found = derivative(activation, x)
    step = 1e-6
    numerical = (activation(x + step) - activation(x - step)) / (2 * step)
    assert torch.allclose(found, numerical, atol=1e-6) and not found.requires_grad and x.grad is None


def test_derivative_without_a_graph_and_on_inference_tensors():
    x = torch.linspace(-2, 2, 9)
    for activation in (nn.GELU(), nn.ReLU(), JSReLU(), half_mixed(nn.GELU())):
        expected = derivative(activation, x)
        with torch.no_grad():
            assert torch.equal(derivative(activation, x), expected)
        with torch.inference_mode():
            assert torch.equal(derivative(activation, x * 1), expected)


def test_derivative_leaves_its_input_alone_and_runs_no_hooks():
    for activation in (nn.SiLU(inplace=True), nn.ReLU(inplace=True), nn.PReLU()):
        calls = []
        activation.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = torch.tensor([-1.0, 2.0])
        derivative(activation, x)
        assert torch.equal(x, torch.tensor([-1.0, 2.0])) and calls == [] and not x.requires_grad
        assert all(parameter.grad is None for parameter in activation.parameters())


def test_a_derivative_method_of_ones_own_is_used():
    class Sign(nn.Module):
        def forward(self, x):
            return x.detach().sign()

        def derivative(self, x):
            return torch.zeros_like(x)

    assert torch.equal(derivative(Sign(), torch.ones(2)), torch.zeros(2))


class Stair(nn.Module):
    def forward(self, x):
        return x.detach().floor()


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    "activation, message",
    [
        (nn.GLU(), r"no derivative: GLU maps shape \(3, 4\) to shape \(3, 2\); give GLU a method `derivative\(x\)`"),
        (Stair(), r"no derivative: Stair cannot be differentiated; give Stair a method"),
        (Pair(), r"no derivative: Pair maps shape \(3, 4\) to tuple"),
        (Shifted(nn.GLU(), 1.0, 0.0), r"no derivative: GLU"),
    ],
    ids=["shape", "not differentiable", "tuple", "inside"],
)
def test_modules_without_a_derivative_are_named(activation, message):
    with pytest.raises(ValueError, match=message):
        derivative(activation, torch.ones(3, 4))


# Mixtures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_begins_as_the_first_and_ends_as_the_second(dtype):
    x = torch.randn(50, dtype=dtype)
    for first, second in ((nn.ReLU(), JSReLU()), (nn.GELU(), SquaredReLU())):
        mixture = Mixture(first, second)
        assert torch.equal(mixture(x), first(x)) and torch.equal(mixture.derivative(x), derivative(first, x))
        mixture.set_mixing(1.0)
        assert torch.equal(mixture(x), second(x)) and torch.equal(mixture.derivative(x), derivative(second, x))


@pytest.mark.parametrize("k", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_in_between_it_is_the_weighted_sum(k):
    mixture, x = half_mixed(k=k), grid()
    expected = [(1 - k) * naive("relu", p) + k * naive("jsrelu", p) for p in x.tolist()]
    slopes = [(1 - k) * naive("relu", p, True) + k * naive("jsrelu", p, True) for p in x.tolist()]
    assert torch.allclose(mixture(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-6)  # k is single precision
    assert torch.allclose(mixture.derivative(x), torch.tensor(slopes, dtype=torch.float64), rtol=1e-6)


def test_the_share_is_saved_and_loaded():
    source, target = half_mixed(k=0.75), Mixture(nn.ReLU(), JSReLU())
    assert list(source.state_dict()) == ["mixing"] and source.mixing.dtype == torch.float32
    target.load_state_dict(source.state_dict())
    assert target.mixing == 0.75
    source.set_mixing(0.0)
    assert target.mixing == 0.75  # a copy


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_without_the_share_loads_strictly_and_leaves_it(assign):
    vanilla = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    mixed = nn.Sequential(nn.Linear(3, 3), half_mixed(k=0.25), nn.Linear(3, 3))
    checkpoint = vanilla.state_dict()
    names = list(checkpoint)
    mixed.load_state_dict(checkpoint, strict=True, assign=assign)
    assert list(checkpoint) == names and mixed[1].mixing == 0.25
    assert torch.equal(mixed[0].weight, vanilla[0].weight)
    mixed[1].load_state_dict({}, strict=True)
    assert mixed[1].mixing == 0.25
    with pytest.raises(RuntimeError, match="Missing key"):
        mixed.load_state_dict({name: checkpoint[name] for name in names[1:]})


def test_compiled_code_sees_a_new_share_without_compiling_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    mixture, x = half_mixed(k=0.0), torch.tensor([-1.0, 1.0, 2.0])
    compiled = torch.compile(mixture, fullgraph=True, backend=counter)
    for k in (0.0, 0.5, 1.0):
        mixture.set_mixing(k)
        assert torch.equal(compiled(x), (1 - k) * torch.relu(x) + k * jsrelu(x))
    assert counter.frame_count == 1


def test_setting_the_share_keeps_the_buffer():
    mixture = Mixture(nn.ReLU(), JSReLU()).double()
    buffer = mixture.mixing
    mixture.set_mixing(0.3)
    assert mixture.mixing is buffer and buffer.item() == 0.3 and buffer.dtype == torch.float64


@pytest.mark.parametrize("k", [-0.1, 1.1, math.nan, math.inf])
def test_shares_outside_the_unit_interval_are_refused(k):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got"):
        Mixture(nn.ReLU(), JSReLU()).set_mixing(k)


# Names and copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles_do_the_same(name):
    activation, x = ALL[name], grid(torch.float32)
    for copied in (copy.deepcopy(activation), pickle.loads(pickle.dumps(activation))):
        assert repr(copied) == repr(activation)
        assert torch.equal(copied(x), activation(x))
        assert torch.equal(derivative(copied, x), derivative(activation, x))


def test_a_copied_mixture_has_a_share_of_its_own():
    original = half_mixed(k=0.5)
    copied = copy.deepcopy(original)
    copied.set_mixing(1.0)
    assert original.mixing == 0.5


def test_names_make_new_modules_and_only_mixtures_have_state():
    for name in ACTIVATIONS:
        assert make(name) is not make(name)
        assert make(name).state_dict() == {} and not list(make(name).parameters())
    assert isinstance(make("relu"), nn.ReLU) and isinstance(make("jsrelu"), JSReLU)
    assert isinstance(make("squared_relu"), SquaredReLU) and isinstance(make("s_jsrelu"), SShaped)


def test_unknown_names_are_answered_with_the_known_ones():
    message = "unknown activation 'jrelu', expected one of relu, jsrelu, squared_relu, s_jsrelu, s_squared_relu"
    with pytest.raises(ValueError, match=message):
        make("jrelu")
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        s_shaped("gelu")


@pytest.mark.parametrize("name, dx, dy", SECTION_V)
def test_a_shift_behind_a_name_gives_the_activation_of_section_v(name, dx, dy):
    assert (
        repr(make(f"s_{name}({dx},{dy})"))
        == repr(s_shaped(name, dx, dy))
        == repr(make(shifted_name(f"s_{name}", dx, dy)))
    )
    assert make("relu(2,1)")(torch.tensor([0.0, 5.0])).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("name", ["s_jsrelu", "s_squared_relu"])
def test_a_shifted_flat_part_is_where_the_derivative_is_zero_and_holds_no_zero(name):
    torch.manual_seed(0)
    x = torch.randn(10_000)
    a = make(shifted_name(name, 1.6, -1.6))
    at_value, flat = a(x) == -1.6, derivative(a, x) == 0
    assert at_value[flat].all() and 0.3 < flat.float().mean() < 0.6
    assert (at_value & ~flat).float().mean() < 1e-3  # rounding: (p − edge)² can be too small to move 1.6
    assert (a(x).abs() > 1e-6).float().mean() > 0.999


def test_half_of_the_shifts_of_section_v_mirror_the_other_half():
    x = grid()
    for name in ("s_jsrelu", "s_squared_relu"):
        for dy in (1.6, -1.6):
            mirrored = make(shifted_name(name, -1.6, -dy))
            assert torch.allclose(make(shifted_name(name, 1.6, dy))(x), -mirrored(-x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["jrelu(1,2)", "relu(1)", "relu(1,2", "relu()", "(1,2)"])
def test_names_that_are_no_shift_of_a_known_one_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown activation '.*', expected one of relu, .* shifted: NAME\(dx,dy\)"):
        make(name)


@pytest.mark.parametrize("shift", ["(1,x)", "(nan,1)", "(inf,0)"])
def test_shifts_are_two_finite_numbers(shift):
    with pytest.raises(ValueError, match=r"activation 'relu\(.*': a shift is two finite numbers \(dx,dy\), got"):
        make(f"relu{shift}")


def test_a_new_name_is_known_at_once(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "shifted", lambda: s_shaped("jsrelu", dx=1.6, dy=-1.6))
    assert repr(make("shifted")) == repr(s_shaped("jsrelu", 1.6, -1.6)) and "dx=1.6, dy=-1.6" in repr(make("shifted"))
