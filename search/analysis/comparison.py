"""Comparison of models that are trained alike, by paired differences of their losses.

The last phase of a search compares its winner with baselines and ablations, with seeds that were
not used in the search; `ablate` does this for a given model, and `compare` compares given models
with one of them, the reference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from archdsl.costs.receipt import Receipt, cost
from archdsl.lang.spec import ModelSpec
from archdsl.search.analysis.baselines import BASELINES, WINNER, Specs, compared_specs, distinct
from archdsl.search.space.model_summary import model_summary
from archdsl.search.space.objectives import executed_flops
from archdsl.search.stats.paired import Difference, paired
from archdsl.search.study.shared_jobs import SharedJobs, shared_jobs
from archdsl.search.study.storage import HEARTBEAT_SECONDS
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, mean_shares, objective
from archdsl.search.workers.pool import (
    JobFailed,
    Pool,
    default_workers,
    end_if_disk_is_full,
    process_pool,
    wait_for_any,
)

OBJECTIVE = "objective"
SECONDS_BETWEEN_UPDATES = 0.5

Role = Literal["winner", "baseline", "ablation", "reference", "model"]
Key = tuple[str, str, int]  # name, task, seed
JobResult = ProxyScore | JobFailed
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class ComparisonEntry:
    """One of the models that are compared.

    ``spec`` and ``receipt`` are of full size (in `compare`: of the size that is trained).
    ``scores`` are those of the proxy, by task, one for each seed. If a training failed, the lists
    are empty and ``error`` gives the reason. ``executed`` are the forward FLOPs per token of
    ``spec``, at the shares of tokens that the routers of the proxies selected; None if they are not
    known.
    """

    name: str
    role: Role
    spec: ModelSpec
    receipt: Receipt
    scores: dict[str, list[ProxyScore]]
    error: str = ""
    executed: float | None = None

    def losses(self, task: str) -> list[float]:
        """Return the loss of each seed in nats, infinity where training diverged."""
        return [math.inf if s.loss is None else s.loss for s in self.scores[task]]


def role_of(name: str) -> Role:
    """Return the role of an entry by its name, as ``compared_specs`` gives it."""
    if name == WINNER:
        return "winner"
    return "baseline" if name in BASELINES else "ablation"


# training


def comparison_jobs(
    winner: ModelSpec, proxy: Proxy, seeds: Iterable[int], store: Path, *, ablate: bool
) -> dict[Key, Job]:
    """Return the trainings of a comparison in the order in which they should be done.

    Baselines come before ablations. They are made from the proxy of the winner, because they must
    have equal parameters or FLOPs at the size that is trained. ``store`` is the folder of results;
    ``ablate`` says whether ablations are included.
    """
    small = {t: compared_specs(proxy.shrink(winner, task)) for t, task in proxy.tasks.items()}
    names = [n for n in distinct(list(small.values())) if ablate or role_of(n) != "ablation"]
    return trainings(names, small, proxy, seeds, store)


def trainings(
    names: Sequence[str],
    small: Mapping[str, Specs],
    proxy: Proxy,
    seeds: Iterable[int],
    store: Path,
) -> dict[Key, Job]:
    """Return the trainings of the models ``names`` on all tasks, with all seeds.

    ``small``: by task, the specs of the size that is trained. The order is seed by seed, so that as
    many seeds as possible are complete whenever the time is used up.
    """
    return {
        (name, t, seed): task.job(store, small[t][name], seed, task.rungs[-1])
        for seed in seeds
        for name in names
        for t, task in proxy.tasks.items()
    }


def run_comparison(
    pool: Pool,
    jobs: Mapping[K, Job],
    may_go_on: Callable[[], bool],
    tell: Callable[[str], None],
    shared: SharedJobs[K] | None = None,
    results: dict[K, JobResult] | None = None,
) -> dict[K, JobResult]:
    """Run the jobs that have no stored score, in their order, and return all results.

    ``may_go_on`` is asked before each job starts; False starts no further job. ``tell`` is called
    about twice a second with a sentence on the progress. ``shared``: the jobs in a database; those
    that other processes have claimed are waited for. When no further job may start, only those are
    that they do at that moment. ``results``: is filled and returned, so that an interruption does
    not lose what is in it.
    """
    results = {} if results is None else results
    results |= known_scores(jobs, shared)
    waiting = [key for key in jobs if key not in results]
    running: dict[Future[ProxyScore], K] = {}
    asked, started = len(waiting), time.monotonic()

    def said() -> str:
        missing = len(waiting) + len(running)
        done = asked - missing
        seconds = (time.monotonic() - started) / max(1, done) * missing
        left = f", {timedelta(seconds=round(seconds))} left" if done and round(seconds) else ""
        others = "; other processes do the rest" if shared and waiting and not running else ""
        return f"{len(jobs) - missing} of {len(jobs)} trainings{left}{others}"

    last: list[K] | None = None  # of other processes, when no further job may start

    def goes_on() -> bool:
        nonlocal last
        if last is None and may_go_on():
            return True
        asked = waiting if last is None else [key for key in last if key in waiting]
        last = shared.at_work(asked) if shared else []
        return bool(last)

    while running or (waiting and goes_on()):
        while waiting and last is None and len(running) < pool.workers and may_go_on():
            key = shared.claim(waiting) if shared else _free(waiting, jobs)
            if key is None:
                break
            waiting.remove(key)
            running[pool.submit(jobs[key])] = key
        tell(said())
        if running:
            wait_for_any(running, SECONDS_BETWEEN_UPDATES)
        else:  # other processes have claimed all that is left
            time.sleep(SECONDS_BETWEEN_UPDATES)
        for future in [future for future in running if future.done()]:
            key = running.pop(future)
            results[key] = _result(future)
            if shared:
                _share(shared, key, results[key])
        if shared:
            results |= shared.scores()
            waiting = [key for key in waiting if key not in results]
    tell(f"{len(jobs) - len(waiting)} of {len(jobs)} trainings")
    return results


def run_trainings(
    jobs: Mapping[K, Job],
    seconds: float | None,
    workers: int | None,
    memory: int | None,
    tell: Callable[[str], None],
    storage: str | None = None,
    study: str = "",
    heartbeat: int = HEARTBEAT_SECONDS,
) -> tuple[dict[K, JobResult], bool]:
    """Run jobs in worker processes; return their results, and whether Ctrl-C ended them.

    ``storage``: the URL of a database by which many machines share the jobs, in a study of the name
    ``study``. ``heartbeat``: seconds between two heartbeats, the same for all of them. Raises
    StorageError if the database cannot be used.
    """
    if not jobs:
        return {}, False
    end = None if seconds is None else time.monotonic() + seconds
    with shared_jobs(storage, study, jobs, heartbeat) as shared:
        try:
            with process_pool(workers or default_workers(), memory) as pool:
                return run_comparison(
                    pool, jobs, lambda: end is None or time.monotonic() < end, tell, shared
                ), False
        except KeyboardInterrupt:
            return dict(known_scores(jobs, shared)), True


def _free(waiting: Sequence[K], jobs: Mapping[K, Job]) -> K:
    """Return the first job that no other process is running: workers with one store share them."""
    return next((key for key in waiting if not jobs[key].stored_run.in_use), waiting[0])


def stored_scores(jobs: Mapping[K, Job]) -> dict[K, ProxyScore]:
    """Return the scores of the jobs that were done before."""
    found = {key: job.stored_score() for key, job in jobs.items()}
    return {key: score for key, score in found.items() if score is not None}


def known_scores(jobs: Mapping[K, Job], shared: SharedJobs[K] | None) -> dict[K, ProxyScore]:
    """Return the stored scores, which are put into the database as well, and those that it has."""
    found = stored_scores(jobs)
    if shared is None:
        return found
    shared.add(found)
    return found | shared.scores()


def _share(shared: SharedJobs[K], key: K, result: JobResult) -> None:
    """Record the result of a claimed job; one that failed may be tried by another process."""
    if isinstance(result, JobFailed):
        shared.release(key)
    else:
        shared.finish(key, result)


def _result(future: Future[ProxyScore]) -> JobResult:
    try:
        return future.result()
    except JobFailed as failure:
        end_if_disk_is_full(failure)
        return failure


# results


def entries(
    winner: ModelSpec, jobs: Mapping[Key, Job], results: Mapping[Key, JobResult]
) -> list[ComparisonEntry]:
    """Return the winner and the entries that it can be compared with."""
    return entries_of(compared_specs(winner), role_of, jobs, results)


def entries_of(
    full: Specs,
    role: Callable[[str], Role],
    jobs: Mapping[Key, Job],
    results: Mapping[Key, JobResult],
) -> list[ComparisonEntry]:
    """Return an entry for each model that has a complete seed, in the order of the jobs.

    ``full``: the specs of the entries, and ``role`` the role, by name. Only complete seeds count:
    for ablations those with which everything was trained, for others those with which all of the
    others were trained.
    """
    names = list(dict.fromkeys(name for name, _, _ in jobs))
    rivals = [name for name in names if role(name) != "ablation"]
    found = []
    for name in names:
        seeds = _whole(rivals if name in rivals else names, jobs, results)
        if seeds:
            found.append(_entry(name, role(name), full[name], seeds, jobs, results))
    return found


def _whole(
    names: Sequence[str], jobs: Mapping[Key, Job], results: Mapping[Key, JobResult]
) -> list[int]:
    """Return the first seeds with which all ``names`` were trained on all tasks."""
    seeds = list(dict.fromkeys(seed for _, _, seed in jobs))
    missing = [seed for name, _, seed in jobs.keys() - results.keys() if name in names]
    return seeds[: min(map(seeds.index, missing), default=len(seeds))]


def _entry(
    name: str,
    role: Role,
    full: ModelSpec,
    seeds: Sequence[int],
    jobs: Mapping[Key, Job],
    results: Mapping[Key, JobResult],
) -> ComparisonEntry:
    tasks = dict.fromkeys(task for _, task, _ in jobs)
    scores: dict[str, list[ProxyScore]] = {task: [] for task in tasks}
    for seed in seeds:
        for task in tasks:
            result = results[name, task, seed]
            if isinstance(result, JobFailed):
                error = f"{task}, seed {seed}: {result}"
                return ComparisonEntry(name, role, full, cost(full), {t: [] for t in tasks}, error)
            scores[task].append(result)
    small = jobs[name, next(iter(tasks)), seeds[0]].spec
    shares = mean_shares([score for of_task in scores.values() for score in of_task])
    return ComparisonEntry(
        name,
        role,
        full,
        cost(full),
        scores,
        executed=executed_flops(full, small, shares) if shares else cost(full).expected,
    )


def objectives(entry: ComparisonEntry, proxy: Proxy) -> list[float]:
    """Return the objective of each seed in nats, infinity where training diverged."""
    by_seed = zip(*(entry.scores[task] for task in proxy.tasks), strict=True)
    totals = [objective(dict(zip(proxy.tasks, scores, strict=True)), proxy) for scores in by_seed]
    return [math.inf if total is None else total for total in totals]


def differences(
    entries: Sequence[ComparisonEntry], proxy: Proxy
) -> dict[str, dict[str, Difference]]:
    """Return how much higher the losses of baselines and ablations are than the winner's.

    The first key is the name of the entry, the second ``OBJECTIVE`` or a task. Differences are
    paired by seed. Entries whose training failed are left out; if the winner's failed, the result
    is empty.
    """
    own = winner_of(entries)
    if own is None or own.error:
        return {}
    return {
        entry.name: {OBJECTIVE: _gap(objectives(entry, proxy), objectives(own, proxy))}
        | {task: _gap(entry.losses(task), own.losses(task)) for task in proxy.tasks}
        for entry in entries
        if entry is not own and not entry.error
    }


def _gap(other: Sequence[float], own: Sequence[float]) -> Difference:
    """Compare over the seeds that both have, which are the first ones."""
    return paired(other, own[: len(other)])


def winner_of(entries: Sequence[ComparisonEntry]) -> ComparisonEntry | None:
    """Return the winner or the reference; None if it has no complete seed yet."""
    return next((entry for entry in entries if entry.role in ("winner", "reference")), None)


def as_json(entries: Sequence[ComparisonEntry], proxy: Proxy) -> list[dict[str, Any]]:
    """Return the entries for result.json: spec, scores, and difference from the winner."""
    gaps = differences(entries, proxy)
    return [
        {
            "name": entry.name,
            "role": entry.role,
            "params": entry.receipt.params,
            "flops_per_token": entry.receipt.expected,
            "executed_flops_per_token": entry.executed,
            "words": model_summary(entry.spec),
            "spec": entry.spec.to_yaml(),
            "error": entry.error,
            "scores": {
                task: [score.model_dump(mode="json") for score in scores]
                for task, scores in entry.scores.items()
            },
            "objective": [_finite(total) for total in objectives(entry, proxy)],
            "difference": {
                task: {"mean": _finite(gap.mean), "half_width": _finite(gap.half_width)}
                for task, gap in gaps[entry.name].items()
            }
            if entry.name in gaps
            else None,
        }
        for entry in entries
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
