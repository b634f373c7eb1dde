"""Adapters in peft's format, read and written: LoRA in factored form, IA³ as vectors, and what was trained beside them.

A LoRA module adds s B A to its weight, s = α/r, or α/√r with rsLoRA; r and α may differ by module (rank_pattern,
alpha_pattern). A weight that is stored as (in, out), which peft calls fan_in_fan_out, gets s (B A)ᵀ, and so does an
embedding. Here b and a have the orientation of the STORED weight, as all tensors in this package do: for the layouts
"transposed" and "embedding" b = Aᵀ and a = Bᵀ.

An IA³ module multiplies its output by a vector l, or its input if it is a feed-forward module. Biases and whole
modules (modules_to_save) are held with their full values. Other kinds of adapters are no low-rank updates of the base's
weights, or not of these weights: they are refused by name.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints import Entry, file_entries
from merging.lowrank import LowRank, numerical_rank_of, truncate
from merging.weight_files import read_config, usual_weights, within

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = {
    "lora_A.weight": "matrix",
    "lora_B.weight": "matrix",
    "lora_embedding_A": "embedding",
    "lora_embedding_B": "embedding",
}
OF_MODULES = {"linear": "matrix", "conv1d": "transposed"}  # how modules of these names store their weights
KINDS = {"LORA": "lora", "IA3": "ia3"}
VARIANTS = {  # settings of a LoRA configuration that make something else of it
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_token_indices",
}
# init_lora_weights of adapters whose base is left as it is; all others may change the base's weights
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Factors:
    """The update of a LoRA module that is still on disk."""

    down: Entry  # A (r, in)
    up: Entry  # B (out, r)
    scale: float
    layout: str

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the base weight, as stored."""
        sizes = self.up.shape[0], self.down.shape[1]
        return sizes if self.layout == "matrix" else sizes[::-1]

    def read(self, device: str | torch.device = "cpu") -> LowRank:
        """Return the update itself, in the dtype of the file."""
        down, up = read_finite(self.down, device), read_finite(self.up, device)
        b, a = (up, down) if self.layout == "matrix" else (down.T, up.T)
        return LowRank(b, a, self.scale, self.layout)

    def entries(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Return the entries from `start` to `stop`, whole rows, of the flattened update, in at least float32."""
        update, width = self.read(device), self.shape[1]
        return replace(update, b=update.b[start // width : stop // width]).dense().flatten()


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes, by the name of the base's tensor; as `open_adapter` returns it, all is still on disk."""

    kind: str  # "lora" or "ia3"
    modules: dict[str, LowRank | Factors] = field(default_factory=dict)  # LoRA: updates
    vectors: dict[str, Tensor | Entry] = field(default_factory=dict)  # IA³: l, (out, 1), or (1, in) for feed-forward
    values: dict[str, Tensor | Entry] = field(default_factory=dict)  # biases, modules_to_save: full values
    config: dict[str, Any] = field(default_factory=dict)  # adapter_config.json as it is
    files: tuple[Path, ...] = ()  # what it was read from
    notes: tuple[str, ...] = ()  # what is in the folder and was left aside


# Reading -------------------------------------------------------------------------------------------------------------


def load_adapter(folder: str | Path) -> Adapter:
    """Return the adapter in a folder of peft's format: adapter_config.json and adapter_model.safetensors (or .bin).

    Args:
        folder: a local folder.

    Returns:
        factors, vectors and values in the dtype of the file, under the names of the base's tensors.

    Raises:
        ValueError: in one line: a file is missing or broken, it is another kind of adapter, a tensor is unknown, not
            finite, or does not fit the configuration.
    """
    opened = open_adapter(folder)
    return replace(
        opened,
        modules={name: factors.read() for name, factors in opened.modules.items()},
        vectors={name: read_finite(entry) for name, entry in opened.vectors.items()},
        values={name: read_finite(entry) for name, entry in opened.values.items()},
    )


def open_adapter(folder: str | Path) -> Adapter:
    """Return the adapter in a folder like `load_adapter`, with checked names and shapes, but nothing read yet."""
    folder = Path(folder)
    config = _read_config(folder)
    file = _weights(folder)
    entries = file_entries(file)
    if not entries:
        raise ValueError(f"{file}: holds no tensor, so nothing of its training; save the adapter again")
    for key, entry in entries.items():
        if not entry.dtype.is_floating_point:
            raise ValueError(f"{file}, {key!r}: dtype {entry.dtype}, expected floating point: dequantise the adapter")
        if not entry.count:
            raise ValueError(
                f"{file}, {key!r}: shape {list(entry.shape)}, no entries: saved by DeepSpeed ZeRO-3 without gathering "
                "its weights; gather them (zero_to_fp32.py in the checkpoint's folder), and save the adapter again"
            )
    parts = {key for key in entries if key.endswith(".ia3_l") or _split_factor(key)}
    values = _values({key: entry for key, entry in entries.items() if key not in parts}, file)
    own = {key: entries[key] for key in entries if key in parts}
    kind, files = KINDS[config["peft_type"]], (file, folder / CONFIG)
    full = ", ".join(usual_weights(folder))
    notes = (f"{folder}: holds an adapter and full weights; the adapter is taken; left aside: {full}",) if full else ()
    if kind == "ia3":
        return Adapter(kind, {}, _vectors(own, file), values, config, files, notes)
    return Adapter(kind, _modules(own, config, file), {}, values, config, files, notes)


def read_finite(entry: Entry, device: str | torch.device = "cpu") -> Tensor:
    """Return a whole tensor of an adapter; one that is not finite is refused."""
    tensor = entry.read(device=device).reshape(entry.shape)
    if not tensor.isfinite().all():
        raise ValueError(f"{entry.where}: {int((~tensor.isfinite()).sum())} entries are NaN or infinite")
    return tensor


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} is no adapter: {CONFIG} is missing")
    config = read_config(folder, CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{file}: adapters of kind {kind} cannot be merged, only LORA and IA3")
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise ValueError(f"{file}: modules_to_save is {whole!r}, and must be a list of names")
    if kind == "LORA":
        _check_plain_lora(config, file)
    return config


def _check_plain_lora(config: Mapping[str, Any], file: Path) -> None:
    for setting, name in VARIANTS.items():
        if config.get(setting):
            raise ValueError(
                f"{file}: LoRA with {name} ({setting}) is no plain low-rank update: fold it with peft first"
            )
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise ValueError(f"{file}: init_lora_weights={start!r} may change the base's weights: convert it to plain LoRA")
    _check_numbers(config, file)


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Refuse ranks and α that are no numbers, and patterns that are no regular expressions."""

    def is_number(value: Any, whole: bool) -> bool:
        return isinstance(value, int if whole else int | float) and not isinstance(value, bool) and value > 0

    for setting, whole in (("r", True), ("lora_alpha", False)):
        if setting in config and not is_number(config[setting], whole):
            raise ValueError(f"{file}: {setting} is {config[setting]!r}, and must be a positive number")
    for setting, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(setting) or {}
        if not isinstance(patterns, Mapping) or not all(is_number(value, whole) for value in patterns.values()):
            raise ValueError(f"{file}: {setting} is {patterns!r}, and must map patterns of modules to positive numbers")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{file}: {setting}: {pattern!r} is no pattern of names ({error})") from None


def _weights(folder: Path) -> Path:
    for name in (WEIGHTS, "adapter_model.bin"):
        if (folder / name).is_file():
            return within(folder, name)
    full = ", ".join(usual_weights(folder))
    hint = f"; to merge its full weights ({full}), remove {CONFIG}" if full else ""
    raise ValueError(f"{folder} has an {CONFIG}, but no {WEIGHTS}{hint}")


def _split_factor(key: str) -> tuple[str, str] | None:
    """Split "MODULE.lora_A.weight" into module and factor; None for anything else."""
    return next(((key.removesuffix(f".{end}"), end) for end in FACTORS if key.endswith(f".{end}")), None)


def _base_module(name: str) -> str:
    """Return a module's name in the base model, without what peft wraps around it."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name.removeprefix(PREFIX))


def _modules(factors: Mapping[str, Entry], config: Mapping[str, Any], file: Path) -> dict[str, Factors]:
    pairs: dict[str, dict[str, Entry]] = {}
    for key, entry in factors.items():
        module, end = _split_factor(key) or (key, "")
        if not end:
            raise ValueError(f"{file}, {key!r} is no part of plain LoRA: fold the adapter with peft first")
        if len(entry.shape) != 2:
            raise ValueError(f"{file}, {key!r}: shape {entry.shape}, but LoRA on convolutions cannot be merged")
        pairs.setdefault(module, {})[end] = entry
    modules = {}
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"{file}, {module!r} has {', '.join(pair)} only: the other factor is missing")
        (down_name, down), (up_name, up) = sorted(pair.items())  # A (r, in), B (out, r)
        name = _base_module(module)
        rank, scale = _rank_and_scale(name, config)
        if (down.shape[0], up.shape[1]) != (rank, rank):
            raise ValueError(
                f"{file}, {module!r}: {down_name} {down.shape} and {up_name} {up.shape} are not of rank {rank}, which "
                f"{CONFIG} states"
            )
        layout = FACTORS[down_name]
        if layout == "matrix" and config.get("fan_in_fan_out"):
            layout = "transposed"
        modules[f"{name}.weight"] = Factors(down, up, scale, layout)
    return modules


