"""Recipes and the flags of the command: what they set, what they refuse, and what is written beside the weights."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from models_on_disk import assert_equal, content, experts_of, in_memory, models, saved, state_of, weights
from safetensors.torch import save_file

from merging import MERGERS, checkpoints, task_vector
from merging.command.flags import Flags, documentation, parse
from merging.command.main import main, merge
from merging.command.recipe import Recipe, read_recipe


def test_formats_may_be_mixed(tmp_path):
    base = state_of()
    experts = experts_of(base, 2)
    torch.save({"epoch": 1, "state_dict": {f"module.{n}": t for n, t in experts[1].items()}}, tmp_path / "e1.pt")
    save_file(base, tmp_path / "base.safetensors")
    recipe = Recipe(str(tmp_path / "base.safetensors"), (saved(tmp_path / "e0", experts[0]), str(tmp_path / "e1.pt")))
    merge(dataclasses.replace(recipe, method="ties"), tmp_path / "out")
    assert_equal(weights(tmp_path / "out"), in_memory(base, experts, "ties"))


def test_models_of_the_hub_are_named_by_their_id(tmp_path, monkeypatch):
    base = state_of()
    experts = experts_of(base, 2)
    models(tmp_path / "hub", base, experts)
    torch.save(experts[1], tmp_path / "hub" / "e1" / "pytorch_model.bin")
    (tmp_path / "hub" / "e1" / "model.safetensors").unlink()
    asked = []

    def snapshot(repo, kind, patterns):
        asked.append((repo, kind, *patterns[len(checkpoints.HUB_TEXTS) :]))
        return tmp_path / "hub" / repo.split("/")[1]

    monkeypatch.setattr(checkpoints, "snapshot", snapshot)
    merge(Recipe("me/base", ("me/e0", "me/e1"), "ties"), tmp_path / "out")
    first = [(repo, "model", "model.safetensors", "adapter_model.*") for repo in ("me/base", "me/e0", "me/e1")]
    assert asked == [*first, ("me/e1", "model", "*.safetensors"), ("me/e1", "model", "*.bin")]
    assert_equal(weights(tmp_path / "out"), in_memory(base, experts, "ties"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["me/base", "me/e0", "me/e1"]


def test_the_other_files_come_along_and_configuration_follows_the_dtype(tmp_path):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    saved(tmp_path / "base", base, dtype="float32", vocab_size=20)
    files = {"tokenizer.json": "{}", "generation_config.json": "{}", "vocab.txt": "a", "README.md": "old",
             "training_args.bin": "x", ".hidden": "x", "pytorch_model.bin.index.json": "{}"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / "base" / name).write_text(text)
    (tmp_path / "base" / "1_Pooling").mkdir()
    (tmp_path / "base" / "1_Pooling" / "config.json").write_text("{}")
    merge(Recipe(where, others, "ties", dtype="bfloat16", shard_size="500B"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    made = {"README.md", "merging.yaml", "model.safetensors.index.json"}
    assert names == made | {"config.json", "tokenizer.json", "generation_config.json", "vocab.txt", "1_Pooling"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "bfloat16", "vocab_size": 20}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == base.keys() and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in base.values())
    _, front, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == ["base", "e0", "e1", "e2"] and "merge" in front["tags"]
    assert "ties" in text and str(tmp_path) not in text


def test_patterns_set_options_of_single_tensors(tmp_path):
    base = state_of()
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    texts = ("mlp.*:scale=0.5", "attn*:final_scale=2", "attn*:svc=true", "scale*:merge=false")
    merge(Recipe(where, others, "task_arithmetic", set=texts), tmp_path / "out")
    found, plain = weights(tmp_path / "out"), in_memory(base, experts, "task_arithmetic")
    assert torch.equal(found["mlp.weight"], in_memory(base, experts, "task_arithmetic", scale=0.5)["mlp.weight"])
    svc = in_memory(base, experts, "task_arithmetic", svc=True, final_scale=2)
    assert torch.equal(found["attn.weight"], svc["attn.weight"])
    assert torch.equal(found["scale.weight"], base["scale.weight"])
    assert torch.equal(found["bias.weight"], plain["bias.weight"])


@pytest.mark.parametrize("change, message", [
    ({"method": "tie"}, "unknown method 'tie'.*did you mean 'ties'"),
    ({"method": "tsv_m", "scale": 0.3}, "--scale: tsv_m has no such option .*--final-scale"),
    ({"set": ("x:scale=1",)}, "'x:scale=1': matches no tensor of"),
    ({"set": ("*scale=1",)}, "expected 'PATTERN:OPTION=VALUE'"),
    ({"set": ("*:sale=1",)}, r"unknown option in --set '\*:sale=1': 'sale'.*did you mean 'scale'"),
    ({"set": ("*:scale=much",)}, "scale must be float, got 'much'"),
    ({"set": ("*:layout=row",)}, "unknown layout 'row'"),
    ({"set": ("mlp*:layout=stack",)}, "layout 'stack' needs three dimensions"),
    ({"set": ("*:scope=global", "mlp*:keep=0.5")}, "global TIES has one scope and one keep"),
    ({"set": ("*:keep=2.0",)}, r"keep must be in \(0, 1\], got 2.0"),
    ({"shard_size": "lots"}, "--shard-size must be a size"),
    ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ({"final_scale": math.inf}, "final_scale must be a finite number"),
    ({"svc": True, "alpha": -1.0}, "alpha must be positive"),
    ({"svc": True, "target": 7}, "target must be the index of a task, 0 to 2"),
    ({"experts": ()}, "give --base, --experts and --method"),
])  # fmt: skip
def test_options_out_of_range_are_named(tmp_path, change, message):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    values = {"base": where, "experts": others, "method": "ties"} | change
    with pytest.raises(ValueError, match=message):
        merge(Recipe(**values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_an_output_makes_it_again(tmp_path):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    arguments = ["--base", where, "--experts", *others, "--method", "dare", "--seed", "3", "--svc", "--alpha", "0.5",
                 "--set", "mlp*:final_scale=0.5", "--set", "attn*:merge=false", "*:drop=0.5"]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    written = tmp_path / "one" / "merging.yaml"
    assert read_recipe(written).set == ("mlp*:final_scale=0.5", "attn*:merge=false", "*:drop=0.5")
    assert main(["--recipe", str(written), "--out", str(tmp_path / "two")]) == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    flags = parse(["--recipe", str(written), "--alpha", "0.25", "--out", "x"])
    assert (flags.alpha, flags.seed, flags.base) == (0.25, 3, where)
    written.write_text("metod: ties\n")
    assert main(["--recipe", str(written), "--out", str(tmp_path / "three")]) == 1
    (tmp_path / "r.json").write_text(json.dumps({"base": where, "experts": list(others), "method": "ties"}))
    assert main(["--recipe", str(tmp_path / "r.json"), "--out", str(tmp_path / "four")]) == 0


@pytest.mark.parametrize("absolute", [False, True])
def test_a_recipe_works_from_any_folder_and_is_the_same_recipe(tmp_path, absolute, monkeypatch, capsys):
    base = state_of()
    for index, state in enumerate([base, *experts_of(base, 2)]):
        saved(tmp_path / "models" / f"m{index}", state)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")  # "link/.." is not what it looks like
    monkeypatch.chdir(tmp_path)
    names = [str(tmp_path / "models" / f"m{i}") if absolute else f"models/m{i}" for i in range(3)]
    for out in ("out", "link/out"):
        given = ["--base", names[0], "--experts", *names[1:], "--method", "ties", "--out", out]
        assert main(given) == 0
        first = content(tmp_path / out)
        written = yaml.safe_load(first["merging.yaml"])
        assert all(os.path.isabs(text) == absolute for text in (written["base"], *written["experts"]))
        for folder in (tmp_path, tmp_path / "elsewhere", tmp_path / out):
            monkeypatch.chdir(folder)
            recipe = os.path.relpath(tmp_path / out / "merging.yaml")
            assert main(["--recipe", recipe, "--out", str(tmp_path / out)]) == 0
            assert "has made it already" in capsys.readouterr().out
            assert main(["--recipe", recipe, "--out", str(tmp_path / out.replace("out", "again"))]) == 0
            assert content(tmp_path / out.replace("out", "again")) == first
        monkeypatch.chdir(tmp_path)
        assert main([*given[:-1], out.replace("out", "again")]) == 0 and "already" in capsys.readouterr().out


def test_paths_of_a_recipe_are_looked_for_in_its_folder_then_in_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "near").mkdir(parents=True)
    for name in ("near", "far"):
        (tmp_path / "here" / name).mkdir(parents=True)
    text = yaml.safe_dump({"base": "near", "experts": ["far", "owner/name"], "method": "ties"})
    (tmp_path / "recipes" / "r.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    recipe = read_recipe(tmp_path / "recipes" / "r.yaml")
    assert (recipe.base, recipe.experts) == (str(tmp_path / "recipes" / "near"), ("far", "owner/name"))


@pytest.mark.parametrize("text, message", [
    ("base: 3", "base must be a text, got 3"),
    ("base: [a]", r"base must be a text, got \['a'\]"),
    ("base: null", "base must be a text, got None"),
    ("experts: a", "experts must be a list of texts, got 'a'"),
    ("experts: [1]", r"experts must be a list of texts, got \[1\]"),
    ("method: {a: 1}", "method must be a text"),
    ("svc: 1", "svc must be true or false, got 1"),
    ("scale: much", "scale must be a number or null, got 'much'"),
    ("scale: true", "scale must be a number or null, got True"),
    ("seed: 0.5", "seed must be a whole number or null"),
    ("space: 3", "space must be output or input, got 3"),
    ("space: [output]", "space must be output or input"),
    ("set: {a: b}", "set must be a list of texts"),
    ("[1]", "is no recipe, which is a mapping"),
    ("3", "is no recipe, which is a mapping"),
    ("3: 4", "unknown option in .*3"),
    ("a: b: c", "cannot be read as a recipe"),
    ("!!python/object/apply:os.mkdir [harm]", "cannot be read as a recipe"),
    ("[" * 5000, "cannot be read as a recipe"),
])  # fmt: skip
def test_values_of_a_recipe_are_of_the_kinds_that_options_have(tmp_path, text, message, capsys):
    (tmp_path / "r.yaml").write_text(text)
    assert main(["--recipe", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(message, said) and "r.yaml" in said and not (tmp_path / "harm").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, capsys):
    base = state_of() | {"steps": torch.tensor([3]), "conv.weight": torch.ones(2, 2, 3, 3), "moe": torch.ones(2, 4, 5)}
    where, others = models(tmp_path, base, experts_of(base))
    arguments = ["--base", where, "--experts", *others, "--method", "tsv_m", "--svc", "--out", str(tmp_path / "out")]
    before = set(tmp_path.iterdir())
    assert main([*arguments, "--dry-run"]) == 0
    assert set(tmp_path.iterdir()) == before
    *_, last = lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in lines}
    assert "8×8" in said["attn.weight"] and said["attn.weight"].endswith("tsv_m, SVC")
    assert said["token_embedding.weight"].endswith("mean (tsv_m leaves it), no SVC")
    assert said["conv.weight"].endswith("mean (tsv_m leaves it), no SVC, kernel")
    assert said["moe"].endswith("tsv_m, SVC, stack of 2") and said["steps"].endswith("the base's value")
    assert re.fullmatch(r"8 tensors, .* to write \(.* GB free\), memory up to about 0\.\d+ GB, about \d+ s", last)


def test_the_report_holds_the_diagnoses_of_every_matrix(tmp_path):
    import pandas as pd

    base = state_of()
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, "plain_sum", report=True), tmp_path / "out", jobs=2)
    table = pd.read_csv(tmp_path / "out" / "report" / "matrices.csv")
    assert set(table.tensor) == {"mlp.weight", "attn.weight"}
    assert_equal(weights(tmp_path / "out"), in_memory(base, experts, "plain_sum"))
    update = sum(task_vector(expert, base)["mlp.weight"] for expert in experts)
    own = [torch.linalg.svdvals(task_vector(expert, base)["mlp.weight"])[0] for expert in experts]
    expected = float(torch.linalg.svdvals(update)[0] / torch.stack(own).mean())
    assert table.set_index("tensor").loc["mlp.weight", "inflation, largest σ"] == pytest.approx(expected, rel=1e-4)


def test_wrong_devices_and_jobs_are_named(tmp_path):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    for options, message in (({"jobs": 0}, "--jobs must be at least 1"), ({"device": "tpu"}, "--device must be cpu"),
                             ({"device": "meta"}, "no such device")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            merge(Recipe(where, others, "ties"), tmp_path / "out", **options)


def test_the_help_is_two_screens_and_opens_with_three_commands_that_work_as_they_stand(tmp_path):
    environment = os.environ | {"COLUMNS": "100"}
    command = [sys.executable, "-m", "merging", "--help"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert len(said.splitlines()) <= 100
    commands = [line.strip() for line in said.splitlines() if line.strip().startswith("python -m merging --")]
    assert len(commands) == 3
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base, 2))
    names = {"BASE": where, "MODEL MODEL": " ".join(others), "ADAPTER ADAPTER": " ".join(others)}
    for index, command in enumerate(commands):  # the third one reads what the first has made
        for word, name in (names | {"--out DIR": f"--out {tmp_path}/{index}", "DIR/": f"{tmp_path}/0/"}).items():
            command = command.replace(word, name)
        assert main(command.removeprefix("python -m merging ").split("   ")[0].split()) == 0, command


def test_flags_are_read_before_pytorch_is_imported():
    code = (
        "import sys\nfrom merging.command.flags import parse\nparse(['--base', 'x'])\nassert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_option_of_a_recipe_has_a_flag_with_a_text_of_its_own(capsys):
    texts = documentation(Flags)
    for field in dataclasses.fields(Flags):
        assert len(texts[field.name]) > 10
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    assert [name for name in texts if f"--{name.replace('_', '-')}" not in said] == []


def test_the_help_names_every_merger():
    assert [name for name in MERGERS if name not in documentation(Flags)["method"]] == []
