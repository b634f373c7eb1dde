"""Plug-ins under what other libraries do with modules: hooks, patched forwards, adapters, scalers, chunks, integers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import nn

from sparsity.blocks import find_blocks
from sparsity.plugins import sparsify
from sparsity.probes import probe

PLACEMENTS = ("input", "output")


def zeroth_biases(model):
    return [parameter for name, parameter in model.named_parameters() if "zeroth_bias" in name]


def randomise(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for bias in zeroth_biases(model):
            bias.normal_(std=0.5)


def targets(tiny, placement):
    """The modules that get the zeroth bias, before sparsify or after it."""
    return [block.entrance if placement == "input" else block.value for block in find_blocks(tiny.model)]


# Forwards on the instance --------------------------------------------------------------------------------------------


def hook(module):
    add_hook_to_module(module, ModelHook())


def hook_and_remove(module):
    add_hook_to_module(module, ModelHook())
    remove_hook_from_module(module)


def patched(module):
    """As libraries of fused kernels do: bound to the class's forward as it was."""
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("wrap", [hook, hook_and_remove, patched])
@pytest.mark.parametrize("order", ["before", "after", "around"])
def test_a_forward_of_the_instance_hides_no_zeroth_bias(tiny, build, placement, wrap, order):
    plain = build(tiny.name)
    sparsify(plain.model, placement=placement)
    if order != "after":
        for module in targets(tiny, placement):
            wrap(module)
    sparsify(tiny.model, placement=placement)
    if order != "before":
        for module in targets(tiny, placement):
            wrap(module)
    without = tiny.output()
    for one in (plain, tiny):
        randomise(one.model)
    torch.testing.assert_close(tiny.output(), plain.output())
    assert not torch.allclose(tiny.output(), without)


def test_hooks_removed_after_sparsify_leave_the_zeroth_bias(tiny, build):
    plain = build(tiny.name)
    sparsify(plain.model)
    for module in targets(tiny, "input"):
        hook(module)
    sparsify(tiny.model)
    for module in targets(tiny, "input"):
        remove_hook_from_module(module)
    for one in (plain, tiny):
        randomise(one.model)
    torch.testing.assert_close(tiny.output(), plain.output())


def test_dispatched_models_keep_their_zeroth_biases(build):
    from accelerate import dispatch_model

    plain, tiny = build("gpt2"), build("gpt2")
    sparsify(plain.model)
    dispatch_model(tiny.model, {"": "cpu"}, force_hooks=True)
    sparsify(tiny.model)
    for one in (plain, tiny):
        randomise(one.model)
    torch.testing.assert_close(tiny.output(), plain.output())
    torch.testing.assert_close(copy.deepcopy(plain.model)(**plain.batch).logits, plain.output())


# peft ----------------------------------------------------------------------------------------------------------------

ADAPTED = {  # family → linears of MLPs, norms that feed them
    "vit": (["fc1", "fc2"], ["norm2"]),
    "t5": (
        ["wi", "wo"],
        [f"{s}.block.{b}.layer.{i}.layer_norm" for s, i in (("encoder", 1), ("decoder", 2)) for b in (0, 1)],
    ),
    "bert": (["intermediate.dense", "output.dense"], ["attention.output.LayerNorm"]),
    "gpt2": (["c_fc", "mlp.c_proj"], ["ln_2"]),
}


def adapted(tiny, placement, order, **options):
    linears, norms = ADAPTED[tiny.name]
    config = LoraConfig(r=2, target_modules=linears, modules_to_save=norms, init_lora_weights=False)
    if order == "plug-ins first":
        return get_peft_model(sparsify(tiny.model, placement=placement, **options), config)
    model = get_peft_model(tiny.model, config)
    sparsify(model, placement=placement, **options)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("order", ["plug-ins first", "adapters first"])
