"""Timing takes turns, and peak memory is what a call adds to its inputs."""

from functools import partial

import torch

from common.benchmark import interleaved_seconds, peak_mib

CPU = torch.device("cpu")
MIB = 2**18  # float32 numbers


def test_contenders_take_turns():
    called = []
    contenders = {name: partial(called.append, name) for name in "ab"}
    found = list(interleaved_seconds(contenders, 3, CPU))
    assert called == ["a", "b"] * 3
    assert [(repeat, name) for repeat, name, _ in found] == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert all(seconds >= 0 for *_, seconds in found)


def test_peak_counts_what_was_freed_again_and_the_result_but_not_the_inputs():
    torch.ones(300 * MIB).sum()  # this process's own peak is not the fresh one's
    peak = peak_mib(lambda: torch.ones(200 * MIB), lambda inputs: torch.ones(100 * MIB).cumsum(0)[-1:].clone(), CPU, 1)
    assert 195 < peak < 260, peak
    kept = peak_mib(lambda: torch.ones(200 * MIB), lambda inputs: torch.ones(64 * MIB), CPU, 1)
    assert 60 < kept < 110, kept


def test_threads_are_those_asked_for():
    def check(inputs):
        assert torch.get_num_threads() == 3

    peak_mib(lambda: None, check, CPU, 3)
