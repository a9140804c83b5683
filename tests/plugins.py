"""A registry of kinds for one test, and the source of a small plugin."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from archdsl.lang import registry

PLUGIN = """
from typing import ClassVar, Literal
from archdsl.costs.activations import Footprint
from archdsl.lang.spec import BlockSpec

class NothingSpec(BlockSpec):
    "Does nothing."
    example: ClassVar = {{"kind": "{kind}"}}
    kind: Literal["{kind}"] = "{kind}"

    def cost(self, bill):
        pass

    def footprint(self, rows):
        return Footprint(reads=False)
"""
SPEC = "name: m\nvocab_size: 11\ncontext: 16\ndim: 8\nblocks: [{kind: KIND}]\n"


@contextmanager
def registry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has asked for a kind yet; what is imported meanwhile is forgotten afterwards."""
    known = {family: dict(parts) for family, parts in registry.families().items()}
    monkeypatch.setattr(registry, "_families", known)
    monkeypatch.setattr(registry, "_complete", False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    yield
    for kinds in known.values():
        for spec in kinds.values():
            if not spec.__module__.startswith("archdsl."):
                sys.modules.pop(spec.__module__, None)
