"""The kinds that a spec can name, by family: ``kinds("router")["top_k"]`` is its spec class.

A spec class registers itself when it is defined. The blocks of archdsl are imported when a kind is
first asked for, so that nothing below this module has to know them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archdsl.lang.spec import Part

_families: dict[str, dict[str, type[Part]]] = {}
_complete = False


def register(family: str, kind: str, spec: type[Part]) -> None:
    """Makes ``kind`` known in its family. Raises TypeError if another class has that name."""
    known = _families.setdefault(family, {})
    if kind in known:
        raise TypeError(f"{family} {kind!r} is already defined in {known[kind].__module__}")
    known[kind] = spec


def families() -> Mapping[str, Mapping[str, type[Part]]]:
    """Every family with its kinds."""
    global _complete
    if not _complete:
        _complete = True  # before the import, which may ask for kinds itself
        importlib.import_module("archdsl.blocks")
    return _families


def kinds(family: str) -> Mapping[str, type[Part]]:
    """The spec classes of a family by the name of their kind; empty for an unknown family."""
    return families().get(family, {})
