"""The command on true-format models: exact, resumable, small, and clear about what it cannot merge."""

import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merging import MERGERS, apply, calibrate, checkpoints, iso_basis, task_vector
from merging.checkpoints import open_checkpoint
from merging.command import changes, stream, thresholds
from merging.command.main import main, merge, parse
from merging.command.plan import make_plan
from merging.command.recipe import Recipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]


def state_of(seed=0, **shapes):
    """A state dict of normal entries, by name in the order given."""
    shapes = shapes or {"mlp": (12, 8), "attn": (8, 8), "bias": (12,), "token_embedding": (20, 8), "scale": ()}
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def experts_of(base, count=3, size=0.1):
    generator = torch.Generator().manual_seed(count)
    return [
        {
            name: (t + size * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t
            for name, t in base.items()
        }
        for _ in range(count)
    ]


def saved(folder, state, **config):
    folder.mkdir(exist_ok=True, parents=True)
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def models(tmp_path, base, experts):
    return saved(tmp_path / "base", base), tuple(saved(tmp_path / f"e{i}", state) for i, state in enumerate(experts))


def weights(folder):
    return {name: t for path in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(path).items()}


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def in_memory(base, experts, method, svc=False, alpha=None, final_scale=1.0, **options):
    vectors = [task_vector(expert, base) for expert in experts]
    merged = MERGERS[method](vectors, **options)
    if svc:
        bases = iso_basis(vectors, method) if method.startswith("iso") else None
        bases = bases and {k: v for k, v in bases.items() if "embedding" not in k and "text_proj" not in k}
        merged = calibrate(merged, vectors, alpha=alpha, bases=bases)
    return apply(base, merged, final_scale)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12)
        assert found[name].dtype == tensor.dtype and error < tolerance, name


# The same as in memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("method", MERGERS)
def test_every_merger_streams_as_in_memory(tmp_path, method, svc):
    base = state_of() | {"steps": torch.tensor([3])}
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, method, svc=svc, final_scale=0.7), tmp_path / "out")
    alpha = 1.0 if method == "tsv_m" else None
    expected = in_memory(base, experts, method, svc, alpha, final_scale=0.7)
    assert_equal(weights(tmp_path / "out"), expected)


@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("method", MERGERS)
def test_tensors_merged_range_by_range_are_the_same(tmp_path, method, svc, monkeypatch):
    base = state_of(mlp=(40, 9), bias=(31,), token_embedding=(20, 8), scale=(), conv=(6, 3, 2, 2))
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    monkeypatch.setattr(changes, "RANGE", 25)
    merge(Recipe(where, others, method, svc=svc), tmp_path / "out")
    assert_close(weights(tmp_path / "out"), in_memory(base, experts, method, svc, 1.0 if method == "tsv_m" else None))


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("options", [{"combine": "sum", "scale": 0.3}, {"keep": 0.5}, {"keep": 1.0}])
def test_global_ties_is_exact_for_ties_zeros_and_undecided_entries(tmp_path, options, jobs, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.zeros(shape) for name, shape in (("a", (30, 7)), ("b", (11,)), ("c", (5, 5)), ("d", ()))}
    grid = [  # few distinct values: equal magnitudes, zeros, cancellation
        {name: torch.randint(-3, 4, t.shape, generator=generator) / 8 for name, t in base.items()} for _ in range(4)
    ]
    fine = experts_of(base, 4)
    for number, experts in enumerate((grid, fine)):
        where, others = models(tmp_path, base, experts)
        expected = in_memory(base, experts, "ties", scope="global", **options)
        texts = tuple(f"*:{key}={value}" for key, value in ({"scope": "global"} | options).items())
        for range_of in (16, 2**21):
            monkeypatch.setattr(changes, "RANGE", range_of)
            out = tmp_path / f"out{number}-{range_of}"
            merge(Recipe(where, others, "ties", set=texts), out, jobs=jobs)
            assert_equal(weights(out), expected)


