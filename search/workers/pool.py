"""A pool of worker processes of one thread each, in which each piece of work can fail alone.

Workers are forked from a server process that has imported torch. Each does one piece of work after
the other until one fails, and ends when the process that uses the pool ends. A worker may be a
group of processes, see `archdsl.search.workers.group`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
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

from archdsl.search.workers.worker import (
    Heartbeat,
    JobFailed,
    Work,
    end_if_disk_is_full,
    failure,
    run_worker,
)

__all__ = [
    "Heartbeat",
    "InProcess",
    "JobFailed",
    "Pool",
    "ProcessPool",
    "Work",
    "default_workers",
    "device_count",
    "end_if_disk_is_full",
    "process_pool",
    "start_server",
    "wait_for_any",
]

R = TypeVar("R")

HEARTBEAT_INTERVAL = 1.0  # seconds; shorter if the patience is short
STARTUP_SECONDS = 60.0  # granted before the first heartbeat: the server may be importing torch
WORK_PER_WORKER = 50  # done by one process, then a new one starts and leaked memory is freed


def default_workers(devices_per_trial: int = 1, device: str = "cpu") -> int:
    """Return how many workers this machine has devices for: of cores, at most 8 are used."""
    found = device_count(device)
    return max(1, (min(8, found) if device == "cpu" else found) // devices_per_trial)


def device_count(device: str) -> int:
    """Return the number of devices of a kind that this machine has, which are cores for ``cpu``."""
    if device == "cpu":
        return os.cpu_count() or 1
    import torch

    return torch.accelerator.device_count()


class Pool(Protocol):
    """Something that does pieces of work, up to ``workers`` of them at once."""

    @property
    def workers(self) -> int:
        """How many pieces of work run at once."""

    def submit(self, work: Work[R]) -> Future[R]:
        """Start the work, or queue it; the future has its result or the error that it raised."""


class InProcess:
    """A pool that does work at once, in this process. For tests."""

    workers = 1

    def submit(self, work: Work[R]) -> Future[R]:
        """Do the work; the future holds its result or a JobFailed."""
        future: Future[R] = Future()
        try:
            future.set_result(_run_with_retry(work))
        except Exception as error:  # a failure belongs to its future
            future.set_exception(failure(error))
        return future


def _run_with_retry(work: Work[R]) -> R:
    """Out of memory, the work is tried once more in a smaller form."""
    try:
        return work.run(lambda: None)
    except Exception as error:
        smaller = work.smaller() if failure(error).reason == "out of memory" else None
        if smaller is None:
            raise
    return smaller.run(lambda: None)


@contextmanager
def process_pool(
    workers: int, memory: int | None = None, patience: float = 120.0, devices: int = 1
) -> Iterator[ProcessPool]:
    """A pool of ``workers`` workers; at the end of the block it waits until all work is done.

    ``memory``: bytes that each process may allocate. ``patience``: seconds without a heartbeat
    after which a worker is killed. ``devices``: of each worker, which has a process for each. If
    the block raises an exception, all workers are killed at once.
    """
    pool = ProcessPool(workers, memory, patience, devices)
    try:
        yield pool
        pool.finish()
    except BaseException:
        pool.kill()
        raise


def start_server() -> None:
    """Start the server from which workers are forked, unless it is running.

    It imports torch, which takes seconds: call this before this process imports torch as well.
    """
    multiprocessing.set_forkserver_preload(["archdsl.search.worker_preload"])
    # Ctrl-C is handled by this process alone. The server ignores it only after its imports, so it
    # starts with the signal blocked. The resource tracker would unblock the signal: it goes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _Submission:
    """A piece of work and its future. ``retried``: it failed once and now needs a new worker."""

    work: Work[Any]
    future: Future[Any]
    retried: bool = False
    made_smaller: bool = False


@dataclass
class _Worker:
    """A worker process. ``submission``: its work; None while it waits. ``taken``: how many it had.

    ``place``: its number among the workers. ``last_heartbeat``: by the monotonic clock.
    """

    process: ForkServerProcess
    place: int
    last_heartbeat: float
    submission: _Submission | None = None
    taken: int = 0


Pipe = connection.Connection  # its other end is in a worker


class ProcessPool:
    """A queue of work and the processes that do it. One thread serves them all."""

    def __init__(self, workers: int, memory: int | None, patience: float, devices: int = 1) -> None:
        self.workers, self.memory, self.patience, self.devices = workers, memory, patience, devices
        self._context = multiprocessing.get_context("forkserver")
        start_server()
        self._queue: deque[_Submission] = deque()
        self._workers: dict[Pipe[Any, Any], _Worker] = {}
        self._wake_receiver, self._wake_sender = self._context.Pipe(duplex=False)
        self._until: Literal["closed", "done", "now"] = "closed"
        self._thread = threading.Thread(target=self._serve, name="pool", daemon=True)
        self._thread.start()

    def submit(self, work: Work[R]) -> Future[R]:
        """Queue the work; the future will hold its result or a JobFailed."""
        future: Future[R] = Future()
        self._queue.append(_Submission(work, future))
        self._wake_sender.send(None)
        return future

    def finish(self) -> None:
        """Wait until all work is done, then end the workers."""
        self._close("done")

    def kill(self) -> None:
        """Kill the workers; the futures of unfinished work are cancelled."""
        self._close("now")

    def _close(self, until: Literal["done", "now"]) -> None:
        self._until = until
        self._wake_sender.send(None)
        self._thread.join()
        self._wake_receiver.close()
        self._wake_sender.close()

    @property
    def _busy(self) -> list[tuple[Pipe[Any, Any], _Worker, _Submission]]:
        return [(p, w, w.submission) for p, w in self._workers.items() if w.submission]

    @property
    def _is_open(self) -> bool:
        unfinished = bool(self._queue or self._busy)
        return self._until == "closed" or (self._until == "done" and unfinished)

    def _serve(self) -> None:
        try:
            while self._is_open:
                while self._queue and len(self._busy) < self.workers:
                    self._assign(self._queue.popleft())
                self._receive()
                self._kill_hung()
        finally:
            self._end_all()

    def _end_all(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
        for pipe, worker in self._workers.items():
            worker.process.join()
            if worker.submission:
                worker.submission.future.set_exception(CancelledError())
            pipe.close()
        for submission in self._queue:
            submission.future.cancel()

    def _assign(self, submission: _Submission) -> None:
        """Send the work to a waiting worker, or to a new one."""
        if not submission.retried and not submission.future.set_running_or_notify_cancel():
            return
        try:
            work = ForkingPickler.dumps(submission.work)
            waiting = [pipe for pipe, worker in self._workers.items() if not worker.submission]
            pipe = waiting[0] if waiting and not submission.retried else self._start_worker()
        except Exception as error:  # for example, the work cannot be pickled
            submission.future.set_exception(failure(error))
            return
        worker = self._workers[pipe]
        worker.submission, worker.taken = submission, worker.taken + 1
        worker.last_heartbeat = max(worker.last_heartbeat, time.monotonic())
        with suppress(OSError):  # the worker has just died, which `_receive` will notice
            pipe.send_bytes(work)

    def _start_worker(self) -> Pipe[Any, Any]:
        ours, theirs = self._context.Pipe()
        interval = min(HEARTBEAT_INTERVAL, self.patience / 8)
        taken = {worker.place for worker in self._workers.values()}
        place = min(set(range(len(taken) + 1)) - taken)
        devices = range(place * self.devices, (place + 1) * self.devices)
        process = self._context.Process(
            target=run_worker, args=(theirs, self.memory, interval, devices), daemon=True
        )
        try:
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._workers[ours] = _Worker(process, place, time.monotonic() + STARTUP_SECONDS)
        return ours

    def _receive(self) -> None:
        """Wait for messages until a worker may have hung, and handle them."""
        oldest = min((worker.last_heartbeat for _, worker, _ in self._busy), default=None)
        seconds = oldest and max(0.0, oldest + self.patience - time.monotonic())
        for ready in connection.wait([self._wake_receiver, *self._workers], seconds):
            assert isinstance(ready, connection.Connection)
            if ready is self._wake_receiver:
                ready.recv()
            else:
                self._handle(ready)

    def _handle(self, pipe: Pipe[Any, Any]) -> None:
        """A message is None (a heartbeat), a JobFailed, or a tuple of the result alone."""
        worker = self._workers[pipe]
        submission = worker.submission
        try:
            message = pipe.recv()
        except (EOFError, OSError):  # the worker has died
            self._end_worker(pipe)
            if submission:
                self._fail(worker, submission, _exit_failure(worker.process))
            return
        if message is None or submission is None:
            worker.last_heartbeat = time.monotonic()
            return
        worker.submission = None
        if isinstance(message, JobFailed):
            self._end_worker(pipe)
            self._fail(worker, submission, message)
        else:
            if worker.taken == WORK_PER_WORKER:
                self._end_worker(pipe)
            submission.future.set_result(message[0])

    def _kill_hung(self) -> None:
        now = time.monotonic()
        for pipe, worker, submission in self._busy:
            if now - worker.last_heartbeat >= self.patience:
                worker.process.kill()
                self._end_worker(pipe)
                reason = f"no training step in {self.patience:g} s, so the process was killed"
                self._fail(worker, submission, JobFailed("hang", reason))

    def _end_worker(self, pipe: Pipe[Any, Any]) -> None:
        process = self._workers.pop(pipe).process
        pipe.close()
        process.join(10)
        process.kill()  # does nothing if it has ended
        process.join()

    def _fail(self, worker: _Worker, submission: _Submission, failure: JobFailed) -> None:
        """Report the failure; out of memory, try once more in a new worker, or in smaller form."""
        again = None
        if failure.reason == "out of memory":
            if worker.taken > 1:  # earlier work may have kept some memory
                again = submission.work
            elif not submission.made_smaller:
                again = submission.work.smaller()
        if again is None:
            submission.future.set_exception(failure)
            return
        smaller = submission.made_smaller or again is not submission.work
        retry = _Submission(again, submission.future, retried=True, made_smaller=smaller)
        self._queue.appendleft(retry)


def _exit_failure(process: ForkServerProcess) -> JobFailed:
    """The failure of a worker that ended without a message."""
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return JobFailed(
            "out of memory", "the process was killed, as the system does when memory runs out"
        )
    if code < 0:
        return JobFailed("crash", f"the process ended by signal {-code}: {signal.strsignal(-code)}")
    return JobFailed("crash", f"the process ended with exit status {code} and no result")


def wait_for_any(jobs: Iterable[Future[Any]], seconds: float) -> None:
    """Wait until one of the jobs is done, or ``seconds`` are over."""
    wait(set(jobs), seconds, return_when=FIRST_COMPLETED)
