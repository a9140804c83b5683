"""The spending of a study: the seconds and FLOPs of all processes that work on it.

Each process writes only its own record into the storage of the study. So no lock is needed, and the
spending of a process stays counted if the process is killed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from queue import SimpleQueue
from typing import Any, TypeVar

from optuna.storages import BaseStorage

from archdsl.search.trials.proxy import ProxyScore
from archdsl.search.workers.pool import Pool, Work

# the phases of a search; the spending is recorded separately for each of them
SEARCH = "search"
BASELINES = "baselines"
ABLATIONS = "ablations"
PROXY_VALIDATION = "proxy validation"
SUPERNET_VALIDATION = "supernet validation"
FORMER_NAMES = {
    "controls": BASELINES,
    "trust": PROXY_VALIDATION,
    "proof": SUPERNET_VALIDATION,
}  # names of the phases in records of earlier versions
SECONDS_BETWEEN_RECORDS = 5.0
R = TypeVar("R")


@dataclass(frozen=True)
class Spent:
    """What workers spent on training and scoring.

    ``seconds``: the sum over all workers. ``train_flops``, ``eval_flops``: floating-point
    operations of training and of scoring. ``jobs``: the number of jobs.
    """

    seconds: float = 0.0
    train_flops: float = 0.0
    eval_flops: float = 0.0
    jobs: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(spent: Spent) -> list[Any]:
    return list(asdict(spent).values())


@dataclass(frozen=True)
class Limits:
    """The most that a study may spend; None means no limit. ``seconds`` are wall-clock time."""

    seconds: float | None = None
    train_flops: float | None = None


@dataclass(frozen=True)
class SpendingSummary:
    """The spending of all processes together.

    ``wall``: the wall-clock seconds during which at least one process ran. ``by_phase``: the
    spending in each phase of the search. ``workers``: the number of processes that have worked on
    the study.
    """

    wall: float
    by_phase: dict[str, Spent] = field(default_factory=dict)
    workers: int = 1

    @property
    def total(self) -> Spent:
        """The sum over all phases."""
        return sum(self.by_phase.values(), Spent())

    def as_json(self) -> dict[str, Any]:
        """Return the summary as JSON values. Times are in seconds, rounded to 0.1 seconds."""
        total = self.total
        return {
            "wall_seconds": round(self.wall, 1),
            "worker_seconds": round(total.seconds, 1),
            "train_flops": total.train_flops,
            "eval_flops": total.eval_flops,
            "processes": self.workers,
            "by_phase": {phase: asdict(spent) for phase, spent in self.by_phase.items()},
        }


class Spending:
    """What this process has spent on a study, and what all processes together have spent."""

    def __init__(self, storage: BaseStorage, study_id: int, limits: Limits) -> None:
        self.storage, self.study_id, self.limits = storage, study_id, limits
        self.key = f"worker/{uuid.uuid4().hex[:12]}"
        self.started = time.time()
        self.recorded = 0.0
        self.mine: dict[str, Spent] = {}
        self.others = self._read()
        self.finished_jobs: SimpleQueue[tuple[str, Future[Any]]] = SimpleQueue()

    def metered(self, pool: Pool, phase_of: Callable[[Any], str]) -> Pool:
        """Return a pool whose finished jobs are counted as spending of their phase.

        ``phase_of`` is called with each piece of work when it is submitted.
        """
        return _MeteredPool(pool, phase_of, self.finished_jobs)

    def update(self) -> None:
        """Count the jobs that have finished, and write the record every few seconds.

        Call it often: if the process is killed, its spending after the last call is not counted.
        """
        charged = False
        while not self.finished_jobs.empty():
            charged |= self._charge(*self.finished_jobs.get())
        if charged or time.time() - self.recorded > SECONDS_BETWEEN_RECORDS:
            self.save()

    def _charge(self, phase: str, job: Future[Any]) -> bool:
        """Count the job and return True, unless it failed or its score was reused."""
        if job.cancelled() or job.exception() is not None:
            return False
        score = job.result()
        if not isinstance(score, ProxyScore) or score.reused:
            return False
        spent = Spent(score.seconds, score.train_flops, score.eval_flops, 1)
        self.mine[phase] = self.mine.get(phase, Spent()) + spent
        return True

    def save(self) -> None:
        """Write the record of this process into the storage, and read those of other processes."""
        self.recorded = time.time()
        self.storage.set_study_user_attr(self.study_id, self.key, self._record())
        self.others = self._read()

    def _record(self) -> dict[str, Any]:
        phases = {phase: asdict(spent) for phase, spent in self.mine.items()}
        return {"pid": os.getpid(), "from": self.started, "to": time.time(), "phases": phases}

    def _read(self) -> dict[str, Mapping[str, Any]]:
        attrs = self.storage.get_study_user_attrs(self.study_id)
        return {k: v for k, v in attrs.items() if k.startswith("worker/") and k != self.key}

    def summary(self) -> SpendingSummary:
        """Return the spending of all processes up to now."""
        records = [*self.others.values(), self._record()]
        phases: dict[str, Spent] = {}
        for record in records:
            for name, spent in record["phases"].items():
                phase = FORMER_NAMES.get(name, name)
                phases[phase] = phases.get(phase, Spent()) + Spent(**spent)
        return SpendingSummary(
            covered_seconds([(r["from"], r["to"]) for r in records]), phases, len(records)
        )

    @property
    def is_spent(self) -> bool:
        """Whether a limit is reached."""
        return self.seconds_left <= 0 or self.flops_left <= 0

    @property
    def seconds_left(self) -> float:
        """The wall-clock seconds until the limit; infinite without a limit."""
        if self.limits.seconds is None:
            return float("inf")
        return self.limits.seconds - self.summary().wall

    @property
    def flops_left(self) -> float:
        """The training FLOPs until the limit; infinite without a limit."""
        if self.limits.train_flops is None:
            return float("inf")
        return self.limits.train_flops - self.summary().total.train_flops


@dataclass(frozen=True)
class _MeteredPool:
    pool: Pool
    phase_of: Callable[[Any], str]
    finished_jobs: SimpleQueue[tuple[str, Future[Any]]]

    @property
    def workers(self) -> int:
        """The number of workers of the pool."""
        return self.pool.workers

    def submit(self, work: Work[R]) -> Future[R]:
        """Submit the work to the pool, and count it when it has finished."""
        phase, future = self.phase_of(work), self.pool.submit(work)
        future.add_done_callback(lambda job: self.finished_jobs.put((phase, job)))
        return future


def spending_summary(storage: BaseStorage, study_id: int) -> SpendingSummary:
    """Return the spending of a study, from a process that does not work on it."""
    spending = Spending(storage, study_id, Limits())
    wall = covered_seconds([(r["from"], r["to"]) for r in spending.others.values()])
    return replace(spending.summary(), wall=wall, workers=len(spending.others))


def covered_seconds(sessions: list[tuple[float, float]]) -> float:
    """Return the seconds that at least one session covers.

    A session is a pair of its start and its end, in seconds since the epoch.
    """
    total, end = 0.0, float("-inf")
    for start, stop in sorted(sessions):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
