"""What happens in a child process: its work, its signs of life, and its failures in words."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

from archdsl.errors import ArchdslError

R_co = TypeVar("R_co", covariant=True)
Heartbeat = Callable[[], None]  # "I am alive"
Reason = Literal["out of memory", "crash", "hang", "error"]

NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


class Work(Protocol[R_co]):
    """Something to be done in a child; plain data, so that it can cross processes."""

    def run(self, heartbeat: Heartbeat) -> R_co:
        """Does it, and calls ``heartbeat`` often: who is silent for long is taken to hang."""

    def smaller(self) -> Self | None:
        """The same in less memory; None where that cannot be."""


class JobFailed(ArchdslError):  # noqa: N818  it says what happened
    """Work that came to no result; ``details`` is its traceback, where there is one."""

    def __init__(self, reason: Reason, message: str, details: str = "") -> None:
        super().__init__(reason, message, details)
        self.reason, self.message, self.details = reason, message, details

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def failure(error: BaseException) -> JobFailed:
    message = f"{type(error).__name__}: {error}"
    # torch raises RuntimeErrors of many texts: those of its allocators, of CUDA, of C++
    of_torch = isinstance(error, RuntimeError | OSError) and any(
        text in str(error).lower() for text in (*NO_MEMORY, "out of memory")
    )
    reason: Reason = "out of memory" if of_torch or isinstance(error, MemoryError) else "error"
    return JobFailed(reason, message, "".join(traceback.format_exception(error)[-6:]))


def run_worker(
    line: connection.Connection[Any, Any], memory: int | None, seconds_apart: float
) -> None:
    """Does one piece of work after the other, as they come, until there will be no more.

    Of each it sends None as a sign of life, no oftener than every ``seconds_apart``; at last a
    tuple of the result alone, or a JobFailed.
    """
    import torch

    for ending in (signal.SIGINT, signal.SIGTERM):  # the coordinator's to handle
        signal.signal(ending, signal.SIG_IGN)
    threading.Thread(target=_end_with_coordinator, daemon=True).start()
    torch.set_num_threads(1)
    limit = _allowed(memory)  # what earlier pieces may have kept counts, too
    with suppress(EOFError, ConnectionError):  # the coordinator needs no more, or is gone
        while True:
            said = line.recv_bytes()
            line.send_bytes(_outcome(said, limit, _HeartbeatSender(line, seconds_apart)))
            del said
            gc.collect()  # a model is a cycle, and may be large
            _forget_peak()


class _HeartbeatSender:
    """Signs of life, the first one at once."""

    def __init__(self, line: connection.Connection[Any, Any], apart: float) -> None:
        self.line, self.apart, self.heard = line, apart, -math.inf

    def __call__(self) -> None:
        if time.monotonic() - self.heard > self.apart:
            try:
                self.line.send(None)
            except ConnectionError:  # the coordinator is gone
                os._exit(1)
            self.heard = time.monotonic()


def _outcome(said: bytes, limit: int | None, heartbeat: Heartbeat) -> bytes:
    try:
        heartbeat()
        work: Work[Any] = pickle.loads(said)
        with _at_most(limit):
            done = work.run(heartbeat)
        return bytes(ForkingPickler.dumps((done,)))
    except BaseException as error:  # whatever ends the work is said
        return bytes(ForkingPickler.dumps(failure(error)))


def _forget_peak() -> None:
    """The most memory that was held: of the next piece of work it is to be its own."""
    with suppress(OSError):  # only Linux can
        Path("/proc/self/clear_refs").write_text("5")


def _allowed(memory: int | None) -> int | None:
    """Bytes of data with ``memory`` more than there are, where the system can tell."""
    held = Path("/proc/self/statm")
    if memory is None or not held.exists():
        return None
    return memory + int(held.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _at_most(limit: int | None) -> Iterator[None]:
    """Meanwhile there can be no more than ``limit`` bytes of data."""
    if limit is None:
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def _end_with_coordinator() -> None:
    coordinator = multiprocessing.parent_process()
    assert coordinator is not None
    connection.wait([coordinator.sentinel])
    os._exit(1)
