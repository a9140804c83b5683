"""Language models that think with dynamic depth: write them as data, count their cost, train and
search them.

The functions of this package are imported when they are first used. `help(archdsl.load)` describes
one of them; ``archdsl.load`` is where most programs begin:

>>> import archdsl
>>> spec = archdsl.load("tiny")
>>> archdsl.cost(spec).params
127744
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archdsl.checks.check import check
    from archdsl.data.loading import load_data
    from archdsl.evaluation.evaluate import evaluate
    from archdsl.evaluation.gradients import gradients
    from archdsl.generation.generate import generate
    from archdsl.lang.load import load
    from archdsl.model.build import build
    from archdsl.reports.notebook import cost
    from archdsl.search.compare import compare
    from archdsl.search.run import search
    from archdsl.training.run import train

__version__ = "0.1.0"
__all__ = [
    "build",
    "check",
    "compare",
    "cost",
    "evaluate",
    "generate",
    "gradients",
    "load",
    "load_data",
    "search",
    "train",
]

_FUNCTIONS = {
    "build": "archdsl.model.build",
    "check": "archdsl.checks.check",
    "compare": "archdsl.search.compare",
    "cost": "archdsl.reports.notebook",
    "evaluate": "archdsl.evaluation.evaluate",
    "generate": "archdsl.generation.generate",
    "gradients": "archdsl.evaluation.gradients",
    "load": "archdsl.lang.load",
    "load_data": "archdsl.data.loading",
    "train": "archdsl.training.run",
}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name == "search":
        return importlib.import_module("archdsl.search")  # this module is the function, too
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
