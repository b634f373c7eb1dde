import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsity import probe_hooks
from sparsity.accumulators import HISTOGRAM
from sparsity.activations import derivative, make
from sparsity.blocks import LAYOUTS, Layout, find_blocks
from sparsity.probes import probe

COLUMNS = ("density", "derivative_density", "density_from_flatness", "augmented_flatness_key",
           "augmented_flatness_value")  # fmt: skip


# A naive recount: keep every tensor of every pass, then count in loops, in double precision --------------------------


class Storage:
    """All that the MLP blocks of a model see: {layer: [one dict of tensors per call]}."""

    def __init__(self, model):
        self.seen = {block.name: [] for block in find_blocks(model)}
        self.handles, self.slopes = [], {}
        for block in find_blocks(model):
            self.watch(block)

    def watch(self, block):
        calls = self.seen[block.name]

        def keep(name, tensor):
            calls[-1][name] = tensor.detach().clone()
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, call=calls[-1]: call.__setitem__(f"grad {name}", gradient))

        def enter(module, inputs):
            calls.append({})
            keep("x", inputs[0])

        self.handles += [
            block.key.register_forward_pre_hook(enter),
            block.activation.register_forward_pre_hook(lambda module, inputs: keep("p", inputs[0])),
            block.activation.register_forward_hook(lambda module, inputs, output: keep("a", output)),
            block.value.register_forward_pre_hook(lambda module, inputs: keep("v", inputs[0])),
            block.value.register_forward_hook(lambda module, inputs, output: keep("z", output)),
        ]
        self.slopes[block.name] = block.activation

    def recount(self, name, mask=None, mean=True, zero=1e-6):
        """The statistics of one layer, each from its definition."""
        calls = [tokens(call, self.slopes[name], mask, mean) for call in self.seen[name]]
        every = [token for call in calls for token in call]
        samples = sum(call["x"].shape[0] for call in self.seen[name])
        x, p, a, v, slope = (np.array([token[key] for token in every]) for key in ("x", "p", "a", "v", "slope"))
        active = np.abs(a) > zero
        units = a.shape[1]
        unions = [(np.abs([token["a"] for token in call]) > zero).any(0).mean() for call in calls]
        found = {
            "density": active.mean(),
            "derivative_density": (slope != 0).mean(),
            "union_density": np.mean(unions),
            "dead_units": 1 - active.any(0).mean(),
            "live_density": active.mean() / active.any(0).mean(),
            "input_norm": (x**2).sum(1).mean(),
            "activation_norm": (v**2).sum() / samples,
            "squared_derivative": (slope**2).mean(),
            "squared_pre_activation": (p**2).mean(),
            "pre_activation_std": p.std(),
            "tokens": len(every) / samples,
            "units": units,
            "samples": samples,
        }
        if "grad z" not in self.seen[name][0]:
            return found
        g, eta, dz = (np.array([token[key] for token in every]) for key in ("grad a", "grad p", "grad z"))
        xx, vv, zz = (x**2).sum(1), (v**2).sum(1), (dz**2).sum(1)
        flatness_key, flatness_value, c0, c0_authors = 0.0, 0.0, [], []
        for t in range(len(every)):
            flatness_key += xx[t] * (eta[t] ** 2).sum() / samples
            flatness_value += vv[t] * zz[t] / samples
            for i in range(units):
                if active[t, i]:
                    c0.append(xx[t] * g[t, i] ** 2 * slope[t, i] ** 2)
                    c0_authors.append(xx[t] * g[t, i] ** 2)
        return found | {
            "augmented_flatness_key": flatness_key,
            "augmented_flatness_linear": (xx * (g**2).sum(1)).sum() / samples,
            "coefficient_key": np.mean(c0),
            "coefficient_key_authors": np.mean(c0_authors),
            "density_from_flatness": flatness_key / (len(every) / samples * units * np.mean(c0)),
            "augmented_flatness_value": flatness_value,
            "coefficient_value": (vv * zz).sum() / vv.sum(),
            "coefficient_value_authors": zz.mean(),
            "activation_norm_from_flatness": flatness_value / ((vv * zz).sum() / vv.sum()),
            "activation_gradient": (g**2).mean(),
            "activation_gradient_active": (g[active] ** 2).mean(),
            "activation_gradient_ratio": (g[active] ** 2).mean() / (g**2).mean(),
            "gradient_density": (eta != 0).mean(),
            "effective_gradient_below_1e-9": (np.abs(eta) < 1e-9).mean(),
            "effective_gradient_below_1e-6": (np.abs(eta) < 1e-6).mean(),
            "effective_gradient_below_1e-3": (np.abs(eta) < 1e-3).mean(),
            "effective_gradient_l1": np.abs(eta).sum() / len(every),
            "effective_gradient_l2": (eta**2).sum() / len(every),
            "beneficial_units": (eta < 0).sum() / len(every),
            "harmful_units": (eta > 0).sum() / len(every),
            "beneficial_sum": eta[eta < 0].sum() / len(every),
            "harmful_sum": eta[eta > 0].sum() / len(every),
        }


