"""The samples on which curvature is measured are spread over the data; its rows are those of `common.hessian`."""

import pytest
import torch
from torch import nn

from common import hessian, sharpness
from common.lab.curvature import curvature_rows, evenly_spaced


def test_samples_are_evenly_spaced_over_the_first_ones():
    read = []

    def batches():
        for start in range(0, 100, 10):
            read.append(start)
            numbers = torch.arange(start, start + 10)
            yield numbers.float().unsqueeze(1), numbers

    [(inputs, labels)] = evenly_spaced(batches(), 4, among=40)
    assert labels.tolist() == [0, 13, 26, 39] and inputs.squeeze(1).tolist() == labels.tolist()
    assert read == [0, 10, 20, 30]  # and no further
    [(_, labels)] = evenly_spaced([(torch.zeros(3, 1), torch.arange(3))], 8)
    assert labels.tolist() == [0, 1, 2]  # there are no more


def test_rows_are_traces_by_matrix_then_what_is_of_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    risk = hessian.empirical_risk(model, batches, ["0.weight", "2.weight"])
    *traces, top, noisy, adaptive, loss = curvature_rows(risk, {"GGN": "fisher"}, probes=2)
    exact = hessian.per_block(risk, "fisher", 2, 0)
    assert [(row["matrix"], row["metric"]) for row in traces] == [("0.weight", "GGN"), ("2.weight", "GGN")]
    assert [row["value"] for row in traces] == pytest.approx(exact.trace.tolist())
    assert traces[0]["mean_square"] == pytest.approx(model[0].weight.square().mean().item())
    assert top["matrix"] == "all" and top["value"] >= 0.9 * hessian.top_eigenvalues(risk).item()
    assert noisy["value"] == sharpness.noise_sharpness(risk, draws=2).mean
    assert adaptive["value"] == sharpness.adaptive_sharpness(risk)
    assert loss["value"] == pytest.approx(nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).item())
