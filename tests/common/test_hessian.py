"""Curvature against dense matrices built by loops, and on the models of both papers against double backward passes."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer as ClipVision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from common import hessian

SAMPLED = ("hessian", "ggn", "sampled_fisher")


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def examples(sizes=(4, 3), seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return [(2 * torch.randn(n, 4, **draw), torch.randint(3, (n,), generator=generator)) for n in sizes]


@pytest.fixture
def risk():
    return hessian.empirical_risk(classifier(), examples())


# The slow twins ------------------------------------------------------------------------------------------------------


def dense(model, batches, kind):
    """The curvature matrix of the mean cross-entropy over all samples, (P, P), one sample and one class at a time."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    vector = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def logits(vector, image):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(model, named, (image[None],))[0]

    def loss(vector, image, label):
        return F.cross_entropy(logits(vector, image), label)

    total = torch.zeros(len(vector), len(vector), dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        shares = logits(vector, image).softmax(0).detach()
        gradients = [torch.func.grad(loss)(vector, image, torch.tensor(c)) for c in range(len(shares))]
        if kind == "hessian":
            total += torch.func.hessian(loss)(vector, image, label)
        elif kind == "empirical_fisher":
            total += torch.outer(gradients[label], gradients[label])
        elif kind == "ggn":
            jacobian = torch.func.jacrev(logits)(vector, image)
            total += jacobian.T @ (shares.diag() - torch.outer(shares, shares)) @ jacobian
        else:
            total += sum(share * torch.outer(g, g) for share, g in zip(shares, gradients, strict=True))
    return total / len(labels)


def hutchinson(loss, parameters, probes, seed=0):
    """tr(H) of a scalar loss from the same signs as the fast path, by two backward passes a probe."""
    generator, found = torch.Generator().manual_seed(seed), []
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    for _ in range(probes):
        signs = [2.0 * torch.randint(2, p.shape, generator=generator).to(p) - 1 for p in parameters]
        along = sum((g * v).sum() for g, v in zip(gradients, signs, strict=True))
        products = torch.autograd.grad(along, parameters, retain_graph=True)
        found.append(sum(float((v * hv).sum()) for v, hv in zip(signs, products, strict=True)))
    return sum(found) / probes


def near(estimate, expected, errors=4.0):
    return abs(estimate.mean - expected) < errors * estimate.standard_error


# Traces --------------------------------------------------------------------------------------------------------------


def test_the_fisher_is_the_ggn_and_its_trace_is_exact(risk):
    ggn, fisher = (dense(classifier(), examples(), kind) for kind in ("ggn", "fisher"))
    assert torch.allclose(ggn, fisher, atol=1e-12)
    exact = hessian.trace(risk, "fisher")
    assert exact.mean == pytest.approx(ggn.trace().item(), rel=1e-10)
    assert (exact.standard_error, exact.samples) == (0.0, 1)


def test_the_empirical_fisher_is_exact_and_another_matrix(risk):
    expected = dense(classifier(), examples(), "empirical_fisher").trace().item()
    assert hessian.trace(risk, "empirical_fisher").mean == pytest.approx(expected, rel=1e-10)
    assert expected != pytest.approx(hessian.trace(risk, "fisher").mean, rel=0.05)


@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_traces_are_within_their_errors(risk, kind):
    expected = dense(classifier(), examples(), kind).trace().item()
    found = hessian.trace(risk, kind, probes=800, at_once=200)
    assert near(found, expected) and found.samples == 800
    assert 0 < found.standard_error < 0.1 * abs(expected)


@pytest.mark.parametrize("kind", SAMPLED)
def test_standard_errors_are_the_spread_over_seeds(risk, kind):
    found = [hessian.trace(risk, kind, probes=10, seed=seed, at_once=10) for seed in range(100)]
    spread = torch.tensor([estimate.mean for estimate in found]).std().item()
    stated = torch.tensor([estimate.standard_error for estimate in found]).square().mean().sqrt().item()
    assert 0.75 < stated / spread < 1.33


@pytest.mark.parametrize("kind", hessian.KINDS)
def test_blocks_are_diagonal_blocks_and_add_up(risk, kind):
    matrix = dense(classifier(), examples(), "fisher" if kind == "sampled_fisher" else kind)
    expected = [part.sum().item() for part in matrix.diagonal().split([20, 5, 15, 3])]
    table = hessian.per_block(risk, kind, probes=800, at_once=200)
    assert list(table.index) == ["0.weight", "0.bias", "2.weight", "2.bias"] and list(table.entries) == [20, 5, 15, 3]
    assert ((table.trace - expected).abs() <= 4 * table.standard_error + 1e-10).all()
    assert table.trace.sum() == pytest.approx(hessian.trace(risk, kind, probes=800, at_once=200).mean, rel=1e-9)
    layers = hessian.per_block(risk, kind, probes=20, block=lambda name: name.split(".")[0])
    each = hessian.per_block(risk, kind, probes=20)
    assert list(layers.index) == ["0", "2"] and list(layers.entries) == [25, 18]
    assert list(layers.trace) == pytest.approx([each.trace[:2].sum(), each.trace[2:].sum()], rel=1e-9)


@pytest.mark.parametrize("kind", hessian.KINDS)
def test_neither_batches_nor_the_number_of_vectors_at_once_matter(risk, kind):
    images, labels = (torch.cat(parts) for parts in zip(*examples(), strict=True))
    whole = hessian.empirical_risk(classifier(), [(images, labels)])
    expected = hessian.trace(whole, kind, probes=7, at_once=7)
    assert hessian.trace(risk, kind, probes=7, at_once=3).mean == pytest.approx(expected.mean, rel=1e-9)
    assert hessian.mean_loss(risk) == pytest.approx(F.cross_entropy(classifier()(images), labels).item(), rel=1e-9)


def test_one_probe_has_no_standard_error(risk):
    assert math.isnan(hessian.trace(risk, probes=1).standard_error)


def test_a_subset_of_parameters_is_its_block_also_where_they_are_frozen():
    model = classifier().requires_grad_(False)
    some = hessian.empirical_risk(model, examples(), ["2.*"])
    assert list(some.parameters) == ["2.weight", "2.bias"] and some.dimension == 18
    expected = dense(classifier(), examples(), "ggn")[25:, 25:].trace().item()
    assert hessian.trace(some, "fisher").mean == pytest.approx(expected, rel=1e-10)
    assert near(hessian.trace(some, "ggn", probes=800, at_once=200), expected)


def test_xtrace_is_unbiased_and_beats_hutchinson_on_a_ggn():
    images, labels = (torch.cat(parts) for parts in zip(*examples((3, 2)), strict=True))
    risk = hessian.empirical_risk(classifier(), [(images, labels)])
    exact = hessian.trace(risk, "fisher").mean
    found = hessian.xtrace(risk, "ggn", products=20, repeats=10)
    assert near(found, exact, 5.0) or found.mean == pytest.approx(exact, rel=1e-6)
    assert found.standard_error < 0.2 * hessian.trace(risk, "ggn", probes=200).standard_error
    with pytest.raises(ValueError, match="products must be even and below the number of parameters, 43, got 43"):
        hessian.xtrace(risk, products=43)


# Other losses, token labels ------------------------------------------------------------------------------------------


def test_the_hessian_takes_any_mean_loss():
    model, (images, labels) = classifier(), examples((7,))[0]
    loss = nn.CrossEntropyLoss(label_smoothing=0.2, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    found = hessian.trace(hessian.empirical_risk(model, [(images, labels)], loss=loss), "hessian", probes=5)
    expected = hutchinson(loss(model(images), labels), list(model.parameters()), 5)
    assert found.mean == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", hessian.KINDS)
def test_token_labels_count_each_and_ignored_ones_do_not(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    tokens, labels = torch.randint(6, (4, 3)), torch.randint(5, (4, 3))
    labels[0, 1:] = labels[3] = -100
    batches = [{"input": tokens[:2], "labels": labels[:2]}, {"input": tokens[2:], "labels": labels[2:]}]
    risk = hessian.empirical_risk(model, batches, logits=lambda model, batch: model(batch["input"]))
    kept = labels != -100
    flat = hessian.empirical_risk(model, [(tokens[kept], labels[kept])])
    assert risk.labels == flat.labels == 7
    assert hessian.mean_loss(risk) == pytest.approx(hessian.mean_loss(flat), rel=1e-9)
    if kind != "sampled_fisher":  # of which one draw covers all labels of a sample
        expected = hessian.trace(flat, kind, probes=3).mean
        assert hessian.trace(risk, kind, probes=3).mean == pytest.approx(expected, rel=1e-9)
    else:
        assert near(hessian.trace(risk, kind, probes=500, at_once=500), hessian.trace(flat, "fisher").mean)


# Spectra -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_top_eigenvalues_are_those_of_the_dense_matrix(risk, kind):
    expected = torch.linalg.eigvalsh(dense(classifier(), examples(), kind)).flip(0)[:3]
    assert hessian.top_eigenvalues(risk, 3, kind, tolerance=1e-8).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_top_eigenvalue_of_the_sampled_fisher_tends_to_the_fishers(risk):
    found = [hessian.top_eigenvalues(risk, 1, "sampled_fisher", seed=seed)[0] for seed in range(10)]
    matrices = dense(classifier(), examples(), "fisher")
    assert min(found) < torch.linalg.eigvalsh(matrices)[-1].item() < max(found)


def test_a_zero_matrix_has_zero_eigenvalues():
    model = classifier()
    nn.init.zeros_(model[2].weight)
    below = hessian.empirical_risk(model, examples(), ["0.*"])
    assert hessian.top_eigenvalues(below, 2, "ggn").tolist() == [0, 0]
    assert hessian.trace(below, "ggn", probes=3).mean == 0


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_the_spectral_density_integrates_to_one_and_has_the_trace_as_its_mean(risk, kind):
    eigenvalues, density = hessian.spectral_density(risk, kind, steps=16, repeats=8)
    width = eigenvalues[1] - eigenvalues[0]
    assert (density.sum() * width).item() == pytest.approx(1, abs=0.06)
    matrix = dense(classifier(), examples(), kind)
    mean = (eigenvalues * density).sum() * width
    spread = (2 * matrix.square().sum() / 8).sqrt().item() / len(matrix)  # of the mean, over 8 start vectors
    assert mean.item() == pytest.approx(matrix.trace().item() / len(matrix), abs=3 * spread)
    assert eigenvalues[0] < torch.linalg.eigvalsh(matrix)[0] and eigenvalues[-1] > torch.linalg.eigvalsh(matrix)[-1]


# Models of both papers -----------------------------------------------------------------------------------------------


def vit():
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=5, embed_dim=8, depth=2, num_heads=2, act_layer=nn.ReLU,
        proj_drop_rate=0.3,
    )  # fmt: skip
    nn.init.normal_(model.head.weight)
    return model, [(torch.randn(6, 1, 8, 8), torch.randint(5, (6,)))], ["blocks.*.mlp.fc?.weight"], {}


def t5():
    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    tokens, labels = torch.randint(11, (4, 6)), torch.randint(11, (4, 3))
    labels[1, 2] = -100
    return T5ForConditionalGeneration(config), [{"input_ids": tokens, "labels": labels}], None, {}


def clip_with_head():
    encoder = ClipVision(8, 4, 8, 2, 2, 2.0, output_dim=6)
    head = 3 * torch.randn(5, 6)
    logits = {"logits": lambda encoder, images: F.normalize(encoder(images), dim=-1) @ head.T}
    return encoder, [(torch.randn(6, 3, 8, 8), torch.randint(5, (6,)))], ["*.mlp.*.weight"], logits


def encoder_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    labels = torch.randint(4, (3, 5))
    return nn.Sequential(layer, nn.Linear(8, 4)), [(torch.randn(3, 5, 8), labels)], ["0.linear?.weight"], {}


@pytest.mark.parametrize("build", [vit, t5, clip_with_head, encoder_layer])
def test_transformers_as_they_are(build):
    torch.manual_seed(0)
    model, batches, parameters, options = build()
    risk = hessian.empirical_risk(model.train(), batches, parameters, **options)
    found = hessian.trace(risk, "hessian", probes=4, at_once=3)

    model.eval()
    batch = batches[0]
    inputs, labels = (batch, batch["labels"]) if isinstance(batch, dict) else batch
    logits = options.get("logits", hessian.model_logits)(model, inputs)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = options.get("logits", hessian.model_logits)(model, inputs)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    assert found.mean == pytest.approx(hutchinson(loss, list(risk.parameters.values()), 4), rel=1e-3, abs=1e-5)

    assert near(hessian.trace(risk, "ggn", probes=100, at_once=25), hessian.trace(risk, "fisher").mean)


def test_modes_attention_and_generators_are_as_before_also_after_an_error():
    torch.manual_seed(0)
    model, batches, parameters, _ = vit()
    model.train()
    model.blocks[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}

    def seen():
        flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
        return {name: module.training for name, module in model.named_modules()}, flags, torch.get_rng_state().tolist()

    before = seen()
    assert before[0] == modes and before[1] == (True, True)
    risk = hessian.empirical_risk(model, batches, parameters)
    hessian.trace(risk, "hessian", probes=2)
    hessian.trace(risk, "sampled_fisher", probes=2)
    hessian.xtrace(risk, "ggn", products=4, repeats=1)
    hessian.spectral_density(risk, "ggn", steps=4)
    assert seen() == before
    wrong = hessian.empirical_risk(model, [(images, labels[:2]) for images, labels in batches], parameters)
    with pytest.raises(ValueError, match=r"logits of shape \(6, 5\) do not fit labels of shape \(2,\)"):
        hessian.trace(wrong, "hessian", probes=2)
    assert seen() == before
    assert all(parameter.grad is None for parameter in model.parameters())


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(parameters=["0.wieght"]), "no parameter of Sequential matches '0.wieght'; did you mean '0.weight'"),
        (dict(parameters=["0.*", "blocks.*"]), "no parameter of Sequential matches 'blocks"),
        (dict(batches=[]), "batches hold no label that counts"),
        (dict(batches=[(torch.zeros(2, 4), torch.tensor([-100, -100]))]), "batches hold no label that counts"),
        (dict(loss=nn.CrossEntropyLoss(reduction="sum")), "loss must be a module with reduction='mean'"),
        (dict(loss=F.cross_entropy), "loss must be a module with reduction='mean'"),
    ],
)
def test_what_makes_no_risk_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        hessian.empirical_risk(classifier(), **(dict(batches=examples()) | options))


