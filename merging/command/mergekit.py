"""Recipes of mergekit (its YAML files), read as recipes of this command.

What they mean was read off mergekit 0.1.5. τ_i = θ_i − θ_0 are the updates, τ_i' what sparsification leaves of them,
w_i the weights, λ lambda, and m_i = 1 where an entry of w_i τ_i' has the sign of their sum:

    linear                Σ w_i θ_i / Σ w_i                             weight_average --normalize, with the base
    task_arithmetic       θ_0 + λ Σ w_i τ_i       [/ Σ w_i]             task_arithmetic [weight_average --normalize]
    ties                  θ_0 + λ Σ m_i w_i τ_i'  [/ Σ m_i w_i]         ties, combine=sum [mean, --normalize]
    dare_linear           θ_0 + λ Σ w_i τ_i'      [/ Σ w_i]             dare, combine=sum [mean, --normalize]
    dare_ties             θ_0 + λ Σ m_i w_i τ_i'  [/ Σ m_i w_i]         dare, combine=elected sum [mean, --normalize]

The brackets are `normalize: true`, the default of linear and ties. λ is our final scale, density our keep or 1 − drop.
A setting is a number, a gradient [a, b, …] over the layers, or a list of {filter, value}, of which the first that fits
counts (with us the last); a model's settings come before those for all. Two methods agree not exactly: DARE draws other
masks, and rescales by 1 / density where mergekit restores Σ |τ_i|; and TIES keeps ⌊density · d⌋ + 1 entries, as its
authors do, and all that are equal to the last of them, where mergekit keeps ⌊density · d⌋, whichever come first.
Relative paths are relative to the current folder, as with mergekit, or else to that of the recipe.
"""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merging.command.recipe import Recipe, renamed
from merging.command.recipe_files import located


@dataclass(frozen=True)
class Way:
    """How a method of mergekit is said here."""

    method: str
    normalised: str  # the method if it is normalised
    normalize: bool = False  # mergekit's default
    combine: tuple[str, str] | None = None  # the merger's option of that name: plain, normalised
    density: str | None = None  # the option that says how much survives


WAYS = {
    "linear": Way("task_arithmetic", "weight_average", normalize=True),
    "task_arithmetic": Way("task_arithmetic", "weight_average"),
    "ties": Way("ties", "ties", normalize=True, combine=("sum", "mean"), density="keep"),
    "dare_linear": Way("dare", "dare", combine=("sum", "mean"), density="drop"),
    "dare_ties": Way("dare", "dare", combine=("elected sum", "elected mean"), density="drop"),
}
KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source")
OF_ALL = ("normalize", "rescale", "lambda", "int8_mask")  # parameters
OF_MODELS = ("weight", "density")
Rules = list[
    tuple[str | None, float | list[float]]
]  # (filter, number or gradient), of which the first that fits counts


def read_mergekit(path: Path) -> tuple[Recipe, list[str]]:
    """Return what a recipe of mergekit means here, and what has to be said about it.

    Raises:
        ValueError: one line that names the file and the key that is not supported, or means nothing.
    """
    try:
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(text, Mapping) or "merge_method" not in text:
            raise ValueError("is no recipe of mergekit, which has a merge_method")
        recipe, notes = _read({key: value for key, value in text.items() if value is not None})
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no YAML ({' '.join(str(error).split())})") from None
    except RecursionError:  # nested thousands of times
        raise ValueError(f"{path}: is no recipe of mergekit, but nested without end") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return renamed(recipe, lambda given: given if Path(given).exists() else located(given, path.parent)), notes


