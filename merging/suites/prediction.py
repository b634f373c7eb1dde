"""Whether features of task vectors foretell what merging does: rank correlations over sets that share tasks.

Leave tasks out. The score that a feature gives a set T may use the targets only of sets that share no task with T:

    score_T = sign(c_T) z_T,    c_T the covariance of z and the target's ranks over the sets disjoint from T

with z the feature's centred ranks over all sets, for features need no target. So only the direction is learned, and
never from tasks of T. Several features together score Σ_f w_f z_f with ridge weights w fitted on the disjoint sets.
The intercept is left out: it would carry nothing but the mean of the others' targets. ρ is Spearman's correlation of
score and target over all sets; where a feature foretells nothing it is about 0, below it where directions flip.

Interval. Sets share tasks, so that tasks are left out one by one with all sets that hold them, and everything above is
done again (delete-one jackknife; Student's t with one degree of freedom less than tasks, on Fisher's z for ρ itself).
Where even the direction depends on single tasks the interval is very wide.

Chance. Targets move to other sets by exchanging tasks (T → π(T), as in Mantel's test), features stay: what sets have in
common, and their sizes, stay as they are. `bar` is the 95 % quantile of the LARGEST ρ of all features under such
relabellings, so that one of many features does not pass by luck.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from merging.interference import COSINE, FEATURES, NORM, TASKS
from merging.suites.task_sets import STARTS, TARGETS, TUNED, circle

BASELINES = (TASKS, NORM, COSINE)
TOGETHER = {"baselines together": BASELINES, "all together": FEATURES}  # by ridge
SIMPLE = (*BASELINES, "baselines together")  # what a feature has to beat
RELABELLINGS = 99
PENALTY = 0.1  # of the ridge, per set that it is fitted on
NEEDED = 3  # sets that share no task with a set, so that it is scored
ADVICE = 0.5  # ρ above which a feature is worth telling a user


@dataclass(frozen=True)
class Group:
    """Sets of tasks of one backbone, with features and targets of every seed."""

    name: str
    tasks: tuple[str, ...]
    members: np.ndarray  # (S, n) whether a set holds a task
    features: Mapping[str, np.ndarray]  # name → (seeds, S)
    targets: Mapping[str, np.ndarray]  # name → (seeds, S)
    halves: Mapping[str, np.ndarray]  # name → (2, seeds, S), the target from either half of the test samples

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return len(self.targets[TUNED])


def groups(data: pd.DataFrame) -> Iterator[Group]:
    """Yield for every backbone its pairs of tasks, and all its sets if there are larger ones.

    Args:
        data: the rows of `task_sets.rows` with columns backbone and seed.
    """
    for backbone, own in data.groupby("backbone", sort=False):
        yield _group(f"{backbone}, pairs", own[own.tasks == 2])
        if (own.tasks > 2).any():
            yield _group(f"{backbone}, 2 to {own.tasks.max():.0f} tasks", own)


def _group(name: str, rows: pd.DataFrame) -> Group:
    def by_metric(kind: str, value: str = "value") -> dict[str, np.ndarray]:
        wide = rows[rows.kind == kind].pivot(index=["metric", "seed"], columns="set", values=value)[sets]
        return {metric: part.to_numpy(float) for metric, part in wide.groupby("metric", sort=False)}

    sets = list(rows.set.unique())
    tasks = tuple(dict.fromkeys(task for own in sets for task in own.split("+")))
    members = np.array([[task in own.split("+") for task in tasks] for own in sets])
    features, targets = by_metric("feature"), by_metric("target")
    first, second = by_metric("target", "first"), by_metric("target", "second")
    return Group(
        name,
        tasks,
        members,
        _telling({metric: features[metric] for metric in FEATURES}),
        {metric: targets[metric] for metric in (*TARGETS, *STARTS)},
        {metric: np.stack([first[metric], second[metric]]) for metric in TARGETS if np.isfinite(first[metric]).all()},
    )


def _telling(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the features that differ between sets, and from each other: a pair has one cosine, and 2 tasks."""
    kept: dict[str, np.ndarray] = {}
    for name, values in features.items():
        if np.ptp(values) > 0 and not any(np.array_equal(values, other) for other in kept.values()):
            kept[name] = values
    return kept


# Correlations --------------------------------------------------------------------------------------------------------


