"""How merges end that do not succeed: what is left on the disk, what is said, and that the advice can be followed."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models_on_disk import content, experts_of, in_fork, models, state_of, state_of_all_dtypes, weights
from test_shards import made_of, shards_of

from merging.command import changes, stream
from merging.command.main import main
from merging.command.shards import REFUSED, begin

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("keyboard")


def command(tmp_path, spoil=None, *more):
    """The flags of a merge in shards of one or two tensors; the last expert's state is spoilt before it is saved."""
    base = state_of()
    experts = experts_of(base)
    if spoil:
        spoil(experts[-1])
    where, others = models(tmp_path, base, experts)
    return ["--base", where, "--experts", *others, "--shard-size", "500B", "--out", str(tmp_path / "out"), *more]


def _nan(state):
    state["token_embedding.weight"][7, 3] = torch.nan


def _huge(state):
    state["token_embedding.weight"][7, 3] = 3e38


@pytest.mark.parametrize("method, more", [
    ("weight_average", ()), ("ties", ("--set", "*:scope=global")), ("dare", ("--jobs", "2")), ("tsv_m", ("--svc",)),
])  # fmt: skip
def test_the_advice_of_a_refusal_can_be_followed(tmp_path, method, more, capsys, monkeypatch):
    monkeypatch.setattr(changes, "RANGE", 30)
    flags = command(tmp_path, _nan, "--method", method, *more)
    assert main(flags) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    advice = re.search(r"e2/model\.safetensors: 'token_embedding.weight'.*--set '(.+?)'", said)
    assert advice, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "e0", "e1", "e2"]
    assert main([*flags, "--set", advice[1]]) == 0
    assert torch.equal(weights(tmp_path / "out")["token_embedding.weight"], state_of()["token_embedding.weight"])


def test_an_overflow_is_refused_likewise(tmp_path, capsys):
    flags = command(tmp_path, _huge, "--method", "weight_average", "--dtype", "float16")
    assert main(flags) == 1 and "overflow torch.float16; choose --dtype float32" in capsys.readouterr().err
    assert main([*flags[:-1], "float32"]) == 0


def test_a_refusal_removes_nothing_of_another_merge(tmp_path, capsys):
    """The killed merge of another recipe stays, whatever is tried in its place."""
    flags = command(tmp_path, _nan, "--method", "weight_average")

    def killed_in_the_second_shard():
        original = os.fsync
        calls = iter(range(3))
        os.fsync = lambda file: original(file) if next(calls, None) is not None else os.kill(os.getpid(), 9)
        return main([*flags, "--set", "token*:merge=false"])

    assert in_fork(killed_in_the_second_shard) == -signal.SIGKILL
    before = {path: path.read_bytes() for path in (tmp_path / ".out.partial").rglob("*") if path.is_file()}
    assert main(flags) == 1 and "an unfinished merge of another recipe" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / ".out.partial").rglob("*") if path.is_file()} == before
    assert main([*flags, "--set", "token*:merge=false"]) == 0


def test_a_process_among_several_marks_what_it_refuses_and_the_next_merge_removes_it(tmp_path):
    state, out = state_of_all_dtypes(), tmp_path / "out"
    first, second, *_ = shards = shards_of(state, 60)
    with pytest.raises(ValueError, match="'double': NaN"), begin(out, "id", shards, 0, ranks=2) as output:
        output.write(first, made_of(state, first))
        with pytest.raises(ValueError), begin(out, "id", shards, 1, ranks=2) as other, other.attempt():
            other.write(second, lambda write: refuse("'double': NaN"))
        output.notes()  # would wait for ever
    assert (tmp_path / ".out.partial" / REFUSED).read_text() == "'double': NaN"
    with begin(out, "id", shards, 1, ranks=2) as late:  # a process of the refused merge that still writes
        late.write(second, lambda write: busy(out, shards) or made_of(state, second)(write))
    with begin(out, "other", shards) as output:
        assert not any(map(output.is_finished, shards)) and not (output.work / REFUSED).exists()
        for shard in shards:
            output.write(shard, made_of(state, shard))
        output.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_other_processes_wait_until_a_refused_merge_is_removed(tmp_path):
    state, out = state_of_all_dtypes(), tmp_path / "out"
    shards = shards_of(state, 60)
    with pytest.raises(ValueError), begin(out, "id", shards, 0, ranks=2) as output, output.attempt():
        refuse("NaN")

    def joins():
        with begin(out, "mended", shards, 1, ranks=2) as output:
            return output.is_finished(shards[0])

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(joins)
        time.sleep(0.3)
        assert not other.done()
        with begin(out, "mended", shards, 0, ranks=2):
            assert other.result(timeout=10) is False