def _read(text: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    _refuse_unknown("", text, KEYS)
    name, notes = str(text["merge_method"]), []
    if name not in WAYS:
        raise ValueError(f"merge_method: {name!r} has no counterpart here; these have: {', '.join(WAYS)}")
    way, shared = WAYS[name], _mapping("parameters", text.get("parameters", {}))
    _refuse_unknown("parameters.", shared, (*OF_ALL, *OF_MODELS))
    base, entries = _models(text, linear=way is WAYS["linear"])
    _check_tokenizer(text, base)
    normalize = _flag(shared, "normalize", way.normalize)
    weight, density = (
        [_rules_of(model, own, shared, option, default) for model, own in entries]
        for option, default in (("weight", None), ("density", 1.0))
    )
    weights, texts = _numbers(weight), _texts_of_experts("weight", weight)
    if way is WAYS["linear"] and not normalize and (texts or abs(sum(weights) - 1) > 1e-6):
        raise ValueError("parameters.normalize: false, with weights that do not sum to 1, would scale the base as well")
    texts += _sparsified(way, density, shared, notes)
    texts += [f"*:combine={way.combine[normalize]}"] if way.combine else []
    scale = [(None, 1.0)] if way is WAYS["linear"] else _until_all([*_of_all(shared, "lambda"), (None, 1.0)])
    texts += [] if _is_number(scale) else _texts("final_scale", scale)
    if _flag(shared, "int8_mask", False):
        notes.append("int8_mask: has no effect here")
    if way is WAYS["linear"] and "lambda" in shared:
        notes.append("lambda: has no effect on linear")
    method = way.normalised if normalize else way.method
    recipe = Recipe(
        base=base,
        experts=tuple(model for model, _ in entries),
        method=method,
        scale=1.0 if method == WAYS["task_arithmetic"].method else None,
        weights=tuple(weights) if set(weights) != {1.0} else (),
        normalize=normalize,
        final_scale=_numbers([scale])[0],
        set=tuple(texts),
        dtype=_word(text, "out_dtype") or _word(text, "dtype"),
    )
    return recipe, notes


# Models ---------------------------------------------------------------------------------------------------------------


def _models(text: Mapping[str, Any], linear: bool) -> tuple[str, list[tuple[str, Mapping[str, Any]]]]:
    """Return the base, and the name and parameters of each expert; to linear the base is a model like the others."""
    if not isinstance(text.get("models"), list) or not text["models"]:
        raise ValueError("models: must be a list of models (slices and modules are not supported)")
    listed: dict[str, Mapping[str, Any]] = {}
    for index, entry in enumerate(text["models"]):
        where = f"models[{index}]"
        entry = _mapping(where, entry)
        _refuse_unknown(f"{where}.", entry, ("model", "parameters"))
        model = _model(f"{where}.model", entry.get("model"))
        if model in listed:
            raise ValueError(f"{where}.model: {model} is listed twice")
        listed[model] = _mapping(f"{where}.parameters", entry.get("parameters") or {})
        if alone := [key for key in listed[model] if key in OF_ALL]:
            raise ValueError(f"{where}.parameters.{alone[0]}: is one for all models; it belongs under parameters")
        _refuse_unknown(f"{where}.parameters.", listed[model], OF_MODELS)
    if not linear and "base_model" not in text:
        raise ValueError(f"base_model: {text['merge_method']} needs one")
    base = _model("base_model", text["base_model"]) if "base_model" in text else next(iter(listed))
    if linear:
        listed.setdefault(base, {})
    else:
        listed.pop(base, None)
    if not listed:
        raise ValueError(f"models: holds no model beside the base {base}")
    return base, list(listed.items())


def _model(where: str, given: Any) -> str:
    if isinstance(given, Mapping) and list(given) == ["model"]:
        given = given["model"]
    if isinstance(given, Mapping) and list(given) == ["path"]:
        given = given["path"]
    if not isinstance(given, str) or not given:
        raise ValueError(f"{where}: must be a path or an id of the Hub, got {given!r}")
    if not Path(given).exists() and any(mark in given for mark in "+@"):
        raise ValueError(f"{where}: {given!r}: a model with an adapter or a revision is not supported; save it first")
    return given


def _check_tokenizer(text: Mapping[str, Any], base: str) -> None:
    source = text.get("tokenizer_source", "base")
    if source not in ("base", "none", base):
        raise ValueError(f"tokenizer_source: {source!r} is not supported: the tokenizer is the base's")


# Parameters -----------------------------------------------------------------------------------------------------------


def _sparsified(way: Way, density: Sequence[Rules], shared: Mapping[str, Any], notes: list[str]) -> list[str]:
    """Return what --set says about the entries that survive, and add what it has no word for to the notes."""
    rescale = _flag(shared, "rescale", way.density == "drop")
    if way.density is None:
        if any(rules != [(None, 1.0)] for rules in density):
            notes.append("density: has no effect on this method")
        return []
    if way.density == "keep":
        if rescale:
            raise ValueError("parameters.rescale: true is not supported for ties, which does not rescale here")
        return _texts_of_experts("keep", density)
    notes.append("masks are random, and other ones than mergekit's")
    return [*_texts_of_experts("drop", [_dropped(rules) for rules in density]), f"*:rescale={str(rescale).lower()}"]


def _dropped(rules: Rules) -> Rules:
    return [(own, [1 - v for v in value] if isinstance(value, list) else 1 - value) for own, value in rules]


def _rules_of(
    model: str, own: Mapping[str, Any], shared: Mapping[str, Any], option: str, default: float | None
) -> Rules:
    """Return the rules of one model, up to the first that fits every tensor."""
    rules: Rules = []
    rules += _rules(f"{model}: {option}", own[option]) if own.get(option) is not None else []
    rules += _of_all(shared, option)
    rules += [] if default is None else [(None, default)]
    if not any(only is None for only, _ in rules):
        raise ValueError(f"{model}: {option}: has no value" + (" for tensors that no filter fits" if rules else ""))
    return _until_all(rules)


def _of_all(shared: Mapping[str, Any], option: str) -> Rules:
    return _rules(f"parameters.{option}", shared[option]) if shared.get(option) is not None else []


def _until_all(rules: Rules) -> Rules:
    """Return the rules up to the first that fits every tensor."""
    return rules[: 1 + next(index for index, (only, _) in enumerate(rules) if only is None)]


def _rules(where: str, setting: Any) -> Rules:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list) or not all(isinstance(each, Mapping) for each in setting) or not setting:
        return [(None, _value(where, setting))]
    rules: Rules = []
    for each in setting:
        _refuse_unknown(f"{where}.", each, ("filter", "value"))
        only = each.get("filter")
        rules.append((None if only in (None, "*") else str(only), _value(where, each.get("value"))))
    return rules


