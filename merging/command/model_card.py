"""What stands beside the weights of a merged model: the base's other files, the model card, recipe, and diagnostics."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from merging.checkpoints import WEIGHT_ENDINGS
from merging.command.outputs import AdapterOutput, ModelOutput
from merging.command.plan import Plan
from merging.command.proportion import some
from merging.command.recipe import write_recipe
from merging.command.report import write_report
from merging.command.shards import write_text
from merging.command.tied import untied
from merging.peft_files import CONFIG as ADAPTER_CONFIG
from merging.peft_files import Adapter

LEFT_OUT = ("README.md", "merging.yaml", "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt")
SMALL_FOLDERS = ("*.json", "*.txt")  # what is taken from subfolders: configurations, no weights
CARD = """---
{front}---

# {title}

{sentence}

| | |
|---|---|
{table}

Made with `python -m merging`; [merging.yaml](merging.yaml) is the recipe, and `--recipe merging.yaml` runs it again.
{notes}"""


def write_companions(
    output: ModelOutput | AdapterOutput, folder: Path, made_from: str, notes: Sequence[dict[str, Any]] = ()
) -> None:
    """Write everything but the weights into the folder of a merged model or adapter; the recipe comes last.

    Args:
        output: what was merged, and written as what.
        folder: where the weights are.
        made_from: the hash by which the same merge is known again.
        notes: one per step, what was noted while its tensors were written.
    """
    plan = output.plan
    remarks = [*plan.notes, *plan.remarks]
    if isinstance(output, AdapterOutput):
        write_text(folder / ADAPTER_CONFIG, json.dumps(output.config(), indent=2, sort_keys=True) + "\n")
        remarks += _write_losses([note["lost"] for note in notes], folder)
    elif plan.base.folder:
        _copy(plan.base.folder, folder)
        _adapt(folder / "config.json", plan)
    if rows := [row for note in notes for row in note["report"] or ()]:
        write_report(rows, folder / "report")
    write_text(folder / "README.md", card(output, remarks))
    write_text(folder / "merging.yaml", write_recipe(plan.recipe, made_from))


def _write_losses(rows: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Write what an adapter loses of each tensor as energy_lost.csv, and return that in words."""
    lines = ["tensor,shape,energy,energy lost"]
    lines += [f"{row['tensor']},{row['shape']},{row['energy']:.6g},{row['lost']:.6g}" for row in rows]
    write_text(folder / "energy_lost.csv", "\n".join(lines) + "\n")
    total = sum(row["energy"] for row in rows)
    lost = sum(row["energy"] * row["lost"] for row in rows)
    gone = [row["tensor"] for row in rows if row["lost"] == 1]
    said = [f"{lost / total:.3%} of the merged update's energy is not in the adapter (energy_lost.csv)"] if lost else []
    return said + ([f"{len(gone)} tensors have no place in it: {some(gone)}"] if gone else [])


def _copy(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in LEFT_OUT or path.name.endswith(WEIGHT_ENDINGS):
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name != "report":
            for text in (found for pattern in SMALL_FOLDERS for found in sorted(path.glob(pattern))):
                if not text.name.endswith(WEIGHT_ENDINGS):
                    (target / path.name).mkdir(exist_ok=True)
                    shutil.copyfile(text, target / path.name / text.name)


def _adapt(config: Path, plan: Plan) -> None:
    """Let the configuration say how the output differs from the base: another dtype, nothing quantised or tied."""
    quantised = "quantization_config" in plan.base.config  # and read as what it stands for
    if not (plan.recipe.dtype or plan.untied or quantised) or not config.is_file():
        return
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("quantization_config", None)
    for key in {"dtype", "torch_dtype"} & values.keys() if plan.recipe.dtype else ():
        values[key] = plan.recipe.dtype
    values = untied(values) if plan.untied else values
    write_text(config, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def card(output: ModelOutput | AdapterOutput, remarks: Sequence[str] = ()) -> str:
    """Return the model card: front matter with the models and the tag "merge", the method, and what was special."""
    plan, recipe = output.plan, output.plan.recipe
    models = [_public_name(name) for name in (recipe.base, *recipe.experts)]
    front: dict[str, Any] = {"base_model": list(dict.fromkeys(models)), "base_model_relation": "merge"}
    front["tags"] = ["merge", "model-merging"] + ["singular-value-calibration"] * recipe.svc
    adapter, experts = isinstance(output, AdapterOutput), "adapters" if _from_adapters(plan) else "models"
    if adapter or plan.base.config:
        front["library_name"] = "peft" if adapter else "transformers"
    kept = {key: value for key, value in recipe.plain().items() if key not in ("base", "experts")}
    table = [f"| base | {models[0]} |", *(f"| expert | {name} |" for name in models[1:])]
    table += [f"| {key} | {value} |" for key, value in kept.items()]
    merged = sum(bool(step.change) for step in plan.steps)
    sentence = f"{len(recipe.experts)} {experts} fine-tuned from {models[0]}, merged by {recipe.method}" + (
        " with singular value calibration (SVC, arXiv 2602.05536)" if recipe.svc else ""
    )
    written = "written as an adapter of it" if adapter else "the others are the base's"
    notes = "".join(f"- {note}\n" for note in remarks)
    for given in sorted((recipe.base, *recipe.experts), key=len, reverse=True):
        notes = notes.replace(given, _public_name(given))
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=f"A merge of {len(recipe.experts)} {experts}",
        sentence=f"{sentence}: {merged} of {len(plan.steps)} tensors; {written}.",
        table="\n".join(table),
        notes=f"\n{notes}" if notes else "",
    )


def _from_adapters(plan: Plan) -> bool:
    return isinstance(plan.experts[0], Adapter)


def _public_name(given: str) -> str:
    """Return a name safe to publish: no local paths."""
    path = Path(given).resolve()
    if path.is_file():
        return f"{path.parent.name}/{path.name}"
    return path.name if path.exists() else given
