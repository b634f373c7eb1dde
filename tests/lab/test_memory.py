"""Peak memory is what a call allocates at once, whatever was freed before and whatever is alive already."""

import pytest
import torch
from torch import nn

from common.lab.memory import peak_allocated_mib, state_mib

CPU = torch.device("cpu")
MIB = 2**18  # float32 numbers


def test_peak_counts_what_is_alive_at_once():
    alive = torch.ones(8 * MIB)
    torch.ones(64 * MIB).sum()  # freed before the call: no part of its peak
    assert peak_allocated_mib(lambda: alive.cumsum(0)[-1:].clone(), CPU) == pytest.approx(8, abs=0.01)
    assert peak_allocated_mib(lambda: [torch.ones(2 * MIB), torch.ones(3 * MIB)], CPU) == pytest.approx(5, abs=0.01)

    def in_turn():
        torch.ones(2 * MIB)
        torch.ones(3 * MIB)

    assert peak_allocated_mib(in_turn, CPU) == pytest.approx(3, abs=0.01)


def test_a_call_without_tensors_needs_nothing():
    assert peak_allocated_mib(lambda: None, CPU) == 0


def test_backward_passes_and_optimizers_count():
    layer, x = nn.Linear(512, 512, bias=False), torch.ones(2, 512)  # a weight of 1 MiB
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)

    def step():
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert peak_allocated_mib(step, CPU) == pytest.approx(3, abs=0.05)  # gradient and two moments, which then stay
    assert peak_allocated_mib(step, CPU) == pytest.approx(1, abs=0.05)  # the gradient
    assert state_mib(optimizer) == pytest.approx(3, abs=0.01)  # weight and two moments