def _value(where: str, given: Any) -> float | list[float]:
    try:
        if isinstance(given, list) and given:
            return [_finite(one) for one in given]
        return _finite(given)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {given!r} is no number, gradient of numbers, or list of filter and value") from None


def _finite(given: Any) -> float:
    if isinstance(given, bool) or given is None:
        raise TypeError
    return float(given)  # YAML takes 1e-3 for a word


def _is_number(rules: Rules) -> bool:
    return rules[0][0] is None and not isinstance(rules[0][1], list)


def _numbers(rules: Sequence[Rules]) -> list[float]:
    """Return each expert's number, 1 where it has filters or a gradient instead."""
    return [own[0][1] if _is_number(own) else 1.0 for own in rules]


def _texts_of_experts(option: str, rules: Sequence[Rules]) -> list[str]:
    """Return what --set says: nothing about weights that are numbers, which have a flag of their own."""
    if option != "weight" and all(own == rules[0] for own in rules):
        return _texts(option, rules[0])
    numbered = [(index, own) for index, own in enumerate(rules) if option != "weight" or not _is_number(own)]
    return [text for index, own in numbered for text in _texts(f"{option}[{index}]", own)]


def _texts(option: str, rules: Rules) -> list[str]:
    pairs = [("*" if only is None else f"*{glob.escape(only)}*", value) for only, value in reversed(rules)]
    return [f"{pattern}:{option}={value}" for pattern, value in pairs]


def _flag(shared: Mapping[str, Any], key: str, default: bool) -> bool:
    given = shared.get(key, default)
    if not isinstance(given, bool | int | float) or given not in (0, 1):
        raise ValueError(f"parameters.{key}: must be true or false for all tensors, got {given!r}")
    return bool(given)


def _word(text: Mapping[str, Any], key: str) -> str | None:
    given = text.get(key)
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{key}: must be the name of a dtype, got {given!r}")
    return given and given.removeprefix("torch.")


def _mapping(where: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: must be a mapping, got {given!r}")
    return given


def _refuse_unknown(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}{key}: is not supported; supported are {', '.join(known)}")
