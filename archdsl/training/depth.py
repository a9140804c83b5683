"""Runs the loops of a model at the depth and the capacities of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from archdsl.data.types import Batch
from archdsl.evaluation.evaluate import evaluation_mode, score_batch
from archdsl.model.language_model import LanguageModel
from archdsl.nn.loop import Loop, Pass


@contextmanager
def at_depth(
    model: LanguageModel,
    steps: int | None,
    backprop_last: int | None = None,
    openness: float = 0.0,
) -> Iterator[None]:
    """Within the block, the loops run ``steps`` passes, the last ``backprop_last`` with a gradient.

    None: the passes that they run now, all of them with a gradient. ``openness``: how far the
    capacities of their routers are moved towards 1. Raises DialError if a loop cannot run so many
    passes.
    """
    before = [loop.passes for loop in model.loops]
    try:
        for loop in model.loops:
            if steps is not None:
                loop.dial(steps=steps)
            if openness and loop.router is not None:
                _open(loop, openness)
            if backprop_last is not None:
                loop.passes = _last_learn(loop.passes, backprop_last)
        yield
    finally:
        for loop, passes in zip(model.loops, before, strict=True):
            loop.passes = passes


def _open(loop: Loop, share: float) -> None:
    further = loop.passes[loop.full_steps :]
    given = [one.routed.capacity if one.routed else 1.0 for one in further]
    loop.dial([c + (1 - c) * share for c in given], len(loop.passes))


def _last_learn(passes: list[Pass], count: int) -> list[Pass]:
    first = len(passes) - count
    return [one._replace(learns=i >= first) for i, one in enumerate(passes)]


def losses_of_steps(model: LanguageModel, batch: Batch, sharded: bool = False) -> list[float]:
    """Return the loss on a batch with the last loop ended after 1, 2, ... of its steps.

    In nats per target. What follows the loop runs as always. Empty if the model has no loop.
    ``sharded``: whether the weights are divided among processes, all of which call this.
    """
    if not model.loops:
        return []
    loop, losses = model.loops[-1], []
    before = loop.passes
    with evaluation_mode(model, sharded):
        try:
            for steps in range(1, len(before) + 1):
                loop.dial(steps=steps)
                nats, targets, _ = score_batch(model, batch).sum(1).tolist()
                losses.append(nats / targets)
        finally:
            loop.passes = before
    return losses
