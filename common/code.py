"""The code that decides a result: found from the function that makes it, never listed by hand.

`code_of(function)` returns the source of the function and of everything that it reaches inside this project: functions,
classes with all their methods, constants, tables, and the entries of these tables. Names are followed as Python would
resolve them, through imports and modules, also in decorators, defaults and annotations. What a partial, a closure, a
bound method or a table that another file has filled holds is followed from the object itself. Comments, docstrings and
layout are left out, so that only an edit of what runs changes the returned source.

"This project" means every file that is not installed: the clone, and a script elsewhere that uses it. The code of
installed packages is not read, and neither are data files.
"""

import ast
import builtins
import functools
import importlib.util
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

OURS = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "merging", "sparsity")  # of this project, wherever they are installed
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Place = tuple[Path, str]  # a file, and a name that its top level defines


def code_of(*things: Any) -> tuple[str, ...]:
    """Return the source of functions and of everything that they reach inside this project, in a fixed order.

    Args:
        things: functions, classes, partials, bound methods, or containers of them.

    Returns:
        one text for each definition at the top level of a file.

    Raises:
        ValueError: a function has no file, because it was typed into an interpreter or pickled by value for another
            process.
    """
    waiting = [place for thing in things for place in _places(thing)]
    found: dict[Place, str] = {}
    modules = _modules()
    while waiting:
        place = waiting.pop()
        if place not in found:
            found[place] = _source(place)
            waiting += _reached(place)
            waiting += _entered(place, modules)
    return tuple(sorted(set(found.values())))


def remember() -> None:
    """Read all files of this project that are imported now: this process does not run what is edited from now on."""
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "")
        if file.suffix == ".py" and file.is_file() and _is_ours(file):
            _text(file.resolve())


# From objects to places ----------------------------------------------------------------------------------------------


def _places(thing: Any, seen: set[int] | None = None) -> Iterator[Place]:
    """Yield the place of a function or class, and the places of those that any other object holds."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    parts: Iterable[Any] = ()
    if isinstance(thing, functools.partial):
        parts = (thing.func, *thing.args, *thing.keywords.values())
    elif inspect.ismethod(thing):
        parts = (thing.__func__, thing.__self__)
    elif isinstance(thing, Mapping):
        parts = thing.values()
    elif isinstance(thing, tuple | list | set | frozenset):
        parts = thing
    elif isinstance(thing, type):
        yield from _place(thing, inspect.getmodule(thing), "")
    elif inspect.isfunction(thing):
        yield from _place(thing, None, thing.__code__.co_filename)
        parts = (*_contents(thing), *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        parts = (*parts, getattr(thing, "__wrapped__", None))
    elif hasattr(thing, "__wrapped__"):  # a function under functools.cache
        parts = (thing.__wrapped__,)
    elif not isinstance(thing, types.ModuleType | str | bytes | int | float | complex | None):
        yield from _place(type(thing), inspect.getmodule(type(thing)), "")
        if is_dataclass(thing):
            parts = (getattr(thing, field.name, None) for field in fields(thing))
    for part in parts:
        yield from _places(part, seen)


def _contents(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue


def _place(thing: Any, module: types.ModuleType | None, file: str) -> Iterator[Place]:
    """Yield the place of one function or class, if it is of this project."""
    path = Path(file or getattr(module, "__file__", None) or "<none>")
    if inspect.isfunction(thing) and not path.is_file() and thing.__module__ not in sys.builtin_module_names:
        if file == "<string>":  # a method that @dataclass wrote: the code of its class determines it
            return
        raise ValueError(f"{thing.__qualname__} has no file ({path}): its code cannot be read")
    if not path.is_file() or not _is_ours(path):
        return
    path = path.resolve()
    name = thing.__qualname__.split(".")[0]
    if name not in _definitions(path) and inspect.isfunction(thing):
        name = _name_at(path, thing.__code__.co_firstlineno)
    if name in _definitions(path):
        yield path, name


def _name_at(file: Path, line: int) -> str:
    """Return a name that the top-level statement at this line defines: for a lambda in a table, the table's name."""
    for name, statements in _definitions(file).items():
        if any(statement.lineno <= line <= statement.end_lineno for statement in statements):
            return name
    return ""


def _entered(place: Place, modules: Mapping[Path, types.ModuleType]) -> Iterator[Place]:
    """Yield the places of what a table of this name holds now: other files may have put entries into it."""
    file, name = place
    if all(isinstance(statement, (*SCOPES, ast.ClassDef)) for statement in _definitions(file)[name]):
        return
    module = modules.get(file)
    value = vars(module).get(name) if module else None
    if isinstance(value, dict | list | set):
        yield from _places(value)


def _modules() -> dict[Path, types.ModuleType]:
    """Return the imported modules by their files."""
    files = ((getattr(module, "__file__", None), module) for module in list(sys.modules.values()))
    return {_resolved(file): module for file, module in files if file}


@functools.cache
def _resolved(file: str) -> Path:
    return Path(file).resolve()


@functools.cache
def _is_ours(file: Path) -> bool:
    file = file.resolve()
    if file in (Path(__file__).resolve(), OURS / "common" / "cache.py"):  # they find results, but do not change any
        return False
    if file.is_relative_to(OURS) and file.relative_to(OURS).parts[0] in PACKAGES:
        return True
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return not installed and not any(file.is_relative_to(Path(folder).resolve()) for folder in folders)


# Reading files -------------------------------------------------------------------------------------------------------


@functools.cache  # the code as it was when this process first needed it, not as it has been edited since
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.cache
def _tree(file: Path) -> ast.Module:
    tree = ast.parse(_text(file))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@functools.cache