def tokens(call, activation, mask, mean):
    """The tokens of one call that count, each a dict of vectors in double precision; gradients are per sample."""
    scale = call["x"].shape[0] if mean else 1
    call = call | {"slope": derivative(activation, call["p"].double())}
    positions = [index for index in np.ndindex(*call["x"].shape[:-1]) if mask is None or mask[index]]
    return [
        {name: value[index].double().numpy() * (scale if "grad" in name else 1) for name, value in call.items()}
        for index in positions
    ]


def assert_same(summary, storage, masks=None, **options):
    assert list(summary.index) == list(storage.seen)
    for name, row in summary.iterrows():
        mask = next((mask for prefix, mask in (masks or {}).items() if name.startswith(prefix)), None)
        expected = storage.recount(name, mask, **options)
        assert set(row.index) == set(expected)
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=2e-5, abs=1e-12), (name, column)


def with_activation(tiny, name):
    for block in find_blocks(tiny.model):
        block.replace_activation(make(name))
    return tiny


# Toy models: what the families of the fixtures do not have -----------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, width, act):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 12), act, nn.Linear(12, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Toy(nn.Module):
    """Residual MLPs of timm's layout, on inputs of any shape (B, …, width)."""

    def __init__(self, act=nn.ReLU, depth=2, width=6, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.norm2, block.mlp = nn.LayerNorm(width), Mlp(width, act())
            self.blocks.append(block)
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            layer = lambda x, block=block: x + block.mlp(block.norm2(x))  # noqa: E731
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def toy(seed=0, **options):
    torch.manual_seed(seed)
    return Toy(**options)


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    """A mean over samples, different for every entry."""
    return (model(x) * data(*x.shape[1:], seed=2)).square().flatten(1).sum(1).mean()


# Every statistic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "jsrelu"])
def test_every_statistic_is_that_of_a_naive_recount(tiny, activation):
    with_activation(tiny, activation)
    storage = Storage(tiny.model)
    with probe(tiny.model) as p:
        for shift in range(2):
            tiny.batch = {name: value.roll(shift, -1) for name, value in tiny.batch.items()}
            tiny.loss().backward()
    assert p.passes == 2
    assert_same(p.summary(), storage)


def test_an_activation_without_zeros(build):
    tiny = with_activation(build("gpt2"), "relu")
    for block in find_blocks(tiny.model):
        block.replace_activation(nn.GELU())
    storage = Storage(tiny.model)
    with probe(tiny.model) as p:
        tiny.loss().backward()
    assert_same(p.summary(), storage)
    assert p.summary()["density"].min() > 0.99


def test_identities_hold_in_every_family(tiny):
    for activation in ("relu", "jsrelu"):
        with_activation(tiny, activation)
        with probe(tiny.model) as p:
            for _ in range(3):
                tiny.loss().backward()
        table = p.summary(gradients=True)
        assert (table["density_from_flatness"] / table["density"] - 1).abs().max() < 1e-5
        assert (table["activation_norm_from_flatness"] / table["activation_norm"] - 1).abs().max() < 1e-5
        authors = (table["coefficient_key_authors"] / table["coefficient_key"] - 1).abs()
        assert authors.max() < 1e-5 if activation == "relu" else authors.min() > 1e-3


def test_marginal_activations_count_as_zero_in_the_identity():
    model = toy(depth=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0].zero_()
        model.blocks[0].mlp.fc1.bias[0] = 5e-7
    with probe(model) as p:
        loss_of(model, data(4, 3, 6)).backward()
    row = p.summary().iloc[0]
    assert row["derivative_density"] == pytest.approx(row["density"] + 1 / 12)
    assert row["density_from_flatness"] == pytest.approx(row["density"], rel=1e-6)
    with probe(model, zero=0.0) as p:
        loss_of(model, data(4, 3, 6)).backward()
    row = p.summary().iloc[0]
    assert row["density"] == row["derivative_density"] == pytest.approx(row["density_from_flatness"], rel=1e-6)


def test_augmented_flatness_is_that_of_single_samples(build):
    tiny = build("vit")
    with probe(tiny.model) as p:
        tiny.loss().backward()
    images, labels = tiny.batch["pixels"], tiny.batch["labels"]
    flatness = {name: [0.0, 0.0] for name in p.summary().index}
    for image, label in zip(images, labels, strict=True):
        storage = Storage(tiny.model)
        nn.functional.cross_entropy(tiny.model(image[None]), label[None]).backward()
        for handle in storage.handles:
            handle.remove()
        for name, (call,) in storage.seen.items():
            for t in range(call["x"].shape[1]):
                key = torch.outer(call["grad p"][0, t], call["x"][0, t])  # ∂L/∂K of one token
                value = torch.outer(call["grad z"][0, t], call["v"][0, t])
                flatness[name][0] += key.square().sum().item() / len(images)
                flatness[name][1] += value.square().sum().item() / len(images)
    for name, row in p.summary().iterrows():
        assert row["augmented_flatness_key"] == pytest.approx(flatness[name][0], rel=1e-4)
        assert row["augmented_flatness_value"] == pytest.approx(flatness[name][1], rel=1e-4)


def test_zeroth_biases_before_the_key_layer_are_in_the_input_norm():
    model = toy()
    shift = data(5, 6, seed=3)
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda module, inputs: inputs[0] + shift)
    storage = Storage(model)
    with probe(model) as p:
        loss_of(model, data(4, 5, 6)).backward()
    assert_same(p.summary(), storage)


