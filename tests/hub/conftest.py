"""The fake Hub, made once per session, and the switch of this process to a cache."""

import shutil

import datasets
import huggingface_hub
import pytest
from fake_hub import make_fake_hub
from fake_language import make_fake_language_hub


@pytest.fixture(scope="session")
def true_hub(tmp_path_factory):
    """A complete cache; tests read it, those that change something take `own_hub`."""
    root = tmp_path_factory.mktemp("hub")
    make_fake_hub(root)
    return root


@pytest.fixture(scope="session")
def true_language_hub(tmp_path_factory):
    """As `true_hub`, with language models and data sets."""
    root = tmp_path_factory.mktemp("language_hub")
    make_fake_language_hub(root)
    return root


@pytest.fixture
def hub(true_hub, tmp_path, monkeypatch):
    """This process sees the complete cache, offline."""
    return _use(true_hub, tmp_path, monkeypatch)


@pytest.fixture
def own_hub(true_hub, tmp_path, monkeypatch):
    """As `hub`, with a copy that the test may change."""
    shutil.copytree(true_hub, tmp_path / "copy", symlinks=True)
    return _use(tmp_path / "copy", tmp_path, monkeypatch)


def _use(root, scratch, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", scratch / "datasets")
    return root
