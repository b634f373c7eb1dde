"""Texts of the language paper scale: GLUE, and the four data sets of the BERT suite, as public Hub repositories.

What the table states, and where each fact was read (cards and file lists are the public pages of the repositories):

    fact                                  source
    ------------------------------------  ---------------------------------------------------------------------------
    GLUE: files, columns, class names,    card of nyu-mll/glue (its whole YAML block, since the conversion to parquet)
    numbers of rows                       and file list of its folder cola
    GLUE: validation splits are the       fusion_bench, config/taskpool/{gpt-2_glue,flan-t5_glue_text_generation}.yaml
    test sets, MNLI's the matched one     (the labels of GLUE's own test splits are hidden)
    templates and answers for Flan-T5,    fusion_bench, tasks/flan_t5_text_generation/glue_prompt_templates.py, letter
    "Answere" included                    by letter: the experts were trained with them
    what is scored                        accuracy; for Flan-T5 the same folder, glue_evaluation.py: exact match of the
                                          generated text, and Spearman's ρ for STS-B, labels rounded to one decimal
    order of the two texts for GPT-2      fusion_bench, dataset/gpt2_glue.py (for QNLI the question comes first there,
                                          in the template of Flan-T5 the sentence)
    expert names                          fusion_bench, docs and config/modelpool for GPT-2 and Flan-T5; every adapter's
                                          in config/model/flan-t5/*.yaml, of Flan-T5-large all eight
    rotten_tomatoes, sms_spam             file list and commits of cornell-movie-review-data/rotten_tomatoes, columns,
                                          names and numbers of rows in TensorFlow's catalogue of Hugging Face data sets;
                                          card and file list of ucirvine/sms_spam (only a split train)
    ag_news                               cards of copies of it: columns text, label, names, 120,000 and 7,600 rows

Which data sets the paper's BERT rows use, and with which splits, is not published. What no source showed is listed in
each entry's `unverified`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from common.data import hub
from merging.suites.data.text_tasks import Examples, TextTask
from merging.suites.data.vision_tasks import VALIDATION_SEED, held_out

SPLITS = ("train", "validation", "test")
VALIDATION_LIMIT = 512
TEST_FRACTION = 0.2  # of the train split, if there is no other split

UNPUBLISHED = "that it belongs to the paper's BERT rows (it does in the first author's sister project)"


@dataclass(frozen=True)
class HubText:
    """One data set: where it is, what its columns mean, how a text-to-text model is asked, what no source confirms."""

    name: str
    repo: str
    config: str
    fields: tuple[str, ...]  # columns of the one or two texts
    classes: tuple[str, ...]  # in label order; () for a regression
    template: str = "{0}"
    answers: tuple[str, ...] = ()
    files: str = "{config}/{split}-*.parquet"
    test_split: str | None = "validation"  # None: there is only the train split
    label: str = "label"
    unverified: tuple[str, ...] = ()

    def expert_id(self, base_id: str, lora: bool = False) -> str:
        """Return the repository of this task's expert of a base such as openai-community/gpt2 or google/flan-t5-base.

        Args:
            base_id: the base's repository. There is no expert of GPT-2 for STS-B; Flan-T5-large has only adapters.
            lora: whether to take the adapter of rank 16 instead of the whole model; only Flan-T5 has any.
        """
        base = base_id.split("/")[-1]
        benchmark = "" if base == "gpt2" else "glue-"
        return f"tanganke/{base}_{benchmark}{self.name}" + ("_lora-16" if lora else "")


HUB_TEXTS: dict[str, HubText] = {
    text.name: text
    for text in (
        HubText(
            "cola", "nyu-mll/glue", "cola", ("sentence",), ("unacceptable", "acceptable"),
            "Indicate if the following sentence is grammatically correct or not: \"{0}\". Answere 'acceptable' or"
            " 'unacceptable'.",
        ),
        HubText(
            "mnli", "nyu-mll/glue", "mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
            "Does the premise: '{0}' logically imply, contradict, or is neutral to the hypothesis: '{1}'? Answere with"
            " 'entailment', 'contradiction', or 'neutral'.",
            test_split="validation_matched",
        ),
        HubText(
            "mrpc", "nyu-mll/glue", "mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"),
            "Are the following sentences '{0}' and '{1}' conveying the same meaning? Answere with 'yes' or 'no'.",
            ("no", "yes"),
        ),
        HubText(
            "qnli", "nyu-mll/glue", "qnli", ("question", "sentence"), ("entailment", "not_entailment"),
            "Given the context: '{1}', does the question '{0}' have an answer based on the information provided?"
            " Answer with 'yes' or 'no'.",
            ("yes", "no"),
        ),
        HubText(
            "qqp", "nyu-mll/glue", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"),
            "Do the questions '{0}' and '{1}' have the same intent? Answere with 'yes' or 'no'.",
            ("no", "yes"),
        ),
        HubText(
            "rte", "nyu-mll/glue", "rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"),
            "Does the text: '{0}' entail that '{1}' is true? Provide 'yes' or 'no'.",
            ("yes", "no"),
        ),
        HubText(
            "sst2", "nyu-mll/glue", "sst2", ("sentence",), ("negative", "positive"),
            "Given the sentence '{0}', determine the sentiment. Is it positive or negative?",
        ),
        HubText(
            "stsb", "nyu-mll/glue", "stsb", ("sentence1", "sentence2"), (),
            "Consider the sentences '{0}' and '{1}'. On a scale from 1 (completely different) to 5 (completely"
            " similar), rate the similarity.",
        ),
        HubText(
            "ag_news", "fancyzhx/ag_news", "default", ("text",), ("World", "Sports", "Business", "Sci/Tech"),
            files="data/{split}-*.parquet", test_split="test",
            unverified=(UNPUBLISHED, "folder, columns and names (read on copies of the repository)"),
        ),
        HubText(
            "rotten_tomatoes", "cornell-movie-review-data/rotten_tomatoes", "default", ("text",), ("neg", "pos"),
            files="{split}.parquet", test_split="test", unverified=(UNPUBLISHED,),
        ),
        HubText(
            "sms", "ucirvine/sms_spam", "plain_text", ("sms",), ("ham", "spam"), test_split=None,
            unverified=(UNPUBLISHED, "the test set (a random fifth of the only split here)"),
        ),
    )
}  # fmt: skip

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
BERT_SUITE = ("ag_news", "rotten_tomatoes", "cola", "sms")


def unverified() -> list[str]:
    """Return every fact of the table which no source confirmed, one line each: `task (repository): fact`."""
    return [f"{text.name} ({text.repo}): {fact}" for text in HUB_TEXTS.values() for fact in text.unverified]


def task(name: str) -> TextTask:
    """Return a task of HUB_TEXTS; nothing is downloaded before one of its splits is asked for.

    Its "test" is the set that is reported (for GLUE the validation split), whole. "validation" is a random tenth of the
    train split with a fixed seed, at most 512 texts, and "train" the rest. The public experts were fine-tuned on the
    whole train split and so have seen the validation set: it is good for choosing a scale of the merged model, not for
    measuring an expert.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in HUB_TEXTS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(HUB_TEXTS)}")
    text = HUB_TEXTS[name]
    key = f"{text.repo}/{text.config}, test {text.test_split}, validation {VALIDATION_LIMIT} of {VALIDATION_SEED}"
    return TextTask(text.name, text.classes, partial(load_split, text), key, text.template, text.answers)