@pytest.mark.parametrize("shape", [(7, 6), (3, 4, 6), (2, 3, 4, 6)])
def test_inputs_of_two_three_and_four_dimensions(shape):
    model = toy(act=nn.Tanh)
    storage = Storage(model)
    with probe(model) as p:
        loss_of(model, data(*shape)).backward()
    assert_same(p.summary(), storage)


def test_union_and_dead_units_over_passes():
    model = toy(depth=1, width=3)
    mlp = model.blocks[0].mlp
    model.blocks[0].norm2 = nn.Identity()
    with torch.no_grad():
        mlp.fc1.weight.zero_(), mlp.fc1.bias.fill_(-1.0)
        mlp.fc1.weight[0, 0] = mlp.fc1.weight[1, 1] = mlp.fc1.weight[2, 1] = 2.0
    with probe(model) as p, torch.no_grad():
        model(torch.tensor([[[1.0, 0, 0], [0, 0, 0]]]))  # unit 0 at one of two tokens
        model(torch.tensor([[[0, 1.0, 0], [0, 1, 0]]]))  # units 1 and 2 at both
    row = p.summary().iloc[0]
    assert row["density"] == pytest.approx(5 / 48) and row["union_density"] == pytest.approx((1 / 12 + 2 / 12) / 2)
    assert row["dead_units"] == pytest.approx(9 / 12) and row["live_density"] == pytest.approx(5 / 12)