def _rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return r and s of a module: the first pattern that matches the end of its name, or the general r and α."""
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)  # peft's defaults
    rank = _first_match(config.get("rank_pattern"), module, rank)
    alpha = _first_match(config.get("alpha_pattern"), module, alpha)
    return rank, alpha / (math.sqrt(max(rank, 1)) if config.get("use_rslora") else max(rank, 1))


def _first_match(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _vectors(vectors: Mapping[str, Entry], file: Path) -> dict[str, Entry]:
    for key, vector in vectors.items():
        if len(vector.shape) != 2 or 1 not in vector.shape or not key.endswith(".ia3_l"):
            raise ValueError(f"{file}, {key!r}: shape {vector.shape}, expected IA³'s (out, 1) or (1, in)")
    return {f"{_base_module(key.removesuffix('.ia3_l'))}.weight": vector for key, vector in vectors.items()}


def _values(entries: Mapping[str, Entry], file: Path) -> dict[str, Entry]:
    """Return the tensors that were saved whole. peft saves the untrained original of a module beside it: left out."""
    values = {}
    for key, entry in entries.items():
        if ".original_module." in key:
            continue
        if not key.startswith(PREFIX) or re.search(r"\.(lora_|ia3_|token_adapter)", key):
            raise ValueError(f"{file}, {key!r} is no part of plain LoRA or IA³: fold the adapter with peft first")
        module, _, tail = key.replace(".modules_to_save.", ".").rpartition(".")
        values[f"{_base_module(module)}.{tail}"] = entry
    return values


# Writing -------------------------------------------------------------------------------------------------------------


def save_adapter(
    adapter: Adapter, folder: str | Path, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Write an adapter in peft's format, LoRA at one rank with α = r (s = 1), and return what the rank costs.

    Args:
        adapter: it is left unchanged.
        folder: must not exist; it appears when it is complete.
        rank: of every LoRA module, by truncated SVD. Default: the largest numerical rank of a module, which loses
            nothing but rounding.
        dtype: of the tensors in the file.

    Returns:
        name of the weight → share of ‖ΔW‖_F² that is lost; empty for IA³.

    Raises:
        FileExistsError: the folder exists.
        ValueError: rank is below 1, or a tensor cannot be expressed in peft's format.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another folder, or remove it")
    if adapter.kind == "lora" and rank is None:
        rank = max([1, *map(numerical_rank_of, adapter.modules.values())])
    modules, lost = {}, {}
    for name, update in adapter.modules.items():
        modules[name], lost[name] = truncate(update, rank)
    tensors = {}
    for own in file_tensors(replace(adapter, modules=modules)).values():
        tensors |= {key: tensor.to(dtype).contiguous().clone() for key, tensor in own.items()}  # no memory is shared
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
    config = json.dumps(written_config(adapter, rank), indent=2, sort_keys=True)
    (unfinished / CONFIG).write_text(config + "\n", encoding="utf-8")
    os.replace(unfinished, folder)
    return lost


def file_tensors(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Return name of the base's tensor → {key in peft's file: tensor}; modules of scale 1, which α = r gives them."""
    found = {name: _factor_tensors(_module_of(name), update) for name, update in adapter.modules.items()}
    found |= {name: {f"{PREFIX}{_module_of(name)}.ia3_l": vector} for name, vector in adapter.vectors.items()}
    return found | {name: {_value_key(name, adapter): value} for name, value in adapter.values.items()}


