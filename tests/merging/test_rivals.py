"""WUDI, Subspace Boosting and LiNeS against their authors' algorithms, written naively, and what they share."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging import MERGERS, apply, knots, lines, merger, subspace_boost, task_vector, wudi, wudi_minimum
from merging.adapters import Adapter, merge_adapters, save_adapter
from merging.checkpoints import open_checkpoint
from merging.command import changes, dry_run
from merging.command.main import merge
from merging.command.plan import make_plan
from merging.command.recipe import Recipe
from merging.lowrank import LowRank, merge_low_rank
from merging.suites.reference import interference_loss, interference_minimum

NAMES = ("embed.weight", "layers.0.up.weight", "layers.1.up.weight", "layers.2.up.weight", "layers.2.bias")


def tasks_of(count=3, shape=(12, 9), rank=None, seed=0, dtype=torch.float64, size=1e-3):
    """Task vectors of a model with three layers, updates of the size of fine-tuning, with or without full rank."""
    generator = torch.Generator().manual_seed(seed)
    draw = dict(generator=generator, dtype=torch.float64)
    inner = min(shape) if rank is None else rank
    commons = {name: torch.randn(*shape, **draw) if rank is None else torch.zeros(shape) for name in NAMES}
    tasks = []
    for _ in range(count):
        task = {name: commons[name] + torch.randn(shape[0], inner, **draw) @ torch.randn(inner, shape[1], **draw)
                for name in NAMES}  # fmt: skip
        task["layers.2.bias"] = task["layers.2.bias"][:, 0]
        tasks.append({name: (size * tensor).to(dtype) for name, tensor in task.items()})
    return tasks


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


# The authors' algorithms ----------------------------------------------------------------------------------------------


def wudi_of(updates, steps=300, rate=1e-5):
    """All tasks stacked, the loss as it is written, its gradient by autograd."""
    stacked = torch.stack(updates)  # (K, m, n)
    merged = torch.nn.Parameter(stacked.sum(0))
    adam = torch.optim.Adam([merged], lr=rate, weight_decay=0)
    squared = stacked.flatten(1).norm(dim=1).square()
    for _ in range(steps):
        inner = (merged.unsqueeze(0) - stacked) @ stacked.mT  # (K, m, m)
        loss = (inner.square() / squared[:, None, None]).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return merged.detach()


def boosted_of(updates, share=0.01):
    left, singular, right = torch.linalg.svd(sum(updates), full_matrices=False)
    reached = (singular.cumsum(0) / singular.sum() >= share).nonzero()
    floor = singular[int(reached[0])] if len(reached) else singular[-1]
    return left @ singular.clamp(min=float(floor)).diag() @ right


def lines_of(tasks, rise, layers=3):
    """The rule for several tasks: the sum, whose factor rises over blocks ".0." to ".(L − 1)."."""
    merged = {}
    for name in tasks[0]:
        depth = next((layer / (layers - 1) for layer in range(layers) if f".{layer}." in name), 0)
        merged[name] = (1 / len(tasks) + rise * depth) * sum(task[name] for task in tasks)
    return merged


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (3, 40), (40, 3)])  # (3, 40): the map through the updates
@pytest.mark.parametrize("count, rank", [(1, None), (2, None), (5, None), (4, 2)])
def test_wudi_is_the_authors_adam(count, rank, shape):
    tasks = tasks_of(count, shape, rank)
    merged = wudi(tasks)
    for name in ("layers.0.up.weight", "layers.2.up.weight"):
        updates = [task[name] for task in tasks]
        assert error(merged[name], wudi_of(updates)) < 1e-9
        moved = error(merged[name], sum(updates))
        assert (moved == 0) == (count == 1) and moved < 1
    few = wudi(tasks, steps=7, rate=1e-4)["layers.1.up.weight"]
    assert error(few, wudi_of([task["layers.1.up.weight"] for task in tasks], 7, 1e-4)) < 1e-9
    assert torch.equal(merged["embed.weight"], sum(task["embed.weight"] for task in tasks) / count)


def test_wudi_in_float32_is_as_near_to_float64_as_the_authors_own():
    wide, narrow = (tasks_of(4, (24, 32), dtype=dtype) for dtype in (torch.float64, torch.float32))
    name = "layers.0.up.weight"
    exact = wudi_of([task[name].double() for task in narrow])
    ours = error(wudi(narrow)[name], exact)
    assert ours < 1e-6 and ours <= 2 * error(wudi_of([task[name] for task in narrow]), exact)
    assert error(wudi(wide)[name], exact) < 1e-5


def test_wudi_lowers_the_loss_and_stops_before_the_minimum():
    name, tasks = "layers.0.up.weight", tasks_of(3, (12, 9))
    updates = [task[name] for task in tasks]
    losses = [float(interference_loss(wudi(tasks, steps)[name], updates)) for steps in (0, 30, 300)]
    lowest = float(interference_loss(interference_minimum(updates), updates))
    assert losses == sorted(losses, reverse=True) and lowest < losses[2]
    long = wudi(tasks, 20000, 1e-5)[name]
    assert float(interference_loss(long, updates)) == pytest.approx(lowest, rel=1e-3)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (3, 40)])
@pytest.mark.parametrize("count, rank", [(1, None), (2, None), (5, None), (4, 2)])
def test_the_closed_form_is_the_minimum(count, rank, shape):
    tasks, name = tasks_of(count, shape, rank), "layers.1.up.weight"
    updates = [task[name] for task in tasks]
    merged = wudi_minimum(tasks)[name]
    expected = interference_minimum(updates)
    assert error(merged, expected) < 1e-6 and (count > 1 or torch.equal(merged, updates[0]))
    lowest = interference_loss(merged, updates)
    for seed in range(3):
        other = merged + 1e-5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert interference_loss(other, updates) >= lowest
    narrow = [{key: tensor.float() for key, tensor in task.items()} for task in tasks]
    assert error(wudi_minimum(narrow)[name], expected) < 1e-3
    larger = wudi_minimum([{key: 50 * tensor for key, tensor in task.items()} for task in tasks])[name]
    assert error(larger, 50 * merged) < 1e-6  # no scale of its own


def test_a_task_that_left_a_weight_alone_does_not_count_in_wudi():
    tasks = tasks_of(2)
    still = {name: torch.zeros_like(tensor) for name, tensor in tasks[0].items()}
    name = "layers.0.up.weight"
    for method in (wudi, wudi_minimum):
        assert torch.equal(method([*tasks, still])[name], method(tasks)[name])
        assert not any(tensor.any() for tensor in method([still, still]).values())


@pytest.mark.parametrize("share", [0, 0.01, 0.02, 0.3, 0.9, 1])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_subspace_boosting_is_the_authors_clamp(share, shape):
    tasks = tasks_of(3, shape)
    merged = subspace_boost(tasks, share, scale=0.7)
    updates = [task["layers.1.up.weight"] for task in tasks]
    assert error(merged["layers.1.up.weight"], 0.7 * boosted_of(updates, share)) < 1e-9
    narrow = [{name: tensor.float() for name, tensor in task.items()} for task in tasks]
    assert error(subspace_boost(narrow, share, 0.7)["layers.1.up.weight"], 0.7 * boosted_of(updates, share)) < 1e-5
    if share == 1:
        assert error(merged["layers.1.up.weight"], 0.7 * sum(updates)) < 1e-9


def test_subspace_boosting_lifts_no_null_direction():
    tasks = tasks_of(2, rank=2)
    singular = torch.linalg.svdvals(subspace_boost(tasks, 0.01, 1.0)["layers.0.up.weight"])
    largest = torch.linalg.svdvals(sum(task["layers.0.up.weight"] for task in tasks))[0]
    assert torch.allclose(singular[:4], largest.expand(4)) and singular[4:].max() < 1e-9 * largest


@pytest.mark.parametrize("rise", [0.5, 0, -0.2])
def test_lines_is_the_authors_rule(rise):
    tasks = tasks_of(4)
    expected, merged = lines_of(tasks, rise), lines(tasks, rise)
    assert all(error(merged[name], expected[name]) < 1e-12 for name in expected)


def test_lines_of_a_part_of_a_model_needs_its_depth():
    tasks = tasks_of(2)
    part = [{"layers.1.up.weight": task["layers.1.up.weight"]} for task in tasks]
    whole = lines(tasks)["layers.1.up.weight"]
    assert torch.equal(lines(part, depth=0.5)["layers.1.up.weight"], whole)
    with pytest.raises(ValueError, match=r"'layers.1.up.weight' alone does not tell how many layers.*give its depth"):
        lines(part)


def adapters_of(count=3, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = dict(generator=generator, dtype=torch.float64)
    names = [name for name in NAMES if "up" in name]
    return [
        Adapter("lora", {n: LowRank(torch.randn(10, rank, **draw), torch.randn(rank, 8, **draw)) for n in names})
        for _ in range(count)
    ]


def test_adapters_are_scaled_by_the_depth_of_their_layers():
    adapters = adapters_of()
    merged = merge_adapters(adapters, "lines").modules
    dense = lines([{name: update.dense() for name, update in adapter.modules.items()} for adapter in adapters])
    assert all(error(merged[name].dense(), dense[name]) < 1e-12 for name in dense)


# Core Space -----------------------------------------------------------------------------------------------------------


def core_space(updates, merge):
    """Merge in the singular vectors of the stacked factors, as the authors do, and leave that space again."""
    rows = torch.linalg.svd(torch.cat([update.a for update in updates]), full_matrices=False)[2]
    columns = torch.linalg.svd(torch.cat([update.b for update in updates], 1), full_matrices=False)[0]
    return columns @ merge([columns.T @ update.dense() @ rows.T for update in updates]) @ rows


def tsv_of(cores):
    count = len(cores[0]) // len(cores)
    parts = [[part[..., :count] for part in (u, s, vh.mT)] for u, s, vh in map(torch.linalg.svd, cores)]
    left, singular, right = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    (ul, _, vl), (ur, _, vr) = torch.linalg.svd(left), torch.linalg.svd(right)
    return ul @ vl @ singular.diag() @ (ur @ vr).T


def iso_of(cores):
    left, singular, right = torch.linalg.svd(sum(cores))
    return singular.mean() * left @ right


@pytest.mark.parametrize("method, merge", [("plain_sum", sum), ("tsv_m", tsv_of), ("iso_c", iso_of)])
def test_the_factored_form_is_core_space(method, merge):
    updates = [adapter.modules["layers.1.up.weight"] for adapter in adapters_of(3, 2)]
    merged = merge_low_rank(updates, method)
    assert error(merged.dense(), core_space(updates, merge)) < 1e-9


# On disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, assigned, options",
    [
        ("lines", "*:rise=0.8", {"rise": 0.8}),
        ("wudi", "*:steps=20", {"steps": 20}),
        ("wudi_minimum", "*:final_scale=1.0", {}),
        ("subspace_boost", "*:share=0.3", {"share": 0.3}),
    ],
)
@pytest.mark.parametrize("range_of_rows", [None, 20])
def test_models_on_disk_are_merged_as_in_memory(method, assigned, options, range_of_rows, tmp_path, monkeypatch):
    tasks = tasks_of(3, dtype=torch.float32)
    base = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9)) for name, tensor in tasks[0].items()
    }
    folders = []
    for index, update in enumerate([{name: 0 for name in base}, *tasks]):
        folders.append(tmp_path / str(index))
        folders[-1].mkdir()
        save_file({name: base[name] + update[name] for name in base}, folders[-1] / "model.safetensors")
    if range_of_rows:
        monkeypatch.setattr(changes, "RANGE", range_of_rows)
    where, *experts = map(str, folders)
    merge(Recipe(where, tuple(experts), method, set=(assigned,)), tmp_path / "out")
    stored = [task_vector(load_file(folder / "model.safetensors"), base) for folder in folders[1:]]
    expected = apply(base, MERGERS[method](stored, **options))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


@pytest.mark.parametrize("method", ["lines", "wudi_minimum", "subspace_boost"])
def test_adapters_on_disk_are_merged_as_their_matrices(method, tmp_path):
    adapters, generator = adapters_of(), torch.Generator().manual_seed(9)
    base = {name: torch.randn(10, 8, generator=generator) for name in adapters[0].modules}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    for index, adapter in enumerate(adapters):
        save_adapter(adapter, tmp_path / f"e{index}")
    experts = tuple(str(tmp_path / f"e{index}") for index in range(len(adapters)))
    merge(Recipe(str(tmp_path / "base"), experts, method), tmp_path / "out")
    dense = [{name: update.dense() for name, update in adapter.modules.items()} for adapter in adapters]
    expected = apply(base, merger(method)(dense, **merger(method).known(precision=torch.float32)))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert error(tensor, expected[name].double()) < 1e-5, name


def test_adapters_on_disk_are_refused_where_there_is_no_factored_form(tmp_path):
    adapters = adapters_of(2)
    (tmp_path / "base").mkdir()
    save_file({name: torch.zeros(10, 8) for name in adapters[0].modules}, tmp_path / "base" / "model.safetensors")
    for index, adapter in enumerate(adapters):
        save_adapter(adapter, tmp_path / f"e{index}")
    experts = tuple(str(tmp_path / f"e{index}") for index in range(2))
    with pytest.raises(ValueError, match=r"--method wudi: needs whole matrices.*merge the folded models instead") as no:
        merge(Recipe(str(tmp_path / "base"), experts, "wudi"), tmp_path / "out")
    assert "\n" not in str(no.value)


def test_the_memory_to_expect_counts_wudis_gram_matrix(tmp_path):
    rows, memory = changes.RANGE // 256 + 1, {}
    for shape in ((rows, 256), (256, rows)):
        folders = [tmp_path / f"{shape[0]}-{index}" for index in range(3)]
        for folder in folders:
            folder.mkdir()
            save_file({"up.weight": torch.zeros(shape)}, folder / "model.safetensors")
        where, *experts = map(str, folders)
        checkpoints = open_checkpoint(where), [open_checkpoint(expert) for expert in experts]
        for method in ("wudi", "star"):
            plan = make_plan(Recipe(where, tuple(experts), method), *checkpoints)
            memory[method, shape] = dry_run.expected_memory(plan)
    (tall, wide), size = [(rows, 256), (256, rows)], 4 * 256 * rows
    assert memory["star", tall] == memory["star", wide] < memory["wudi", tall] < memory["wudi", wide]
    assert (memory["wudi", wide] - memory["wudi", tall]) / size == pytest.approx(
        2 - 2 * 256 / rows, rel=1e-3
    )  # K copies


# KnOTS ---------------------------------------------------------------------------------------------------------------


def naive_knots(updates, keep, scale):
    """The authors' way: SVD of the updates side by side, TIES on the parts Σ V_iᵀ, entry by entry, for one matrix."""
    width = updates[0].shape[1]
    left, singular, right = torch.linalg.svd(torch.cat(updates, 1), full_matrices=False)
    kept = singular > 1e-9 * singular[0]
    left, spread = left[:, kept], singular[kept, None] * right[kept]
    parts = [spread[:, index * width : (index + 1) * width].flatten().tolist() for index in range(len(updates))]
    size = len(parts[0])
    limits = [sorted(map(abs, part))[size - int(keep * size) - 1] for part in parts]
    merged = []
    for entry in range(size):
        values = [part[entry] if abs(part[entry]) >= limit else 0.0 for part, limit in zip(parts, limits, strict=True)]
        sign = 1 if sum(values) > 0 else -1
        agree = [value for value in values if value * sign > 0]
        merged.append(sum(agree) / max(1, len(agree)))
    return scale * left @ torch.tensor(merged, dtype=torch.float64).reshape(-1, width)


