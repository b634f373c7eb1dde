"""The learning rate on validation data: E is kept, the best rate is named, and so is what was not resolved."""

from dataclasses import replace

import pandas as pd
import pytest

from sparsity.studies import rate_choice
from sparsity.studies.recipes import VIT


def scores(by_rate, used):
    rows = [
        dict(setting="s", seed=seed, learning_rate=rate, split="validation", metric=metric, value=value,
             variant=rate_choice.IN_USE if rate == used else rate_choice.OTHER)
        for rate, values in by_rate.items()
        for seed, value in enumerate(values)
        for metric in rate_choice.METRICS
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((90.0, 91.0, 92.0), "the one in use, 0.003, is the best (n = 3); not resolved from it: none."),
        ((95.0, 96.1, 97.0), "0.001 is the best: +2.0 [+1.9, +2.2] points above 0.003, the one in use (n = 3)"),
        ((93.0, 99.0, 94.0), "which is not resolved"),
        ((93.0, 94.0, 94.9), "the one in use, 0.003, is the best (n = 3); not resolved from it: 0.001."),
    ],
)
def test_the_best_rate_is_named_with_what_is_not_resolved(others, said):
    data = scores({1e-3: others, 3e-3: (93.0, 94.0, 95.0)}, used=3e-3)
    assert said in rate_choice.remark(data)
    table = rate_choice.table(data).set_index("learning rate")
    against = table["accuracy against the rate in use, points [95 %]"]
    assert against["0.003"] == "in use" and "[" in against["0.001"]


def test_every_rate_has_the_decay_that_keeps_e(monkeypatch):
    seen = []

    def measure_all(plan, context, measure_one):
        for labels, run in plan:
            seen.append((labels["variant"], run.recipe.learning_rate * run.recipe.weight_decay, run.variant))
            yield (
                labels,
                [{"layer": "all", "metric": "score", "value": 1.0}, {"layer": 1, "metric": "density", "value": 2.0}],
            )

    monkeypatch.setattr(rate_choice, "measure_all", measure_all)
    recipe = replace(VIT["smoke"]["recipe"], learning_rate=2e-3, weight_decay=0.5)
    rows = list(rate_choice.measure("s", VIT["smoke"]["task"], recipe, (1e-3, 4e-3), (0, 1), None))
    assert [variant for variant, *_ in seen] == ["vanilla"] * 2 + [rate_choice.OTHER] * 4  # the one in use is there
    assert {e for _, e, _ in seen} == {1e-3} and len({variant for *_, variant in seen}) == 1
    assert {row["metric"] for row in rows} == {"score"} and {row["split"] for row in rows} == {"validation"}