def refuse(text):
    raise ValueError(text)


def busy(out, shards):
    with pytest.raises(ValueError, match="another process is writing this merge"), begin(out, "other", shards):
        pass


def test_two_processes_of_a_launcher_end_with_the_refusal_of_one(tmp_path):
    flags = command(tmp_path, _nan, "--method", "weight_average")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*launcher, "-m", "merging", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode != 0 and "--set 'token_embedding.weight:merge=false'" in ran.stderr
    assert main([*flags, "--set", "token_embedding.weight:merge=false"]) == 0


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    flags = command(tmp_path, None, "--method", "weight_average")
    assert main([*flags[:-3], str(tmp_path / "whole"), *flags[-2:]]) == 0
    original, calls = stream.Streamer.tensor, iter(range(3))

    def interrupted(*arguments):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return original(*arguments)

    monkeypatch.setattr(stream.Streamer, "tensor", interrupted)
    assert main(flags) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "python -m merging: interrupted; the same command goes on where this one stopped"
    assert not any("Traceback" in line for line in said) and (tmp_path / ".out.partial").exists()
    monkeypatch.setattr(stream.Streamer, "tensor", original)
    assert main(flags) == 0 and content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_belongs_to_the_base_is_checked_before_anything_is_merged(tmp_path, capsys, monkeypatch):
    flags = command(tmp_path, None, "--method", "weight_average")
    (tmp_path / "secret").write_text("hidden")
    (tmp_path / "base" / "tokenizer.json").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(stream.Streamer, "tensor", lambda *_: pytest.fail("merged"))
    assert main(flags) == 1
    assert "base/tokenizer.json: is a link to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def _as_file(out):
    out.parent.write_text("a file")


def _below_a_file(out):
    out.parent.parent.write_text("a file")


def _circle(out):
    out.parent.mkdir()
    out.symlink_to(out)


def _taken(out):
    out.parent.mkdir()
    (out.parent / ".x.partial").write_text("a file")


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--report-only",)])
@pytest.mark.parametrize("spoil, name, reason", [
    (_as_file, "a/x", r"a is a file, in which no folder can be; choose another --out"),
    (_below_a_file, "a/b/x", r"a is a file, in which no folder can be; choose another --out"),
    (_circle, "a/x", r".*[Ss]ymlink.*; choose another folder"),
    (_taken, "a/x", r"\.x\.partial is needed while it is written, and is a file; delete that"),
    (None, "x" * 300, r"File name too long; choose another folder"),
    (None, "x" * 250, r"File name too long; choose another folder"),
])  # fmt: skip
def test_a_folder_that_cannot_be_made_is_told_before_anything_is_read(tmp_path, spoil, name, reason, more, capsys):
    out = tmp_path / name
    if spoil:
        spoil(out)
    missing = ["--base", "nowhere", "--experts", "nowhere", "--method", "ties"]
    assert main([*missing, "--out", str(out), *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"python -m merging: --out \S*{name}: .*{reason}", line), line


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--report-only",)])
def test_a_folder_that_may_not_be_written_is_told(tmp_path, more, capsys, monkeypatch):
    flags = command(tmp_path, None, "--method", "weight_average", *more)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and allowed(path, mode))  # root may all
    assert main(flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"nothing may be written into {tmp_path}; choose another --out")


def test_where_a_disk_is_mounted_only_a_report_can_be_written(tmp_path, capsys, monkeypatch):
    """A finished merge takes its folder's place by a rename, which no mount allows: that must not show at the end."""
    flags = command(tmp_path, None, "--method", "weight_average")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    assert main(flags) == 1
    assert "is where a disk is mounted, and cannot be replaced; name a folder in it" in capsys.readouterr().err
    assert main([*flags, "--report-only"]) == 0 and (tmp_path / "out" / "index.html").is_file()


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    flags = command(tmp_path, None, "--method", "weight_average")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert main(flags) == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "merging.yaml").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "disk", "e0", "e1", "e2", "out"]


