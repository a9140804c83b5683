"""The search: draw, train proxies up their rungs, then see what the winner is worth."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from optuna.storages import BaseStorage

from archdsl.load import budget_of, read
from archdsl.search.axes import parse_axes
from archdsl.search.climb import Climber
from archdsl.search.compare import Correlation
from archdsl.search.contest import (
    Entry,
    Key,
    Result,
    contest_jobs,
    entries,
    known,
    role_of,
    run_contest,
)
from archdsl.search.draws import Draws
from archdsl.search.feasible import NothingFitsError, refuse_infeasible
from archdsl.search.folder import Settings, claim
from archdsl.search.ledger import Ledger, Limits, Spent
from archdsl.search.plan import Plan, plan
from archdsl.search.pool import Pool, processes
from archdsl.search.proof import Shared, run_proof
from archdsl.search.proxy import Job, Proxy, default_tasks
from archdsl.search.record import Finished
from archdsl.search.report import Report, best, top, write_report
from archdsl.search.scorers import Scorer, Separate, training_flops
from archdsl.search.shared import LAYOUTS, served
from archdsl.search.storage import HEARTBEAT, alone, answering, database, journal
from archdsl.search.study import Study
from archdsl.search.trust import Trust, between_rungs, run_trust
from archdsl.spec import Budget, ModelSpec

SECONDS = 540.0  # by default: with starting up, under ten minutes
KEPT_BACK = 0.62  # of all means, at most, for what follows the draws
WIDER_RUNS = 16  # what judging the proxy by one of twice the width costs, in trials


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after every event."""

    phase: str
    elapsed: float
    seconds: float
    running: int
    outcomes: dict[str, int]
    best: list[Finished]
    rungs: Correlation  # between the first and the last, so far
    last: str


Watch = Callable[[Progress], None]


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
        with processes(self.workers or default_workers(), self.memory, self.patience) as pool:
            yield pool


def default_workers() -> int:
    return min(8, os.cpu_count() or 1)


def search(
    space: str | os.PathLike[str] = "search",
    *,
    budget: Budget | None = None,
    overrides: Sequence[str] = (),
    proxy: Proxy | None = None,
    objective: str = "loss,flops",
    strategy: Literal["separate", "shared"] = "separate",
    layouts: int = LAYOUTS,
    seconds: float | None = SECONDS,
    trials: int | None = None,
    seed: int = 0,
    seeds: int = 3,
    window: int = 8,
    machine: Machine | None = None,
    out: Path | None = None,
    store: Path | None = None,
    storage: str | None = None,
    heartbeat: int = HEARTBEAT,
    watch: Watch | None = None,
    command: str = "",
) -> Report:
    """Searches a space of specs for the front of proxy loss and cost, under a budget.

    The budget is kept by the full-size models; ``budget.train_flops`` is for the whole search, as
    are ``seconds``, controls included (None: no limit), and ``trials``, the draws that are
    trained. ``objective``: ``loss``, or what it is weighed against, such as ``loss,flops,kv``.
    ``strategy``: train each draw for itself, or one net for all steps and capacities of a layout,
    of which there are ``layouts``.
    ``seed`` draws and trains; the winner and its controls are trained with ``seeds`` further ones.
    ``window``: draws that may be under way at once. ``out`` (default: runs/ and a name made of the
    settings) holds everything and is gone on from if it exists; trained models lie in ``store``
    (default: inside), which searches may share. ``storage``: the URL of a database by which
    searches on many machines become one. A script calls this below ``if __name__ == "__main__":``,
    as the children that train import it. On Ctrl-C what was found so far is returned. Raises
    SpecError, NothingFitsError, SearchFailedError, StorageError. ``command``: noted in the report.
    """
    tree = read(space, overrides)
    limits = budget_of(tree, budget)
    settings = Settings(
        tree,
        limits,
        proxy or Proxy(tasks=default_tasks()),
        axes=parse_axes(objective),
        strategy=strategy,
        layouts=layouts,
        window=window,
        seed=seed,
    )
    refuse_infeasible(tree, limits)
    folder = out or Path("runs") / settings.name
    store = store or folder / "proxies"
    scorer: Scorer = Separate(settings.proxy, store, seed)
    if strategy == "shared":
        tree, scorer = served(tree, settings.proxy, store, seed, layouts)
    claim(folder, settings)
    with opened(folder, storage, heartbeat) as (backend, mine):
        draws = Draws(tree, limits, len(settings.axes), seed)
        study = Study(backend, settings.name, draws, settings.axes, window)
        study.describe(settings.as_json())
        if mine:
            study.abandon()
        ledger = Ledger(backend, study.id, Limits(seconds, limits.train_flops))
        hunt = Search(folder, store, study, scorer, ledger, settings, trials, seeds, watch)
        return write_report(replace(hunt.run(machine or Machine()), command=command))


