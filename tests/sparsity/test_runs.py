"""Plans: which runs an experiment has, with their labels."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from common.lab.results import load_experiment
from common.training import TrainingRecipe
from sparsity.studies.images import ImageTask
from sparsity.studies.runs import CONTROLS, VARIANTS, Run, check_variants, plan_density_tables, plan_setting

DIGITS = ImageTask("digits", width=16, depth=2, heads=2)
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
RECIPE = TrainingRecipe(12, 16, 3e-3, weight_decay=1.0)


def test_a_setting_is_run_with_each_variant_and_seed():
    found = list(plan_setting("s", DIGITS, RECIPE, {"modified": (0, 1), "vanilla": (2,)}, log_every=3))
    assert [tuple(labels.values()) for labels, _ in found] == [
        ("s", "modified", 0),
        ("s", "modified", 1),
        ("s", "vanilla", 2),
    ]
    assert found[1][1] == Run(DIGITS, RECIPE, VARIANTS["modified"], 1, log_every=3)


def test_a_plan_gives_the_first_setting_all_variants():
    settings = [("a", DIGITS, RECIPE), ("b", DIGITS, RECIPE)]
    labels = pd.DataFrame(
        label for label, _ in plan_density_tables(settings, seeds=(0, 1), single_seeds=(0,), l1=(0.1,))
    )
    first, second = labels[labels.setting == "a"], labels[labels.setting == "b"]
    assert set(first.variant) == {*VARIANTS, "ReLU + L1, 0.1"} and set(second.variant) == set(CONTROLS[:3])
    assert (first[first.variant.isin(CONTROLS)].groupby("variant").size() == 2).all()
    assert (first[~first.variant.isin(CONTROLS)].groupby("variant").size() == 1).all()


def test_an_unknown_variant_is_named_with_those_that_there_are():
    check_variants(VARIANTS)
    with pytest.raises(ValueError, match="unknown variant 'other'; there are vanilla, modified"):
        check_variants(["vanilla", "other"])


def test_the_first_setting_of_03_is_that_of_01_08_and_31():
    """Under the same recipe they find the same networks in the cache."""
    modules = [
        load_experiment(EXPERIMENTS / f"{name}.py")
        for name in ("03_vit_from_scratch", "01_augmented_flatness", "08_gradient_statistics", "31_curvature")
    ]
    for scale in ("laptop", "workstation", "paper"):
        first, *others = (module.scales[scale] for module in modules)
        width, depth = first.sizes[0]
        task = replace(first.task, width=width, depth=depth)
        recipe = replace(first.recipe, weight_decay=first.weight_decays[0])
        for other in others:
            own = other.training if hasattr(other, "training") else other.recipe
            assert (other.task, own, other.log_every) == (task, recipe, first.log_every)
