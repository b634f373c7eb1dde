"""Merge fine-tuned models on disk, tensor by tensor, whatever their size and architecture.

    python -m merging --base BASE --experts MODEL MODEL --method ties --scale 0.3 --svc --out DIR      full models
    python -m merging --base BASE --experts ADAPTER ADAPTER --method task_arithmetic --out DIR         adapters of peft
    python -m merging --recipe DIR/merging.yaml --final-scale 0.8 --out DIR2                           a recipe again

Models are folders, single files (safetensors, or state dicts loaded with weights_only), or ids of the Hub. LoRA or IA³
adapters are merged in factored form and folded into the base; --output adapter writes one adapter instead. The same
command continues a merge that was interrupted; processes of `accelerate launch` share the work. --dry-run says what
would be done, and what it takes.
"""

import ast
import contextlib
import inspect
import io
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from common.command_line import one_line
from merging.command.mergekit import read_mergekit
from merging.command.recipe import Recipe, read_recipe

GROUPS = {  # of the help text; what stands in none of them belongs to the last
    "main": ("base", "experts", "method", "out", "svc", "recipe", "mergekit", "dry_run"),
    "merging": ("scale", "final_scale", "weights", "normalize", "seed", "set"),
    "calibration": ("alpha", "space", "rule", "target", "split_qkv", "vectors", "kernels"),
    "output": ("output", "rank", "dtype", "shard_size", "tokens"),
    "other": (),
}


@dataclass(frozen=True)
class Flags(Recipe):
    """The recipe, and how it is carried out."""

    out: str = ""
    """Folder of the result; it must not exist, be empty, or hold what the same recipe made."""
    recipe: Path | None = None
    """File with a recipe, such as the merging.yaml of an earlier output; flags override it."""
    mergekit: Path | None = None
    """A recipe of mergekit (linear, task_arithmetic, ties, dare_linear, dare_ties), likewise."""
    jobs: int = 1
    """Tensors merged at the same time, in threads; each needs its own memory."""
    device: str = "cpu"
    """Where the arithmetic is done: cpu, cuda or cuda:N."""
    push: str = ""
    """Upload the finished merge to this repository of the Hub, OWNER/NAME, which is made if it does not exist."""
    dry_run: bool = False
    """Print what would become of each tensor, memory, time and disk to expect, and write nothing."""
    report_only: bool = False
    """Write the report of --report into --out, a folder of its own, and no weights."""


def parse(arguments: Sequence[str]) -> Flags:
    """Return the flags; what the command line leaves out is taken from the file of --recipe or --mergekit.

    Raises:
        ValueError: that file is no recipe, or there are two of them.
        SystemExit: a flag is wrong, or --help was asked for.
    """
    arguments = _joined(_apart(arguments))
    start = Flags()
    readers = {"--recipe": read_recipe, "--mergekit": lambda path: read_mergekit(path)[0]}
    files = [pair for pair in pairwise(arguments) if pair[0] in readers]
    if len(files) > 1:
        raise ValueError(f"{' '.join(map(' '.join, files))}: a merge follows one recipe; give one of these files")
    for flag, file in files:
        if not Path(file).is_file():
            odd = "is a folder; name the file in it" if Path(file).is_dir() else "there is no such file"
            raise ValueError(f"{flag} {file}: {odd}")
        start = Flags(**asdict(readers[flag](Path(file))))
    groups = _groups()
    record = make_dataclass("Grouped", [(title, tyro.conf.OmitArgPrefixes[kind]) for title, kind in groups.items()])
    default = record(*(kind(*(getattr(start, one.name) for one in fields(kind))) for kind in groups.values()))
    options = dict(prog="python -m merging", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            found = asdict(tyro.cli(record, args=arguments, default=default, **options))
    except SystemExit as stop:
        if stop.code:
            print(f"python -m merging: {one_line(box.getvalue())}; --help tells all flags", file=sys.stderr)
        raise
    return Flags(**{name: value for group in found.values() for name, value in group.items()})


def _groups() -> dict[str, type]:
    """Return a dataclass for each group of flags, which tyro makes a group of the help text."""
    hints, texts = get_type_hints(Flags), documentation(Flags)
    named = {name for names in GROUPS.values() for name in names}
    *others, last = GROUPS
    members = {title: GROUPS[title] for title in others} | {last: [name for name in hints if name not in named]}
    return {
        title: make_dataclass(title, [(name, _argument(hints[name], texts[name])) for name in names])
        for title, names in members.items()
    }


def _argument(hint: Any, text: str) -> Any:
    """Return the type of a flag with its help; only defaults that say something are shown."""
    kinds = {"float": "FLOAT", "int": "INT", "str": "TEXT", "Path": "FILE"}
    metavar = next((word for kind, word in kinds.items() if kind in str(hint)), None) if hint is not bool else None
    if "tuple" in str(hint):
        metavar = f"{metavar} …"
    shown = lambda default: "" if default in ("", "''", "None", "False") else f"(default: {default})"  # noqa: E731
    metavar = None if "Literal" in str(hint) else metavar
    return Annotated[hint, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=shown)]


@cache
def documentation(kind: type) -> dict[str, str]:
    """Return the texts below the fields of a dataclass and of those that it extends."""
    texts: dict[str, str] = {}
    for own in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(own))).body
        for field, text in zip(tree.body, tree.body[1:], strict=False):  # type: ignore[attr-defined]
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def _apart(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with --flag=value as two, and dashes for the underscores in names of flags."""
    found: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            found += [flag.replace("_", "-"), value] if equals else [flag.replace("_", "-")]
        else:
            found.append(argument)
    return found


def _joined(arguments: list[str]) -> list[str]:
    """Collect the values of a list behind the first of its flags, where that is given several times."""
    for flag in ("--set", "--experts"):
        values: list[str] = []
        while arguments.count(flag) > 1:
            start = len(arguments) - 1 - arguments[::-1].index(flag)
            stop = next((i for i in range(start + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
            values = arguments[start + 1 : stop] + values
            del arguments[start:stop]
        if values:
            start = arguments.index(flag)
            stop = next((i for i in range(start + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
            arguments[stop:stop] = values
    return arguments
