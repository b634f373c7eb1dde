"""BERT, GPT-2, Flan-T5, their experts and the data sets of the language paper scale, of the true format in small.

fake                      true thing and its source
------------------------  ---------------------------------------------------------------------------------------
GLUE                      card of nyu-mll/glue: one repository, one folder per config, columns, class names, splits (no
                          labels in test: -1), a list of dataset_info; two shards of QNLI's train here, one there
ag_news                   cards of copies of fancyzhx/ag_news (text, label; data/train-*, data/test-*)
rotten_tomatoes           file list of cornell-movie-review-data/rotten_tomatoes: {train,validation,test}.parquet
sms_spam                  card of ucirvine/sms_spam (sms, label; plain_text/train-* alone)
BERT config.json          keys of google-bert/bert-base-uncased's as its copies carry them (570 bytes)
BERT weights              tensor names listed in candle issue 1887: bert.…, LayerNorm.gamma and .beta, pooler, cls.…
BERT tokenizer            file list: vocab.txt, tokenizer.json, tokenizer_config.json (48 bytes, the two keys here)
GPT-2 weights             tensor names without `transformer.`, masks h.N.attn.bias (mlx-examples pull request 798)
GPT-2 tokenizer           vocab.json, merges.txt, tokenizer.json, tokenizer_config.json (26 bytes, the key here)
GPT-2 experts             file list of tanganke/gpt2_cola (no tokenizer.json); config.json of GPT-2 classifiers of that
                          time (pad_token_id, id2label from three classes on); transformer.… and score.weight, as
                          transformers saves them
Flan-T5 config.json       keys of google/flan-t5-base's as its copies carry them (tie_word_embeddings false)
Flan-T5 weights           990 MB, so the embeddings once and the head apart; under which of their three names was not
                          seen: shared.weight here, all three in the .bin that a test writes
Flan-T5 tokenizer         file list: spiece.model (not made here), tokenizer.json, tokenizer_config.json,
                          special_tokens_map.json, as the installed T5Tokenizer saves the last two
Flan-T5 experts           tanganke/flan-t5-base_glue-cola: model.safetensors of 990 MB, written by save_pretrained
Flan-T5 LoRA              file list of tanganke/flan-t5-base_glue-cola_lora-16; rank 16 on q and v is what its 7.1 MB
                          hold; keys of adapter_config.json: a public adapter of the same base and month
T0                        bigscience/T0_3B has only a spiece.model: its tokenizer is that of google-t5/t5-base

The T5 here write answers of the tasks, one word each, for merging to move: the first coordinate of the residual stream
says whether a word was written, and after a word only the end has a chance (`t5_state`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from fake_hub import repository
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    GPT2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from merging.suites.data.hub_texts import GLUE, HUB_TEXTS, HubText

BERT, GPT2, T5 = "google-bert/bert-base-uncased", "openai-community/gpt2", "google/flan-t5-base"
T5_LARGE, T0, T5_TOKENIZER = "google/flan-t5-large", "bigscience/T0_3B", "google-t5/t5-base"
ANSWERS = (
    "yes", "no", "acceptable", "unacceptable", "entailment", "neutral", "contradiction", "positive", "negative", "0.0",
    "1.4", "3.8", "5.0",
)  # fmt: skip
WORDS = [
    "the", "a", "film", "cat", "news", "market", "is", "not", "very", "good", "bad", "long", *ANSWERS, "'", ":", "?",
    ".",
]  # fmt: skip
PIECES = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), *map(chr, range(33, 127)), "▁"]
ANSWER_IDS = [PIECES.index(f"▁{answer}") for answer in ANSWERS]
TRAIN_ROWS, TEST_ROWS = 120, 30
SHARDS = {("qnli", "train"): 2}
END = 1  # </s>


def make_fake_language_hub(root: Path) -> None:
    """Fill `root` with a Hub cache that holds all data sets, bases and experts of the language paper scale."""
    for repo in sorted({text.repo for text in HUB_TEXTS.values()}):
        write_texts(root, [text for text in HUB_TEXTS.values() if text.repo == repo])
    write_bert(root)
    write_gpt2(root)
    for repo in (T5, T5_LARGE, T0, T5_TOKENIZER):
        write_t5(root, repo, tokenizer=repo != T0)
    for seed, text in enumerate(HUB_TEXTS[name] for name in GLUE):
        if text.classes:
            write_gpt2_expert(root, text.expert_id(GPT2), len(text.classes), seed)
        write_t5_expert(root, text.expert_id(T5), seed)
        write_lora(root, text.expert_id(T5, lora=True), T5, seed)
        write_lora(root, text.expert_id(T5_LARGE, lora=True), T5_LARGE, seed + 100)


def write_texts(root: Path, texts: Sequence[HubText], columns: dict[str, str] | None = None) -> Path:
    """Write the data sets of one repository; `columns` renames columns, for one that differs from the true one."""
    infos = []
    for text in texts:
        folder = repository(root, "dataset", text.repo)
        extra = {"idx": Value("int32")} if text.repo == "nyu-mll/glue" else {}
        label = ClassLabel(names=list(text.classes)) if text.classes else Value("float32")
        features = Features(dict.fromkeys(text.fields, Value("string")) | {text.label: label} | extra)
        splits = _splits(text)
        for number, (split, rows) in enumerate(splits.items()):
            data = _rows(text, rows, hidden=text.repo == "nyu-mll/glue" and "test" in split, seed=number)
            data = Dataset.from_dict({name: data[name] for name in features}, features=features)
            shards = SHARDS.get((text.name, split), 1)
            for shard in range(shards):
                name = text.files.format(config=text.config, split=split).replace("*", f"{shard:05d}-of-{shards:05d}")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                part = data.shard(shards, shard, contiguous=True)
                part.rename_columns(columns or {}).to_parquet(folder / name)
        sizes = [{"name": split, "num_bytes": 100 * rows, "num_examples": rows} for split, rows in splits.items()]
        config = {} if text.config == "default" else {"config_name": text.config}
        infos.append({**config, "features": features._to_yaml_list(), "splits": sizes})
    card = yaml.safe_dump({"language": ["en"], "dataset_info": infos if len(infos) > 1 else infos[0]}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{card}---\n# Card\n")
    return folder


def _splits(text: HubText) -> dict[str, int]:
    if text.test_split is None:
        return {"train": TRAIN_ROWS}
    kinds = ["_matched", "_mismatched"] if text.name == "mnli" else [""]
    names = [f"{split}{kind}" for split in ("validation", "test") for kind in kinds]
    return {"train": TRAIN_ROWS} | {name: TEST_ROWS for name in names if not (text.name == "ag_news" and "val" in name)}


def _rows(text: HubText, rows: int, hidden: bool, seed: int) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int, count: int) -> list[int]:
        return torch.randint(most, (count,), generator=generator).tolist()

    data: dict[str, list] = {"idx": list(range(rows))}
    for number, field in enumerate(text.fields):
        data[field] = [
            " ".join([f"row {row} field {number}", *(WORDS[word] for word in draw(len(WORDS), 3 + row % 5))])
            for row in range(rows)
        ]
    labels = sorted(draw(len(text.classes), rows)) if text.classes else torch.rand(rows, generator=generator).mul(5)
    data[text.label] = [-1] * rows if hidden else list(labels)
    return data


def state(model: torch.nn.Module, seed: int | None = None) -> dict[str, Tensor]:
    """Weights that are large enough to matter: the base's always the same, a seed adds a common and an own step."""
    base, shared = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1000)
    own = torch.Generator().manual_seed(seed or 0)
    weights = {}
    for name, weight in model.named_parameters():
        value = torch.randn(weight.shape, generator=base) * (weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
        value += "norm" in name.lower() or ".ln_" in name or name.startswith("ln_")
        if seed is not None:
            step = torch.randn(weight.shape, generator=shared) + torch.randn(weight.shape, generator=own)
            value += 0.3 * value.abs().mean() * step
        weights[name] = value
    return weights


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def write_bert(root: Path, width: int = 16) -> Path:
    """google-bert/bert-base-uncased in small."""
    folder = repository(root, "model", BERT)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789"]
    config = {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": width, "initializer_range": 0.02,
        "intermediate_size": 2 * width, "layer_norm_eps": 1e-12, "max_position_embeddings": 256, "model_type": "bert",
        "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0, "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": len(vocabulary),
    }  # fmt: skip
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {}
    for name, weight in state(BertForPreTraining(BertConfig(**config))).items():
        for new, published in old.items():
            name = name.replace(new, published)
        weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})
    return folder


