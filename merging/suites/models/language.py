"""Language models: BERT, GPT-2 and T5 from the hub, their experts, and classifiers.

Here, the state of a model is the dict of its parameters, tied ones once (`parameters`): a T5's embeddings have three
names in its state dict, and three merged copies of them would contradict each other.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.data.hub import snapshot
from common.models.hub import check_fits, configuration, load_model, load_tokenizer, model_folder
from common.models.minilm import bert

POOLINGS = ("mean", "cls", "last")
READ = ("input_ids", "attention_mask", "token_type_ids")  # what encoders read; not every tokenizer makes the last one


class Classifier(nn.Module):
    """Predicts a class from an encoder's hidden states: a linear head on the pooled states.

    Args:
        encoder: a BERT or GPT-2 without head (what is fine-tuned and merged).
        pooling: "mean" of the hidden states of all tokens, that of the first ("cls"), or of the "last" one.
        head_weight: (C, d).
        head_bias: (C,), or None.

    Raises:
        ValueError: an unknown pooling.
    """

    def __init__(
        self, encoder: nn.Module, pooling: Literal["mean", "cls", "last"], head_weight: Tensor, head_bias: Tensor | None
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}; there are {', '.join(POOLINGS)}")
        self.encoder = encoder
        self.pooling = pooling
        self.head_weight = nn.Parameter(head_weight)
        self.head_bias = None if head_bias is None else nn.Parameter(head_bias)

    def features(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the pooled hidden states (B, d) of a batch as `forward` takes it; padding does not change them."""
        hidden = self.encoder(**{name: batch[name] for name in READ if name in batch}).last_hidden_state  # (B, T, d)
        mask = batch["attention_mask"]  # (B, T)
        if self.pooling == "mean":
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if self.pooling == "cls":
            return hidden[:, 0]
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # (B,)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (B, C) of a batch as `forward` takes it."""
        return nn.functional.linear(self.features(batch), self.head_weight, self.head_bias)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the predicted classes (B,) int64.

        Args:
            batch: input_ids and attention_mask (B, T), and token_type_ids (B, T) where the tokenizer makes them.
        """
        return self.logits(batch).argmax(-1)


class Generator(nn.Module):
    """Predicts a class by writing its answer: greedy decoding, then comparison with all answers of the task.

    Args:
        encoder: a T5, its decoder included; in every network `encoder` is the part that is merged.
        tokenizer: turns what it writes into text.
        answers: the C answers in the order of the classes, compared without spaces at the ends; none for a regression.
        new_tokens: how many are written at most; 9, with the decoder's start, are fusion_bench's max_length=10.

    Source: fusion_bench, tasks/flan_t5_text_generation/glue_evaluation.py (which scores a regression too: a text that
    is no number counts as 0).
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, answers: Sequence[str], new_tokens: int = 9):
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.classes = {answer.strip(): index for index, answer in enumerate(answers)}
        self.new_tokens = new_tokens

    def texts(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Return what the model writes for a batch as `forward` takes it, special tokens removed."""
        tokens = self.encoder.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],  # without it, transformers 5 lets a T5 read the padding
            max_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the predicted classes (B,) int64, -1 where no answer was written; a regression's numbers (B,) float.

        Args:
            batch: input_ids and attention_mask (B, T).
        """
        texts, device = self.texts(batch), batch["input_ids"].device
        if not self.classes:
            return torch.tensor([_number(text) for text in texts], device=device)
        return torch.tensor([self.classes.get(text, -1) for text in texts], device=device)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model by name, without gradient, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def encoder(model_id: str) -> tuple[nn.Module, Any]:
    """Load a BERT such as google-bert/bert-base-uncased without its pooler, in float32, and its tokenizer.

    Raises:
        HubError: the repository is not available.
        ValueError: it holds no BERT, or lacks tensors of it.
    """
    return bert(model_folder(model_id), model_id)


def gpt2(model_id: str) -> tuple[nn.Module, Any]:
    """Load a GPT-2 such as openai-community/gpt2 without its language-model head, in float32, and its tokenizer.

    As in fusion_bench, dataset/gpt2_glue.py and its model pool: padding is the end-of-text token, on the right, texts
    are cut at 512 tokens, and the two of a pair follow each other with nothing between them.

    Raises:
        HubError: the repository is not available.
        ValueError: it holds no GPT-2, or lacks tensors of it.
    """
    folder = model_folder(model_id)
    model = load_model("GPT2Model", folder, model_id, beside=r"lm_head\.")
    tokenizer = load_tokenizer("GPT2Tokenizer", folder, model_id, model_max_length=512)
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def gpt2_expert(model_id: str, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Load a GPT2ForSequenceClassification: the state of its backbone, and its head (C, d), which has no bias.

    The head reads the last token that is no padding: `Classifier(backbone, "last", head, None)`.

    Args:
        model_id: such as tanganke/gpt2_cola.
        like: the base's state, `parameters(gpt2(base)[0])`.

    Raises:
        HubError: the repository is not available.
        ValueError: it holds no such model, or a tensor is missing, additional or of another shape.
    """
    model = load_model("GPT2ForSequenceClassification", model_folder(model_id), model_id)
    state = parameters(model.transformer)
    check_fits(model_id, state, like)
    return state, model.score.weight.detach()


def t5(model_id: str, tokenizer_id: str | None = None) -> tuple[nn.Module, Any]:
    """Load a T5ForConditionalGeneration such as google/flan-t5-base, in float32, and its tokenizer.

    T5 ties its head to the embeddings; T5 v1.1, Flan-T5 and T0 do not. Texts are cut at 512 tokens, as in fusion_bench.

    Args:
        model_id: of any of these.
        tokenizer_id: whose tokenizer to take. bigscience/T0_3B needs it: it has only a spiece.model, whose vocabulary
            is that of google-t5/t5-base.

    Raises:
        HubError: a repository is not available.
        ValueError: it holds no T5, lacks tensors of it, or has no tokenizer.json.
    """
    folder = model_folder(model_id)
    configuration(folder, model_id, "t5")
    files = snapshot(tokenizer_id, "model", ["*.json"]) if tokenizer_id else folder
    if not (files / "tokenizer.json").exists():
        owner = f"model {tokenizer_id or model_id} has no tokenizer.json"
        raise ValueError(f"{owner}: pass tokenizer_id='google-t5/t5-base', which has the vocabulary of every T5")
    tokenizer = load_tokenizer("T5Tokenizer", files, tokenizer_id or model_id, model_max_length=512)
    return _load_t5(folder, model_id), tokenizer


def t5_expert_state(model_id: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load the state of a fully fine-tuned T5 (float32).

    Args:
        model_id: such as tanganke/flan-t5-base_glue-cola.
        like: the base's state, `parameters(t5(base)[0])`.

    Raises:
        HubError: the repository is not available.
        ValueError: it holds no T5, or a tensor is missing, additional or of another shape.
    """
    state = parameters(_load_t5(model_folder(model_id), model_id))
    check_fits(model_id, state, like)
    return state


def adapter_folder(model_id: str) -> Path:
    """Return the local folder of a peft adapter such as tanganke/flan-t5-base_glue-cola_lora-16.

    It holds adapter_config.json and adapter_model.safetensors, or else adapter_model.bin.

    Raises:
        HubError: the repository is not available.
        ValueError: it lacks the configuration or the weights.
    """
    folder = snapshot(model_id, "model", ["adapter_config.json", "adapter_model.safetensors"])
    if not (folder / "adapter_config.json").exists():
        raise ValueError(f"{model_id} is no adapter: it has no adapter_config.json")
    if not (folder / "adapter_model.safetensors").exists():
        folder = snapshot(model_id, "model", ["adapter_model.bin"])
        if not (folder / "adapter_model.bin").exists():
            raise ValueError(f"adapter {model_id} has neither adapter_model.safetensors nor adapter_model.bin")
    return folder


def _load_t5(folder: Path, model_id: str) -> nn.Module:
    """Load a T5 and check which of its embeddings are the same: transformers fills those that a checkpoint lacks."""
    model = load_model("T5ForConditionalGeneration", folder, model_id)
    embeddings = model.shared.weight
    if any(part.embed_tokens.weight is not embeddings for part in (model.encoder, model.decoder)):
        raise ValueError(f"model {model_id}: encoder.embed_tokens and decoder.embed_tokens are not both shared.weight")
    config = configuration(folder, model_id, "t5")  # as written: transformers 5 sets model.config's to True
    if model.lm_head.weight is embeddings and config.get("tie_word_embeddings") is False:
        raise ValueError(f"model {model_id} lacks lm_head.weight or shared.weight, which its config.json does not tie")
    return model
