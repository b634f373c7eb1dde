"""What stands beside the weights of a merged model: the base's other files, the model card, recipe, and diagnostics."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from merging.command.licences import licence_fields, licences
from merging.command.outputs import AdapterOutput, ModelOutput
from merging.command.plan import Plan
from merging.command.proportion import some
from merging.command.recipe import public_name, write_recipe
from merging.command.repeats import unmoved
from merging.command.shards import write_text
from merging.command.tied import untied
from merging.command.tokens import write_tokenizer
from merging.peft_files import CONFIG as ADAPTER_CONFIG
from merging.peft_files import Adapter
from merging.weight_files import is_weights, parts, subfolders, within

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
    output: ModelOutput | AdapterOutput, folder: Path, made_from: str, out: Path, notes: Sequence[dict[str, Any]] = ()
) -> None:
    """Write everything but the weights into the folder of a merged model or adapter; the recipe comes last.

    Args:
        output: what was merged, and written as what.
        folder: where the weights are.
        made_from: the hash by which the same merge is known again.
        out: what that folder will be called.
        notes: one per step, what was noted while its tensors were written.
    """
    plan = output.plan
    remarks = what_to_say(output, notes)
    if isinstance(output, AdapterOutput):
        write_text(folder / ADAPTER_CONFIG, json.dumps(output.config(), indent=2, sort_keys=True) + "\n")
        _write_losses([note["lost"] for note in notes], folder)
    elif plan.base.folder:
        _copy(plan.base.folder, folder)
        for part in ("", *plan.base.parts):
            _adapt(folder / part / "config.json", plan)
        if plan.joint:
            write_tokenizer(folder / plan.base.main, plan.base, plan.joint)
    if plan.recipe.report:
        from merging.command.report import write_report  # draws figures: loaded only where they are asked for

        write_report(plan, notes, remarks, folder / "report")
    write_text(folder / "README.md", card(output, remarks))
    write_text(folder / "merging.yaml", write_recipe(plan.recipe, made_from, out))


def what_to_say(output: ModelOutput | AdapterOutput, notes: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Return what was kept, left out and tied, and what an adapter loses, one line each.

    Args:
        output: what was merged.
        notes: one per step, as for `write_companions`.
    """
    return [*output.plan.notes, *output.plan.remarks, *output.plan.repeated.values(), *found_out(output, notes)]


def found_out(output: ModelOutput | AdapterOutput, notes: Sequence[dict[str, Any]]) -> list[str]:
    """Return what is known only when all is merged: experts that moved nothing, what an adapter loses."""
    moves = [note["moves"] for note in notes if note.get("moves")]
    still = unmoved(output.plan.recipe.experts, moves) if moves else {}
    return [line for index, line in still.items() if index not in output.plan.repeated] + losses(notes)


def losses(notes: Sequence[dict[str, Any]]) -> list[str]:
    """Return what an adapter loses of the merge, at most two lines; nothing of a model."""
    rows = [note["lost"] for note in notes if "lost" in note]
    total = sum(row["energy"] for row in rows)
    lost = sum(row["energy"] * row["lost"] for row in rows)
    gone = [row["tensor"] for row in rows if row["lost"] == 1]
    said = [f"{lost / total:.3%} of the merged update's energy is not in the adapter (energy_lost.csv)"] if lost else []
    said += [f"{len(gone)} tensors have no place in it: {some(gone)}"] if gone else []
    return said


def _write_losses(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write what an adapter loses of each tensor as energy_lost.csv."""
    lines = ["tensor,shape,energy,energy lost"]
    lines += [f"{row['tensor']},{row['shape']},{row['energy']:.6g},{row['lost']:.6g}" for row in rows]
    write_text(folder / "energy_lost.csv", "\n".join(lines) + "\n")


def companions(folder: Path) -> list[str]:
    """Return what the output takes from the base's folder beside weights, as paths relative to it.

    All files of the folder itself and of the parts of the model (`merging.weight_files.parts`), and the configurations
    of other sub-folders; no weights, no card, nothing of the training.

    Raises:
        ValueError: one of them is a link that leads outside.
    """
    known = parts(folder)
    found = [path for path in folder.iterdir() if path.name not in LEFT_OUT]
    found += [path for part in known for path in (folder / part).rglob("*") if path.name not in LEFT_OUT]
    others = [path for path in subfolders(folder) if path.name not in (*known, "report")]
    found += [path for other in others for pattern in SMALL_FOLDERS for path in other.glob(pattern)]
    names = sorted({str(path.relative_to(folder)) for path in found if path.is_file()})
    hidden = re.compile(r"(^|/)\.")
    return [name for name in names if not is_weights(Path(name)) and not hidden.search(name) and within(folder, name)]


def _copy(source: Path, target: Path) -> None:
    for name in companions(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


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
    models = [public_name(name) for name in (recipe.base, *recipe.experts)]
    front: dict[str, Any] = licence_fields(found := licences(plan))
    if ids := [name for name in dict.fromkeys(models) if _is_repository(name)]:
        front |= {"base_model": ids, "base_model_relation": "merge"}
    front["tags"] = ["merge", "model-merging"] + ["singular-value-calibration"] * recipe.svc
    adapter, experts = isinstance(output, AdapterOutput), "adapters" if _from_adapters(plan) else "models"
    if adapter or plan.base.config or plan.base.parts:
        whole = "sentence-transformers" if plan.base.parts else "transformers"
        front["library_name"] = "peft" if adapter else whole
    kept = {key: value for key, value in recipe.plain().items() if key not in ("base", "experts")}
    under = {given: f", licence: {licence}" if licence and licence.id else "" for given, licence in found.items()}
    names = [f"{name}{under[given]}" for name, given in zip(models, (recipe.base, *recipe.experts), strict=True)]
    table = [f"| base | {names[0]} |", *(f"| expert | {name} |" for name in names[1:])]
    table += [f"| {key} | {value} |" for key, value in kept.items()]
    merged = sum(bool(step.change) for step in plan.steps)
    sentence = f"{len(recipe.experts)} {experts} fine-tuned from {models[0]}, merged by {recipe.method}" + (
        " with singular value calibration (SVC, arXiv 2602.05536)" if recipe.svc else ""
    )
    written = "written as an adapter of it" if adapter else "the others are the base's"
    notes = "".join(f"- {note}\n" for note in remarks)
    for given in sorted((recipe.base, *recipe.experts), key=len, reverse=True):
        notes = notes.replace(given, public_name(given))
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=f"A merge of {len(recipe.experts)} {experts}",
        sentence=f"{sentence}: {merged} of {len(plan.steps)} tensors; {written}.",
        table="\n".join(table),
        notes=f"\n{notes}" if notes else "",
    )


def _is_repository(name: str) -> bool:
    """Return whether the Hub takes a name as that of a repository; it refuses cards with others."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _from_adapters(plan: Plan) -> bool:
    return isinstance(plan.experts[0], Adapter)