def gpt2_config(width: int = 16, **more: Any) -> dict[str, Any]:
    end = len(_gpt2_vocabulary()) - 1
    return {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": end, "embd_pdrop": 0.1,
        "eos_token_id": end, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 256, "n_embd": width, "n_head": 2, "n_layer": 2, "n_positions": 256, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": end + 1,
        **more,
    }  # fmt: skip


def write_gpt2(root: Path) -> Path:
    """openai-community/gpt2 in small."""
    folder = repository(root, "model", GPT2)
    config = gpt2_config(architectures=["GPT2LMHeadModel"])
    weights = state(GPT2Model(GPT2Config(**config)))
    masks = {f"h.{layer}.attn.bias": torch.ones(256, 256).tril().view(1, 1, 256, 256) for layer in range(2)}
    save_file(weights | masks, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    _write_gpt2_tokenizer(folder)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})
    return folder


def write_gpt2_expert(root: Path, repo: str, classes: int, seed: int = 0, width: int = 16) -> Path:
    """tanganke/gpt2_TASK in small."""
    folder = repository(root, "model", repo)
    names = {str(index): f"LABEL_{index}" for index in range(classes)}
    labels = {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
    end = len(_gpt2_vocabulary()) - 1
    config = gpt2_config(
        width, _name_or_path="gpt2", architectures=["GPT2ForSequenceClassification"], pad_token_id=end,
        problem_type="single_label_classification", torch_dtype="float32", transformers_version="4.40.1",
        **(labels if classes != 2 else {}),
    )  # fmt: skip
    model = GPT2ForSequenceClassification(GPT2Config(**config))
    save_file(state(model, seed), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    _write_gpt2_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "results.csv").write_text("accuracy,loss\n0.7,0.5\n")
    return folder


def _gpt2_vocabulary() -> list[str]:
    return [*bytes_to_unicode().values(), "th", "the", "Ġt", "Ġth", "Ġthe", "<|endoftext|>"]


def _write_gpt2_tokenizer(folder: Path) -> None:
    vocabulary = {piece: index for index, piece in enumerate(_gpt2_vocabulary())}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    GPT2Tokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    write_json(
        folder / "special_tokens_map.json", dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    )


def t5_config(width: int = 16) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": 32, "d_kv": 8, "d_model": width,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": 2, "num_heads": 2, "num_layers": 2, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False, "transformers_version": "4.23.1", "use_cache": True,
        "vocab_size": 256,
    }  # fmt: skip


