"""Break-even points: from two timed shares to the share where skipping stops to pay."""

import time

import pytest
import torch

from sparsity.break_even import BreakEven


@pytest.mark.parametrize(("dense", "expected"), [(13, 0.5), (2, 0.0), (100, 1.0)])
def test_the_share_where_both_take_as_long(dense, expected, monkeypatch):
    clock = [0.0]

    def taking(seconds):
        def run(tokens, share=0.0):
            clock[0] += seconds(share)
            return tokens

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    steps = taking(lambda share: dense), taking(lambda share: 3 + 20 * share)
    measured = BreakEven(1).shares("values", torch.ones(4, 3), 3, *steps)
    assert measured == {1: pytest.approx(expected)}


def test_measured_once_for_layers_alike():
    calls, break_even = [], BreakEven(2)

    def run(tokens, share=0.0):
        calls.append(tokens.shape)
        return tokens

    first = break_even.shares("values", torch.ones(4, 3), 5, run, run)
    count = len(calls)
    assert set(first) == {1, 2} and set(calls) == {(1, 5), (2, 5)}
    assert break_even.shares("values", torch.zeros(4, 3), 5, run, run) is first and len(calls) == count
    break_even.shares("keys", torch.ones(4, 3), 5, run, run)
    break_even.shares("values", torch.ones(4, 3, dtype=torch.float64), 5, run, run)
    assert len(calls) == 3 * count


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 8])
def test_numbers_between_powers_of_two_have_the_next_ones_share(most):
    seen = []

    def run(tokens, share=0.0):
        seen.append(len(tokens))
        return tokens

    found = BreakEven(most).shares("values", torch.ones(4, 3), 3, run, run)
    measured = sorted(set(seen))
    assert list(found) == list(range(1, most + 1)) and measured == sorted(
        {*(n for n in (1, 2, 4, 8) if n <= most), most}
    )
    assert all(share == found[min(n for n in measured if n >= count)] for count, share in found.items())
