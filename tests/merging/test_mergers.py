"""Every merger against a naive float64 reference that uses nothing of the library, and the properties they share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import MERGERS, dare, iso_basis, iso_c, iso_cts, merger, star, task_arithmetic, ties, tsv_m
from merging.mergers import Merger, iso_cts_counts

SPECTRAL = ("tsv_m", "iso_c", "iso_cts", "star")


def make_tasks(tasks=3, shape=(12, 9), rank=None, seed=0, dtype=torch.float32, shared=1.0):
    """Task vectors with shared directions, and one tensor of every kind that a method could treat differently."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape

    def matrix(rows, columns):
        width = min(rows, columns) if rank is None else min(rank, rows, columns)
        left = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        return left @ torch.randn(width, columns, generator=generator, dtype=torch.float64)

    def one(rows, columns, common):
        return (shared * common + matrix(rows, columns)).to(dtype)

    kinds = {
        "mlp.weight": (m, n),
        "text_projection": (n, m),
        "token_embedding.weight": (5, n),
        "positional_embedding": (4, n),
        "bias": (1, m),
        "conv.weight": (m, 12),
    }
    commons = {name: matrix(*size) if rank is None else torch.zeros(size) for name, size in kinds.items()}
    vectors = []
    for _ in range(tasks):
        vector = {name: one(*kinds[name], commons[name]) for name in kinds}
        vector["bias"] = vector["bias"].flatten()
        vector["conv.weight"] = vector["conv.weight"].reshape(m, 3, 2, 2)
        vector["scale"] = torch.randn((), generator=generator).to(dtype)
        vector["steps"] = torch.tensor([3])
        vectors.append(vector)
    return vectors


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-12))


# The references: float64 loops after the published algorithms ---------------------------------------------------------


def mean_of(updates):
    return torch.stack(updates).mean(0)