def test_no_trainable_parameter_says_so():
    with pytest.raises(ValueError, match="which has none that requires a gradient"):
        hessian.empirical_risk(classifier().requires_grad_(False), examples())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda risk: hessian.trace(risk, "fischer"), "unknown kind 'fischer', expected one of hessian, ggn"),
        (lambda risk: hessian.trace(risk, probes=0), "probes must be at least 1, got 0"),
        (lambda risk: hessian.per_block(risk, at_once=0), "at_once must be at least 1, got 0"),
        (lambda risk: hessian.top_eigenvalues(risk, 43), "count must be below the number of parameters, 43, got 43"),
        (lambda risk: hessian.spectral_density(risk, steps=1), "steps must be at least 2 and below"),
    ],
)
def test_bad_options_say_so(risk, call, message):
    with pytest.raises(ValueError, match=message):
        call(risk)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(weight=torch.ones(3).double())])
def test_only_cross_entropy_has_a_ggn_here(loss):
    risk = hessian.empirical_risk(classifier(), examples(), loss=loss)
    with pytest.raises(ValueError, match="'ggn' needs a loss whose labels follow softmax"):
        hessian.trace(risk, "ggn")


# Norms, and what a vocabulary costs -----------------------------------------------------------------------------------


class RMS(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(5)

    def forward(self, x):
        return self.norm(x)


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(5),
    "RMSNorm": RMS,
    "GroupNorm": lambda: nn.GroupNorm(1, 5),
    "BatchNorm of the batch": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "BatchNorm": lambda: nn.BatchNorm1d(5),
    "InstanceNorm": lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.InstanceNorm1d(1, affine=True), nn.Flatten()),
}


