"""Search over specs: sample trials, score small proxies of them, report the best under a budget.

``archdsl.search(...)`` is the function `archdsl.search.run.search`, described below as ``search``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inspect import Signature

    from archdsl.search.run import search

__all__ = ["search"]


class _Function(ModuleType):
    """Lets ``archdsl.search`` be a function and a package: Python gives a package the name that the
    function has in ``archdsl``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.search(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        import inspect

        return inspect.signature(self.search)


sys.modules[__name__].__class__ = _Function


def __getattr__(name: str) -> Any:
    if name == "search":
        from archdsl.search.run import search

        return search
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "search"]
