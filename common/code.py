"""The code that decides a result: found from the function that makes it, never listed by hand.

`code_of(function)` returns the source of the function and of everything that it reaches inside this project: functions,
classes with all their methods, constants, tables, and what stands in them. Names are followed as Python would resolve
them, through imports and modules, also in decorators, defaults and annotations; what a partial, a closure, a bound
method, an instance, or a table or class that another file has changed holds is followed from the object itself.
Comments, docstrings and layout are left out, so that only an edit of what runs changes the result.

"This project" means every file that is not installed: the clone, and a script elsewhere that uses it. The code of
installed packages is not read, and neither are data files.
"""

import ast
import functools
import importlib.util
import inspect
import sys
import sysconfig
import tokenize
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

OURS = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "merging", "sparsity")  # of this project, wherever they are installed
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
PLAIN = (str, bytes, int, float, complex, types.NoneType)
Place = tuple[Path, str]  # a file, and a name that its top level defines; "" for what binds none


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
            found[place] = _linked_source(place)
            waiting += (reached for _, reached in _reached(place))
            waiting += _entered(place, modules)
    return tuple(sorted(set(found.values())))


def remember() -> None:
    """Read all files of this project that are imported now: this process does not run what is edited from now on."""
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "")
        if file.suffix == ".py" and file.is_file() and _is_ours(file):
            _text(file.resolve())


# From objects to places ----------------------------------------------------------------------------------------------


