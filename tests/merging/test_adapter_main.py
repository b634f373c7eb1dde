"""The command on adapters that peft wrote: folded, or written as an adapter that peft reads again; exact, resumable."""

import json
import re
import signal

import peft
import pytest
import torch
import transformers
from models_on_disk import assert_equal, content, in_fork, killed, weights
from safetensors.torch import load_file, save_file

from merging import MERGERS, apply, calibrate, iso_basis, task_vector
from merging.adapters import fold_adapter, load_adapter, merge_adapters
from merging.command import changes
from merging.command.main import main, merge
from merging.command.recipe import Recipe

TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
ARCHITECTURES = {  # model, targets of LoRA, targets of IA³ of which the last one is feed-forward
    "bert": (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3)),
             ["query", "output.dense"], ["key", "output.dense"]),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=12, bos_token_id=0, eos_token_id=0)),
             ["c_attn", "c_proj", "wte"], ["c_attn", "mlp.c_proj"]),
    "t5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)), ["q", "wo"], ["k", "wo"]),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=1)),
              ["q_proj", "down_proj"], ["k_proj", "down_proj"]),
}  # fmt: skip


def lora(targets, index, **options):
    """The configuration of the index-th expert: another rank and scale for each."""
    return peft.LoraConfig(r=2 + index, lora_alpha=3 + index, target_modules=targets, **options)


def ia3(targets, index):
    return peft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:])


def randomised(model, seed):
    """Give everything that is trained some value near the one it has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def made_by_peft(folder, name, config, count=3):
    """Save a base and `count` adapters of it; returns their folders and the folded models' state dicts, by peft."""
    torch.manual_seed(0)
    build, for_lora, for_ia3 = ARCHITECTURES[name]
    base = randomised(build(), 0)  # biases, which IA³ multiplies, start from zero
    base.save_pretrained(folder / "base", max_shard_size="12KB")
    others, folded = [], []
    for index in range(count):
        model = build()
        model.load_state_dict(base.state_dict())
        targets = for_ia3 if config is ia3 else for_lora
        adapted = randomised(peft.get_peft_model(model, config(targets, index)), 1 + index)
        adapted.save_pretrained(folder / f"e{index}")
        others.append(str(folder / f"e{index}"))
        folded.append(adapted.merge_and_unload().state_dict())
    return base, str(folder / "base"), tuple(others), folded


def expected_model(base, folded, method, svc=False, final_scale=1.0, transposed=()):
    """The dense path on what peft folded in float32: task vectors of whole models in float64, matrices as (out, in)."""

    def oriented(state):
        return {n: t.double().T if n in transposed else t.double() for n, t in state.items() if t.is_floating_point()}

    start, tasks = oriented(base), [task_vector(oriented(state), oriented(base)) for state in folded]
    own, came_in = MERGERS[method], {"precision": torch.float32}
    merged = own(tasks, **own.known(**came_in))
    if svc:
        bases = iso_basis(tasks, method, **came_in) if own.basis else None
        bases = bases and {n: b for n, b in bases.items() if "embedding" not in n}
        merged = calibrate(merged, tasks, alpha=own.alpha, bases=bases)
    ends = apply(start, merged, final_scale)
    return {name: end.T if name in transposed else end for name, end in ends.items()}


def assert_close(found, expected, tolerance=2e-5):
    for name, tensor in found.items():
        error = (tensor.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)
        assert error < tolerance, (name, float(error))


def conv1d(model):
    return {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, transformers.pytorch_utils.Conv1D)}


