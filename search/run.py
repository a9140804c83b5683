"""The search: draw, fit, train proxies up their rungs, compare the winner with its controls."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from archdsl.cost import cost
from archdsl.errors import ArchdslError
from archdsl.leaves import Leaf, fill
from archdsl.load import NoFitError, fitted, read
from archdsl.search.controls import controls
from archdsl.search.folder import Clock, claim, run_name, settings
from archdsl.search.pool import InProcess, Pool, first_done, processes
from archdsl.search.proxy import Job, Proxy, Score, default_tasks, objective
from archdsl.search.report import WINNER, Entry, Report, best, write_report
from archdsl.search.space import starting_points
from archdsl.search.study import TRAINED, Finished, Study, Trial
from archdsl.source import Tree
from archdsl.spec import Budget, ModelSpec

SECONDS = 540.0  # by default: with starting up, under ten minutes
DUPLICATES = 40  # draws in a row that are known already: the space is used up
FAILURES = 5  # in a row: something is wrong with more than a trial
CONTESTANTS = 4  # a winner and its controls, before there is one


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after every event."""

    phase: str
    elapsed: float
    seconds: float
    running: int
    outcomes: dict[str, int]
    best: list[Finished]
    last: str


Watch = Callable[[Progress], None]


class NothingFitsError(ArchdslError):
    """No draw of the space keeps to the budget, or none could be trained."""


class SearchFailedError(ArchdslError):
    """Trials fail, whatever is drawn."""


def search(
    space: str | os.PathLike[str] = "search",
    *,
    budget: Budget | None = None,
    overrides: Sequence[str] = (),
    proxy: Proxy | None = None,
    seconds: float | None = SECONDS,
    trials: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    seeds: int = 3,
    out: Path | None = None,
    watch: Watch | None = None,
) -> Report:
    """Searches a space of specs for the lowest proxy loss under a budget of the full-size model.

    ``seconds`` limits the whole, controls included (None: no limit), ``trials`` the draws that are
    trained. ``workers``: processes of one thread each (default: the cores, at most 8). ``seed``
    draws and trains; the winner and its controls are trained with ``seeds`` further ones. ``out``
    (default: runs/ and a name made of the settings) holds everything and is gone on from if it
    exists. On Ctrl-C what was found so far is returned. Raises SpecError, NothingFitsError.
    """
    tree = read(space, overrides)
    _refuse_mistakes(tree, budget)
    proxy = proxy or Proxy(tasks=default_tasks())
    limits = budget or _own_budget(tree)
    folder = out or Path("runs") / run_name(tree, limits, proxy, seed)
    claim(folder, settings(tree, limits, proxy, seed))
    study = Study(folder, tree, limits, seed)
    clock = Clock(folder / "spent.json", seconds)
    workers = workers or min(8, os.cpu_count() or 1)
    hunt = Search(folder, study, proxy, clock, trials, seed, seeds, watch or (lambda _: None))
    return hunt.run(workers)


def _refuse_mistakes(tree: Tree, budget: Budget | None) -> None:
    """A mistake in the space is said before anything is drawn; its pure models show it."""
    for point in starting_points(tree):
        with suppress(NoFitError):  # another draw may fit
            fitted(fill(tree, partial(_value, point)), budget)


def _value(point: dict[str, Any], name: str, leaf: Leaf) -> Any:
    return point[name]


def _own_budget(tree: Tree) -> Budget:
    written = tree.value.get("budget") if isinstance(tree.value, dict) else None
    return Budget.model_validate(written or {})


@dataclass
class Climb:
    """A trial and the jobs of the rung it is on."""

    trial: Trial
    jobs: dict[str, Future[Score]]


