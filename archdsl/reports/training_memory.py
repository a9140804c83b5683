"""The peak memory of a training step, in closed form.

Weights and the moments of the optimizer are always in memory. The forward pass saves activations
for the backward pass, which frees them layer by layer and adds gradients instead. So the peak is at
the beginning of the backward pass (head and loss), at one of the layers, or at its end.

With sharded weights, see `archdsl.costs.devices`, a device has shards of weights, moments and
reduced gradients, and besides whole weights and gradients of the units that it works on.

The formulas are for float32 on a CPU; benchmarks/memory.py compares them with the allocator.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from archdsl.blocks.norm import norm_footprint, norm_size
from archdsl.costs.activations import FLOAT, LOGITS, Footprint, Rows, in_a_row
from archdsl.costs.devices import ONE, Devices
from archdsl.costs.receipt import TRAIN_BYTES, block_cost, sequence_cost
from archdsl.lang.spec import BlockSpec, ModelSpec

if TYPE_CHECKING:
    from archdsl.training.config import TrainConfig


@dataclass(frozen=True)
class TrainingMemory:
    """The memory in bytes on each device at the peak of a training step.

    ``optimizer``: the two moments of AdamW, or the one of Muon. ``gradients_at_peak``: those that
    exist at the peak, which are at most those of all weights, ``gradient_bytes`` of the receipt.
    ``activations``: everything else, including the part of the logits that exists at one time.
    ``gathered``: whole weights of the units in use, and what is being sent; 0 without shards.
    """

    weights: int
    optimizer: int
    gradients_at_peak: int
    activations: int
    gathered: int = 0

    @property
    def peak(self) -> int:
        """The sum of all parts in bytes."""
        kept = self.weights + self.optimizer + self.gradients_at_peak
        return kept + self.activations + self.gathered


def training_memory(
    spec: ModelSpec,
    batch_size: int = 1,
    context: int | None = None,
    *,
    accumulate: int = 1,
    checkpointed: bool = False,
    optimizer: Literal["adamw", "muon"] = "adamw",
    devices: Devices = ONE,
) -> TrainingMemory:
    """Returns the peak memory of a step on ``batch_size`` sequences of ``context`` tokens.

    ``context``: by default that of the spec. ``accumulate``: the number of parts that the batch is
    divided into. ``checkpointed``: whether each layer is recomputed in the backward pass.
    ``optimizer``: muon keeps one moment of a matrix of a block, adamw keeps two of every parameter.
    ``devices``: those that train; the sequences are those of one of them. If the training of the
    spec draws the depth of its loops, it is the peak at the depth that needs most.

    >>> import archdsl
    >>> f"{training_memory(archdsl.load('transformer')).peak / 1e9:.1f} GB"
    '4.9 GB'
    """
    spec = spec.opened(1.0)  # at the beginning of a schedule of capacities
    runs = _runs(spec, batch_size)
    several = accumulate > 1 or (len(runs) > 1 and _draws_per_sequence(spec) and batch_size > 1)
    at_once = batch_size // accumulate
    shards = _shards(spec, devices)
    needs = [
        _at_depth(
            spec,
            full_batch(spec, min(rows, at_once), context),
            depth,
            several,
            checkpointed,
            shards,
        )
        for depth, rows in runs
    ]
    most = max(needs, key=lambda need: need.peak)
    if optimizer == "muon":
        # for this estimate, the vectors of routers and exits, which are few, count as matrices
        costs = [block_cost(block, spec.dim, 1) for block in spec.blocks]
        saved = TRAIN_BYTES * sum(cost.matrices for cost in costs) // devices.shards
        most = replace(most, optimizer=most.optimizer - saved)
    return most


class _Shards(NamedTuple):
    """The bytes of shards and of whole units on a device. ``weights``: of its shards.

    The others have a value for each of the parts of `_parts`. ``gathered``: whole weights, and what
    is being sent, when the backward pass is at the part. ``freed``: how much smaller the gradients
    of the part are from the next part on, as they are then reduced and scattered.
    """

    weights: int
    gathered: Sequence[int]
    freed: Sequence[int]


def _shards(spec: ModelSpec, devices: Devices) -> _Shards:
    around = 2 + spec.final_norm  # embedding, norm and head
    if devices.shards == 1:
        nothing = [0] * (around + sum(len(block.unrolled()) for block in spec.blocks))
        return _Shards(TRAIN_BYTES * sequence_cost(spec, tokens=1).params, nothing, nothing)
    from archdsl.reports.units import units  # needs torch

    found, n = units(spec), devices.shards
    layers, root, _ = found
    whole = [layer.gathered(n) for layer in layers]
    # The layer, the one gathered next, and the gradients of the one before, which are being sent.
    # At head and loss it is the last layer that was gathered; at the end the root is sent.
    near = [sum(whole[max(0, i - 1) : i + 2]) for i in range(len(whole))]
    before = [whole[0] + root.gathered(n), *near, *[whole[-1]] * (around - 1)]
    freed = [layer.whole - layer.shard(n) for layer in layers]
    return _Shards(
        found.shard(n),
        [root.gathered(n) + size for size in before],
        [0, *freed, *[0] * (around - 1)],
    )


def _runs(spec: ModelSpec, batch_size: int) -> list[tuple[int | None, int]]:
    """Returns each depth that training draws, and the most sequences of a batch that get it.

    None stands for the depth in use, where training draws none.
    """
    depths = Counter(spec.training_depths)
    if not depths:
        return [(None, batch_size)]
    if not _draws_per_sequence(spec):
        return [(depth, batch_size) for depth in depths]
    return [(depth, -(-batch_size * n // depths.total())) for depth, n in depths.items()]


def passes_of_step(spec: ModelSpec, batch_size: int, accumulate: int = 1) -> int:
    """Returns the number of forward and backward passes of a step on ``batch_size`` sequences.

    There is one for each of the ``accumulate`` parts of the batch. Where each sequence draws its
    own depth, there is at least one for each depth, and the number is the most that there can be.
    """
    if not _draws_per_sequence(spec):
        return accumulate
    at_once = batch_size // accumulate
    return min(batch_size, sum(-(-rows // at_once) for _, rows in _runs(spec, batch_size)))


def _draws_per_sequence(spec: ModelSpec) -> bool:
    return spec.depth_law is not None and spec.depth_law.per == "sequence"


def _at_depth(
    spec: ModelSpec,
    rows: Rows,
    depth: int | None,
    several: bool,
    checkpointed: bool,
    shards: _Shards,
) -> TrainingMemory:
    """Returns the peak of a pass at a depth. ``several``: whether a step has several passes."""
    law = spec.depth_law
    rows = rows._replace(backprop_last=law.backprop_last if law else None)
    parts = _parts(spec, rows, checkpointed, depth)
    saved = _saved_for_backward(rows, parts)
    # gradients of the passes of this step before this one
    gradients = TRAIN_BYTES * sequence_cost(spec, tokens=1).params if several else 0
    # the gradient of the head is computed with the loss and added to them at the end
    pending = parts[-1][1] if several else 0
    candidates = []
    for (footprint, new), gathered, freed in zip(
        reversed(parts), reversed(shards.gathered), reversed(shards.freed), strict=True
    ):
        gradients += 0 if several else new
        candidates.append((gradients + pending, saved + footprint.work, gathered))
        gradients -= freed
        saved -= footprint.kept + rows.stream * footprint.reads
        pending *= spec.tie_embeddings
    return TrainingMemory(shards.weights, 2 * shards.weights, *max(candidates, key=sum))


def shortage(spec: ModelSpec, config: TrainConfig) -> str | None:
    """Returns a message if training in float32 on a CPU needs more memory than this machine has.

    Returns None if the memory is sufficient.
    """
    size, parts = config.batch_size, config.accumulate
    checkpointed = config.activation_checkpointing
    need = training_memory(
        spec,
        size,
        config.context,
        accumulate=parts,
        checkpointed=checkpointed,
        optimizer=config.optimizer,
    ).peak
    have = installed_memory()
    if need <= have:
        return None
    return (
        f"{spec.name}: a step needs about {need / 2**30:,.1f} GiB and this machine has "
        f"{have / 2**30:,.1f} GiB; use a smaller --batch-size (now {size}), "
        f"a larger --accumulate (now {parts}) or --activation-checkpointing"
    )


def installed_memory() -> int:
    """Returns the size of the memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def full_batch(spec: ModelSpec, batch_size: int, context: int | None = None) -> Rows:
    """Returns the rows of a whole batch, for the footprints of blocks."""
    T = context or spec.context
    return Rows(spec.dim, batch_size, T, T, router_losses=_router_losses(spec))


