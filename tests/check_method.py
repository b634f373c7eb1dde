"""What a new merger or activation still lacks: `make check-method NAME=median`.

Looks at what stands in the table MERGERS or ACTIVATIONS, tries it on small tensors, and then runs the shared tests that
go over the whole table. Each line begins with "ok", "lacks" or "note" (a choice that only its author can judge). The
exit status is 1 if anything is lacking or a test fails.
"""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import merging
from common.lab.report import published
from merging import MERGERS, Merger
from merging.lowrank import LowRank, merge_low_rank
from sparsity.activations import ACTIVATIONS, derivative, make

ROOT = Path(__file__).resolve().parent.parent
SHARED = {
    "merger": [f"tests/merging/test_{name}.py" for name in ("mergers", "lowrank", "stream", "comparison", "weights")],
    "activation": ["tests/sparsity/test_activations.py"],
}
Finding = tuple[str, str]  # "ok", "lacks" or "note"; what


def findings(name: str) -> Iterator[Finding]:
    """Yield what a merger or an activation of this name has and lacks.

    Raises:
        KeyError: neither table has the name.
    """
    if name in MERGERS:
        own = MERGERS[name]
        yield _word(isinstance(own, Merger), "a record: Merger(function, title, …) and not the bare function")
        yield from _of_merger(name, merging.merger(name))
    elif name in ACTIVATIONS:
        yield from _guarded(_of_activation(name, make(name)))
    else:
        raise KeyError(name)


def _word(there: bool, what: str) -> Finding:
    return ("ok" if there else "lacks"), what


def _guarded(found: Iterator[Finding]) -> Iterator[Finding]:
    """Pass on what is found; what then raises an error, whatever it is, lacks the rest."""
    try:
        yield from found
    except Exception as error:
        yield "lacks", f"what these checks need: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def _raises(error: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception as raised:
        return isinstance(raised, error)
    return False


def _tested(name: str, half: str) -> bool:
    """Return whether any test names it, besides the one that enters a merger of its own."""
    files = [path for path in (ROOT / "tests" / half).glob("test_*.py") if path.name != "test_a_new_merger.py"]
    return any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in files)


def _in_a_manual(*names: str) -> Finding:
    texts = [path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("[cems]*/README.md"))]
    return _word(any(name in text for name in names for text in texts), "a word in a manual (README.md)")


# Mergers --------------------------------------------------------------------------------------------------------------


def _tasks(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"mlp.weight": (12, 9), "bias": (12,)}
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


def _of_merger(name: str, own: Merger) -> Iterator[Finding]:
    doc = inspect.getdoc(own.merge) or ""
    yield _word(own.merge.__name__ == name, "a function of the same name")
    yield _word("Args:" in doc, "a docstring with equation, source and Args")
    yield _word(own.title != name, "a title for figures")
    others = [each.colour for other, each in MERGERS.items() if other != name and isinstance(each, Merger)]
    yield _word(bool(own.colour) and own.colour not in others, "a colour for figures that no other merger has")
    yield _word(name in merging.__all__, "its name in merging.__all__")
    yield from _guarded(_behaviour(own))
    yield from _guarded(_by_rows(own))
    yield from _guarded(_factored(name, own))
    if own.alpha is None:
        yield "note", "alpha: “+ SVC” calibrates with 1/K; give the record its own if results are not of a sum's size"
    if own.published:
        rows = published("merging")
        yield _word(name in set(rows.merger), "rows in results/published/merging.csv, as published=True says")
    yield "note", f"copies: {'a function' if callable(own.copies) else own.copies}; measured, or the default of 5?"
    yield _word(_tested(name, "merging"), "tests of its own in tests/merging, against a naive reference")
    yield _in_a_manual(name, own.title)


def _behaviour(own: Merger) -> Iterator[Finding]:
    tasks = _tasks()
    before = [{name: tensor.clone() for name, tensor in task.items()} for task in tasks]
    merged = own(tasks)
    kept = all(torch.equal(task[name], old[name]) for task, old in zip(tasks, before, strict=True) for name in task)
    yield _word(kept, "inputs left unchanged")
    same = {name: merged[name].shape for name in merged} == {name: tasks[0][name].shape for name in tasks[0]}
    finite = all(tensor.isfinite().all() for tensor in merged.values())
    yield _word(same and finite, "all tensors, in their shapes, finite")
    half = own([{name: tensor.bfloat16() for name, tensor in task.items()} for task in tasks])
    yield _word({tensor.dtype for tensor in half.values()} == {torch.bfloat16}, "results in the dtype of the updates")
    again = own(tasks)
    yield _word(all(torch.equal(again[name], merged[name]) for name in merged), "the same result when called again")
    yield _word(_raises(ValueError, lambda: own([])), "a ValueError where there are no task vectors")


