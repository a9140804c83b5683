"""Divide a model among the processes that train it, each with a device of its own.

FSDP2 (`fully_shard`) divides the weights. A unit is a layer of the model, which is one module
however often a loop runs its body: its weights are gathered once for the forward and once for the
backward pass. The embedding, the last norm and the head are one more unit, which is gathered once
for both.

Every process computes the gradient of its own rows of the same batch, and the gradients are added
up. So no result depends on the number of processes, apart from rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from archdsl.model.build import build
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import BatchStatistics
from archdsl.nn.ranks import Ranks, whole


def shard(model: LanguageModel, ranks: Ranks, parts: bool, in_step: bool) -> list[Any]:
    """Divide the weights of a model among the processes, and move its own part to the device.

    ``parts``: whether a batch may be computed in parts: weights then stay gathered for all of them,
    see `part_of_batch`. ``in_step``: whether all processes have the same parts. Returns the units,
    the modules whose weights are gathered together; none for a process alone.
    """
    if ranks.mesh is None:
        model.to(ranks.device)
        return []
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # no block changes what another one returned
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for layer in model.layers:
        fully_shard(layer, mesh=ranks.mesh, reshard_after_forward=not parts)
    fully_shard(model, mesh=ranks.mesh)
    for method in ("loss", "loss_of_passes"):
        register_fsdp_forward_method(model, method)
    units: list[Any] = [*model.layers, model]
    for unit in units:
        # each process has its share of the sum already, as it divides by all targets of the batch
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    for one in statistics(model):
        one.counted_by_caller = True
        one.mean_over_ranks = _mean_over(ranks) if in_step else None
    return units


def _mean_over(ranks: Ranks) -> Callable[[Tensor], Tensor]:
    def mean(x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / ranks.size

    return mean


def part_of_batch(units: Iterable[Any], last: bool) -> None:
    """Say before each part of a batch whether it is the ``last``.

    Before that, each process adds up its gradients alone, and keeps the gathered weights. So the
    processes may have different numbers of parts.
    """
    for unit in units:
        unit.set_requires_gradient_sync(last, recurse=False)
        unit.set_reshard_after_backward(last, recurse=False)
        unit.set_is_last_backward(last)


def give_back(units: Iterable[Any]) -> None:
    """Free gathered weights, so that the parameters of the model are the shards again."""
    for unit in units:
        unit.reshard()


def statistics(model: LanguageModel) -> list[BatchStatistics]:
    """The parts of a model that keep statistics of training batches."""
    return [one for one in model.counting if isinstance(one, BatchStatistics)]


@torch.no_grad()
def share_statistics(model: LanguageModel, ranks: Ranks) -> None:
    """Give each process what all of them saw of a batch, in the order of its rows."""
    found = statistics(model)
    if ranks.size == 1 or not found:
        return
    own = {
        (n, place): list(seen) for n, one in enumerate(found) for place, seen in one.seen().items()
    }
    shapes = ranks.gather({key: [tuple(x.shape) for x in seen] for key, seen in own.items()})
    flat = torch.cat([x.flatten() for seen in own.values() for x in seen] or [_none(ranks)])
    most = max(sum(_numel(shape) for each in of.values() for shape in each) for of in shapes)
    padded = torch.nn.functional.pad(flat, (0, most - len(flat)))
    everyones = [torch.empty_like(padded) for _ in range(ranks.size)]
    dist.all_gather(everyones, padded)
    for one in found:
        one.parts.clear()
    for vector, of in zip(everyones, shapes, strict=True):
        start = 0
        for (n, place), each in of.items():
            for shape in each:
                part = vector[start : start + _numel(shape)].view(shape)
                found[n].parts.setdefault(place, []).append(part)
                start += _numel(shape)


def _none(ranks: Ranks) -> Tensor:
    return torch.empty(0, device=ranks.device)


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def gathered(model: LanguageModel, ranks: Ranks) -> LanguageModel:
    """A whole copy of a divided model in the memory of the first process; the model itself in the
    others, and where it is not divided."""
    if ranks.size == 1:
        return model
    state = {}
    for name, tensor in model.state_dict().items():
        complete = whole(tensor)
        if ranks.first:
            state[name] = complete.cpu()
    if not ranks.first:
        return model
    copy = build(model.spec)
    for name, tensor in copy.state_dict().items():
        tensor.copy_(state[name])
    return copy
