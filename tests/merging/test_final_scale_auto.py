"""`--final-scale auto`: the whole command, on models on disk, beside `norm_match` of the same task vectors."""

from dataclasses import replace

import pytest
import torch
import yaml
from models_on_disk import assert_close, experts_of, models, state_of, weights
from test_adapter_main import ARCHITECTURES, ia3, lora, made_by_peft

from common.lab.results import RESULTS, load
from merging import MERGERS, apply, calibrate, iso_basis, merger, norm_match, task_vector
from merging.command import changes
from merging.command.main import main, merge
from merging.command.recipe import Recipe, read_recipe
from merging.peft_files import open_adapter
from merging.suites import controls

MATCHED = [name for name in MERGERS if merger(name).norm_matched]
SHAPES = dict(mlp=(40, 9), bias=(31,), token_embedding=(20, 8), scale=(), conv=(6, 3, 2, 2))


def matched(base, experts, method, svc, weights=None, **options):
    """The library's way: all task vectors in memory, merged, calibrated, norm-matched and applied."""
    tasks = [task_vector(expert, base) for expert in experts]
    tasks = [{n: w * t for n, t in task.items()} for w, task in zip(weights or [1] * len(tasks), tasks, strict=True)]
    merged = MERGERS[method](tasks, **options)
    if svc:
        bases = iso_basis(tasks, method) if merger(method).basis else None
        bases = bases and {n: b for n, b in bases.items() if "embedding" not in n}
        merged = calibrate(merged, tasks, alpha=merger(method).alpha, bases=bases)
    return apply(base, norm_match(merged, tasks))


@pytest.mark.parametrize("entries", [25, 2**19])
@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("method", MERGERS)
def test_the_command_matches_norms_as_the_library_does(tmp_path, method, svc, entries, monkeypatch):
    """For any merger whose record says that it may; tensors are merged at once, or range by range."""
    monkeypatch.setitem(MERGERS, method, replace(merger(method), norm_matched=True))
    monkeypatch.setattr(changes, "RANGE", entries)
    base = state_of(**SHAPES) | {"steps": torch.tensor([3])}
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, method, svc=svc, final_scale="auto"), tmp_path / "out")
    found = weights(tmp_path / "out")
    assert_close(found, matched(base, experts, method, svc), 1e-5)
    for name in ("mlp.weight", "conv.weight", "bias.weight"):
        own = [float((expert[name] - base[name]).norm()) for expert in experts]
        assert float((found[name] - base[name]).norm()) == pytest.approx(sum(own) / len(own), rel=1e-4)


@pytest.fixture
def everywhere(monkeypatch):
    """The record of every merger says that it may, so that those with a factored form can be tested."""
    for method in MERGERS:
        monkeypatch.setitem(MERGERS, method, replace(merger(method), norm_matched=True))


def test_records_say_what_experiment_33_found():
    words = controls.replaced(controls.pooled(load(RESULTS / "33_svc_controls" / "workstation"), controls.CONTROLS))
    assert MATCHED == [method for method, word in words.items() if word == "replaces it"] == ["ties", "dare"]


def test_it_is_offered_where_it_was_measured_and_refused_elsewhere_in_one_line(tmp_path, capsys):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    for method in MERGERS:
        flags = ["--base", where, "--experts", *others, "--method", method, "--final-scale", "auto"]
        status = main([*flags, "--out", str(tmp_path / method)])
        said = capsys.readouterr().err.splitlines()
        if method in MATCHED:
            assert status == 0 and weights(tmp_path / method)
        else:
            assert status == 1 and not (tmp_path / method).exists()
            assert (
                len(said) == 1 and f"of {method}, as it does for ties, dare (experiment 33); give a number" in said[0]
            )


@pytest.mark.usefixtures("everywhere")
def test_the_average_task_arithmetic_and_the_sum_become_one(tmp_path):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    found = []
    for method in ("weight_average", "task_arithmetic", "plain_sum"):
        merge(Recipe(where, others, method, final_scale="auto"), tmp_path / method)
        found.append(weights(tmp_path / method))
    for other in found[1:]:
        assert_close(other, found[0], 1e-6)  # of each tensor all three take a multiple of the sum


@pytest.mark.usefixtures("everywhere")
def test_experts_count_by_their_weights(tmp_path):
    base = state_of()
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    recipe = Recipe(where, others, "task_arithmetic", weights=(1, 0.5, -2), svc=True, final_scale="auto")
    merge(recipe, tmp_path / "out")
    assert_close(weights(tmp_path / "out"), matched(base, experts, "task_arithmetic", True, (1, 0.5, -2)))


