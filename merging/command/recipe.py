"""Recipes: what is merged, by which method, with which options, and where single tensors differ from the rest.

A recipe is a handful of plain values, the same on the command line and in `merging.yaml`. Options of single tensors
come from patterns over their names ("*.mlp.*:scale=0.5"); of two that match a name, the later one wins.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import yaml

from merging.command.recipe_files import check_value, located, portable

if TYPE_CHECKING:  # flags are read before PyTorch is: its import takes seconds
    import torch

    from merging.checkpoints import Checkpoint
    from merging.peft_files import Adapter

AUTO = "auto"  # the final scale that matches norms
OUTPUT_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Recipe:
    """What is merged and how; the same recipe on the same files makes the same model."""

    base: str = ""
    """The pretrained model: folder, file of weights, or Hub id."""
    experts: tuple[str, ...] = ()
    """The models fine-tuned from it, likewise."""
    method: str = ""
    """How: weight_average, task_arithmetic, plain_sum, ties, dare, tsv_m, iso_c, iso_cts or star;
    or a rival: wudi, wudi_minimum, subspace_boost, lines or knots."""
    weights: tuple[float, ...] = ()
    """A factor of each expert's update, 1 by default; it acts before everything else: SVC too sees an expert of weight
    2 as one that went twice as far from the base, and of -1 as one that went back. Means are divided by the number of
    experts; see --normalize. What an IA³ vector l changes is l - 1."""
    normalize: bool = False
    """Divide means (of weight_average, ties, dare) by the sum of the weights instead of the number of experts."""
    scale: float | None = None
    """The merger's own factor, if it has one; it acts BEFORE calibration, where changing it is like changing alpha."""
    seed: int | None = None
    """Of random masks, which depend on the seed, the expert's position and the tensor's name alone."""
    svc: bool = False
    """Calibrate singular values after merging."""
    alpha: float | None = None
    """SVC: floor of the coefficients; by default the one that the paper uses for the merger, 1/K for most."""
    space: Literal["output", "input"] = "output"
    """SVC: compare responses of the layer's output or input side."""
    rule: Literal["current", "legacy"] = "current"
    """SVC: the authors' rule, or the one that they used until March 2026."""
    target: int | None = None
    """SVC: calibrate for the expert of this index alone."""
    split_qkv: bool = False
    """SVC: the three parts of a fused (3d, d) weight each by itself."""
    vectors: bool = False
    """SVC: 1-D tensors too (for IA³), by the vector rule."""
    kernels: bool = False
    """SVC: tensors of more than two dimensions too, as (out, rest)."""
    final_scale: float | Literal["auto"] = 1.0
    """Factor of the finished update, AFTER calibration: the scale to tune on validation data. Or auto, without data:
    each matrix (and vector) gets the mean norm of the experts' updates of it; refused for methods for which no
    experiment found that this replaces a tuned scale."""
    set: tuple[str, ...] = ()
    """Options of single tensors: 'PATTERN:OPTION=VALUE', OPTION being one of the merger's (scale, keep, drop, …), of
    SVC's (svc, alpha, …), weight, normalize, final_scale, merge (false keeps the base's tensor) or layout (matrix,
    transposed, stack, transposed stack, kernel). weight[1], keep[1], drop[1] are those of the expert of index 1; a list
    [0.2, 0.6] is interpolated from the first layer to the last."""
    output: Literal["model", "adapter"] = "model"
    """A whole model, into which adapters are folded, or an adapter of peft (LoRA of --rank, or IA³)."""
    rank: int | None = None
    """The rank of all modules of a LoRA adapter; energy_lost.csv says how much of each tensor's energy it loses."""
    dtype: str | None = None
    """Of the output: float32, bfloat16, float16 or float64; by default that of the base, tensor by tensor, and float32
    for the factors of an adapter."""
    shard_size: str = "5GB"
    """Largest file of the output (500MB, 5GB, …); a single tensor may be larger."""
    tokens: Literal["base", "union"] = "base"
    """Where experts have added tokens: the base's vocabulary, or the union: each added token gets the mean of the rows
    of the experts that have it, and tokenizer and vocab_size of the output are in step."""
    strict: bool = False
    """Refuse what is otherwise kept from the base or left out, and reported: heads, vocabularies, extra tensors."""
    partial: bool = False
    """Merge models of which a good part has no partner (another depth or architecture, a vision tower): such tensors
    keep the base's value or are left out, and are told in one line."""
    report: bool = False
    """Write OUT/report/index.html, one page that one can send: what was merged and left out, inflation and overlap of
    each layer against chance, γ, sizes of the updates; the numbers of each matrix as matrices.csv beside it."""

    @cached_property
    def assignments(self) -> list[Any]:
        """What `set` says, in order (`merging.command.options.Assignment`)."""
        from merging.command.options import read_assignment

        return [read_assignment(text, self.method) for text in self.set]

    def check(self) -> None:
        """Raise a ValueError that names the option and what it can be, unless all are sound."""
        from merging.mergers import MERGERS, merger
        from merging.task_vectors import check_choice, of_each_task

        if not self.base or not self.experts or not self.method:
            raise ValueError("give --base, --experts and --method (or --recipe, a file that holds them)")
        check_choice("method", self.method, MERGERS)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, OUTPUT_DTYPES)
        shard_bytes(self.shard_size)
        for option, has in ((key, merger(self.method).options) for key in ("scale", "seed")):
            if getattr(self, option) is not None and option not in has:
                raise ValueError(
                    f"--{option}: {self.method} has no such option (it has: {', '.join(has) or 'none'}); "
                    "--final-scale scales any method"
                )
        check_choice("output", self.output, ("model", "adapter"))
        check_choice("tokens", self.tokens, ("base", "union"))
        if self.tokens == "union" and self.output == "adapter":
            raise ValueError("--tokens union: an adapter cannot hold added rows; write a model")
        if self.rank is not None and (self.output != "adapter" or self.rank < 1):
            raise ValueError(f"--rank {self.rank}: at least 1, and with --output adapter only")
        if self.final_scale == AUTO and not merger(self.method).norm_matched:
            known = ", ".join(name for name in MERGERS if merger(name).norm_matched)
            raise ValueError(
                f"--final-scale auto: no experiment has found that matching norms replaces a tuned scale of "
                f"{self.method}, as it does for {known} (experiment 33); give a number"
            )
        self._check_calibration()
        if self.weights:
            of_each_task("--weights", self.weights, len(self.experts))
        self.of("", len(self.experts), 0.0)

    def _check_calibration(self) -> None:
        """Refuse options of a calibration that no tensor gets."""
        from merging.command.options import SVC_FLAGS

        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [flag for flag in SVC_FLAGS.values() if getattr(self, flag) != defaults[flag]]
        if given and not self.svc and not any(one.option == "svc" for one in self.assignments):
            raise ValueError(f"--{given[0].replace('_', '-')}: acts on SVC only; add --svc, or leave it out")

    def of(self, name: str, tasks: int, depth: float | None = None) -> dict[str, Any]:
        """Return the options of one tensor, those of the recipe changed by every pattern that its name matches.

        Args:
            name: the tensor's.
            tasks: K.
            depth: of its layer, as `merging.layers.depths` tells it; needed where options change over layers.

        Raises:
            ValueError: one line: an option of this tensor is out of range, or has no meaning for the method.
        """
        from merging.calibration import published_alpha
        from merging.command.options import SVC_FLAGS
        from merging.mergers import MERGERS, merger

        keys = (*SVC_FLAGS.values(), "svc", "final_scale", "normalize")
        options = {key: getattr(self, key) for key in keys} | {"merge": True, "layout": None, "depth": depth}
        options["weights"] = tuple(self.weights) or (1.0,) * tasks
        if options["alpha"] is None:
            options["alpha"] = published_alpha(self.method, tasks)
        options |= {key: merger(self.method).options[key] for key in merger(self.method).per_task}
        options |= {key: getattr(self, key) for key in ("scale", "seed") if getattr(self, key) is not None}
        for assignment in self.assignments:
            if assignment.matches(name):
                assignment.set(options, depth, tasks)
        if options["final_scale"] != AUTO and not math.isfinite(options["final_scale"]):
            raise ValueError(f"final_scale must be a finite number, got {options['final_scale']}")
        _check_weights(name, options, MERGERS, self.method)
        return options

    def output_dtype(self, stored: "torch.dtype") -> "torch.dtype":
        """Return the dtype in which a tensor of the base is written."""
        import torch

        chosen = self.dtype is not None and stored.is_floating_point
        return getattr(torch, self.dtype) if chosen else stored

    def unmatched(self, names: Iterable[str]) -> list[Any]:
        """Return the assignments of `set` whose patterns match none of the names.

        Raises:
            ValueError: one is interpolated over layers, and matches only tensors outside of them.
        """
        from merging.layers import layer_of

        names, without = list(names), []
        for assignment in self.assignments:
            matched = list(filter(assignment.matches, names))
            if matched and isinstance(assignment.value, list) and not any(map(layer_of, matched)):
                raise ValueError(
                    f"--set {assignment.text!r}: {matched[0]!r}, which it matches, has no number of a layer in its "
                    "name, over which it could be interpolated; give one value"
                )
            without += [] if matched else [assignment]
        return without

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain values, without options that have their default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        kept = {key: value for key, value in values.items() if value != defaults[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


def _check_weights(name: str, options: Mapping[str, Any], table: Mapping[str, Any], method: str) -> None:
    where, weights = f"{name!r}: " if name else "", options["weights"]
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"{where}weights must be finite numbers, got {' '.join(map(str, weights))}")
    if options["normalize"] and not _takes_weights(table[method]):
        means = ", ".join(other for other, own in table.items() if _takes_weights(own))
        raise ValueError(f"--normalize: {method} takes no mean that could be weighted, as these do: {means}")
    if options["normalize"] and abs(sum(weights)) < 1e-8:
        raise ValueError(f"{where}--normalize: the weights {' '.join(map(str, weights))} sum to zero")


def _takes_weights(own: Any) -> bool:
    return "weights" in inspect.signature(getattr(own, "merge", own)).parameters


def shard_bytes(text: str) -> int:
    """Return the bytes of a size such as "500MB" or "5GB" (powers of ten)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", text.strip(), re.IGNORECASE)
    if not found or not 0 < float(found[1]) < math.inf:
        raise ValueError(f"--shard-size must be a size such as 500MB or 5GB, got {text!r}")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def dtype_name(dtype: "torch.dtype") -> str:
    """Return a dtype as the command line spells it."""
    return str(dtype).removeprefix("torch.")


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a YAML or JSON file, such as the `merging.yaml` of an earlier output.

    Raises:
        ValueError: the file is no recipe, or has an option that recipes lack.
    """
    from merging.task_vectors import check_choice

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as a recipe ({str(error).splitlines()[0]})") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: is no recipe, which is a mapping from options to values")
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    hints = get_type_hints(Recipe)
    values = {key: value for key, value in values.items() if key != "identity"}
    for key, value in values.items():
        check_choice(f"option in {path}:", key, defaults)
        check_value(path, key, value, hints[key])
    recipe = Recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    return renamed(recipe, lambda given: located(given, path.parent))