def _places(thing: Any, seen: dict[int, Any] | None = None) -> Iterator[Place]:
    """Yield where the code of an object stands: of a function or class, and of those that another object holds."""
    seen = {} if seen is None else seen
    if isinstance(thing, PLAIN) or id(thing) in seen:
        return
    seen[id(thing)] = thing  # which keeps it alive: no other object gets its id
    parts: Iterable[Any] = ()
    if isinstance(thing, functools.partial):
        parts = (thing.func, *thing.args, *thing.keywords.values())
    elif inspect.ismethod(thing):
        parts = (thing.__func__, thing.__self__)
    elif isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, tuple | list | set | frozenset):
        parts = thing
    elif isinstance(thing, types.ModuleType):
        file = Path(getattr(thing, "__file__", None) or "")
        yield from _all_places(file.resolve()) if file.suffix == ".py" and _is_ours(file) else ()
    elif isinstance(thing, type):
        if place := _place_of_class(thing):
            yield place
            parts = list(vars(thing).values())  # methods that another file has replaced
    elif inspect.isfunction(thing):
        yield from _place(thing)
        parts = (*_contents(thing), *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        parts = (*parts, getattr(thing, "__wrapped__", None))
    elif hasattr(thing, "__wrapped__"):  # a function under functools.cache
        parts = (thing.__wrapped__,)
    else:
        parts = (type(thing), *_attributes(thing))
    for part in parts:
        yield from _places(part, seen)


def _attributes(thing: Any) -> list[Any]:
    """Return what an instance holds: of a class of this project or a dataclass everything, of a torch module others."""
    own = getattr(thing, "__dict__", {})
    if is_dataclass(thing):
        return [getattr(thing, field.name, None) for field in fields(thing)]
    return list(own.values()) if _place_of_class(type(thing)) else [own.get("_modules")]  # type: ignore[arg-type]


def _contents(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            continue


@functools.cache
def _place_of_class(thing: type) -> Place | None:
    """Return the place of a class, if it is of this project."""
    files = [getattr(sys.modules.get(thing.__module__), "__file__", None)]
    files += (member.__code__.co_filename for member in vars(thing).values() if inspect.isfunction(member))
    for path in (Path(file) for file in files if file):
        name = thing.__qualname__.split(".")[0]
        if path.suffix == ".py" and path.is_file() and _is_ours(path) and name in _definitions(path.resolve()):
            return path.resolve(), name
    return None


def _place(function: types.FunctionType) -> Iterator[Place]:
    """Yield the place of a function, if it is of this project."""
    path = Path(function.__code__.co_filename)
    if not path.is_file():
        module = getattr(sys.modules.get(function.__module__), "__file__", None)
        if str(path) == "<string>":  # methods that dataclass writes: their class says all
            return
        if str(path).startswith("<frozen ") or (module and not _is_ours(Path(module))):  # installed packages write some
            return
        raise ValueError(f"{function.__qualname__} has no file ({path}): which code it is cannot be told")
    if _is_ours(path):
        path, name = path.resolve(), function.__qualname__.split(".")[0]
        found = [(path, name)] if name in _definitions(path) else _places_at(path, function.__code__.co_firstlineno)
        yield from found


def _places_at(file: Path, line: int) -> list[Place]:
    """Return what the top-level statement at a line defines: of a lambda in a table, that table."""
    for name, statements in _definitions(file).items():
        for statement in statements:
            first = min(node.lineno for node in (statement, *getattr(statement, "decorator_list", ())))
            if first <= line <= statement.end_lineno:
                return [(file, name)]
    return _all_places(file)  # it was edited before it was read here: anything of it


def _entered(place: Place, modules: Mapping[Path, types.ModuleType]) -> Iterator[Place]:
    """Yield what this name means at present: other files may have entered it into a table, or replaced it."""
    file, name = place
    if file in modules:
        yield from _places(vars(modules[file]).get(name))


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
    with tokenize.open(file) as opened:  # in the encoding that it says
        return opened.read()


@functools.cache
def _tree(file: Path) -> ast.Module:
    tree = ast.parse(_text(file))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_docstring(statement)] or [ast.Pass()]
    return tree


def _is_docstring(node: ast.stmt) -> bool:
    """Return whether a statement is nothing but a text: of a function or class, or under a constant or a field."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@functools.cache
def _definitions(file: Path) -> dict[str, list[ast.stmt]]:
    """Return name → the top-level statements of a file that bind it, or change what it is bound to.

    The calls under the main guard change nothing that others see. Statements that bind no name have the name "".
    """
    found: dict[str, list[ast.stmt]] = {}
    for statement in _tree(file).body:
        if not isinstance(statement, ast.Import | ast.ImportFrom | ast.Pass):
            names = dict.fromkeys(_bound([statement], changed=not _is_main_guard(statement)))
            for name in names or [""]:
                found.setdefault(name, []).append(statement)
    return found


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _all_places(file: Path) -> list[Place]:
    return [(file, name) for name in _definitions(file) if name]


@functools.cache
def _imports(file: Path) -> dict[str, list[tuple[str, str]]]:
    """Return name → all (module, name there, "" for the module itself) that a file imports as it, also in functions."""
    found: dict[str, list[tuple[str, str]]] = {}
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                found.setdefault(bound, []).append((alias.name if alias.asname else bound, ""))
        elif isinstance(node, ast.ImportFrom):
            package = _package(file) if node.level else []
            parents = package[: len(package) + 1 - node.level]
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, []).append((module, alias.name))
    return found


def _package(file: Path) -> list[str]:
    if known := getattr(_modules().get(file), "__package__", None):  # also of one without __init__.py
        return known.split(".")
    parts: list[str] = []
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return parts


@functools.cache
def _module(name: str, beside: Path) -> tuple[Path | None, tuple[str, ...]] | None:
    """Return file and folders (of a package) of a module of this project, None for any other; nothing is imported.

    Args:
        name: of the module.
        beside: a file that imports it.
    """
    parent, _, _ = name.rpartition(".")
    if known := sys.modules.get(name):
        origin, folders = getattr(known, "__file__", None), getattr(known, "__path__", ())
    else:
        above = _module(parent, beside) if parent else (None, (str(_root_folder(beside)),))
        spec = PathFinder.find_spec(name, list(above[1])) if above else None
        if not parent and not (spec and spec.origin):  # a folder without __init__.py comes after all modules
            spec = importlib.util.find_spec(name) or spec
        origin, folders = (spec.origin, spec.submodule_search_locations) if spec else (None, ())
    folders = tuple(folders or ())
    if origin:
        file = Path(origin)
        return (file.resolve(), folders) if file.suffix == ".py" and file.is_file() and _is_ours(file) else None
    return (None, folders) if any(_is_ours(Path(folder)) for folder in folders) else None


def _root_folder(file: Path) -> Path:
    """Return the folder whose modules a file imports: its own, or the one around its package."""
    folder = file.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


@functools.cache
def _source(place: Place) -> str:
    file, name = place
    return "\n".join(ast.unparse(statement) for statement in _definitions(file)[name])


@functools.cache
def _linked_source(place: Place) -> str:
    """Return the source of a place, and which code its names mean: an import may take one that is reached anyway."""
    links = (f"# {used}: {_source(reached)!r}" for used, reached in _reached(place) if reached != place)
    return "\n".join([_source(place), *links])


@functools.cache
def _reached(place: Place) -> tuple[tuple[str, Place], ...]:
    """Return all names of this project that a definition uses, with their places."""
    file, name = place
    found: dict[tuple[str, Place], None] = {}
    for statement in _definitions(file)[name]:
        for used in _used(statement, frozenset()):
            found |= dict.fromkeys((used, reached) for reached in _resolve(file, tuple(used.split(".")), frozenset()))
    return tuple(found)


def _resolve(file: Path, parts: tuple[str, ...], seen: frozenset) -> Iterator[Place]:
    """Yield the places that a dotted name can mean in a file; all places of a module that is used as a whole."""
    if (file, parts) in seen:  # modules that import a name from each other
        return
    first, *rest = parts
    imports = _imports(file)
    if first in _definitions(file):
        yield file, first
    elif first not in imports:
        imports = {first: [(module, first) for module, _ in imports.get("*", ())]}
    for module, name in imports.get(first, ()):
        inner = (name, *rest) if name else tuple(rest)
        yield from _resolve_in(module, inner, file, seen | {(file, parts)})


def _resolve_in(module: str, parts: tuple[str, ...], file: Path, seen: frozenset) -> Iterator[Place]:
    while parts and _module(f"{module}.{parts[0]}", file):
        module, parts = f"{module}.{parts[0]}", parts[1:]
    where, _ = _module(module, file) or (None, ())
    if where:
        yield from _resolve(where, parts, seen) if parts else _all_places(where)


# Names that a statement uses -----------------------------------------------------------------------------------------


def _used(node: ast.AST, local: frozenset[str]) -> Iterator[str]:
    """Yield the dotted names that a statement looks up outside itself: not its own variables and arguments."""
    if isinstance(node, ast.Name | ast.Attribute):
        dotted = _dotted(node)
        if dotted is not None:
            if dotted.split(".")[0] not in local:
                yield dotted
            return
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
        yield from _used_by_annotation(node.annotation, local)
    if isinstance(node, SCOPES):
        yield from _used_by_function(node, local)
        return
    if isinstance(node, COMPREHENSIONS):
        yield from _used(node.generators[0].iter, local)  # which is looked up outside
        local |= set(_bound([generator.target for generator in node.generators]))
    for child in ast.iter_child_nodes(node):
        yield from _used(child, local)


def _used_by_function(node: Any, local: frozenset[str]) -> Iterator[str]:
    body = [node.body] if isinstance(node, ast.Lambda) else node.body
    for child in (*getattr(node, "decorator_list", ()), *getattr(node, "type_params", ()), node.args):
        yield from _used(child, local)
    if getattr(node, "returns", None):
        yield from _used_by_annotation(node.returns, local)
    arguments = [node.args.vararg, node.args.kwarg, *node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    inner = local | {argument.arg for argument in arguments if argument} | set(_bound(body))
    for child in body:
        yield from _used(child, inner - _globals(node))


def _used_by_annotation(node: ast.AST, local: frozenset[str]) -> Iterator[str]:
    """Yield the names of an annotation, of which some may be written as texts."""
    yield from _used(node, local)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            yield from _used(ast.parse(node.value, mode="eval"), local)
        except SyntaxError:  # a remark
            return
    for child in ast.iter_child_nodes(node):
        yield from _used_by_annotation(child, local)


def _globals(node: ast.AST) -> set[str]:
    return {name for inner in ast.walk(node) if isinstance(inner, ast.Global) for name in inner.names}


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
        changed: yield also what is changed in place: TABLE[key] = …, TABLE.update(…), register(TABLE), and what
            functions declare as global.
    """
    for node in nodes:
        if isinstance(node, DEFINITIONS):
            yield node.name
            yield from _globals(node) if changed else ()
            continue
        if isinstance(node, COMPREHENSIONS):
            yield from (inner.target.id for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr))
            continue
        if isinstance(node, ast.Lambda | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.id
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest
        elif changed and isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            yield from _root(node)
        elif changed and isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            for part in (node.value.func, *node.value.args):
                yield from _root(part)
        yield from _bound(ast.iter_child_nodes(node), changed)


def _root(node: ast.AST) -> Iterator[str]:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    if isinstance(node, ast.Name):
        yield node.id
