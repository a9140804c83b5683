"""Language models that think with dynamic depth: written as data, costed, trained and searched.

Verbs, imported when first used:

>>> import archdsl
>>> spec = archdsl.load("tiny")
>>> archdsl.cost(spec).params
127744
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archdsl.build import build
    from archdsl.check import check
    from archdsl.cost import cost
    from archdsl.data import load_data
    from archdsl.evaluate import evaluate
    from archdsl.generate import generate
    from archdsl.load import load
    from archdsl.search import search
    from archdsl.train import train

__version__ = "0.1.0"
__all__ = ["build", "check", "cost", "evaluate", "generate", "load", "load_data", "search", "train"]


def __getattr__(name: str) -> Any:
    if name == "load_data":
        return importlib.import_module("archdsl.data").load_data
    if name in __all__:
        return importlib.import_module(f"archdsl.{name}")  # see archdsl.verbs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
