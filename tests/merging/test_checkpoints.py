"""Files of weights: what is read is what was written, and damage is named."""

import json
import os
import pickle

import pytest
import torch
from models_on_disk import state_of_all_dtypes
from safetensors.torch import save_file

from merging import checkpoints
from merging.checkpoints import open_checkpoint


def same(checkpoint, expected):
    assert checkpoint.entries.keys() == expected.keys()
    for name, entry in checkpoint.entries.items():
        read = entry.read().reshape(entry.shape)
        assert read.dtype == expected[name].dtype and torch.equal(read, expected[name]), name


def sharded(folder, state, count=2):
    folder.mkdir(exist_ok=True)
    names, weight_map = list(state), {}
    for index in range(count):
        shard = f"model-{index + 1:05}-of-{count:05}.safetensors"
        save_file({name: state[name] for name in names[index::count]}, folder / shard)
        weight_map |= dict.fromkeys(names[index::count], shard)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


# Reading --------------------------------------------------------------------------------------------------------------


def test_every_form_of_a_checkpoint_is_read_to_the_bit(tmp_path):
    state = state_of_all_dtypes()
    save_file(state, tmp_path / "bare.safetensors")
    same(open_checkpoint(tmp_path / "bare.safetensors"), state)
    same(open_checkpoint(sharded(tmp_path / "sharded", state)), state)
    for name in ("model.safetensors", "open_clip_model.safetensors", "x.safetensors"):
        folder = tmp_path / f"folder of {name}"
        folder.mkdir()
        save_file(state, folder / name)
        same(open_checkpoint(folder), state)
    torch.save(state, tmp_path / "plain.pt")
    same(open_checkpoint(tmp_path / "plain.pt"), state)
    wrapped = {"epoch": 3, "optimizer": {"lr": 1e-3}, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    same(open_checkpoint(tmp_path / "epoch_3.pt"), wrapped["state_dict"])
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    torch.save({}, tmp_path / "bin" / "training_args.bin")
    same(open_checkpoint(tmp_path / "bin"), state)


def test_parts_of_storages_are_found_in_pickled_state_dicts(tmp_path):
    whole = torch.arange(24.0).reshape(6, 4)
    torch.save({"tied": whole, "also": whole, "rows": whole[2:4]}, tmp_path / "views.pt")
    same(open_checkpoint(tmp_path / "views.pt"), {"tied": whole, "also": whole, "rows": whole[2:4]})


OLD = dict(_use_new_zipfile_serialization=False)


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before zip"])
def test_state_dicts_of_both_formats_and_of_any_strides_are_read(tmp_path, options, monkeypatch):
    monkeypatch.setattr(checkpoints, "COPIED", 7)  # ranges begin and end within rows
    whole = torch.arange(120.0).reshape(4, 5, 6)
    state = state_of_all_dtypes() | {
        "transposed": whole[0].T, "permuted": whole.permute(2, 0, 1), "part": whole[1:3, ::2, 1:4],
        "column": whole[0, :, 2], "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3), "tied": whole,
    }  # fmt: skip
    torch.save(state, tmp_path / "x.bin", **options)
    opened = open_checkpoint(tmp_path / "x.bin")
    same(opened, state)
    for name, entry in opened.entries.items():
        flat = state[name].reshape(-1)
        for start in range(0, entry.count, 5):
            stop = min(start + 9, entry.count)
            assert torch.equal(entry.read(start, stop, torch.float64), flat[start:stop].double()), name


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before zip"])
def test_no_byte_of_a_damaged_state_dict_is_taken_for_another(tmp_path, options):
    """Cut anywhere it is refused; with any byte of its index changed it is refused, or read without another error."""
    torch.save({"w": torch.arange(6.0), "v": torch.ones(3, 2).T}, tmp_path / "whole.pt", **options)
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in range(0, len(whole), 13):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.pt: ") as raised:
            open_checkpoint(tmp_path / "x.pt")
        assert "\n" not in str(raised.value)
    for place in range(0, len(whole), 11):
        (tmp_path / "x.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            for entry in open_checkpoint(tmp_path / "x.pt").entries.values():
                entry.read()
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / 'x.pt'}: ") and "\n" not in str(error)


def test_ranges_are_read_in_another_dtype(tmp_path):
    state = {"w": torch.arange(12.0).reshape(3, 4).bfloat16()}
    save_file(state, tmp_path / "w.safetensors")
    entry = open_checkpoint(tmp_path / "w.safetensors").entries["w"]
    read = entry.read(4, 8, torch.float32)
    assert torch.equal(read, torch.tensor([4.0, 5, 6, 7])) and read.dtype == torch.float32
    read.zero_()
    assert torch.equal(entry.read(4, 8), torch.tensor([4.0, 5, 6, 7]).bfloat16())


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = json.dumps({"w": W, "W": W | {"data_offsets": [8, 16]}}).replace("W", "w").encode()


AGAIN = json.dumps({"w": W, "v": W}).replace("v", "w").encode()


@pytest.mark.parametrize("header, data, message", [
    ({"w": W}, b"1234", r"no complete safetensors file \(incomplete.*; truncated or damaged, download it again"),
    ({"w": W}, bytes(12), r"no complete safetensors file \(incomplete"),
    ({"w": W | {"data_offsets": [0, 12]}}, bytes(12), r"no complete safetensors file \(invalid shape"),
    ({"w": W | {"dtype": "F8_E8M0", "shape": [8]}}, bytes(8), "'w' has the dtype F8_E8M0, which is not one of"),
    ({"w": W | {"dtype": "F5"}}, bytes(8), r"no complete safetensors file \(.*`?F5`?, expected one of"),
    ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), r"no complete safetensors file \(.*missing field"),
    ({"w": W | {"shape": [-2]}}, bytes(8), r"no complete safetensors file \(.*`-2`, expected"),
    ({"w": W, "v": W}, bytes(8), r"no complete safetensors file \(invalid offset for tensor `[vw]`"),
    (TWICE, bytes(16), r"no complete safetensors file \(invalid offset for tensor `w`"),
    (b"{", b"", r"no complete safetensors file \(invalid JSON in header"),
    ({}, b"", "holds no tensor"),
    (b"[]", b"", r"no complete safetensors file \(invalid JSON"),
    (b"null", b"", r"no complete safetensors file \(invalid JSON"),
    (b'{"\xff": 1}', b"", r"no complete safetensors file \(invalid UTF-8"),
    (b"[" * 100_000, b"", r"no complete safetensors file \(invalid JSON"),
    ({"w": "x"}, b"", r"no complete safetensors file \(invalid JSON"),
    ({"__metadata__": [1], "w": W}, bytes(8), r"no complete safetensors file \(invalid JSON"),
    ({"w": W | {"dtype": ["F32"]}}, bytes(8), r"no complete safetensors file \(invalid JSON"),
    ({"w": W | {"dtype": "F4", "shape": [16]}}, bytes(8), "'w' has the dtype F4, which is not one of"),
    ({"w": W | {"shape": [2**40, 2**40]}}, bytes(8), r"no complete safetensors file \(overflow"),
    ({"w": W | {"shape": "ab"}}, bytes(8), r"no complete safetensors file \(invalid JSON"),
    ({"w": W | {"data_offsets": [8, 0]}}, bytes(8), r"no complete safetensors file \(invalid offset"),
    ({"w": W | {"data_offsets": [-8, 0]}}, bytes(8), r"no complete safetensors file \(invalid JSON"),
    ({"w": W | {"data_offsets": [8, 16]}}, bytes(16), r"no complete safetensors file \(invalid offset"),
    ({"w": W | {"data_offsets": [0, 10**30]}}, bytes(8), r"no complete safetensors file \(invalid JSON"),
    (AGAIN, bytes(8), "'w' stands in it twice, in its header"),
])  # fmt: skip
def test_damaged_safetensors_are_named(tmp_path, header, data, message):
    path = raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}") as raised:
        open_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_truncated_files_and_pointers_of_git_lfs_are_named(tmp_path):
    save_file(state_of_all_dtypes(), tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in (0, 5, 30, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors: .*(no complete|truncated)"):
            open_checkpoint(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((2**63).to_bytes(8, "little") + whole[8:])
    with pytest.raises(ValueError, match=r"x\.safetensors: .*header too large"):
        open_checkpoint(tmp_path / "x.safetensors")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (tmp_path / "x.safetensors").write_bytes(pointer)
    with pytest.raises(ValueError, match="pointer of git-lfs: run git lfs pull"):
        open_checkpoint(tmp_path / "x.safetensors")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "x": Harmful()}, "harmful.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Harmful()))
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    for name in ("harmful.pt", "plain.bin", "module.pt"):
        with pytest.raises(ValueError, match=rf"{name}: .*(could run code|is no complete state dict)") as raised:
            open_checkpoint(name)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "harm").exists()


def test_odd_state_dicts_are_named(tmp_path):
    torch.save({"w": torch.ones(2), "epochs": 3}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: 'epochs' is no tensor"):
        open_checkpoint(tmp_path / "x.pt")
    for odd, message in (
        ([torch.ones(2)], "'list' is no state dict"),
        ({1: torch.ones(2)}, "1 is no name of a tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' is no plain tensor"),
    ):
        torch.save(odd, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=rf"x\.pt: {message}"):
            open_checkpoint(tmp_path / "x.pt")
    torch.save({"w": torch.ones(300)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"x\.pt: is no complete state dict"):
        open_checkpoint(tmp_path / "x.pt")


def test_adapters_and_quantised_models_are_refused(tmp_path):
    save_file(state_of_all_dtypes(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ValueError, match=r"config\.json: the weights are quantised \(bitsandbytes\)"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="peft adapter"):
        open_checkpoint(tmp_path)