def through(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), NORMS[norm](), nn.Tanh(), nn.Linear(5, 3)).double()


def whole(model, batches, function):
    """A matrix by two backward passes: the Hessian of function(logits, labels), (P, P)."""
    names = [name for name, _ in model.named_parameters()]

    def total(*tensors):
        found = 0.0
        for images, labels in batches:
            logits = torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (images,))
            found = found + function(logits, labels) * len(labels) / sum(len(other) for _, other in batches)
        return found

    parameters = tuple(parameter.detach() for parameter in model.parameters())
    blocks = torch.autograd.functional.hessian(total, parameters)
    sizes = [parameter.numel() for parameter in parameters]
    return torch.cat([torch.cat([b.reshape(n, m) for b, m in zip(row, sizes, strict=True)], 1)
                      for row, n in zip(blocks, sizes, strict=True)])  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical_fisher"])
def test_the_whole_matrix_through_norms(norm, kind):
    model = through(norm).eval()
    risk = hessian.empirical_risk(model, examples())
    matrix = hessian._Curvature(risk, kind) @ torch.eye(risk.dimension, dtype=torch.float64)
    if kind == "hessian":
        expected = whole(model, examples(), F.cross_entropy)
    elif kind == "ggn":

        def surrogate(logits, labels):  # the loss's Hessian with the logits linearised: that of a quadratic form
            shares = logits.detach().softmax(-1)
            moved = logits - logits.detach()
            return ((shares * moved**2).sum(-1) - (shares * moved).sum(-1) ** 2).mean() / 2

        expected = whole(model, examples(), surrogate)
        # what is left of second derivatives of the logits is multiplied with `moved`, which is zero
    else:
        if "batch" in norm:
            pytest.skip("a sample has no gradient of its own")
        expected = dense(model, examples(), kind)
    assert torch.linalg.norm(matrix - expected) <= 1e-8 * torch.linalg.norm(expected)
    assert torch.linalg.norm(matrix - matrix.T) <= 1e-10 * torch.linalg.norm(expected)


