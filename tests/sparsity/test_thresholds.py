"""Thresholds on activations: the quantile that a naive count finds, and nothing left behind."""

import pytest
import torch

from sparsity import find_blocks, probe
from sparsity.thresholds import active_sizes, thresholded, thresholds


@pytest.mark.parametrize("family", ["vit", "t5", "bert", "gpt2"])
@pytest.mark.parametrize("kept", [0.7, 0.25])
def test_the_wanted_share_of_active_entries_is_left(family, kept, build):
    tiny = build(family)
    tiny.model.eval()
    seen = {}
    handles = [
        block.activation.register_forward_hook(lambda module, inputs, output, n=block.name: seen.update({n: output}))
        for block in find_blocks(tiny.model)
    ]
    with torch.no_grad():
        plain = tiny.output()
        active = {name: int((values > 1e-6).sum()) for name, values in seen.items()}
        levels = thresholds(active_sizes(tiny.model, tiny.output), kept)
        with thresholded(tiny.model, levels):
            cut = tiny.output()
        first = find_blocks(tiny.model)[0].name
        assert int((seen[first] != 0).sum()) == pytest.approx(kept * active[first], abs=1)
        assert seen[first][seen[first] != 0].min() > levels[first]
        assert not torch.allclose(cut, plain, atol=1e-6)
        assert tiny.output().equal(plain)
    for handle in handles:
        handle.remove()


def test_keeping_all_changes_nothing_and_a_probe_sees_what_is_cut(build):
    tiny = build("vit")
    tiny.model.eval()
    with torch.no_grad():
        plain = tiny.output()
        levels = thresholds(active_sizes(tiny.model, tiny.output), 1.0)
        assert set(levels.values()) == {0.0}
        with thresholded(tiny.model, levels):
            assert tiny.output().equal(plain)
        densities = []
        for kept in (1.0, 0.5):
            with (
                thresholded(tiny.model, thresholds(active_sizes(tiny.model, tiny.output), kept)),
                probe(tiny.model) as seen,
            ):
                tiny.output()
            densities.append(seen.summary().density.iloc[0])
    assert densities[1] == pytest.approx(0.5 * densities[0], rel=0.02)


@pytest.mark.parametrize("kept", [0.0, -0.1, 1.5])
def test_a_share_that_is_none_is_refused(kept, build):
    tiny = build("vit")
    with pytest.raises(ValueError, match="share of activations that are kept"):
        thresholds(active_sizes(tiny.model, tiny.output), kept)


def test_a_dead_layer_has_no_threshold(build):
    tiny = build("vit")
    find_blocks(tiny.model)[0].key.bias.data.fill_(-1e3)
    assert thresholds(active_sizes(tiny.model, tiny.output), 0.5)[find_blocks(tiny.model)[0].name] == 0.0
