"""Draws climb their rungs: a process's part of a study that others may share."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import fmean

from archdsl.errors import ArchdslError
from archdsl.search.space.objectives import others
from archdsl.search.study.spending import Ledger
from archdsl.search.study.study import Study, Trial
from archdsl.search.trials.proxy import Proxy, Score, objective
from archdsl.search.trials.scorers import Scorer
from archdsl.search.workers.pool import JobFailed, Pool, first_done

FAILURES = 5  # in a row: something is wrong with more than a trial
SECONDS_BETWEEN_LOOKS = 0.5  # at what other workers do


class SearchFailedError(ArchdslError):
    """Trials fail, whatever is drawn."""


@dataclass
class Climb:
    """A draw and the work on the rung it is on, by task."""

    trial: Trial
    jobs: dict[str, Future[Score]]

    @property
    def done(self) -> bool:
        return all(job.done() for job in self.jobs.values())


class Climber:
    """Takes draws of a study and trains them until none may be made any more.

    ``may_draw``: whether there may be a draw of this number, with so many under way here.
    ``tell``: called about twice a second with a sentence on what happened last.
    """

    def __init__(
        self,
        study: Study,
        scorer: Scorer,
        proxy: Proxy,
        ledger: Ledger,
        may_draw: Callable[[int, int], bool],
        tell: Callable[[str, int], None],
    ) -> None:
        self.study, self.scorer, self.proxy, self.ledger = study, scorer, proxy, ledger
        self.may_draw, self.tell = may_draw, tell
        self.climbing: list[Climb] = []
        self.failed_in_a_row = 0
        self.said = ""

    def run(self, pool: Pool) -> None:
        """Returns when every draw was told, also those of other workers, or the means are spent."""
        pool = self.ledger.paying(pool, "search")
        try:
            while self._take(pool) or self.climbing or self.study.under_way:
                if self.ledger.is_spent and not self.climbing:
                    return
                self._wait()
                for climb in [climb for climb in self.climbing if climb.done]:
                    self._finish_rung(pool, climb)
                self.ledger.keep()
                self.tell(self.said, sum(not climb.done for climb in self.climbing))
        finally:  # what an error or Ctrl-C leaves undone is free to be taken up again
            for climb in self.climbing:
                self.study.give_back(climb.trial)

    def _take(self, pool: Pool) -> bool:
        taken = False
        # one more than can be trained at once, so that nobody waits while a draw is made
        while len(self.climbing) <= pool.workers and not self.ledger.is_spent:
            trial = self.study.take(lambda number: self.may_draw(number, len(self.climbing)))
            if trial is None:
                break
            taken = True
            if trial.rungs:  # who had it before may have been killed before deciding
                self._decide(pool, trial)
            else:
                self._next_rung(pool, trial)
        return taken

    def _wait(self) -> None:
        jobs = [job for climb in self.climbing for job in climb.jobs.values()]
        if not jobs:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        elif not any(climb.done for climb in self.climbing):
            first_done(jobs, SECONDS_BETWEEN_LOOKS)

    def _next_rung(self, pool: Pool, trial: Trial) -> None:
        jobs = {
            task: pool.submit(self.scorer.work(trial.spec, trial.params, task, len(trial.rungs)))
            for task in self.proxy.tasks
        }
        self.climbing.append(Climb(trial, jobs))

    def _finish_rung(self, pool: Pool, climb: Climb) -> None:
        self.climbing.remove(climb)
        failure = next((e for job in climb.jobs.values() if (e := job.exception())), None)
        if failure is not None:
            self._failed(climb.trial, failure)
            return
        self.failed_in_a_row = 0
        scores = {task: job.result() for task, job in climb.jobs.items()}
        self.study.climbed(climb.trial, scores, self._values(climb.trial, scores))
        self._decide(pool, climb.trial)

    def _decide(self, pool: Pool, trial: Trial) -> None:
        """Told, or on to the next rung."""
        values = self._values(trial, trial.rungs[-1])
        if values is None:
            self.study.close(trial, "diverged")
            self.said = f"draw {trial.number} diverged"
        elif len(trial.rungs) == self.scorer.rungs:
            self.study.close(trial, "complete", values)
            self.said = f"draw {trial.number}: {values[0]:.3f}"
        elif not self.study.goes_on(trial, values):
            self.study.close(trial, "pruned")
            self.said = f"draw {trial.number}: {values[0]:.3f}, stopped early"
        elif self.ledger.is_spent:
            self.study.give_back(trial)
        else:
            self._next_rung(pool, trial)

    def _failed(self, trial: Trial, failure: BaseException) -> None:
        if not isinstance(failure, JobFailed):
            raise failure
        reason = str(failure)
        self.study.close(trial, "failed", error=reason)
        self.said = f"draw {trial.number} failed, {reason}"
        self.failed_in_a_row += 1
        if self.failed_in_a_row == FAILURES:
            raise SearchFailedError(
                f"{FAILURES} trials failed one after the other, the last with {reason}"
            ) from failure

    def _values(self, trial: Trial, scores: dict[str, Score]) -> tuple[float, ...] | None:
        loss = objective(scores, self.proxy)
        if loss is None:
            return None
        task = next(iter(self.proxy.tasks.values()))
        small = self.proxy.shrink(trial.spec, task)
        shares = mean_shares(list(scores.values()))
        return (loss, *others(self.study.axes, trial.spec, small, shares))


def mean_shares(scores: Collection[Score]) -> dict[str, float]:
    """What routers selected, on average over tasks."""
    names = dict.fromkeys(name for score in scores for name in score.shares)
    return {name: fmean(s.shares[name] for s in scores if name in s.shares) for name in names}
