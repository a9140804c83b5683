"""What a comparison would cost, and how small a difference its seeds would tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from archdsl.search.analysis.compare_results import finite, task_results
from archdsl.search.analysis.compare_setup import CompareSetup
from archdsl.search.analysis.comparison import JobResult, Key, entries_of
from archdsl.search.stats.paired import seeds_to_tell, told_by
from archdsl.search.trials.proxy import Job, ProxyScore

SEEDS = 3  # of the calibration
DIFFERENCES = (0.1, 0.05, 0.02, 0.01)  # nats


@dataclass(frozen=True)
class TaskPlan:
    """How many seeds tell a difference on a task.

    ``deviation``: the standard deviation, between seeds, of a loss difference to the reference in
    nats, after the first part of the training; the root of its mean square over the models.
    ``told``: the least true difference that the planned seeds tell in about three of four cases.
    ``needed``: the seeds that tell a difference, by its size; None: more than 1,000.
    """

    deviation: float
    told: float
    needed: dict[float, int | None]


@dataclass(frozen=True)
class ComparePlan:
    """The forecast of a comparison.

    ``share``: the part of the tokens of the calibration, from which the comparison goes on.
    ``trainings``: how many the comparison has; ``seconds``: what is left of their time with
    ``workers``; ``train_flops``: of all of them. ``failures``: what could not be trained.
    """

    tasks: dict[str, TaskPlan]
    seeds: int
    share: float
    trainings: int
    workers: int
    seconds: float
    train_flops: float
    failures: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the forecast as JSON values."""
        return asdict(self) | {
            "tasks": {
                name: {
                    "deviation": finite(task.deviation),
                    "told": finite(task.told),
                    "needed": {str(size): n for size, n in task.needed.items()},
                }
                for name, task in self.tasks.items()
            }
        }


def compare_plan(
    setup: CompareSetup,
    jobs: Mapping[Key, Job],
    results: Mapping[Key, JobResult],
    seeds: int,
    workers: int,
) -> ComparePlan:
    """Return the forecast from the results of the first parts of a few seeds."""
    entries = entries_of(setup.main_specs, setup.role, jobs, results)
    found = task_results(setup, entries)
    tasks, train_flops, seconds_left = {}, 0.0, 0.0
    runs = seeds + len(setup.lrs)  # of each model; first one with each learning rate
    for name, by_model in found.items():
        reference, *others = by_model.values()
        squares = [o.difference.deviation**2 for o in others if math.isfinite(o.difference.mean)]
        tasks[name] = _task_plan(math.sqrt(fmean(squares or [math.nan])), seeds, setup.comparisons)
        for one in (reference, *others):
            steps = one.task.rungs[-1]
            train_flops += runs * one.step_flops * steps
            whole, done = _seconds(one.scores, steps), _spent(one.scores)
            seconds_left += runs * whole - (0 if setup.lrs else done)  # of one rate, if of several
    first = next(iter(setup.proxy.tasks.values()))
    return ComparePlan(
        tasks,
        seeds,
        first.rungs[0] / first.rungs[-1],
        len(setup.names) * len(setup.proxy.tasks) * runs,
        workers,
        max(0.0, seconds_left) / workers,
        train_flops,
        [f"{entry.name}: {entry.error}" for entry in entries if entry.error],
    )


def _task_plan(deviation: float, seeds: int, comparisons: int) -> TaskPlan:
    told = told_by(seeds, deviation, comparisons) if seeds > 1 else math.inf
    needed = {size: seeds_to_tell(deviation, size, comparisons) for size in DIFFERENCES}
    return TaskPlan(deviation, told, needed)


def _seconds(scores: Sequence[ProxyScore], steps: int) -> float:
    """Return the seconds of one whole training: its steps, and twice the scoring of a part."""
    return fmean(
        score.step_seconds / score.steps * steps + 2 * (score.seconds - score.step_seconds)
        for score in scores
    )


def _spent(scores: Sequence[ProxyScore]) -> float:
    return sum(score.seconds for score in scores)
