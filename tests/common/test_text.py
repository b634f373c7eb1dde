"""The Python corpus: who is in it, on which side, in which tokens."""

import pytest
import torch

from common import cache
from common.data import text

SMALL = 0.05


@pytest.fixture(scope="module")
def installed():
    """Every installed source; listing them takes most of a second."""
    return list(text.source_files())


@pytest.fixture
def own_cache(tmp_path, installed, monkeypatch):
    """A cache of the test's own, and no corpus in memory."""
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(text, "source_files", lambda: iter(installed))
    text.corpus.cache_clear()
    yield tmp_path
    text.corpus.cache_clear()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Three hundred files instead of the installed ones."""
    files = []
    for number in range(300):
        path = tmp_path / f"{number}.py"
        path.write_text(f"# file {number}\n" * (1 + number % 7))
        files.append((f"package/{number}.py", path))
    monkeypatch.setattr(text, "source_files", lambda: iter(files))
    return files


def test_bytes_spell_the_files_one_after_another(own_cache):
    found = text.corpus(SMALL)
    assert found.vocabulary == 259
    for split, megabytes in (("train", SMALL), ("validation", SMALL / 10), ("test", SMALL / 10)):
        texts = text.read_texts(split, round(megabytes * 1e6))
        assert sum(len(part) for part in texts) == round(megabytes * 1e6)
        expected = [token for part in texts for token in [*(byte + 3 for byte in part), 1]]
        assert found.tokens[split].tolist() == expected and found.tokens[split].dtype == torch.int16


def test_pieces_spell_the_same_text_in_fewer_tokens(own_cache):
    whole, pieces = text.corpus(SMALL), text.corpus(SMALL, 400)
    assert pieces.vocabulary == 400 and pieces.digest != whole.digest
    for split, tokens in pieces.tokens.items():
        assert len(tokens) < 0.8 * len(whole.tokens[split])
        assert tokens.min() >= 1 and tokens.max() < 400
        assert (tokens == text.END).sum() == (whole.tokens[split] == text.END).sum()
        assert not (tokens == text.UNKNOWN).any()


def test_a_trained_bpe_spells_every_text_and_ends_it_if_asked():
    plain, ended = (text.train_bpe(["a rose is a rose"] * 9, 3 + 256 + 5, ending) for ending in (False, True))
    assert [plain.token_to_id(token) for token in text.SPECIAL_TOKENS] == [text.PAD, text.END, text.UNKNOWN]
    assert plain.get_vocab_size() == 264 and len(plain.encode("a rose").ids) < 6
    for words in ("a rose", "Größe 大\n", ""):
        assert plain.decode(plain.encode(words).ids) == words
        assert ended.encode(words).ids == [*plain.encode(words).ids, text.END]


def test_the_second_time_comes_from_the_cache(own_cache, monkeypatch):
    first = text.corpus(SMALL)
    text.corpus.cache_clear()
    monkeypatch.setattr(text, "read_texts", None)
    second = text.corpus(SMALL)
    assert second.digest == first.digest and torch.equal(second.tokens["train"], first.tokens["train"])
    with pytest.raises(TypeError):  # another size would have to be read
        text.corpus(2 * SMALL)


def test_the_digest_follows_the_text(own_cache, tree):
    first = text.corpus(SMALL).digest
    text.corpus.cache_clear()
    _, path = tree[0]
    path.write_text("# another file 0\n")
    assert text.corpus(SMALL).digest == first  # versions are the same: as it was built
    text.corpus.cache_clear()
    assert text.corpus(2 * SMALL).digest != first


def test_no_file_is_on_two_sides_and_a_further_file_moves_no_other(tree, monkeypatch):
    sides = {split: text.read_texts(split, 10**6) for split in text.SHARES}
    names = {split: [part.split(b"\n")[0] for part in parts] for split, parts in sides.items()}
    everyone = sorted(name for split in names.values() for name in split)
    assert everyone == sorted(f"# file {number}".encode() for number in range(300))
    assert 240 < len(names["train"]) < 290 and names["validation"] and names["test"]
    monkeypatch.setattr(text, "source_files", lambda: iter(tree[:200]))
    for split in text.SHARES:
        fewer = [part.split(b"\n")[0] for part in text.read_texts(split, 10**6)]
        assert fewer == [name for name in names[split] if int(name.split()[-1]) < 200]


def test_order_does_not_depend_on_that_of_the_file_system(tree, monkeypatch):
    first = text.read_texts("train", 10**6)
    monkeypatch.setattr(text, "source_files", lambda: iter(tree[::-1]))
    assert text.read_texts("train", 10**6) == first


def test_copies_and_empty_files_come_once_or_not_and_long_ones_are_cut(tree, monkeypatch):
    for _, path in tree[:150]:
        path.write_text("# the same\n")
    for _, path in tree[150:290]:
        path.write_text("")
    for _, path in tree[290:]:
        path.write_text(f"# {path.name}\n" + "x" * 60_000)
    texts = [part for split in text.SHARES for part in text.read_texts(split, 10**6)]
    assert len(texts) == 10 + sum(part == b"# the same\n" for part in texts)
    assert texts.count(b"# the same\n") <= 3  # once a split
    assert {len(part) for part in texts} == {len(b"# the same\n"), text.FILE_BYTES}
    assert [len(part) for part in text.read_texts("train", 20)] in ([20], [11, 9])


def test_installed_sources_without_their_tests(installed):
    files = dict(installed)
    assert {"python/json/decoder.py", "torch/nn/functional.py", "sklearn/base.py"} <= files.keys()
    assert all(path.suffix == ".py" for path in files.values())
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in files)
    assert text.versions().keys() == {"python", *text.PACKAGES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0.0,), "megabytes must be positive, got 0.0"),
        ((float("nan"),), "megabytes must be positive, got nan"),
        ((1.0, 100), "vocabulary must be 0 .bytes. or 259 to 32768, got 100"),
        ((1.0, 40_000), "got 40000"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        text.corpus(*options)
