"""What happens in a child process: its work, its signs of life, and its failures in words."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

from archdsl.errors import ArchdslError

R_co = TypeVar("R_co", covariant=True)
Beat = Callable[[], None]  # "I am alive"
Reason = Literal["out of memory", "crash", "hang", "error"]

NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")


class Work(Protocol[R_co]):
    """Something to be done in a child; plain data, so that it can cross processes."""

    def run(self, beat: Beat) -> R_co:
        """Does it, and calls ``beat`` often: who is silent for long is taken to hang."""

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


def be_a_child(
    sender: connection.Connection[Any, Any],
    work: Work[Any],
    memory: int | None,
    seconds_apart: float,
) -> None:
    """Sends None as a sign of life, no oftener than every ``seconds_apart``; at last a tuple of
    the result alone, or a JobFailed.
    """
    import torch

    for ending in (signal.SIGINT, signal.SIGTERM):  # the coordinator's to handle
        signal.signal(ending, signal.SIG_IGN)
    threading.Thread(target=_end_with_coordinator, daemon=True).start()
    torch.set_num_threads(1)
    heard = -math.inf

    def say(what: Any) -> None:
        try:
            sender.send(what)
        except BrokenPipeError:  # the coordinator is gone
            os._exit(1)

    def beat() -> None:
        nonlocal heard
        if time.monotonic() - heard > seconds_apart:
            say(None)
            heard = time.monotonic()

    try:
        beat()
        with _at_most(memory):
            done = work.run(beat)
        say((done,))
    except BaseException as error:  # whatever ends the work is said
        say(failure(error))


@contextmanager
def _at_most(memory: int | None) -> Iterator[None]:
    """Meanwhile no more than ``memory`` bytes can be allocated, where the system can tell."""
    held = Path("/proc/self/statm")
    if memory is None or not held.exists():
        yield
        return
    import resource

    limit = memory + int(held.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
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
