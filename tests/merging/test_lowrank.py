"""Low-rank merging in factored form against the dense mergers and the dense SVC, and what it must never do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from merging import MERGERS, calibrate, iso_basis, merger
from merging.lowrank import (
    LowRank,
    extract,
    fold,
    joint_basis,
    merge_low_rank,
    numerical_rank_of,
    truncate,
)

FACTORED = [name for name, own in MERGERS.items() if own.factored]
SHAPES = [(17, 23), (40, 13), (31, 31)]


def random_updates(ranks, shape=(17, 23), seed=0, dtype=torch.float64, layout="matrix"):
    generator = torch.Generator().manual_seed(seed)

    def factor(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return [
        LowRank(factor(shape[0], rank), factor(rank, shape[1]), scale=0.5 + index, layout=layout)
        for index, rank in enumerate(ranks)
    ]


def dense_tasks(updates):
    return [{"weight": update.scale * (update.b.double() @ update.a.double())} for update in updates]


def dense_path(updates, method, svc=None, **options):
    """The reference: the library's dense mergers and calibration on m × n matrices."""
    tasks = dense_tasks(updates)
    merged = merger(method)(tasks, **options)
    if svc is None:
        return merged["weight"]
    bases = iso_basis(tasks, method) if merger(method).basis else None
    return calibrate(merged, tasks, bases=bases, **svc)["weight"]


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


# Equal to the dense path ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("ranks", [(3, 3), (1, 4, 2), (2, 0, 5, 1, 1), (2, 3, 1, 1, 2, 4, 3, 2)], ids=str)
def test_every_merger_equals_its_dense_form(method, ranks):
    for seed, shape in enumerate(SHAPES):
        updates = random_updates(ranks, shape, seed)
        merged = merge_low_rank(updates, method)
        assert merged.shape == shape
        assert merged.rank <= sum(ranks)
        assert error(merged.dense(), dense_path(updates, method)) < 1e-8


@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize(
    "svc", [{}, {"alpha": 1.0}, {"target": 1}, {"rule": "legacy", "alpha": 0.2}, {"space": "input"}], ids=str
)
def test_svc_equals_its_dense_form(method, svc):
    for seed, (shape, ranks) in enumerate(zip(SHAPES, [(3, 3), (1, 4, 2), (2, 3, 1, 1, 2, 4, 3, 2)], strict=True)):
        updates = random_updates(ranks, shape, seed)
        if merger(method).basis and "space" in svc:
            with pytest.raises(ValueError, match="output space only"):
                merge_low_rank(updates, method, svc)
            continue
        assert error(merge_low_rank(updates, method, svc).dense(), dense_path(updates, method, svc)) < 1e-5


@pytest.mark.parametrize("method", FACTORED)
def test_float32_factors_equal_the_float64_dense_path(method):
    updates = random_updates((4, 4, 4, 4), (64, 48), dtype=torch.float32)
    merged = merge_low_rank(updates, method, {})
    assert merged.b.dtype == torch.float32
    assert error(merged.dense(), dense_path(updates, method, {})) < 1e-5


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "iso_c"])
def test_repeated_and_zero_updates_follow_the_rank_rule(method):
    one, other = random_updates((3, 2))
    nothing = LowRank(torch.zeros_like(one.b), one.a)
    updates = [one, one, nothing, other]
    assert error(merge_low_rank(updates, method, {}).dense(), dense_path(updates, method, {})) < 1e-5


@pytest.mark.parametrize("dtype, rank", [(torch.float32, 2), (torch.float64, 3)])
def test_the_rank_rule_follows_the_dtype_of_the_factors(dtype, rank):
    (update,) = random_updates((3,), dtype=dtype)
    left, right = torch.linalg.qr(update.b).Q, torch.linalg.qr(update.a.T).Q.T
    weak = LowRank(left * torch.tensor([1, 0.5, 1e-8], dtype=dtype), right)
    assert numerical_rank_of(merge_low_rank([weak], "iso_c")) == rank


def test_tsv_counts_triplets_by_the_side_of_the_matrix_not_of_the_core():
    updates = random_updates((6, 1, 1), (24, 30))  # the core is 8 × 8: ⌊8/3⌋ = 2 triplets would cut the first task
    assert error(merge_low_rank(updates, "tsv_m").dense(), dense_path(updates, "tsv_m")) < 1e-8
    cores = [{"weight": core} for core in joint_basis(updates).cores]
    cut = torch.linalg.matrix_rank(MERGERS["tsv_m"](cores)["weight"])
    assert int(cut) < numerical_rank_of(merge_low_rank(updates, "tsv_m")) == 8


def test_options_of_the_merger_and_names_reach_it():
    updates = random_updates((2, 3))
    scaled = merge_low_rank(updates, "task_arithmetic", scale=0.7)
    assert error(scaled.dense(), dense_path(updates, "task_arithmetic", scale=0.7)) < 1e-12
    embedding = merge_low_rank(updates, "tsv_m", {}, name="embedding.weight")  # the mean, and not calibrated
    assert error(embedding.dense(), dense_path(updates, "weight_average")) < 1e-12


