"""The contest: a winner beside its controls and ablations, trained alike with seeds that chose
nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from archdsl.costs.receipt import Receipt, cost
from archdsl.lang.spec import ModelSpec
from archdsl.search.analysis.baselines import BASELINES, WINNER, compared_specs, distinct
from archdsl.search.space.model_summary import model_summary
from archdsl.search.stats.paired import Difference, paired
from archdsl.search.trials.proxy import Job, Proxy, ProxyScore, objective
from archdsl.search.workers.pool import JobFailed, Pool

OBJECTIVE = "objective"
SECONDS_BETWEEN_LOOKS = 0.5

Role = Literal["winner", "control", "ablation"]
Key = tuple[str, str, int]  # name, task, seed
Result = ProxyScore | JobFailed
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class ComparisonEntry:
    """The winner, a control or an ablation: spec and receipt of full size, scores of its proxies.

    ``scores``: by task, one for each seed; none where one of the trainings failed, which ``error``
    then gives the reason of.
    """

    name: str
    role: Role
    spec: ModelSpec
    receipt: Receipt
    scores: dict[str, list[ProxyScore]]
    error: str = ""

    def losses(self, task: str) -> list[float]:
        return [math.inf if s.loss is None else s.loss for s in self.scores[task]]


def role_of(name: str) -> Role:
    if name == WINNER:
        return "winner"
    return "control" if name in BASELINES else "ablation"


# training


def comparison_jobs(
    winner: ModelSpec, proxy: Proxy, seeds: Iterable[int], store: Path, *, ablate: bool
) -> dict[Key, Job]:
    """What is to be trained, seed by seed, in each of them controls before ablations: whenever
    the time is over, as many seeds as possible are whole.

    Controls are made of the proxy, so that they are equal where they are trained.
    """
    small = {t: compared_specs(proxy.shrink(winner, task)) for t, task in proxy.tasks.items()}
    names = [n for n in distinct(list(small.values())) if ablate or role_of(n) != "ablation"]
    return {
        (name, t, seed): Job(store, small[t][name], task, seed, task.rungs[-1])
        for seed in seeds
        for name in names
        for t, task in proxy.tasks.items()
    }


def run_comparison(
    pool: Pool,
    jobs: Mapping[K, Job],
    may_go_on: Callable[[], bool],
    tell: Callable[[str], None],
) -> dict[K, Result]:
    """Trains, in their order, what was not trained before, and begins no more than is allowed.

    ``tell``: called about twice a second with a sentence.
    """
    results: dict[K, Result] = dict(stored_scores(jobs))
    waiting = [key for key in jobs if key not in results]
    running: dict[Future[ProxyScore], K] = {}
    while running or (waiting and may_go_on()):
        while waiting and len(running) < pool.workers and may_go_on():
            key = _free(waiting, jobs)
            waiting.remove(key)
            running[pool.submit(jobs[key])] = key
        tell(f"{len(results)} of {len(jobs)} trainings")
        done, _ = wait(running, SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
        for future in done:
            results[running.pop(future)] = _result(future)
    tell(f"{len(results)} of {len(jobs)} trainings")
    return results


def _free(waiting: Sequence[K], jobs: Mapping[K, Job]) -> K:
    """The first that no other process trains: workers that share a store share the contest."""
    return next((key for key in waiting if not jobs[key].stored_run.in_use), waiting[0])


def stored_scores(jobs: Mapping[K, Job]) -> dict[K, ProxyScore]:
    """Of those that were done before, the scores."""
    found = {key: job.stored_score() for key, job in jobs.items()}
    return {key: score for key, score in found.items() if score is not None}


def _result(future: Future[ProxyScore]) -> Result:
    try:
        return future.result()
    except JobFailed as failure:
        return failure


# what came of it


def entries(
    winner: ModelSpec, jobs: Mapping[Key, Job], results: Mapping[Key, Result]
) -> list[ComparisonEntry]:
    """The winner and those that it can be compared with: only whole seeds count, of controls
    those in which the winner and all controls were trained, of ablations those with all."""
    full = compared_specs(winner)
    names = list(dict.fromkeys(name for name, _, _ in jobs))
    rivals = [name for name in names if role_of(name) != "ablation"]
    found = []
    for name in names:
        seeds = _whole(rivals if name in rivals else names, jobs, results)
        if seeds:
            found.append(_entry(name, full[name], seeds, jobs, results))
    return found


def _whole(
    names: Sequence[str], jobs: Mapping[Key, Job], results: Mapping[Key, Result]
) -> list[int]:
    """The first seeds with which all the names were trained on all tasks."""
    seeds = list(dict.fromkeys(seed for _, _, seed in jobs))
    missing = [seed for name, _, seed in jobs.keys() - results.keys() if name in names]
    return seeds[: min(map(seeds.index, missing), default=len(seeds))]


def _entry(
    name: str,
    full: ModelSpec,
    seeds: Sequence[int],
    jobs: Mapping[Key, Job],
    results: Mapping[Key, Result],
) -> ComparisonEntry:
    tasks = dict.fromkeys(task for _, task, _ in jobs)
    scores: dict[str, list[ProxyScore]] = {task: [] for task in tasks}
    for seed in seeds:
        for task in tasks:
            result = results[name, task, seed]
            if isinstance(result, JobFailed):
                error = f"{task}, seed {seed}: {result}"
                return ComparisonEntry(
                    name, role_of(name), full, cost(full), {t: [] for t in tasks}, error
                )
            scores[task].append(result)
    return ComparisonEntry(name, role_of(name), full, cost(full), scores)


def objectives(entry: ComparisonEntry, proxy: Proxy) -> list[float]:
    """One for each seed; inf where training diverged."""
    by_seed = zip(*(entry.scores[task] for task in proxy.tasks), strict=True)
    totals = [objective(dict(zip(proxy.tasks, scores, strict=True)), proxy) for scores in by_seed]
    return [math.inf if total is None else total for total in totals]


def differences(
    entries: Sequence[ComparisonEntry], proxy: Proxy
) -> dict[str, dict[str, Difference]]:
    """By name, of controls and ablations that were trained: how much higher than the winner's
    their losses are, in the objective (the first key) and by task, paired by seed."""
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
    """Over the seeds that both have, which are the first ones."""
    return paired(other, own[: len(other)])


def winner_of(entries: Sequence[ComparisonEntry]) -> ComparisonEntry | None:
    return next((entry for entry in entries if entry.role == "winner"), None)


def as_json(entries: Sequence[ComparisonEntry], proxy: Proxy) -> list[dict[str, Any]]:
    """Each contestant: spec, scores by task and seed, and how far from the winner."""
    gaps = differences(entries, proxy)
    return [
        {
            "name": entry.name,
            "role": entry.role,
            "params": entry.receipt.params,
            "flops_per_token": entry.receipt.expected,
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
