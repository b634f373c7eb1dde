"""SVC: the fast path against the SVD formula in float64 loops, and the identities that the paper's algebra implies.

The reference uses nothing of the library. Iso + SVC is tested in a handed-over basis only: in any other it is no
single matrix.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging import apply, calibrate, diagnose, iso_basis, iso_c, iso_cts, plain_sum, task_arithmetic, ties, tsv_m


def random_updates(tasks=3, shape=(9, 6), rank=None, seed=0, dtype=torch.float64):
    """Matrices with a common part, so that directions are over-counted."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(shape) if rank is None else min(rank, *shape)

    def matrix():
        left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
        return left @ torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)

    common = matrix()
    return [((common if rank == min(shape) else 0) + matrix()).to(dtype) for _ in range(tasks)]


def as_tasks(updates, name="w"):
    return [{name: update} for update in updates]


def reference(merged, updates, alpha=None, rule="current", target=None, basis=None):
    """The published formula, one direction and one task at a time, in float64."""
    merged, updates = merged.double(), [update.double() for update in updates]
    alpha = 1 / len(updates) if alpha is None else alpha
    if basis is None:
        basis = torch.linalg.svd(merged, full_matrices=False)[0]
    result = torch.zeros_like(merged)
    for u in basis.double().T:
        b = u @ merged
        s = [float(b @ (u @ update)) / max(float((u @ update) @ (u @ update)), 1e-12) for update in updates]
        if target is not None:
            divisor = max(s[target], alpha) if s[target] > 0 else 1
        elif rule == "legacy":
            divisor = max(sum(s) / len(s), alpha) if min(s) > 0 else 1
        else:
            divisor = sum(max(x, alpha) for x in s) / len(s)
        result += torch.outer(u, b) / divisor
    return result


def error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))


