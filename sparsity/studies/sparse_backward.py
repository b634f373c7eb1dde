"""A backward pass that uses derivative sparsity: an MLP whose gradients are products with sparse matrices.

For tokens x, z = V σ(K x + b) + c, and with g = Vᵀ ∂L/∂z, η = g ⊙ σ'(p),

    ∂L/∂x = η K        ∂L/∂K = ηᵀ x        ∂L/∂V = (∂L/∂z)ᵀ σ(p)

Under ReLU and its relatives σ and σ' vanish together, so that one pattern serves all three: rows of ∂L/∂K and columns
of the product for ∂L/∂x can be pruned (arXiv 2605.25612). The pattern of the transposed matrices is that of the others,
sorted by unit. g itself is computed densely: sampling it at the pattern takes longer on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.activations import JSReLU, derivative

EXACT = (nn.ReLU, JSReLU)  # σ(p) = 0 exactly where σ'(p) = 0


class Pattern:
    """Where a matrix (tokens, units) has entries that are not zero, by tokens and by units.

    Args:
        matrix: (T, d_ff), contiguous.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.shape = matrix.shape
        units = matrix.shape[1]
        self.flat = matrix.view(-1).nonzero()[:, 0]  # (count,), token · d_ff + unit
        token = torch.div(self.flat, units, rounding_mode="floor")
        unit = self.flat - token * units
        _, self.order = unit.to(torch.int32).sort(stable=True)  # from the order of tokens to that of units
        self._by_token = _starts(token, self.shape[0]), unit
        self._by_unit = _starts(unit, units), token[self.order]

    def values(self, matrix: Tensor) -> Tensor:
        """Return the entries of a contiguous matrix (T, d_ff) at the pattern, (count,)."""
        return matrix.view(-1)[self.flat]

    def times(self, values: Tensor, right: Tensor) -> Tensor:
        """Return S @ right (T, n) for right (d_ff, n), S being these values at the pattern."""
        return _csr(*self._by_token, values, self.shape) @ right

    def transposed_times(self, values: Tensor, right: Tensor) -> Tensor:
        """Return Sᵀ @ right (d_ff, n) for right (T, n)."""
        return _csr(*self._by_unit, values[self.order], self.shape[::-1]) @ right

    def column_sums(self, values: Tensor) -> Tensor:
        """Return Σ_t S_tj, (d_ff,)."""
        return values.new_zeros(self.shape[1]).index_add_(0, self._by_token[1], values)


def _starts(rows: Tensor, count: int) -> Tensor:
    """Return where each of `count` rows starts among entries that are in the order of their `rows`, (count + 1,)."""
    return F.pad(torch.bincount(rows, minlength=count).cumsum(0), (1, 0))


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    with torch.sparse.check_sparse_tensor_invariants(False):
        return torch.sparse_csr_tensor(starts, columns, values, tuple(shape))


class _SparseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, key, key_bias, value, value_bias, activation):
        pre_activation = F.linear(x, key, key_bias)
        units = activation(pre_activation)
        ctx.save_for_backward(x, key, value, pre_activation, units)
        ctx.activation = activation
        return F.linear(units, value, value_bias)

    @staticmethod
    def backward(ctx, gradient):
        x, key, value, pre_activation, units = ctx.saved_tensors
        gradient = gradient.contiguous()
        pattern = Pattern(units)
        effective = pattern.values(gradient @ value) * derivative(ctx.activation, pattern.values(pre_activation))
        return (
            pattern.times(effective, key),
            pattern.transposed_times(effective, x),
            pattern.column_sums(effective),
            pattern.transposed_times(pattern.values(units), gradient).t(),
            gradient.sum(0),
            None,
        )


class SparseBackwardMLP(nn.Module):
    """An MLP with the parts of another one, and a backward pass by sparse products.

    Args:
        key, activation, value: linear, ReLU or JSReLU, linear; both linears have biases.

    Raises:
        ValueError: the activation may be zero where its derivative is not, or a bias is missing.
    """

    def __init__(self, key: nn.Linear, activation: nn.Module, value: nn.Linear) -> None:
        super().__init__()
        if not isinstance(activation, EXACT):
            raise ValueError(f"the backward pass by sparse products needs ReLU or JSReLU, got {activation}")
        if key.bias is None or value.bias is None:
            raise ValueError("the backward pass by sparse products needs linears with biases")
        self.key, self.activation, self.value = key, activation, value

    def forward(self, tokens: Tensor) -> Tensor:
        """Return V σ(K x + b) + c for tokens (…, d)."""
        x = tokens.reshape(-1, tokens.shape[-1])
        parameters = (self.key.weight, self.key.bias, self.value.weight, self.value.bias)
        return _SparseBackward.apply(x, *parameters, self.activation).reshape(*tokens.shape[:-1], -1)
