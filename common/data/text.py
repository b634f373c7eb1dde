"""Python text that every machine has: sources, with their docstrings, of the standard library and installed packages.

Files are shuffled and split by a hash of their module path, so that no file is in two splits and a new file moves no
other. Texts differ between versions of Python and of the packages: `Corpus.digest` tells them apart.

Token ids are laid out as T5's: padding 0, end of text 1, unknown 2, then the symbols (bytes, or the pieces of a
byte-level BPE trained on the training files). Sentinels of span corruption are not among them: they come after.
"""

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.cache import artefact

PAD, END, UNKNOWN = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # the tokens with these ids
SPECIAL = 3  # their number, and so the first id of a symbol
BYTES = 256

PACKAGES = ("torch", "numpy", "scipy", "pandas", "sklearn", "matplotlib")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the name to install differs from the name to import
LEFT_OUT = frozenset({"test", "tests", "site-packages", "__pycache__"})  # repetitive text, or not the package's
FILE_BYTES = 50_000  # of a long file only its beginning is taken: tables of data are no text
SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}  # of the files
MEGABYTE = 1_000_000
BPE_TRAINING_BYTES = 2 * MEGABYTE


@dataclass(frozen=True)
class Corpus:
    """Tokens of each split, (n,) int16, every file ended by END; the number of ids; a hash of all tokens."""

    tokens: Mapping[str, Tensor]
    vocabulary: int
    digest: str


@cache
def corpus(megabytes: float = 8.0, vocabulary: int = 0) -> Corpus:
    """Return the tokenised corpus, from the cache if it is there: about 2 s (bytes) or 10 s (BPE) the first time.

    Args:
        megabytes: largest size of the training text, in 10⁶ bytes; validation and test get up to a tenth of it each.
        vocabulary: number of ids of a BPE, special ones included; 0 makes every byte a token.

    Raises:
        ValueError: megabytes is not positive, or the vocabulary is too small for all bytes or too large for int16.
    """
    if not megabytes > 0:
        raise ValueError(f"megabytes must be positive, got {megabytes}")
    if vocabulary and not SPECIAL + BYTES <= vocabulary <= 2**15:
        raise ValueError(f"vocabulary must be 0 (bytes) or {SPECIAL + BYTES} to {2**15}, got {vocabulary}")

    def build(folder: Path) -> None:
        texts = {split: read_texts(split, _budget(split, megabytes)) for split in SHARES}
        tokens = _bpe(texts, vocabulary) if vocabulary else {split: _bytes(texts[split]) for split in SHARES}
        save_file(tokens, folder / "tokens.safetensors")
        digest = hashlib.sha256(b"".join(tokens[split].numpy().tobytes() for split in SHARES)).hexdigest()
        (folder / "text.json").write_text(json.dumps({"digest": digest}))

    inputs = {"megabytes": megabytes, "vocabulary": vocabulary, "versions": versions()}
    folder = artefact("corpus", inputs, build).path
    digest = json.loads((folder / "text.json").read_text())["digest"]
    return Corpus(load_file(folder / "tokens.safetensors"), vocabulary or SPECIAL + BYTES, digest)


def versions() -> dict[str, str]:
    """Return the versions of Python and of all packages that the text is taken from."""
    packages = {package: metadata.version(DISTRIBUTIONS.get(package, package)) for package in PACKAGES}
    return {"python": platform.python_version(), **packages}


def source_files() -> Iterator[tuple[str, Path]]:
    """Yield the module path (such as "torch/nn/functional.py") and the file of every source that may be read."""
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    roots |= {package: Path(util.find_spec(package).origin).parent for package in PACKAGES}
    for package, root in roots.items():
        for path in root.rglob("*.py"):
            inner = path.relative_to(root)
            if not LEFT_OUT.intersection(inner.parts):
                yield f"{package}/{inner.as_posix()}", path


def split_of(name: str) -> str:
    """Return the split of a file, which depends on its module path alone."""
    return split_at(_place(name), SHARES)


def split_at(place: float, shares: Mapping[str, float]) -> str:
    """Return the split that a place in [0, 1) belongs to, if the splits' shares lie there one after the other."""
    above = 0.0
    for split, share in shares.items():
        above += share
        if place < above:
            return split
    return split


def read_texts(split: str, budget: int) -> list[bytes]:
    """Return the beginnings of a split's files in the order of their hash, up to `budget` bytes in all."""
    chosen = sorted((hashlib.sha256(name.encode()).hexdigest(), path) for name, path in source_files()
                    if split_of(name) == split)  # fmt: skip
    texts, seen = [], set()
    for _, path in chosen:
        with open(path, "rb") as file:
            text = file.read(FILE_BYTES)
        if not text or text in seen:  # empty and vendored files
            continue
        seen.add(text)
        texts.append(text[:budget])
        budget -= len(texts[-1])
        if budget <= 0:
            break
    return texts


def _budget(split: str, megabytes: float) -> int:
    return round(megabytes * MEGABYTE * (1.0 if split == "train" else 0.1))


def _place(name: str) -> float:
    """Return a number in [0, 1) from the end of the hash of a name: its beginning gives the order of the files."""
    return int(hashlib.sha256(name.encode()).hexdigest()[-8:], 16) / 2**32


def _bytes(texts: Sequence[bytes]) -> Tensor:
    return _joined([np.frombuffer(text, np.uint8).astype(np.int16) + SPECIAL for text in texts])


def _bpe(texts: Mapping[str, Sequence[bytes]], vocabulary: int) -> dict[str, Tensor]:
    """Train a byte-level BPE on the beginning of the training texts, and tokenise all of them."""
    decoded = {split: [text.decode("utf-8", "replace") for text in texts[split]] for split in texts}
    sizes = np.cumsum([len(text) for text in texts["train"]])
    tokenizer = train_bpe(decoded["train"][: int((sizes < BPE_TRAINING_BYTES).sum()) + 1], vocabulary)
    ids = {split: [encoding.ids for encoding in tokenizer.encode_batch(decoded[split])] for split in decoded}
    return {split: _joined([np.array(line, np.int16) for line in ids[split]]) for split in ids}


def train_bpe(texts: Iterable[str], vocabulary: int, ending: bool = False) -> Any:
    """Train a byte-level BPE and return it, a `tokenizers.Tokenizer`; it can encode any text.

    Args:
        texts: what it is trained on.
        vocabulary: number of ids, those of SPECIAL_TOKENS and of the 256 bytes included.
        ending: let every text that it encodes end in END.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if ending:
        end = SPECIAL_TOKENS[END]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, END)])
    return tokenizer


def _joined(lines: Sequence[np.ndarray]) -> Tensor:
    """Concatenate the tokens of files, END after each."""
    end = np.array([END], np.int16)
    return torch.from_numpy(np.concatenate([part for line in lines for part in (line, end)]))