def _module_of(name: str) -> str:
    if not name.endswith(".weight"):
        raise ValueError(f"{name!r}: peft adapts the weights of modules, and this is none")
    return name.removesuffix(".weight")


def _factor_tensors(module: str, update: LowRank) -> dict[str, Tensor]:
    down, up = (update.a, update.b) if update.layout == "matrix" else (update.b.T, update.a.T)
    ends = (
        ("lora_embedding_A", "lora_embedding_B") if update.layout == "embedding" else ("lora_A.weight", "lora_B.weight")
    )
    return {f"{PREFIX}{module}.{end}": factor for end, factor in zip(ends, (down, up), strict=True)}


def _value_key(name: str, adapter: Adapter) -> str:
    """Return peft's key of a tensor that is held whole: an adapted module has become the base layer of its adapter."""
    module, _, tail = name.rpartition(".")
    adapted = f"{module}.weight" in adapter.modules or f"{module}.weight" in adapter.vectors
    return f"{PREFIX}{module}.base_layer.{tail}" if adapted else f"{PREFIX}{name}"


def written_config(adapter: Adapter, rank: int | None) -> dict[str, Any]:
    """Return adapter_config.json of an adapter: of one rank, with α = r, naming its modules one by one.

    Raises:
        ValueError: its modules differ in what peft states once for all modules.
    """
    known = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save")
    config = {key: adapter.config.get(key) for key in known} | {"inference_mode": True}
    config["target_modules"] = sorted(map(_module_of, [*adapter.modules, *adapter.vectors]))
    if adapter.kind == "ia3":
        inputs = sorted(_module_of(name) for name, vector in adapter.vectors.items() if len(vector) == 1)
        fan_in_fan_out = bool(adapter.config.get("fan_in_fan_out"))
        return config | {"peft_type": "IA3", "feedforward_modules": inputs, "fan_in_fan_out": fan_in_fan_out}
    layouts = {update.layout for update in adapter.modules.values()} - {"embedding"}
    if len(layouts) > 1:
        raise ValueError(
            "one adapter cannot hold both linear and conv1d modules: fan_in_fan_out is one setting for all"
        )
    biases = any(name.endswith(".bias") for name in adapter.values)
    return config | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "fan_in_fan_out": layouts == {"transposed"},
        "bias": (adapter.config.get("bias") or "none") if biases else "none",
    }