def test_dropout_does_not_count_as_zero_and_is_in_the_value_input():
    model = toy().train()
    for block in model.blocks:
        block.mlp.drop.p = 0.5
    storage = Storage(model)
    with probe(model) as p:
        loss_of(model, data(4, 5, 6)).backward()
    assert_same(p.summary(), storage)
    zeros_after = (storage.seen["blocks.0.mlp"][0]["v"] == 0).float().mean()
    assert 1 - p.summary()["density"].iloc[0] < zeros_after - 0.1


def test_an_activation_that_works_in_place():
    x = data(4, 5, 6)
    with probe(model := toy()) as plain:
        loss_of(model, x).backward()
    with probe(model := toy(act=lambda: nn.ReLU(inplace=True))) as inplace:
        loss_of(model, x).backward()
    assert_tables_equal(plain.summary(), inplace.summary())


def test_a_gated_mlp_is_measured_at_its_gate():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                                         num_attention_heads=2, hidden_act="relu"))  # fmt: skip
    storage = Storage(model)
    ids = torch.randint(11, (3, 5))
    with probe(model) as p:
        model(input_ids=ids, labels=ids).loss.backward()
    assert_same(p.summary(), storage)
    assert (p.summary()["density_from_flatness"] / p.summary()["density"] - 1).abs().max() < 1e-5


def test_blocks_that_share_one_activation_module():
    model, separate = toy(), toy()
    model.blocks[1].mlp.act = model.blocks[0].mlp.act
    tables = []
    for each in (model, separate):
        with probe(each) as p:
            loss_of(each, data(4, 5, 6)).backward()
        tables.append(p.summary())
    assert_tables_equal(*tables)


def test_histograms_of_gradients():
    model = toy(depth=1)
    storage = Storage(model)
    with probe(model, histograms=True) as p:
        loss_of(model, data(4, 5, 6)).backward()
    table = p.histogram()
    (call,) = storage.seen["blocks.0.mlp"]
    g, active = 4 * call["grad a"].double().numpy(), call["a"].numpy() > 1e-6
    edges = np.linspace(*HISTOGRAM[:2], HISTOGRAM[2] + 1)
    assert table["all"].tolist() == np.histogram(np.log10(g**2), edges)[0].tolist()
    assert table["active"].tolist() == np.histogram(np.log10(g[active] ** 2), edges)[0].tolist()
    assert table["left"].tolist() == edges[:-1].tolist() and set(table["layer"]) == {"blocks.0.mlp"}
    assert table["all"].sum() == 4 * 5 * 12


def test_histograms_of_a_layer_without_active_units_or_gradients():
    model = toy(depth=1)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias.fill_(-100)
        model.blocks[0].mlp.fc2.weight.zero_()
    with probe(model, histograms=True) as p:
        loss_of(model, data(4, 5, 6)).backward()
    assert p.histogram()[["all", "active"]].to_numpy().sum() == 0
    row = p.summary().iloc[0]
    assert row["density"] == row["augmented_flatness_key"] == 0 and np.isnan(row["density_from_flatness"])
    assert row["dead_units"] == 1 and np.isnan(row["live_density"])


# Which positions, which passes ----------------------------------------------------------------------------------------


def assert_tables_equal(one, other, rel=1e-5):
    assert list(one.index) == list(other.index) and list(one.columns) == list(other.columns)
    assert one.to_numpy() == pytest.approx(other.to_numpy(), rel=rel, abs=1e-12, nan_ok=True)


