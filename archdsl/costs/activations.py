"""The memory that blocks need in a training step, in closed form.

The tensors that the forward pass saves for the backward pass are counted one by one, as autograd
saves them on a CPU in float32. Scalars are not counted. `archdsl.reports.training_memory` computes
the memory of a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

FLOAT, LONG = 4, 8  # bytes

LOGITS = {"cpu": 2**22}
LOGITS_ON_A_CARD = 2**26


def logits_at_once(device: str) -> int:
    """Returns how many logits the loss computes at a time on a type of device.

    On a CPU and from 2,000 tokens on, head and loss then take 0.6 to 0.8 of the time of computing
    all logits at once. The number for other devices is large enough for efficient products.
    """
    return LOGITS.get(device, LOGITS_ON_A_CARD)


Angles = tuple[float, object, int]  # theta, scaling, head size


class Rows(NamedTuple):
    """The input of a block: ``batch`` rows of ``tokens`` tokens of width ``dim``.

    ``keys``: the number of keys that attention attends to. It is larger than ``tokens`` if a pass
    of a loop uses keys and values of passes before. ``kv``: which, as the loop says; own: those of
    these tokens. ``projects``: whether the block makes keys and values, which it does not if it
    uses those of the first pass alone. ``selected``: whether a router selected the tokens, so that
    each row has its own positions. ``by_row``: whether the keys that a token may see differ between
    rows. ``padded``: whether some tokens are padding. ``rank``: that of the low-rank differences
    which the loop around adds to matrices. ``backprop_last``: the last passes of a loop that get a
    gradient; None: all of them. ``keeps_states``: whether the state after each pass is kept, which
    a loss of its own does. ``router_losses``: how many float tensors [B, T] the losses of a router
    keep.
    """

    dim: int
    batch: int
    tokens: int
    keys: int
    projects: bool = True
    selected: bool = False
    padded: bool = False
    kv: str = "own"
    by_row: bool = False
    rank: int = 0
    backprop_last: int | None = None
    keeps_states: bool = False
    router_losses: int = 0

    def of_keys(self, width: int) -> int:
        """Returns the bytes of a float tensor [B, S, width] for the S tokens attended to."""
        return FLOAT * self.batch * self.keys * width

    @property
    def mask(self) -> int:
        """Returns the bytes of a mask of the padding, [B, T]; 0 if there is none."""
        return self.batch * self.tokens * self.padded

    def floats(self, width: int = 1) -> int:
        """Returns the bytes of a float tensor [B, T, width]."""
        return FLOAT * self.batch * self.tokens * width

    @property
    def stream(self) -> int:
        """The bytes of a float tensor [B, T, D]."""
        return self.floats(self.dim)

    @property
    def indices(self) -> int:
        """The bytes of an int64 tensor [B, T]."""
        return LONG * self.batch * self.tokens

    def routed(self, tokens: int, keys: int, kv: str, padded: bool) -> Rows:
        """Returns the rows of ``tokens`` tokens that a router selects from these.

        ``keys`` and ``kv``: what they attend to.
        """
        return self._replace(
            tokens=tokens,
            keys=keys,
            projects=kv != "shared",
            selected=True,
            padded=padded,
            kv=kv,
            by_row=kv != "own",
            rank=0,
        )

    def tables(self, angles: frozenset[Angles]) -> int:
        """Returns the bytes of the cosines and sines of rotary angles. All blocks that run on these
        rows share them."""
        rows = self.batch if self.selected else 1
        return sum(2 * FLOAT * rows * self.tokens * head_size for _, _, head_size in angles)


class Footprint(NamedTuple):
    """The memory in bytes that a block needs in a training step.

    ``kept``: the tensors that the block makes and saves for the backward pass, without its output.
    ``reads``: whether its input is saved as well; the input is counted by the block that makes it.
    ``work``: the largest additional memory of the backward pass while all saved tensors still
    exist. ``angles``: the rotary angles, whose tables all blocks on the same rows share.
    """

    kept: int = 0
    reads: bool = True
    work: int = 0
    angles: frozenset[Angles] = frozenset()

    def plus(self, kept: int) -> Footprint:
        """Returns the footprint with ``kept`` more bytes saved for the backward pass."""
        return self._replace(kept=self.kept + kept)

    def recomputed(self) -> Footprint:
        """Returns the footprint with activation checkpointing, which saves only the input."""
        return Footprint(0, True, self.kept + self.work, self.angles)


def in_a_row(stream: int, parts: Sequence[Footprint]) -> Footprint:
    """Returns the footprint of a series of blocks, each with an output of ``stream`` bytes."""
    kept = stream * sum(part.reads for part in parts[1:]) + sum(part.kept for part in parts)
    freed = work = 0
    for part in reversed(parts):
        work = max(work, part.work - freed)
        freed += part.kept + stream * part.reads
    angles = frozenset(chain.from_iterable(part.angles for part in parts))
    return Footprint(kept, parts[0].reads, work, angles)