@pytest.mark.parametrize("kind", hessian.KINDS)
def test_products_with_one_vector_are_columns_of_those_with_many(risk, kind):
    operator = hessian._Curvature(risk, kind, seed=3)
    vectors = torch.randn(risk.dimension, 3, dtype=torch.float64)
    together = operator @ vectors
    for index in range(3):
        torch.testing.assert_close(together[:, index], operator @ vectors[:, index])
    assert (operator.to_scipy() @ vectors[:, 0].numpy()).tolist() == pytest.approx(together[:, 0].tolist())


# Values, weights, batching -------------------------------------------------------------------------------------------


def regression(width=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, width)).double()


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss()])
@pytest.mark.parametrize("shape, predicted", [((7,), 1), ((7, 1), 1), ((7, 3), 3)])
def test_values_are_compared_one_by_one_and_minus_a_hundred_counts(loss, shape, predicted):
    model, images = regression(predicted), values(7, 4)
    targets = values(*shape[::-1]).mT.contiguous() if len(shape) > 1 else values(*shape)
    targets = (
        targets.sigmoid() if isinstance(loss, nn.BCEWithLogitsLoss) else targets.index_fill(0, torch.tensor([2]), -100)
    )
    expected = loss(model(images).reshape(targets.shape), targets).item()
    for cuts in ([7], [2, 5], [1, 1, 5]):
        batches = list(zip(images.split(cuts), targets.split(cuts), strict=True))
        risk = hessian.empirical_risk(model, batches, loss=loss)
        assert hessian.mean_loss(risk) == pytest.approx(expected, rel=1e-12) and risk.labels == targets.numel()
        found = hessian.trace(risk, "hessian", probes=5).mean
        by_hand = hutchinson(loss(model(images).reshape(targets.shape), targets), list(model.parameters()), 5)
        assert found == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("predicted, shape", [(3, (7,)), (1, (7, 3)), (3, (7, 1))])