def test_masks_of_encoder_and_decoder(build):
    tiny = build("t5")
    storage = Storage(tiny.model)
    generator = torch.Generator().manual_seed(5)
    masks = {
        "encoder": torch.rand(4, 7, generator=generator) < 0.6,
        "decoder": torch.rand(4, 5, generator=generator) < 0.6,
    }
    with probe(tiny.model, mask=masks) as p:
        tiny.loss().backward()
    assert_same(p.summary(), storage, masks)
    with probe(tiny.model) as whole:
        tiny.loss().backward()
    assert (p.summary()["density"] != whole.summary()["density"]).all()


def test_a_mask_may_change_between_passes(build):
    tiny = build("bert")
    first, second = torch.ones(4, 6, dtype=torch.long), torch.zeros(4, 6, dtype=torch.bool)
    first[:, 4:] = 0
    second[1] = True
    with probe(tiny.model, mask=first) as p:
        tiny.loss().backward()
        p.mask = second
        tiny.loss().backward()
        p.mask = torch.zeros_like(second)
        tiny.loss().backward()
    assert p.summary()["tokens"].tolist() == pytest.approx([(16 + 6) / 12] * 2)
    assert (p.summary()["density_from_flatness"] / p.summary()["density"] - 1).abs().max() < 1e-5


def test_only_every_nth_pass_is_recorded(monkeypatch):
    model, x = toy(depth=1), data(5, 4, 3, 6)
    asked = []
    with probe(model, every=3) as p:
        count = lambda module, x: asked.append(len(asked)) or derivative(module, x)  # noqa: E731
        monkeypatch.setattr(probe_hooks, "derivative", count)
        for i in range(5):
            loss_of(model, x[i]).backward()
            assert len(asked) == p.passes == (1 if i < 3 else 2)
    with probe(model) as q:
        loss_of(model, x[0]).backward()
        loss_of(model, x[3]).backward()
    assert_tables_equal(p.summary(), q.summary())
    assert p.seen == 5


def test_reset_forgets_everything_also_gradients_that_are_still_to_come():
    model, x = toy(), data(2, 4, 5, 6)
    with probe(model, every=2) as p:
        loss = loss_of(model, x[0])
        p.reset()
        loss.backward()
        assert p.passes == 0
        loss_of(model, x[1]).backward()
    with probe(model) as q:
        loss_of(model, x[1]).backward()
    assert p.passes == 1
    assert_tables_equal(p.summary(), q.summary())


# Scale, precision, and how training runs ------------------------------------------------------------------------------


def test_statistics_are_free_of_reduction_and_loss_scale():
    model, x = toy(), data(8, 5, 6)
    with probe(model) as mean:
        loss_of(model, x).backward()
    with probe(model, reduction="sum") as total:
        (loss_of(model, x) * 8).backward()
    with probe(model, grad_scale=1.0) as scaled:
        scaled.grad_scale = 1024.0
        (loss_of(model, x) * 1024).backward()
    with probe(model, grad_scale=0.5) as accumulated:
        for half in x.split(4):
            (loss_of(model, half) / 2).backward()
    for other in (total, scaled, accumulated):
        forward = ["union_density", "samples"]
        assert_tables_equal(mean.summary().drop(columns=forward), other.summary().drop(columns=forward), rel=2e-5)


def test_several_forward_passes_before_one_backward_pass():
    model, x = toy(), data(2, 4, 5, 6)
    with probe(model) as p:
        (loss_of(model, x[0]) + loss_of(model, x[1])).backward()
    with probe(model) as q:
        loss_of(model, x[0]).backward()
        loss_of(model, x[1]).backward()
    assert_tables_equal(p.summary(), q.summary())


