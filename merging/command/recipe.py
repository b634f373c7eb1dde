"""Recipes: what is merged, by which method, with which options, and where single tensors differ from the rest.

A recipe is a handful of plain values, the same on the command line and in `merging.yaml`. Options of single tensors
come from patterns over their names ("*.mlp.*:scale=0.5"); of two that match a name, the later one wins.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
import tyro
import yaml

from merging.calibration import SVC, published_alpha
from merging.checkpoints import Checkpoint
from merging.command.storage import LAYOUTS
from merging.mergers import MERGERS, merger
from merging.peft_files import Adapter
from merging.task_vectors import check_choice

OUTPUT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
SVC_FLAGS = {name: "kernels" if name == "flatten" else name for name in SVC.__dataclass_fields__}  # field → flag
TENSOR_OPTIONS = {"final_scale": float, "svc": bool, "merge": bool, "layout": str}  # beside the merger's and SVC's


@dataclass(frozen=True)
class Recipe:
    """What is merged and how; the same recipe on the same files makes the same model."""

    base: str = ""
    """The pretrained model: folder, file of weights, or Hub id."""
    experts: tuple[str, ...] = ()
    """The models fine-tuned from it, likewise."""
    method: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(MERGERS)}.")] = ""
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
    final_scale: float = 1.0
    """Factor of the finished update, AFTER calibration: the scale to tune on validation data."""
    set: tuple[str, ...] = ()
    """Options of single tensors: 'PATTERN:OPTION=VALUE', OPTION being one of the merger's (scale, keep, drop, …), of
    SVC's (svc, alpha, …), final_scale, merge (false keeps the base's tensor) or layout, how the tensor is stored
    (matrix, transposed, stack, transposed stack, kernel)."""
    output: Literal["model", "adapter"] = "model"
    """A whole model, into which adapters are folded, or an adapter of peft (LoRA of --rank, or IA³)."""
    rank: int | None = None
    """The rank of all modules of a LoRA adapter; energy_lost.csv says how much of each tensor's energy it loses."""
    dtype: str | None = None
    """Of the output: float32, bfloat16, float16 or float64; by default that of the base, tensor by tensor, and float32
    for the factors of an adapter."""
    shard_size: str = "5GB"
    """Largest file of the output (500MB, 5GB, …); a single tensor may be larger."""
    strict: bool = False
    """Refuse what is otherwise kept from the base or left out, and reported: heads, vocabularies, extra tensors."""
    partial: bool = False
    """Merge models of which a good part has no partner (another depth or architecture, a vision tower): such tensors
    keep the base's value or are left out, and are told in one line."""
    report: bool = False
    """Write the spectral diagnostics of each matrix, before calibration, and a figure into OUT/report."""

    def check(self) -> None:
        """Raise a ValueError that names the option and what it can be, unless all are sound."""
        if not self.base or not self.experts or not self.method:
            raise ValueError("give --base, --experts and --method (or --recipe, a file that holds them)")
        check_choice("method", self.method, MERGERS)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, OUTPUT_DTYPES)
        shard_bytes(self.shard_size)
        for option in ("scale", "seed"):
            if getattr(self, option) is not None and option not in merger_options(self.method):
                has = ", ".join(merger_options(self.method)) or "none"
                raise ValueError(
                    f"--{option}: {self.method} has no such option (it has: {has}); --final-scale scales any method"
                )
        check_choice("output", self.output, ("model", "adapter"))
        if self.rank is not None and (self.output != "adapter" or self.rank < 1):
            raise ValueError(f"--rank {self.rank}: at least 1, and with --output adapter only")
        for text in self.set:
            _assignment(text, self.method)
        self.of("", 1)

    def of(self, name: str, tasks: int) -> dict[str, Any]:
        """Return the options of one tensor, those of the recipe changed by every pattern that its name matches."""
        options = {key: getattr(self, key) for key in (*SVC_FLAGS.values(), "svc", "final_scale")}
        if options["alpha"] is None:
            options["alpha"] = published_alpha(self.method, tasks)
        options |= {"merge": True, "layout": None}
        options |= {key: getattr(self, key) for key in ("scale", "seed") if getattr(self, key) is not None}
        for text in self.set:
            pattern, key, value = _assignment(text, self.method)
            if fnmatch.fnmatchcase(name, pattern):
                options[key] = value
        if not math.isfinite(options["final_scale"]):
            raise ValueError(f"final_scale must be a finite number, got {options['final_scale']}")
        return options

    def output_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor of the base is written."""
        return OUTPUT_DTYPES.get(self.dtype, stored) if stored.is_floating_point else stored

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the patterns of `set` that match none of the names."""
        names = list(names)
        return [text for text in self.set if not fnmatch.filter(names, _assignment(text, self.method)[0])]

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain values, without options that have their default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        kept = {key: value for key, value in values.items() if value != defaults[key]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}


