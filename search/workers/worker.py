"""What happens in a worker process: its work, its heartbeats, and its failures."""

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
from archdsl.files import WriteError, disk_fault

R_co = TypeVar("R_co", covariant=True)
Heartbeat = Callable[[], None]  # work calls it to say that it has not hung
Reason = Literal["out of memory", "disk full", "crash", "hang", "error"]

NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


class Work(Protocol[R_co]):
    """Something to be done in a worker; plain data, so that it can be pickled."""

    def run(self, heartbeat: Heartbeat) -> R_co:
        """Do the work. It must call ``heartbeat`` often, or it is killed because it seems hung."""

    def smaller(self) -> Self | None:
        """The same work in less memory; None if that is not possible."""


class JobFailed(ArchdslError):  # noqa: N818  it says what happened
    """Work ended without a result. ``details``: its traceback, or empty."""

    def __init__(self, reason: Reason, message: str, details: str = "") -> None:
        super().__init__(reason, message, details)
        self.reason, self.message, self.details = reason, message, details

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def failure(error: BaseException) -> JobFailed:
    """The exception as a JobFailed, which can be pickled."""
    message = f"{type(error).__name__}: {error}"
    if fault := disk_fault(error):
        path = getattr(error, "filename", None) or "a file"
        told = f"{path} could not be written: {fault}"
        return JobFailed("disk full", str(error) if isinstance(error, ArchdslError) else told)
    # torch reports lack of memory as RuntimeErrors whose texts differ by allocator
    from_torch = isinstance(error, RuntimeError | OSError) and any(
        text in str(error).lower() for text in (*NO_MEMORY, "out of memory")
    )
    reason: Reason = "out of memory" if from_torch or isinstance(error, MemoryError) else "error"
    return JobFailed(reason, message, "".join(traceback.format_exception(error)[-6:]))


def end_if_disk_is_full(failure: BaseException) -> None:
    """Raise WriteError if that is the reason for the failure: no other work can succeed then."""
    if isinstance(failure, JobFailed) and failure.reason == "disk full":
        advice = "make room, and run the same command again to continue"
        raise WriteError(f"{failure.message}; {advice}") from failure


def run_worker(
    pipe: connection.Connection[Any, Any], memory: int | None, heartbeat_interval: float
) -> None:
    """Do one piece of work after the other, as they come through ``pipe``, until it is closed.

    During each, the worker sends None as a heartbeat, at most every ``heartbeat_interval`` seconds;
    at its end it sends a tuple of the result alone, or a JobFailed. ``memory``: bytes that the work
    may allocate.
    """
    import torch

    for ending in (signal.SIGINT, signal.SIGTERM):  # the parent process handles them
        signal.signal(ending, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    limit = _data_limit(memory)  # set once: memory that earlier work leaked counts as well
    with suppress(EOFError, ConnectionError):  # the pool is closed, or its process has died
        while True:
            work = pipe.recv_bytes()
            pipe.send_bytes(_outcome(work, limit, _HeartbeatSender(pipe, heartbeat_interval)))
            del work
            gc.collect()  # models contain reference cycles, and may be large
            _reset_peak_memory()


class _HeartbeatSender:
    """Sends heartbeats, the first one at once."""

    def __init__(self, pipe: connection.Connection[Any, Any], interval: float) -> None:
        self.pipe, self.interval, self.sent = pipe, interval, -math.inf

    def __call__(self) -> None:
        if time.monotonic() - self.sent > self.interval:
            try:
                self.pipe.send(None)
            except ConnectionError:  # the process of the pool has died
                os._exit(1)
            self.sent = time.monotonic()


def _outcome(pickled: bytes, limit: int | None, heartbeat: Heartbeat) -> bytes:
    try:
        heartbeat()
        work: Work[Any] = pickle.loads(pickled)
        with _at_most(limit):
            result = work.run(heartbeat)
        return bytes(ForkingPickler.dumps((result,)))
    except BaseException as error:  # whatever ended the work is reported
        return bytes(ForkingPickler.dumps(failure(error)))


def _reset_peak_memory() -> None:
    """Reset the peak of resident memory, so that each piece of work reports its own."""
    with suppress(OSError):  # only Linux has this file
        Path("/proc/self/clear_refs").write_text("5")


def _data_limit(memory: int | None) -> int | None:
    """The size of the data segment with ``memory`` more bytes than now; None if unlimited.

    Also None where the system does not tell its present size.
    """
    sizes = Path("/proc/self/statm")
    if memory is None or not sizes.exists():
        return None
    return memory + int(sizes.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _at_most(limit: int | None) -> Iterator[None]:
    """Limit the data segment to ``limit`` bytes inside the block."""
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


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