def test_a_second_backward_pass_through_the_same_graph_is_not_counted():
    model = toy()
    with probe(model) as p:
        loss = loss_of(model, data(4, 5, 6))
        loss.backward(retain_graph=True)
        once = p.summary()
        (3 * loss).backward()
    assert_tables_equal(p.summary(), once)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_nothing_twice(reentrant, every):
    x = data(4, 4, 5, 6).requires_grad_()  # reentrant checkpointing wants an input with a gradient
    tables = []
    for model in (toy(), toy(reentrant=reentrant)):
        with probe(model, every=every, histograms=True) as p:
            for i in range(4):
                loss_of(model, x[i]).backward()
        assert p.passes == 4 // every
        tables.append((p.summary(), p.histogram()))
    assert_tables_equal(tables[0][0], tables[1][0])
    assert tables[0][1].equals(tables[1][1])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_checkpointing_of_transformers(build, name, reentrant):
    tiny = build(name)
    with probe(tiny.model) as plain:
        tiny.loss().backward()
    tiny.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tiny.model.train()
    with probe(tiny.model) as p:
        tiny.loss().backward()
    assert_tables_equal(plain.summary(), p.summary())


def test_autocast_counts_what_was_computed_and_adds_in_full_precision():
    model, x = toy(), data(4, 5, 6)
    storage = Storage(model)
    with probe(model) as p:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, x)
        loss.backward()
    call = storage.seen["blocks.0.mlp"][0]
    assert call["a"].dtype == call["grad p"].dtype == torch.bfloat16
    assert_same(p.summary(), storage)


def test_double_precision_models():
    model = toy().double()
    storage = Storage(model)
    with probe(model) as p:
        loss_of(model, data(4, 5, 6).double()).backward()
    assert_same(p.summary(), storage)


def test_probing_changes_neither_outputs_nor_gradients():
    plain, probed, x = toy(), toy(), data(4, 5, 6)
    loss_of(plain, x).backward()
    with probe(probed):
        loss_of(probed, x).backward()
    for one, other in zip(plain.parameters(), probed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(toy())
        mask = {"blocks": torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5}
        tables = []
        for model in (wrapped, wrapped.module):
            with probe(model, mask=mask) as p:
                loss_of(wrapped, data(4, 5, 6)).backward()
            tables.append(p.summary())
    finally:
        torch.distributed.destroy_process_group()
    assert list(tables[0].index) == ["module.blocks.0.mlp", "module.blocks.1.mlp"]
    assert_tables_equal(tables[0].set_index(tables[1].index), tables[1])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_forward_statistics_come(tiny, context):
    tiny.model.eval()
    storage = Storage(tiny.model)
    with probe(tiny.model) as p, context():
        tiny.loss()
        tiny.loss()
    assert_same(p.summary(), storage)
    first = find_blocks(tiny.model)[0].name
    with pytest.raises(RuntimeError, match=rf"{first}: no gradient was seen here .* run backward\(\)"):
        p.summary(gradients=True)
    for column in ("density_from_flatness", ["density", "augmented_flatness_key"]):
        with pytest.raises(KeyError, match=r"(density_from_flatness|augmented_flatness_key) needs gradients"):
            p.summary()[column]
    with pytest.raises(KeyError, match="colour"):
        p.summary()["colour"]


def test_evaluation_between_training_steps_leaves_the_gradient_statistics_alone():
    model, x = toy(), data(2, 4, 5, 6)
    with probe(model) as p:
        loss_of(model, x[0]).backward()
        with torch.no_grad():
            model(x[1])
    with probe(model) as q:
        loss_of(model, x[0]).backward()
    assert p.passes == 2 and p.summary()["samples"].tolist() == [8, 8]
    columns = ["augmented_flatness_key", "coefficient_key", "density_from_flatness", "effective_gradient_l1"]
    assert_tables_equal(p.summary()[columns], q.summary()[columns])
    assert set(p.summary(gradients=False).columns) == set(q.summary(gradients=False).columns) < set(q.summary().columns)


def test_a_frozen_layer_has_no_gradients():
    model = toy().requires_grad_(False)
    model.blocks[1].requires_grad_(True)
    with probe(model) as p:
        loss_of(model, data(4, 5, 6)).backward()
    table = p.summary()
    assert table[list(COLUMNS)].isna().sum(axis=1).tolist() == [3, 0]
    with pytest.raises(RuntimeError, match=r"blocks.0.mlp: no gradient was seen here \(1 of 2 layers\)"):
        p.summary(gradients=True)


# Hooks and memory -----------------------------------------------------------------------------------------------------


def number_of_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_the_block_and_the_summary_stays():
    model = toy()
    with probe(model) as p:
        assert number_of_hooks(model) > 0
        loss = loss_of(model, data(4, 5, 6))
        assert "density_from_flatness" not in p.summary()
    before = p.summary()
    assert number_of_hooks(model) == 0
    loss.backward()  # too late to be counted
    loss_of(model, data(4, 5, 6)).backward()
    assert_tables_equal(p.summary(), before)


def test_hooks_are_gone_after_an_exception():
    model = toy()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|normalized_shape"), probe(model):
        model(data(4, 5, 7))
    assert number_of_hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), probe(model) as p:
        loss_of(model, data(4, 5, 6)).backward()
        raise KeyboardInterrupt
    assert number_of_hooks(model) == 0 and p.passes == 1


