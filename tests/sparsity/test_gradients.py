"""Histograms of log10 g² over all layers: quantiles and shares, against the entries themselves."""

import numpy as np
import pytest

from sparsity.studies.gradients import QUANTILES, histogram_rows


def test_quantiles_and_shares_are_those_of_the_entries():
    generator = np.random.default_rng(0)
    layers, bins, every = {}, [], []
    edges = np.arange(-32, 8.25, 0.25)
    for name in ("a", "b"):
        exponents = generator.normal(-6, 2, 500)
        active = exponents[:200]
        counts, some = (np.histogram(part, edges)[0] for part in (exponents, active))
        bins += [
            dict(layer=name, left=edge, all=int(n), active=int(m))
            for edge, n, m in zip(edges, counts, some, strict=False)
        ]
        # half of the entries have no gradient at all: they are in no bin
        layers[name] = dict(samples=10, tokens=10, units=10, density=0.2)
        every.append(exponents)
    rows = list(histogram_rows(bins, layers, whole=True))
    exponents = np.concatenate(every)
    for quantile in QUANTILES:
        [row] = [row for row in rows if row["metric"] == f"log10 g², all: {quantile:g} quantile"]
        assert row["value"] == pytest.approx(np.quantile(exponents, quantile), abs=0.25)
    shares = {row["log10_g2"]: row["value"] for row in rows if row["metric"] == "histogram, all"}
    assert sum(shares.values()) == pytest.approx(0.5)
    assert shares[-6.25] == pytest.approx(np.mean((exponents >= -6.5) & (exponents < -6.0)) / 2)
    assert sum(row["value"] for row in rows if row["metric"] == "histogram, active") == pytest.approx(1.0)
    assert not [row for row in histogram_rows(bins, layers, whole=False) if "histogram" in row["metric"]]
