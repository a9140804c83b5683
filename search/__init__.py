"""Search over specs: Optuna asks, proxies answer, the budget holds, the controls stand beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from archdsl import verbs

if TYPE_CHECKING:
    from archdsl.search.run import search

__all__ = ["search"]

verbs.callable_by_name(__name__)


def __getattr__(name: str) -> Any:
    if name == "search":
        from archdsl.search.run import search

        return search
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
