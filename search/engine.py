"""The stages of a search: draws climb, then the winner and the proxy are judged."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from archdsl.lang.spec import ModelSpec
from archdsl.search.analysis.comparison import (
    ComparisonEntry,
    Key,
    Result,
    comparison_jobs,
    entries,
    role_of,
    run_comparison,
    stored_scores,
)
from archdsl.search.analysis.proxy_validation import ProxyValidation, between_rungs, validate_proxy
from archdsl.search.analysis.supernet_validation import SupernetValidation, validate_supernet
from archdsl.search.report.report import SearchReport, best, top
from archdsl.search.rung_scheduler import RungScheduler
from archdsl.search.space.feasibility import NothingFitsError
from archdsl.search.stats.paired import Correlation, kendall_tau
from archdsl.search.study.record import Trial
from archdsl.search.study.settings import Settings
from archdsl.search.study.spending import Spending, Spent
from archdsl.search.study.study import Study
from archdsl.search.trials.proxy import Job, Proxy
from archdsl.search.trials.scorers import Scorer, training_flops
from archdsl.search.workers.pool import Pool, process_pool

RESERVED_SHARE = 0.62  # of all means, at most, for what follows the draws
VALIDATION_RUNS = 16  # what judging the proxy by one of twice the width costs, in trials


@dataclass(frozen=True)
class SearchProgress:
    """What a watcher is told after every event."""

    phase: str
    elapsed: float
    seconds: float
    running: int
    outcomes: dict[str, int]
    best: list[Trial]
    rungs: Correlation  # between the first and the last, so far
    last: str


Watch = Callable[[SearchProgress], None]


@dataclass(frozen=True)
class Machine:
    """How a search uses the machine; nothing it finds depends on it.

    ``workers``: children of one thread each. ``memory``: bytes that one may use. ``patience``:
    seconds without a training step after which it is taken for hung.
    """

    workers: int = 0
    memory: int | None = None
    patience: float = 120.0

    @contextmanager
    def pool(self) -> Iterator[Pool]:
        with process_pool(self.workers or default_workers(), self.memory, self.patience) as pool:
            yield pool


def default_workers() -> int:
    return min(8, os.cpu_count() or 1)


class SearchEngine:
    """One process's part of a search; the study and the store are its memory."""

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
    ) -> None:
        self.folder, self.store, self.study, self.spending = folder, store, study, spending
        self.scorer, self.settings, self.trials, self.seeds = scorer, settings, trials, seeds
        self.watch = watch or (lambda _: None)
        self.phase = "searching"
        self.rungs, self.ranked = kendall_tau([]), 0  # of so many draws
        self.workers = 1
        self.jobs: dict[Key, Job] = {}  # of the contest
        self.results: dict[Key, Result] = {}
        self.proxy_validation: ProxyValidation | None = None
        self.supernet_validation: SupernetValidation | None = None

    @property
    def proxy(self) -> Proxy:
        return self.settings.proxy

    def run(self, machine: Machine) -> SearchReport:
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
                raise KeyboardInterrupt("no trial was finished; the same command goes on")
            raise NothingFitsError(self._why_nothing(finished))
        return SearchReport(
            folder=self.folder,
            settings=self.settings,
            trials=finished,
            outcomes=self.study.outcomes(),
            entries=self._entries(top(finished, self.supernet_validation).spec),
            proxy_validation=self.proxy_validation,
            supernet_validation=self.supernet_validation,
            spending=self.spending.summary(),
            limits=self.spending.limits,
            importance=self.study.importance(),
            interrupted=interrupted,
        )

    def _entries(self, winner: ModelSpec) -> list[ComparisonEntry]:
        """Also what was trained before an interruption."""
        return entries(winner, self.jobs, {**stored_scores(self.jobs), **self.results})

    def _why_nothing(self, finished: list[Trial]) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self.study.outcomes().items())
        error = next((f" The last one said: {t.error}" for t in finished[::-1] if t.error), "")
        return (
            f"no draw reached the last rung ({counts or 'none was made'}); more --time may help, "
            f"the same command goes on.{error}"
        )

    # climbing

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
        """Whether so many further trials, and what follows, fit into what is left."""
        ranked = best(self.study.finished())
        if not ranked:
            return not self.spending.is_spent
        rivals = len(self._comparison_jobs(ranked[0].spec, [0])) / len(self.proxy.tasks)
        return self._affords_runs(
            more + self.seeds * rivals + VALIDATION_RUNS, ranked, RESERVED_SHARE
        )

    def _affords_runs(self, runs: float, ranked: list[Trial], most: float = 1.0) -> bool:
        """Whether there is time, and leave, for so many trainings of the best model so far; what
        is kept for them is at ``most`` a share of the whole."""
        flops = runs * training_flops(self.proxy, ranked[0].spec)
        rungs = [rung for trial in ranked for rung in trial.rungs]
        scores = [s for rung in rungs for s in rung.values() if s.train_flops]
        if not scores:  # all of them read back
            return not self.spending.is_spent
        rate = sum(s.seconds for s in scores) / sum(s.train_flops for s in scores)
        limits = self.spending.limits
        seconds = min(1.1 * rate * flops / self.workers, most * (limits.seconds or math.inf))
        flops = min(flops, most * (limits.train_flops or math.inf))
        return self.spending.seconds_left > seconds and self.spending.flops_left > flops

    # judging

    def _evaluate_winner(self, pool: Pool) -> None:
        """The winner beside its controls, the proxy beside a wider one, then the ablations."""
        ranked = best(self.study.finished())
        if not ranked:
            return

        def may_go_on() -> bool:
            return self._affords_runs(1 / len(self.proxy.tasks), ranked)

        self._validate_supernet(pool, may_go_on)
        seeds = range(self.settings.seed + 1, self.settings.seed + 1 + self.seeds)
        self.jobs = self._comparison_jobs(top(ranked, self.supernet_validation).spec, seeds)
        for phase, part in self._phases():
            self.phase = phase
            self.results |= run_comparison(
                self.spending.metered(pool, phase), part, may_go_on, self._say
            )
            if phase == "controls":
                self.phase = "trust"
                self.proxy_validation = validate_proxy(
                    self.spending.metered(pool, "trust"),
                    self.study.finished(),
                    self.proxy,
                    self.settings.seed,
                    self.store,
                    may_go_on,
                    self._say,
                )

    def _validate_supernet(self, pool: Pool, may_go_on: Callable[[], bool]) -> None:
        """Whether what was scored with shared weights is as good trained alone."""
        if self.settings.strategy != "shared":
            return
        self.phase = "proof"
        spent = self.spending.summary().by_phase.get("search", Spent()).train_flops
        self.supernet_validation = validate_supernet(
            self.spending.metered(pool, "proof"),
            self.study.finished(),
            self.proxy,
            self.settings.seed,
            self.store,
            spent,
            may_go_on,
            self._say,
        )

    def _comparison_jobs(self, winner: ModelSpec, seeds: Iterable[int]) -> dict[Key, Job]:
        return comparison_jobs(winner, self.proxy, seeds, self.store, ablate=True)

    def _phases(self) -> Iterator[tuple[str, dict[Key, Job]]]:
        """The contest in the order of what must be known."""
        ablations = {key for key in self.jobs if role_of(key[0]) == "ablation"}
        yield "controls", {key: job for key, job in self.jobs.items() if key not in ablations}
        yield "ablations", {key: job for key, job in self.jobs.items() if key in ablations}

    def _say(self, said: str) -> None:
        self._tell(said, self.workers)

    def _tell(self, said: str, running: int) -> None:
        self.spending.update()
        finished = self.study.finished()
        if (
            len(finished) != self.ranked
        ):  # thousands of resamples, and this is called twice a second
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
