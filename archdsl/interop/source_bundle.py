"""The project's own source as one file that needs nothing of the project, nor of pydantic.

From some root classes on, every definition is taken over that those before it name. Of a spec,
which pydantic reads with defaults and limits, only the methods that somebody calls stay: in the
file a spec is an `archdsl.interop.plain_spec.Node`. The text depends on the source alone, never on
the spec of a model.
"""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import BaseModel

from archdsl.errors import ArchdslError
from archdsl.interop.source_names import (
    NODE,
    Name,
    Reader,
    Writer,
    is_own,
    read,
    resolve,
    stored,
)

ALLOWED = {*sys.stdlib_module_names, "torch", "transformers"}
NEEDS = "an exported model may need torch and transformers alone"


class BundleError(ArchdslError):
    """The source of a block names something that the file cannot have."""


def bundle(roots: Iterable[type], header: str) -> str:
    """One file with the root classes, whole, and all that they need.

    The same source gives the same text. Raises BundleError if it needs other packages than torch
    and transformers.
    """
    given = {Name(root.__module__, root.__qualname__) for root in roots}
    modules = in_import_order([NODE.module, *sorted({name.module for name in given})])
    reached = reach(given)
    written = names_in_file(reached.names, modules)
    tree: list[ast.stmt] = []
    for name, node in reached.definitions(modules):
        copied = Writer(name.module, written).visit(copy.deepcopy(node))
        if isinstance(copied, ast.ClassDef | ast.FunctionDef):
            copied.name = written[name]
        _refuse_foreign_imports(name, copied)
        tree.append(copied)
    head = f"{header}\n\nfrom __future__ import annotations\n\n{imports(written, tree)}"
    return "\n\n\n".join([head, *map(ast.unparse, tree)]) + "\n"


def names_in_file(reached: Iterable[Name], modules: Iterable[str]) -> dict[Name, str]:
    """What each definition and import is called: its own name, unless that is taken."""
    written: dict[Name, str] = {}
    taken = set(dir(builtins))

    def write(name: Name, wanted: str) -> None:
        if name not in written:
            free = wanted if wanted not in taken else f"{wanted}_{name.module.rpartition('.')[2]}"
            while free in taken:
                free += "_"
            written[name] = free
            taken.add(free)

    used = [module for module in modules if any(name.module == module for name in reached)]
    for module in used:
        for alias, target in read(module).imports.items():
            if target.package in ALLOWED:
                write(target, alias)
    for module in used:
        for defined in read(module).definitions:
            if Name(module, defined) in reached:
                write(Name(module, defined), defined)
    return written


def imports(written: Mapping[Name, str], tree: Iterable[ast.stmt]) -> str:
    """The import statements for what stands in ``tree``."""
    used = {node.id for top in tree for node in ast.walk(top) if isinstance(node, ast.Name)}
    whole, parts = [], defaultdict[str, list[str]](list)
    for (module, attribute), alias in sorted(written.items()):
        if is_own(Name(module, attribute)) or alias not in used:
            continue
        what = attribute or module
        given = what if alias == what else f"{what} as {alias}"
        if attribute:
            parts[module].append(given)
        else:
            whole.append(f"import {given}")
    return "\n".join([*whole, *(f"from {m} import {', '.join(parts[m])}" for m in parts)])


def in_import_order(modules: Iterable[str]) -> list[str]:
    """With all modules of the project they import, those first: as Python runs them.

    What functions import comes after whoever imports it at once.
    """
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in order:
            return
        for imported in read(name).imports:
            target = resolve(name, imported)
            if target is not None and is_own(target) and target.attribute:
                visit(target.module)
        order[name] = None

    waiting = list(modules)
    while waiting:
        visit(waiting[0])
        origins = [origin for module in order for origin in read(module).later.values()]
        later = {origin.module for origin in origins if is_own(origin)}
        waiting = waiting[1:] or sorted(later - order.keys())
    return list(order)