def renamed(recipe: Recipe, name: Callable[[str], str]) -> Recipe:
    """Return a recipe with the base and the experts under other names."""
    return dataclasses.replace(recipe, base=name(recipe.base), experts=tuple(map(name, recipe.experts)))


def identity(recipe: Recipe, checkpoints: "Iterable[Checkpoint | Adapter]") -> str:
    """Return the hash of a recipe and of the files it is applied to: their paths, sizes and times of change.

    How the recipe names the models does not matter, only which files they are.
    """
    from merging.command.vocabulary import tokenizer_files

    facts: list[Any] = [{key: value for key, value in recipe.plain().items() if key not in ("base", "experts")}]
    for checkpoint in checkpoints:
        texts = tokenizer_files(checkpoint.home) if recipe.tokens == "union" else []
        stats = ((path, path.stat()) for path in (*checkpoint.files, *texts))
        facts.append([[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write_recipe(recipe: Recipe, made_from: str, out: Path) -> str:
    """Return the text of OUT/merging.yaml: the recipe, and the hash by which the same merge is known again."""
    recipe = renamed(recipe, lambda given: portable(given, out))
    return yaml.safe_dump(recipe.plain() | {"identity": made_from}, sort_keys=False, allow_unicode=True)


def public_name(given: str) -> str:
    """Return a name of a model that is safe to publish: no local paths."""
    path = Path(given).resolve()
    if path.is_file():
        return f"{path.parent.name}/{path.name}"
    return path.name if path.exists() else given