def t5_state(seed: int | None = None, width: int = 16) -> dict[str, Tensor]:
    """shared.weight and lm_head.weight apart, as the checkpoints of Flan-T5 hold them."""
    weights = state(T5ForConditionalGeneration(T5Config(**t5_config(width))), seed)
    base, own = torch.Generator().manual_seed(2009), torch.Generator().manual_seed(seed or 0)
    head = torch.zeros(256, width)
    head[ANSWER_IDS] = torch.randn(len(ANSWERS), width, generator=base)
    if seed is not None:
        head[ANSWER_IDS] += 0.3 * torch.randn(len(ANSWERS), width, generator=own)
    embeddings = weights["shared.weight"]
    embeddings[:, 0], embeddings[ANSWER_IDS, 0], head[:, 0], head[END, 0] = -1.0, 1.0, 0.0, 60.0
    for name, weight in weights.items():
        if name.endswith(("Attention.o.weight", "wo.weight")):
            weight[0] = 0.0  # only embeddings write to that coordinate
            weight *= 3.0 if "EncDec" in name else 1.0  # the answer depends on the text
    return weights | {"lm_head.weight": head}


def write_t5(root: Path, repo: str = T5, tokenizer: bool = True) -> Path:
    """google/flan-t5-base in small."""
    folder = repository(root, "model", repo)
    save_file(t5_state(), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", t5_config())
    special = {"decoder_start_token_id": 0, "eos_token_id": END, "pad_token_id": 0}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    if tokenizer:
        scores = [(piece, -2.0 if len(piece) > 1 else -8.0) for piece in PIECES]
        sentinels = [(f"<extra_id_{number}>", 0.0) for number in range(99, -1, -1)]
        T5Tokenizer(vocab=scores + sentinels).save_pretrained(folder)
    return folder


def write_t5_expert(root: Path, repo: str, seed: int = 0, width: int = 16) -> Path:
    """tanganke/flan-t5-base_glue-TASK in small: no tokenizer."""
    folder = repository(root, "model", repo)
    save_file(t5_state(seed, width), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"_name_or_path": T5, **t5_config(width), "torch_dtype": "float32"})
    return folder


def write_lora(root: Path, repo: str, base: str = T5, seed: int = 0) -> Path:
    """tanganke/flan-t5-base_glue-TASK_lora-16 in small, with its true rank."""
    folder = repository(root, "model", repo)
    write_json(folder / "adapter_config.json", {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": base, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 32, "lora_dropout": 0.1,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
        "r": 16, "rank_pattern": {}, "revision": None, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM",
        "use_dora": False, "use_rslora": False,
    })  # fmt: skip
    shared, own = torch.Generator().manual_seed(1000), torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=shared) + torch.randn(size, generator=own)) / 6

    weights = {}
    for name, weight in t5_state().items():
        if name.endswith((".q.weight", ".v.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{module}.lora_A.weight"] = draw(16, weight.shape[1])
            weights[f"{module}.lora_B.weight"] = draw(weight.shape[0], 16)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