def test_values_of_another_shape_are_refused(predicted, shape):
    risk = hessian.empirical_risk(regression(predicted), [(values(7, 4), values(*shape))], loss=nn.MSELoss())
    with pytest.raises(ValueError, match=r"predictions of shape \(7, \d\) do not fit values of shape \(7"):
        hessian.mean_loss(risk)
    with pytest.raises(ValueError, match="predictions of shape"):
        hessian.trace(risk, probes=1)


@pytest.mark.parametrize("loss", [
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)),
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64), label_smoothing=0.3),
])  # fmt: skip
def test_class_weights_do_not_make_the_risk_depend_on_batching(loss):
    model, images, labels = classifier(), *(torch.cat(parts) for parts in zip(*examples(), strict=True))
    expected = loss(model(images), labels)
    for cuts in ([7], [1, 6], [3, 2, 2]):
        risk = hessian.empirical_risk(model, list(zip(images.split(cuts), labels.split(cuts), strict=True)), loss=loss)
        assert hessian.mean_loss(risk) == pytest.approx(expected.item(), rel=1e-12)
        found = hessian.trace(risk, "hessian", probes=3).mean
        assert found == pytest.approx(hutchinson(loss(model(images), labels), list(model.parameters()), 3), rel=1e-9)


def test_shares_of_classes_as_labels():
    model, images = classifier(), values(7, 4)
    shares = values(7, 3).softmax(-1)
    batches = list(zip(images.split([2, 5]), shares.split([2, 5]), strict=True))
    risk = hessian.empirical_risk(model, batches)
    assert risk.labels == 7
    assert hessian.mean_loss(risk) == pytest.approx(F.cross_entropy(model(images), shares).item(), rel=1e-12)
    hard = hessian.empirical_risk(model, [(images, shares.argmax(1))])
    assert hessian.trace(risk, "fisher").mean == pytest.approx(hessian.trace(hard, "fisher").mean, rel=1e-9)
    assert near(hessian.trace(risk, "ggn", probes=400, at_once=100), hessian.trace(hard, "fisher").mean)
    assert math.isfinite(hessian.trace(risk, "empirical_fisher").mean)


