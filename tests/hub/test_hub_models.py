"""The models: keys, weights, heads and preprocessing as the published files mean them, and the errors."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_hub import BASE, base_model, repository, write_expert
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPTokenizer

from common.data.hub import HubError
from merging.suites.data.vision_tasks import VISION_TASKS
from merging.suites.models.clip import clip_expert_state, clip_vision, preprocessing, zero_shot_head

EXPERT = VISION_TASKS["SUN397"].expert_id(BASE)


@pytest.fixture
def tower(hub):
    return clip_vision(BASE).tower.state_dict()


def test_image_features_are_those_of_clip(hub):
    vision, clip = clip_vision(BASE), base_model()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output)
        assert torch.allclose(vision(images), expected, atol=1e-6)
    assert expected.shape == (2, 16) and not vision.training
    assert not any(weight.requires_grad for weight in vision.projection.parameters())


def test_expert_has_the_bases_keys_and_its_own_weights(tower):
    state = clip_expert_state(EXPERT, tower)
    assert list(state) == list(tower)
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    name = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(state[name], tower[name])
    vision = clip_vision(BASE)
    vision.tower.load_state_dict(state)  # fits, strictly


def test_published_tensor_names_are_read(hub):
    folder = repository(hub, "model", EXPERT)
    published = load_file(folder / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in published)
    state = clip_expert_state(EXPERT, clip_vision(BASE).tower.state_dict())
    for name, weight in published.items():
        assert torch.equal(weight, state[name.removeprefix("vision_model.")])


def test_missing_expert_fails(own_hub):
    like = clip_vision(BASE).tower.state_dict()
    shutil.rmtree(own_hub / "hub" / f"models--{EXPERT.replace('/', '--')}")
    with pytest.raises(HubError, match=f"model {EXPERT} is not in the local cache") as caught:
        clip_expert_state(EXPERT, like)
    assert "\n" not in str(caught.value)


def test_expert_of_another_shape_fails(own_hub):
    like = clip_vision(BASE).tower.state_dict()
    write_expert(own_hub, EXPERT, width=48)
    with pytest.raises(ValueError, match=f"expert {EXPERT} does not fit the base: .* has shape .*48.*32") as caught:
        clip_expert_state(EXPERT, like)
    assert "\n" not in str(caught.value)


def test_expert_of_another_depth_fails(tower):
    deeper = {**tower, "encoder.layers.2.mlp.fc1.bias": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"only the base has the tensor encoder\.layers\.2\.mlp\.fc1\.bias"):
        clip_expert_state(EXPERT, deeper)
    with pytest.raises(ValueError, match=r"only the expert has the tensor post_layernorm\.weight"):
        clip_expert_state(EXPERT, {name: weight for name, weight in tower.items() if name != "post_layernorm.weight"})


def test_checkpoint_that_lacks_a_tensor_fails(own_hub):
    like = clip_vision(BASE).tower.state_dict()
    path = repository(own_hub, "model", EXPERT) / "model.safetensors"
    state = load_file(path)
    del state["vision_model.encoder.layers.1.mlp.fc2.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model {EXPERT} lacks 1 tensors of CLIPVisionModel") as caught:
        clip_expert_state(EXPERT, like)
    assert "\n" not in str(caught.value)


def test_repository_without_weights_fails(own_hub):
    (repository(own_hub, "model", BASE) / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=f"model {BASE} has neither model.safetensors nor pytorch_model.bin"):
        clip_vision(BASE)


def test_head_is_the_average_of_all_prompts(hub):
    task = VISION_TASKS["DTD"]
    names = task.class_names[:3]
    head = zero_shot_head(BASE, names, task.templates)
    clip, tokenizer = base_model(), CLIPTokenizer.from_pretrained(repository(hub, "model", BASE))
    for row, name in zip(head, names, strict=True):
        features = []
        for template in task.templates:  # one prompt at a time: no padding
            ids = torch.tensor([tokenizer(template.format(name))["input_ids"]])
            assert ids[0, -1] == ids.max()  # end of text, where CLIP pools
            with torch.no_grad():
                feature = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)[0]
            features.append(feature / feature.norm())
        mean = torch.stack(features).mean(0)
        expected = mean / mean.norm() * clip.logit_scale.exp()
        assert torch.allclose(row, expected, atol=1e-4)
    assert torch.allclose(head.norm(dim=1), torch.full((3,), 100.0), atol=0.01)


def test_head_depends_on_names_and_templates(hub):
    heads = [
        zero_shot_head(BASE, ["woven", "lined"], [template])
        for template in ("a photo of a {} texture.", "a photo of the {} thing.")
    ]
    assert F.cosine_similarity(heads[0], heads[1]).max() < 0.999
    assert F.cosine_similarity(heads[0][0], heads[0][1], dim=0) < 0.9999


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [([], ["a {}."], "got 0 and 1"), (["cat"], [], "got 1 and 0"), (["cat"], ["a photo."], "got 'a photo.'")],
)
def test_head_checks_its_arguments(names, templates, message):
    with pytest.raises(ValueError, match=message):
        zero_shot_head(BASE, names, templates)


def picture(mode: str, width: int, height: int) -> Image.Image:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize(
    ("mode", "width", "height"), [("RGB", 60, 40), ("L", 28, 28), ("RGBA", 300, 500), ("RGB", 224, 224)]
)
def test_preprocessing_is_the_processors(hub, mode, width, height):
    image = picture(mode, width, height)
    pixels = preprocessing(BASE)(image)
    processor = CLIPImageProcessor.from_pretrained(repository(hub, "model", BASE))
    expected = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"][0]
    assert type(pixels) is torch.Tensor and pixels.dtype == torch.float32 and pixels.shape == (3, 224, 224)
    assert (pixels - expected).abs().max() < 0.03  # 2 of 255 levels: rounding in the resize


def test_other_resampling_fails(own_hub):
    path = repository(own_hub, "model", BASE) / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 2}))
    with pytest.raises(ValueError, match="resample must be 3"):
        preprocessing(BASE)


def test_newer_form_of_the_configuration_means_the_same(own_hub):
    image, before = picture("RGB", 60, 40), preprocessing(BASE)
    path = repository(own_hub, "model", BASE) / "preprocessor_config.json"
    newer = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    path.write_text(json.dumps(json.loads(path.read_text()) | newer))
    assert torch.equal(preprocessing(BASE)(image), before(image))