def test_hooks_are_gone_after_an_exception_while_entering(monkeypatch):
    model = toy()
    failing = model.blocks[1].mlp.fc2
    monkeypatch.setattr(failing, "register_forward_hook", lambda hook: 1 / 0)
    with pytest.raises(ZeroDivisionError), probe(model):
        pass
    assert number_of_hooks(model) == 0


def test_a_pass_that_failed_in_the_middle_does_not_disturb_the_next():
    model, x = toy(depth=1), data(4, 5, 6)
    with probe(model) as p:
        handle = model.blocks[0].mlp.act.register_forward_hook(lambda module, inputs, output: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
        p.reset()
        model.blocks[0].mlp(x)  # not within a pass, although the last one never came to its end
        loss_of(model, x).backward()
    with probe(model) as q:
        loss_of(model, x).backward()
    assert_tables_equal(p.summary(), q.summary())


@pytest.mark.parametrize("next_pass", [True, False])
def test_a_block_left_in_the_middle_is_let_go_of(next_pass):
    model = toy()
    with probe(model) as p:
        layer = p.layers["blocks.1.mlp"]
        model.blocks[1].mlp.act.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(data(4, 5, 6))
        assert layer.call is not None
        if next_pass:
            model.blocks[0].mlp.fc1.register_forward_pre_hook(lambda *args: 1 / 0, prepend=True)
            with pytest.raises(ZeroDivisionError):
                model(data(4, 5, 6))
            assert layer.call is None
    assert layer.call is None


def test_two_probes_at_once():
    model, x = toy(), data(2, 4, 5, 6)
    with probe(model) as outer:
        loss_of(model, x[0]).backward()
        with probe(model) as inner:
            loss_of(model, x[1]).backward()
        assert number_of_hooks(model) > 0
    with probe(model) as both:
        loss_of(model, x[0]).backward()
        loss_of(model, x[1]).backward()
    with probe(model) as second:
        loss_of(model, x[1]).backward()
    assert_tables_equal(outer.summary(), both.summary())
    assert_tables_equal(inner.summary(), second.summary())


def test_nothing_outlives_its_gradient():
    model = toy(depth=1)
    calls, outputs = [], []
    with probe(model) as p:
        (layer,) = p.layers.values()
        model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda *args: calls.append(weakref.ref(layer.call)))
        model.blocks[0].mlp.act.register_forward_hook(lambda module, inputs, out: outputs.append(weakref.ref(out)))
        gc.collect()
        gc.disable()  # a cycle would stay
        try:
            loss = loss_of(model, data(4, 5, 6))
            assert calls[0]() is not None
            loss.backward()
            assert calls[0]() is None  # though the graph lives on
            loss = loss_of(model, data(4, 5, 6))
            del loss
            assert calls[1]() is None and outputs[0]() is None and outputs[1]() is None
        finally:
            gc.enable()


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"every": 0}, "every must be positive, got 0"),
    ({"grad_scale": -1.0}, "grad_scale must be positive, got -1.0"),
    ({"grad_scale": float("nan")}, "grad_scale must be positive, got nan"),
    ({"reduction": "average"}, "unknown reduction 'average' .* choose 'mean' or 'sum'"),
    ({"layouts": LAYOUTS[4:5]}, "no MLP block found in Toy"),
])  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message), probe(toy(), **options):
        pass


