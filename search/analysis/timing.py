"""How long the training of a space's proxies takes, and what memory, measured on a few of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from archdsl.lang.spec import ModelSpec
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, Task
from archdsl.search.workers.pool import Heartbeat, JobFailed, Pool, wait_for_any

FEW, MANY = 4, 24  # steps that a probe trains, scored at both
LEAST = 2  # proxies that are measured, however long it takes


@dataclass(frozen=True)
class Probe:
    """Trains a proxy for ``few`` steps and then up to ``many``, as up two rungs."""

    job: Job
    few: int
    many: int

    def run(self, heartbeat: Heartbeat) -> tuple[ProxyScore, ProxyScore]:
        first, second = (replace(self.job, steps=n).run(heartbeat) for n in (self.few, self.many))
        return first, second

    def smaller(self) -> Probe | None:
        job = self.job.smaller()
        return None if job is None else replace(self, job=job)


@dataclass(frozen=True)
class NoWork:
    """Work that only starts a child."""

    def run(self, heartbeat: Heartbeat) -> None:
        pass

    def smaller(self) -> None:
        return None


@dataclass(frozen=True)
class Speed:
    """What one proxy costs on one task. Seconds are of one worker, FLOPs of training.

    ``per_rung``: to start a child, load or build, score and save.
    """

    per_step: float
    per_rung: float
    flops_per_step: float
    peak_bytes: int

    def seconds(self, steps: int, rungs: int) -> float:
        return rungs * self.per_rung + steps * self.per_step


def measured(first: ProxyScore, second: ProxyScore, elapsed: float) -> Speed:
    """From the scores of a probe and the seconds between asking for it and having it."""
    starting = max(0.0, elapsed - first.seconds - second.seconds)
    # both rungs had the same to do beside their steps
    more = (second.steps - first.steps) - first.steps
    per_step = max(0.0, (second.seconds - first.seconds) / more) if more > 0 else 0.0
    per_rung = max(0.0, first.seconds - first.steps * per_step) + starting
    return Speed(
        per_step,
        per_rung,
        (first.train_flops + second.train_flops) / second.steps,
        max(first.peak_bytes, second.peak_bytes),
    )


@dataclass(frozen=True)
class Timing:
    """The speeds of proxies by task; ``failures``: what those said that could not be trained."""

    models: list[ModelSpec]
    speeds: list[dict[str, Speed]]
    failures: list[str]
    seconds: float


def measure_timing(
    pool: Pool,
    models: Sequence[ModelSpec],
    proxy: Proxy,
    store: Path,
    *,
    seconds: float,
    seed: int = 0,
) -> Timing:
    """Probes one proxy after the other until the time is over, and what is under way is done.

    ``store``: a folder for the probes alone. Raises JobFailed if none of them could be trained.
    """
    pool.submit(NoWork()).result()  # the first child waits for a server that starts
    started = time.monotonic()
    found: dict[int, dict[str, Speed]] = {}
    failures: list[JobFailed] = []

    def may_start(index: int) -> bool:
        return index < LEAST or time.monotonic() - started < seconds

    for index, task, done in _probed(pool, _probes(models, proxy, store, seed), may_start):
        if isinstance(done, JobFailed):
            failures.append(done)
        else:
            found.setdefault(index, {})[task] = done
    whole = sorted(index for index, by_task in found.items() if len(by_task) == len(proxy.tasks))
    if not whole:
        raise failures[0]
    return Timing(
        models=[models[index] for index in whole],
        speeds=[found[index] for index in whole],
        failures=[str(failure) for failure in failures],
        seconds=time.monotonic() - started,
    )


def _probes(
    models: Sequence[ModelSpec], proxy: Proxy, store: Path, seed: int
) -> Iterator[tuple[int, str, Probe]]:
    """By place in ``models`` and task; models whose proxies are equal are probed once."""
    known: set[str] = set()
    for index, model in enumerate(models):
        small = {name: proxy.shrink(model, task) for name, task in proxy.tasks.items()}
        equal = "".join(spec.fingerprint() for spec in small.values())
        if equal in known:
            continue
        known.add(equal)
        for name, task in proxy.tasks.items():
            few, many = _steps(task)
            yield index, name, Probe(Job(store, small[name], task, seed, few), few, many)


def _steps(task: Task) -> tuple[int, int]:
    many = max(2, min(MANY, task.rungs[-1]))
    return min(FEW, max(1, many // 4)), many


def _probed(
    pool: Pool,
    probes: Iterator[tuple[int, str, Probe]],
    may_start: Callable[[int], bool],
) -> Iterator[tuple[int, str, Speed | JobFailed]]:
    """Keeps each worker busy with one probe, so that none waits within the time it is given."""
    running: dict[Future[tuple[ProxyScore, ProxyScore]], tuple[int, str, float]] = {}
    more = True
    while more or running:
        while more and len(running) < pool.workers:
            index, task, probe = next(probes, (-1, "", None))
            more = probe is not None and may_start(index)
            if probe is not None and more:
                asked = time.monotonic()
                running[pool.submit(probe)] = (index, task, asked)
        wait_for_any(running, seconds=1.0)
        for future in [future for future in running if future.done()]:
            index, task, asked = running.pop(future)
            failure = future.exception()
            if isinstance(failure, JobFailed):
                yield index, task, failure
            else:
                yield index, task, measured(*future.result(), time.monotonic() - asked)