@pytest.mark.usefixtures("everywhere")
def test_each_matrix_of_a_stack_is_matched_by_itself(tmp_path):
    base = state_of(experts=(3, 6, 5))
    experts = experts_of(base)
    for factor, expert in enumerate(experts, start=1):
        expert["experts.weight"] = base["experts.weight"] + factor * (expert["experts.weight"] - base["experts.weight"])
    where, others = models(tmp_path, base, experts)
    texts = ("experts*:layout=stack",)
    merge(Recipe(where, others, "plain_sum", set=texts, final_scale="auto"), tmp_path / "out")

    def apart(state):
        return {f"experts.{i}": matrix for i, matrix in enumerate(state["experts.weight"])}

    expected = matched(apart(base), [apart(expert) for expert in experts], "plain_sum", False)
    assert_close(apart(weights(tmp_path / "out")), expected)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_folded_into_the_base(tmp_path, architecture, svc):
    base, where, others, folded = made_by_peft(tmp_path, architecture, lora)
    merge(Recipe(where, others, "task_arithmetic", svc=svc, final_scale="auto"), tmp_path / "out")
    start = {name: tensor.double() for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
    changed = {name for name in start if any((one[name] - base.state_dict()[name]).abs().max() > 0 for one in folded)}
    ends = weights(tmp_path / "out")
    assert changed
    for name in start.keys() & ends.keys():
        own = [float((one[name].double() - start[name]).norm()) for one in folded]
        wanted = sum(own) / len(own) if name in changed else 0.0
        assert float((ends[name].double() - start[name]).norm()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.usefixtures("everywhere")
def test_adapters_that_are_written_are_matched_too(tmp_path):
    architecture = next(iter(ARCHITECTURES))
    for kind, rank in ((lora, 64), (ia3, None)):
        folder = tmp_path / str(rank)
        _, where, others, _ = made_by_peft(folder, architecture, kind)
        recipe = Recipe(where, others, "plain_sum", output="adapter", rank=rank, final_scale="auto")
        merge(recipe, folder / "out")
        merge(replace(recipe, final_scale=1.0), folder / "plain")
        out, plain, *given = (read(name) for name in (folder / "out", folder / "plain", *others))
        assert out.keys() == plain.keys()
        for name, update in out.items():
            own = [float(each[name].norm()) for each in given]
            factor = sum(own) / len(own) / float(plain[name].norm())
            torch.testing.assert_close(update, factor * plain[name], rtol=1e-3, atol=1e-5)
            assert abs(factor - 1) > 0.01


def read(folder):
    """The updates of an adapter, as matrices, or as IA³ vectors less one."""
    adapter = open_adapter(folder)
    modules = {name: (read := factors.read("cpu")).scale * read.b @ read.a for name, factors in adapter.modules.items()}
    return modules | {name: vector.read().float() - 1 for name, vector in adapter.vectors.items()}


@pytest.mark.usefixtures("everywhere")
def test_patterns_and_recipes_know_it(tmp_path, capsys):
    base = state_of()
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    flags = ["--base", where, "--experts", *others, "--method", "task_arithmetic", "--final-scale", "auto"]
    assert main([*flags, "--set", "mlp*:final_scale=0.5", "--out", str(tmp_path / "one")]) == 0
    written = tmp_path / "one" / "merging.yaml"
    assert yaml.safe_load(written.read_text())["final_scale"] == "auto" and read_recipe(written).final_scale == "auto"
    found, expected = weights(tmp_path / "one"), matched(base, experts, "task_arithmetic", False)
    assert_close({"attn.weight": found["attn.weight"]}, {"attn.weight": expected["attn.weight"]})
    tasks = [task_vector(expert, base) for expert in experts]
    half = apply(base, MERGERS["task_arithmetic"](tasks), 0.5)["mlp.weight"]
    assert_close({"mlp.weight": found["mlp.weight"]}, {"mlp.weight": half})
    capsys.readouterr()
    written.write_text(written.read_text().replace("final_scale: auto", "final_scale: atuo"))
    assert main(["--recipe", str(written), "--out", str(tmp_path / "two")]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "final_scale must be a number or auto, got 'atuo'" in said


@pytest.mark.usefixtures("everywhere")
def test_the_plan_says_so(tmp_path, capsys):
    base = state_of(mlp=(40, 9))
    where, others = models(tmp_path, base, experts_of(base))
    flags = ["--base", where, "--experts", *others, "--method", "plain_sum", "--dry-run"]
    assert main([*flags, "--final-scale", "auto"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("mlp.weight"))
    assert line.endswith("plain_sum, norm-matched")


def test_after_svc_a_note_says_what_it_cost(tmp_path, capsys):
    base = state_of(mlp=(40, 9))
    where, others = models(tmp_path, base, experts_of(base))
    flags = ["--base", where, "--experts", *others, "--method", "ties", "--final-scale", "auto"]
    assert main([*flags, "--out", str(tmp_path / "plain")]) == 0 and "after SVC" not in capsys.readouterr().err
    assert main([*flags, "--svc", "--out", str(tmp_path / "svc")]) == 0
    found = controls.pooled(load(RESULTS / "33_svc_controls" / "workstation"), controls.CONTROLS)
    cost = found[found.condition == controls.SPECTRUM].set_index("method")["mean"]
    assert f"SVC then cost TIES {-cost.ties:.1f} and DARE {-cost.dare:.1f} points" in capsys.readouterr().err
