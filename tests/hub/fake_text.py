"""T5-Base and C4 of the true format in small, added to a Hub cache: configuration, tokenizer, a few shards.

fake                    true thing and its source
----------------------  -----------------------------------------------------------------------------------------
config.json             keys of google-t5/t5-base's as its copies carry them (model_type t5, d_ff, d_kv, d_model,
                        n_positions 512, output_past, no feed_forward_proj: ReLU is the default)
tokenizer.json          Unigram with <pad> </s> <unk> first and <extra_id_99> … <extra_id_0> last, as the installed
                        T5Tokenizer saves it; commits that copy the repository show neither tokenizer_config.json
                        nor special_tokens_map.json. The true one has a precompiled normaliser too
C4 shards               card of allenai/c4 (text, timestamp, url) and public scripts (en/c4-*.json.gz): a JSON object
                        a line
"""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

from fake_hub import repository
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from sparsity.studies.data import c4

MODEL = "google-t5/t5-base"
WORDS = ["flat", "minima", "sparse", "units", "keys", "values", "layers", "weights", "follow", "hold", "the", "of"]
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 48, "d_kv": 8, "d_model": 16, "decoder_start_token_id": 0,
    "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_heads": 2, "num_layers": 2,
    "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"early_stopping": True, "max_length": 200, "num_beams": 4}},
    "vocab_size": 32128,
}  # fmt: skip


def write_model(root: Path) -> Path:
    """Write configuration and tokenizer."""
    folder = repository(root, "model", MODEL)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(documents(200, seed=0), trainer)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in range(99, -1, -1)]
    T5Tokenizer(vocab=pieces + sentinels).save_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return folder


def write_weights(folder: Path) -> None:
    """Add weights: those of transformers' class, saved by itself, as those of the repository are."""
    config = T5Config.from_dict(CONFIG)
    state = T5ForConditionalGeneration(config).state_dict()
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    kept = {name: tensor.contiguous() for name, tensor in state.items() if name not in tied}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def write_shards(root: Path, names: Sequence[str], count: int, columns: Sequence[str] = ("text", "timestamp", "url")):
    """Write shards of `count` documents; the text of each says which shard and row it is."""
    folder = repository(root, "dataset", c4.REPOSITORY)
    for name in names:
        lines = []
        for row, text in enumerate(documents(count, seed=name)):
            values = (f"{name} {row}\n{text}", "2019-04-25T12:57:54Z", f"https://example.org/{row}")
            lines.append(json.dumps(dict(zip(columns, values, strict=True))))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))


def documents(count: int, seed: int | str) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(10, 60))) for _ in range(count)]
