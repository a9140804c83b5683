"""Search over specs: Optuna asks, proxies answer, the budget holds, the controls stand beside."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archdsl.search.run import search

__all__ = ["search"]


class _CallableModule(ModuleType):
    """``archdsl.search(...)`` is the verb, although importing this package takes that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from archdsl.search.run import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


def __getattr__(name: str) -> Any:
    if name == "search":
        from archdsl.search.run import search

        return search
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
