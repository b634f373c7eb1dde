"""Contenders of experiment 10: the share of zeros that is stated is reached, and all compute the same."""

import pytest
import torch

from sparsity.studies import speed


@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_zeros_are_those_stated(zeros):
    torch.manual_seed(0)
    layer = speed.Layer(128, 512).eval()
    speed.set_zeros(layer, zeros, draw=True)
    batch = torch.randn(200, 128)
    density, union = speed.densities(layer, lambda: layer(batch))
    active = layer.mlp.fc1(batch) > 0
    assert density == pytest.approx(active.float().mean().item()) == pytest.approx(1 - zeros, abs=0.02)
    assert union == pytest.approx(active.any(0).float().mean().item())
    given = torch.cat(speed.activations(50, 512, zeros))
    assert (given == 0).float().mean().item() == pytest.approx(zeros, abs=0.02)


def test_tokens_share_their_variance():
    torch.manual_seed(0)
    alike = torch.stack(speed.tokens(400, 2, 32, common=0.9))
    assert alike.var().item() == pytest.approx(1, abs=0.05)
    assert (alike[:, 0] * alike[:, 1]).mean().item() == pytest.approx(0.9, abs=0.05)


def test_contenders_agree():
    torch.manual_seed(0)
    model = speed.opt(32, 96, 2, 2, vocabulary=64, positions=16)
    models = speed.contenders(model, most_tokens=2)
    speed.share_zeros(models, 0.9)
    prompt = torch.randint(2, 64, (1, 3))
    texts = {
        name: speed.on_fresh(lambda ids, each=each: speed.generate(each, 5, ids), [prompt])()
        for name, each in models.items()
    }
    assert all(torch.equal(text, texts[speed.DENSE]) for text in texts.values()) and len(texts) == 4