def test_thresholds_of_any_magnitude_are_exact(tmp_path):
    base, experts = {"w": torch.zeros(50, 3)}, experts_of({"w": torch.zeros(50, 3)}, 2)
    experts[1]["w"] = experts[1]["w"] * 10.0 ** torch.linspace(-44, 38, 150).reshape(50, 3)  # denormal to huge
    for keep in (0.01, 0.2, 0.7, 1.0):
        rank = 150 - math.floor(keep * 150) or 1
        expected = [float(e["w"].abs().flatten().kthvalue(rank).values) for e in experts]
        plan = plan_of(tmp_path, base, experts, method="ties", set=("*:scope=global", f"*:keep={keep}"))
        assert list(thresholds.global_election(plan, torch.device("cpu")).thresholds) == expected


def test_masks_depend_on_seed_expert_and_name_alone(tmp_path, monkeypatch):
    base = state_of()
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, "dare", seed=5), tmp_path / "one")
    monkeypatch.setattr(changes, "RANGE", 16)
    merge(Recipe(where, others, "dare", seed=5), tmp_path / "two", jobs=2)
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert_equal(weights(tmp_path / "one"), in_memory(base, experts, "dare", seed=5))


def test_narrow_weights_are_merged_in_float32_and_rounded_once(tmp_path):
    exact = state_of()
    base = {name: t.bfloat16() for name, t in exact.items()}
    experts = [{n: t.half() for n, t in e.items()} for e in experts_of(exact)]
    where, others = models(tmp_path, base, experts)
    start, *ends = ({name: t.float() for name, t in state.items()} for state in (base, *experts))
    wide = in_memory(start, ends, "ties")
    merge(Recipe(where, others, "ties"), tmp_path / "same")
    assert_equal(weights(tmp_path / "same"), {name: t.bfloat16() for name, t in wide.items()})
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16), ("float64", torch.float64)):
        merge(Recipe(where, others, "ties", dtype=name), tmp_path / name)
        assert_equal(weights(tmp_path / name), {key: t.to(dtype) for key, t in wide.items()})


def test_a_new_merger_streams_without_further_ado(tmp_path, monkeypatch):
    def strongest(task_vectors, factor: float = 1.0):
        """For each entry the update of the largest magnitude, over a whole tensor at a time."""
        stacked = {name: torch.stack([task[name] for task in task_vectors]) for name in task_vectors[0]}
        return {n: factor * t.gather(0, t.abs().argmax(0, keepdim=True))[0] for n, t in stacked.items()}

    monkeypatch.setitem(MERGERS, "strongest", strongest)
    base = state_of()
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    arguments = ["--base", where, "--experts", *others, "--method", "strongest", "--svc", "--set", "*:factor=0.5"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert_equal(weights(tmp_path / "out"), in_memory(base, experts, "strongest", svc=True, factor=0.5))


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
        asked.append((repo, kind, patterns[-1]))
        return tmp_path / "hub" / repo.split("/")[1]

    monkeypatch.setattr(checkpoints, "snapshot", snapshot)
    merge(Recipe("me/base", ("me/e0", "me/e1"), "ties"), tmp_path / "out")
    assert asked == [("me/base", "model", "*.safetensors"), ("me/e0", "model", "*.safetensors"),
                     ("me/e1", "model", "*.safetensors"), ("me/e1", "model", "*.bin")]  # fmt: skip
    assert_equal(weights(tmp_path / "out"), in_memory(base, experts, "ties"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["me/base", "me/e0", "me/e1"]


# Models of transformers -----------------------------------------------------------------------------------------------


def architectures():
    import transformers as t

    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    clip = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**text, num_key_value_heads=1)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**text, num_key_value_heads=1, tie_word_embeddings=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=12)),
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**text, num_labels=3)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(
            text_config=clip | {"vocab_size": 40}, vision_config=clip | {"image_size": 8, "patch_size": 4},
            projection_dim=12)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
            patch_size=4)),
    }  # fmt: skip


TRANSPOSED = {"gpt2": ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight")}


def oriented(name, state):
    """The same state dict with every matrix stored as (out, in)."""
    flipped = {key for pattern in TRANSPOSED.get(name, ()) for key in fnmatch.filter(state, pattern)}
    return {key: tensor.T.contiguous() if key in flipped else tensor for key, tensor in state.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "t5", "clip", "vit"])