def load_split(text: HubText, split: str) -> Examples:
    """Return the examples of a split as `task` defines it, after all checks.

    Args:
        text: an entry of HUB_TEXTS.
        split: "train", "validation" or "test".

    Returns:
        Targets are class indices; for STS-B numbers from 0 to 5, rounded to one decimal.

    Raises:
        HubError: the repository is not available.
        ValueError: files, columns, names or order of the classes, labels or the number of rows are not as expected.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if split == "test" and text.test_split is not None:
        return _examples(text, _rows(text, text.test_split))
    rows = _rows(text, "train")
    order = hub.permutation(len(rows), VALIDATION_SEED)
    count = int(len(order) * TEST_FRACTION) if text.test_split is None else 0
    train, validation = held_out(order[count:])
    parts = {"test": order[:count], "train": train, "validation": validation[:VALIDATION_LIMIT]}
    return _examples(text, rows.select(parts[split]))


def _rows(text: HubText, split: str) -> Any:
    """Return all rows of a split of the repository, checked."""
    files = text.files.format(config=text.config, split=split)
    columns = {**dict.fromkeys(text.fields, "Value"), text.label: "ClassLabel" if text.classes else "Value"}
    return hub.load_rows(text.repo, files, columns, text.classes, spelling=str, card=(text.config, split))


def _examples(text: HubText, rows: Any) -> Examples:
    labels = rows[text.label][:]
    targets = labels if text.classes else [float(f"{label:.1f}") for label in labels]
    return Examples(list(zip(*(rows[field][:] for field in text.fields), strict=True)), targets)
