"""What torch got after the oldest version that archdsl supports is not used.

These tests take it away from whatever torch is installed. `.ci/torch` runs the other tests on a
version that really is old.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import archdsl
from archdsl.nn.block import Context
from archdsl.testing import small_model
from archdsl.training.trainer import Trainer
from benchmarks.memory import training

ROOT = Path(__file__).parents[1]
NEWER: list[tuple[Any, str]] = [
    (functional, "linear_cross_entropy"),
    (nn, "LinearCrossEntropyOptions"),
    (nn, "LinearCrossEntropyLoss"),
    (torch.accelerator, "Graph"),
    (torch.accelerator, "random"),
    (torch.compiler, "nonstrict_trace"),
    (torch.linalg, "polar"),
]


def compile_of_2_11(
    model: Callable[..., Any],
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    backend: str = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    disable: bool = False,
) -> Callable[..., Any]:
    """Takes the arguments that torch.compile had, and compiles nothing."""
    return model


def test_the_lowest_version_is_the_one_that_these_tests_are_about() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=2.11" in project["dependencies"]


def test_a_routed_model_trains_without_what_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in NEWER:
        monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setattr(torch, "compile", compile_of_2_11)
    layer = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
    loop = {"kind": "loop", "steps": 2, "router": "prefix", "body": layer}
    trainer: Trainer = training(small_model(layer, loop, context=16), 2, compile=True)
    trainer.run(2)
    assert trainer.step == 2
    archdsl.evaluate(trainer.model, trainer.data, limit_tokens=32)


def test_no_default_of_the_context_is_a_dataclass() -> None:
    """The compiler of torch 2.11 cannot read such a default."""
    assert not any(is_dataclass(field.default) for field in fields(Context))