def test_models_of_transformers_round_trip(tmp_path, name):
    torch.manual_seed(0)
    model = architectures()[name]()
    model.save_pretrained(tmp_path / "base")
    start = {key: t.clone() for key, t in model.state_dict().items()}
    for index in range(2):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(start[key] + 0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"e{index}", max_shard_size="6KB")
    assert len(list((tmp_path / "e0").glob("*.safetensors"))) > 1
    recipe = Recipe(str(tmp_path / "base"), (str(tmp_path / "e0"), str(tmp_path / "e1")), "iso_cts", svc=True)
    merge(recipe, tmp_path / "out")
    base, experts = weights(tmp_path / "base"), [weights(tmp_path / f"e{index}") for index in range(2)]
    expected = in_memory(oriented(name, base), [oriented(name, expert) for expert in experts], "iso_cts", svc=True)
    assert_close(weights(tmp_path / "out"), oriented(name, expected))
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    found = loaded.state_dict()
    assert all(torch.equal(found[key], t) for key, t in weights(tmp_path / "out").items() if key in found)


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


# Interruptions --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def killed(function, count):
    """Let the process kill itself, as by kill -9, at the count-th call of a function of os."""
    original, calls = getattr(os, function), iter(range(count))

    def last(*arguments, **options):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(os, function, last)
    yield
    setattr(os, function, original)


