"""The kinds that a spec can name, by family: ``kinds("router")["top_k"]`` is its spec class.

A spec class registers itself when it is defined. The blocks of archdsl and those of plugins are
imported when a kind is first asked for, so that nothing below this module has to know them.

A plugin is a Python module that defines kinds. There are two ways to load one, and both are
decisions of the user who runs archdsl; a spec, a checkpoint or a study never imports code:

- an installed package names the module as an entry point of the group ``archdsl.blocks``;
- ``archdsl --plugin package.module`` or the environment variable ``ARCHDSL_PLUGINS``, which holds
  module names with commas between them and so reaches the worker processes of a search.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from archdsl.errors import ArchdslError

if TYPE_CHECKING:
    from archdsl.lang.spec import Part

GROUP = "archdsl.blocks"
VARIABLE = "ARCHDSL_PLUGINS"

_families: dict[str, dict[str, type[Part]]] = {}
_complete = False


class PluginError(ArchdslError):
    """A plugin that cannot be imported, defines no kind, or one that exists already."""

    exit_status = 2


def register(family: str, kind: str, spec: type[Part]) -> None:
    """Makes ``kind`` known in its family.

    A class takes the place of an older one that has the same module and name, so that a module
    can be reloaded and a cell of a notebook run again. Raises TypeError if another class has that
    kind.
    """
    known = _families.setdefault(family, {})
    older = known.get(kind, spec)
    if (older.__module__, older.__qualname__) != (spec.__module__, spec.__qualname__):
        raise TypeError(f"{family} {kind!r} is already defined in {older.__module__}")
    known[kind] = spec


def families() -> Mapping[str, Mapping[str, type[Part]]]:
    """Every family with its kinds. Raises PluginError if a plugin cannot be loaded."""
    global _complete
    if not _complete:
        _complete = True  # before the imports, which may ask for kinds themselves
        try:
            importlib.import_module("archdsl.blocks")
            for module, name, remedy in _plugins():
                _import(module, name, remedy)
        except BaseException:
            _complete = False  # who asks again gets the same error
            raise
    return _families


def kinds(family: str) -> Mapping[str, type[Part]]:
    """The spec classes of a family by the name of their kind; empty for an unknown family.

    Raises PluginError if a plugin cannot be loaded.
    """
    return families().get(family, {})


def load_plugin(module: str) -> None:
    """Imports the plugin ``module``, here and in every process that this one starts from now on.

    The module may also stand in the working directory. Raises PluginError if the name is empty, or
    if the module cannot be imported or defines no kind.
    """
    if not module.strip(" ,"):
        raise PluginError("--plugin needs the name of a Python module, such as my_blocks; got ''")
    for name in filter(None, map(str.strip, module.split(","))):  # as in the variable
        chosen = _chosen()
        if name not in chosen:
            os.environ[VARIABLE] = ",".join([*chosen, name])
        if _complete:  # otherwise it is imported when a kind is first asked for
            _import(name, *_named(name))


def modules_of(specs: Iterable[type[Part]]) -> list[str]:
    """The modules outside archdsl that define these kinds, sorted."""
    modules = {spec.__module__ for spec in specs}
    return sorted(module for module in modules if module.partition(".")[0] != "archdsl")


def plugin_modules() -> list[str]:
    """The modules outside archdsl that have defined a kind, sorted."""
    return modules_of(spec for known in families().values() for spec in known.values())


def how_to_load() -> str:
    """What to add to the message that a kind is unknown."""
    loaded = ", ".join(plugin_modules()) or "none"
    return (
        "a kind of another package needs that package installed, or --plugin PACKAGE.MODULE "
        f"(plugins loaded: {loaded})"
    )


def _plugins() -> Iterator[tuple[str, str, str]]:
    """For each plugin its module, what to call it and what to do if it is broken."""
    from importlib import metadata  # slow to import, and no help needs it

    for entry in sorted(metadata.entry_points(group=GROUP)):
        name = entry.dist.name if entry.dist else entry.name
        version = f" {entry.dist.version}" if entry.dist else ""
        yield (
            entry.module,
            f"{entry.name!r} of the installed package {name}{version}",
            f"update or repair that package, or remove it: pip uninstall {name}",
        )
    for module in _chosen():
        yield module, *_named(module)


def _chosen() -> list[str]:
    """The modules that the environment variable names."""
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def _named(module: str) -> tuple[str, str]:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: it hides no installed module
    return (
        f"{module!r} (named by --plugin or {VARIABLE})",
        "it must be a module of an installed package or of the working directory, and "
        "importing it must raise no error",
    )


def _import(module: str, name: str, remedy: str) -> None:
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"cannot import the plugin {name}: {reason}; {remedy}") from error
    if not _has_kinds(module):
        raise PluginError(
            f"the plugin {name} defines no kind of block or of another part. A plugin is a module "
            "that defines a subclass of BlockSpec with a field `kind`, or imports one: see "
            "docs/extending.md"
        )


def _has_kinds(module: str) -> bool:
    """Whether a kind is defined in the package of the module, or in one that the module imports."""
    known = modules_of(spec for kinds in _families.values() for spec in kinds.values())
    packages = {name.partition(".")[0] for name in known}
    there = sys.modules[module]
    imported = (
        value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        for value in vars(there).values()
    )
    used = {module, *(name for name in imported if isinstance(name, str))}
    return any(name.partition(".")[0] in packages for name in used)
