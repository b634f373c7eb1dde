"""The backward pass by sparse products gives autograd's gradients."""

import pytest
import torch
from torch import nn

from sparsity.activations import JSReLU
from sparsity.studies.sparse_backward import Pattern, SparseBackwardMLP


@pytest.mark.parametrize("bias", [-100.0, -1.0, 0.0, 100.0])
@pytest.mark.parametrize("activation", [nn.ReLU(), JSReLU()])
def test_gradients_are_those_of_autograd(activation, bias):
    torch.manual_seed(0)
    key, value = nn.Linear(7, 20).double(), nn.Linear(20, 5).double()
    nn.init.constant_(key.bias, bias / 10)
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    parameters = [x, *key.parameters(), *value.parameters()]
    weights = torch.randn(2, 6, 5, dtype=torch.float64)
    dense, sparse = value(activation(key(x))), SparseBackwardMLP(key, activation, value)(x)
    assert torch.equal(dense, sparse)
    expected = torch.autograd.grad((dense * weights).sum(), parameters)
    found = torch.autograd.grad((sparse * weights).sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_one_pattern_for_a_matrix_and_its_transpose():
    matrix = torch.randn(9, 4).relu()
    matrix[:, 2] = 0
    matrix[3] = 0
    pattern, left, right = Pattern(matrix), torch.randn(4, 3), torch.randn(9, 3)
    values = pattern.values(matrix)
    assert len(values) == (matrix != 0).sum()
    assert torch.allclose(pattern.times(values, left), matrix @ left)
    assert torch.allclose(pattern.transposed_times(values, right), matrix.T @ right)
    assert torch.allclose(pattern.column_sums(values), matrix.sum(0))


def test_what_it_does_not_compute_is_refused():
    with pytest.raises(ValueError, match="needs ReLU or JSReLU"):
        SparseBackwardMLP(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="with biases"):
        SparseBackwardMLP(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