# Dead layers, half precision -----------------------------------------------------------------------------------------


def dead():
    model = classifier()
    nn.init.zeros_(model[2].weight)
    return hessian.empirical_risk(model, examples(), ["0.*"])


@pytest.mark.parametrize("kind", hessian.KINDS)
def test_the_trace_of_a_dead_layer_is_zero_and_it_has_no_density(kind):
    assert hessian.trace(dead(), kind, probes=3).mean == 0
    found = hessian.xtrace(dead(), kind, products=8)
    assert (found.mean, found.standard_error) == (0, 0)
    with pytest.raises(ValueError, match=f"'{kind}' is zero .* its spectrum is the single value 0"):
        hessian.spectral_density(dead(), kind, steps=4)


@pytest.mark.parametrize("products", [6, 16, 40])
def test_xtrace_is_exact_where_the_rank_is_below_its_products(products):
    images, labels = examples((1,))[0]
    risk = hessian.empirical_risk(classifier(), [(images, labels)])  # a GGN of rank 2
    expected = hessian.trace(risk, "fisher").mean
    found = hessian.xtrace(risk, "ggn", products=products)
    assert found.mean == pytest.approx(expected, rel=1e-9) and found.standard_error <= 1e-9 * expected


def test_xtrace_leaves_out_each_vector_in_turn():
    """Against its definition: project out what the other products span, and estimate what is left."""
    risk = hessian.empirical_risk(classifier(), examples((40,)))
    operator = hessian._Curvature(risk, "hessian")
    matrix = operator @ torch.eye(risk.dimension, dtype=torch.float64)
    found = hessian._xtrace(operator, 5, torch.Generator().manual_seed(1))
    signs = torch.randint(2, (risk.dimension, 5), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    each = []
    for i in range(5):
        basis = torch.linalg.qr(matrix @ signs[:, [j for j in range(5) if j != i]]).Q
        rest = signs[:, i] - basis @ (basis.T @ signs[:, i])
        each.append((basis.T @ matrix @ basis).trace() + rest @ matrix @ rest)
    assert found.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", [hessian.xtrace, hessian.top_eigenvalues, hessian.spectral_density])
def test_half_precision_is_refused_by_name(call, dtype):
    batches = [(images.to(dtype), labels) for images, labels in examples((40,))]
    risk = hessian.empirical_risk(classifier().to(dtype), batches)
    with pytest.raises(ValueError, match=rf"0.weight is {dtype}, too coarse for this: call .float\(\)"):
        call(risk)