# The fast path is the formula -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 1.0},
        {"alpha": 0.05},
        {"rule": "legacy"},
        {"target": 1},
        {"target": 0, "alpha": 0.7},
        {"rule": "legacy", "alpha": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (8, 8), (1, 5), (5, 1), (40, 24)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_calibration_is_the_svd_formula(shape, options, dtype, tolerance):
    updates = random_updates(4, shape, dtype=dtype)
    merged = sum(updates)
    result = calibrate({"w": merged}, as_tasks(updates), **options)["w"]
    assert result.dtype == dtype
    assert error(result, reference(merged, updates, **options)) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_narrow_inputs_are_computed_in_float32(dtype, tolerance):
    updates = random_updates(3, (10, 7), dtype=dtype)
    merged = plain_sum(as_tasks(updates))["w"]
    result = calibrate({"w": merged}, as_tasks(updates))["w"]
    assert result.dtype == dtype and error(result, reference(merged, updates)) < tolerance


@pytest.mark.parametrize("merger", [task_arithmetic, ties, plain_sum])
def test_any_merger_is_calibrated_against_the_original_updates(merger):
    tasks = as_tasks(random_updates(5, (20, 14), dtype=torch.float32))
    merged = merger(tasks)
    assert error(calibrate(merged, tasks)["w"], reference(merged["w"], [task["w"] for task in tasks])) < 1e-4


def test_tsv_m_is_calibrated_within_its_nearly_equal_singular_values():
    updates = random_updates(4, (32, 24), dtype=torch.float32)
    merged = tsv_m(as_tasks(updates))["w"]
    assert error(calibrate({"w": merged}, as_tasks(updates), alpha=1)["w"], reference(merged, updates, 1.0)) < 2e-3


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("name, merger", [("iso_c", iso_c), ("iso_cts", iso_cts)])
def test_iso_is_calibrated_in_the_basis_that_it_hands_over(name, merger, shape):
    tasks = as_tasks(random_updates(3, shape, dtype=torch.float32))
    merged, bases = merger(tasks), iso_basis(tasks, name)
    expected = reference(merged["w"], [task["w"] for task in tasks], basis=bases["w"])
    assert error(calibrate(merged, tasks, bases=bases)["w"], expected) < 1e-4


def test_without_a_handed_over_basis_iso_depends_on_the_basis():
    tasks = as_tasks(random_updates(3, (48, 32), dtype=torch.float32))
    merged = iso_c(tasks)
    own = calibrate(merged, tasks, bases=iso_basis(tasks, "iso_c"))["w"]
    assert error(calibrate(merged, tasks)["w"], own) > 0.05


# What the algebra says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("factor", [0.3, 2.0, 10.0])
def test_a_scale_before_calibration_is_another_alpha(shape, factor):
    updates = random_updates(4, shape)
    merged, tasks = sum(updates), as_tasks(updates)
    for alpha in (0.25, 1.0):
        scaled = calibrate({"w": factor * merged}, tasks, alpha=alpha)["w"]
        assert error(scaled, calibrate({"w": merged}, tasks, alpha=alpha / factor)["w"]) < 1e-9


def test_the_calibrated_mean_is_the_calibrated_sum_at_alpha_one():
    updates = random_updates(5)
    mean = calibrate({"w": sum(updates) / 5}, as_tasks(updates))["w"]
    assert error(mean, calibrate({"w": sum(updates)}, as_tasks(updates), alpha=1.0)["w"]) < 1e-9


def test_tasks_with_orthogonal_row_spaces_keep_their_sum():
    rows = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    updates = [update @ rows[i::3] for i, update in enumerate(random_updates(3, (9, 4)))]
    total = {"w": sum(updates)}
    assert error(calibrate(total, as_tasks(updates), alpha=1.0)["w"], total["w"]) < 1e-9
    gamma = diagnose(total, as_tasks(updates), alpha=1.0)["w"].gamma
    assert torch.allclose(gamma, torch.ones(9, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 7])
@pytest.mark.parametrize("rank", [None, 2])
def test_identical_tasks_summed_are_counted_once(tasks, rank):
    update = random_updates(1, rank=rank, dtype=torch.float32)[0]
    for alpha in (None, 1.0):
        result = calibrate({"w": tasks * update}, as_tasks([update] * tasks), alpha=alpha)["w"]
        assert error(result, update) < 1e-5
    found = diagnose({"w": tasks * update}, as_tasks([update] * tasks))["w"]
    assert torch.allclose(found.gamma[:2], torch.tensor(1 / tasks), rtol=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 0.25, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_private_directions_get_the_gamma_of_exact_zeros(alpha, dtype):
    updates = [torch.zeros(4, 5, dtype=dtype) for _ in range(4)]
    for i, update in enumerate(updates):
        update[i, i] = 2.0 + i
    found = diagnose({"w": sum(updates)}, as_tasks(updates), alpha=alpha)["w"]
    assert torch.allclose(found.gamma, torch.full((4,), 4 / (1 + 3 * alpha), dtype=dtype), rtol=1e-6)
    assert found.singular_values.tolist() == [5, 4, 3, 2] and found.max_coefficient.tolist() == [1] * 4


def test_nearly_private_directions_are_erased():
    updates = [1e-4 * update for update in random_updates(4, (8, 8))]
    updates[0] = updates[0] + 100 * torch.outer(torch.eye(8)[0], torch.eye(8)[0])
    found = diagnose({"w": sum(updates)}, as_tasks(updates))["w"]
    assert found.gamma[0] < 1e-2 and found.max_coefficient[0] > 100


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    tasks=st.integers(1, 6),
    shape=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    seed=st.integers(0, 999),
    space=st.sampled_from(["output", "input"]),
    rule=st.sampled_from(["current", "legacy"]),
)
def test_alpha_one_never_raises_a_singular_value(tasks, shape, seed, space, rule):
    updates = random_updates(tasks, shape, seed=seed)
    merged = {"w": sum(updates)}
    options = {"alpha": 1.0, "space": space, "rule": rule}
    assert diagnose(merged, as_tasks(updates), **options)["w"].gamma.max() <= 1 + 1e-12
    before = torch.linalg.svdvals(merged["w"])
    after = torch.linalg.svdvals(calibrate(merged, as_tasks(updates), **options)["w"])
    assert (after <= before + 1e-9 * before[0]).all()


def test_the_order_of_tasks_does_not_matter():
    updates = random_updates(5, dtype=torch.float32)
    merged = {"w": sum(updates)}
    result = calibrate(merged, as_tasks(updates))["w"]
    assert error(calibrate(merged, as_tasks(updates[::-1]))["w"], result) < 1e-6


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_input_space_is_the_output_space_of_the_transposes(shape):
    updates = random_updates(3, shape)
    turned = as_tasks([update.T for update in updates])
    merged = sum(updates)
    for options in ({}, {"target": 2}, {"rule": "legacy"}):
        result = calibrate({"w": merged}, as_tasks(updates), space="input", **options)["w"]
        assert error(result, calibrate({"w": merged.T}, turned, **options)["w"].T) < 1e-9
        assert error(result, reference(merged.T, [update.T for update in updates], **options).T) < 1e-8
    assert error(result, calibrate({"w": merged}, as_tasks(updates), rule="legacy")["w"]) > 1e-3


# Which tensors, and how -----------------------------------------------------------------------------------------------


def full_tasks(dtype=torch.float32, tasks=3):
    shapes = {
        "mlp.weight": (8, 6),
        "attn.in_proj_weight": (18, 6),
        "visual.proj": (6, 4),
        "text_projection": (6, 6),
        "token_embedding.weight": (9, 6),
        "conv1.weight": (8, 3, 2, 2),
        "norm.bias": (6,),
        "logit_scale": (),
    }
    generator = torch.Generator().manual_seed(0)
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return [
        {name: (common[name] + torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
        | {"steps": torch.tensor(4)}
        for _ in range(tasks)
    ]


def test_authors_default_treats_matrices_and_keeps_all_other_tensors():
    tasks = full_tasks()
    merged = task_arithmetic(tasks)
    before = {name: tensor.clone() for name, tensor in merged.items()}
    result, found = calibrate(merged, tasks), diagnose(merged, tasks)
    calibrated = {"mlp.weight", "attn.in_proj_weight", "visual.proj"}
    assert result.keys() == found.keys() == merged.keys()
    for name, tensor in result.items():
        assert torch.equal(merged[name], before[name])
        assert tensor.shape == merged[name].shape and tensor.data_ptr() != merged[name].data_ptr()
        assert torch.equal(tensor, merged[name]) == (name not in calibrated)
        assert found[name].treatment == ("calibrated" if name in calibrated else "merged value")
    assert found["norm.bias"].singular_values is None
    pretrained = {name: torch.zeros_like(tensor) for name, tensor in tasks[0].items()}
    assert torch.equal(apply(pretrained, result)["mlp.weight"], result["mlp.weight"])


def test_fused_qkv_is_one_matrix_or_three():
    tasks = full_tasks()
    name = "attn.in_proj_weight"
    merged = {name: sum(task[name] for task in tasks)}
    only = [{name: task[name]} for task in tasks]
    whole = calibrate(merged, only)[name]
    assert error(whole, reference(merged[name], [task[name] for task in tasks])) < 1e-4
    split = calibrate(merged, only, split_qkv=True)[name]
    for part in range(3):
        rows = slice(6 * part, 6 * part + 6)
        apart = calibrate({"q": merged[name][rows]}, [{"q": task[name][rows]} for task in tasks])["q"]
        assert error(split[rows], apart) < 1e-6
    assert error(split, whole) > 1e-3
    found = diagnose(merged, only, split_qkv=True)
    assert list(found) == [f"{name}[q]", f"{name}[k]", f"{name}[v]"]
    with pytest.raises(ValueError, match="fused qkv weight of 8 rows cannot be split in three"):
        calibrate({"in_proj_weight": torch.ones(8, 2)}, [{"in_proj_weight": torch.ones(8, 2)}], split_qkv=True)


def test_kernels_are_flattened_when_asked():
    tasks = full_tasks()
    merged = task_arithmetic(tasks)
    result = calibrate(merged, tasks, flatten=True)["conv1.weight"]
    expected = reference(merged["conv1.weight"].flatten(1), [task["conv1.weight"].flatten(1) for task in tasks])
    assert result.shape == (8, 3, 2, 2) and error(result.flatten(1), expected) < 1e-4
    with pytest.raises(ValueError, match=r"'conv1.weight': .* \(8, 3, 2, 2\), which is no matrix \(flatten=True"):
        calibrate(merged, tasks, matrices=lambda name, tensor: tensor.ndim >= 2)


def test_predicate_is_overridable():
    tasks = full_tasks()
    merged = task_arithmetic(tasks)
    result = calibrate(merged, tasks, matrices=lambda name, tensor: name == "token_embedding.weight")
    changed = {name for name in merged if not torch.equal(result[name], merged[name])}
    assert changed == {"token_embedding.weight"}


@pytest.mark.parametrize("options", [{}, {"space": "input", "alpha": 2.0, "target": 0, "rule": "legacy"}])
def test_vectors_follow_their_own_rule(options):
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(7, generator=generator).double() + 1 for _ in range(4)]
    merged = sum(vectors)
    s = [float(merged @ vector / (vector @ vector)) for vector in vectors]
    result = calibrate({"l": merged}, as_tasks(vectors, "l"), vectors=True, **options)["l"]
    assert result.shape == (7,) and error(result, 4 / sum(s) * merged) < 1e-12
    found = diagnose({"l": merged}, as_tasks(vectors, "l"), vectors=True, **options)["l"]
    assert found.treatment == "vector rule" and found.gamma.shape == (1,)
    assert found.coefficients.flatten().tolist() == pytest.approx(s)
    cosine = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0)
    assert found.overlap[0, 1].item() == pytest.approx(float(cosine**2), rel=1e-6)
    opposed = calibrate({"l": -merged}, as_tasks(vectors, "l"), vectors=True)["l"]
    assert torch.equal(opposed, -merged)  # Σ s ≤ 0: γ = 1
    assert torch.equal(calibrate({"l": merged}, as_tasks(vectors, "l"))["l"], merged)


# Edge cases -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    tasks=st.integers(1, 5),
    rank=st.none() | st.integers(0, 3),
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    space=st.sampled_from(["output", "input"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    rule=st.sampled_from(["current", "legacy"]),
    alpha=st.sampled_from([None, 1.0, 0.1, 3.0]),
)
def test_any_shape_rank_dtype_and_number_of_tasks(tasks, rank, seed, shape, space, dtype, rule, alpha):
    vectors = as_tasks(random_updates(tasks, shape, rank, seed, dtype))
    merged = task_arithmetic(vectors, scale=1.0)
    options = {"space": space, "rule": rule, "alpha": alpha}
    result = calibrate(merged, vectors, **options)["w"]
    assert result.shape == shape and result.dtype == dtype and result.isfinite().all()
    found = diagnose(merged, vectors, **options)["w"]
    for field in ("singular_values", "coefficients", "gamma", "energy", "interference", "inflation", "overlap"):
        assert getattr(found, field).isfinite().all(), field
    assert found.rank <= min(shape) and (rank != 0 or found.rank == 0)
    if rank is None and dtype == torch.float64:
        turned = (lambda x: x.T) if space == "input" else (lambda x: x)
        expected = reference(turned(merged["w"]), [turned(vector["w"]) for vector in vectors], alpha, rule)
        assert error(turned(result), expected) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_calibration_of_low_rank_updates_is_well_posed(shape, rank):
    updates = random_updates(3, shape, rank, dtype=torch.float32)
    expected = reference(sum(update.double() for update in updates), updates)
    assert error(calibrate({"w": sum(updates)}, as_tasks(updates))["w"], expected) < 1e-4


def test_zero_updates_and_a_silent_task():
    zeros = [torch.zeros(4, 3)] * 2
    assert not calibrate({"w": zeros[0]}, as_tasks(zeros))["w"].any()
    updates = [*random_updates(2), torch.zeros(9, 6)]
    merged = sum(updates)
    for alpha in (None, 1.0):
        result = calibrate({"w": merged}, as_tasks(updates), alpha=alpha)["w"]
        assert error(result, reference(merged, updates, alpha)) < 1e-8
    assert torch.equal(diagnose({"w": merged}, as_tasks(updates))["w"].coefficients[2], torch.zeros(6).double())


def test_empty_tensors_keep_the_merged_value():
    empty = {"w": torch.ones(0, 3)}
    assert calibrate(empty, [empty])["w"].shape == (0, 3)
    assert diagnose(empty, [empty])["w"].treatment == "merged value"


# Diagnostics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["output", "input"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_diagnosis_is_what_calibration_did(shape, space):
    updates = random_updates(3, shape)
    merged = sum(updates)
    found = diagnose({"w": merged}, as_tasks(updates), space=space, alpha=0.5)["w"]
    if space == "input":
        merged, updates = merged.T, [update.T for update in updates]
    u, sigma, vh = torch.linalg.svd(merged, full_matrices=False)
    assert found.treatment == "calibrated" and found.rank == 6
    assert torch.allclose(found.singular_values, sigma)
    for i, update in enumerate(updates):
        own = u.T @ update
        energy = own.square().sum(1)
        s = (sigma[:, None] * vh * own).sum(1) / energy
        assert torch.allclose(found.energy[i], energy) and torch.allclose(found.coefficients[i], s)
        assert torch.allclose(found.interference[i], (s - 1).square() * energy)
    assert torch.allclose(found.max_coefficient, found.coefficients.max(0).values)
    assert torch.allclose(found.gamma, 3 / found.coefficients.clamp_min(0.5).sum(0))
    spectra = torch.stack([torch.linalg.svdvals(update) for update in updates])
    assert torch.allclose(found.inflation, sigma / spectra.mean(0))
    bases = [torch.linalg.svd(update, full_matrices=False)[0] for update in updates]
    assert torch.allclose(found.overlap[0, 2], (bases[0].T @ bases[2]).square().sum() / 6)
    rebuilt = u * (found.gamma * sigma) @ vh
    result = calibrate({"w": sum(random_updates(3, shape))}, as_tasks(random_updates(3, shape)), space=space, alpha=0.5)
    assert error(result["w"].T if space == "input" else result["w"], rebuilt) < 1e-8


def test_overlap_compares_at_most_eight_directions_and_shows_missing_rank():
    full = diagnose({"w": torch.eye(20)}, [{"w": torch.eye(20)}, {"w": torch.eye(20).flip(0)}])["w"]
    assert full.overlap.shape == (2, 2) and torch.allclose(full.overlap.diag(), torch.ones(2))
    updates = random_updates(2, (20, 10), rank=2)
    found = diagnose({"w": sum(updates)}, as_tasks(updates))["w"]
    assert torch.allclose(found.overlap.diag(), torch.full((2,), 2 / 8, dtype=torch.float64)) and found.rank == 4


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [calibrate, diagnose])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0}, "alpha must be positive and finite, got 0"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
        ({"target": 2}, "target must be the index of a task, 0 to 1, got 2"),
        ({"target": -1}, "target must be the index of a task, 0 to 1, got -1"),
        ({"space": "inptu"}, "unknown space 'inptu'.*did you mean 'input'"),
        ({"rule": "legacey"}, "unknown rule 'legacey'.*did you mean 'legacy'"),
        ({"bases": {"w": torch.ones(9, 6)}}, r"bases\['w'\]: its columns are not orthonormal"),
        ({"bases": {"w": torch.eye(6)}}, r"bases\['w'\]: expected shape \(9, …\), got \(6, 6\)"),
        ({"bases": {"w": torch.eye(9)[:, :2]}}, r"bases\['w'\]: its columns do not span"),
        ({"bases": {"x": torch.eye(9)}}, r"no tensor of this name is calibrated: bases\['x'\]"),
        ({"matrices": lambda name, tensor: tensor.ndim == 1}, "'b': `matrices` selects a tensor of shape"),
    ],
)
def test_options_out_of_range_are_named(function, options, message):
    tasks = [task | {"b": torch.ones(4).double()} for task in as_tasks(random_updates(2))]
    with pytest.raises(ValueError, match=message):
        function(plain_sum(tasks), tasks, **options)


@pytest.mark.parametrize(
    "merged, message",
    [
        ({"v": torch.ones(9, 6)}, "task vector 0 and the merged task vector differ .*'v', 'w'"),
        ({"w": torch.ones(6, 9)}, r"'w': shape \(9, 6\) in task vector 0, \(6, 9\) in the merged task vector"),
        ({"w": torch.full((9, 6), float("nan"))}, "the merged task vector, 'w': 54 entries are NaN or infinite"),
    ],
)
def test_merged_and_task_vectors_must_match(merged, message):
    with pytest.raises(ValueError, match=message):
        calibrate(merged, as_tasks(random_updates(2)))
    with pytest.raises(ValueError, match="empty list"):
        calibrate(merged, [])


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="colour"):
        diagnose({"w": torch.ones(2, 2)}, [{"w": torch.ones(2, 2)}], colour="red")