@pytest.mark.parametrize("shape, rank", [((12, 9), None), ((9, 12), None), ((12, 9), 2)])
@pytest.mark.parametrize("keep, scale", [(0.2, 1.0), (0.5, 0.6)])
def test_knots_is_the_authors_algorithm(shape, rank, keep, scale):
    tasks = tasks_of(3, shape, rank)
    merged = knots(tasks, keep, scale)
    for name in NAMES[1:4]:
        expected = naive_knots([task[name] for task in tasks], keep, scale)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    for name in (NAMES[0], NAMES[4]):  # embeddings and biases
        torch.testing.assert_close(merged[name], sum(task[name] for task in tasks) / 3)


def test_knots_keeps_a_single_task_whole_and_zeros_zero():
    (task,) = tasks_of(1)
    torch.testing.assert_close(knots([task], keep=1.0)[NAMES[1]], task[NAMES[1]])
    nothing = {name: torch.zeros_like(tensor) for name, tensor in task.items()}
    assert not any(tensor.any() for tensor in knots([nothing, nothing]).values())


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: wudi(v, steps=-1), "steps must be an integer of at least 0, got -1"),
        (lambda v: wudi(v, steps=1.5), "steps must be an integer"),
        (lambda v: wudi(v, rate=0), "rate must be positive and finite, got 0"),
        (lambda v: wudi(v, rate=float("inf")), "rate must be positive and finite"),
        (lambda v: subspace_boost(v, share=1.2), r"share must be in \[0, 1\], got 1.2"),
        (lambda v: subspace_boost(v, share=float("nan")), "share must be in"),
        (lambda v: subspace_boost(v, scale=float("inf")), "scale must be a finite number"),
        (lambda v: lines(v, rise=float("nan")), "rise must be a finite number, got nan"),
        (lambda v: knots(v, keep=0), r"keep must be in \(0, 1\], got 0"),
        (lambda v: knots(v, scale=float("nan")), "scale must be a finite number"),
        (lambda v: merge_adapters(adapters_of(2), "knots"), "knots has no factored form: merge the folded weights"),
        (lambda v: merger("wudy"), "unknown merger 'wudy'.*did you mean 'wudi'"),
        (lambda v: merge_adapters(adapters_of(2), "wudi"), "wudi has no factored form: merge the folded weights"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(tasks_of(2))
    assert "\n" not in str(caught.value)


def test_rivals_are_none_of_the_official_repositorys_mergers():
    assert [name for name, own in MERGERS.items() if own.rival] == [
        "wudi", "wudi_minimum", "subspace_boost", "lines", "knots",
    ]  # fmt: skip
    assert not any(own.rival and own.published for own in MERGERS.values())