@pytest.mark.parametrize("space", ["output", "input"])
def test_the_output_space_is_that_of_the_layer_also_where_weights_are_stored_in_by_out(space):
    updates = random_updates((3, 2, 4), layout="transposed")
    turned = [LowRank(update.a.T, update.b.T, update.scale) for update in updates]
    found = merge_low_rank(updates, "plain_sum", {"space": space})
    assert found.layout == "transposed" and found.shape == (17, 23)
    assert error(found.dense(), dense_path(turned, "plain_sum", {"space": space}).T) < 1e-8
    assert error(found.dense(), dense_path(updates, "plain_sum", {"space": space})) > 1e-3


def test_nothing_of_the_size_of_the_weight_is_formed():
    side, updates = 20_000, random_updates((2, 3, 1), (20_000, 20_000), dtype=torch.float32)

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                self.largest = max(self.largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    with Watch() as watch:
        merged = merge_low_rank(updates, "plain_sum", {})
        truncate(merged, 2)
    assert 6 * side <= watch.largest <= 8 * side


def test_inputs_are_left_unchanged():
    updates = random_updates((2, 3))
    before = [(update.b.clone(), update.a.clone()) for update in updates]
    merge_low_rank(updates, "iso_cts", {})
    for update, (b, a) in zip(updates, before, strict=True):
        assert torch.equal(update.b, b) and torch.equal(update.a, a)


# Ranks and folding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_that_of_the_svd_and_reports_the_energy_lost(shape):
    merged = merge_low_rank(random_updates((3, 2, 4), shape), "plain_sum")
    left, singular, right = torch.linalg.svd(merged.dense(), full_matrices=False)
    for rank in (1, 4, 9):
        truncated, lost = truncate(merged, rank)
        assert truncated.rank == rank and truncated.scale == 1
        assert error(truncated.dense(), (left[:, :rank] * singular[:rank]) @ right[:rank]) < 1e-7
        assert lost == pytest.approx(float(singular[rank:].square().sum() / singular.square().sum()), abs=1e-12)
    assert lost < 1e-14  # of rank 9 there is nothing beyond rank 9


def test_a_rank_above_the_own_one_is_filled_with_zeros():
    (update,) = random_updates((2,))
    truncated, lost = truncate(update, 6)
    assert truncated.rank == 6 and lost < 1e-14 and not truncated.b[:, 2:].any()
    assert error(truncated.dense(), update.dense()) < 1e-7
    nothing, lost = truncate(LowRank(torch.zeros(5, 0), torch.zeros(0, 4)), 3)
    assert nothing.rank == 3 and lost == 0 and not nothing.dense().any()


def test_a_full_update_is_extracted_at_the_best_rank():
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    singular = torch.linalg.svdvals(delta)
    extracted, lost = extract(delta, 4)
    assert lost == pytest.approx(float(singular[4:].square().sum() / singular.square().sum()))
    assert float((delta - extracted.dense()).square().sum() / delta.square().sum()) == pytest.approx(lost)
    assert extract(delta, 9)[1] == pytest.approx(0, abs=1e-14)


def test_fold_adds_the_update_in_the_dtype_of_the_weight():
    (update,) = random_updates((2,), (6, 4), dtype=torch.float32)
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    folded = fold(update, weight)
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, (weight.float() + update.scale * update.b @ update.a).bfloat16())


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in MERGERS if name not in FACTORED])
def test_all_mergers_are_either_factored_or_refused_with_a_way_out(method):
    assert {"ties", "dare"} & set(FACTORED) == set()
    reason = "looks at single entries" if MERGERS[method].by_entry else "has no factored form"
    with pytest.raises(ValueError, match=f"{method} {reason}.*folded weights"):
        merge_low_rank(random_updates((1, 2)), method)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda one, other: merge_low_rank([], "iso_c"), "at least one"),
        (lambda one, other: merge_low_rank([one, other], "iso_c", name="q.weight"), "'q.weight': shape .17, 23"),
        (lambda one, other: merge_low_rank([one], "isoc"), "did you mean 'iso_c'"),
        (lambda one, other: merge_low_rank([one], "iso_c", {"split_qkv": True}), "unknown option of SVC 'split_qkv'"),
        (lambda one, other: truncate(one, 0), "rank must be at least 1, got 0"),
        (lambda one, other: extract(torch.zeros(3), 1), "only a matrix"),
        (lambda one, other: fold(one, torch.zeros(23, 17), "w"), "'w': .*fan_in_fan_out"),
        (lambda one, other: LowRank(torch.zeros(3, 2), torch.zeros(3, 2)), "no product"),
        (lambda one, other: LowRank(one.b, one.a, layout="conv"), "unknown layout"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    one, other = random_updates((2,)) + random_updates((2,), (23, 17))
    with pytest.raises(ValueError, match=message) as caught:
        call(one, other)
    assert "\n" not in str(caught.value)
