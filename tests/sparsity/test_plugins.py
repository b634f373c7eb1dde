"""Plug-ins: what they compute, what they leave alone, and that their constraints hold after every step of anybody."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsity.activations import JSReLU, Mixture
from sparsity.blocks import LAYOUTS, Layout, find_blocks
from sparsity.plugins import PROTOCOLS, parameter_groups, sparsify

FINE_TUNING = dict(mixing_steps=2, uplift_steps=4)
TORCH_LAYER = Layout("torch", "linear1", "linear1", "activation", "linear2", norms=("norm2",))


def zeroth_biases(model):
    return {name: parameter for name, parameter in model.named_parameters() if "zeroth_bias" in name}


def randomise(model, scale=1.0):
    """Give the zeroth biases values that matter."""
    with torch.no_grad():
        for bias in zeroth_biases(model).values():
            bias.normal_(std=scale)


def disturb(model, layouts=LAYOUTS):
    """Break all bounds, so that what holds after the next step, that step has restored."""
    randomise(model)
    with torch.no_grad():
        for norm in norms(model, layouts):
            norm.weight.uniform_(0.2, 1.8)


def norms(model, layouts=LAYOUTS):
    return [block.norm for block in find_blocks(model, layouts)]


def assert_bounded(model, layouts=LAYOUTS):
    """Every weight is at least 1, every bias within 0.1 |w|; and both bind somewhere, or the test shows nothing."""
    weights = [norm.weight.detach() for norm in norms(model, layouts)]
    biases = [bias.detach() for bias in zeroth_biases(model).values()]
    assert len(weights) == len(biases) > 0
    for weight, bias in zip(weights, biases, strict=True):
        limit = 0.1 * weight.abs()
        assert (weight >= 1).all() and (bias.abs() <= limit).all()
    assert any((weight == 1).any() for weight in weights)
    assert any((bias.abs() == 0.1 * weight.abs()).any() for weight, bias in zip(weights, biases, strict=True))


# What is installed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["input", "output"])
def test_zeroth_biases_are_added_where_the_placement_says(tiny, placement):
    model = sparsify(tiny.model, None, placement=placement, restricted_norm=False, clip=None)
    randomise(model)
    seen = []

    def check(block):
        def entrance(module, args, kwargs):
            seen.append(args[0])

        def key(module, args):
            bias = block.entrance.zeroth_bias[: args[0].shape[1]] if placement == "input" else 0
            torch.testing.assert_close(args[0], seen[-1] + bias)

        def value(module, args, output):
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T  # GPT-2's Conv1D
            bias = block.value.zeroth_bias[: output.shape[1]] if placement == "output" else 0
            torch.testing.assert_close(output, F.linear(args[0], weight, module.bias) + bias)
            seen.append(None)

        block.entrance.register_forward_pre_hook(entrance, with_kwargs=True)
        block.key.register_forward_pre_hook(key)
        block.value.register_forward_hook(value)

    for block in find_blocks(model):
        check(block)
    tiny.output()
    assert len(seen) == 2 * tiny.blocks
    assert [bias.shape[0] for bias in zeroth_biases(model).values()] == [tiny.tokens] * tiny.blocks


def test_paths_names_and_classes_stay(tiny):
    before = copy.deepcopy(tiny.model)
    model = sparsify(tiny.model)
    assert model is tiny.model
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    new = set(model.state_dict()) - set(before.state_dict())
    assert new == {*zeroth_biases(model), "sparsity_plugins"} and set(before.state_dict()) <= set(model.state_dict())
    for (name, old), new in zip(before.named_modules(), model.modules(), strict=True):
        assert isinstance(new, type(old)) or name.endswith(("act", "act_fn"))
        assert type(new).__name__ == type(old).__name__ or isinstance(new, JSReLU)
    assert all(isinstance(block.activation, JSReLU) for block in find_blocks(model))
    assert "zeroth_bias=(" in repr(model)


def test_biases_of_restricted_norms_become_buffers_of_the_same_name(tiny):
    with torch.no_grad():
        for norm in norms(tiny.model):
            norm.weight.uniform_(0.5, 1.5)
            if tiny.name != "t5":
                norm.bias.normal_()
    before, fine_tuned = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model)
    sparsify(tiny.model)
    sparsify(fine_tuned, **FINE_TUNING)
    for old, new, tuned in zip(norms(before), norms(tiny.model), norms(fine_tuned), strict=True):
        assert torch.equal(new.weight, old.weight.clamp(min=1)) and torch.equal(tuned.weight, old.weight)
        if tiny.name == "t5":
            assert not hasattr(new, "bias")
        else:
            assert "bias" in dict(new.named_buffers()) and not new.bias.any()
            assert "bias" in dict(tuned.named_buffers()) and torch.equal(tuned.bias, old.bias)
    tiny.train(torch.optim.SGD(fine_tuned.parameters(), lr=0.1), model=fine_tuned)
    for old, tuned in zip(norms(before), norms(fine_tuned), strict=True):
        assert tiny.name == "t5" or torch.equal(tuned.bias, old.bias)


def test_each_plug_in_can_be_left_out(build):
    plain, modified = build("vit"), build("vit")
    sparsify(modified.model, None, zeroth_bias=False, restricted_norm=False)
    assert torch.equal(plain.output(), modified.output())
    assert plain.model.state_dict().keys() == modified.model.state_dict().keys()
    only_activation = sparsify(build("vit").model, "squared_relu", zeroth_bias=False, restricted_norm=False)
    for block in find_blocks(plain.model):
        block.activation.forward = lambda x: torch.relu(x).square()
    torch.testing.assert_close(plain.output(), plain.output(only_activation))


def test_post_norm_restricts_the_residual_too(build):
    tiny = build("bert")
    layer = sparsify(tiny.model).bert.encoder.layer[0]
    tiny.train(torch.optim.SGD(tiny.model.parameters(), lr=1.0), 2)
    assert (layer.attention.output.LayerNorm.weight >= 1).all() and not layer.attention.output.LayerNorm.bias.any()


# Positions -----------------------------------------------------------------------------------------------------------


def test_positions_are_inferred():
    import open_clip
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import VisionTransformer as TorchvisionViT
    from transformers import CLIPConfig, CLIPModel, DeiTConfig, DeiTModel

    narrow = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    image = dict(image_size=12, patch_size=4)
    vision = CLIPConfig(text_config=narrow | dict(max_position_embeddings=7), vision_config=narrow | image)
    tower = dict(layers=1, width=16, image_size=12, patch_size=4, head_width=8)
    models = {
        13: VisionTransformer(img_size=12, patch_size=4, embed_dim=16, depth=1, num_heads=2, reg_tokens=3),
        10: TorchvisionViT(12, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32),
        11: DeiTModel(DeiTConfig(**narrow, **image)),
    }
    for tokens, model in models.items():
        assert [len(bias) for bias in zeroth_biases(sparsify(model)).values()] == [tokens]
    clip = zeroth_biases(sparsify(CLIPModel(vision)))
    assert {name.split("_")[0]: len(bias) for name, bias in clip.items()} == {"text": 7, "vision": 10}
    clip = open_clip.CLIP(16, tower, dict(context_length=5, vocab_size=9, width=16, heads=2, layers=1))
    clip = zeroth_biases(sparsify(clip))
    assert {name.split(".")[0]: len(bias) for name, bias in clip.items()} == {"visual": 10, "transformer": 5}


def test_longer_input_is_refused_and_shorter_takes_the_first_rows(build):
    tiny = build("bert")
    model = sparsify(tiny.model, tokens=6)
    randomise(model)
    ids = tiny.batch["input_ids"]
    with pytest.raises(
        ValueError, match=r"bert.encoder.layer.0.intermediate: a sequence of 7 tokens is longer than the 6"
    ):
        model(ids[:, [0, *range(6)]])
    cut = build("bert")
    cut.model = sparsify(cut.model, tokens=4)
    cut.model.load_state_dict(
        {name: tensor[:4] if "zeroth_bias" in name else tensor for name, tensor in model.state_dict().items()}
    )
    torch.testing.assert_close(model(ids[:, :4]).logits, cut.model(ids[:, :4]).logits)


def test_a_map_of_tokens_is_read_row_by_row():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    sparsify(layer, tokens=12, restricted_norm=False, clip=None, layouts=[TORCH_LAYER])
    randomise(layer)
    tokens = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(layer.linear1(tokens).flatten(1, 2), layer.linear1(tokens.flatten(1, 2)))
    with pytest.raises(ValueError, match=r"linear1: a zeroth bias needs tokens \(B, T, d\), got \(6, 8\)"):
        layer.linear1(torch.randn(6, 8))


@pytest.mark.parametrize("placement", ["input", "output"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_generation_with_and_without_cache_is_the_same(build, name, beams, placement):
    tiny = build(name)
    model = sparsify(tiny.model, placement=placement).eval()
    randomise(model)
    options = dict(
        max_new_tokens=8, min_new_tokens=8, num_beams=beams, return_dict_in_generate=True, output_logits=True
    )
    with_cache = model.generate(tiny.batch["input_ids"], use_cache=True, **options)
    without = model.generate(tiny.batch["input_ids"], use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), atol=1e-5, rtol=1e-5)
    copied = copy.deepcopy(model).generate(tiny.batch["input_ids"], use_cache=True, **options)
    assert torch.equal(copied.sequences, without.sequences)


def test_training_after_generation_starts_at_the_first_row_again(build):
    tiny = build("gpt2")
    model = sparsify(tiny.model)
    randomise(model)
    before = tiny.output()
    model.generate(tiny.batch["input_ids"], max_new_tokens=4)
    assert torch.equal(tiny.output(), before)


def test_generation_beyond_the_rows_is_refused(build):
    tiny = build("gpt2")
    model = sparsify(tiny.model, tokens=8)
    with pytest.raises(ValueError, match=r"transformer.h.0.mlp: a sequence of 9 tokens is longer than the 8 rows"):
        model.generate(tiny.batch["input_ids"], max_new_tokens=8, min_new_tokens=8)


def test_a_static_cache_counts_as_well(build):
    tiny = build("gpt2")
    model = sparsify(tiny.model).eval()
    randomise(model)
    options = dict(max_new_tokens=6, min_new_tokens=6)
    static = model.generate(tiny.batch["input_ids"], cache_implementation="static", **options)
    assert torch.equal(static, model.generate(tiny.batch["input_ids"], use_cache=False, **options))


# Constraints ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=1.0, foreach=True),
    "Adam, fused": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.3),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_constraints_hold_after_every_step(tiny, name):
    optimizer = OPTIMIZERS[name](sparsify(tiny.model).parameters())
    for _ in range(3):
        disturb(tiny.model)
        tiny.train(optimizer)
        assert_bounded(tiny.model)


@pytest.mark.parametrize("placement", ["input", "output"])
def test_a_step_is_plain_sgd_then_the_norm_then_the_bias(tiny, placement):
    model = sparsify(tiny.model, placement=placement)
    randomise(model, 0.1)
    for _ in range(3):
        tiny.model.zero_grad()
        tiny.loss().backward()
        moved = {name: parameter - 0.5 * parameter.grad for name, parameter in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        for block in find_blocks(model):
            holder = block.entrance if placement == "input" else block.value
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            weight = moved[names[id(block.norm.weight)]].clamp(min=1)
            bias = torch.clamp(moved[names[id(holder.zeroth_bias)]], -0.1 * weight, 0.1 * weight)
            torch.testing.assert_close(block.norm.weight.detach(), weight, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(holder.zeroth_bias.detach(), bias, rtol=1e-6, atol=1e-7)
            for untouched in (block.key.weight, block.value.weight):
                torch.testing.assert_close(untouched.detach(), moved[names[id(untouched)]], rtol=1e-6, atol=1e-7)


def test_without_clipping_and_with_other_clips(build):
    free, tight = build("vit"), build("vit")
    for tiny, clip in ((free, None), (tight, 0.01)):
        randomise(sparsify(tiny.model, clip=clip))
        tiny.train(torch.optim.SGD(tiny.model.parameters(), lr=1.0), 3)
    largest = [max(bias.abs().max() for bias in zeroth_biases(tiny.model).values()) for tiny in (free, tight)]
    assert largest[0] > 0.1 and largest[1] <= 0.01 * max(norm.weight.max() for norm in norms(tight.model))


def test_the_clip_follows_a_norm_that_is_not_restricted(build):
    tiny = build("vit")
    sparsify(tiny.model, restricted_norm=False)
    tiny.train(torch.optim.AdamW(tiny.model.parameters(), lr=0.3, weight_decay=1.0), 3)
    for block in find_blocks(tiny.model):
        assert block.norm.weight.min() < 1 and isinstance(block.norm.bias, nn.Parameter)
        assert (block.entrance.zeroth_bias.abs() <= 0.1 * block.norm.weight.abs() * (1 + 1e-6)).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("placement", ["input", "output"])
def test_copies_are_looked_after_like_the_model(tiny, placement, duplicate):
    model = sparsify(tiny.model, placement=placement)
    tiny.train(torch.optim.SGD(model.parameters(), lr=0.5))
    copied, output = duplicate(model), tiny.output()
    assert torch.equal(tiny.output(copied), output)
    again = duplicate(copied)
    del copied
    optimizer = torch.optim.SGD(again.parameters(), lr=0.5)
    for _ in range(2):
        disturb(again)
        tiny.train(optimizer, model=again)
        assert_bounded(again)
    assert torch.equal(tiny.output(), output)


def test_sparsified_models_are_not_kept_alive(build):
    tiny = build("gpt2")
    tiny.train(torch.optim.SGD(sparsify(tiny.model).parameters(), lr=0.1))
    gone = weakref.ref(tiny.model.transformer.h[0].mlp)
    del tiny
    gc.collect()
    assert gone() is None


def test_a_model_unpickled_in_a_new_process_is_looked_after(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.ReLU(), batch_first=True, norm_first=True)
    torch.save(sparsify(layer, tokens=5, layouts=[TORCH_LAYER]), tmp_path / "layer.pt")
    script = (
        "import sys, torch\n"
        "layer = torch.load(sys.argv[1], weights_only=False)\n"
        "layer(torch.ones(2, 5, 8).cumsum(1)).square().sum().backward()\n"
        "torch.optim.SGD(layer.parameters(), lr=1.0).step()\n"
        "bias, weight = layer.linear1.zeroth_bias, layer.norm2.weight\n"
        "print(float(weight.min()) >= 1, bool((bias.abs() <= 0.1 * weight).all()), bool(bias.any()))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "layer.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]


# Fine-tuning ---------------------------------------------------------------------------------------------------------


def small_norms(model):
    with torch.no_grad():
        for norm in norms(model):
            norm.weight.uniform_(-0.8, 1.2)
            norm.weight[0] = 0.0


def test_fine_tuning_begins_with_the_model_and_ends_with_the_plug_ins(tiny, build):
    small_norms(tiny.model)
    vanilla = copy.deepcopy(tiny.model)
    model = sparsify(build(tiny.name).model, **FINE_TUNING)
    model.load_state_dict(vanilla.state_dict())
    assert torch.equal(tiny.output(model), tiny.output(vanilla))
    tiny.train(torch.optim.SGD(model.parameters(), lr=0.05), 4, model)
    for block in find_blocks(model):
        assert isinstance(block.activation, Mixture) and block.activation.mixing == 1
        assert (block.norm.weight.abs() >= 1).all()
    exact = sparsify(build(tiny.name).model)
    state = {name: t for name, t in model.state_dict().items() if not name.endswith(("schedule_step", "mixing"))}
    exact.load_state_dict(state)
    assert torch.equal(tiny.output(model), tiny.output(exact))


def test_fine_tuning_schedules_step_by_step(build):
    tiny = build("gpt2")
    small_norms(tiny.model)
    model = sparsify(tiny.model, **FINE_TUNING)
    block = find_blocks(model)[0]
    for step in range(1, 7):
        tiny.model.zero_grad()
        tiny.loss().backward()
        weight = block.norm.weight.detach() - 0.05 * block.norm.weight.grad
        sign = torch.where(weight < 0, -1.0, 1.0)
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        expected = sign * torch.maximum(weight.abs(), torch.tensor(min(step / 4, 1)))
        torch.testing.assert_close(block.norm.weight.detach(), expected, rtol=1e-6, atol=1e-7)
        assert block.activation.mixing == min(step / 2, 1) and block.layer.schedule_step == step
        x = torch.randn(9)
        k = min(step / 2, 1)
        torch.testing.assert_close(block.activation(x), (1 - k) * x.relu() + k * JSReLU()(x))


def test_fine_tuning_goes_on_after_save_and_resume(build, tmp_path):
    whole, first, second = (build("t5") for _ in range(3))
    for tiny in (whole, first, second):
        torch.manual_seed(1)
        small_norms(tiny.model)
        sparsify(tiny.model, **FINE_TUNING)
    optimizers = [torch.optim.AdamW(tiny.model.parameters(), lr=0.02) for tiny in (whole, first, second)]
    whole.train(optimizers[0], 5)
    first.train(optimizers[1], 3)
    torch.save({"model": first.model.state_dict(), "optimizer": optimizers[1].state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt")
    second.model.load_state_dict(saved["model"])
    optimizers[2].load_state_dict(saved["optimizer"])
    assert torch.equal(first.output(), second.output())
    second.train(optimizers[2], 2)
    state = second.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())
    assert state["decoder.block.0.layer.2.schedule_step"] == 5


def test_a_model_of_before_loads_strictly_and_leaves_the_schedule(tiny):
    vanilla = copy.deepcopy(tiny.model).state_dict()
    model = sparsify(tiny.model, **FINE_TUNING)
    randomise(model)
    tiny.train(torch.optim.SGD(model.parameters(), lr=0.1))
    model.load_state_dict(vanilla, strict=True)
    assert not any(bias.any() for bias in zeroth_biases(model).values())
    for block in find_blocks(model):
        assert block.layer.schedule_step == 1 and block.activation.mixing == 0.5
    missing = next(name for name in vanilla if name.endswith("weight"))
    del vanilla[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        model.load_state_dict(vanilla)


def test_each_schedule_may_stand_alone(build):
    lifted, mixed = build("vit"), build("vit")
    sparsify(lifted.model, None, zeroth_bias=False, uplift_steps=2)
    sparsify(mixed.model, zeroth_bias=False, restricted_norm=False, mixing_steps=2)
    for tiny in (lifted, mixed):
        tiny.train(torch.optim.SGD(tiny.model.parameters(), lr=0.1))
        assert find_blocks(tiny.model)[0].layer.schedule_step == 1
    assert find_blocks(mixed.model)[1].activation.mixing == 0.5


def test_schedules_advance_once_a_round(build):
    tiny = build("vit")
    model = sparsify(tiny.model, **FINE_TUNING)
    block = find_blocks(model)[0]
    weights = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    others = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    first, second = torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(others, lr=0.1)
    elsewhere = torch.optim.SGD(model.head.parameters(), lr=0.1)
    tiny.loss().backward()
    counts = []
    for optimizer in (first, second, elsewhere, first, elsewhere, second, second, second, first):
        optimizer.step()
        counts.append(int(block.layer.schedule_step))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 4, 4]


def test_the_rest_of_the_block_may_be_frozen(build):
    tiny = build("vit")
    small_norms(tiny.model)
    model = sparsify(tiny.model, **FINE_TUNING)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("zeroth_bias" in name)
    tiny.train(torch.optim.SGD(zeroth_biases(model).values(), lr=0.1), 4)
    assert all((norm.weight.abs() >= 1).all() for norm in norms(model))


def test_a_step_that_the_scaler_skips_does_not_count(build):
    tiny = build("vit")
    sparsify(tiny.model, **FINE_TUNING)
    optimizer, scaler = torch.optim.SGD(tiny.model.parameters(), lr=0.5), torch.amp.GradScaler("cpu")
    counts = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(tiny.loss() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append(int(find_blocks(tiny.model)[0].layer.schedule_step))
    assert counts == [1, 1, 2]


# Under other people's tools ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, placement", [("vit", "input"), ("bert", "output")])
def test_compiled_whole(build, name, placement):
    tiny, eager = build(name), build(name)
    for one in (tiny, eager):
        sparsify(one.model, placement=placement, **FINE_TUNING)
    compiled = torch.compile(tiny.model, fullgraph=True, backend="aot_eager")
    tiny.train(torch.optim.SGD(compiled.parameters(), lr=0.2), 3, compiled)
    eager.train(torch.optim.SGD(eager.model.parameters(), lr=0.2), 3)
    torch.testing.assert_close(tiny.output(compiled), eager.output(), atol=1e-5, rtol=1e-5)
    assert find_blocks(tiny.model)[0].activation.mixing == 1


@pytest.mark.parametrize("placement", ["input", "output"])
def test_bf16_autocast(tiny, build, placement):
    plain, model = build(tiny.name), sparsify(tiny.model, placement=placement)
    kinds = {}
    for name, one in (("plain", plain.model), ("sparsified", model)):
        for block in find_blocks(one):
            block.value.register_forward_hook(
                lambda module, args, z, name=name: kinds.setdefault(name, []).append(z.dtype)
            )
        with torch.autocast("cpu", torch.bfloat16):
            kinds.setdefault(name, []).append(tiny.output(one).dtype)
    assert kinds["plain"] == kinds["sparsified"] and torch.bfloat16 in kinds["plain"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        disturb(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = tiny.loss()
        loss.backward()
        optimizer.step()
        assert_bounded(model)


def test_parameters_in_bf16(build):
    tiny = build("gpt2")
    model = sparsify(tiny.model.bfloat16(), **FINE_TUNING)
    tiny.train(torch.optim.SGD(model.parameters(), lr=0.5), 4)
    for block in find_blocks(model):
        bias, weight = block.entrance.zeroth_bias, block.norm.weight
        assert bias.dtype == torch.bfloat16 and bias.any() and (weight.abs() >= 1).all()
        assert (bias.abs() <= (0.1 * weight.abs()).to(bias.dtype)).all()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_gradient_checkpointing(build, name, reentrant):
    tiny, checkpointed = build(name), build(name)
    for one in (tiny, checkpointed):
        torch.manual_seed(1)
        randomise(sparsify(one.model), 0.1)
        one.model.train()
    checkpointed.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for one in (tiny, checkpointed):
        torch.manual_seed(2)
        disturb(one.model)
        one.train(torch.optim.SGD(one.model.parameters(), lr=0.1))
        assert_bounded(one.model)
    for (name, one), other in zip(tiny.model.named_parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_distributed_data_parallel(build, tmp_path):
    tiny = build("gpt2")
    sparsify(tiny.model, **FINE_TUNING)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", world_size=1, rank=0)
    try:
        parallel = nn.parallel.DistributedDataParallel(tiny.model)
        disturb(tiny.model)
        tiny.train(torch.optim.AdamW(parallel.parameters(), lr=0.1), 4, parallel)
    finally:
        torch.distributed.destroy_process_group()
    assert_bounded(tiny.model)
    assert find_blocks(tiny.model)[0].layer.schedule_step == 4


def test_accelerate(build):
    from accelerate import Accelerator

    tiny = build("vit")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = sparsify(tiny.model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(tiny.loss(model))
            disturb(tiny.model)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            assert_bounded(tiny.model)
    assert accelerator.sync_gradients


def test_trainer(build, tmp_path):
    from transformers import Trainer, TrainingArguments

    tiny = build("gpt2")
    model = sparsify(tiny.model, **FINE_TUNING)
    rows = [{name: tensor[i] for name, tensor in tiny.batch.items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=0.3, per_device_train_batch_size=2, weight_decay=1.0, use_cpu=True,
        report_to=[], save_steps=4, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    assert_bounded(model)
    assert find_blocks(model)[0].layer.schedule_step == 4
    resumed = build("gpt2")
    sparsify(resumed.model, **FINE_TUNING)
    from safetensors.torch import load_file

    state = load_file(next(tmp_path.glob("checkpoint-4/model.safetensors")))
    resumed.model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    assert torch.equal(tiny.output(model.eval()), tiny.output(resumed.model.eval()))


def test_everything_decays_in_the_trainer_of_transformers_with_an_optimizer_of_ones_own(build, tmp_path):
    """By its own rule it spares norms and all that is called bias; the README says what to pass instead."""
    from transformers import Trainer, TrainingArguments

    tiny = build("gpt2")
    model = sparsify(tiny.model)
    rows = [{name: tensor[i] for name, tensor in tiny.batch.items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, per_device_train_batch_size=2, weight_decay=1.0, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip

    def decayed(trainer):
        groups = trainer.optimizer.param_groups
        by_id = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        return {name for name, parameter in model.named_parameters() if by_id[id(parameter)]}

    plain = Trainer(model, arguments, train_dataset=rows)
    plain.create_optimizer()
    assert not [name for name in decayed(plain) if "bias" in name or ".ln_" in name]

    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=1.0), lr=0.1)
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    named = {name for name, _ in model.named_parameters()}
    assert named - decayed(trainer) == {name for name in named if "zeroth_bias" in name} != set()
    assert {name for name in named if ".ln_" in name} <= decayed(trainer)
    assert trainer.state.global_step == 2
    assert_bounded(model)


# Layers of one's own -------------------------------------------------------------------------------------------------


class OwnLayer(nn.Module):
    """An MLP that nothing encloses, with a functional activation or another norm if one asks for it."""

    def __init__(self, act=None, norm=None):
        super().__init__()
        self.norm = nn.LayerNorm(8) if norm is None else norm
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU() if act is None else act, nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


OWN = Layout("own", "up", "up", "act", "down", norms=("norm",))


def test_a_layout_of_ones_own():
    model = nn.Sequential(OwnLayer(), OwnLayer())
    sparsify(model, tokens=3, layouts=[OWN, *LAYOUTS])
    randomise(model)
    x = torch.randn(2, 3, 8)
    expected = x
    for layer in model:
        normalised = F.layer_norm(expected, (8,)) + layer.up.zeroth_bias
        inner = F.linear(normalised, layer.up.weight, layer.up.bias)
        hidden = torch.where(inner > 0, inner + inner**2 / 2, 0)
        expected = expected + F.linear(hidden, layer.down.weight, layer.down.bias)
    torch.testing.assert_close(model(x), expected)
    disturb(model, [OWN])
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert_bounded(model, [OWN])


def test_torchs_own_layer_leaves_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    sparsify(layer, tokens=5, layouts=[TORCH_LAYER])
    randomise(layer)
    x = torch.randn(2, 5, 8)
    trained = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained)


def test_gated_mlps_take_zeroth_bias_and_restricted_norm():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                         max_position_embeddings=6)  # fmt: skip
    model = LlamaForCausalLM(config)
    message = r"model.layers.0.mlp: this MLP is gated \(Llama\).*'jsrelu'; pass activation=None"
    with pytest.raises(ValueError, match=message):
        sparsify(model)
    sparsify(model, None)
    ids = torch.randint(9, (2, 6))
    disturb(model)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert_bounded(model)


# Weight decay --------------------------------------------------------------------------------------------------------


def names_of(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


def test_parameter_groups(build):
    model = sparsify(build("vit").model)
    everything = {name for name, _ in model.named_parameters()}
    expected = {
        ("zeroth_bias",): lambda name: "zeroth_bias" in name,
        ("mlp_norms",): lambda name: "norm2" in name,
        ("norms",): lambda name: "norm" in name,
        ("biases",): lambda name: "bias" in name,
        ("vectors",): lambda name: model.get_parameter(name).ndim < 2,
        ("zeroth_bias", "mlp_norms"): lambda name: "zeroth_bias" in name or "norm2" in name,
    }
    for exempt, chosen in expected.items():
        groups = parameter_groups(model, 0.3, exempt)
        assert [(group["name"], group["weight_decay"]) for group in groups] == [("decayed", 0.3), ("exempt", 0.0)]
        found = names_of(model, groups)
        assert set(found["exempt"]) == {name for name in everything if chosen(name)}
        assert sorted(found["exempt"] + found["decayed"]) == sorted(everything)
        torch.optim.AdamW(groups)
    assert [group["name"] for group in parameter_groups(model, 0.3, PROTOCOLS["vit"])] == ["decayed"]


def test_parameter_groups_of_the_authors_t5_and_of_a_vanilla_model(build):
    model = build("t5").model
    exempt = names_of(model, parameter_groups(model, 1e-3, PROTOCOLS["t5"]))["exempt"]
    assert len(exempt) == 2 and all("relative_attention_bias" in name for name in exempt)
    found = names_of(model, parameter_groups(model, 1e-3, ("mlp_norms",)))
    assert len(found["exempt"]) == 4 and len([name for name in found["decayed"] if "norm" in name]) == 8
    sparsify(model)
    assert len(names_of(model, parameter_groups(model, 1e-3, PROTOCOLS["t5"]))["exempt"]) == 6
    model.requires_grad_(False)
    model.shared.weight.requires_grad_()
    assert names_of(model, parameter_groups(model, 1e-3)) == {"decayed": ["shared.weight"]}


def test_exempt_parameters_do_not_decay(build):
    model = sparsify(build("bert").model)
    randomise(model, 0.05)
    before = {name: bias.detach().clone() for name, bias in zeroth_biases(model).items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    key = model.bert.encoder.layer[0].intermediate.dense.weight
    shrunk = key.detach() * (1 - 0.1 * 0.5)
    torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1).step()
    torch.testing.assert_close(key.detach(), shrunk)
    for name, bias in zeroth_biases(model).items():
        assert torch.equal(bias, before[name].clamp(-0.1, 0.1))


# Bad input -----------------------------------------------------------------------------------------------------------


class GemmaNorm(nn.Module):
    """Scales by 1 + weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return F.rms_norm(x, (8,)) * (1 + self.weight)


