"""The search: draw, fit, train proxies up their rungs, compare the winner with its controls."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from archdsl.cost import cost
from archdsl.errors import ArchdslError
from archdsl.files import write_text
from archdsl.leaves import Leaf, fill
from archdsl.load import NoFitError, fitted, read
from archdsl.search.controls import controls
from archdsl.search.pool import InProcess, Pool, first_done, processes
from archdsl.search.proxy import Job, Proxy, Score, default_tasks, objective
from archdsl.search.report import WINNER, Entry, Report, best, write_report
from archdsl.search.space import starting_points
from archdsl.search.study import TRAINED, Finished, Scores, Study, Trial
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

    >>> import archdsl
    >>> report = archdsl.search("search", trials=1, seconds=60)  # doctest: +SKIP
    """
    tree = read(space, overrides)
    _refuse_mistakes(tree, budget)
    proxy = proxy or Proxy(tasks=default_tasks())
    limits = budget or _own_budget(tree)
    folder = out or Path("runs") / _run_name(tree, limits, proxy, seed)
    _claim(folder, _settings(tree, limits, proxy, seed))
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


def _settings(tree: Tree, budget: Budget, proxy: Proxy, seed: int) -> str:
    value = {
        "space": tree.value,
        "budget": budget.model_dump(mode="json"),
        "proxy": proxy.model_dump(mode="json"),
        "data": {name: task.load().fingerprint for name, task in proxy.tasks.items()},
        "seed": seed,
    }
    return json.dumps(value, indent=1, sort_keys=True)


def _run_name(tree: Tree, budget: Budget, proxy: Proxy, seed: int) -> str:
    digest = hashlib.sha256(_settings(tree, budget, proxy, seed).encode()).hexdigest()
    name = tree.value.get("name", "search") if isinstance(tree.value, dict) else "search"
    return f"{name}-{digest[:8]}"


def _claim(folder: Path, settings: str) -> None:
    """Takes the folder for these settings, which are those it was made for if it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        write_text(file, settings)
    elif file.read_text() != settings:
        raise ArchdslError(
            f"{folder} holds a search with other settings (see {file}); "
            "choose another --out, or delete it"
        )


class Clock:
    """Time spent on a search by all the processes that ever ran it."""

    def __init__(self, file: Path, limit: float | None) -> None:
        self.file, self.limit = file, limit
        self.before = json.loads(file.read_text())["seconds"] if file.exists() else 0.0
        self.started = time.monotonic()

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def left(self) -> float:
        return float("inf") if self.limit is None else self.limit - self.spent

    def save(self) -> None:
        write_text(self.file, json.dumps({"seconds": round(self.spent, 1)}))


@dataclass
class Climb:
    """A trial and the jobs of the rung it is on."""

    trial: Trial
    jobs: dict[str, Future[Score]]
    scores: Scores = field(default_factory=dict)


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
        finished = list(self.study.finished())
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
            name: self._submit(pool, self.proxy.shrink(trial.spec, task), name, self.seed, rung)
            for name, task in self.proxy.tasks.items()
        }
        return Climb(trial, jobs)

    def _submit(
        self, pool: Pool, small: ModelSpec, task: str, seed: int, rung: int
    ) -> Future[Score]:
        home = self.folder / "proxies" / f"{small.fingerprint()[:16]}-s{seed}" / task
        trained = self.proxy.tasks[task]
        return pool.submit(Job(home, small, trained, seed, trained.rungs[rung]))

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
            if self.clock.left < self._seconds_per_trial() * len(full_size) / pool.workers:
                break  # what is left undone is done when the command is run with more time
            for (name, task), score in self._train_all(pool, winner, full_size, seed).items():
                scores.setdefault(name, {}).setdefault(task, []).append(score)
        return [
            Entry(name, spec, cost(spec), scores[name])
            for name, spec in full_size.items()
            if name in scores
        ]

    def _train_all(
        self, pool: Pool, winner: ModelSpec, names: Collection[str], seed: int
    ) -> dict[tuple[str, str], Score]:
        """The winner and its controls with one seed, by name and task."""
        jobs: dict[tuple[str, str], Future[Score]] = {}
        for task, trained in self.proxy.tasks.items():
            # the controls of the proxy: equal in parameters or FLOPs where they are trained
            small = self.proxy.shrink(winner, trained)
            for name, spec in ({WINNER: small} | controls(small)).items():
                if name in names:
                    jobs[name, task] = self._submit(pool, spec, task, seed, -1)
        self._await(list(jobs.values()), f"seed {seed}")
        return {key: job.result() for key, job in jobs.items()}

    def _await(self, jobs: list[Future[Score]], what: str) -> None:
        while not all(job.done() for job in jobs):
            first_done(jobs, seconds=1.0)
            self.said = f"{what}: {sum(job.done() for job in jobs)} of {len(jobs)} runs"
            self._tell("comparing the winner with its controls")

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
