"""Variants of SVC: its space, its target, its floor α, the scale of the update, the basis of its directions.

The functions `…_rows(suite, method, seed)` yield the rows of one merger on one suite, with the seed of DARE's masks.
Experiments 23, 24 and 25 choose among them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from merging import calibration, mergers
from merging.calibration import SVC, SVC_MATRICES, calibrate, own_bases, published_alpha
from merging.suites import reference
from merging.suites.chance import chance_coefficients
from merging.suites.comparison import scored
from merging.suites.suite import Rows, Suite
from merging.task_vectors import TaskVector, apply, combine

Labels = dict[str, Any]
Labelled = Sequence[tuple[Labels, TaskVector]]

SHARES_OF_1 = (1 / 4, 1 / 2, 1.0, 2.0)  # α as a multiple of 1/K
ALPHAS = (0.5, 1.0, 2.0, 4.0)  # further values of α
SCALES = tuple(2 ** (step / 2) for step in range(-8, 5))  # 1/16 to 4, times the merger's own
MATRIX_SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
OTHER_SCALES = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)


def merge(suite: Suite, method: str, seed: int) -> tuple[list[TaskVector], TaskVector, float]:
    """Return the task vectors of a suite, the merged one, and the α of the paper."""
    updates = suite.task_vectors()
    return updates, mergers.merge(method, updates, seed), published_alpha(method, len(updates))


# Space and target ----------------------------------------------------------------------------------------------------


def space_rows(suite: Suite, method: str, seed: int) -> Rows:
    """Yield the rows of one merger without SVC and with it in both spaces, at scale 1 and the paper's α.

    The counts gained and lost compare each with the base; "_over_input" compares the output with the input space.
    """
    updates, merged, alpha = merge(suite, method, seed)
    common = dict(method=method, scale_rule="fixed", scale=1.0)
    found = [(common | dict(svc="none", alpha=None), merged)]
    for space in ("output", "input"):
        found.append((common | dict(svc=space, alpha=alpha), calibrate(merged, updates, alpha=alpha, space=space)))
    yield from scored(suite, found, pairs=[{}, {"": 0, "_over_input": 2}, {"": 0}])


def target_rows(suite: Suite, method: str, seed: int) -> Rows:
    """Yield the rows of one merger without SVC, with SVC for all tasks, and with SVC for each task in turn.

    The counts gained and lost compare each with the first ("_over_base") and with the second ("_over_svc"). The models
    with a target and α = 1 tell the effect of α from that of the target: only the rows of their own targets are kept.
    """
    updates, merged, published = merge(suite, method, seed)
    found = [("none", None, merged), ("none", published, calibrate(merged, updates, alpha=published))]
    for alpha in dict.fromkeys([published, 1.0]):
        for target, name in enumerate(suite.tasks):
            found.append((name, alpha, calibrate(merged, updates, alpha=alpha, target=target)))
    labelled = [
        (dict(method=method, svc="output" if alpha else "none", target=name, alpha=alpha, scale_rule="fixed"), update)
        for name, alpha, update in found
    ]
    for row in scored(suite, labelled, pairs=[{"_over_base": 0, "_over_svc": 1}] * len(labelled)):
        if row["alpha"] in (None, published) or row["target"] == row["task"]:
            yield row


# Floor and scale -----------------------------------------------------------------------------------------------------


def sweep_rows(suite: Suite, method: str, seed: int) -> Rows:
    """Yield the rows of one merger over α and over its scale, the best of each, and variants of the rule.

    Parts of the table: "scale" and "alpha" (the sweeps), "tuned" (the choices on validation data, and by an oracle),
    "paired" (the choices on validation data, task by task), "rule" (the legacy rule, s corrected for chance, and qkv
    split).
    """
    updates, merged, default = merge(suite, method, seed)
    alphas = sorted({default, *ALPHAS, *(share / len(updates) for share in SHARES_OF_1)})
    calibrated = {alpha: calibrate(merged, updates, alpha=alpha) for alpha in alphas}
    sweeps = {
        "none": mean_rows(suite, _scales(method, "none", None, merged)),
        "output": mean_rows(suite, _scales(method, "output", default, calibrated[default])),
        "alpha": mean_rows(suite, [(_labels("alpha", method, "output", a), own) for a, own in calibrated.items()]),
    }
    for rows in sweeps.values():
        yield from rows

    own = [next(row for row in sweeps[svc] if row["scale"] == 1) | dict(part="tuned") for svc in ("none", "output")]
    names = {"none": "tuned scale", "output": "tuned scale", "alpha": "tuned α"}
    tuned = [chosen(sweeps[key], "validation", name) for key, name in names.items()]
    yield from [*own, *tuned, *(chosen(sweeps[key], "oracle", name) for key, name in names.items())]
    yield from choice_rows(suite, [*own, *tuned], {None: merged} | calibrated)

    chance = chance_coefficients(method, updates, seed)
    variants = {
        "legacy rule": calibrate(merged, updates, alpha=default, rule="legacy"),
        "chance-corrected": calibrate(merged, updates, alpha=default, chance=chance),
    }
    if any(name.endswith(calibration.FUSED_QKV) for name in merged):
        variants["split qkv"] = calibrate(merged, updates, alpha=default, split_qkv=True)
    found = [(_labels("rule", method, "output", default, variant=name), update) for name, update in variants.items()]
    yield from mean_rows(suite, found)


def _scales(method: str, svc: str, alpha: float | None, update: TaskVector) -> Labelled:
    return [(_labels("scale", method, svc, alpha, scale), scaled(update, scale)) for scale in SCALES]


def matrix_scale_rows(suite: Suite, method: str, seed: int) -> Rows:
    """Yield the rows (part "apart") of one merger with the matrices at one scale and all other tensors at another."""
    updates, merged, default = merge(suite, method, seed)
    for alpha, update in {None: merged, default: calibrate(merged, updates, alpha=default)}.items():
        grid = [(scale, others) for scale in MATRIX_SCALES for others in OTHER_SCALES]
        svc = "output" if alpha else "none"
        found = [(_labels("apart", method, svc, alpha, *pair), scaled_separately(update, *pair)) for pair in grid]
        yield from mean_rows(suite, found)


def basis_rows(suite: Suite, method: str, seed: int) -> Rows:
    """Yield the rows of SVC in several bases of one merged update; if its σ are equal, each is as good as another."""
    updates, merged, default = merge(suite, method, seed)
    noisy = perturbed(merged, 1e-7, seed)
    found = {
        "default": calibrate(merged, updates, alpha=default),
        "perturbed by 1e-7": calibrate(noisy, updates, alpha=default),
    }
    bases = {
        "float64 SVD": reference.left_singular_vectors(merged, torch.float64),
        "float32 SVD": reference.left_singular_vectors(merged, torch.float32),
    }
    if own := own_bases(method, updates, SVC()):
        bases["merger's own"] = own
    found |= {name: calibrate(merged, updates, alpha=default, bases=basis) for name, basis in bases.items()}
    labelled = [(_labels("basis", method, "output", default, variant=name), update) for name, update in found.items()]
    yield from mean_rows(suite, labelled)
    for labels, update in labelled:
        distance = reference.relative_distance(update, found["default"])
        yield labels | dict(task="mean", metric="distance", value=distance)


def _labels(
    part: str,
    method: str,
    svc: str,
    alpha: float | None,
    scale: float = 1.0,
    others: float | None = None,
    variant: str = "default",
) -> Labels:
    """Label a row: `scale` is that of the matrices which SVC treats, `others` that of all other tensors."""
    labels = dict(part=part, method=method, svc=svc, alpha=alpha, scale_rule="fixed")
    return labels | dict(scale=scale, others=scale if others is None else others, variant=variant)


def mean_rows(suite: Suite, labelled: Labelled) -> list[Labels]:
    """Return a row for each labelled update: its mean accuracy on test (value) and on validation samples."""
    states = [apply(suite.pretrained, update) for _, update in labelled]
    scores = zip(labelled, suite.scores(states), suite.scores(states, "validation"), strict=True)
    outcome = dict(task="mean", metric="accuracy")
    return [labels | outcome | dict(value=test, validation=own) for (labels, _), test, own in scores]


def chosen(rows: Iterable[Labels], rule: str, variant: str) -> Labels:
    """Return the row of a sweep with the best score; the first row wins a tie.

    Args:
        rows: of the sweep, as `mean_rows` returns them.
        rule: "validation" takes the score on validation samples, "oracle" that on test samples.
        variant: label of the chosen row.
    """
    best = max(rows, key=lambda row: row["validation" if rule == "validation" else "value"])
    return best | dict(part="tuned", scale_rule=rule, variant=variant)


def choice_rows(suite: Suite, choices: Sequence[Labels], updates: Mapping[float | None, TaskVector]) -> Rows:
    """Yield the rows of chosen variants task by task, paired with the base at its own scale and at a tuned one.

    Args:
        suite: whose tasks are scored.
        choices: rows of the variants, the two bases among them.
        updates: α → update; None → that of the base.
    """
    kept = ("method", "svc", "alpha", "scale_rule", "scale", "others", "variant", "validation")
    labelled = [({key: row[key] for key in kept} | dict(part="paired"), updates[row["alpha"]]) for row in choices]
    base = {row["scale_rule"]: index for index, row in enumerate(choices) if row["svc"] == "none"}
    pairs = [{"": base["fixed"], "_over_tuned": base["validation"]}] * len(choices)
    for row in scored(suite, labelled, pairs):
        if row["variant"] != "default" or row["svc"] != "none":  # the base is what the others are compared with
            yield row


def scaled(update: TaskVector, scale: float) -> TaskVector:
    """Return the update times a scale."""
    return {name: scale * tensor for name, tensor in update.items()}


def scaled_separately(update: TaskVector, scale: float, others: float) -> TaskVector:
    """Return the update with the matrices that SVC treats times `scale`, and all other tensors times `others`."""
    return combine(scaled(update, scale), scaled(update, others), SVC_MATRICES)


def perturbed(update: TaskVector, size: float, seed: int) -> TaskVector:
    """Return the update plus normal noise, whose Frobenius norm is about `size` times that of each tensor."""
    generator, noisy = torch.Generator().manual_seed(seed), {}
    for name, tensor in update.items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        noisy[name] = tensor + size * tensor.norm() / max(1, tensor.numel()) ** 0.5 * noise
    return noisy
