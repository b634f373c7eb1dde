"""--push: what is checked before the merge, what is uploaded after it, and that a failed upload loses nothing."""

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from models_on_disk import content, experts_of, models, state_of

from merging.command import main as command
from merging.command.main import main


class FakeHub:
    """What HfApi does, kept in memory."""

    def __init__(self):
        self.role, self.repositories, self.fails = "write", {}, None

    def whoami(self):
        if self.fails == "whoami":
            raise OSError("401 Unauthorized\nmore lines")
        return {"name": "me", "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, repo_id, exist_ok):
        assert exist_ok
        self.repositories.setdefault(repo_id, {})
        return f"https://hub/{repo_id}"

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id, commit_message):
        self.repositories[repo_id][path_in_repo] = path_or_fileobj

    def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
        if self.fails == "upload":
            raise ConnectionError("the line is down\nand more")
        found = {str(p.relative_to(folder_path)): p.read_bytes() for p in folder_path.rglob("*") if p.is_file()}
        self.repositories[repo_id] |= {name: data for name, data in found.items() if name not in ignore_patterns}


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return fake


@pytest.fixture
def flags(tmp_path):
    base = state_of()
    where, others = models(tmp_path, base, experts_of(base, 2))
    return ["--base", where, "--experts", *others, "--method", "ties", "--out", str(tmp_path / "out"), "--push", "me/x"]


def test_the_finished_merge_is_uploaded_without_local_paths(hub, flags, tmp_path, capsys):
    assert main(flags) == 0 and "out: uploaded to https://hub/me/x" in capsys.readouterr().out
    uploaded, own = hub.repositories["me/x"], content(tmp_path / "out")
    assert uploaded.keys() == own.keys()
    assert {name for name in own if uploaded[name] != own[name]} == {"merging.yaml"}
    recipe = yaml.safe_load(uploaded["merging.yaml"])
    assert (recipe["base"], recipe["experts"], recipe["method"]) == ("base", ["e0", "e1"], "ties")
    assert not any(str(tmp_path).encode() in data for data in uploaded.values())


def test_a_failed_upload_loses_nothing_and_the_same_command_uploads_only(hub, flags, tmp_path, capsys, monkeypatch):
    hub.fails = "upload"
    assert main(flags) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        "out: the merge is complete, but its upload to me/x failed (the line is down); the same command again uploads "
        "it without merging anew"
    )
    before = content(tmp_path / "out")
    hub.fails = None
    monkeypatch.setattr(command, "_carry_out", lambda *_: pytest.fail("merged anew"))
    assert main(flags) == 0 and hub.repositories["me/x"].keys() == before.keys()
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("change, message", [
    (lambda hub, patch: "x", "--push 'x': must be OWNER/NAME"),
    (lambda hub, patch: "a/b/c", "--push 'a/b/c': must be OWNER/NAME"),
    (lambda hub, patch: "me/a b", "--push 'me/a b': must be OWNER/NAME"),
    (lambda hub, patch: patch.setattr(huggingface_hub, "get_token", lambda: None), "no token .*; run hf auth login"),
    (lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set; unset it"),
    (lambda hub, patch: setattr(hub, "role", "read"), "the token may only read; take one that may write"),
    (lambda hub, patch: setattr(hub, "fails", "whoami"), r"the Hub does not take the token \(401 Unauthorized\); run"),
])  # fmt: skip
def test_what_could_not_be_uploaded_is_refused_before_the_merge(hub, flags, tmp_path, change, message, monkeypatch):
    name = change(hub, monkeypatch)
    monkeypatch.setattr(command, "open_checkpoint", lambda *_: pytest.fail("opened a model"))
    with pytest.raises(ValueError, match=f"--push.*{message}" if "--push" not in message else message) as raised:
        command.check_push(name or "me/x")
    assert "\n" not in str(raised.value)
    assert main([*flags[:-1], name or "me/x"]) == 1
    assert not (tmp_path / "out").exists() and not hub.repositories


def test_a_dry_run_uploads_nothing(hub, flags):
    assert main([*flags, "--dry-run"]) == 0 and not hub.repositories