def polar_of(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def sum_of(updates):
    return torch.stack(updates).sum(0)


def ties_of(updates, thresholds=None, majority=None, combine="mean"):
    shape, rows = updates[0].shape, []
    for i, update in enumerate(updates):
        flat = update.flatten()
        d = len(flat)
        threshold = sorted(flat.abs().tolist())[max(d - int(0.2 * d), 1) - 1] if thresholds is None else thresholds[i]
        rows.append([x if abs(x) >= threshold else 0.0 for x in flat.tolist()])
    signs = [math.copysign(1, total) if (total := sum(column)) else 0 for column in zip(*rows, strict=True)]
    majority = sum(signs) if majority is None else majority
    result = []
    for sign, column in zip(signs, zip(*rows, strict=True), strict=True):
        wanted = sign or (math.copysign(1, majority) if majority else 0)
        kept = [x for x in column if (x > 0 if wanted > 0 else x < 0)]
        result.append(sum(kept) / (max(1, len(kept)) if combine == "mean" else 1))
    return torch.tensor(result, dtype=torch.float64).reshape(shape)


def tsv_of(updates):
    r = min(updates[0].shape)
    q = int(r / len(updates))
    left = torch.zeros(len(updates[0]), r, dtype=torch.float64)
    right = torch.zeros(r, updates[0].shape[1], dtype=torch.float64)
    singular = torch.zeros(r, dtype=torch.float64)
    for i, update in enumerate(updates):
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        left[:, i * q : (i + 1) * q], singular[i * q : (i + 1) * q], right[i * q : (i + 1) * q] = u[:, :q], s[:q], v[:q]
    return polar_of(left) @ singular.diag() @ polar_of(right)


def iso_c_of(updates):
    u, s, v = torch.linalg.svd(sum_of(updates), full_matrices=False)
    return s.mean() * u @ v


def iso_cts_of(updates):
    r, count = min(updates[0].shape), len(updates)
    q = round((r - int(0.8 * r)) / count)
    c = r - q * count
    u, s, v = torch.linalg.svd(sum_of(updates), full_matrices=False)
    lefts, singulars, rights = [], [], []
    for update in updates:
        ui, si, vi = torch.linalg.svd(update - u[:, :c] @ u[:, :c].T @ update, full_matrices=False)
        lefts.append(ui[:, :q])
        singulars.append(si[:q])
        rights.append(vi[:q])
    left = torch.cat([*lefts, u[:, :c]], 1)
    right = torch.cat([*rights, v[:c]])
    return torch.cat([*singulars, s[:c]]).mean() * polar_of(left) @ polar_of(right)


def star_of(updates):
    results = []
    for update in updates:
        u, s, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
        p = next(p for p in range(1, len(s) + 1) if s[:p].sum() / s.sum() >= 0.4)
        results.append((s.sum() / s[:p].sum() * u[:, :p] @ s[:p].diag() @ v[:p]).reshape(update.shape))
    return mean_of(results)


REFERENCES = {
    "weight_average": (mean_of, lambda name, t: True),
    "task_arithmetic": (lambda updates: 0.3 * sum_of(updates), lambda name, t: True),
    "plain_sum": (sum_of, lambda name, t: t.ndim == 2 and "text_projection" not in name and "token_" not in name),
    "ties": (ties_of, lambda name, t: True),
    "tsv_m": (tsv_of, lambda name, t: t.ndim == 2 and "text_projection" not in name and "embedding" not in name),
    "iso_c": (iso_c_of, lambda name, t: t.ndim == 2 and "text_projection" not in name),
    "iso_cts": (iso_cts_of, lambda name, t: t.ndim == 2 and "text_projection" not in name),
    "star": (star_of, lambda name, t: t.ndim >= 2),
}


@pytest.mark.parametrize("tasks, shape", [(1, (12, 9)), (3, (12, 9)), (4, (10, 41)), (8, (32, 32))])
@pytest.mark.parametrize("name", REFERENCES)
def test_merger_agrees_with_its_reference(name, tasks, shape):
    vectors = make_tasks(tasks, shape)
    reference, treated = REFERENCES[name]
    merged = MERGERS[name](vectors)
    assert merged.keys() == vectors[0].keys() - {"steps"}
    for key, tensor in merged.items():
        updates = [vector[key].double() for vector in vectors]
        expected = reference(updates) if treated(key, updates[0]) else mean_of(updates)
        assert tensor.dtype == torch.float32 and tensor.shape == expected.shape
        assert error(tensor, expected) < 1e-4, key


def test_global_ties_is_one_election_over_all_tensors():
    vectors = make_tasks(4)
    keys = [key for key in vectors[0] if key != "steps"]
    flat = [torch.cat([vector[key].double().flatten() for key in keys]) for vector in vectors]
    for combine in ("mean", "sum"):
        merged = ties(vectors, scope="global", combine=combine, scale=0.3)
        together = torch.cat([merged[key].flatten() for key in keys])
        assert error(together, 0.3 * ties_of(flat, combine=combine)) < 1e-6


def test_ties_gives_undecided_entries_to_the_majority():
    first, second = [2.0, -1, 3, 4, 5], [-2.0, 1, 3, 4, -6]
    vectors = [{"w": torch.tensor(first)}, {"w": torch.tensor(second)}]
    positive = ties(vectors, keep=1.0)["w"]  # signs 0 0 + + −: majority +
    assert positive.tolist() == [2, 1, 3, 4, -6]
    negated = ties([{"w": -vector["w"]} for vector in vectors], keep=1.0)["w"]  # majority −
    assert negated.tolist() == [-2, -1, -3, -4, 6]
    draw = ties([{"w": torch.tensor([2.0, 1, -1])}, {"w": torch.tensor([-2.0, 1, -1])}], keep=1.0)["w"]
    assert draw.tolist() == [-2, 1, -1]  # no majority: negative


def test_ties_keeps_one_entry_more_than_the_share():
    merged = ties([{"w": torch.arange(1.0, 11)}])["w"]  # k = 10 − 2 = 8: 8, 9, 10 survive
    assert merged.tolist() == [0] * 7 + [8, 9, 10]


def test_star_keeps_the_smallest_rank_that_reaches_the_share():
    update = {"w": torch.diag(torch.tensor([2.0, 1, 1]))}
    assert torch.allclose(star([update], share=0.5)["w"], torch.diag(torch.tensor([4.0, 0, 0])))
    assert torch.allclose(star([update], share=0.75)["w"][0, 0], torch.tensor(8 / 3))


@pytest.mark.parametrize(
    "tasks, common, own", [(8, 616, 19), (14, 614, 11), (20, 608, 8), (1, 614, 154), (999, 768, 0)]
)
def test_iso_cts_splits_rank_768_as_published(tasks, common, own):
    assert iso_cts_counts(768, tasks) == (common, own)


# Properties that all mergers share ------------------------------------------------------------------------------------


def double(task_vectors):
    return {
        name: sum(task[name] for task in task_vectors) * 2
        for name in task_vectors[0]
        if task_vectors[0][name].is_floating_point()
    }


@pytest.fixture(params=[*MERGERS, "double"])
def method(request, monkeypatch):
    """Each merger in turn, and one that a user adds: a function and its record in the table."""
    monkeypatch.setitem(MERGERS, "double", Merger(double, "double"))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merger_is_pure_and_keeps_dtype_shape_and_keys(method, dtype):
    vectors = make_tasks(3, dtype=dtype)
    before = [{key: tensor.clone() for key, tensor in vector.items()} for vector in vectors]
    merged, again = merger(method)(vectors), merger(method)(vectors)
    assert merged.keys() == vectors[0].keys() - {"steps"}
    for key, tensor in merged.items():
        assert tensor.dtype == dtype and tensor.shape == vectors[0][key].shape and tensor.isfinite().all()
        assert torch.equal(tensor, again[key])
    for vector, copy in zip(vectors, before, strict=True):
        assert all(torch.equal(vector[key], copy[key]) for key in copy)


def test_merger_ignores_the_order_of_tasks(method):
    vectors = make_tasks(4)
    merged, turned = merger(method)(vectors), merger(method)(vectors[2:] + vectors[:2])
    same = all(error(turned[key], merged[key].double()) < 1e-4 for key in merged)
    assert same == ("seed" not in merger(method).options)


def test_merger_of_zeros_is_zero_and_of_one_low_rank_task_finite(method):
    zeros = [{key: torch.zeros_like(tensor) for key, tensor in vector.items()} for vector in make_tasks(3)]
    assert not any(tensor.any() for tensor in merger(method)(zeros).values())
    merged = merger(method)(make_tasks(1, rank=2))
    assert all(tensor.isfinite().all() for tensor in merged.values())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_mergers_are_well_defined_without_full_rank(name, rank):
    """Round-off fills the null directions of an update; neither float32's nor a perturbation may show in the result."""
    exact, narrow = (make_tasks(3, (24, 18), rank, dtype=dtype) for dtype in (torch.float64, torch.float32))
    noise = 1e-10 * torch.randn(24, 18, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    shaken = [vector | {"mlp.weight": vector["mlp.weight"] + noise} for vector in exact]
    expected = MERGERS[name](exact)["mlp.weight"]
    assert error(MERGERS[name](shaken)["mlp.weight"], expected) < 1e-6
    assert error(MERGERS[name](narrow)["mlp.weight"], expected) < 1e-4


def nearly_flat(noise, side=128, seed=17):
    """Two square float64 updates of full rank: a shared part of rank 3, and noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    draw = dict(generator=generator, dtype=torch.float64)
    shared = torch.randn(side, 3, **draw) @ torch.randn(3, side, **draw)
    return [{"w": shared + noise * torch.randn(side, side, **draw)} for _ in range(2)]


@pytest.mark.parametrize("noise", [0.05, 1e-3])  # σ_min/σ_1 of the sum is 3e-7, and 6e-9
@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_full_rank_in_float64_loses_no_direction_to_the_rank_rule(name, noise):
    vectors = nearly_flat(noise)
    expected = REFERENCES[name][0]([vector["w"] for vector in vectors])
    assert error(MERGERS[name](vectors)["w"], expected) < 1e-9
    if MERGERS[name].basis:
        basis, merged = iso_basis(vectors, name)["w"], MERGERS[name](vectors)["w"]
        assert torch.allclose(basis.T @ basis, torch.eye(128, dtype=torch.float64), atol=1e-9)
        assert error(basis @ (basis.T @ merged), merged) < 1e-9


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_the_rank_rule_follows_the_precision_that_float64_updates_were_computed_from(name):
    """Rank 3 in float64; in float32, also if it is held in float64, rounding fills the other directions."""
    exact = make_tasks(3, (24, 18), rank=1, dtype=torch.float64)
    held = [{key: t.float().to(t.dtype) for key, t in vector.items() if t.is_floating_point()} for vector in exact]
    expected = MERGERS[name](exact)["mlp.weight"]
    assert error(MERGERS[name](held, precision=torch.float32)["mlp.weight"], expected) < 1e-5
    if name != "tsv_m":
        assert error(MERGERS[name](held)["mlp.weight"], expected) > 0.1
    if MERGERS[name].basis:
        bases = [iso_basis(tasks, name, precision=torch.float32)["mlp.weight"][:, :3] for tasks in (exact, held)]
        assert error(bases[1] @ bases[1].T, bases[0] @ bases[0].T) < 1e-5


def test_iso_c_spreads_over_the_numerical_rank():
    vectors = make_tasks(2, rank=2)
    singular = torch.linalg.svdvals(iso_c(vectors)["mlp.weight"].double())
    expected = torch.linalg.svdvals(sum(vector["mlp.weight"].double() for vector in vectors))
    assert torch.allclose(singular[:4], expected.sum() / 4 * torch.ones(4, dtype=torch.float64), rtol=1e-5)
    assert singular[4:].max() < 1e-5 * singular[0]


def test_repeated_tasks_keep_tsv_m_and_iso_finite_and_repeatable():
    vectors = make_tasks(1) * 4
    for method in (tsv_m, iso_c, iso_cts):
        merged = method(vectors)["mlp.weight"]
        exact = method([{"mlp.weight": vectors[0]["mlp.weight"].double()}] * 4)["mlp.weight"]
        assert merged.isfinite().all() and error(merged, exact) < 1e-4


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_iso_basis_is_orthonormal_and_spans_what_was_merged(method, shape):
    for rank in (None, 2):
        vectors = make_tasks(3, shape, rank=rank)
        merged, bases = MERGERS[method](vectors), iso_basis(vectors, method)
        assert bases.keys() == {"mlp.weight", "token_embedding.weight", "positional_embedding"}
        for key, basis in bases.items():
            identity = torch.eye(basis.shape[1])
            assert torch.allclose(basis.T @ basis, identity, atol=1e-5)
            assert error(basis @ (basis.T @ merged[key]), merged[key].double()) < 1e-5
        assert rank or bases["mlp.weight"].shape == (shape[0], 9)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    name=st.sampled_from([*MERGERS]),
    tasks=st.integers(1, 6),
    rank=st.none() | st.integers(0, 3),
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_shape_rank_and_number_of_tasks(name, tasks, rank, shape, seed, dtype):
    vectors = make_tasks(tasks, shape, rank, seed, dtype)
    merged = MERGERS[name](vectors)
    for key, tensor in merged.items():
        assert tensor.isfinite().all() and tensor.dtype == dtype and tensor.shape == vectors[0][key].shape


def test_overridden_predicate_decides_what_is_treated():
    vectors = make_tasks(3)
    assert torch.equal(
        iso_c(vectors, matrices=lambda name, t: False)["mlp.weight"], MERGERS["weight_average"](vectors)["mlp.weight"]
    )
    kernels = iso_c(vectors, matrices=lambda name, t: t.ndim == 4)["conv.weight"]
    assert error(kernels.flatten(1), iso_c_of([vector["conv.weight"].double().flatten(1) for vector in vectors])) < 1e-4
    with pytest.raises(ValueError, match="'bias': `matrices` selects a tensor of shape"):
        iso_c(vectors, matrices=lambda name, t: t.ndim == 1)


# DARE -----------------------------------------------------------------------------------------------------------------


def test_dare_masks_depend_on_seed_task_and_name_only():
    ones = {"a": torch.ones(50, 40), "b": torch.ones(50, 40)}
    alone, together = dare([{"a": ones["a"]}]), dare([ones])
    assert torch.equal(alone["a"], together["a"])
    assert torch.equal(dare([{"b": ones["b"], "a": ones["a"]}])["a"], alone["a"])
    assert torch.equal(dare([{"a": ones["a"].bfloat16()}])["a"] > 0, alone["a"] > 0)
    assert not torch.equal(together["a"], together["b"])
    assert not torch.equal(dare([ones], seed=1)["a"], together["a"])
    first = dare([ones, {key: torch.zeros(50, 40) for key in ones}])["a"]
    second = dare([{key: torch.zeros(50, 40) for key in ones}, ones])["a"]
    assert torch.equal(first, alone["a"] / 2) and not torch.equal(second, first)


def test_dare_drops_the_share_and_keeps_the_mean():
    entries, tasks, drop = 20000, 4, 0.7
    merged = dare([{"w": torch.ones(entries)}] * tasks, drop=drop, seed=5)["w"]
    counts = (merged * tasks * (1 - drop)).round()
    assert torch.allclose(counts / (tasks * (1 - drop)), merged)
    for kept in range(tasks + 1):
        expected = math.comb(tasks, kept) * (1 - drop) ** kept * drop ** (tasks - kept)
        assert abs((counts == kept).double().mean() - expected) < 5 * (expected * (1 - expected) / entries) ** 0.5
    assert torch.equal(dare([{"w": torch.ones(9)}], drop=0)["w"], torch.ones(9))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: ties(v, keep=0), r"keep must be in \(0, 1\], got 0"),
        (lambda v: ties(v, keep=1.5), "keep must be in"),
        (lambda v: ties(v, scope="globl"), "unknown scope 'globl'.*'global'"),
        (lambda v: ties(v, combine="men"), "unknown combine 'men'.*'mean'"),
        (lambda v: ties(v, scale=float("inf")), "scale must be a finite number"),
        (lambda v: task_arithmetic(v, scale=float("nan")), "scale must be a finite number, got nan"),
        (lambda v: dare(v, drop=1.0), r"drop must be in \[0, 1\), got 1.0"),
        (lambda v: dare(v, drop=float("nan")), "drop must be in"),
        (lambda v: star(v, share=0), "share must be in"),
        (lambda v: iso_basis(v, "iso"), "unknown method 'iso'.*'iso_c"),
        (lambda v: merger("tsvm"), "unknown merger 'tsvm'.*did you mean 'tsv_m'"),
    ],
)
def test_options_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_tasks(2))


@pytest.mark.parametrize("name", MERGERS)
def test_every_merger_checks_its_task_vectors(name):
    good = make_tasks(2)
    with pytest.raises(ValueError, match="empty list"):
        MERGERS[name]([])
    with pytest.raises(ValueError, match=r"task vector 1 .*'bias'"):
        MERGERS[name]([good[0], {key: tensor for key, tensor in good[1].items() if key != "bias"}])
    with pytest.raises(ValueError, match="task vector 1, 'bias': 1 entries are NaN or infinite"):
        MERGERS[name]([good[0], good[1] | {"bias": torch.tensor([float("nan")] + [0.0] * 11)}])


def test_table_keys_are_the_names_of_the_functions():
    assert all(own.merge.__name__ == name for name, own in MERGERS.items())
    assert merger("ties").merge is ties
