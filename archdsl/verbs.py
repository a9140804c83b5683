"""Modules that can be called: `archdsl.cost(spec)` is `archdsl.cost.cost(spec)`.

A submodule takes its own name in the package whenever anybody imports it, so a function of the
same name would vanish; the module answers to the call itself.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class Verb(ModuleType):
    """A module whose call is that of the function it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def callable_by_name(module: str) -> None:
    sys.modules[module].__class__ = Verb
