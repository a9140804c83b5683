"""What blocks need of memory in a training step, in closed form.

A pass keeps tensors for the backward pass: those are counted one by one, as autograd saves them on
a CPU in float32. Single numbers are not counted. What the whole model needs is in footprint.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

FLOAT, LONG = 4, 8  # bytes

# that the loss holds at a time. On a CPU head and loss then take 0.6-0.8 x the time that they take
# on all at once, from 2,000 tokens on; on CUDA, unmeasured, enough for large matrix products
LOGITS = {"cpu": 2**22, "cuda": 2**25}

Angles = tuple[float, object, int]  # theta, scaling, head size


class Rows(NamedTuple):
    """What a block runs on: ``batch`` sequences, or what a router selected of each.

    ``keys``: tokens that attention looks at; more than ``tokens`` where a routed step reads the
    first pass's keys and values, which then need no projection (``projects`` is False).
    ``selected``: whether a router did, so that each row has positions of its own. ``padded``:
    whether some of them only fill up a row.
    """

    dim: int
    batch: int
    tokens: int
    keys: int
    projects: bool = True
    selected: bool = False
    padded: bool = False

    def floats(self, width: int = 1) -> int:
        """Bytes of [B, T, width]."""
        return FLOAT * self.batch * self.tokens * width

    @property
    def stream(self) -> int:
        """Bytes of [B, T, D]."""
        return self.floats(self.dim)

    @property
    def indices(self) -> int:
        """Bytes of [B, T], counting numbers."""
        return LONG * self.batch * self.tokens

    def routed(self, tokens: int, shared: bool, padded: bool) -> Rows:
        """What a router selects of these."""
        keys = self.keys if shared else tokens
        return Rows(self.dim, self.batch, tokens, keys, not shared, True, padded)

    def tables(self, angles: frozenset[Angles]) -> int:
        """Bytes of cosines and sines of rotary angles, made once for all that is run on these."""
        rows = self.batch if self.selected else 1
        return sum(2 * FLOAT * rows * self.tokens * head_size for _, _, head_size in angles)


class Footprint(NamedTuple):
    """Bytes that a block needs in a training step.

    ``kept``: what a pass makes and keeps for the backward pass, its output not counted.
    ``reads``: whether the input is kept as well; whoever passes it on counts it.
    ``work``: the most that the backward pass needs besides, with all that is kept still there.
    ``angles``: rotary angles whose tables it shares with all that is run on the same rows.
    """

    kept: int = 0
    reads: bool = True
    work: int = 0
    angles: frozenset[Angles] = frozenset()

    def plus(self, kept: int) -> Footprint:
        return self._replace(kept=self.kept + kept)

    def recomputed(self) -> Footprint:
        """The same under activation checkpointing: the input alone is kept."""
        return Footprint(0, True, self.kept + self.work, self.angles)


def in_a_row(stream: int, parts: Sequence[Footprint]) -> Footprint:
    """Each runs on what the one before has made, ``stream`` bytes."""
    kept = stream * sum(part.reads for part in parts[1:]) + sum(part.kept for part in parts)
    freed = work = 0
    for part in reversed(parts):
        work = max(work, part.work - freed)
        freed += part.kept + stream * part.reads
    angles = frozenset(chain.from_iterable(part.angles for part in parts))
    return Footprint(kept, parts[0].reads, work, angles)
