"""Trains the trials of a study rung by rung (successive halving), beside other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from archdsl.errors import ArchdslError
from archdsl.search.space.objectives import others
from archdsl.search.study.spending import SEARCH, Spending
from archdsl.search.study.study import Study
from archdsl.search.study.trial import RunningTrial
from archdsl.search.trials.proxy import Proxy, ProxyScore, mean_shares, objective
from archdsl.search.trials.scorers import Scorer
from archdsl.search.workers.pool import JobFailed, Pool, end_if_disk_is_full, wait_for_any

FAILURES = 5  # in a row: then the search ends, because the fault is not that of one trial
SECONDS_BETWEEN_UPDATES = 0.5


class SearchFailedError(ArchdslError):
    """One trial after the other failed."""


@dataclass
class TrialJobs:
    """A trial and the trainings of its present rung, by task."""

    trial: RunningTrial
    jobs: dict[str, Future[ProxyScore]]

    @property
    def done(self) -> bool:
        """Whether all trainings of the rung have ended."""
        return all(job.done() for job in self.jobs.values())


class RungScheduler:
    """Takes trials of a study and trains them until no further trial may start.

    ``may_start`` is called with the number of a new trial and the number of trials that run in this
    process. ``tell`` is called about twice a second with a sentence on what happened last and the
    number of trials that are being trained.
    """

    def __init__(
        self,
        study: Study,
        scorer: Scorer,
        proxy: Proxy,
        spending: Spending,
        may_start: Callable[[int, int], bool],
        tell: Callable[[str, int], None],
    ) -> None:
        self.study, self.scorer, self.proxy, self.spending = study, scorer, proxy, spending
        self.may_start, self.tell = may_start, tell
        self.active: list[TrialJobs] = []
        self.failed_in_a_row = 0
        self.said = ""

    def run(self, pool: Pool) -> None:
        """Return when all trials are finished, those of other workers too, or a limit is reached.

        Raises SearchFailedError if ``FAILURES`` trials fail one after the other, WriteError as soon
        as one fails because the disk is full.
        """
        pool = self.spending.metered(pool, lambda _: SEARCH)
        try:
            while self._take(pool) or self.active or self.study.unfinished:
                if self.spending.is_spent and not self.active:
                    return
                self._wait()
                self.spending.update()  # first, as it decides whether further rungs may start
                for trial_jobs in [one for one in self.active if one.done]:
                    self._finish_rung(pool, trial_jobs)
                self.tell(self.said, sum(not one.done for one in self.active))
        finally:  # after an error or Ctrl-C another process may continue these trials
            for trial_jobs in self.active:
                self.study.release(trial_jobs.trial)

    def _take(self, pool: Pool) -> bool:
        taken = False
        # one trial more than workers, so that no worker is idle while a trial is proposed
        while len(self.active) <= pool.workers and not self.spending.is_spent:
            trial = self.study.take(lambda number: self.may_start(number, len(self.active)))
            if trial is None:
                break
            taken = True
            if trial.rungs:  # continued from a worker that ended before this decision
                self._decide(pool, trial)
            else:
                self._next_rung(pool, trial)
        return taken

    def _wait(self) -> None:
        jobs = [job for trial_jobs in self.active for job in trial_jobs.jobs.values()]
        if not jobs:
            time.sleep(SECONDS_BETWEEN_UPDATES)
        elif not any(trial_jobs.done for trial_jobs in self.active):
            wait_for_any([job for job in jobs if not job.done()], SECONDS_BETWEEN_UPDATES)

    def _next_rung(self, pool: Pool, trial: RunningTrial) -> None:
        jobs = {
            task: pool.submit(self.scorer.job(trial.spec, trial.params, task, len(trial.rungs)))
            for task in self.proxy.tasks
        }
        self.active.append(TrialJobs(trial, jobs))

    def _finish_rung(self, pool: Pool, trial_jobs: TrialJobs) -> None:
        self.active.remove(trial_jobs)
        failure = next((e for job in trial_jobs.jobs.values() if (e := job.exception())), None)
        if failure is not None:
            self._failed(trial_jobs.trial, failure)
            return
        self.failed_in_a_row = 0
        scores = {task: job.result() for task, job in trial_jobs.jobs.items()}
        values = self._values(trial_jobs.trial, scores)
        self._decide(pool, self.study.record_rung(trial_jobs.trial, scores, values))

    def _decide(self, pool: Pool, trial: RunningTrial) -> None:
        """Finish the trial, or promote it to the next rung."""
        values = self._values(trial, trial.rungs[-1])
        if values is None:
            self.study.finish(trial, "diverged")
            self.said = f"trial {trial.number} diverged"
        elif len(trial.rungs) == self.scorer.rungs:
            self.study.finish(trial, "complete", values)
            self.said = f"trial {trial.number}: {values[0]:.3f}"
        elif not self.study.is_promoted(trial):
            self.study.finish(trial, "pruned")
            self.said = f"trial {trial.number}: {values[0]:.3f}, stopped early"
        elif self.spending.is_spent:
            self.study.release(trial)
        else:
            self._next_rung(pool, trial)

    def _failed(self, trial: RunningTrial, failure: BaseException) -> None:
        if not isinstance(failure, JobFailed):
            raise failure
        if failure.reason == "disk full":
            self.study.release(trial)
        end_if_disk_is_full(failure)
        reason = str(failure)
        self.study.finish(trial, "failed", error=reason)
        self.said = f"trial {trial.number} failed: {reason}"
        self.failed_in_a_row += 1
        if self.failed_in_a_row == FAILURES:
            raise SearchFailedError(
                f"{FAILURES} trials failed one after the other; the last error: {reason}"
            ) from failure

    def _values(
        self, trial: RunningTrial, scores: dict[str, ProxyScore]
    ) -> tuple[float, ...] | None:
        loss = objective(scores, self.proxy)
        if loss is None:
            return None
        task = next(iter(self.proxy.tasks.values()))
        small = self.proxy.shrink(trial.spec, task)
        shares = mean_shares(list(scores.values()))
        return (loss, *others(self.study.axes, trial.spec, small, shares))