def _definitions(file: Path) -> dict[str, list[ast.stmt]]:
    """Return name → the top-level statements of a file that bind this name, or change the object it is bound to."""
    found: dict[str, list[ast.stmt]] = {}
    for statement in _tree(file).body:
        if isinstance(statement, ast.Import | ast.ImportFrom) or _is_main_guard(statement):
            continue
        for name in dict.fromkeys(_bound([statement], changed=True)):
            found.setdefault(name, []).append(statement)
    return found


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


@functools.cache
def _imports(file: Path) -> dict[str, tuple[str, str]]:
    """Return name → (module, name there, "" for the module itself) of all imports of a file, also in functions."""
    found: dict[str, tuple[str, str]] = {}
    package = _package(file)
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                found[bound] = (alias.name if alias.asname else bound, "")
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    return found


def _package(file: Path) -> list[str]:
    parts: list[str] = []
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return parts


@functools.cache
def _file_of(module: str, beside: Path) -> Path | None:
    """Return the file of a module of this project, or None for any other; `beside` is a file that imports it."""
    known = getattr(sys.modules.get(module), "__file__", None) or ""
    if not known and (sibling := beside.parent / f"{module}.py").is_file():
        known = str(sibling)
    if not known and module.split(".")[0] in PACKAGES:
        known = getattr(importlib.util.find_spec(module), "origin", None) or ""
    file = Path(known)
    return file.resolve() if file.suffix == ".py" and file.is_file() and _is_ours(file) else None


@functools.cache
def _source(place: Place) -> str:
    file, name = place
    return "\n".join(ast.unparse(statement) for statement in _definitions(file)[name])


@functools.cache
def _reached(place: Place) -> tuple[Place, ...]:
    """Return the places of all names of this project that a definition uses."""
    file, name = place
    found: dict[Place, None] = {}
    for statement in _definitions(file)[name]:
        for used in _used(statement, frozenset()):
            found |= dict.fromkeys(_resolve(file, used.split(".")))
    return tuple(found)


def _resolve(file: Path, parts: list[str]) -> list[Place]:
    """Return the place that a dotted name means in a file; all places of a module that is used as a whole."""
    first, *rest = parts
    if first in _definitions(file):
        return [(file, first)]
    if first not in _imports(file):
        return []
    module, name = _imports(file)[first]
    return _resolve_in(module, [name, *rest] if name else rest, file)


def _resolve_in(module: str, parts: list[str], file: Path) -> list[Place]:
    while parts and module.split(".")[0] in PACKAGES and _is_module(f"{module}.{parts[0]}"):
        module, parts = f"{module}.{parts[0]}", parts[1:]
    where = _file_of(module, file)
    if where is None or where == file:
        return []
    return _resolve(where, parts) if parts else [(where, name) for name in _definitions(where)]


@functools.cache
def _is_module(name: str) -> bool:
    if name in sys.modules:
        return True
    parent, _, _ = name.rpartition(".")
    spec = importlib.util.find_spec(parent) if parent else None
    return bool(spec and spec.submodule_search_locations and importlib.util.find_spec(name))


# Names that a statement uses -----------------------------------------------------------------------------------------


def _used(node: ast.AST, local: frozenset[str]) -> Iterator[str]:
    """Yield the dotted names that a statement looks up outside itself: not its own variables and arguments."""
    if isinstance(node, ast.Name | ast.Attribute):
        dotted = _dotted(node)
        if dotted is not None:
            first = dotted.split(".")[0]
            if first not in local and not (hasattr(builtins, first) and "." not in dotted):
                yield dotted
            return
    if isinstance(node, ast.arg | ast.AnnAssign) and isinstance(node.annotation, ast.Constant):
        yield from _used(_annotation(node.annotation), local)
    if isinstance(node, SCOPES):
        yield from _used_by_function(node, local)
        return
    if isinstance(node, COMPREHENSIONS):
        local |= set(_bound([generator.target for generator in node.generators]))
    for child in ast.iter_child_nodes(node):
        yield from _used(child, local)


def _used_by_function(node: Any, local: frozenset[str]) -> Iterator[str]:
    body = [node.body] if isinstance(node, ast.Lambda) else node.body
    for part in ("decorator_list", "returns"):
        value = getattr(node, part, None) or []
        for child in value if isinstance(value, list) else [value]:
            yield from _used(_annotation(child), local)
    yield from _used(node.args, local)
    arguments = [node.args.vararg, node.args.kwarg, *node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    inner = local | {argument.arg for argument in arguments if argument} | set(_bound(body))
    for child in body:
        yield from _used(child, inner)


def _annotation(node: ast.AST) -> ast.AST:
    """Return an annotation as an expression; one that is written as a string is parsed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return ast.parse(node.value, mode="eval").body
    return node


def _dotted(node: ast.AST) -> str | None:
    """Return "a.b.c" of a chain of attributes that begins with a name, else None."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return ".".join([node.id, *names]) if isinstance(node, ast.Name) else None


def _bound(nodes: Iterable[ast.AST], changed: bool = False) -> Iterator[str]:
    """Yield the names that statements bind in their own scope, imports left out.

    Args:
        nodes: statements, or targets of an assignment.
        changed: also yield names of objects that are changed in place: TABLE[key] = …, TABLE.update(…).
    """
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, (ast.Lambda, ast.Import, ast.ImportFrom, *COMPREHENSIONS)):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.id
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif changed and isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield from _root(node)
        elif changed and isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _root(node.value.func)
        yield from _bound(ast.iter_child_nodes(node), changed)


def _root(node: ast.AST) -> Iterator[str]:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id
