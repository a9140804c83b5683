"""How trials are scored: which job gives a trial its score on a task at a rung."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from archdsl.costs.receipt import train_flops
from archdsl.lang.spec import ModelSpec
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, Task
from archdsl.search.workers.pool import Work


class Scorer(Protocol):
    """A way to score trials."""

    @property
    def rungs(self) -> int:
        """The number of rungs at which a trial is scored before it is complete."""
        ...

    def job(
        self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int
    ) -> Work[ProxyScore]:
        """Return the job that scores a full-size spec on a task at a rung.

        ``params``: the search values of the trial. ``rung``: its index, from 0.
        """
        ...


@dataclass(frozen=True)
class SeparateTraining:
    """Train the proxy of each trial separately. ``store``: the folder of the result store."""

    proxy: Proxy
    store: Path
    seed: int

    @property
    def rungs(self) -> int:
        """The number of rungs of the proxy."""
        return self.proxy.rungs

    def job(self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int) -> Job:
        """Return the job that trains the proxy of a spec on a task up to a rung.

        Raises DataError if the data of the task cannot be loaded.
        """
        trained = self.proxy.tasks[task]
        small = self.proxy.shrink(spec, trained)
        return trained.job(self.store, small, self.seed, trained.rungs[rung])


def training_flops(proxy: Proxy, spec: ModelSpec) -> float:
    """Return the FLOPs of training the proxy of a spec on all tasks up to the last rung.

    They are computed by the closed form.
    """
    return sum(task_flops(task, proxy.shrink(spec, task)) for task in proxy.tasks.values())


def cost_in_trainings(jobs: Iterable[Job], proxy: Proxy, spec: ModelSpec) -> float:
    """Return how many trainings of the proxy of a spec cost as many FLOPs as the jobs."""
    return sum(task_flops(job.task, job.spec) for job in jobs) / training_flops(proxy, spec)


def task_flops(task: Task, small: ModelSpec) -> float:
    """Return the FLOPs of training a spec on one task up to the last rung, as it is.

    Raises DataError if the data of the task cannot be loaded.
    """
    return train_flops(small, tokens=task.length) * task.batch_size * task.rungs[-1]