@dataclass
class Reached:
    """Definitions, and the words after a dot in them: a method is called by such a word."""

    roots: set[Name]
    names: set[Name]
    words: set[str] = field(default_factory=set)

    def definitions(self, modules: Iterable[str]) -> Iterator[tuple[Name, ast.stmt]]:
        """In the order of the source."""
        for module in modules:
            seen: list[ast.stmt] = []
            for defined, node in read(module).definitions.items():
                name = Name(module, defined)
                if name in self.names and node not in seen:
                    seen.append(node)
                    yield name, self.cut(name, node)

    def cut(self, name: Name, node: ast.stmt) -> ast.stmt:
        """A class without the methods that nobody calls, a spec without what is for pydantic."""
        if not isinstance(node, ast.ClassDef):
            return node
        cls = getattr(importlib.import_module(name.module), name.attribute)
        is_spec = issubclass(cls, BaseModel)
        stays = self._of_a_spec if is_spec else self._of_a_class
        whole = name in self.roots and not is_spec
        body = [one for one in node.body if stays(one, cls) or (whole and not _is_typing(one))]
        if is_spec and ("kind" in cls.model_fields or not cls.__subclasses__()):
            at = int(ast.get_docstring(node) is not None)
            body[at:at] = fields_of(cls)
        short = copy.copy(node)
        short.body = body or [ast.Pass()]
        return short

    def _of_a_spec(self, statement: ast.stmt, cls: type) -> bool:
        match statement:
            case ast.AnnAssign(annotation=annotation):
                return "ClassVar" in ast.unparse(annotation) and stored(statement) <= self.words
            case ast.FunctionDef(name=name):
                return name in self.words
            case _:
                return isinstance(statement, ast.Expr)

    def _of_a_class(self, statement: ast.stmt, cls: type) -> bool:
        if not isinstance(statement, ast.FunctionDef):
            return not _is_typing(statement)
        name = statement.name
        foreign = [base for base in cls.__mro__ if not is_own(Name(base.__module__, ""))]
        called = name in self.words or name.startswith("__")
        return called or any(hasattr(base, name) for base in foreign)


def _is_typing(statement: ast.stmt) -> bool:
    match statement:
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


@cache
def fields_of(spec: type[BaseModel]) -> list[ast.stmt]:
    """What `Node` needs to know of a spec: its kind, its fields, the families of its slots."""
    properties = spec.model_json_schema()["properties"]
    families = {name: _family(properties[name]) for name in spec.model_fields}
    lines = [f"fields = {families!r}"]
    if "kind" in spec.model_fields:
        lines.insert(0, f"kind = {spec.model_fields['kind'].default!r}")
    return ast.parse("\n".join(lines)).body


def _family(schema: Any) -> str:
    match schema:
        case {"x-family": str(family)}:
            return family
        case dict():
            return next(filter(None, map(_family, schema.values())), "")
        case list():
            return next(filter(None, map(_family, schema)), "")
    return ""


def reach(roots: set[Name]) -> Reached:
    """The roots and what they name, and so on until nothing new is named."""
    now = Reached(roots, set(roots))
    while True:
        then = Reached(roots, set(now.names), set(now.words))
        for name in now.names:
            if not is_own(name):
                continue
            reader = Reader(name.module)
            reader.visit(now.cut(name, read(name.module).definitions[name.attribute]))
            _refuse_foreign(name, reader.names)
            then.names |= reader.names
            then.words |= reader.words
        if then == now:
            return now
        now = then


def _refuse_foreign(user: Name, names: Iterable[Name]) -> None:
    for name in sorted(names):
        whole = is_own(name) and not name.attribute
        if whole or not (is_own(name) or name.package in ALLOWED):
            why = "import what is used of it by name" if whole else NEEDS
            raise BundleError(f"{user.attribute} of {user.module} needs {name.module}; {why}")


def _refuse_foreign_imports(user: Name, tree: ast.AST) -> None:
    """Of imports in functions, which nobody reads before they are called."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                modules = [alias.name for alias in aliases]
            case ast.ImportFrom(module=module):
                modules = [str(module)]
            case _:
                modules = []
        for name in modules:
            if name.partition(".")[0] not in ALLOWED:
                raise BundleError(f"{user.attribute} of {user.module} needs {name}; {NEEDS}")
