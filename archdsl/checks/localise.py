"""Finds the block where a failure originates, and the step of a loop in which it begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from archdsl.checks.invariants import LEAKS, MEASURES, Kind, Plan, Subject
from archdsl.lang.spec import Part
from archdsl.model.language_model import LanguageModel
from archdsl.model.parts import walk
from archdsl.nn.block import Block
from archdsl.nn.loop import Loop, Router, selecting_causally

WHOLE = "model"


class Place(NamedTuple):
    """A block of a model, with its spec and its place in the spec of the model."""

    path: str
    spec: Part
    block: Block


def places(model: LanguageModel) -> Iterator[Place]:
    """Every block with its place in the spec, outer blocks first. Copies have the same place."""
    for path, spec, module in walk(model.spec, model):
        if isinstance(module, Block):
            yield Place(".".join(map(str, path)), spec, module)


def origins_of(failing: list[Subject], kind: Kind, plan: Plan) -> Iterator[tuple[str, int | None]]:
    """The failing places where the fault originates, each with the step if it is a loop.

    A block is one if no block inside it fails, or if its own router sees later tokens.
    """
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
    """The first pass of a loop that fails while the routers inside its body select causally."""
    loop = subject.block
    if not isinstance(loop, Loop):
        return None
    passes = loop.passes
    within = [
        router
        for router in loop.modules()
        if isinstance(router, Router) and router is not loop.router
    ]
    with selecting_causally(within):
        try:
            for step in range(1, len(passes) + 1):
                loop.passes = passes[:step]
                if not MEASURES[kind](subject, plan).holds:
                    return step
            return None
        finally:
            loop.passes = passes


def _sees_ahead(block: Block, step: int) -> bool:
    return isinstance(block, Loop) and leaks(block) and block.passes[step - 1].routed is not None


def leaks(loop: Loop) -> bool:
    """Whether the router of the loop looks at later tokens."""
    return loop.router is not None and loop.router.leaks


def earlier(step: int | None, other: int | None) -> int | None:
    """The smaller of two steps, either of which may be missing."""
    return min(filter(None, (step, other)), default=None)
