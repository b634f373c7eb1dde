"""The mergers' formulas, what experiment 26 times beside them, and what it says of the numbers."""

from functools import partial

import pandas as pd
import pytest
import torch

from merging import MERGERS
from merging.suites import formulas
from merging.suites import merging_speed as speed

CPU = torch.device("cpu")
FORMULAS = {
    "tsv_m": formulas.tsv_m_by_svd,
    "iso_c": formulas.iso_c_by_svd,
    "iso_cts": formulas.iso_cts_by_svd,
    "star": formulas.star_by_svd,
    "wudi": formulas.wudi_by_autograd,
}


@pytest.mark.parametrize("shape", [(160, 160), (160, 200), (200, 160)])  # large enough for a part of the triplets
@pytest.mark.parametrize("tasks", [2, 8, 20])
@pytest.mark.parametrize("method", [name for name in FORMULAS if name != "wudi"])
def test_mergers_are_as_exact_as_their_formula(method, tasks, shape):
    updates = speed.random_updates(shape, tasks, 0, CPU)
    exact = FORMULAS[method](updates.double())
    ours = MERGERS[method]([{"w": update} for update in updates])["w"]
    errors = [float((found.double() - exact).norm() / exact.norm()) for found in (ours, FORMULAS[method](updates))]
    assert errors[0] < 1e-6 and errors[0] <= errors[1]


def test_rows_time_every_contender_and_compare_what_it_returned():
    wudi = FORMULAS | {"wudi": partial(formulas.wudi_by_autograd, steps=2)}
    options = {"wudi": dict(steps=2)}
    rows = pd.DataFrame(speed.tower_rows(wudi, options, (24, 16), 3, seed=0, repeats=2, threads=1, device=CPU))
    seconds = rows[rows.metric == speed.SECONDS]
    assert len(seconds) == (5 * 3 + 1) * 2 and (seconds.value > 0).all()
    whole = speed.whole_runs(rows)
    assert len(whole) == 5 * 3 * 2 and speed.START not in set(whole.contender)
    errors = rows[rows.metric == speed.ERROR]
    assert len(errors) == 5 * 2 and errors.value.between(1e-12, 1e-4).all()
    wrong = FORMULAS | {"iso_c": lambda updates: 2 * formulas.iso_c_by_svd(updates)}
    found = pd.DataFrame(speed.tower_rows(wrong, {}, (24, 16), 3, seed=0, repeats=1, threads=1, device=CPU))
    one = found[(found.method == "iso_c") & (found.metric == speed.ERROR)].set_index("contender").value
    assert one[speed.OURS] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("part, contenders", [("tasks", 2), ("width", 2), ("rank", 1)])
def test_growth_is_that_of_one_size(part, contenders):
    given = dict(seed=0, repeats=1, threads=1, device=CPU)
    rows = pd.DataFrame(speed.growth_rows(FORMULAS, {"wudi": dict(steps=1)}, part, 3, 16, 2, **given))
    factored = [name for name in FORMULAS if MERGERS[name].factored]
    rows = rows[rows.contender != speed.START]
    assert len(rows) == contenders * len(factored if part == "rank" else FORMULAS)
    assert set(rows.tasks) == {3 if part == "tasks" else 2} and set(rows["size"]) == {3}


def table(ours=0.4, error=1e-8, slope=2.0):
    labels = dict(backbone="ViT-B/32", threads=1, tasks=8, seed=0, repeat=0)
    rows = []
    for method in ("tsv_m", "iso_c"):
        for shape, matrices in {"768 × 768": 48, "3072 × 768": 12}.items():
            for contender, value in {speed.OURS: ours, speed.FORMULA: 1.0, speed.EXACT: 2.0}.items():
                own = labels | dict(method=method, part="tower", shape=shape, matrices=matrices, contender=contender)
                value = value if method == "tsv_m" or contender != speed.OURS else 0.1 * (1 + 9 * (matrices == 12))
                rows += [own | dict(metric=speed.SECONDS, value=value)]
                if contender != speed.EXACT:
                    rows += [own | dict(metric=speed.ERROR, value=error if contender == speed.OURS else 1e-6)]
        for part in speed.GROWING:
            for size in (2, 4, 8):
                own = labels | dict(method=method, part=part, size=size, contender=speed.OURS)
                rows += [own | dict(metric=speed.SECONDS, value=0.1 * size**slope)]
    return pd.DataFrame(rows)


def test_seconds_of_a_few_steps_are_put_at_all_of_them():
    labels = dict(method="wudi", part="tower", shape="768 × 768", seed=0, repeat=0, tasks=8, threads=1, matrices=1)
    labels |= dict(metric=speed.SECONDS, backbone="ViT-B/32", steps=3)
    values = {speed.START: 5.0, speed.OURS: 8.0, speed.FORMULA: 6.0, speed.EXACT: 9.0}
    rows = pd.DataFrame([labels | dict(contender=name, value=value) for name, value in values.items()])
    other = rows.assign(method="iso_c", steps=float("nan")).query("contender != @speed.START")
    found = speed.whole_runs(pd.concat([rows, other])).set_index(["method", "contender"]).value
    assert found["wudi"].to_dict() == {speed.OURS: 5 + 300, speed.FORMULA: 600, speed.EXACT: 900}
    assert found["iso_c"].to_dict() == {speed.OURS: 8, speed.FORMULA: 6, speed.EXACT: 9}


def test_a_tower_counts_each_shape_as_often_as_it_has_it():
    tower = speed.tower_table(table()).set_index("method")
    assert tower.ratio["tsv_m"] == pytest.approx(0.4)
    assert tower.ratio["iso_c"] == pytest.approx((48 * 0.1 + 12 * 1.0) / 60)
    assert list(speed.ratios(table())) == [
        f"time of {method} / its formula, float32: ViT-B/32, 8 tasks, 1 thread" for method in ("tsv_m", "iso_c")
    ]


@pytest.mark.parametrize(
    "data, text",
    [
        (table(), "and as exact: tsv_m 0.40, iso_c 0.28"),
        (table(ours=0.6), "and as exact: iso_c 0.28; not: tsv_m 0.60"),
        (
            table(error=1e-5),
            "and as exact: none; not: tsv_m 0.40, less exact in 1 of 1, iso_c 0.28, less exact in 1 of 1",
        ),
        (table().assign(backbone="tiny"), "Mergers: not run"),
        (table().drop(columns="part"), ""),
    ],
)
def test_the_sentence_follows_the_rule(data, text):
    said = speed.sentence(data, "ViT-B/32", 0.5)
    assert said.endswith(text) and bool(said) == bool(text)


def test_exponents_are_slopes_and_tables_and_figures_are_there():
    found = speed.exponents(table(slope=1.5))
    assert (found[list(speed.GROWING.values())] == "1.50").all().all()
    assert len(speed.tables(table())) == 3 and len(speed.draw(table())) == 4
    assert speed.tables(table().drop(columns="part")) == speed.draw(table().drop(columns="part")) == {}