def left_out_correlations(
    members: np.ndarray, features: Mapping[str, np.ndarray], targets: np.ndarray
) -> dict[str, np.ndarray]:
    """Return ρ of every feature, and of those of TOGETHER, with every target, tasks left out as defined above.

    Args:
        members: (S, n) whether each of S sets holds each of n tasks.
        features: name → (S,).
        targets: (T, S).

    Returns:
        name → (T,), NaN where fewer than three sets can be scored or all scores are equal.
    """
    disjoint = (members.astype(float) @ members.T == 0).astype(float)  # (S, S)
    counts = disjoint.sum(1)
    scored = counts >= NEEDED
    if scored.sum() < NEEDED:
        return {name: np.full(len(targets), math.nan) for name in (*features, *TOGETHER)}
    counts = np.maximum(counts, 1)
    goal = _ranks(targets)  # (T, S)
    means = goal @ disjoint / counts
    ranks = {name: _ranks(values) for name, values in features.items()}
    slopes = {name: (goal * z) @ disjoint / counts - means * (z @ disjoint / counts) for name, z in ranks.items()}
    signs = {name: np.sign(slope.round(12)) for name, slope in slopes.items()}  # 0 where they all have one value
    found = {name: _correlation((signs[name] * z)[:, scored], goal[:, scored]) for name, z in ranks.items()}
    for name, parts in TOGETHER.items():
        z = np.stack([ranks[part] for part in parts if part in ranks], 1)  # (S, F)
        slope = np.stack([slopes[part] for part in parts if part in ranks], -1)  # (T, S, F)
        mean = disjoint @ z / counts[:, None]
        products = np.einsum("st,tf,tg->sfg", disjoint, z, z, optimize=True) / counts[:, None, None]
        covariance = products - mean[:, :, None] * mean[:, None, :] + PENALTY * np.eye(z.shape[1]) / len(z)
        weights = np.linalg.solve(covariance, slope[..., None])[..., 0]  # (T, S, F)
        found[name] = _correlation((weights * z).sum(-1)[:, scored], goal[:, scored])
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return centred ranks of unit length along the last axis; equal values share theirs."""
    ranks = stats.rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    length = np.linalg.norm(ranks, axis=-1, keepdims=True)
    return ranks / np.where(length > 0, length, np.nan)


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (_ranks(first) * _ranks(second)).sum(-1)


def _over_seeds(group: Group, kept: np.ndarray | None = None, moved: np.ndarray | None = None) -> pd.DataFrame:
    """Return ρ, mean over seeds: features in rows, targets in columns (with relabellings: targets, one after another).

    Args:
        group: the sets.
        kept: (S,) which sets take part; default all.
        moved: (R, S) of which set each takes the target; default its own.
    """
    kept = np.ones(len(group.members), bool) if kept is None else kept
    found = []
    for seed in range(group.seeds):
        targets = np.stack([group.targets[name][seed] for name in TARGETS])  # (T, S)
        targets = targets[:, kept] if moved is None else targets[:, moved].reshape(-1, len(kept))
        features = {name: values[seed][kept] for name, values in group.features.items()}
        found.append(pd.DataFrame(left_out_correlations(group.members[kept], features, targets)).T)
    return sum(found) / len(found)


def relabellings(tasks: Sequence[str], members: np.ndarray, count: int = RELABELLINGS) -> np.ndarray:
    """Return (R, S): the place of π(T) among the sets, for every set T and R permutations π of the tasks.

    They are drawn at random if every permutation maps the sets onto themselves, else the shifts of the circular
    designs of `task_sets` that do. The identity is none of them.
    """
    places = {own.tobytes(): place for place, own in enumerate(members)}

    def moved(permutation: Sequence[int]) -> list[int] | None:
        found = [places.get(own.tobytes()) for own in np.ascontiguousarray(members[:, permutation])]
        return None if None in found else found

    draw = np.random.default_rng(0)
    drawn = [moved(draw.permutation(len(tasks))) for _ in range(count)]
    if None in drawn:
        around = [tasks.index(task) for task in circle(tasks)]
        shifts = [dict(zip(around, around[shift:] + around[:shift], strict=True)) for shift in range(1, len(tasks))]
        drawn = [moved([shift[place] for place in range(len(tasks))]) for shift in shifts]
    return np.array([own for own in drawn if own is not None], int).reshape(-1, len(members))


# Answers -------------------------------------------------------------------------------------------------------------


def answers(data: pd.DataFrame) -> pd.DataFrame:
    """Return what every feature foretells of every target in every group of sets.

    Returns:
        One row for each: group, target, feature, rho, low, high (95 %), chance_low and chance_high (2.5 and 97.5 %
        quantile under relabelling), bar, plain (Spearman's ρ with its sign, nothing left out), best (the simple
        baseline with the highest ρ), over (ρ less that of the best, or less 0 if that is negative), over_low,
        over_high, ceiling (see `ceiling`), and three answers: foretells (low > 0 and ρ > bar), beyond (foretells, and
        over_low > 0; never for what is simple) and advice (foretells, and low > 0.5).
    """
    return pd.DataFrame(list(itertools.chain.from_iterable(map(_answers, groups(data)))))


def _answers(group: Group) -> Iterator[dict[str, object]]:
    whole = _over_seeds(group)
    without = [_over_seeds(group, kept=~group.members[:, place]) for place in range(len(group.tasks))]
    moved = relabellings(group.tasks, group.members)
    chance = _over_seeds(group, moved=moved) if len(moved) else None
    for column, target in enumerate(TARGETS):
        rho = whole[column]
        left_out = pd.DataFrame([each[column] for each in without])  # (n, features)
        shuffled = None if chance is None else chance.iloc[:, column * len(moved) : (column + 1) * len(moved)]
        bar = math.nan if shuffled is None else float(np.quantile(shuffled.max(), 0.95))
        simple = rho[[name for name in SIMPLE if name in rho]]
        best = simple.idxmax() if simple.notna().any() else None
        for name in rho.index:
            low, high = jackknife(rho[name], left_out[name].to_numpy(), is_correlation=True)
            over, over_low, over_high = math.nan, math.nan, math.nan
            if best and name not in SIMPLE:
                over = rho[name] - max(rho[best], 0)  # what foretells the wrong way is worth no more than nothing
                over_low, over_high = jackknife(over, (left_out[name] - left_out[best].clip(lower=0)).to_numpy())
            ends = [math.nan] * 2 if shuffled is None else np.quantile(shuffled.loc[name], [0.025, 0.975])
            foretells = bool(low > 0 and rho[name] > bar)
            plain = math.nan
            if name in group.features:
                plain = float(_correlation(group.features[name], group.targets[target]).mean())
            yield dict(
                group=group.name, target=target, feature=name, rho=rho[name], low=low, high=high,
                chance_low=ends[0], chance_high=ends[1], bar=bar, plain=plain, best=best,
                over=over, over_low=over_low, over_high=over_high, ceiling=ceiling(group, target),
                foretells=foretells, beyond=foretells and over_low > 0, advice=foretells and low > ADVICE,
            )  # fmt: skip


def jackknife(estimate: float, left_out: np.ndarray, *, is_correlation: bool = False) -> tuple[float, float]:
    """Return the 95 % interval of an estimate from its n values with one unit left out at a time.

    Its standard error is √((n − 1)/n Σ_i (θ_i − mean θ)²) (Tukey, 1958); the interval is Student's with n − 1 degrees
    of freedom, for correlations on Fisher's z = artanh ρ.

    Returns:
        low and high, NaN where a value is.
    """
    limit = 1 - 1e-6  # artanh of 1 is infinite
    values = np.arctanh(np.clip(left_out, -limit, limit)) if is_correlation else left_out
    centre = math.atanh(min(max(estimate, -limit), limit)) if is_correlation else estimate
    count = len(values)
    reach = stats.t.ppf(0.975, count - 1) * math.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum())
    ends = centre - reach, centre + reach
    return tuple(map(math.tanh, ends)) if is_correlation else ends


def ceiling(group: Group, target: str) -> float:
    """Return about the highest ρ that a target's noise allows, √(2r / (1 + r)); NaN where it has no halves.

    r is Spearman's correlation of the target from one half of the test samples with that from the other, mean over
    seeds; Spearman–Brown's formula makes it that of two measurements on all samples. 0 where r is negative.
    """
    if target not in group.halves:
        return math.nan
    reliability = float(_correlation(*group.halves[target]).mean())
    return math.sqrt(max(0.0, 2 * reliability / (1 + reliability))) if reliability > -1 else 0.0


def starts(data: pd.DataFrame) -> pd.DataFrame:
    """Return what starting at a scale that needs no data costs against the tuned one, in points of mean accuracy.

    Returns:
        One row for each group and scale: group, scale, mean over sets and seeds, low and high (95 %, tasks left out
        one by one), worst (5 % quantile over sets and seeds).
    """
    lines = []
    for group in groups(data):
        for scale in STARTS:
            costs = group.targets[scale].mean(0)  # (S,)
            left_out = [costs[~group.members[:, place]].mean() for place in range(len(group.tasks))]
            low, high = jackknife(costs.mean(), np.array(left_out))
            worst = np.quantile(group.targets[scale], 0.05)
            lines.append(dict(group=group.name, scale=scale, mean=costs.mean(), low=low, high=high, worst=worst))
    return pd.DataFrame(lines)
