"""CLIP of the paper scale, from the Hub: base encoder, experts and zero-shot heads.

The base is OpenAI's CLIP (openai/clip-vit-base-patch32 and its siblings); an expert is the vision tower alone, tuned
for a task (tanganke/clip-vit-base-patch32_TASK). Visual projection, text side and logit scale stay those of the base,
so task vectors are differences of vision towers. Published checkpoints name the tower's tensors `vision_model.…`; this
file hands them out as the installed `CLIPVisionModel` names them, base and experts alike.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.hub import snapshot
from common.models.hub import check_fits, load_model, load_tokenizer, model_folder


class ClipVision(nn.Module):
    """CLIP's image side: `tower` (what is fine-tuned and merged) and the frozen `projection` of the base."""

    def __init__(self, tower: nn.Module, projection: nn.Module):
        super().__init__()
        self.tower = tower
        self.projection = projection.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return image features (B, embed), not normalised, of preprocessed images (B, 3, H, W)."""
        return self.projection(self.tower(pixel_values=images).pooler_output)


def clip_vision(model_id: str) -> ClipVision:
    """Load the image side of a base CLIP, in float32 and evaluation mode.

    Raises:
        HubError: the repository is not available.
        ValueError: the checkpoint lacks tensors of the model.
    """
    clip = load_model("CLIPModel", model_folder(model_id), model_id)
    return ClipVision(clip.vision_model, clip.visual_projection).eval()


def clip_expert_state(model_id: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load an expert's vision tower (float32) and check that it fits the base's.

    Args:
        model_id: a repository which holds a CLIPVisionModel.
        like: the state dict of the base's tower, `clip_vision(base).tower.state_dict()`.

    Raises:
        HubError: the repository is not available.
        ValueError: a tensor is missing, additional or of another shape than the base's; the message names the first.
    """
    state = dict(load_model("CLIPVisionModel", model_folder(model_id), model_id).state_dict())
    check_fits(model_id, state, like)
    return state


@torch.no_grad()
def zero_shot_head(
    model_id: str, class_names: Sequence[str], templates: Sequence[str], device: str | torch.device = "cpu"
) -> Tensor:
    """Return CLIP's zero-shot head (C, embed), times exp(logit_scale): logits are unit image features @ head.T.

    Per class: the text features of all its prompts are normalised, averaged and normalised again.

    Args:
        model_id: the base CLIP, whose text side and tokenizer are used.
        class_names: C names in label order.
        templates: prompts with one `{}` each.
        device: on which the text side runs, and the head is returned.

    Raises:
        HubError: the repository is not available.
        ValueError: no class, no template, or a template without `{}`.
    """
    if not class_names or not templates:
        raise ValueError(f"a head needs classes and templates, got {len(class_names)} and {len(templates)}")
    if bad := [template for template in templates if template.count("{}") != 1]:
        raise ValueError(f"a template has one {{}} for the class name, got {bad[0]!r}")
    folder = model_folder(model_id)
    clip = load_model("CLIPModel", folder, model_id).to(device)
    tokenizer = load_tokenizer("CLIPTokenizer", folder, model_id)
    length = clip.text_model.config.max_position_embeddings
    rows = []
    for name in class_names:
        prompts = [template.replace("{}", name) for template in templates]
        batch = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        pooled = clip.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        features = F.normalize(clip.text_projection(pooled), dim=-1)  # (T, embed)
        rows.append(F.normalize(features.mean(0), dim=-1))
    return torch.stack(rows) * clip.logit_scale.exp()  # (C, embed)


def preprocessing(model_id: str) -> Callable[[Any], Tensor]:
    """Return the function of a PIL image to (3, H, W) which the base's preprocessor_config.json describes.

    RGB, shortest side resized (bicubic), centre crop, scaled to [0, 1], normalised per channel: CLIP's own.

    Raises:
        HubError: the repository is not available.
        ValueError: the file asks for another interpolation.
    """
    folder = snapshot(model_id, "model", ["preprocessor_config.json"])
    config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    size, crop = config["size"], config["crop_size"]
    size = size if isinstance(size, int) else size["shortest_edge"]
    crop = [crop, crop] if isinstance(crop, int) else [crop["height"], crop["width"]]
    if config["resample"] != 3:
        raise ValueError(f"{model_id}: resample must be 3 (bicubic), got {config['resample']}")
    return partial(_preprocess, size=size, crop=crop, mean=config["image_mean"], std=config["image_std"])


def _preprocess(image: Any, size: int, crop: list[int], mean: list[float], std: list[float]) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as V

    image = V.resize(image.convert("RGB"), [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    pixels = V.to_dtype(V.to_image(V.center_crop(image, crop)), torch.float32, scale=True)  # (3, H, W)
    return V.normalize(pixels, mean, std).as_subclass(Tensor)