def test_norms_in_modules_to_save_are_bounded(tiny, placement, order):
    model = adapted(tiny, placement, order)
    for name, parameter in model.named_parameters():
        if "zeroth_bias" in name:
            parameter.requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    used = []
    for block in find_blocks(model):
        block.norm.register_forward_hook(lambda norm, inputs, output: used.append(norm))
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        randomise(model)
        optimizer.zero_grad()
        tiny.loss(model).backward()
        optimizer.step()
    assert len(used) == 2 * tiny.blocks
    for norm in used:
        assert any(norm.weight is parameter for parameter in trained) and (norm.weight >= 1).all()
        assert (norm.weight > 1).any()
    for block in find_blocks(model):
        holder = block.entrance if placement == "input" else getattr(block.value, "base_layer", block.value)
        assert (holder.zeroth_bias.abs() <= 0.1 * block.norm.weight.abs() * (1 + 1e-6)).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("order", ["plug-ins first", "adapters first"])
def test_merging_adapters_keeps_the_zeroth_biases_and_the_outputs(tiny, placement, order):
    model = adapted(tiny, placement, order, mixing_steps=2, uplift_steps=4).eval()
    randomise(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    tiny.loss(model).backward()
    optimizer.step()
    before = tiny.output(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.output(merged), before, atol=1e-5, rtol=1e-4)
    assert len(zeroth_biases(merged)) == tiny.blocks
    blocks = find_blocks(merged)
    assert all(block.activation.mixing == 0.5 and block.layer.schedule_step == 1 for block in blocks)


def opt(**options):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=23, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=16, word_embed_proj_dim=16, dropout=0.0, **options)  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_around_the_entrance_itself_is_refused_by_name():
    config = LoraConfig(r=2, target_modules=["fc1"])
    model = get_peft_model(opt(), config)
    with pytest.raises(ValueError, match=r"layers.0.fc1: a zeroth bias before this linear would be lost"):
        sparsify(model)
    sparsify(model, placement="output")
    model = get_peft_model(sparsify(opt()), config)
    ids = torch.randint(2, 23, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(RuntimeError, match=r"layers.0.fc1: an adapter was put around this linear after sparsify"):
        torch.optim.SGD(trained, lr=0.1).step()


# Steps ---------------------------------------------------------------------------------------------------------------

SCHEDULES = dict(mixing_steps=4, uplift_steps=4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_the_scaler_skips_does_not_count(build, kind, fused):
    tiny = build("vit")
    sparsify(tiny.model, **SCHEDULES)
    optimizer, scaler = kind(tiny.model.parameters(), lr=1e-3, fused=fused), torch.amp.GradScaler("cpu")
    counts = []
    for factor in (1.0, float("inf"), float("nan"), 1.0):
        optimizer.zero_grad()
        scaler.scale(tiny.loss() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append(int(find_blocks(tiny.model)[0].layer.schedule_step))
    assert counts == [1, 1, 1, 2]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("options", [{}, SCHEDULES])
@pytest.mark.parametrize("frozen", ["", "norm", "bias"])
def test_optimizers_that_step_within_the_backward_pass(tiny, build, placement, options, frozen):
    after = build(tiny.name)
    for one in (tiny, after):
        sparsify(one.model, placement=placement, **options)
        for name, parameter in one.model.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name.lower())
    optimizers = {p: torch.optim.SGD([p], lr=0.3) for p in tiny.model.parameters() if p.requires_grad}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    usual = torch.optim.SGD([p for p in after.model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):
        tiny.loss().backward()
        after.train(usual)
    for one, other in zip(tiny.model.state_dict().items(), after.model.state_dict().items(), strict=True):
        torch.testing.assert_close(one[1], other[1], msg=one[0], rtol=1e-4, atol=1e-5)


# Checkpoints of before -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SCHEDULES])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_an_old_checkpoint_brings_no_bias_of_a_restricted_norm_back(build, name, options):
    tiny, later = build(name), build(name)
    with torch.no_grad():
        for block in find_blocks(tiny.model):
            block.norm.bias.normal_()
    state = tiny.model.state_dict()
    kept = copy.deepcopy(state)
    sparsify(later.model, **options)
    if options:
        later.model.load_state_dict(state)
        torch.testing.assert_close(later.output(), tiny.output())
    else:
        with pytest.warns(UserWarning, match="biases of norms that sparsify restricted; they stay zero"):
            later.model.load_state_dict(state)
        sparsify(tiny.model)
        torch.testing.assert_close(later.output(), tiny.output())
        assert not any(block.norm.bias.any() for block in find_blocks(later.model))
    assert all(torch.equal(state[key], kept[key]) for key in kept)


# MLPs that see tokens otherwise --------------------------------------------------------------------------------------


def test_flattened_tokens_get_the_bias_of_their_position():
    model = sparsify(opt()).eval()
    randomise(model)
    rows = []

    def added(key, inputs, output):
        rows.append((output - F.linear(inputs[0], key.weight, key.bias)).view(3, 5, -1))

    handles = [block.key.register_forward_hook(added) for block in find_blocks(model)]
    model(input_ids=torch.randint(2, 23, (3, 5)))
    for handle in handles:
        handle.remove()
    for block, samples in zip(find_blocks(model), rows, strict=True):
        for sample in samples:
            torch.testing.assert_close(sample, F.linear(block.entrance.zeroth_bias[:5], block.key.weight))
    ids = torch.randint(2, 23, (3, 4))
    options = dict(max_new_tokens=6, min_new_tokens=6)
    with_cache, without = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without)
    with pytest.raises(ValueError, match=r"layers.0.fc1: a sequence of 17 tokens is longer than the 16 rows"):
        model.model.decoder.layers[0](torch.randn(1, 17, 16))


class Chunked(nn.Module):
    """A layer whose MLP gets its tokens whole, in chunks along the sequence, or as one list."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.norm2, self.how, self.mlp = nn.LayerNorm(6), how, nn.Module()
        self.mlp = Mlp()

    def forward(self, x):
        y = self.norm2(x)
        if self.how == "chunks":
            return x + torch.cat([self.mlp(piece) for piece in y.split(2, 1)], 1)
        return x + (self.mlp(y.flatten(0, 1)).view(y.shape) if self.how == "list" else self.mlp(y))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("how", ["chunks", "list"])
def test_augmented_flatness_does_not_depend_on_how_the_mlp_gets_its_tokens(how, reduction):
    x = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.7
    tables = []
    for kind in ("whole", how):
        model = nn.Sequential(Chunked(kind), Chunked(kind))
        with probe(model, reduction=reduction, mask=mask if how == "list" else None) as p:
            for _ in range(2):
                losses = model(x).square().sum((1, 2))
                (losses.mean() if reduction == "mean" else losses.sum()).backward()
        tables.append(p.summary().drop(columns="union_density"))
    assert tables[0].to_numpy() == pytest.approx(tables[1].to_numpy(), rel=1e-5)


@pytest.mark.parametrize("family, options", [("bert", {}), ("distilbert", {})])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_zeroth_biases_of_chunks_are_refused(family, options, placement):
    from transformers import AutoConfig, AutoModel

    sizes = dict(vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes, chunk_size_feed_forward=2))
    before = repr(model)
    with pytest.raises(ValueError, match=r"layer\.0\..*: with chunk_size_feed_forward=2 .* pass zeroth_bias=False"):
        sparsify(model, placement=placement)
    assert repr(model) == before
    sparsify(model, zeroth_bias=False)


class Quantised(nn.Module):
    """A linear whose weight is kept in integers."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randint(255, (outputs, inputs)).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_integers_take_the_dtype_of_the_norm_or_are_refused(dtype):
    model = nn.Sequential(Chunked("whole"), Chunked("whole"))
    for layer in model:
        layer.norm2.to(dtype)
        layer.mlp.fc1, layer.mlp.fc2 = Quantised(6, 12), Quantised(12, 6)
    bare = copy.deepcopy(model)
    bare[1].norm2 = nn.Identity()
    before, keys = repr(bare), list(bare.state_dict())
    with pytest.raises(ValueError, match=r"1.mlp: a zeroth bias cannot be torch.uint8, as the keys are"):
        sparsify(bare, tokens=4, restricted_norm=False, clip=None)
    assert (repr(bare), list(bare.state_dict())) == (before, keys)
    sparsify(model, tokens=4)
    assert all(bias.dtype == dtype and bias.requires_grad for bias in zeroth_biases(model))
    model(torch.randn(2, 4, 6).to(dtype)).square().sum().backward()
    assert all(bias.grad is not None for bias in zeroth_biases(model))
