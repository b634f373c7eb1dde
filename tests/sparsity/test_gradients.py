"""Histograms of log10 g² over all layers, against the entries themselves; experiment 08's answer on two settings."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.lab.experiment import load_experiment
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


def saved(setting, factor):
    """Rows of made-up snapshots in one setting: vanilla, and modified with `factor` times its gradient density."""
    rows = []
    for variant, share in {"vanilla": 0.2, "modified": 0.2 * factor}.items():
        for seed in range(3):
            own = share * (1 + 0.01 * seed)
            values = {"activation_gradient": 1.0, "activation_gradient_ratio": 1.5 + 0.01 * seed}
            values |= dict.fromkeys(("gradient_density", "derivative_density", "density"), own)
            values |= dict.fromkeys(("beneficial_units", "harmful_units", "units"), 1.0)
            values |= {f"effective_gradient_below_{bound}": 1 - own for bound in ("1e-9", "1e-6", "1e-3")}
            labels = dict(setting=setting, variant=variant, seed=seed, split="saved weights", step=10, layer="a")
            rows += [labels | {"metric": metric, "value": value} for metric, value in values.items()]
    return rows


@pytest.mark.parametrize("factor, head", [(0.5, "reproduced (holding: a, b, c)"), (1.5, "reproduced in part")])
def test_what_holds_has_to_hold_in_every_setting(factor, head):
    experiment = load_experiment(Path(__file__).resolve().parents[2] / "experiments" / "08_gradient_statistics.py")
    alone = pd.DataFrame(saved("digits", 0.5))
    assert experiment.verdict(alone).startswith("reproduced (holding: a, b, c). Entries with")
    both = pd.DataFrame(saved("digits", 0.5) + saved("T5, python", factor))
    text = experiment.verdict(both)
    assert text.startswith(head) and "digits: Entries" in text and "T5, python: Entries" in text
    change = 100 * (factor - 1)
    assert f"gradient density of modified against vanilla {change:+.1f} [" in text.split("T5, python")[1]
    assert list(experiment.compare(both, None).same_setting.unique()) == [
        "no: small ViT on embedded images",
        "no: small T5 on Python sources",
    ]