@pytest.mark.parametrize("options, message", [
    ({"activation": "jsrelo"}, "unknown activation 'jsrelo', expected one of .*jsrelu"),
    ({"placement": "middle"}, "unknown placement 'middle', expected one of input, output"),
    ({"tokens": 0}, "tokens must be positive, got 0"),
    ({"clip": -1.0}, "clip must be a number ≥ 0, or None for no clipping, got -1.0"),
    ({"clip": float("nan")}, "clip must be a number"),
    ({"mixing_steps": -1}, "mixing_steps must be ≥ 0, got -1"),
    ({"uplift_steps": -2}, "uplift_steps must be ≥ 0, got -2"),
    ({"activation": None, "mixing_steps": 3}, "mixing_steps=3 needs an activation to mix in, got activation=None"),
    ({"uplift_steps": 3, "restricted_norm": False}, "uplift_steps=3 lifts restricted norms, got restricted_norm=False"),
    ({"layouts": LAYOUTS[:2]}, "no MLP block found in GPT2LMHeadModel"),
])  # fmt: skip
def test_options_out_of_range_are_named(build, options, message):
    model = build("gpt2").model
    before = repr(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsify(model, **options)
    assert (repr(model), list(model.state_dict())) == before


@pytest.mark.parametrize("layer, options, message", [
    (OwnLayer(), {}, "1.up: cannot infer the positions of Sequential; pass tokens="),
    (OwnLayer(norm=nn.LayerNorm(8, elementwise_affine=False)), {"tokens": 3},
     r"1.up: no norm with a weight was found that feeds this MLP \(own\).*pass restricted_norm=False, clip=None"),
    (OwnLayer(norm=nn.Identity()), {"tokens": 3, "restricted_norm": False}, "1.up: no norm with a weight was found"),
    (OwnLayer(norm=GemmaNorm()), {"tokens": 3}, r"1.up: GemmaNorm, the norm .*, does not scale by its weight"),
    (OwnLayer(act=torch.relu), {"tokens": 3, "mixing_steps": 2}, "1.up: a builtin_function_or_method is no module"),
])  # fmt: skip
def test_blocks_that_cannot_take_plug_ins_are_named_and_left_alone(layer, options, message):
    model = nn.Sequential(nn.Identity(), layer)
    before = repr(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsify(model, layouts=[OWN], **options)
    assert (repr(model), list(model.state_dict())) == before


def test_without_a_norm_bias_and_activation_can_be_had():
    model = sparsify(OwnLayer(norm=nn.Identity()), tokens=3, restricted_norm=False, clip=None, layouts=[OWN])
    assert model.up.zeroth_bias.shape == (3, 8) and isinstance(model.act, JSReLU)


def test_plugging_twice_and_chunks_of_sequences_are_refused(build):
    model = sparsify(build("t5").model)
    with pytest.raises(ValueError, match=r"encoder.block.0.layer.1.DenseReluDense: this MLP has its plug-ins already"):
        sparsify(model)
    model = build("bert").model
    model.bert.encoder.layer[1].chunk_size_feed_forward = 2
    with pytest.raises(
        ValueError, match=r"layer.1.intermediate: with chunk_size_feed_forward=2 .* pass zeroth_bias=False"
    ):
        sparsify(model)
    sparsify(model, zeroth_bias=False)


def test_unknown_exemptions_and_missing_norms_are_named(build):
    with pytest.raises(ValueError, match="unknown exemption 'norm', expected some of zeroth_bias, mlp_norms, norms"):
        parameter_groups(build("vit").model, 0.1, ("norm",))
    with pytest.raises(ValueError, match=r"up: no norm with a weight was found .*layouts="):
        parameter_groups(OwnLayer(norm=nn.Identity()), 0.1, ("mlp_norms",), layouts=[OWN])
