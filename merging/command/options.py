"""Options of single tensors: patterns over their names, values of single experts, and values that change with depth.

    PATTERN:OPTION=VALUE            '*.mlp.*:scale=0.5'            shell patterns; of two that match, the later one
    PATTERN:OPTION[EXPERT]=VALUE    '*.mlp.*:weight[1]=0.5'        for the expert of this index alone, from 0
    PATTERN:OPTION=[A, B, …]        '*.layers.*:scale=[0.2, 0.6]'  from the first layer to the last, linear in between

A tensor's layer is the first number in its name (`merging.layers`); tensors without one (embeddings, the head) take the
first value, and so does layer 0; a single layer takes the last.
"""

import contextlib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import yaml

from merging.calibration import SVC
from merging.command.storage import LAYOUTS
from merging.mergers import merger
from merging.task_vectors import check_choice

SVC_FLAGS = {name: "kernels" if name == "flatten" else name for name in SVC.__dataclass_fields__}  # field → flag
TENSOR_OPTIONS = {  # beside the merger's and SVC's
    "weight": float, "normalize": bool, "final_scale": float, "svc": bool, "merge": bool, "layout": str,
}  # fmt: skip


def merger_options(method: str) -> dict[str, Any]:
    """Return the options of a merger which are numbers or words, with their defaults."""
    return merger(method).options


@dataclass(frozen=True)
class Assignment:
    """One text of --set: which tensors, which option, whose, and its value."""

    text: str
    pattern: str
    option: str
    expert: int | None  # None: of all experts
    value: Any  # a list where it is interpolated over the layers

    def matches(self, name: str) -> bool:
        """Return whether a tensor of this name gets the value."""
        return fnmatch.fnmatchcase(name, self.pattern)

    def at(self, depth: float | None) -> Any:
        """Return the value at a depth from 0, the first layer, to 1, the last.

        Raises:
            ValueError: it is interpolated, and no depth is known.
        """
        if not isinstance(self.value, list):
            return self.value
        if depth is None:
            raise ValueError(f"--set {self.text!r}: is interpolated over layers, which are not known here")
        place = depth * (len(self.value) - 1)
        below = min(int(place), max(0, len(self.value) - 2))
        low, high = self.value[below], self.value[min(below + 1, len(self.value) - 1)]
        return low if place == below else low + (place - below) * (high - low)

    def set(self, options: dict[str, Any], depth: float | None, experts: int) -> None:
        """Set the value in the options of a tensor; those of single experts are tuples of all."""
        value = self.at(depth)
        if self.option == "weight":
            options["weights"] = self._of_experts(options["weights"], value, experts)
        elif self.expert is None:
            options[self.option] = value
        else:
            options[self.option] = self._of_experts(options[self.option], value, experts)

    def _of_experts(self, before: Any, value: Any, experts: int) -> tuple[Any, ...]:
        values = list(before) if isinstance(before, Sequence) else [before] * experts
        if self.expert is None:
            return (value,) * experts
        if self.expert >= experts:
            raise ValueError(f"--set {self.text!r}: there is no expert {self.expert}, they are 0 to {experts - 1}")
        values[self.expert] = value
        return tuple(values)


def read_assignment(text: str, method: str) -> Assignment:
    """Return what a text of --set says.

    Raises:
        ValueError: one line: it is none, or the merger has no such option or not for each expert, or the value is no
            value of it.
    """
    found = re.fullmatch(r"(.+):(\w+)(?:\[(\d+)\])?=(.+)", text)
    if not found:
        raise ValueError(f"--set {text!r}: expected 'PATTERN:OPTION=VALUE', such as '*.mlp.*:scale=0.5'")
    pattern, option, expert, value = found.groups()
    hints = get_type_hints(SVC).items()
    of_svc = {SVC_FLAGS[name]: next(iter(get_args(hint)), hint) for name, hint in hints}  # float | None → float
    kinds = {name: type(default) for name, default in merger_options(method).items()} | of_svc | TENSOR_OPTIONS
    check_choice(f"option in --set {text!r}:", option, kinds)
    each = ("weight", *merger(method).per_task)
    if expert is not None and option not in each:
        raise ValueError(f"--set {text!r}: experts have no {option} of their own, but {' and '.join(each)}")
    given = _value(value, kinds[option])
    wrong = [one for one in (given if isinstance(given, list) else [given]) if not _is(one, kinds[option])]
    if wrong or given == [] or (isinstance(given, list) and kinds[option] is not float):
        raise ValueError(f"--set {text!r}: {option} must be {kinds[option].__name__}, got {value!r}")
    if option == "layout":
        check_choice("layout", given, LAYOUTS)
    return Assignment(text, pattern, option, None if expert is None else int(expert), given)


def _value(text: str, kind: type) -> Any:
    """Return a value in YAML's notation; numbers of a float option as floats, where they are written as 1e-3 too."""
    with contextlib.suppress(yaml.YAMLError, RecursionError):  # RecursionError: nested thousands of times
        given = yaml.safe_load(text)
        return [_number(one, kind) for one in given] if isinstance(given, list) else _number(given, kind)
    return text


def _number(given: Any, kind: type) -> Any:
    if kind is float and isinstance(given, int | str) and not isinstance(given, bool):
        with contextlib.suppress(ValueError):
            return float(given)
    return given


def _is(given: Any, kind: type) -> bool:
    return isinstance(given, kind) and (kind is bool or not isinstance(given, bool))
