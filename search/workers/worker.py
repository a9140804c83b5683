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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, Self, TypeVar

from archdsl.errors import ArchdslError
from archdsl.files import WriteError, disk_fault
from archdsl.nn.ranks import LOST
from archdsl.search.workers.group import SECONDS_TO_TELL, Group, fork

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
    pipe: connection.Connection[Any, Any],
    memory: int | None,
    heartbeat_interval: float,
    devices: Sequence[int] = (0,),
) -> None:
    """Do one piece of work after the other, as they come through ``pipe``, until it is closed.

    During each, the worker sends None as a heartbeat, at most every ``heartbeat_interval`` seconds;
    at its end it sends a tuple of the result alone, or a JobFailed. ``memory``: bytes that the work
    may allocate. ``devices``: the numbers of the worker's devices on this machine. For each there
    is a process, and all of them do each piece of work together.
    """
    import torch

    for ending in (signal.SIGINT, signal.SIGTERM):  # the parent process handles them
        signal.signal(ending, signal.SIG_IGN)
    group = fork(devices)
    torch.set_num_threads(1)
    if group.rank:
        pipe.close()
        _run_rank(group, memory)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    sender = _Sender(pipe, heartbeat_interval)
    group.open(sender.fail)
    limit = _data_limit(memory)  # set once: memory that earlier work leaked counts as well
    with suppress(EOFError, ConnectionError):  # the pool is closed, or its process has died
        while True:
            work = pipe.recv_bytes()
            group.send(work)
            sender.sent = -math.inf
            answer, failed = _outcome(work, limit, sender.heartbeat)
            if failed is None:
                group.wait()
            sender.send(answer)
            del work, answer
            gc.collect()  # models contain reference cycles, and may be large
            _reset_peak_memory()


def _run_rank(group: Group, memory: int | None) -> NoReturn:
    """Do the same in another rank than 0, until a piece of work fails or rank 0 ends."""
    with suppress(EOFError, ConnectionError):
        link, limit = group.follow(), _data_limit(memory)
        while True:
            work = link.recv_bytes()
            _, failed = _outcome(work, limit, lambda: None)
            link.send(failed)
            if failed:
                break  # so that the others, which may wait for this rank, fail too
            del work
            gc.collect()
            _reset_peak_memory()
    os._exit(0)


class _Sender:
    """Sends heartbeats, the first one of each piece of work at once, and results."""

    def __init__(self, pipe: connection.Connection[Any, Any], interval: float) -> None:
        self.pipe, self.interval, self.sent = pipe, interval, -math.inf
        self.lock = threading.Lock()  # another rank may fail while this one works

    def heartbeat(self) -> None:
        """Send a heartbeat, if it is time."""
        if time.monotonic() - self.sent > self.interval:
            try:
                self.send(_pickled(None))
            except ConnectionError:  # the process of the pool has died
                os._exit(1)
            self.sent = time.monotonic()

    def send(self, pickled: bytes) -> None:
        """Send what is received as a heartbeat, a result or a failure."""
        with self.lock:
            self.pipe.send_bytes(pickled)

    def fail(self, failure: JobFailed) -> NoReturn:
        """Send the failure as that of the work, and end this process."""
        self.lock.acquire()
        with suppress(ConnectionError):
            self.pipe.send(failure)
        os._exit(1)


def _outcome(
    pickled: bytes, limit: int | None, heartbeat: Heartbeat
) -> tuple[bytes, JobFailed | None]:
    """Do the work; return what is sent to the pool, and the failure if there is one."""
    try:
        heartbeat()
        work: Work[Any] = pickle.loads(pickled)
        with _at_most(limit):
            result = work.run(heartbeat)
        return _pickled((result,)), None
    except BaseException as error:  # whatever ended the work is reported
        failed = failure(error)
        if LOST in failed.message or getattr(error, "told_by_another", False):
            time.sleep(SECONDS_TO_TELL)  # the other rank knows better, and ends this process
        return _pickled(failed), failed


def _pickled(message: Any) -> bytes:
    return bytes(ForkingPickler.dumps(message))


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
