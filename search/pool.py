"""Worker processes of one thread each, which end when their parent does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Protocol

from archdsl.search.proxy import Job, Score, run


class Pool(Protocol):
    workers: int

    def submit(self, job: Job) -> Future[Score]: ...


@contextmanager
def processes(workers: int) -> Iterator[Pool]:
    """Runs jobs in ``workers`` processes; on an exception they are ended at once."""
    # spawn: a fork of a process in which torch has threads can hang
    executor = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_prepare, initargs=(os.getpid(),)
    )
    try:
        yield _Processes(executor, workers)
        executor.shutdown()
    except BaseException:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=False, cancel_futures=True)
        raise


class _Processes:
    def __init__(self, executor: ProcessPoolExecutor, workers: int) -> None:
        self.executor, self.workers = executor, workers

    def submit(self, job: Job) -> Future[Score]:
        return self.executor.submit(run, job)


class InProcess:
    """Runs jobs at once, in this process: for one worker, and for tests."""

    workers = 1

    def submit(self, job: Job) -> Future[Score]:
        future: Future[Score] = Future()
        try:
            future.set_result(run(job))
        except Exception as error:  # a job's failure belongs to its future
            future.set_exception(error)
        return future


def _prepare(parent: int) -> None:
    """In a new worker: Ctrl-C is the parent's to handle, and its death is the worker's."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def first_done(jobs: Iterable[Future[Score]], seconds: float) -> None:
    """Waits until another of the jobs is done, or the time is over."""
    wait([job for job in jobs if not job.done()], seconds, return_when=FIRST_COMPLETED)
