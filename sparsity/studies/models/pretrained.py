"""A Vision Transformer that has been trained: timm's, from a repository of the hub."""

import json

from torch import nn

from common.data.hub import snapshot


def pretrained_vit(model_id: str, pixels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """Load a ViT of timm, such as timm/deit_base_patch16_224.fb_in1k, in float32.

    Args:
        model_id: its repository, with config.json and model.safetensors in timm's format.
        pixels: side of the images it will see.
        mean, std: how their channels are normalised.

    Raises:
        HubError: the repository is not available.
        ValueError: the model was trained with other images, is no ViT, or its weights do not fit its configuration.
    """
    import timm  # late: --help needs no seconds of it

    folder = snapshot(model_id, "model", ["config.json", "model.safetensors"])
    if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).exists()]:
        raise ValueError(f"model {model_id} has no {missing[0]}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    seen = config.get("pretrained_cfg", {})
    given = {"mean": list(mean), "std": list(std), "input_size": [len(mean), pixels, pixels]}
    for name, value in given.items():
        if list(seen.get(name, [])) != value:
            raise ValueError(f"model {model_id} was trained with {name} {seen.get(name)}, the images have {value}")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except RuntimeError as error:  # torch's report on a state dict has a line per tensor
        first = next(line for line in str(error).splitlines()[1:] if line.strip()).strip()
        raise ValueError(f"model {model_id}: its weights do not fit its config.json: {first}") from None
    if not isinstance(model, timm.models.vision_transformer.VisionTransformer):
        raise ValueError(f"model {model_id} is a {type(model).__name__}, expected a VisionTransformer")
    return model.float()