def planned(
    space: str | os.PathLike[str] = "search",
    *,
    budget: Budget | None = None,
    overrides: Sequence[str] = (),
    proxy: Proxy | None = None,
    seconds: float | None = SECONDS,
    trials: int | None = None,
    seed: int = 0,
    seeds: int = 3,
    machine: Machine | None = None,
) -> Plan:
    """What ``search`` with these settings would do and cost; half a minute, nothing is kept."""
    tree = read(space, overrides)
    with (machine or Machine()).pool() as pool:
        return plan(
            pool,
            tree,
            budget_of(tree, budget),
            proxy or Proxy(tasks=default_tasks()),
            seconds=seconds,
            trials=trials,
            seed=seed,
            seeds=seeds,
            wider=WIDER_RUNS,
        )


@contextmanager
def opened(folder: Path, url: str | None, heartbeat: int) -> Iterator[tuple[BaseStorage, bool]]:
    """The storage of a study, and whether this process is the only one that uses it."""
    if url is not None:
        with answering(url):
            yield database(url, heartbeat), False
        return
    with alone(folder):
        yield journal(folder), True


class Search:
    """One process's part of a search; the study and the store are its memory."""

    def __init__(
        self,
        folder: Path,
        store: Path,
        study: Study,
        scorer: Scorer,
        ledger: Ledger,
        settings: Settings,
        trials: int | None,
        seeds: int,
        watch: Watch | None,
    ) -> None:
        self.folder, self.store, self.study, self.ledger = folder, store, study, ledger
        self.scorer, self.settings, self.trials, self.seeds = scorer, settings, trials, seeds
        self.watch = watch or (lambda _: None)
        self.phase = "searching"
        self.workers = 1
        self.jobs: dict[Key, Job] = {}  # of the contest
        self.results: dict[Key, Result] = {}
        self.trust: Trust | None = None
        self.shared: Shared | None = None

    @property
    def proxy(self) -> Proxy:
        return self.settings.proxy

    def run(self, machine: Machine) -> Report:
        interrupted = False
        try:
            with machine.pool() as pool:
                self.workers = pool.workers
                self._climb(pool)
                self._judge(pool)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.ledger.save()
        finished = self.study.finished()
        if not best(finished):
            if interrupted:
                raise KeyboardInterrupt("no trial was finished; the same command goes on")
            raise NothingFitsError(self._why_nothing(finished))
        return Report(
            folder=self.folder,
            settings=self.settings,
            trials=finished,
            outcomes=self.study.outcomes(),
            entries=self._entries(top(finished, self.shared).spec),
            trust=self.trust,
            shared=self.shared,
            account=self.ledger.account(),
            limits=self.ledger.limits,
            importance=self.study.importance(),
            interrupted=interrupted,
        )

    def _entries(self, winner: ModelSpec) -> list[Entry]:
        """Also what was trained before an interruption."""
        return entries(winner, self.jobs, {**known(self.jobs), **self.results})

    def _why_nothing(self, finished: list[Finished]) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self.study.outcomes().items())
        error = next((f" The last one said: {t.error}" for t in finished[::-1] if t.error), "")
        return (
            f"no draw reached the last rung ({counts or 'none was made'}); more --time may help, "
            f"the same command goes on.{error}"
        )

    # climbing

    def _climb(self, pool: Pool) -> None:
        climber = Climber(
            self.study, self.scorer, self.proxy, self.ledger, self._may_draw, self._tell
        )
        climber.run(pool)

    def _may_draw(self, number: int, climbing: int) -> bool:
        trained = self.study.trained(before=number)
        return (
            (self.trials is None or trained < self.trials)
            and not self.study.exhausted
            and self._means_last_for(climbing + 1)
        )

    def _means_last_for(self, more: int) -> bool:
        """Whether so many further trials, and what follows, fit into what is left."""
        ranked = best(self.study.finished())
        if not ranked:
            return not self.ledger.is_spent
        rivals = len(self._contest(ranked[0].spec, [0])) / len(self.proxy.tasks)
        return self._lasts_for(more + self.seeds * rivals + WIDER_RUNS, ranked, KEPT_BACK)

    def _lasts_for(self, runs: float, ranked: list[Finished], most: float = 1.0) -> bool:
        """Whether there is time, and leave, for so many trainings of the best model so far; what
        is kept for them is at ``most`` a share of the whole."""
        flops = runs * training_flops(self.proxy, ranked[0].spec)
        rungs = [rung for trial in ranked for rung in trial.rungs]
        scores = [s for rung in rungs for s in rung.values() if s.train_flops]
        if not scores:  # all of them read back
            return not self.ledger.is_spent
        rate = sum(s.seconds for s in scores) / sum(s.train_flops for s in scores)
        limits = self.ledger.limits
        seconds = min(1.1 * rate * flops / self.workers, most * (limits.seconds or math.inf))
        flops = min(flops, most * (limits.train_flops or math.inf))
        return self.ledger.seconds_left > seconds and self.ledger.flops_left > flops

    # judging

    def _judge(self, pool: Pool) -> None:
        """The winner beside its controls, the proxy beside a wider one, then the ablations."""
        ranked = best(self.study.finished())
        if not ranked:
            return

        def may_go_on() -> bool:
            return self._lasts_for(1 / len(self.proxy.tasks), ranked)

        self._prove(pool, may_go_on)
        seeds = range(self.settings.seed + 1, self.settings.seed + 1 + self.seeds)
        self.jobs = self._contest(top(ranked, self.shared).spec, seeds)
        for phase, part in self._parts():
            self.phase = phase
            self.results |= run_contest(self.ledger.paying(pool, phase), part, may_go_on, self._say)
            if phase == "controls":
                self.phase = "trust"
                self.trust = run_trust(
                    self.ledger.paying(pool, "trust"),
                    self.study.finished(),
                    self.proxy,
                    self.settings.seed,
                    self.store,
                    may_go_on,
                    self._say,
                )

    def _prove(self, pool: Pool, may_go_on: Callable[[], bool]) -> None:
        """Whether what was scored with shared weights is as good trained alone."""
        if self.settings.strategy != "shared":
            return
        self.phase = "proof"
        spent = self.ledger.account().by_phase.get("search", Spent()).train_flops
        self.shared = run_proof(
            self.ledger.paying(pool, "proof"),
            self.study.finished(),
            self.proxy,
            self.settings.seed,
            self.store,
            spent,
            may_go_on,
            self._say,
        )

    def _contest(self, winner: ModelSpec, seeds: Iterable[int]) -> dict[Key, Job]:
        return contest_jobs(winner, self.proxy, seeds, self.store, ablate=True)

    def _parts(self) -> Iterator[tuple[str, dict[Key, Job]]]:
        """The contest in the order of what must be known."""
        ablations = {key for key in self.jobs if role_of(key[0]) == "ablation"}
        yield "controls", {key: job for key, job in self.jobs.items() if key not in ablations}
        yield "ablations", {key: job for key, job in self.jobs.items() if key in ablations}

    def _say(self, said: str) -> None:
        self._tell(said, self.workers)

    def _tell(self, said: str, running: int) -> None:
        self.ledger.keep()
        finished = self.study.finished()
        self.watch(
            Progress(
                self.phase,
                self.ledger.account().wall,
                self.ledger.limits.seconds or 0.0,
                running,
                self.study.outcomes(),
                best(finished)[:5],
                between_rungs(finished, self.proxy),
                said,
            )
        )
