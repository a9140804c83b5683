"""Work in child processes of one thread, where each piece can fail alone.

Children are forked from a server that has torch loaded, do one piece after the other until one
fails, and end when their coordinator does.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, Protocol, TypeVar

from archdsl.search.workers.worker import Heartbeat, JobFailed, Work, failure, run_worker

__all__ = [
    "Heartbeat",
    "InProcess",
    "JobFailed",
    "Pool",
    "ProcessPool",
    "Work",
    "process_pool",
    "start_server",
    "wait_for_any",
]

R = TypeVar("R")

HEARTBEAT_INTERVAL = 1.0  # seconds, at least, unless patience is short
STARTUP_SECONDS = 60.0  # seconds more for the first sign of life: the server may be loading torch
WORK_PER_WORKER = 50  # done by one process, then a new one starts and leaked memory is freed


class Pool(Protocol):
    @property
    def workers(self) -> int: ...

    def submit(self, work: Work[R]) -> Future[R]: ...


class InProcess:
    """Does work at once, in this process: for tests, and where there is nothing to be risked."""

    workers = 1

    def submit(self, work: Work[R]) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(_run_with_retry(work))
        except Exception as error:  # a failure belongs to its future
            future.set_exception(failure(error))
        return future


def _run_with_retry(work: Work[R]) -> R:
    try:
        return work.run(lambda: None)
    except Exception as error:
        smaller = work.smaller() if failure(error).reason == "out of memory" else None
        if smaller is None:
            raise
    return smaller.run(lambda: None)


@contextmanager
def process_pool(
    workers: int, memory: int | None = None, patience: float = 120.0
) -> Iterator[ProcessPool]:
    """Does up to ``workers`` pieces of work at once; leaves when all are done.

    ``memory``: bytes that each may allocate. ``patience``: seconds without a beat after which a
    child is killed. On an exception all children are killed at once.
    """
    pool = ProcessPool(workers, memory, patience)
    try:
        yield pool
        pool.finish()
    except BaseException:
        pool.kill()
        raise


def start_server() -> None:
    """Starts what children are forked from, if it is not there.

    It imports torch for seconds: who is about to import torch as well calls this before.
    """
    # each child runs the main module again, and what that of the command line imports is much
    loaded = [name for name in ("archdsl.cli",) if name in sys.modules]
    multiprocessing.set_forkserver_preload(["archdsl.search.worker_preload", *loaded])
    # Ctrl-C is the coordinator's to handle; the server itself ignores it only once all is imported
    resource_tracker.ensure_running()  # which the next would do, and unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _Order:
    work: Work[Any]
    future: Future[Any]
    begun: bool = False  # once before: now in a new child
    smaller: bool = False  # than it was


@dataclass
class _Child:
    process: ForkServerProcess
    heard: float  # when it was last
    order: _Order | None = None  # what it does; None: it waits
    pieces: int = 0  # that it was given


class ProcessPool:
    """A queue of work and the children that do it, all of them in the hands of one thread."""

    def __init__(self, workers: int, memory: int | None, patience: float) -> None:
        self.workers, self.memory, self.patience = workers, memory, patience
        self._context = multiprocessing.get_context("forkserver")
        start_server()
        self._queue: deque[_Order] = deque()
        self._children: dict[connection.Connection[Any, Any], _Child] = {}
        self._bell, self._ring = self._context.Pipe(duplex=False)
        self._until: Literal["called", "done", "now"] = "called"
        self._thread = threading.Thread(target=self._serve, name="pool", daemon=True)
        self._thread.start()

    def submit(self, work: Work[R]) -> Future[R]:
        future: Future[R] = Future()
        self._queue.append(_Order(work, future))
        self._ring.send(None)
        return future

    def finish(self) -> None:
        """Returns when all work is done."""
        self._end("done")

    def kill(self) -> None:
        """Drops all work; the futures of what was not done are cancelled."""
        self._end("now")

    def _end(self, until: Literal["done", "now"]) -> None:
        self._until = until
        self._ring.send(None)
        self._thread.join()
        self._bell.close()
        self._ring.close()

    @property
    def _busy(self) -> list[tuple[connection.Connection[Any, Any], _Child, _Order]]:
        return [(line, c, c.order) for line, c in self._children.items() if c.order]

    def _serve(self) -> None:
        try:
            while self._until == "called" or (
                self._until == "done" and (self._queue or self._busy)
            ):
                while self._queue and len(self._busy) < self.workers:
                    self._start(self._queue.popleft())
                self._listen()
                self._kill_the_silent()
        finally:
            for child in self._children.values():
                child.process.kill()
            for child in self._children.values():
                child.process.join()
                if child.order:
                    child.order.future.set_exception(CancelledError())
            for line in self._children:
                line.close()
            for order in self._queue:
                order.future.cancel()

    def _start(self, order: _Order) -> None:
        if not order.begun and not order.future.set_running_or_notify_cancel():
            return
        try:
            work = ForkingPickler.dumps(order.work)
            waiting = [line for line, child in self._children.items() if not child.order]
            line = waiting[0] if waiting and not order.begun else self._fork()
        except Exception as error:  # such as work that is no plain data
            order.future.set_exception(failure(error))
            return
        child = self._children[line]
        child.order, child.pieces = order, child.pieces + 1
        child.heard = max(child.heard, time.monotonic())
        with suppress(OSError):  # it has just died: that is about to be heard
            line.send_bytes(work)

    def _fork(self) -> connection.Connection[Any, Any]:
        """A child that waits, by what is said to it and heard of it."""
        mine, its = self._context.Pipe()
        apart = min(HEARTBEAT_INTERVAL, self.patience / 8)
        process = self._context.Process(
            target=run_worker, args=(its, self.memory, apart), daemon=True
        )
        try:
            process.start()
        except BaseException:
            mine.close()
            raise
        finally:
            its.close()
        self._children[mine] = _Child(process, time.monotonic() + STARTUP_SECONDS)
        return mine

    def _listen(self) -> None:
        """Until somebody says something, or was silent for too long."""
        silent_at = min((child.heard for _, child, _ in self._busy), default=None)
        seconds = silent_at and max(0.0, silent_at + self.patience - time.monotonic())
        for ready in connection.wait([self._bell, *self._children], seconds):
            assert isinstance(ready, connection.Connection)
            if ready is self._bell:
                ready.recv()
            else:
                self._hear(ready)

    def _hear(self, line: connection.Connection[Any, Any]) -> None:
        child = self._children[line]
        order = child.order
        try:
            said = line.recv()
        except (EOFError, OSError):
            self._take_leave(line)
            if order:
                self._failed(child, order, _exit_failure(child.process))
            return
        if said is None or order is None:
            child.heard = time.monotonic()
            return
        child.order = None
        if isinstance(said, JobFailed):
            self._take_leave(line)
            self._failed(child, order, said)
        else:
            if child.pieces == WORK_PER_WORKER:
                self._take_leave(line)
            order.future.set_result(said[0])

    def _kill_the_silent(self) -> None:
        now = time.monotonic()
        for line, child, order in self._busy:
            if now - child.heard >= self.patience:
                child.process.kill()
                self._take_leave(line)
                why = f"no step was made for {self.patience:g} s, so it was ended"
                self._failed(child, order, JobFailed("hang", why))

    def _take_leave(self, line: connection.Connection[Any, Any]) -> None:
        process = self._children.pop(line).process
        line.close()
        process.join(10)
        process.kill()  # of those that are gone nothing is left to kill
        process.join()

    def _failed(self, child: _Child, order: _Order, failure: JobFailed) -> None:
        again = None
        if failure.reason == "out of memory":
            if child.pieces > 1:  # an earlier piece may have kept some
                again = order.work
            elif not order.smaller:
                again = order.work.smaller()
        if again is None:
            order.future.set_exception(failure)
        else:
            smaller = order.smaller or again is not order.work
            self._queue.appendleft(_Order(again, order.future, begun=True, smaller=smaller))


def _exit_failure(process: ForkServerProcess) -> JobFailed:
    """Why a child ended that said nothing."""
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return JobFailed("out of memory", "the process was killed, as is done for want of memory")
    if code < 0:
        return JobFailed("crash", f"the process ended by signal {-code}: {signal.strsignal(-code)}")
    return JobFailed("crash", f"the process ended with exit status {code} and no result")


def wait_for_any(jobs: Iterable[Future[Any]], seconds: float) -> None:
    """Waits until another of the jobs is done, or the time is over."""
    wait([job for job in jobs if not job.done()], seconds, return_when=FIRST_COMPLETED)