class Search:
    """One process's part of a search; the study and the proxies' files are its memory."""

    def __init__(
        self,
        folder: Path,
        study: Study,
        proxy: Proxy,
        clock: Clock,
        trials: int | None,
        seed: int,
        seeds: int,
        watch: Watch,
    ) -> None:
        self.folder, self.study, self.proxy, self.clock = folder, study, proxy, clock
        self.trials, self.seed, self.seeds, self.watch = trials, seed, seeds, watch
        self.climbing: list[Climb] = []
        self.known_in_a_row = self.failed_in_a_row = 0
        self.said = ""

    def run(self, workers: int) -> Report:
        interrupted = False
        entries: list[Entry] = []
        try:
            with _pool(workers) as pool:
                self._climb(pool)
                entries = self._compare(pool)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.clock.save()
        finished = self.study.finished()
        if not any(trial.value is not None for trial in finished):
            if interrupted:
                raise KeyboardInterrupt("no trial was finished; the same command goes on")
            raise NothingFitsError(self._why_nothing())
        return write_report(
            self.folder,
            finished,
            self.study.outcomes(),
            entries,
            self.proxy,
            self.clock.spent,
            self.study.budget,
            interrupted,
        )

    def _why_nothing(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self.study.outcomes().items())
        reason = self.study.closest_miss()
        return f"no trial reached the last rung ({counts or 'none was drawn'})" + (
            f"; the closest draw: {reason}" if reason else f"; see {self.folder}"
        )

    # climbing

    def _climb(self, pool: Pool) -> None:
        while True:
            while self._may_draw(pool):
                trial = self.study.draw()
                self.known_in_a_row = 0 if trial else self.known_in_a_row + 1
                if trial:
                    self.climbing.append(self._next_rung(pool, trial))
                elif self.study.met_its_like:
                    break
            if not self.climbing:
                return
            self._tell("searching")
            first_done({job for climb in self.climbing for job in climb.jobs.values()}, seconds=1.0)
            for climb in [c for c in self.climbing if all(j.done() for j in c.jobs.values())]:
                self._finish_rung(pool, climb)
                self.clock.save()

    def _may_draw(self, pool: Pool) -> bool:
        trained = sum(n for what, n in self.study.outcomes().items() if what in TRAINED)
        return (
            len(self.climbing) < pool.workers
            and self.known_in_a_row < DUPLICATES
            and (self.trials is None or trained + len(self.climbing) < self.trials)
            and self.clock.left > self._time_still_needed(pool.workers)
        )

    def _time_still_needed(self, workers: int) -> float:
        """For another trial, those under way, and the controls."""
        ranked = best(self.study.finished())
        contestants = 1 + len(controls(ranked[0].spec)) if ranked else CONTESTANTS
        runs = len(self.climbing) + 1 + self.seeds * contestants
        return 1.1 * self._seconds_per_trial() * runs / workers

    def _seconds_per_trial(self) -> float:
        """Of one worker, up the last rung; guessed from those that got there."""
        whole = [
            sum(score.seconds for rung in trial.rungs for score in rung.values())
            for trial in best(self.study.finished())
        ]
        return sum(whole) / len(whole) if whole else 0.0

    def _next_rung(self, pool: Pool, trial: Trial) -> Climb:
        rung = len(trial.rungs)
        jobs = {
            name: pool.submit(self._job(self.proxy.shrink(trial.spec, task), name, self.seed, rung))
            for name, task in self.proxy.tasks.items()
        }
        return Climb(trial, jobs)

    def _job(self, small: ModelSpec, task: str, seed: int, rung: int) -> Job:
        home = self.folder / "proxies" / f"{small.fingerprint()[:16]}-s{seed}" / task
        trained = self.proxy.tasks[task]
        return Job(home, small, trained, seed, trained.rungs[rung])

    def _finish_rung(self, pool: Pool, climb: Climb) -> None:
        self.climbing.remove(climb)
        trial = climb.trial
        failure = next((e for job in climb.jobs.values() if (e := job.exception())), None)
        if failure is not None:
            reason = f"{type(failure).__name__}: {failure}"
            self.study.failed(trial, reason)
            self.failed_in_a_row += 1
            if self.failed_in_a_row == FAILURES:
                raise SearchFailedError(
                    f"{FAILURES} trials failed one after the other, the last with {reason}"
                ) from failure
            return
        self.failed_in_a_row = 0
        scores = {name: job.result() for name, job in climb.jobs.items()}
        value = objective(scores, self.proxy)
        last = len(trial.rungs) + 1 == self.proxy.rungs
        if self.study.climbed(trial, scores, value, last):
            self.climbing.append(self._next_rung(pool, trial))
        else:
            shown = "diverged" if value is None else f"{value:.3f}"
            self.said = f"trial {trial.number}: {shown}" + ("" if last else ", stopped early")

    # comparing

    def _compare(self, pool: Pool) -> list[Entry]:
        """The winner and its controls, trained alike with seeds that chose nothing."""
        ranked = best(self.study.finished())
        if not ranked:
            return []
        winner = ranked[0].spec
        full_size = {WINNER: winner} | controls(winner)
        scores: dict[str, dict[str, list[Score]]] = {}
        for seed in range(self.seed + 1, self.seed + 1 + self.seeds):
            jobs = self._contest(winner, full_size, seed)
            needed = self._seconds_per_trial() * len(full_size) / pool.workers
            if self.clock.left < needed and not all(job.result.exists() for job in jobs.values()):
                break  # what is left undone is done when the command is run with more time
            for (name, task), score in self._train(pool, jobs, f"seed {seed}").items():
                scores.setdefault(name, {}).setdefault(task, []).append(score)
        return [
            Entry(name, spec, cost(spec), scores[name])
            for name, spec in full_size.items()
            if name in scores
        ]

    def _contest(
        self, winner: ModelSpec, names: Collection[str], seed: int
    ) -> dict[tuple[str, str], Job]:
        """The winner and its controls with one seed, by name and task."""
        jobs: dict[tuple[str, str], Job] = {}
        for task, trained in self.proxy.tasks.items():
            # the controls of the proxy: equal in parameters or FLOPs where they are trained
            small = self.proxy.shrink(winner, trained)
            for name, spec in ({WINNER: small} | controls(small)).items():
                if name in names:
                    jobs[name, task] = self._job(spec, task, seed, -1)
        return jobs

    def _train(
        self, pool: Pool, jobs: dict[tuple[str, str], Job], what: str
    ) -> dict[tuple[str, str], Score]:
        futures = {key: pool.submit(job) for key, job in jobs.items()}
        while not all(future.done() for future in futures.values()):
            first_done(futures.values(), seconds=1.0)
            done = sum(future.done() for future in futures.values())
            self.said = f"{what}: {done} of {len(jobs)} runs"
            self._tell("comparing the winner with its controls")
        return {key: future.result() for key, future in futures.items()}

    def _tell(self, phase: str) -> None:
        running = sum(not job.done() for climb in self.climbing for job in climb.jobs.values())
        self.watch(
            Progress(
                phase,
                self.clock.spent,
                self.clock.limit or 0.0,
                running,
                self.study.outcomes(),
                best(self.study.finished())[:5],
                self.said,
            )
        )


def _pool(workers: int) -> AbstractContextManager[Pool]:
    return nullcontext(InProcess()) if workers == 1 else processes(workers)