def merger_options(method: str) -> dict[str, Any]:
    """Return the options of a merger which are numbers or words, with their defaults."""
    return merger(method).options


def _assignment(text: str, method: str) -> tuple[str, str, Any]:
    """Return pattern, option and value of a text such as "*.mlp.*:scale=0.5"."""
    found = re.fullmatch(r"(.+):(\w+)=(.+)", text)
    if not found:
        raise ValueError(f"--set {text!r}: expected 'PATTERN:OPTION=VALUE', such as '*.mlp.*:scale=0.5'")
    pattern, key, value = found[1], found[2], found[3]
    hints = get_type_hints(SVC).items()
    of_svc = {SVC_FLAGS[name]: next(iter(get_args(hint)), hint) for name, hint in hints}  # float | None → float
    kinds = {name: type(default) for name, default in merger_options(method).items()} | of_svc | TENSOR_OPTIONS
    check_choice(f"option in --set {text!r}:", key, kinds)
    given = yaml.safe_load(value)
    if kinds[key] is float and not isinstance(given, bool | float):
        with contextlib.suppress(ValueError):
            given = float(value)
    if not isinstance(given, kinds[key]) or (kinds[key] is not bool and isinstance(given, bool)):
        raise ValueError(f"--set {text!r}: {key} must be {kinds[key].__name__}, got {value!r}")
    if key == "layout":
        check_choice("layout", given, LAYOUTS)
    return pattern, key, given


def shard_bytes(text: str) -> int:
    """Return the bytes of a size such as "500MB" or "5GB" (powers of ten)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"--shard-size must be a size such as 500MB or 5GB, got {text!r}")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as the command line spells it."""
    return str(dtype).removeprefix("torch.")


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a YAML or JSON file, such as the `merging.yaml` of an earlier output.

    Raises:
        ValueError: the file is no recipe, or has an option that recipes lack.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a recipe ({str(error).splitlines()[0]})") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: is no recipe, which is a mapping from options to values")
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    values = {key: value for key, value in values.items() if key != "identity"}
    for key, value in values.items():
        check_choice(f"option in {path}:", key, defaults)
        many = isinstance(defaults[key], tuple)
        if many != isinstance(value, list):
            raise ValueError(f"{path}: {key} must be {'a list' if many else 'one value'}, got {value!r}")
    return Recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def identity(recipe: Recipe, checkpoints: Iterable[Checkpoint | Adapter]) -> str:
    """Return the hash of a recipe and of the files it is applied to: their paths, sizes and times of change."""
    facts = [recipe.plain()]
    for checkpoint in checkpoints:
        for path in checkpoint.files:
            facts.append([str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def write_recipe(recipe: Recipe, made_from: str) -> str:
    """Return the text of `merging.yaml`: the recipe, and the hash by which the same merge is known again."""
    return yaml.safe_dump(recipe.plain() | {"identity": made_from}, sort_keys=False, allow_unicode=True)
