"""What a training step needs of memory, in closed form.

Weights and AdamW's two moments are always there. A pass leaves what it keeps for the backward pass,
which gives that back layer by layer and leaves gradients instead. So most is needed either where it
begins, at the head and the loss, or at some layer further down, or where it ends.

Counted for float32 on a CPU, and held against what its allocator counts (benchmarks/memory.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archdsl.blocks.norm import norm_footprint, norm_size
from archdsl.costs.activations import FLOAT, LOGITS, Footprint, Rows, in_a_row
from archdsl.costs.receipt import TRAIN_BYTES, block_cost, sequence_cost
from archdsl.lang.spec import ModelSpec

if TYPE_CHECKING:
    from archdsl.training.config import TrainConfig


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step at the time when it needs most.

    ``optimizer``: AdamW's two moments. ``gradients``: those there are at that time.
    ``activations``: all else, the logits included that exist at a time.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.activations


def training_memory(
    spec: ModelSpec,
    batch_size: int = 1,
    context: int | None = None,
    *,
    accumulate: int = 1,
    checkpointed: bool = False,
) -> TrainingMemory:
    """What a step on ``batch_size`` sequences of ``context`` tokens (default: the spec's) needs.

    ``accumulate``: parts that the batch is cut into. ``checkpointed``: each layer is recomputed in
    the backward pass.

    >>> import archdsl
    >>> f"{training_memory(archdsl.load('transformer')).peak / 1e9:.1f} GB"
    '4.9 GB'
    """
    rows = full_batch(spec, batch_size // accumulate, context)
    weights = TRAIN_BYTES * sequence_cost(spec, tokens=1).params
    parts = _parts(spec, rows, checkpointed)
    alive = _saved_for_backward(rows, parts)
    before = weights if accumulate > 1 else 0  # gradients of the parts before this one
    gradients, waiting = 0, parts[-1][1]  # to be added to those: the head's, made with the loss
    moments = []
    for part, own in reversed(parts):
        gradients += own
        moments.append((before + waiting if before else gradients, alive + part.work))
        alive -= part.kept + rows.stream * part.reads
        waiting *= spec.tie_embeddings
    return TrainingMemory(weights, 2 * weights, *max(moments, key=sum))


def shortage(spec: ModelSpec, config: TrainConfig) -> str | None:
    """What to say where a training in float32 on a CPU needs more than this machine has."""
    size, parts = config.batch_size, config.accumulate
    checkpointed = config.activation_checkpointing
    need = training_memory(
        spec, size, config.context, accumulate=parts, checkpointed=checkpointed
    ).peak
    have = installed_memory()
    if need <= have:
        return None
    return (
        f"{spec.name}: a step needs about {need / 2**30:,.1f} GiB and this machine has "
        f"{have / 2**30:,.1f} GiB; less with a smaller --batch-size (now {size}), "
        f"a larger --accumulate (now {parts}) or --activation-checkpointing"
    )


def installed_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def full_batch(spec: ModelSpec, batch_size: int, context: int | None = None) -> Rows:
    """The batch that a model is given."""
    T = context or spec.context
    return Rows(spec.dim, batch_size, T, T)


def saved_for_backward(spec: ModelSpec, rows: Rows, checkpointed: bool = False) -> int:
    """Bytes that the pass from tokens to logits keeps, the logits not counted."""
    return _saved_for_backward(rows, _parts(spec, rows, checkpointed))


def _saved_for_backward(rows: Rows, parts: list[tuple[Footprint, int]]) -> int:
    model = in_a_row(rows.stream, [part for part, _ in parts])
    return model.kept + rows.tables(model.angles)


def _parts(spec: ModelSpec, rows: Rows, checkpointed: bool) -> list[tuple[Footprint, int]]:
    """Embedding, layers, norm and head, each with the bytes of the gradients that it leaves."""
    layers = [layer for block in spec.blocks for layer in block.unrolled()]
    footprints = [layer.footprint(rows) for layer in layers]
    if checkpointed:
        footprints = [footprint.recomputed() for footprint in footprints]
    costs = [block_cost(layer, rows.dim, rows.tokens) for layer in layers]
    table, tied = TRAIN_BYTES * rows.dim * spec.vocab_size, spec.tie_embeddings
    # a table of both has two gradients, until they are added up
    embedding = Footprint(rows.indices, reads=False, work=rows.stream + tied * table)
    return [
        (embedding, 0 if tied else table),
        *((part, TRAIN_BYTES * cost.params) for part, cost in zip(footprints, costs, strict=True)),
        (norm_footprint(spec.norm, rows), TRAIN_BYTES * norm_size(spec.norm, rows.dim)),
        (_loss_footprint(spec, rows), table),
    ]


def _loss_footprint(spec: ModelSpec, rows: Rows) -> Footprint:
    """Head and loss at once: only some logits exist at a time, and the gradients are made there.

    Besides: the rows of the head that the targets ask for, the gradient of what the head reads,
    and numbers of each token: its target twice, its weight, whether it is asked for.
    """
    N = rows.batch * rows.tokens
    at_once = min(N, max(1, LOGITS["cpu"] // spec.vocab_size))
    logits = FLOAT * at_once * (spec.vocab_size + rows.dim + 2)  # also their maximum and sum
    return Footprint(work=logits + rows.stream + 2 * rows.indices + rows.floats() + N)