def in_process(*flags, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(options.pop("path", ROOT)), str(ROOT)))}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT)
    return subprocess.Popen([sys.executable, "-m", "merging", *flags], **pipes | options)


@pytest.mark.parametrize("dry", [False, True])
def test_a_reader_that_has_gone_ends_it_quietly(tmp_path, dry):
    flags = command(tmp_path, None, "--method", "weight_average", "--dry-run") if dry else ["--help"]
    process = in_process(*flags)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("module", ["yaml", "tyro", "torch"])
def test_ctrl_c_while_modules_are_imported_ends_it_quietly(tmp_path, module):
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    process = in_process(*command(tmp_path / "models", None, "--method", "ties"), path=tmp_path)
    assert process.communicate() == (b"", b"") and process.returncode == 130


def _fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize("make, name, reason", [
    (None, " ", "' ': there is no such file or folder"),
    (None, "x" * 5000, "there is no such file or folder"),
    (_fifo, "fifo", "fifo: is neither a file nor a folder"),
    (_fifo, "fifo.safetensors", "fifo.safetensors: is neither a file nor a folder"),
])  # fmt: skip
@pytest.mark.parametrize("of", ["base", "expert"])
def test_what_no_model_can_be_is_refused_in_one_line(tmp_path, make, name, reason, of, capsys):
    base, _ = models(tmp_path, state_of(), [])
    odd = str(tmp_path / name) if make else name
    if make:
        make(Path(odd))
    named = ["--base", odd, "--experts", base] if of == "base" else ["--base", base, "--experts", odd]
    assert main([*named, "--method", "weight_average", "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m merging: ") and line.endswith(reason)


@pytest.mark.parametrize("name", ["nobase", "owner/nobase"])
def test_a_name_that_is_no_folder_and_not_on_the_hub_is_told_so(tmp_path, name, capsys):
    out = ["--method", "weight_average", "--out", str(tmp_path / "out")]
    assert main(["--base", name, "--experts", name, *out]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m merging: {name}: there is no such file or folder, and on the Hub: model {name}")


@pytest.mark.parametrize("more, message", [
    (["--alpha", "0.5"], "--alpha: acts on SVC only; add --svc, or leave it out"),
    (["--space", "input"], "--space: acts on SVC only"),
    (["--split-qkv"], "--split-qkv: acts on SVC only"),
])  # fmt: skip
def test_an_option_of_a_calibration_that_is_not_done_is_refused(tmp_path, more, message, capsys):
    flags = command(tmp_path, None, "--method", "task_arithmetic")
    assert main([*flags, *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m merging: {message}")
    assert main([*flags, "--alpha", "0.5", "--set", "*:svc=true"]) == 0


@pytest.mark.parametrize("more, named", [
    (["--final-scale", "x"], "--final-scale"),
    (["--method", "ties", "dare"], "dare"),
    (["--no-such-flag"], "--no-such"),
])  # fmt: skip
def test_a_wrong_flag_is_one_line(tmp_path, more, named, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command(tmp_path, None, "--method", "task_arithmetic"), *more])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("python -m merging: ") and named in line


def test_an_empty_name_is_not_the_model_in_the_current_folder(tmp_path, capsys, monkeypatch):
    base, _ = models(tmp_path, state_of(), [])
    monkeypatch.chdir(base)
    assert main(["--base", base, "--experts", "", base, "--method", "ties", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "python -m merging: '': there is no such file or folder\n"


@pytest.mark.parametrize("more, message", [
    (["--shard-size", "9" * 400 + "GB"], "--shard-size must be a size such as 500MB"),
    (["--set", "*:scale=" + "[" * 5000], "scale must be float"),
])  # fmt: skip
def test_options_beyond_all_bounds_are_refused_in_one_line(tmp_path, more, message, capsys):
    assert main([*command(tmp_path, None, "--method", "task_arithmetic"), *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m merging: ") and message in line
