"""Merging tensor by tensor, or range by range, is exact: the same as in memory, in the memory of a few tensors."""

import fnmatch
import math
import re
from pathlib import Path

import pytest
import torch
from models_on_disk import (
    assert_close,
    assert_equal,
    experts_of,
    in_fork,
    in_memory,
    models,
    plan_of,
    state_of,
    weights,
)

from merging import MERGERS, calibrate, merger
from merging.command import changes, thresholds
from merging.command.main import main, merge
from merging.command.recipe import Recipe


@pytest.mark.parametrize("svc", [False, True])
@pytest.mark.parametrize("method", MERGERS)
def test_every_merger_streams_as_in_memory(tmp_path, method, svc):
    base = state_of() | {"steps": torch.tensor([3])}
    experts = experts_of(base)
    where, others = models(tmp_path, base, experts)
    merge(Recipe(where, others, method, svc=svc, final_scale=0.7), tmp_path / "out")
    alpha = merger(method).alpha
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
    assert_close(weights(tmp_path / "out"), in_memory(base, experts, method, svc, merger(method).alpha))


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
        assert thresholds.decided_together(plan, torch.device("cpu"))["thresholds"] == expected


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
    expected = in_memory(start, apart, method, svc=True, alpha=merger(method).alpha)
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


def test_a_difference_beyond_float32_is_refused_though_both_ends_are_finite(tmp_path):
    base = {"w.weight": torch.full((2, 2), -3e38)}
    where, others = models(tmp_path, base, [{"w.weight": -base["w.weight"]}])
    with pytest.raises(ValueError, match=r"e0/model\.safetensors: 'w\.weight': its difference from the base overflows"):
        merge(Recipe(where, others, "weight_average"), tmp_path / "out")


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


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("method, svc", [("ties", False), ("ties", True)])
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
