"""What a source file of the project defines and imports, and which of it a definition names.

The source of a plugin whose blocks have been loaded counts as the project's own.
"""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from archdsl.lang.registry import plugin_modules


class Name(NamedTuple):
    """What a name stands for: a definition of the project, or what an import gives."""

    module: str
    attribute: str  # empty: the module itself

    @property
    def package(self) -> str:
        """The first part of the name of the module."""
        return self.module.partition(".")[0]


NODE = Name("archdsl.interop.plain_spec", "Node")
REPLACED = dict.fromkeys(
    [Name("archdsl.lang.strict", "Strict"), Name("archdsl.lang.spec", "Part")], NODE
)


def is_own(name: Name) -> bool:
    """Whether a name is of the project, or of a package whose blocks it has loaded."""
    return name.package in {"archdsl", *(module.partition(".")[0] for module in plugin_modules())}


@dataclass
class Module:
    """The top level of a source file, without what is there for type checkers alone.

    ``later``: what functions import by name when they are called.
    """

    name: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, Name] = field(default_factory=dict)
    later: dict[str, Name] = field(default_factory=dict)


@cache
def read(name: str) -> Module:
    """The source file of a module that can be imported."""
    module, there = Module(name), importlib.import_module(name)
    package = there.__package__ or name
    tree = ast.parse(inspect.getsource(there))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for inner in function.body:
                if isinstance(inner, ast.ImportFrom):
                    module.later |= imported(inner, package)
    for node in tree.body:
        match node:
            case ast.ClassDef(name=defined) | ast.FunctionDef(name=defined):
                module.definitions[defined] = node
            case ast.Assign() | ast.AnnAssign():
                module.definitions |= dict.fromkeys(sorted(stored(node)), node)
            case ast.Import(names=aliases):
                for alias in aliases:
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    module.imports[alias.asname or whole] = Name(whole, "")
            case ast.ImportFrom(module=origin) if origin != "__future__":
                module.imports |= imported(node, package)
    return module


def imported(node: ast.ImportFrom, package: str) -> dict[str, Name]:
    """What ``from ... import ...`` gives in a module of ``package``."""
    origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    return {alias.asname or alias.name: Name(origin, alias.name) for alias in node.names}


def resolve(module: str, name: str) -> Name | None:
    """What a global name of ``module`` stands for; None for a builtin or an unknown name."""
    source = read(module)
    if name in source.definitions:
        found = Name(module, name)
        return REPLACED.get(found, found)
    target = source.imports.get(name) or source.later.get(name)
    if target is not None and is_own(target) and target.attribute:
        inner = f"{target.module}.{target.attribute}"
        return Name(inner, "") if inner in sys.modules else resolve(*target)
    return target


def stored(statement: ast.Assign | ast.AnnAssign) -> set[str]:
    """The names that an assignment gives a value."""
    assigned = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return {node.id for one in assigned for node in ast.walk(one) if isinstance(node, ast.Name)}


class Scoped(ast.NodeTransformer):
    """Meets the global names of a definition, one function or method after the other."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.local: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Visits a function, inside which its parameters and variables hide global names."""
        outer, self.local = self.local, self.local | _bound(node)
        try:
            return self.generic_visit(node)
        finally:
            self.local = outer

    def meaning(self, node: ast.Name) -> Name | None:
        """What a name stands for here; None for a local or an unknown name."""
        return None if node.id in self.local else resolve(self.module, node.id)


class Reader(Scoped):
    """Collects what a definition names; what is only an annotation does not count."""

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.names: set[Name] = set()
        self.words: set[str] = set()

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """Notes what the name stands for."""
        if meaning := self.meaning(node):
            self.names.add(meaning)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Notes the word after the dot, and what stands before it."""
        self.words.add(node.attr)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """Leaves out the annotation of a parameter."""
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        """Reads the value of an assignment without its annotation."""
        if node.value is not None:
            self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Reads a function without the annotation of its result."""
        bare = copy.copy(node)
        bare.returns = None
        super().visit_FunctionDef(bare)
        return node


class Writer(Scoped):
    """Gives global names the name they have in the file; drops annotations that name others, and
    imports of the project in functions."""

    def __init__(self, module: str, written: dict[Name, str]) -> None:
        super().__init__(module)
        self.written = written

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """Gives a global name the name that it has in the file."""
        meaning = self.meaning(node)
        if meaning in self.written:
            node.id = self.written[meaning]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Drops imports of what the file holds, and an annotation that names what it does not."""
        if node.returns is not None and not self._known(node.returns):
            node.returns = None
        node.body = [one for one in node.body if not self._is_own_import(one)] or [ast.Pass()]
        return super().visit_FunctionDef(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """Drops an annotation that names what is not in the file."""
        if node.annotation is not None and not self._known(node.annotation):
            node.annotation = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Puts ``object`` in place of an annotation that names what is not in the file."""
        if not self._known(node.annotation):
            node.annotation = ast.Name("object")
        return self.generic_visit(node)

    def _is_own_import(self, node: ast.stmt) -> bool:
        if not isinstance(node, ast.ImportFrom):
            return False
        package = sys.modules[self.module].__package__ or self.module
        return all(map(is_own, imported(node, package).values()))

    def _known(self, annotation: ast.expr) -> bool:
        names = [node for node in ast.walk(annotation) if isinstance(node, ast.Name)]
        return all(
            self.meaning(name) in self.written or name.id in vars(builtins) for name in names
        )


def _bound(function: ast.FunctionDef) -> set[str]:
    """The names that are local somewhere in a function."""
    bound: set[str] = set()
    for node in ast.walk(function):
        match node:
            case ast.Name(id=str(name), ctx=ast.Store()) | ast.arg(arg=str(name)):
                bound.add(name)
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchMapping(rest=str(name)):
                bound.add(name)
            case ast.FunctionDef(name=str(name)) if node is not function:
                bound.add(name)
    return bound
