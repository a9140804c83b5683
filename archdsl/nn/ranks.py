"""The processes that train one model together.

torchrun starts them, and torch.distributed connects them. A process that was started alone is the
only one, and everything here is then done by it at once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from archdsl.errors import ArchdslError, blamed_on
from archdsl.nn.devices import device_named

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]

BYTES_OF_A_PARAMETER = 16  # weight, gradient and two moments in float32
SHARE_FOR_REPLICAS = 0.25  # of a device's memory; larger models are sharded, by `auto`
WAIT = timedelta(hours=2)  # for the others, one of which may tokenize a large text
LOST = (
    "the connection to another process of this run was lost; why that one has ended is said before "
    "or below. The same command goes on from the last checkpoint"
)

# numbers the connections of this process: each process of a run has made as many
CONNECTIONS = itertools.count()

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together, as one of them sees them.

    ``rank``: the number of this process, of ``size``. ``device``: of this process. ``mesh``: the
    processes as a grid, in which each row holds one copy of the weights, or as the only row; None:
    there is one process alone.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = field(default=None, compare=False)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks to the user."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """The rows of this process, of ``total`` rows that the processes share evenly."""
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes, in float64 (in float32 on mps)."""
        if self.size == 1:
            return list(values)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true in any process."""
        return bool(self.sum(float(value))[0])

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over all processes, which have the same names."""
        totals = self.sum(*values.values())
        return {name: total / self.size for name, total in zip(values, totals, strict=True)}

    def gather(self, value: T) -> list[T]:
        """The value of each process, in their order. They are sent by pickle, among processes of
        one run."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def agree(self, work: Callable[[], T]) -> T:
        """Do something in every process, and return what it returns in this one.

        If it raises an ArchdslError in one of them, all of them raise one with that message.
        """
        result, failure, told = None, None, None
        try:
            result = work()
        except ArchdslError as error:
            if self.size == 1:
                raise
            failure, told = error, (str(error), error.exit_status)
        everyones = self.gather(told)
        for rank, found in enumerate(everyones):
            if found is not None:
                failure = failure or _of_another(*found)
                failure.told_by_another = rank != self.rank
                raise failure
        return cast(T, result)

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something in the first process, and return its result in all of them.

        Raises the ArchdslError that it raises there, in all of them.
        """
        return self.gather(self.agree(lambda: work() if self.first else None))[0]  # type: ignore[return-value]

    def one_after_first(self, work: Callable[[], T]) -> T:
        """Do something in the first process, and then, when its files are there, in the others."""
        if self.size == 1:
            return work()
        done: list[T] = []
        self.on_first(lambda: done.append(work()) if self.first else None)
        return done[0] if done else work()

    def own(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """The items of this process, of which each takes every ``size``-th one.

        All processes get equally many, as each has to do what the others wait for: where an item is
        another process's, too, the second value is False.
        """
        left = iter(items)
        while some := list(islice(left, self.size)):
            yield some[min(self.rank, len(some) - 1)], self.rank < len(some)


def _of_another(message: str, exit_status: int) -> ArchdslError:
    error = ArchdslError(message)
    error.exit_status = exit_status
    return error


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def connected() -> Iterator[Ranks]:
    """Connect this process with the others that torchrun started, inside the block.

    They are not yet at their devices; see `joined`. A process that was started alone is alone.
    Raises ArchdslError if another one ends before them all.
    """
    if not launched():
        yield Ranks(torch.device("cpu"))
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    begun = not dist.is_initialized()
    if begun:
        store, rank, size = next(iter(rendezvous("env://", timeout=WAIT)))
        # the store may hold the addresses that earlier connections left, and those of the processes
        # before a restart by torchrun; on several machines it may count restarts differently, see
        # docs/training.md
        one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
        store = PrefixStore(f"attempt_{attempt}/{next(CONNECTIONS)}", store)
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=WAIT)
    try:
        yield Ranks(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ArchdslError(LOST) from error
        raise
    finally:
        if begun:
            dist.destroy_process_group()


@contextmanager
def joined(device: str = "auto", parallel: Parallel = "auto", params: int = 0) -> Iterator[Ranks]:
    """As `connected`, with each process at a device of its own.

    ``device``: as in `TrainConfig`. ``params``: the number of parameters, by which `auto` decides.
    Raises ArchdslError if ``device`` names one of several devices, or there are more processes than
    devices.
    """
    with blamed_on("device"):
        given = device_named(device)
    with connected() as found:
        alone = found.size == 1 and (given.index is not None or "LOCAL_RANK" not in os.environ)
        own = given if alone else _own_device(device, given)
        ranks = replace(found, device=own)
        mesh = None if found.size == 1 else _mesh(ranks, parallel, params)
        yield replace(ranks, mesh=mesh)


def _own_device(name: str, given: torch.device) -> torch.device:
    if given.type == "cpu":
        return given
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    with blamed_on("device"):
        if given.index is not None:
            raise ArchdslError(f"device: {name}: names one device for all processes; leave it out")
        if local >= count:
            raise ArchdslError(
                f"process {local + 1} of this machine has no device: there are {count} of the kind "
                f"{given.type}; start as many processes, or use --device cpu"
            )
    torch.accelerator.set_device_index(local)
    return torch.device(given.type, local)


def _mesh(ranks: Ranks, parallel: Parallel, params: int) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    together = min(int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)), ranks.size)
    if parallel == "auto":
        parallel = _chosen(ranks, params, together)
    sharded = {"ddp": 1, "fsdp": ranks.size, "hsdp": together}[parallel]
    if ranks.size % sharded:
        raise ArchdslError(
            f"parallel: hsdp needs equally many processes on each machine; here are {together} of "
            f"{ranks.size}"
        )
    if sharded == ranks.size:
        return init_device_mesh(ranks.device.type, (sharded,), mesh_dim_names=("shard",))
    shape = (ranks.size // sharded, sharded)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _chosen(ranks: Ranks, params: int, together: int) -> Parallel:
    """Copies for models that are small for the device; else shards, within a machine if that is
    enough: then only gradients go from one machine to another."""
    if params * BYTES_OF_A_PARAMETER <= SHARE_FOR_REPLICAS * _memory(ranks.device):
        return "ddp"
    return "fsdp" if together == ranks.size else "hsdp"


def _memory(device: torch.device) -> int:
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def whole(tensor: Any) -> Tensor:
    """A tensor that is divided among the processes, as a whole in each of them."""
    return cast(Tensor, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)


def local(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds."""
    return cast(Tensor, tensor.to_local() if hasattr(tensor, "to_local") else tensor)