def _by_rows(own: Merger) -> Iterator[Finding]:
    """Whether entries are merged each by itself, as the record says: two halves against the whole."""
    tasks = _tasks()
    halves = [own([{"mlp.weight": task["mlp.weight"][rows]} for task in tasks]) for rows in (slice(5), slice(5, None))]
    parts = torch.cat([half["mlp.weight"] for half in halves])
    alone = torch.allclose(parts, own(tasks)["mlp.weight"], atol=1e-6)
    if own.by_rows:
        yield "ok", "by_rows: ranges of rows are merged by a function of its own (tests/merging/test_stream.py)"
    elif own.by_entry:
        yield _word(alone, "by_entry=True with ranges of rows that are merged as the whole is")
    elif alone:
        yield "note", "ranges of rows were merged as the whole: by_entry=True would stream large tensors"
    else:
        yield "ok", "by_entry=False: needs whole tensors"


def _factored(name: str, own: Merger) -> Iterator[Finding]:
    if not own.factored:
        yield "note", "factored=False: LoRA is merged as its products if by_entry, else refused"
        return
    generator = torch.Generator().manual_seed(0)
    sizes = ((17, 3), (3, 23))
    updates = [LowRank(*(torch.randn(*size, generator=generator).double() for size in sizes)) for _ in range(3)]
    dense = own([{"weight": update.dense()} for update in updates])["weight"]
    apart = (merge_low_rank(updates, name).dense() - dense).norm() / dense.norm()
    yield _word(bool(apart < 1e-8), "factored=True with cores that give what the matrices give")


# Activations ----------------------------------------------------------------------------------------------------------


def _of_activation(name: str, own: nn.Module) -> Iterator[Finding]:
    yield _word(bool(inspect.getdoc(type(own))), "a docstring with the formula")
    yield _word(isinstance(own, nn.ReLU) or hasattr(own, "derivative"), "a method derivative(x)")
    x = torch.linspace(-6.03, 6.01, 302, dtype=torch.float64)  # on no kink of those that are known
    leaf = x.clone().requires_grad_()
    value = own(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    yield _word(value.shape == x.shape and value.dtype == x.dtype, "values in the shape and dtype of x")
    apart = torch.stack([own(one) for one in x])
    yield _word(torch.allclose(apart, own(x), atol=1e-12), "entries that do not depend on each other")
    yield _word(torch.allclose(derivative(own, x), slope), "a derivative that is autograd's")
    leaf = x[::25].clone().requires_grad_()
    yield _word(gradcheck(own, leaf, raise_exception=False), "a first derivative that gradcheck confirms")
    yield _word(gradgradcheck(own, leaf, raise_exception=False), "a second derivative that gradgradcheck confirms")
    narrow = own(x.bfloat16())
    yield _word(bool(narrow.isfinite().all()) and narrow.dtype == torch.bfloat16, "finite values in bfloat16")
    zeros = derivative(own, x) == 0
    yield "note", f"σ' = 0 on {zeros.double().mean():.0%} of [-6, 6]: what is not zero there counts as active"
    yield _word(_tested(name, "sparsity"), "tests of its own in tests/sparsity, against its formula")


# The command ----------------------------------------------------------------------------------------------------------


def main(name: str) -> int:
    """Print what is found, run the shared tests, and return the exit status."""
    try:
        found = list(findings(name))
    except KeyError:
        where = "MERGERS (merging/mergers.py) or ACTIVATIONS (sparsity/activations.py)"
        print(f"error: there is no merger and no activation {name!r}: enter it in {where} first", file=sys.stderr)
        return 2
    print("\n".join(f"{word:6}{what}" for word, what in found))
    kind = "merger" if name in MERGERS else "activation"
    command = [sys.executable, "-m", "pytest", "-q", "-k", name, *SHARED[kind]]
    failed = subprocess.run(command, cwd=ROOT, check=False).returncode
    lacking = sum(word == "lacks" for word, _ in found)
    tests = "fail" if failed else "pass"
    print(f"{name}: {lacking or 'nothing'} {'things are' if lacking > 1 else 'is'} lacking; its shared tests {tests}")
    return int(bool(lacking or failed))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make check-method NAME=…, the name of a merger or of an activation")
    sys.exit(main(sys.argv[1]))