@pytest.mark.parametrize("mask, message", [
    (torch.ones(4, 6, dtype=torch.bool), r"blocks.0.mlp: the mask must be bool, of the shape \(4, 5\) .* \(4, 6\)"),
    (torch.ones(20, dtype=torch.bool), r"blocks.0.mlp: .* \(4, 5\) .* but is torch.bool \(20,\)"),
    (torch.ones(4, 5), r"blocks.0.mlp: .* torch.float32 \(4, 5\)"),
    ({"encoder": torch.ones(4, 5).bool(), "block": None}, "blocks.0.mlp: no entry of the mask is a prefix .*'encoder'"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_named(mask, message):
    model = toy()
    with probe(model, mask=mask), pytest.raises(ValueError, match=message):
        model(data(4, 5, 6))


def test_an_activation_that_is_no_module():
    model = toy()
    object.__setattr__(model.blocks[1].mlp, "act", torch.relu)
    del model.blocks[1].mlp._modules["act"]
    with (
        pytest.raises(ValueError, match=r"blocks.1.mlp: its activation 'mlp.act' is .*relu.*, no module"),
        probe(model),
    ):
        pass
    assert number_of_hooks(model) == 0


def test_an_activation_without_a_derivative():
    class Step(nn.Module):
        def forward(self, x):
            return (x > 0).float()

    model = toy()
    model.blocks[1].mlp.act = Step()
    with pytest.raises(ValueError, match=r"^blocks.1.mlp: no derivative: Step"), probe(model):
        pass


def test_an_activation_that_does_not_run():
    model = toy(depth=1)
    mlp = model.blocks[0].mlp
    mlp.forward = lambda x: mlp.fc2(torch.relu(mlp.fc1(x)))
    with probe(model), pytest.raises(RuntimeError, match=r"blocks.0.mlp: its activation 'mlp.act' did not run between"):
        model(data(4, 5, 6))


def test_compiled_models_are_refused():
    model = toy()
    with pytest.raises(ValueError, match="OptimizedModule is compiled"), probe(torch.compile(model)):
        pass
    model.blocks[1].mlp.compile()
    with pytest.raises(ValueError, match=r"blocks.1.mlp is compiled"), probe(model):
        pass
    assert number_of_hooks(model) == 0


def test_a_model_that_never_ran():
    model = toy()
    with probe(model) as p:
        model.blocks[0].mlp(data(4, 5, 6))  # a part of it, outside a forward pass of the model
        with pytest.raises(RuntimeError, match=r"the probe of Toy recorded no forward pass"):
            p.summary()
        loss_of(model, data(4, 5, 6)).backward()
    with pytest.raises(RuntimeError, match="collects no histograms"):
        p.histogram()
    with probe(model, histograms=True) as p:
        model(data(4, 5, 6))
    with pytest.raises(RuntimeError, match="no gradient was seen"):
        p.histogram()


def test_a_block_of_ones_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.relu, self.down = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)

        def forward(self, x):
            return self.down(input=self.relu(input=self.up(input=x)))  # by name

    torch.manual_seed(0)
    model = nn.Sequential(Net())
    with probe(model, layouts=[Layout("mine", "up", "up", "relu", "down"), *LAYOUTS]) as p:
        loss_of(model, data(4, 5, 6)).backward()
    row = p.summary(gradients=True).loc["0.up"]
    assert row["density_from_flatness"] == pytest.approx(row["density"], rel=1e-6)