def in_fork(work):
    """Run work() in a forked process and return how that ended: 0, an exit status, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        status = 99
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            status = work() or 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("method, options", [
    ("ties", {"set": ("*:scope=global",)}), ("dare", {}), ("task_arithmetic", {"svc": True, "report": True}),
])  # fmt: skip
def test_a_killed_merge_continues_and_ends_bit_identical(tmp_path, method, options, monkeypatch):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    monkeypatch.setattr(changes, "RANGE", 30)
    recipe = Recipe(where, others, method, shard_size="500B", **options)
    merge(recipe, tmp_path / "whole")
    out = tmp_path / "out"
    kills = [("pwrite", 0), ("pwrite", 3), ("pwrite", 1), ("fsync", 1), ("replace", 1), ("replace", 3)]
    for function, count in kills:

        def work(function=function, count=count):
            with killed(function, count):
                merge(recipe, out)

        assert in_fork(work) == -signal.SIGKILL
        assert not out.exists() and {path.name for path in tmp_path.glob(".out*")} == {".out.partial"}
        with pytest.raises(ValueError, match="an unfinished merge of another recipe"):
            merge(Recipe(where, others, "weight_average"), out)
    assert in_fork(lambda: _killed_last(recipe, out)) == -signal.SIGKILL
    assert content(out) == content(tmp_path / "whole") and list(tmp_path.glob(".out*"))
    merge(recipe, out)
    assert content(out) == content(tmp_path / "whole") and not list(tmp_path.glob(".out*"))


def _killed_last(recipe, out):
    with killed("unlink", 0):  # the folder has its name, what stood beside it is still there
        merge(recipe, out)


def test_a_resumed_merge_writes_only_the_shards_that_are_missing(tmp_path, monkeypatch):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    recipe, out = Recipe(where, others, "weight_average", shard_size="500B"), tmp_path / "out"

    def work():
        with killed("pwrite", 3):  # in the middle of the second shard
            merge(recipe, out)

    assert in_fork(work) == -signal.SIGKILL
    names, tensor = [], stream.Streamer.tensor
    monkeypatch.setattr(
        stream.Streamer,
        "tensor",
        lambda self, step, rows=None: (names.append(step.name), tensor(self, step, rows))[1],
    )
    merge(recipe, out)
    assert names == list(open_checkpoint(where).entries)[2:]


def test_the_same_recipe_on_a_complete_output_does_nothing_and_another_is_refused(tmp_path, capsys):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    arguments = ["--base", where, "--experts", *others, "--method", "ties", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(arguments) == 0 and "has made it already" in capsys.readouterr().out
    assert main([*arguments, "--jobs", "2"]) == 0
    assert main([*arguments, "--scale", "0.5"]) == 1
    assert "out: holds a merge by another recipe" in capsys.readouterr().err
    saved(tmp_path / "e0", state_of(9))
    assert main(arguments) == 1 and "or of other input files" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    assert main([*arguments[:-1], str(tmp_path / "full")]) == 1
    assert "full: is there and holds no finished merge" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "e0", state_of(1))
    assert main([*arguments[:-1], str(tmp_path / "empty")]) == 0


def test_ranks_share_the_shards(tmp_path, monkeypatch):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base))
    recipe = Recipe(where, others, "ties", set=("*:scope=global",), shard_size="500B")
    merge(recipe, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "3")

    def rank(number):
        os.environ["RANK"] = str(number)
        merge(recipe, tmp_path / "three")

    pids = []
    for number in (2, 1, 0):
        if (pid := os.fork()) == 0:
            status = 1
            with contextlib.suppress(BaseException):
                torch.set_num_threads(1)
                rank(number)
                status = 0
            os._exit(status)
        pids.append(pid)
        time.sleep(0.05)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_the_command_killed_at_any_moment_continues(tmp_path):
    base = state_of(**{f"layers.{index}": (60, 50) for index in range(80)})
    where, others = models(tmp_path, base, experts_of(base, 2))
    arguments = ["--base", where, "--experts", *others, "--method", "iso_c", "--svc"]
    arguments += ["--shard-size", "60KB"]  # five tensors
    command = [sys.executable, "-m", "merging", *arguments, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and len(list((tmp_path / ".out.partial" / "out").glob("*.safetensors"))) < 2:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("method, svc", [("task_arithmetic", False), ("ties", False), ("dare", False), ("ties", True)])
def test_peak_memory_is_that_of_a_few_tensors(tmp_path, method, svc):
    """Inputs of 3 × 120 MB, largest tensor 24 MB: MB above what the process holds before, mapped pages included.

    The allocator keeps up to about 100 MB of what it is given back, depending on what this process did before.
    """
    base = state_of(**{f"layer{i}": (400, 15000) for i in range(4)}, head=(6000, 1000))
    near, far = ({name: factor * tensor for name, tensor in base.items()} for factor in (1.01, 2))
    where, others = models(tmp_path, base, [near, far])
    del base, near, far
    small, few = models(tmp_path / "small", state_of(mlp=(600, 400)), experts_of(state_of(mlp=(600, 400)), 2))
    peak = tmp_path / "peak"

    def resident(key):
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

    def work():
        merge(Recipe(small, few, method, svc=svc), tmp_path / "first")  # touches the code that will be needed
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        start = resident("VmRSS")
        merge(Recipe(where, others, method, svc=svc, shard_size="30MB"), tmp_path / "out")
        peak.write_text(str(resident("VmHWM") - start))

    assert in_fork(work) == 0
    assert 0 < float(peak.read_text()) < (300 if svc else 200)


# Rules ----------------------------------------------------------------------------------------------------------------


def plan_of(tmp_path, base, experts, **options):
    where, others = models(tmp_path, base, experts)
    recipe = Recipe(where, others, options.pop("method", "weight_average"), **options)
    return make_plan(recipe, open_checkpoint(where), [open_checkpoint(other) for other in others])


def layouts(plan):
    return {step.name: step.layout for step in plan.steps}


def test_transposed_storage_shows_in_the_bias_and_in_names(tmp_path):
    base = {
        "h.0.c_fc.weight": torch.ones(4, 6), "h.0.c_fc.bias": torch.ones(6),
        "h.0.mlp.c_proj.weight": torch.ones(6, 4), "h.0.mlp.c_proj.bias": torch.ones(4),
        "h.0.attn.c_proj.weight": torch.ones(4, 4), "h.0.attn.c_proj.bias": torch.ones(4),
        "attn.in_proj_weight": torch.ones(12, 4), "attn.in_proj_bias": torch.ones(12),
        "visual.proj": torch.ones(4, 3), "text_projection": torch.ones(4, 3), "q_proj.weight": torch.ones(4, 3),
        "wte.weight": torch.ones(9, 4), "conv.weight": torch.ones(4, 3, 2, 2), "conv1d.weight": torch.ones(6, 5, 3),
        "experts.gate_up": torch.ones(2, 4, 6), "experts.gate_up_bias": torch.ones(2, 6),
        "moe.down": torch.ones(2, 3, 4), "pos": torch.ones(1, 5, 4), "norm.weight": torch.ones(4),
    }  # fmt: skip
    found = layouts(plan_of(tmp_path, base, experts_of(base)))
    conv1d = {"h.0.c_fc.weight", "h.0.mlp.c_proj.weight", "h.0.attn.c_proj.weight"}
    of = {layout: {name for name in found if found[name] == layout} for layout in found.values()}
    assert of["transposed"] == conv1d | {"visual.proj", "text_projection"}
    assert of["kernel"] == {"conv.weight", "conv1d.weight", "pos"}
    assert found["experts.gate_up"] == "transposed stack" and found["moe.down"] == "stack"
    assert found["q_proj.weight"] == found["attn.in_proj_weight"] == found["wte.weight"] == "matrix"


def test_square_linear_layers_are_matrices(tmp_path):
    base = state_of(up=(6, 4), q=(4, 4)) | {"up.bias": torch.ones(6), "q.bias": torch.ones(4)}
    assert set(layouts(plan_of(tmp_path, base, experts_of(base))).values()) == {"matrix", "vector"}


def test_output_space_is_that_of_the_layer_whatever_the_storage(tmp_path):
    base = {"c_fc.weight": torch.zeros(6, 9), "c_fc.bias": torch.zeros(9)}
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    for space in ("output", "input"):
        merge(Recipe(where, others, "plain_sum", svc=True, space=space), tmp_path / space)
        flat = [{"w": expert["c_fc.weight"].T} for expert in experts]
        expected = calibrate(MERGERS["plain_sum"](flat), flat, space=space)["w"].T
        assert torch.allclose(weights(tmp_path / space)["c_fc.weight"], expected, atol=1e-6)
    text = ("c_fc.weight:layout=matrix",)
    merge(Recipe(where, others, "plain_sum", svc=True, set=text), tmp_path / "stored")
    stored = [{"w": expert["c_fc.weight"]} for expert in experts]
    expected = calibrate(MERGERS["plain_sum"](stored), stored)["w"]
    assert torch.allclose(weights(tmp_path / "stored")["c_fc.weight"], expected, atol=1e-6)
    assert not torch.allclose(expected, weights(tmp_path / "output")["c_fc.weight"], atol=1e-3)


@pytest.mark.parametrize("method", MERGERS)
def test_stacks_of_experts_are_merged_matrix_by_matrix(tmp_path, method):
    base = {"experts.down": torch.zeros(3, 8, 6)}
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, method, svc=True), tmp_path / "out")
    apart = [{f"experts.down[{i}]": expert["experts.down"][i] for i in range(3)} for expert in experts]
    start = {name: torch.zeros(8, 6) for name in apart[0]}
    expected = in_memory(start, apart, method, svc=True, alpha=1.0 if method == "tsv_m" else None)
    assert_equal(weights(tmp_path / "out"), {"experts.down": torch.stack([*expected.values()])})


def test_kernels_keep_the_merged_value_or_are_calibrated_as_out_by_rest(tmp_path):
    base = {"conv.weight": torch.zeros(6, 2, 3, 3)}
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, "plain_sum", svc=True), tmp_path / "kept")
    assert_close(weights(tmp_path / "kept"), in_memory(base, experts, "weight_average"))
    merge(Recipe(where, others, "task_arithmetic", svc=True, kernels=True), tmp_path / "flat")
    flat = [{"w": expert["conv.weight"].flatten(1)} for expert in experts]
    expected = calibrate(MERGERS["task_arithmetic"](flat), flat)["w"]
    assert torch.allclose(weights(tmp_path / "flat")["conv.weight"].flatten(1), expected, atol=1e-6)


def test_vocabularies_of_different_size_share_their_first_rows(tmp_path):
    base = state_of(embed=(10, 4), head=(10, 4), bias=(10,), mlp=(4, 4))
    longer, shorter = experts_of(base, 2)
    for name in ("embed.weight", "head.weight", "bias.weight"):
        longer[name] = torch.cat([longer[name], torch.full((3, *longer[name].shape[1:]), 9.0)])
        shorter[name] = shorter[name][:8]
    where = saved(tmp_path / "base", base, vocab_size=10)
    nested = {"text_config": {"vocab_size": 8}}
    others = saved(tmp_path / "e0", longer, vocab_size=13), saved(tmp_path / "e1", shorter, **nested)
    recipe = Recipe(where, others, "weight_average")
    merge(recipe, tmp_path / "out")
    found = weights(tmp_path / "out")
    assert torch.equal(found["embed.weight"][8:], base["embed.weight"][8:])
    common = [{n: t[:8] if "mlp" not in n else t for n, t in state.items()} for state in (base, longer, shorter)]
    expected = in_memory(common[0], common[1:], "weight_average")
    assert all(torch.equal(found[n][:8], expected[n][:8]) for n in found)
    plan = make_plan(recipe, open_checkpoint(where), [open_checkpoint(other) for other in others])
    rows = "10 / 13 / 8 rows (base / experts): the first 8 are merged; rows 8 to 9 are the base's"
    assert f"'embed.weight': {rows}" in plan.notes
    with pytest.raises(ValueError, match=r"--strict: 'bias\.weight': 10 / 13 / 8 rows .*\(and 2 more\)"):
        merge(Recipe(where, others, "weight_average", strict=True), tmp_path / "strict")
    saved(tmp_path / "e0", longer, vocab_size=99)
    with pytest.raises(ValueError, match=r"e0/model\.safetensors: 'bias\.weight': shape \[13\], and \[10\]"):
        merge(recipe, tmp_path / "refused")


def test_tied_tensors_stay_tied(tmp_path):
    base = state_of(embedding=(10, 4), mlp=(6, 4))
    experts = experts_of(base)
    for state in (base, *experts):
        state["zhead.weight"] = state["embedding.weight"].clone()
    where, others = models(tmp_path, base, experts)
    for method, svc in (("dare", False), ("task_arithmetic", True)):  # masks and SVC go by names
        merge(Recipe(where, others, method, svc=svc), tmp_path / method)
        found = weights(tmp_path / method)
        assert torch.equal(found["embedding.weight"], found["zhead.weight"])
    experts[0]["zhead.weight"] = experts[0]["zhead.weight"] + 1
    plan = plan_of(tmp_path, base, experts)
    assert not plan.notes and not plan.remarks


def test_a_tied_copy_that_one_side_does_not_store_is_found(tmp_path):
    base = state_of(embed=(10, 4), mlp=(6, 4))
    experts = experts_of(base, 2)
    copied = [state | {"head.weight": state["embed.weight"].clone()} for state in (base, *experts)]
    plan = plan_of(tmp_path, base, copied[1:], strict=True)  # experts store the copy, the base does not
    assert [note.split(": ", 1)[1][:26] for note in plan.remarks] == ["'head.weight': a tied copy"] * 2
    plan = plan_of(tmp_path, copied[0], experts)  # the base stores the copy, experts do not
    head = next(step for step in plan.steps if step.name == "head.weight")
    assert [entry.name for entry in head.experts] == ["embed.weight"] * 2
    assert plan.remarks == ["'head.weight': tied to 'embed.weight'; both are merged as 'embed.weight'"]


def test_prefixes_are_bridged_and_heads_are_reported(tmp_path):
    base = state_of(**{"layer.0": (4, 4), "layer.1": (4, 4), "pooler": (4, 4)})
    first, second = experts_of(base, 2)
    first, second = ({f"bert.{n}": t for n, t in state.items() if n != "pooler.weight"} for state in (first, second))
    first["classifier.weight"] = torch.ones(2, 4)
    plan = plan_of(tmp_path, base, [first, second])
    assert [step.name for step in plan.steps if step.experts] == ["layer.0.weight", "layer.1.weight"]
    assert any("e0: 'classifier.weight': not in" in note for note in plan.notes)
    assert any("'pooler.weight': in no expert; the base's value is kept" in note for note in plan.notes)
    with pytest.raises(ValueError, match="--strict: "):
        plan_of(tmp_path, base, [first, second], strict=True)
    longer = {f"model.{name}": tensor for name, tensor in base.items()}
    plan = plan_of(tmp_path, longer, experts_of(base, 2))
    assert len([step for step in plan.steps if step.experts]) == 3 and not plan.notes


def test_integers_are_kept_if_they_agree_or_count(tmp_path):
    base = state_of() | {"ids": torch.arange(5), "batches": torch.tensor(7)}
    experts = [state | {"batches": torch.tensor(9)} for state in experts_of(base, 2)]
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, "ties"), tmp_path / "out")
    found = weights(tmp_path / "out")
    assert torch.equal(found["ids"], base["ids"]) and found["batches"] == 7
    experts[1]["ids"] = torch.arange(5) + 1
    models(tmp_path, base, experts)
    with pytest.raises(ValueError, match=r"e1/model\.safetensors: 'ids': torch\.int64 and different from the base's"):
        merge(Recipe(where, others, "ties"), tmp_path / "again")
    merge(Recipe(where, others, "ties", set=("ids:merge=false",)), tmp_path / "again")
    assert torch.equal(weights(tmp_path / "again")["ids"], base["ids"])


def _without(name):
    return lambda base, experts: experts[1].pop(name)


def _with(name, tensor):
    return lambda base, experts: experts[1].__setitem__(name, tensor)


@pytest.mark.parametrize("spoil, message", [
    (_without("mlp.weight"), r"e1: lacks 'mlp\.weight', which other experts have"),
    (_with("mlp.weight", torch.ones(12, 9)), r"e1/model\.safetensors: 'mlp\.weight': shape \[12, 9\], and \[12, 8\]"),
    (_with("mlp.weight", torch.ones(12, 8).int()), r"e1/model\.safetensors: 'mlp\.weight': torch\.int32, and"),
    (_with("mlp.weight", torch.ones(12, 8).to(torch.float8_e4m3fn)), r"'mlp\.weight': stored as torch\.float8_e4m3fn"),
    (_with("mlp.weight", torch.full((12, 8), math.nan)), r"e1/model\.safetensors: 'mlp\.weight': 96 entries are NaN"),
    (lambda base, experts: experts.__setitem__(1, {"x": torch.ones(2)}), "e1: shares no tensor name with"),
])  # fmt: skip
def test_what_cannot_be_merged_is_named_in_one_line(tmp_path, spoil, message, capsys):
    base = state_of()
    experts = experts_of(base, 2)
    spoil(base, experts)
    where, others = models(tmp_path, base, experts)
    assert main(["--base", where, "--experts", *others, "--method", "ties", "--out", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m merging: ")]
    assert len(said) == 1 and re.search(message, said[0])
    assert not (tmp_path / "out").exists()


def test_overflow_is_refused_and_infinite_bases_can_be_kept(tmp_path):
    base = {"w.weight": torch.full((2, 2), 60000.0), "mask": torch.tensor([0.0, -math.inf])}
    experts = [{"w.weight": torch.full((2, 2), 70000.0), "mask": base["mask"]}]
    where, others = models(tmp_path, base, experts)
    with pytest.raises(ValueError, match=r"base/model\.safetensors: 'mask': 1 entries .* --set 'mask:merge=false'"):
        merge(Recipe(where, others, "weight_average"), tmp_path / "one")
    kept = ("mask:merge=false",)
    with pytest.raises(ValueError, match=r"'w\.weight': 4 merged entries overflow torch\.float16; choose --dtype"):
        merge(Recipe(where, others, "weight_average", dtype="float16", set=kept), tmp_path / "two")
    merge(Recipe(where, others, "weight_average", set=kept), tmp_path / "three")
    assert torch.equal(weights(tmp_path / "three")["mask"], base["mask"])


# Recipes and the command line -----------------------------------------------------------------------------------------


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
    assert re.fullmatch(r"8 tensors, .* to write, memory up to about 0\.\d+ GB, about \d+ s", last)


def test_the_report_holds_the_diagnoses_of_every_matrix(tmp_path):
    import pandas as pd

    base = state_of()
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, "plain_sum", report=True), tmp_path / "out", jobs=2)
    table = pd.read_csv(tmp_path / "out" / "report" / "matrices.csv")
    assert set(table.tensor) == {"mlp.weight", "attn.weight"}
    assert (tmp_path / "out" / "report" / "over_accumulation.png").stat().st_size > 1000
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
