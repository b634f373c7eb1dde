"""Files of weights: what is read is what was written, damage is named, and a written checkpoint is a true one."""

import itertools
import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merging.checkpoints import open_checkpoint
from merging.command.shards import TensorSpec, arrange, begin


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "a.weight": normal(5, 3), "a.bias": normal(5).bfloat16(), "b.weight": normal(4, 2, 3).half(),
        "double": normal(2, 2).double(), "scale": normal(), "steps": torch.tensor([1, 2, 3]), "none": normal(0, 4),
        "mask": torch.tensor([True, False, True]),
    }  # fmt: skip


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
    state = tensors()
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


def test_ranges_are_read_in_another_dtype(tmp_path):
    state = {"w": torch.arange(12.0).reshape(3, 4).bfloat16()}
    save_file(state, tmp_path / "w.safetensors")
    entry = open_checkpoint(tmp_path / "w.safetensors").entries["w"]
    read = entry.read(4, 8, torch.float32)
    assert torch.equal(read, torch.tensor([4.0, 5, 6, 7])) and read.dtype == torch.float32
    read.zero_()
    assert torch.equal(entry.read(4, 8), torch.tensor([4.0, 5, 6, 7]).bfloat16())


def test_safetensors_go_before_pickles_and_an_index_before_single_files(tmp_path):
    state, other = tensors(0), tensors(1)
    sharded(tmp_path, state)
    save_file(other, tmp_path / "model.safetensors")
    torch.save(other, tmp_path / "pytorch_model.bin")
    same(open_checkpoint(tmp_path), state)
    (tmp_path / "model.safetensors.index.json").unlink()
    same(open_checkpoint(tmp_path), other)


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = json.dumps({"w": W, "W": W | {"data_offsets": [8, 16]}}).replace("W", "w").encode()


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
])  # fmt: skip
def test_damaged_safetensors_are_named(tmp_path, header, data, message):
    path = raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}") as raised:
        open_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_truncated_files_and_pointers_of_git_lfs_are_named(tmp_path):
    save_file(tensors(), tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in (0, 5, 30, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors: .*(no complete|truncated)"):
            open_checkpoint(tmp_path / "x.safetensors")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (tmp_path / "x.safetensors").write_bytes(pointer)
    with pytest.raises(ValueError, match="pointer of git-lfs: run git lfs pull"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_incomplete_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere/x\.safetensors: there is no such file"):
        open_checkpoint(tmp_path / "nowhere" / "x.safetensors")
    folder = sharded(tmp_path / "model", tensors())
    index = folder / "model.safetensors.index.json"
    promised = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": promised["weight_map"] | {"more": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json: 'more' is not in model-00001-of-00002\.safetensors"):
        open_checkpoint(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is no index of shards"):
        open_checkpoint(folder)
    index.unlink()
    with pytest.raises(ValueError, match="has no index, and 2 files of weights"):
        open_checkpoint(folder)
    index.write_text(json.dumps(promised))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the shard model-00002-of-00002\.safetensors, which is not there"):
        open_checkpoint(folder)


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
    torch.save({"w": torch.ones(2, 3).T}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: 'w' is stored with strides"):
        open_checkpoint(tmp_path / "x.pt")
    torch.save({"w": torch.ones(300)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"x\.pt: is no complete state dict"):
        open_checkpoint(tmp_path / "x.pt")


def test_adapters_and_quantised_models_are_refused(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ValueError, match=r"config\.json: the weights are quantised \(bitsandbytes\)"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="peft adapter"):
        open_checkpoint(tmp_path)


# Writing --------------------------------------------------------------------------------------------------------------


def shards_of(state, size=10**9):
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    return arrange([(spec.name, [spec]) for spec in specs], size)


def made_of(state, shard, pieces=3):
    def make(write):
        for name in reversed(shard.steps):
            write(name, state[name].reshape(-1).split(pieces))
        return [f"note of {name}" for name in shard.steps]

    return make


@pytest.mark.parametrize("size, count", [(10**9, 1), (60, 4), (1, 8)])
def test_written_shards_are_read_by_the_safetensors_library(tmp_path, size, count):
    state = tensors()
    shards = shards_of(state, size)
    with begin(tmp_path / "out", "id", shards) as output:
        for shard in reversed(shards):
            assert not output.is_finished(shard)
            output.write(shard, made_of(state, shard))
            assert output.is_finished(shard) and not (tmp_path / "out").exists()
        assert [note for own in output.notes() for note in own] == [f"note of {name}" for name in state]
        output.finish()
    with begin(tmp_path / "out", "id", shards, rank=1) as late:  # a process that starts when all is done
        assert all(map(late.is_finished, shards))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == count and [path.name for path in tmp_path.iterdir()] == ["out"]
    loaded = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    same(open_checkpoint(tmp_path / "out"), state)
    for path in files:
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert [path.stat().st_size for path in files] == [shard.size for shard in shards]


def test_every_tensor_is_aligned_and_none_overlaps():
    state = tensors()
    (shard,) = shards_of(state)
    assert len(shard.header) % 8 == 0
    taken = sorted((start, start + state[name].nbytes) for name, start in shard.offsets.items())
    assert taken[0][0] == 0 and len(taken) == len(state)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(taken))
    for name, tensor in state.items():
        assert (len(shard.header) + shard.offsets[name]) % tensor.dtype.itemsize == 0


def test_what_a_step_makes_stays_in_one_shard():
    down, up = (TensorSpec(name, torch.float32, (4,)) for name in ("down", "up"))
    shards = arrange([("first", [down]), ("lost", []), ("second", [up, down]), ("third", [up])], 17)
    assert [shard.steps for shard in shards] == [("first", "lost"), ("second",), ("third",)]
    assert [shard.tensors for shard in shards] == [(down,), (up, down), (up,)]
    assert [shard.file for shard in shards] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_finished_shards_stay_and_a_torn_one_is_written_again(tmp_path):
    state = tensors()
    first, second, *others = shards = shards_of(state, 60)
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "out", "id", shards) as output:
        output.write(first, made_of(state, first))
        output.write(second, lambda write: [write(name, [state[name]]) for name in second.steps[:1]] + [interrupt()])
    inode = (output.folder / first.file).stat().st_ino
    with (output.work / second.file).open("ab") as stream:
        stream.write(bytes(1000))  # what was left is longer than the shard
    with begin(tmp_path / "out", "id", shards) as output:
        assert [output.is_finished(shard) for shard in shards] == [True, *[False] * len(shards[1:])]
        for shard in (second, *others):
            output.write(shard, made_of(state, shard))
        assert output.notes()[0] == [f"note of {name}" for name in first.steps]
        output.finish()
    same(open_checkpoint(tmp_path / "out"), state)
    assert (tmp_path / "out" / first.file).stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupt():
    raise KeyboardInterrupt


def test_one_merge_at_a_time_and_no_other(tmp_path):
    out, shards = tmp_path / "out", shards_of(tensors())
    with begin(out, "id", shards) as output:
        with pytest.raises(ValueError, match="out: another process is writing this merge"), begin(out, "id", shards):
            pass
        with (
            begin(out, "id", shards, rank=1) as other,
            pytest.raises(ValueError, match="out: another process is writing this merge"),
        ):
            output.write(shards[0], lambda write: other.write(shards[0], made_of(tensors(), shards[0])))
    for rank in (0, 1):
        with (
            pytest.raises(ValueError, match=r"\.out\.partial: an unfinished merge of another recipe"),
            begin(out, "other", shards, rank),
        ):
            pass


def test_a_full_disk_is_named_before_and_during_writing(tmp_path, monkeypatch):
    state, out = tensors(), tmp_path / "out"
    too_large = arrange([("huge", [TensorSpec("huge", torch.float32, (2**48,))])], 10**9)
    with pytest.raises(OSError, match=r"out: needs \d+\.\d\d GB, and .* GB are free"), begin(out, "id", too_large):
        pass
    assert not (tmp_path / ".out.partial").exists()
    (shard,) = shards = shards_of(state)

    def full(*_):
        raise OSError(28, "No space left on device")

    said = r"model\.safetensors: 'mask': No space left on device; free some space"
    with monkeypatch.context() as patched, pytest.raises(OSError, match=said), begin(out, "id", shards) as output:
        patched.setattr(os, "pwrite", full)
        output.write(shard, made_of(state, shard))
    with begin(out, "id", shards) as output:
        output.write(shard, made_of(state, shard))
        output.finish()
    same(open_checkpoint(out), state)


def test_a_tensor_of_the_wrong_length_or_none_is_a_fault(tmp_path):
    (shard,) = shards = shards_of({"w": torch.ones(4)})
    with begin(tmp_path / "out", "id", shards) as output:
        with pytest.raises(RuntimeError, match="'w': 12 bytes written of 16"):
            output.write(shard, lambda write: write("w", [torch.ones(3)]))
        with pytest.raises(RuntimeError, match="'w' was not written"):
            output.write(shard, lambda write: None)
        assert not output.is_finished(shard)
