"""What training on several devices keeps on each of them and sends between them, in closed form.

The parameters of a model are divided into units: each layer is one, also a loop, however often it
runs, and embedding, last norm and head are one together, the root. Sharded training (FSDP,
Zhao et al. 2304.11277) keeps a shard of every parameter on each device: rows of its first
dimension, filled up with zeros so that all shards are equally large. A device gathers a unit when
it needs it.

- A layer is gathered once for the forward pass and once for the backward pass. While it computes,
  the next one is gathered.
- The root is gathered once, and kept until the end of the backward pass.
- The gradients of a unit are reduced and scattered once for each optimizer step. Passes of the step
  before the last one add them up without sharding.

Parameters and gradients are in float32. Bytes are those that each device sends in a ring, as
Thakur et al. (2005, "Optimization of Collective Communication Operations in MPICH") count them; it
receives as many. Losses, norms and statistics of routers are a few numbers and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from archdsl.costs.activations import FLOAT
from archdsl.errors import ArchdslError

Parallel = Literal["ddp", "fsdp", "hsdp"]
Shape = tuple[int, ...]


class Devices(NamedTuple):
    """The devices that a model is trained on, as `devices` makes and checks them.

    ``number``: how many. ``parallel``: ddp keeps all weights on each of them, fsdp a shard, hsdp a
    shard within a group of devices. ``shards``: the number of shards of each parameter.
    """

    number: int
    parallel: Parallel
    shards: int

    @property
    def replicas(self) -> int:
        """The number of groups of devices that hold all shards."""
        return self.number // self.shards


ONE = Devices(1, "ddp", 1)


class DevicesError(ArchdslError):
    """A model cannot be trained on devices like these."""

    exit_status = 2


def devices(count: int, parallel: Parallel = "fsdp", shard_group: int | None = None) -> Devices:
    """Returns the devices of a training run.

    ``shard_group``: with hsdp, the number of devices that share one copy of the weights. Raises
    DevicesError if it is missing, given without hsdp, or does not divide ``count``.

    >>> devices(16, "hsdp", 8).replicas
    2
    """
    if count < 1:
        raise DevicesError(f"the number of devices must be at least 1, got {count}")
    if parallel != "hsdp":
        if shard_group is not None:
            raise DevicesError(f"{parallel} has no shard group; give one with hsdp alone")
        return Devices(count, parallel, count if parallel == "fsdp" else 1)
    if shard_group is None:
        wanted = "the number of devices that share one copy of the weights, such as those of a node"
        raise DevicesError(f"hsdp needs the size of a shard group: {wanted}")
    if shard_group < 1 or count % shard_group:
        raise DevicesError(
            f"the size of the shard group must divide the number of devices, {count}; "
            f"got {shard_group}"
        )
    return Devices(count, parallel, shard_group)


class Unit(NamedTuple):
    """Parameters that are gathered together. ``shapes``: of each of them."""

    shapes: Sequence[Shape]

    @property
    def whole(self) -> int:
        """The bytes of all parameters."""
        return FLOAT * sum(math.prod(shape) for shape in self.shapes)

    def shard(self, shards: int) -> int:
        """Returns the bytes of one of ``shards`` shards, which are equally large."""
        return FLOAT * sum(-(-rows // shards) * math.prod(rest) for rows, *rest in self.shapes)

    def gathered(self, shards: int) -> int:
        """Returns the bytes of all shards; with one, nothing is gathered."""
        return shards * self.shard(shards) if shards > 1 else 0


class Units(NamedTuple):
    """The units of a model. ``root``: embedding, last norm and head.

    ``matrices``: those of the layers that Muon trains; they are in ``layers`` as well.
    """

    layers: Sequence[Unit]
    root: Unit
    matrices: Unit = Unit(())

    def shard(self, shards: int) -> int:
        """Returns the bytes of a shard of all parameters."""
        return sum(unit.shard(shards) for unit in (*self.layers, self.root))


class Traffic(NamedTuple):
    """The bytes that each device sends for one optimizer step, by operation."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int

    @property
    def total(self) -> int:
        """The sum of all operations."""
        return sum(self)


def traffic(units: Units, on: Devices, passes: int = 1, muon: bool = False) -> Traffic:
    """Returns the bytes that each device sends for an optimizer step.

    ``passes``: the number of forward and backward passes of a step, such as the parts that a batch
    is divided into. ``muon``: whether the optimizer is Muon, which gathers each of its matrices.
    """
    others, shard, root = on.shards - 1, units.shard(on.shards), units.root.shard(on.shards)
    # the largest part of a ring's two rounds, if the groups do not divide the shard
    all_reduce = 2 * (on.replicas - 1) * -(-shard // on.replicas)
    gathered = passes * (2 * shard - root) + (units.matrices.shard(on.shards) if muon else 0)
    return Traffic(others * gathered, others * shard, all_reduce)
