"""A merger is added in one place, by its record, and everything that is done with mergers follows."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.lab import figures
from merging import MERGERS, Merger, apply, calibrate, merger
from merging.adapters import Adapter, merge_adapters, save_adapter
from merging.calibration import published_alpha
from merging.checkpoints import open_checkpoint
from merging.command import changes, dry_run
from merging.command.main import main, merge
from merging.command.plan import make_plan
from merging.command.recipe import Recipe
from merging.lowrank import LowRank, merge_low_rank
from merging.suites import comparison
from merging.task_vectors import check

# What a user writes ---------------------------------------------------------------------------------------------------


def median(task_vectors, scale: float = 1.0):
    """Return the entrywise median of the task vectors, times a scale."""
    names = check(task_vectors)
    stacked = {name: torch.stack([task[name] for task in task_vectors]) for name in names}
    return {name: scale * updates.median(0).values for name, updates in stacked.items()}


RECORD = Merger(median, "Median", "#AA4499", by_entry=True, alpha=0.5)

# What follows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(MERGERS, "median", RECORD)


def models(folder, shape=(40, 9), experts=3):
    """A base and its experts, in memory and on disk."""
    generator = torch.Generator().manual_seed(0)
    states = [
        {"mlp.weight": torch.randn(shape, generator=generator), "bias": torch.randn(7, generator=generator)}
        for _ in range(1 + experts)
    ]
    for index, state in enumerate(states):
        (folder / str(index)).mkdir(parents=True)
        save_file(state, folder / str(index) / "model.safetensors")
    return states, str(folder / "0"), tuple(str(folder / str(1 + index)) for index in range(experts))


def updates_of(states):
    return [{name: tensor - states[0][name] for name, tensor in state.items()} for state in states[1:]]


def written(folder):
    return load_file(folder / "model.safetensors")


def test_it_merges_in_memory_and_is_found_by_a_nearby_name():
    tasks = [{"w": torch.tensor([1.0, 5, -2])}, {"w": torch.tensor([2.0, 3, 0])}, {"w": torch.tensor([9.0, 4, -1])}]
    assert merger("median")(tasks, scale=2)["w"].tolist() == [4, 8, -2]
    assert merger("median").options == {"scale": 1.0}
    with pytest.raises(ValueError, match=r"unknown merger 'medain'.*did you mean 'median'"):
        merger("medain")


@pytest.mark.parametrize("svc", [False, True])
def test_it_is_streamed_by_rows_and_calibrated_with_its_published_alpha(tmp_path, svc, monkeypatch):
    states, where, others = models(tmp_path)
    monkeypatch.setattr(changes, "RANGE", 25)
    merge(Recipe(where, others, "median", svc=svc), tmp_path / "out")
    tasks = updates_of(states)
    merged = median(tasks)
    assert published_alpha("median", 3) == 0.5
    expected = apply(states[0], calibrate(merged, tasks, alpha=0.5) if svc else merged)
    for name, tensor in written(tmp_path / "out").items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_a_large_tensor_takes_the_memory_of_ranges_of_rows(tmp_path):
    _, where, others = models(tmp_path, (changes.RANGE // 512 + 1, 512), 2)
    checkpoints = open_checkpoint(where), [open_checkpoint(other) for other in others]
    plans = {name: make_plan(Recipe(where, others, name), *checkpoints) for name in ("median", "task_arithmetic")}
    memory = {name: dry_run.expected_memory(plan) for name, plan in plans.items()}
    assert memory["median"] == memory["task_arithmetic"]
    assert memory["median"] < dry_run.expected_memory(make_plan(Recipe(where, others, "tsv_m"), *checkpoints))


def test_the_command_takes_its_name_and_its_options(tmp_path, capsys):
    states, where, others = models(tmp_path)
    flags = ["--base", where, "--experts", *others, "--set", "*:scale=0.5"]
    assert main([*flags, "--method", "median", "--out", str(tmp_path / "out")]) == 0
    expected = apply(states[0], median(updates_of(states), 0.5))
    assert all(torch.allclose(tensor, expected[name]) for name, tensor in written(tmp_path / "out").items())
    assert main([*flags, "--method", "medain", "--out", str(tmp_path / "other")]) == 1
    assert "did you mean 'median'" in capsys.readouterr().err


def test_the_help_of_the_command_lists_the_table(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert [name for name in MERGERS if name not in said] == ["median"]  # of those that were there at import


def test_it_merges_vectors_of_ia3_and_is_refused_where_there_are_factors_only():
    vectors = [torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [0.0]]), torch.tensor([[3.0], [1.0]])]
    merged = merge_adapters([Adapter("ia3", vectors={"a.weight": vector}) for vector in vectors], "median")
    assert merged.vectors["a.weight"].flatten().tolist() == [1.5, 1]
    factors = [LowRank(torch.randn(6, 2), torch.randn(2, 5)) for _ in range(3)]
    with pytest.raises(ValueError, match=r"median looks at single entries.*merge the folded weights"):
        merge_low_rank(factors, "median")


def lora(folder, count=3):
    """A base and adapters of LoRA, in memory and on disk."""
    generator = torch.Generator().manual_seed(1)
    base = {"layer.weight": torch.randn(6, 5, generator=generator)}
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    adapters = []
    for index in range(count):
        factors = (torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator))
        adapters.append(Adapter("lora", {"layer.weight": LowRank(*factors)}))
        save_adapter(adapters[-1], folder / f"e{index}")
    return base, adapters, str(folder / "base"), tuple(str(folder / f"e{index}") for index in range(count))


def test_products_of_lora_are_merged_entry_by_entry(tmp_path):
    base, adapters, where, others = lora(tmp_path)
    tasks = [{"layer.weight": adapter.modules["layer.weight"].dense()} for adapter in adapters]
    merge(Recipe(where, others, "median"), tmp_path / "out")
    assert torch.allclose(written(tmp_path / "out")["layer.weight"], apply(base, median(tasks))["layer.weight"])
    forms = comparison.adapter_forms(adapters, base, "median", tasks, 0, [0.5])
    assert torch.equal(forms[None]["layer.weight"], median(tasks)["layer.weight"])
    assert torch.equal(forms[0.5]["layer.weight"], calibrate(median(tasks), tasks, alpha=0.5)["layer.weight"])


def test_a_merger_of_whole_matrices_without_a_factored_form_is_refused_on_lora(tmp_path, monkeypatch):
    monkeypatch.setitem(MERGERS, "median", Merger(median, "Median"))
    _, adapters, where, others = lora(tmp_path)
    with pytest.raises(ValueError, match="median has no factored form: merge the folded weights instead"):
        merge_adapters(adapters, "median")
    with pytest.raises(
        ValueError, match="--method median: needs whole matrices, and has no form for the factors"
    ) as no:
        merge(Recipe(where, others, "median"), tmp_path / "out")
    assert "\n" not in str(no.value)


def test_tables_have_it_in_order_and_figures_with_label_and_colour():
    data = pd.DataFrame(dict(method=["median", "chance", "ties", "expert"], svc="none", metric="accuracy", value=1.0))
    assert comparison.methods_of(data) == ["ties", "median"]
    assert list(comparison.in_order(comparison.models(data), ["method"]).method) == ["expert", "ties", "median"]
    with figures.styled(comparison.merging_styles()):
        (ax,) = figures.paired(data).axes
        assert [text.get_text() for text in ax.get_yticklabels()] == ["Median", "chance", "TIES", "experts"]
        assert figures.colour("median") == "#AA4499"


def test_the_shared_tests_cover_it(tmp_path):
    """The tests over all mergers, in a process of their own in whose table the record stands from the start."""
    here = Path(__file__).resolve().parent
    plugin = "from merging import MERGERS\nfrom test_a_new_merger import RECORD\nMERGERS['median'] = RECORD\n"
    (tmp_path / "with_median.py").write_text(plugin)
    shared = [str(here / f"test_{name}.py") for name in ("mergers", "lowrank", "stream", "comparison")]
    options = ["-q", "-p", "no:cacheprovider", "-p", "with_median", "-k", "median and not range_by_range"]
    path = os.pathsep.join([str(tmp_path), str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", *options, *shared]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count(".") >= 10