# Folded into the base -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, svc", [("task_arithmetic", True), ("tsv_m", True), ("iso_c", True), ("ties", False)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_of_peft_is_merged_as_the_folded_models_would_be(tmp_path, name, method, svc):
    base, where, others, folded = made_by_peft(tmp_path, name, lora)
    merge(Recipe(where, others, method, svc=svc, final_scale=0.7), tmp_path / "out")
    expected = expected_model(base.state_dict(), folded, method, svc, 0.7, conv1d(base))
    found = weights(tmp_path / "out")
    assert found.keys() == weights(tmp_path / "base").keys()
    assert_close(found, expected)
    _, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("options", [
    {"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["classifier"]},
    {"rank_pattern": {"query": 4}, "alpha_pattern": {"output.dense": 7}},
], ids=str)  # fmt: skip
def test_every_setting_of_lora_is_exact(tmp_path, options):
    base, where, others, folded = made_by_peft(tmp_path, "bert", lambda targets, i: lora(targets, i, **options))
    merge(Recipe(where, others, "plain_sum", svc=True), tmp_path / "out")
    changed = weights(tmp_path / "out")
    assert_close(changed, expected_model(base.state_dict(), folded, "plain_sum", True))
    merged = merge_adapters([load_adapter(other) for other in others], "plain_sum", {}, base=base.state_dict())
    assert_close(changed, {n: t.double() for n, t in fold_adapter(merged, base.state_dict()).items()})


@pytest.mark.parametrize("method, svc", [("task_arithmetic", True), ("ties", False), ("dare", True)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ia3_of_peft_is_merged_as_vectors_and_folded(tmp_path, name, method, svc):
    base, where, others, _ = made_by_peft(tmp_path, name, ia3)
    merge(Recipe(where, others, method, svc=svc, report=True), tmp_path / "out")
    adapters = [load_adapter(other) for other in others]
    report = (tmp_path / "out" / "report" / "matrices.csv").read_text().splitlines()
    assert len(report) == 1 + len(adapters[0].vectors)
    merged = merge_adapters(adapters, method, {} if svc else None, base=base.state_dict())
    assert_close(weights(tmp_path / "out"), fold_adapter(merged, {n: t.double() for n, t in base.state_dict().items()}))


def test_one_adapter_folds_as_peft_folds_it(tmp_path):
    for config in (lora, ia3):
        for name in ("bert", "gpt2"):
            folder = tmp_path / f"{config.__name__}-{name}"
            _, where, others, folded = made_by_peft(folder, name, config, count=1)
            merge(Recipe(where, others, "weight_average"), folder / "out")
            assert_close(weights(folder / "out"), folded[0], 1e-6)


def test_the_copy_of_the_base_that_peft_saves_beside_an_adapted_head_counts_for_nothing(tmp_path):
    base, where, others, folded = made_by_peft(tmp_path, "llama", lambda targets, index: lora(["lm_head"], index))
    assert any("lm_head.base_layer.weight" in key for key in load_file(tmp_path / "e0" / "adapter_model.safetensors"))
    merge(Recipe(where, others, "plain_sum", svc=True, strict=True), tmp_path / "out")
    assert_close(weights(tmp_path / "out"), expected_model(base.state_dict(), folded, "plain_sum", True))
    _replaced(tmp_path / "e0", "lm_head.base_layer", torch.ones(40, 16))
    with pytest.raises(ValueError, match=r"'lm_head\.weight': held whole, not as in the base, and adapted too"):
        merge(Recipe(where, others, "plain_sum"), tmp_path / "other")


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_elections_look_at_the_dense_updates_range_by_range(tmp_path, scope, monkeypatch):
    base, where, others, folded = made_by_peft(tmp_path, "llama", lora)
    recipe = Recipe(where, others, "ties", set=(f"*:scope={scope}",))
    merge(recipe, tmp_path / "whole")
    monkeypatch.setattr(changes, "RANGE", 64)
    merge(recipe, tmp_path / "ranges")
    adapted = [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, folded[0][name])]
    tasks = [{name: fold[name].double() - base.state_dict()[name].double() for name in adapted} for fold in folded]
    merged = MERGERS["ties"](tasks, scope=scope)
    for out in ("whole", "ranges"):
        found = weights(tmp_path / out)
        for name in adapted:
            change = found[name].double() - base.state_dict()[name].double()
            agree = torch.isclose(change, merged[name], atol=1e-5).double().mean()
            assert agree > 0.995  # folding by peft rounds: an entry at the threshold can go either way


# Written as an adapter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_loads_the_merged_adapter_and_computes_what_the_merged_model_does(tmp_path, name):
    for config, options in ((lora, {"rank": 12, "svc": True}), (ia3, {})):
        folder = tmp_path / config.__name__
        base, where, others, _ = made_by_peft(folder, name, config)
        recipe = {"base": where, "experts": others, "method": "plain_sum"}
        merge(Recipe(**recipe, **options, output="adapter"), folder / "adapter")
        merge(Recipe(**recipe, svc=config is lora), folder / "model")
        adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")
        assert_close(
            weights(folder / "model"), {n: t.double() for n, t in adapted.merge_and_unload().state_dict().items()}
        )
        made = {"README.md", "adapter_config.json", "adapter_model.safetensors", "energy_lost.csv", "merging.yaml"}
        assert {path.name for path in (folder / "adapter").iterdir()} == made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_experts_become_an_adapter_of_their_best_rank(tmp_path, name):
    torch.manual_seed(0)
    base = randomised(ARCHITECTURES[name][0](), 7)
    base.save_pretrained(tmp_path / "base")
    start = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    for index in range(2):
        base.load_state_dict(start)
        randomised(base, index).save_pretrained(tmp_path / f"e{index}")
    base.load_state_dict(start)
    recipe = {"base": str(tmp_path / "base"), "experts": tuple(str(tmp_path / f"e{i}") for i in range(2))}
    merge(Recipe(**recipe, method="weight_average", output="adapter", rank=3), tmp_path / "adapter")
    merge(Recipe(**recipe, method="weight_average"), tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    linear = {f"{n}.weight" for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    written = (conv1d(base) or linear) & weights(tmp_path / "model").keys()
    lost = dict(
        line.split(",")[::3] for line in (tmp_path / "adapter" / "energy_lost.csv").read_text().splitlines()[1:]
    )
    for key, tensor in weights(tmp_path / "model").items():
        update, kept = (tensor - start[key]).double(), (adapted[key] - start[key]).double()
        if key not in written:
            assert not kept.any() and float(lost[key]) == 1, key
            continue
        spectrum = torch.linalg.svdvals(update).square()
        assert float(lost[key]) == pytest.approx(float(spectrum[3:].sum() / spectrum.sum()), rel=1e-3)
        assert float((update - kept).square().sum() / spectrum.sum()) == pytest.approx(float(lost[key]), rel=1e-3)
    assert "have no place in it" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_low_rank_loses_energy_and_says_how_much(tmp_path, capsys):
    _, where, others, _ = made_by_peft(tmp_path, "llama", lora)
    arguments = ["--base", where, "--experts", *others, "--method", "ties", "--output", "adapter", "--rank", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(t.dtype == torch.bfloat16 and 2 in t.shape for t in tensors.values())
    lines = (tmp_path / "out" / "energy_lost.csv").read_text().splitlines()[1:]
    assert len(lines) == 2 and all(0.05 < float(line.split(",")[3]) < 1 for line in lines)
    for told in ((tmp_path / "out" / "README.md").read_text(), capsys.readouterr().err):
        assert "% of the merged update's energy is not in the adapter (energy_lost.csv)" in told


# Names ----------------------------------------------------------------------------------------------------------------


def llava():
    vision = transformers.CLIPVisionConfig(**TEXT | dict(image_size=8, patch_size=4))
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=vision, image_token_index=39
    )
    return transformers.LlavaForConditionalGeneration(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT))


@pytest.mark.parametrize("make, targets, saved", [
    (llava, r".*(language_model.*q_proj|vision.*v_proj|linear_1)", None),
    (bert, r".*query", ["LayerNorm"]),
])  # fmt: skip
def test_adapters_fit_a_base_that_is_stored_under_older_names(tmp_path, make, targets, saved):
    torch.manual_seed(0)
    base = randomised(make(), 0)
    base.save_pretrained(tmp_path / "base", save_original_format=True)
    path = tmp_path / "base" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = load_file(path)
    state = {re.sub("|".join(old), lambda found: old[found[0]], name): value for name, value in state.items()}
    assert not state.keys() <= base.state_dict().keys()
    save_file(state, path, {"format": "pt"})
    kind, folded = type(base), []
    for index in range(2):
        config = lora(targets, index, modules_to_save=saved)
        model = randomised(peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), config), index + 1)
        model.save_pretrained(tmp_path / f"e{index}")
        folded.append(model.merge_and_unload().state_dict())
    others = (str(tmp_path / "e0"), str(tmp_path / "e1"))
    merge(Recipe(str(tmp_path / "base"), others, "weight_average", strict=True), tmp_path / "out")
    expected = {name: (folded[0][name] + folded[1][name]) / 2 for name in folded[0]}
    assert_close(kind.from_pretrained(tmp_path / "out").state_dict(), expected)


# Interruptions and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"output": "adapter", "rank": 3}], ids=str)
def test_a_killed_merge_of_adapters_continues_and_ends_bit_identical(tmp_path, options):
    _, where, others, _ = made_by_peft(tmp_path, "bert", lora)
    recipe = Recipe(where, others, "tsv_m", svc=True, report=True, **options)
    merge(recipe, tmp_path / "whole")
    for count in (0, 1, 2, 0, 3):

        def work(count=count):
            with killed("pwrite", count):
                merge(recipe, tmp_path / "out")

        assert in_fork(work) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    merge(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole") and not list(tmp_path.glob(".out*"))
    assert (tmp_path / "out" / "report" / "matrices.csv").read_bytes().count(b"\n") == 4


def test_the_same_recipe_does_nothing_and_another_scale_of_an_adapter_is_another_merge(tmp_path, capsys):
    _, where, others, _ = made_by_peft(tmp_path, "llama", lora)
    arguments = ["--base", where, "--experts", *others, "--method", "star", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(["--recipe", str(tmp_path / "out" / "merging.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert "has made it already" in capsys.readouterr().out
    file = tmp_path / "e0" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 64}))
    assert main(arguments) == 1 and "or of other input files" in capsys.readouterr().err


def test_heads_of_adapters_are_left_out_where_the_base_has_none(tmp_path):
    config = lambda targets, index: lora(targets, index, modules_to_save=["classifier"])  # noqa: E731
    base, _, others, _ = made_by_peft(tmp_path, "bert", config, count=2)
    encoder = transformers.BertModel(base.config, add_pooling_layer=False)
    encoder.load_state_dict(base.bert.state_dict(), strict=False)
    encoder.save_pretrained(tmp_path / "encoder")  # its names lack the prefix "bert."
    merge(Recipe(str(tmp_path / "encoder"), others, "plain_sum"), tmp_path / "out")
    merge(Recipe(str(tmp_path / "base"), others, "plain_sum"), tmp_path / "full")
    full = weights(tmp_path / "full")
    assert all(torch.equal(tensor, full[f"bert.{name}"]) for name, tensor in weights(tmp_path / "out").items())
    assert "classifier.weight' (2 tensors, " in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"--strict: .*e0: 'classifier\.bias', .*left out"):
        merge(Recipe(str(tmp_path / "encoder"), others, "plain_sum", strict=True), tmp_path / "strict")


def spoiled(folder, **config):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def _replaced(folder, name, tensor):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = [key for key in tensors if name in key]
    save_file(tensors | {key: tensor}, file)


def _alone(folder, *tensors):
    """Let an adapter hold only the given names and tensors."""
    held = {f"base_model.model.model.{name}": tensor for name, tensor in zip(tensors[::2], tensors[1::2], strict=True)}
    save_file(held, folder / "adapter_model.safetensors")


def _linked(folder, name):
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def _full_instead(folder):
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")


@pytest.mark.parametrize("spoil, options, message", [
    (lambda f: spoiled(f / "e1", use_dora=True), {}, r"e1/adapter_config\.json: LoRA with DoRA"),
    (lambda f: spoiled(f / "e1", peft_type="LOHA"), {}, r"e1/adapter_config\.json: adapters of kind LOHA"),
    (lambda f: spoiled(f / "e1", r=7), {}, r"e1/adapter_model\.safetensors, .*are not of rank 7"),
    (lambda f: spoiled(f / "e1", fan_in_fan_out=True), {}, r"down_proj\.weight'.*adapters differ in how it is stored"),
    (lambda f: _replaced(f / "e1", "q_proj.lora_A", torch.full((3, 16), torch.nan)), {},
     r"e1/adapter_model\.safetensors: '.*q_proj\.lora_A\.weight': 48 entries are NaN"),
    (lambda f: _replaced(f / "e1", "q_proj.lora_A", torch.ones(3, 12)), {},
     r"e1/adapter_model\.safetensors: .*q_proj\.lora_B.*: an update of shape \[16, 12\], and \[16, 16\] in .*base"),
    (lambda f: (f / "e1" / "adapter_model.safetensors").write_bytes(b"12345678901"), {}, r"no complete safetensors"),
    (lambda f: (f / "e1" / "adapter_config.json").unlink(), {}, r"e1: holds an adapter without adapter_config\.json"),
    (lambda f: _alone(f / "e1"), {}, r"e1/adapter_model\.safetensors: holds no tensor, so nothing of its training"),
    (lambda f: _replaced(f / "e1", "q_proj.lora_A", torch.ones(0)), {},
     r"e1/adapter_model\.safetensors, '.*q_proj\.lora_A\.weight': shape \[0\], no entries: .* ZeRO-3 .*zero_to_fp32"),
    (lambda f: _alone(f / "e1", "embed_tokens.weight", torch.ones(44, 16)), {},
     r"e1/.*embed_tokens\.weight': 44 rows, and .* in .*base has 40: .*resized; .*resize_token_embeddings\(44\)"),
    (lambda f: _alone(f / "e1", "embed_tokens.lora_embedding_A", torch.ones(3, 44), "embed_tokens.lora_embedding_B",
                      torch.ones(16, 3)), {}, r"e1/.*: 44 rows, and .* has 40: .*resize_token_embeddings\(44\)"),
    (lambda f: spoiled(f / "e1", r="3"), {}, r"e1/adapter_config\.json: r is '3', and must be a positive number"),
    (lambda f: spoiled(f / "e1", r=0), {}, r"e1/adapter_config\.json: r is 0, and must be"),
    (lambda f: spoiled(f / "e1", lora_alpha=[1]), {}, r"e1/adapter_config\.json: lora_alpha is \[1\]"),
    (lambda f: spoiled(f / "e1", rank_pattern=[1]), {}, r"e1/adapter_config\.json: rank_pattern is \[1\], and must"),
    (lambda f: spoiled(f / "e1", alpha_pattern={"(": 1}), {}, r"alpha_pattern: '\(' is no pattern"),
    (lambda f: spoiled(f / "e1", peft_type=["LORA"]), {}, r"e1/adapter_config\.json: adapters of kind \['LORA'\]"),
    (lambda f: spoiled(f / "e1", init_lora_weights=["x"]), {}, r"e1/adapter_config\.json: init_lora_weights=\['x'\]"),
    (lambda f: (f / "e1" / "adapter_config.json").write_text("[]"), {}, r"e1/adapter_config\.json: is no mapping"),
    (lambda f: (f / "e1" / "adapter_config.json").write_text("[" * 100_000), {}, r"adapter_config\.json: is no sound"),
    (lambda f: _linked(f / "e1", "adapter_model.safetensors"), {}, r"adapter_model\.safetensors: is a link to .*"),
    (lambda f: _linked(f / "e1", "adapter_config.json"), {}, r"adapter_config\.json: is a link to .*outside"),
    (lambda f: _full_instead(f / "e1"), {}, r"e1 has an .*, but no .*; to merge its full weights .*, remove ad"),
    (lambda f: None, {"output": "adapter"}, r"--output adapter: give --rank"),
    (lambda f: None, {"rank": 4}, r"--rank 4: at least 1, and with --output adapter only"),
    (lambda f: None, {"svc": True, "space": "input", "method": "iso_c"}, r"--space input: .* output space only"),
])  # fmt: skip
def test_what_is_wrong_with_an_adapter_is_said_in_one_line(tmp_path, spoil, options, message, capsys):
    _, where, others, _ = made_by_peft(tmp_path, "llama", lora)
    spoil(tmp_path)
    flags = [text for key, value in ({"method": "tsv_m"} | options).items()
             for text in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]  # fmt: skip
    assert main(["--base", where, "--experts", *others, *flags, "--out", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m merging: ")]
    assert len(said) == 1 and re.search(message, said[0]), said
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_full_weights_is_taken_and_that_is_said(tmp_path, capsys):
    """As transformers and peft do: from_pretrained on such a folder loads the adapter on its base."""
    base, where, others, _ = made_by_peft(tmp_path, "llama", lora, count=2)
    command = ["--base", where, "--experts", *others, "--method", "weight_average"]
    assert main([*command, "--out", str(tmp_path / "plain")]) == 0
    save_file(
        {name: torch.zeros_like(t) for name, t in base.state_dict().items()}, tmp_path / "e1" / "model.safetensors"
    )
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = "e1: holds an adapter and full weights; the adapter is taken; left aside: model.safetensors"
    assert said in capsys.readouterr().err and said in (tmp_path / "out" / "README.md").read_text()
    assert_equal(weights(tmp_path / "out"), weights(tmp_path / "plain"))
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    assert main([*command, "--out", str(tmp_path / "third")]) == 1
    assert "base: is a peft adapter, which only an expert can be; " in (said := capsys.readouterr().err)
    assert "or remove adapter_config.json to take its full weights (model.safetensors.index.json)" in said


def test_kinds_cannot_be_mixed_and_an_adapter_is_no_base(tmp_path):
    _, where, loras, _ = made_by_peft(tmp_path, "llama", lora)
    _, _, vectors, _ = made_by_peft(tmp_path / "other", "llama", ia3)
    with pytest.raises(ValueError, match="--experts: adapters of one kind can be merged, got ia3 and lora"):
        merge(Recipe(where, (loras[0], vectors[0]), "tsv_m"), tmp_path / "out")
    with pytest.raises(ValueError, match="base: is no adapter, and other experts are"):
        merge(Recipe(where, (loras[0], where), "tsv_m"), tmp_path / "out")
    with pytest.raises(ValueError, match="e0: is a peft adapter, which only an expert can be"):
        merge(Recipe(loras[0], loras, "tsv_m"), tmp_path / "out")
    with pytest.raises(ValueError, match="--rank: IA³ has no rank"):
        merge(Recipe(where, vectors, "tsv_m", output="adapter", rank=4), tmp_path / "out")


def test_a_dry_run_of_adapters_says_what_would_be_done(tmp_path, capsys):
    _, where, others, _ = made_by_peft(tmp_path, "gpt2", lora)
    arguments = ["--base", where, "--experts", *others, "--method", "tsv_m", "--svc", "--dry-run"]
    assert main(arguments) == 0
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert said["transformer.h.0.attn.c_attn.weight"].endswith("tsv_m, SVC, low rank")
    assert said["transformer.ln_f.weight"].endswith("the base's value")
    assert main([*arguments, "--output", "adapter", "--rank", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("8 tensors")
