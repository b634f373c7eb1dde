"""T5: transformers' own class untrained in any size, or as a Hub repository has it, with weights or without."""

from pathlib import Path
from typing import Any

from torch import nn

from common.data.hub import snapshot
from common.data.text import END, PAD
from common.models.hub import configuration, load_model, load_tokenizer, model_folder

SENTINELS = 100  # how many T5's tokenizers have
IGNORED = -100  # the label that transformers' loss leaves out


def t5(vocabulary: int, width: int, depth: int, heads: int, d_ff: int, dropout: float = 0.0) -> nn.Module:
    """Build an untrained T5 v1.0: ReLU MLPs, tied embeddings, relative positions, RMS norms before each part.

    Source: Raffel et al., arXiv 1910.10683, section 2.1. Weights are drawn from torch's global generator.

    Args:
        vocabulary: number of token ids, sentinels included.
        width: of the residual stream.
        depth: number of layers of the encoder, and also of the decoder.
        heads: attention heads per layer; each has width / heads channels.
        d_ff: hidden units of an MLP.
        dropout: its rate, wherever T5 has it.

    Raises:
        ValueError: width is not a multiple of heads.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got width {width} and {heads} heads")
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=width // heads, d_ff=d_ff, num_layers=depth, num_heads=heads,
        dropout_rate=dropout, feed_forward_proj="relu", tie_word_embeddings=True, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def t5_like(model_id: str, vocabulary: int) -> nn.Module:
    """Build an untrained T5 with the configuration of a repository (sizes, dropout, activation), but this vocabulary.

    Raises:
        HubError: the repository is not available.
        ValueError: it holds no T5.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    config = configuration(_folder(model_id), model_id, "t5")
    return T5ForConditionalGeneration(T5Config.from_dict({**config, "vocab_size": vocabulary}))


def t5_trained(model_id: str) -> nn.Module:
    """Load the trained T5 of a repository, such as google-t5/t5-base, in float32.

    Raises:
        HubError: the repository is not available.
        ValueError: it holds no T5, or lacks tensors of it.
    """
    return load_model("T5ForConditionalGeneration", model_folder(model_id), model_id)


def t5_tokenizer(model_id: str) -> Any:
    """Load the tokenizer of a T5 repository; it ends every text with END, and its last ids are the sentinels.

    Raises:
        HubError: the repository is not available.
        ValueError: it has no tokenizer, or one whose special tokens are not where T5 has them.
    """
    # any length is allowed: texts are cut into rows elsewhere
    tokenizer = load_tokenizer("T5Tokenizer", _folder(model_id), model_id, model_max_length=10**9)
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>"))
    if found != (PAD, END, len(tokenizer) - 1):
        expected = (PAD, END, len(tokenizer) - 1)
        raise ValueError(f"tokenizer of {model_id}: ids of <pad>, </s>, <extra_id_0> are {found}, expected {expected}")
    return tokenizer


def _folder(model_id: str) -> Path:
    return snapshot(model_id, "model", ["*config.json", "tokenizer.json", "special_tokens_map.json", "spiece.model"])
