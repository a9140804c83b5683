"""Which block a failure comes from, and with which of its steps it begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.modules.loop import Loop
from archdsl.blocks.modules.stack import Stack
from archdsl.blocks.modules.threshold import TopK
from archdsl.blocks.stack import StackSpec
from archdsl.checks.invariants import LEAKS, MEASURES, Kind, Plan, Subject
from archdsl.lang.spec import BlockSpec, children
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Block

WHOLE = "model"


class Place(NamedTuple):
    path: str
    spec: BlockSpec
    block: Block


def places(model: LanguageModel) -> Iterator[Place]:
    """Every block with its place in the spec, outer ones first; copies have the same place."""
    for i, (spec, block) in enumerate(zip(model.spec.blocks, model.blocks, strict=True)):
        yield from _places(f"blocks.{i}", spec, block)


def _places(path: str, spec: BlockSpec, block: nn.Module) -> Iterator[Place]:
    if isinstance(spec, LoopSpec) and spec.is_body:
        yield from _places(f"{path}.body", spec.body, block)
        return
    assert isinstance(block, Block)
    yield Place(path, spec, block)
    if isinstance(block, Loop):
        for body in block.bodies:
            yield from _places(f"{path}.body", block.spec.body, body)
    elif isinstance(spec, StackSpec) and isinstance(block, Stack):
        for i, one in enumerate(block.blocks):
            at = i % len(spec.body)
            yield from _places(f"{path}.body.{at}", spec.body[at], one)
    else:
        for (name, *_), part in children(spec):
            if isinstance(part, BlockSpec):
                yield from _places(f"{path}.{name}", part, getattr(block, str(name)))


def origins_of(failing: list[Subject], kind: Kind, plan: Plan) -> Iterator[tuple[str, int | None]]:
    """Of what fails, that which fails by itself: nothing within it does, or its router leaks."""
    blocks = {subject.block for subject in failing if subject.block is not None}
    for subject in failing:
        if subject.block is None:
            continue
        inner = blocks.intersection(subject.block.modules()) - {subject.block}
        step = _first_step(subject, kind, plan)
        if not inner or (kind in LEAKS and step and _sees_ahead(subject.block, step)):
            yield subject.place, step
    if failing and not blocks:
        yield WHOLE, None


def _first_step(subject: Subject, kind: Kind, plan: Plan) -> int | None:
    """The first pass of a loop that fails while the routers within its body do not leak."""
    loop = subject.block
    if not isinstance(loop, Loop):
        return None
    passes = loop.passes
    within = [router for router in loop.bodies.modules() if isinstance(router, TopK)]
    try:
        for router in within:
            router.causal = True
        for step in range(1, len(passes) + 1):
            loop.passes = passes[:step]
            if not MEASURES[kind](subject, plan).holds:
                return step
        return None
    finally:
        loop.passes = passes
        for router in within:
            router.causal = False


def _sees_ahead(block: Block, step: int) -> bool:
    return isinstance(block, Loop) and leaks(block) and block.passes[step - 1].routed is not None


def leaks(loop: Loop) -> bool:
    return loop.router is not None and loop.router.leaks


def earlier(step: int | None, other: int | None) -> int | None:
    return min(filter(None, (step, other)), default=None)
