"""The phases of a search: run the trials, then compare the winner and validate the proxy."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from archdsl.lang.spec import ModelSpec
from archdsl.search.analysis.comparison import (
    ComparisonEntry,
    JobResult,
    Key,
    comparison_jobs,
    entries,
    known_scores,
    role_of,
    run_comparison,
)
from archdsl.search.analysis.proxy_validation import (
    ProxyValidation,
    between_rungs,
    validate_proxy,
    validation_trials,
)
from archdsl.search.analysis.supernet_validation import SupernetValidation, validate_supernet
from archdsl.search.report.report import SearchReport, best, winning_trial
from archdsl.search.rung_scheduler import RungScheduler
from archdsl.search.space.feasibility import NothingFitsError
from archdsl.search.stats.paired import Correlation, kendall_tau
from archdsl.search.study.record import trainings_of
from archdsl.search.study.settings import Settings
from archdsl.search.study.shared_jobs import SharedJobs
from archdsl.search.study.spending import (
    ABLATIONS,
    BASELINES,
    PROXY_VALIDATION,
    SEARCH,
    SUPERNET_VALIDATION,
    Spending,
    Spent,
)
from archdsl.search.study.study import Study
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Job, Proxy
from archdsl.search.trials.scorers import Scorer, cost_in_trainings, training_flops
from archdsl.search.workers.pool import Pool, default_workers, process_pool

RESERVED_SHARE = 0.62  # of time and FLOPs, at most, is reserved for what must follow the trials
VALIDATION_RUNS = 16  # cost of the proxy validation, in trainings of the best model

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class SearchProgress:
    """The state of a search, as given to ``watch`` about twice a second.

    ``elapsed`` and ``seconds`` are the time used and its limit (0: no limit). ``rungs`` correlates
    the ranking on the first and the last rung. ``last`` says what happened last.
    """

    phase: str
    elapsed: float
    seconds: float
    running: int
    outcomes: dict[str, int]
    best: list[Trial]
    rungs: Correlation
    last: str


Watch = Callable[[SearchProgress], None]


@dataclass(frozen=True)
class Machine:
    """How a search uses the machine. The results do not depend on it.

    ``workers`` is the number of workers (0: ``default_workers(devices_per_trial)``), each of which
    has ``devices_per_trial`` processes of one thread. ``memory`` are the bytes that one process may
    allocate (None: no limit). A training that makes no step for ``patience`` seconds is ended.
    """

    workers: int = 0
    memory: int | None = None
    patience: float = 120.0
    devices_per_trial: int = 1

    @contextmanager
    def pool(self) -> Iterator[Pool]:
        """Run a pool of worker processes until the block ends."""
        devices = self.devices_per_trial
        workers = self.workers or default_workers(devices)
        with process_pool(workers, self.memory, self.patience, devices) as pool:
            yield pool


class SearchEngine:
    """One process of a search. All results are kept in the study and in the folder ``store``."""

    def __init__(
        self,
        folder: Path,
        store: Path,
        study: Study,
        scorer: Scorer,
        spending: Spending,
        settings: Settings,
        trials: int | None,
        seeds: int,
        watch: Watch | None,
        validate_proxy: bool = False,
    ) -> None:
        self.folder, self.store, self.study, self.spending = folder, store, study, spending
        self.scorer, self.settings, self.trials, self.seeds = scorer, settings, trials, seeds
        self.watch, self.validate_proxy = watch or (lambda _: None), validate_proxy
        self.phase = SEARCH
        self.rungs, self.ranked = kendall_tau([]), 0  # the correlation and its number of trials
        self.workers = 1
        # cost of the comparison for one seed, by the trial that wins, in trainings of that trial
        self.compared: dict[int, float] = {}
        self.jobs: dict[Key, Job] = {}  # of the comparison
        self.results: dict[Key, JobResult] = {}
        self.proxy_validation: ProxyValidation | None = None
        self.supernet_validation: SupernetValidation | None = None

    @property
    def proxy(self) -> Proxy:
        """The proxy that the trials are trained with."""
        return self.settings.proxy

    def run(self, machine: Machine) -> SearchReport:
        """Run all phases and return the report. After Ctrl-C it has what is known so far.

        Raises NothingFitsError if no trial reached the last rung, KeyboardInterrupt if Ctrl-C is
        the reason for that, and SearchFailedError if trials keep failing.
        """
        interrupted = False
        try:
            with machine.pool() as pool:
                self.workers = pool.workers
                self._run_trials(pool)
                self._evaluate_winner(pool)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.spending.save()
        finished = self.study.finished()
        if not best(finished):
            if interrupted:
                raise KeyboardInterrupt(
                    "no trial reached the last rung yet; run the same command again to continue"
                )
            raise NothingFitsError(self._why_nothing(finished))
        winner = winning_trial(finished, self.supernet_validation)
        self.study.write_winner(winner)
        return SearchReport(
            folder=self.folder,
            settings=self.settings,
            trials=finished,
            outcomes=self.study.outcomes(),
            entries=self._entries(winner.spec),
            proxy_validation=self.proxy_validation,
            supernet_validation=self.supernet_validation,
            spending=self.spending.summary(),
            limits=self.spending.limits,
            importance=self.study.importance(),
            interrupted=interrupted,
        )

    def _entries(self, winner: ModelSpec) -> list[ComparisonEntry]:
        """Return the entries of the comparison, with scores stored before an interruption."""
        with self._shared(self.jobs) as shared:
            known = known_scores(self.jobs, shared)
        return entries(winner, self.jobs, {**self.results, **known})

    def _why_nothing(self, finished: list[Trial]) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self.study.outcomes().items())
        error = next((f" The last error: {t.error}" for t in finished[::-1] if t.error), "")
        return (
            f"no trial reached the last rung ({counts or 'no trial was started'}); run the same "
            f"command again with a longer --time to continue.{error}"
        )

    # trials

    def _run_trials(self, pool: Pool) -> None:
        scheduler = RungScheduler(
            self.study, self.scorer, self.proxy, self.spending, self._may_start, self._tell
        )
        scheduler.run(pool)

    def _may_start(self, number: int, running: int) -> bool:
        trained = self.study.trained(before=number)
        return (
            (self.trials is None or trained < self.trials)
            and not self.study.exhausted
            and self._affords_trials(running + 1)
        )

    def _affords_trials(self, more: int) -> bool:
        """Return whether the limits allow ``more`` trials and all that must follow them.

        These are the baselines, and the proxy validation if it is wanted. Ablations get what is
        left; `archdsl ablate` trains them as well.
        """
        ranked = best(self.study.finished())
        if not ranked:
            return not self.spending.is_spent
        number = ranked[0].number
        if number not in self.compared:  # asked twice a second, while workers need the cores
            jobs = self._comparison_jobs(ranked[0].spec, [0], ablate=False).values()
            self.compared[number] = cost_in_trainings(jobs, self.proxy, ranked[0].spec)
        runs = more + self.seeds * self.compared[number] + VALIDATION_RUNS * self.validate_proxy
        return self._affords_runs(runs, ranked, RESERVED_SHARE)

    def _affords_runs(self, runs: float, ranked: Sequence[Trial], most: float = 1.0) -> bool:
        """Return whether the limits allow so many trainings of the best model so far.

        At ``most`` this share of the whole limit is required to be left.
        """
        flops = runs * training_flops(self.proxy, ranked[0].spec)
        rungs = [rung for trial in ranked for rung in trial.rungs]
        scores = [s for rung in rungs for s in rung.values() if s.train_flops]
        if not scores:  # all of them were stored before
            return not self.spending.is_spent
        rate = sum(s.seconds for s in scores) / sum(s.train_flops for s in scores)
        limits = self.spending.limits
        seconds = min(1.1 * rate * flops / self.workers, most * (limits.seconds or math.inf))
        flops = min(flops, most * (limits.train_flops or math.inf))
        return self.spending.seconds_left > seconds and self.spending.flops_left > flops

    # evaluation

    def _evaluate_winner(self, pool: Pool) -> None:
        """Compare the winner with its baselines, then validate the proxy and train ablations."""
        ranked = best(self.study.finished())
        if not ranked:
            return
        self._validate_supernet(pool, ranked)
        seeds = range(self.settings.seed + 1, self.settings.seed + 1 + self.seeds)
        winner = winning_trial(ranked, self.supernet_validation).spec
        self.jobs = self._comparison_jobs(winner, seeds)
        phases = self._phases()
        if self.validate_proxy:  # goes before the ablations
            first = {BASELINES: phases.pop(BASELINES)}
            self._run_jobs(pool, first, ranked, self.results)
        self._validate_proxy(pool, ranked)
        self._run_jobs(pool, phases, ranked, self.results)

    def _run_jobs(
        self,
        pool: Pool,
        phases: Mapping[str, Mapping[K, Job]],
        ranked: Sequence[Trial],
        results: dict[K, JobResult] | None = None,
    ) -> dict[K, JobResult]:
        """Run the jobs by phase while the limits allow it, and return their results.

        No worker waits for the end of a phase: it starts with the next one. ``results``: as of
        `run_comparison`.
        """
        jobs = {key: job for part in phases.values() for key, job in part.items()}
        # by identity, as a block of a plugin may have a field that cannot be hashed
        phase_of = {id(job): phase for phase, part in phases.items() for job in part.values()}
        self.phase = next((phase for phase, part in phases.items() if part), self.phase)

        def enter_phase(job: Job) -> str:
            self.phase = phase_of[id(job)]
            return self.phase

        with self._shared(jobs) as shared:
            return run_comparison(
                self.spending.metered(pool, enter_phase),
                jobs,
                lambda: self._affords_runs(1 / len(self.proxy.tasks), ranked),
                self._say,
                shared,
                results,
            )

    @contextmanager
    def _shared(self, jobs: Mapping[K, Job]) -> Iterator[SharedJobs[K] | None]:
        """The jobs in the database of the search; None if it has none, or there are no jobs."""
        study = self.study
        if not jobs or not study.in_database:
            yield None
            return
        with closing(SharedJobs(study.storage, trainings_of(study.name), jobs)) as shared:
            yield shared

    def _validate_proxy(self, pool: Pool, ranked: Sequence[Trial]) -> None:
        """Compare the rankings on the rungs, and on a few trials that a wider proxy trains."""
        finished = self.study.finished()
        chosen = validation_trials(finished) if self.validate_proxy else []
        self.proxy_validation = validate_proxy(
            lambda jobs: self._run_jobs(pool, {PROXY_VALIDATION: jobs}, ranked),
            finished,
            chosen,
            self.proxy,
            self.settings.seed,
            self.store,
        )

    def _validate_supernet(self, pool: Pool, ranked: Sequence[Trial]) -> None:
        """Train a few trials separately that supernets scored, and compare the rankings."""
        if self.settings.strategy != "shared":
            return
        spent = self.spending.summary().by_phase.get(SEARCH, Spent()).train_flops
        self.supernet_validation = validate_supernet(
            lambda jobs: self._run_jobs(pool, {SUPERNET_VALIDATION: jobs}, ranked),
            self.study.finished(),
            self.proxy,
            self.settings.seed,
            self.store,
            spent,
        )

    def _comparison_jobs(
        self, winner: ModelSpec, seeds: Iterable[int], ablate: bool = True
    ) -> dict[Key, Job]:
        return comparison_jobs(winner, self.proxy, seeds, self.store, ablate=ablate)

    def _phases(self) -> dict[str, dict[Key, Job]]:
        """Return the jobs of the comparison by phase, in the order in which they are run."""
        phases: dict[str, dict[Key, Job]] = {BASELINES: {}, ABLATIONS: {}}
        for key, job in self.jobs.items():
            phases[ABLATIONS if role_of(key[0]) == "ablation" else BASELINES][key] = job
        return phases

    def _say(self, said: str) -> None:
        self._tell(said, self.workers)

    def _tell(self, said: str, running: int) -> None:
        self.spending.update()
        finished = self.study.finished()
        if len(finished) != self.ranked:  # not each time: the interval takes 2,000 resamples
            self.ranked, self.rungs = len(finished), between_rungs(finished, self.proxy)
        self.watch(
            SearchProgress(
                self.phase,
                self.spending.summary().wall,
                self.spending.limits.seconds or 0.0,
                running,
                self.study.outcomes(),
                best(finished)[:5],
                self.rungs,
                said,
            )
        )