def _router_losses(spec: ModelSpec) -> int:
    """How many float tensors [B, T] its losses keep: the scores, and for the auxiliary loss what
    was selected."""
    rule = spec.training
    if rule is None or not (rule.router_z_loss or rule.router_aux_loss):
        return 0
    return 2 if rule.router_aux_loss else 1


def saved_for_backward(spec: ModelSpec, rows: Rows, checkpointed: bool = False) -> int:
    """Returns the bytes that the forward pass saves for the backward pass, without the logits."""
    return _saved_for_backward(rows, _parts(spec, rows, checkpointed, losses=1))


def _saved_for_backward(rows: Rows, parts: list[tuple[Footprint, int]]) -> int:
    model = in_a_row(rows.stream, [footprint for footprint, _ in parts])
    return model.kept + rows.tables(model.angles)


def _parts(
    spec: ModelSpec,
    rows: Rows,
    checkpointed: bool,
    depth: int | None = None,
    losses: int | None = None,
) -> list[tuple[Footprint, int]]:
    """Returns the footprints of embedding, layers, norm and head, each with the bytes of its
    gradients. ``depth``: of the loops; None: their own. ``losses``: how often the last norm runs;
    None: as training does it."""
    layers = [layer for block in spec.blocks for layer in block.unrolled()]
    run = [cast(BlockSpec, layer.at_depth(depth)) for layer in layers] if depth else layers
    losses = spec.training_losses(depth) if losses is None else losses
    footprints = [layer.footprint(rows._replace(keeps_states=losses > 1)) for layer in run]
    if checkpointed:
        footprints = [footprint.recomputed() for footprint in footprints]
    costs = [block_cost(layer, rows.dim, rows.tokens) for layer in layers]
    table, tied = TRAIN_BYTES * rows.dim * spec.vocab_size, spec.tie_embeddings
    # a matrix that embedding and head share has two gradients until they are added
    embedding = Footprint(rows.indices, reads=False, work=rows.stream + tied * table)
    if losses > 1:
        # The gradients of the states after all passes are there before the loop's backward pass
        # begins; with checkpointing also the states themselves, beside those computed again.
        waiting = losses * rows.stream * (1 + checkpointed)
        footprints[-1] = footprints[-1]._replace(work=footprints[-1].work + waiting)
    norm = (_norms_footprint(spec, rows, losses), TRAIN_BYTES * norm_size(spec.norm, rows.dim))
    return [
        (embedding, 0 if tied else table),
        *(
            (footprint, TRAIN_BYTES * cost.params)
            for footprint, cost in zip(footprints, costs, strict=True)
        ),
        *([norm] if spec.final_norm else []),
        (_loss_footprint(spec, rows, losses), table),
    ]


def _norms_footprint(spec: ModelSpec, rows: Rows, losses: int) -> Footprint:
    """The footprint of the last norm, which runs after every pass if each has a loss.

    Its outputs are all kept for the loss, of which the footprint of the loss reads one; then there
    are their gradients instead.
    """
    norm = norm_footprint(spec.norm, rows)
    return norm._replace(kept=losses * norm.kept + (losses - 1) * rows.stream)


def _loss_footprint(spec: ModelSpec, rows: Rows, losses: int) -> Footprint:
    """The footprint of head and loss, which are computed together, for some tokens at a time.

    It has the logits of these tokens, the gradients of the inputs of the head, and for each token
    its target, its weight and its loss.
    """
    N = rows.batch * rows.tokens
    at_once = min(N, max(1, LOGITS["cpu"] // spec.vocab_size))
    logits = FLOAT * at_once * (spec.vocab_size + 4)
    floats = 2 if losses == 1 else 3 * losses + 1
    return Footprint(work=logits + losses * rows.stream + rows.floats(floats) + rows.indices)
