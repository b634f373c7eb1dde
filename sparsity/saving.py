"""Loading a sparsified model that was saved by its own means: `save_pretrained`, or `torch.save` of its state dict.

The options of `sparsify` are saved with the weights, in a buffer of the model. Loaded by a model without plug-ins, that
buffer is a name that nobody expects: `load_state_dict` refuses it, and transformers reports it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsity.blocks import LAYOUTS, Layout
from sparsity.plugins import MARK, sparsify

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FILES = ("model.safetensors", "pytorch_model.bin")


def load(model: nn.Module, saved: str | Path | Mapping[str, Tensor], example: Any = None) -> nn.Module:
    """Put a sparsified model's plug-ins and weights back, IN PLACE, and return the model.

        model = load(T5ForConditionalGeneration(config), folder)
        model = load(VisionTransformer(...), "state.pt")

    Args:
        model: of the same class and configuration, without plug-ins; its weights do not matter.
        saved: a folder that `save_pretrained` wrote, a file of tensors (safetensors or torch), or a state dict.
        example: as for `sparsify`, for models that need one.

    Returns:
        `model` itself, with activation, zeroth biases, bounds and schedules as they were when it was saved.

    Raises:
        ValueError: nothing there was saved by a sparsified model, or its tensors are not those of this model; or as
            `sparsify` does.
        FileNotFoundError: the folder holds no weights.
    """
    state = dict(saved) if isinstance(saved, Mapping) else _read(Path(saved))
    marks = [name for name in state if name.rpartition(".")[2] == MARK]
    if not marks:
        raise ValueError(f"nothing here was saved by a sparsified model (no tensor {MARK!r}): load it as usual")
    names = {name for name, _ in model.named_modules()}
    for mark in marks:
        path = mark.rpartition(".")[0]
        if path not in names:
            raise ValueError(f"{type(model).__name__} has no part {path!r}, which was sparsified in what was saved")
        sparsify(model.get_submodule(path), **_options(state[mark]), example=example)
    missing, unexpected = model.load_state_dict(state, strict=False)
    own = model.state_dict(keep_vars=True)
    loaded = {own[name].data_ptr() for name in own if name in state}
    missing = [name for name in missing if own[name].data_ptr() not in loaded]  # tied weights are saved once
    for kind, wrong in (("has no", missing), ("has, and the model has not,", unexpected)):
        if wrong:
            raise ValueError(f"what was saved {kind} {wrong[0]!r} ({len(wrong)} such tensors): another model?")
    return model


def _options(mark: Tensor) -> dict[str, Any]:
    options = json.loads(bytes(mark.tolist()).decode())
    layouts = [Layout(**fields | {"norms": tuple(fields["norms"])}) for fields in options.pop("layouts", [])]
    return options | {"layouts": layouts or LAYOUTS}


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of the folder that holds a model in one file or in shards."""
    if path.is_file():
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    for name in INDEXES:
        if (path / name).exists():
            shards = sorted(set(json.loads((path / name).read_text())["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in _read(path / shard).items()}
    found = next((path / name for name in FILES if (path / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: no {' or '.join(FILES)} here, nor an index of shards")
    return _read(found)
