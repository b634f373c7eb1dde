"""Small models on disk for the tests of the command, the same merges in memory, and processes that are killed."""

import contextlib
import json
import math
import os
import re
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from merging import MERGERS, apply, calibrate, iso_basis, merger, task_vector
from merging.checkpoints import open_checkpoint
from merging.command.main import merge
from merging.command.plan import make_plan
from merging.command.recipe import Recipe


def state_of(seed=0, **shapes):
    """A state dict of normal entries, by name in the order given."""
    shapes = shapes or {"mlp": (12, 8), "attn": (8, 8), "bias": (12,), "token_embedding": (20, 8), "scale": ()}
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def state_of_all_dtypes(seed=0):
    """A state dict with a tensor of each kind: every dtype and shape that is special."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "a.weight": normal(5, 3), "a.bias": normal(5).bfloat16(), "b.weight": normal(4, 2, 3).half(),
        "double": normal(2, 2).double(), "scale": normal(), "steps": torch.tensor([1, 2, 3]), "none": normal(0, 4),
        "mask": torch.tensor([True, False, True]),
    }  # fmt: skip


def experts_of(base, count=3, size=0.1):
    generator = torch.Generator().manual_seed(count)
    return [
        {
            name: (t + size * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t
            for name, t in base.items()
        }
        for _ in range(count)
    ]


def saved(folder, state, **config):
    folder.mkdir(exist_ok=True, parents=True)
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def models(tmp_path, base, experts):
    return saved(tmp_path / "base", base), tuple(saved(tmp_path / f"e{i}", state) for i, state in enumerate(experts))


def weights(folder):
    return {name: t for path in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(path).items()}


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def in_memory(base, experts, method, svc=False, alpha=None, final_scale=1.0, **options):
    vectors = [task_vector(expert, base) for expert in experts]
    merged = MERGERS[method](vectors, **options)
    if svc:
        bases = iso_basis(vectors, method) if merger(method).basis else None
        bases = bases and {k: v for k, v in bases.items() if "embedding" not in k and "text_proj" not in k}
        merged = calibrate(merged, vectors, alpha=alpha, bases=bases)
    return apply(base, merged, final_scale)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-12)
        assert found[name].dtype == tensor.dtype and error < tolerance, name


@contextlib.contextmanager
def killed(function, count):
    """Let the process kill itself, as by kill -9, at the count-th call of a function of os."""
    original, calls = getattr(os, function), iter(range(count))

    def last(*arguments, **options):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(os, function, last)
    yield
    setattr(os, function, original)


def in_fork(work):
    """Run work() in a forked process and return how that ended: 0, an exit status, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        status = 99
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            status = work() or 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def plan_of(tmp_path, base, experts, **options):
    """The plan of merging some state dicts, written to disk first."""
    where, others = models(tmp_path, base, experts)
    recipe = Recipe(where, others, options.pop("method", "weight_average"), **options)
    return make_plan(recipe, open_checkpoint(where), [open_checkpoint(other) for other in others])


def peak_of_merge(first: Recipe, first_out: Path, recipe: Recipe, out: Path) -> float:
    """By how many MB a merge swells this process, mapped pages included, once `first` has touched the code it needs."""

    def resident(key: str) -> float:
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

    torch.set_num_threads(1)
    merge(first, first_out)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    start = resident("VmRSS")
    merge(recipe, out)
    return resident("VmHWM") - start


def llama_shapes(hidden=8192, intermediate=28672, layers=80, keys=1024, vocabulary=128256):
    """The tensors of a Llama, by default those of 70e9 parameters."""
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden)}
        sizes |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden)}
        sizes |= {f"mlp.{part}_proj": (intermediate, hidden) for part in ("gate", "up")}
        sizes |= {"mlp.down_proj": (hidden, intermediate), "input_layernorm": (hidden,)}
        sizes |= {"post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def sparse(folder, shapes, seed=0, shard=64):
    """Shards of bfloat16, of which the disk holds headers and the first entries of each tensor; the rest is holes."""
    folder.mkdir(parents=True)
    generator, weight_map, names = torch.Generator().manual_seed(seed), {}, list(shapes)
    for start in range(0, len(names), shard):
        file, header, place = f"model-{start:05}.safetensors", {}, 0
        for name in names[start : start + shard]:
            size = 2 * math.prod(shapes[name])
            header[name] = dict(dtype="BF16", shape=list(shapes[name]), data_offsets=[place, place + size])
            place += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for facts in header.values():
                stream.seek(8 + len(text) + facts["data_offsets"][0])
                first = torch.randn(64, generator=generator).bfloat16()
                stream.write(
                    first.view(torch.uint8).numpy().tobytes()[: facts["data_offsets"][1] - facts["data_offsets"][0]]
                )
            stream.truncate(8 + len(text) + place)
        weight_map |= dict.fromkeys(header, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(folder)
