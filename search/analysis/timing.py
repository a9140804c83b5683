"""Measures time and memory of training the proxies of a search space, on a few of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from archdsl.lang.spec import ModelSpec
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, Task
from archdsl.search.workers.pool import Heartbeat, JobFailed, Pool, wait_for_any

FEW, MANY = 4, 24  # steps of the two rungs of a probe
LEAST = 2  # proxies that are measured even if the time is over


@dataclass(frozen=True)
class Probe:
    """A short training on two rungs: ``few`` steps, then up to ``many`` steps."""

    job: Job
    few: int
    many: int

    def run(self, heartbeat: Heartbeat) -> tuple[ProxyScore, ProxyScore]:
        """Train and return the scores of both rungs."""
        first, second = (replace(self.job, steps=n).run(heartbeat) for n in (self.few, self.many))
        return first, second

    def smaller(self) -> Probe | None:
        """Return the same probe with half the sequences at a time; None if that is impossible."""
        job = self.job.smaller()
        return None if job is None else replace(self, job=job)


@dataclass(frozen=True)
class NoWork:
    """Work that does nothing but start a worker."""

    def run(self, heartbeat: Heartbeat) -> None:
        """Return at once."""

    def smaller(self) -> None:
        """Return None: there is nothing to make smaller."""


@dataclass(frozen=True)
class Speed:
    """The cost of training one proxy on one task, with one worker.

    ``per_step`` are seconds of a training step. ``per_rung`` are the further seconds of a rung: to
    start a worker, load or build the model, score and save it. ``flops_per_step`` are training
    FLOPs, ``peak_bytes`` is the memory of the process.
    """

    per_step: float
    per_rung: float
    flops_per_step: float
    peak_bytes: int

    def seconds(self, steps: int, rungs: int) -> float:
        """Return the seconds of a training of so many steps on so many rungs."""
        return rungs * self.per_rung + steps * self.per_step


def measured(first: ProxyScore, second: ProxyScore, elapsed: float) -> Speed:
    """Estimate the speed from the scores of a probe.

    ``elapsed`` are the seconds from the submission of the probe to its result.
    """
    starting = max(0.0, elapsed - first.seconds - second.seconds)
    # beside their steps both rungs take the same time
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
    """The speeds of a few models, by task, and the messages of those that could not be trained.

    ``seconds`` is the time that the measurement took.
    """

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
    """Measure one model after the other for ``seconds``; probes that have started are finished.

    ``store`` is a folder that only the probes use. Raises JobFailed if no model could be trained on
    all tasks.
    """
    pool.submit(NoWork()).result()  # the first worker waits until the server has started
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
    """Yield index of the model, task and probe; models with equal proxies are probed once."""
    known: set[str] = set()
    for index, model in enumerate(models):
        small = {name: proxy.shrink(model, task) for name, task in proxy.tasks.items()}
        equal = "".join(spec.fingerprint() for spec in small.values())
        if equal in known:
            continue
        known.add(equal)
        for name, task in proxy.tasks.items():
            few, many = _steps(task)
            alike = task.model_copy(update={"early_eval_tokens": 0})  # both rungs score on all
            yield index, name, Probe(alike.job(store, small[name], seed, few), few, many)


def _steps(task: Task) -> tuple[int, int]:
    many = max(2, min(MANY, task.rungs[-1]))
    return min(FEW, max(1, many // 4)), many


def _probed(
    pool: Pool,
    probes: Iterator[tuple[int, str, Probe]],
    may_start: Callable[[int], bool],
) -> Iterator[tuple[int, str, Speed | JobFailed]]:
    """Run the probes, one for each worker at a time, so that no probe's time includes waiting."""
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
