"""Llama2-7B, Qwen2.5-1.5B and their experts of the true format in small, and a harness that answers as lm_eval does.

fake                      true thing and its source
------------------------  ---------------------------------------------------------------------------------------
Llama-2-7b-hf             class, module names and shapes without biases: a printed model in a public README; head not
                          tied; weights in several files with an index, float16
WizardMath-7B-V1.0        an embedding of 32,001 rows where the base has 32,000 (MergeLM issue 12): one row more here
CodeLlama-7b-hf           16 rows more, another rope_theta (class CodeLlamaTokenizer's documentation in transformers)
Qwen2.5-1.5B              class Qwen2ForCausalLM of transformers: biases on q, k and v, tied head; bfloat16
lm_eval                   result["samples"][task] of lm_eval 0.4.13 (evaluator.py): one dict per question and filter,
                          with doc_id, filter, the names of the metrics, and each metric; GSM8K has two filters
"""

from pathlib import Path

import torch
from fake_hub import repository
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from merging.suites.harness import FAMILIES

VOCABULARY = 40
MORE_ROWS = {"WizardMath": 1, "CodeLlama": 16}  # of the embeddings of experts, by the beginning of their name
HARNESS = '''
"""Questions of two benchmarks, answered greedily by a model that transformers loads."""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = 20
METRICS = {"gsm8k": {"strict-match": ["exact_match"], "flexible-extract": ["exact_match"]},
           "ifeval": {"none": ["prompt_level_strict_acc", "inst_level_strict_acc"]}}


def simple_evaluate(model, model_args=None, tasks=None, num_fewshot=None, batch_size=None, device=None, limit=None,
                    log_samples=True, bootstrap_iters=100000):
    assert model == "hf" and log_samples and not set(tasks) - set(METRICS)
    network = AutoModelForCausalLM.from_pretrained(model_args["pretrained"], dtype=model_args["dtype"]).to(device)
    AutoTokenizer.from_pretrained(model_args["pretrained"])
    samples = {}
    for place, task in enumerate(tasks):
        found = []
        for filtered, metrics in METRICS[task].items():
            for doc in range(min(limit or QUESTIONS, QUESTIONS)):
                prompt = torch.tensor([[3 + (7 * doc + 5 * place + step) % 37 for step in range(4)]])
                answer = network.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1]
                right = float(int(answer) % 2 == 0) if filtered != "flexible-extract" else 1.0
                values = {name: [bool(right)] if name.startswith("inst") else right for name in metrics}
                found.append({"doc_id": doc, "filter": filtered, "metrics": list(metrics), **values})
        samples[task] = found[::-1]
    return {"results": {}, "samples": samples, "n-samples": {}}
'''


def make_fake_llamas(root: Path) -> None:
    """Fill `root` with a Hub cache that holds both families."""
    for family in FAMILIES.values():
        for seed, repo in enumerate((family.base, *family.experts)):
            write_language_model(root, repo, seed)


def write_harness(folder: Path) -> None:
    """Write a package lm_eval into a folder that is on the search path of a process."""
    (folder / "lm_eval").mkdir(parents=True)
    (folder / "lm_eval" / "__init__.py").write_text(HARNESS)


def language_model(repo: str, seed: int) -> torch.nn.Module:
    """The base (seed 0), or an expert: the base plus a step of its own."""
    qwen, more = repo.startswith("Qwen/"), 0
    for name, rows in MORE_ROWS.items():
        more += rows * repo.split("/")[1].startswith(name)
    sizes = dict(
        vocab_size=VOCABULARY + more, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1 if qwen else 2, max_position_embeddings=64, tie_word_embeddings=qwen, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, rope_theta=1e6 if "CodeLlama" in repo else 1e4,
    )  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)) if qwen else LlamaForCausalLM(LlamaConfig(**sizes))
    start, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for weight in model.parameters():
            shape = (VOCABULARY, *weight.shape[1:]) if weight.shape[0] == VOCABULARY + more else weight.shape
            value = torch.randn(shape, generator=start) * (1.0 if weight.ndim == 1 else 0.4)
            value += 0.3 * (seed > 0) * torch.randn(shape, generator=own) * (weight.ndim > 1)
            weight[: len(value)] = value
            weight[len(value) :] = 0
    return model.to(torch.bfloat16 if qwen else torch.float16)


def write_language_model(root: Path, repo: str, seed: int) -> Path:
    """Write one repository: configuration, weights in several files, tokenizer."""
    folder, model = repository(root, "model", repo), language_model(repo, seed)
    model.save_pretrained(folder, max_shard_size="4KB")
    words = {f"w{index}": index for index in range(3, model.config.vocab_size)}
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | words, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **names).save_pretrained(folder)
    return folder
