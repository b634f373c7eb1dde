"""8-bit weights with their scales: read as their product, merged, and written without them."""

import json
import math

import pytest
import torch
import transformers as t
from models_on_disk import saved, weights
from safetensors.torch import load_file, save_file

from merging.checkpoints import open_checkpoint
from merging.command.main import merge
from merging.command.recipe import Recipe
from merging.fp8 import dequantised

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 3], "activation_scheme": "dynamic"}


def compressed(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


CASES = {  # configuration, ending, shape of the weight, shape of the scales, what one scale is for
    "block": (FP8, "_scale_inv", (10, 7), (3, 3), (4, 3)),
    "whole blocks": (FP8, "_scale_inv", (8, 6), (2, 2), (4, 3)),
    "small": (FP8, "_scale_inv", (2, 2), (1, 1), (4, 3)),
    "stack": (FP8, "_scale_inv", (2, 10, 7), (2, 3, 3), (4, 3)),
    "compressed block": (compressed("block", block_structure=[4, 3]), "_scale", (9, 5), (3, 2), (4, 3)),
    "tensor": (compressed("tensor"), "_scale", (10, 7), (1,), (10, 7)),
    "scalar": (compressed("tensor"), "_scale", (10, 7), (), (10, 7)),
    "channel": (compressed("channel"), "_scale", (10, 7), (10, 1), (1, 7)),
    "flat channel": (compressed("channel"), "_scale", (10, 7), (10,), (1, 7)),
    "fp8 per tensor": ({"quant_method": "fp8"}, "_scale_inv", (10, 7), (), (10, 7)),
}


def naive(weight, scale, block):
    """weight · scale, entry by entry."""
    matrices = weight.float().reshape(-1, *weight.shape[-2:])
    high, wide = math.ceil(matrices.shape[1] / block[0]), math.ceil(matrices.shape[2] / block[1])
    scales = scale.float().reshape(-1, high, wide).expand(len(matrices), high, wide)
    result = torch.empty_like(matrices)
    for index, matrix in enumerate(matrices):
        for row in range(matrix.shape[0]):
            for column in range(matrix.shape[1]):
                factor = scales[index, row // block[0], column // block[1]]
                result[index, row, column] = matrix[row, column] * factor
    return result.reshape(weight.shape)


@pytest.mark.parametrize("name", CASES)
def test_values_are_weight_times_scale(tmp_path, name):
    config, ending, shape, scales, block = CASES[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scales, generator=generator) + 0.5
    state = {"layers.0.weight": weight, f"layers.0.weight{ending}": scale, "layers.0.input_scale": torch.ones(1)}
    folder = saved(tmp_path, state | {"norm.weight": torch.ones(3)}, quantization_config=config)
    found = dequantised(open_checkpoint(folder)).entries
    assert found.keys() == {"layers.0.weight", "norm.weight"} and found["layers.0.weight"].dtype == torch.bfloat16
    expected = naive(weight, scale, block).reshape(-1)
    for start, stop in ((0, len(expected)), (0, 1), (3, 17), (len(expected) - 2, len(expected))):
        read = found["layers.0.weight"].read(start, min(stop, len(expected)), torch.float32)
        assert torch.equal(read, expected[start:stop])
    assert torch.equal(found["layers.0.weight"].read(), expected.bfloat16())


def in_8_bits(folder):
    """Store a model's linear layers in 8 bits with scales per block; returns what they stand for."""
    state, values = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(state.items()):
        values[name] = tensor.float()
        if "_proj" in name:
            scale = torch.rand(math.ceil(tensor.shape[0] / 4), math.ceil(tensor.shape[1] / 3)) + 0.5
            state[name] = (tensor * 10).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale
            values[name] = naive(state[name], scale, (4, 3))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": FP8}
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("quantised", [("base",), ("e0",), ("base", "e0", "e1")], ids=" ".join)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_models_in_8_bits_are_merged_and_written_without_scales(tmp_path, quantised, dtype):
    values = {}
    text = dict(hidden_size=16, intermediate_size=22, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    for seed, name in enumerate(("base", "e0", "e1")):
        torch.manual_seed(seed)
        t.LlamaForCausalLM(t.LlamaConfig(**text)).to(torch.bfloat16).save_pretrained(tmp_path / name)
        own = {key: tensor.float() for key, tensor in weights(tmp_path / name).items()}
        values[name] = in_8_bits(tmp_path / name) if name in quantised else own
    experts = tuple(str(tmp_path / name) for name in ("e0", "e1"))
    merge(Recipe(str(tmp_path / "base"), experts, "weight_average", dtype=dtype), tmp_path / "out")
    model, info = t.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == (torch.float32 if dtype else torch.bfloat16)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, tensor in model.state_dict().items():
        expected = (values["e0"][name] + values["e1"][name]) / 2
        assert torch.allclose(tensor.float(), expected, rtol=1e-5 if dtype else 1e-2, atol=1e-4), name


def without_scale(state, config):
    del state["w.weight_scale_inv"]


def of_another_shape(state, config):
    state["w.weight_scale_inv"] = torch.ones(2, 3)


def four_bits(state, config):
    config |= compressed("group") | {"format": "pack-quantized"}
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4


def garbled(key, value):
    return lambda state, config: config.update({key: value})


@pytest.mark.parametrize("spoil, message", [
    (without_scale, r"'w\.weight': 8-bit, and no w\.weight_scale or _scale_inv"),
    (of_another_shape, r"'w\.weight_scale_inv': scales \[2, 3\] of torch\.float32 for a weight \[10, 7\] are none per"),
    (garbled("config_groups", 3), r"config\.json: quantization_config is none that fp8 or compressed-tensors writes"),
    (garbled("config_groups", {"a": [1]}), r"config\.json: quantization_config is none that fp8"),
    (garbled("weight_block_size", "x"), r"config\.json: quantization_config is none that fp8"),
    (garbled("weight_block_size", [4]), r"config\.json: quantization_config is none that fp8"),
    (four_bits, r"its weights are quantised \(compressed-tensors, pack-quantized\), not in 8-bit floating point"),
])  # fmt: skip
def test_what_is_quantised_otherwise_is_refused(tmp_path, spoil, message):
    state = {"w.weight": torch.randn(10, 7).to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.ones(3, 3)}
    config = dict(FP8)
    spoil(state, config)
    folder = saved(tmp_path, state, quantization_config=config)
    with pytest.raises(ValueError, match=message):
        merge(Recipe(folder, (folder,), "weight_average"), tmp_path / "out")
