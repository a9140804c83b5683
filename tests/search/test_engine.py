"""The engine: when trials end so that time is left, and what is trained after them."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

import archdsl
from archdsl.lang.source import parse
from archdsl.lang.spec import Budget
from archdsl.search.engine import RESERVED_SHARE, VALIDATION_RUNS, SearchEngine
from archdsl.search.study.settings import Settings
from archdsl.search.study.spending import Limits, Spending
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Proxy, ProxyScore, Task
from archdsl.search.trials.scorers import task_flops, training_flops
from archdsl.search.workers.pool import JobFailed
from tests.search.study.test_sampler import SPACE

TASK = Task(data="skill:p-hop,hops=1,length=12", context=12, rungs=(2, 4))
PROXY = Proxy(dim=16, head_size=8, tasks={"a": TASK, "b": TASK})
TINY = archdsl.load("tiny")
FLOPS = training_flops(PROXY, TINY)
RATE = 1e-6  # seconds of a worker per FLOP
SEEDS = 3


def trial(number: int = 0, loss: float = 2.0) -> Trial:
    found = ProxyScore(
        steps=4,
        loss=loss / 2,
        accuracy=None,
        bits_per_byte=None,
        seconds=RATE * FLOPS / 2,
        train_flops=FLOPS / 2,
    )
    values = {"loss": loss, "flops": 1.0}
    return Trial(
        number,
        {},
        spec_yaml=TINY.to_yaml(),
        fingerprint=str(number),
        outcome="complete",
        values=values,
        rungs=({"a": found, "b": found},),
    )


@dataclass
class FakeStudy:
    trials: list[Trial]
    exhausted: bool = False
    started: int = 0
    in_database: bool = False

    def finished(self) -> list[Trial]:
        return self.trials

    def trained(self, before: int) -> int:
        return self.started


@dataclass
class FakeSpending:
    seconds_left: float = 1e12
    flops_left: float = 1e18
    limits: Limits = field(default_factory=Limits)

    finished_jobs: SimpleQueue[tuple[str, Any]] = field(default_factory=SimpleQueue)
    metered = Spending.metered

    @property
    def is_spent(self) -> bool:
        return self.seconds_left <= 0 or self.flops_left <= 0


def engine(
    study: FakeStudy,
    spending: FakeSpending,
    trials: int | None = None,
    seed: int = 0,
    validate: bool = False,
) -> SearchEngine:
    settings = Settings(parse(SPACE, "small.yaml"), Budget(params=60_000), PROXY, seed=seed)
    made = SearchEngine(
        Path("none"),
        Path("none/store"),
        cast(Any, study),
        cast(Any, SimpleNamespace(rungs=2)),
        cast(Any, spending),
        settings,
        trials,
        SEEDS,
        None,
        validate,
    )
    made.workers = 2
    return made


def compared() -> float:
    """What winner and baselines cost, in trainings of the winner."""
    jobs = engine(FakeStudy([]), FakeSpending())._comparison_jobs(TINY, [0], ablate=False)
    return sum(task_flops(job.task, job.spec) for job in jobs.values()) / FLOPS


def test_so_many_trials_start_as_were_asked_for() -> None:
    for started, expected in [(0, True), (4, True), (5, False), (6, False)]:
        found = engine(FakeStudy([], started=started), FakeSpending(), trials=5)
        assert found._may_start(started, 0) == expected


def test_no_trial_starts_in_an_exhausted_space() -> None:
    assert not engine(FakeStudy([], exhausted=True), FakeSpending())._may_start(9, 0)
    assert engine(FakeStudy([]), FakeSpending())._may_start(9, 0)


@pytest.mark.parametrize("validate", [True, False])
def test_no_trial_starts_without_time_for_all_that_must_follow(validate: bool) -> None:
    runs = 1 + SEEDS * compared() + VALIDATION_RUNS * validate  # one more, and what follows
    needed = 1.1 * RATE * FLOPS * runs / 2  # by two workers
    study = FakeStudy([trial()])
    for share, expected in [(1.01, True), (0.99, False)]:
        spending = FakeSpending(seconds_left=share * needed)
        assert engine(study, spending, validate=validate)._may_start(1, 0) == expected
    one_running = FakeSpending(seconds_left=1.01 * needed)
    assert not engine(study, one_running, validate=validate)._may_start(
        1, 3
    )  # three are running already


def test_what_follows_is_counted_once_for_each_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    count = Mock(wraps=SearchEngine._comparison_jobs)
    monkeypatch.setattr(
        SearchEngine, "_comparison_jobs", lambda *given, **kwargs: count(*given, **kwargs)
    )
    found = engine(FakeStudy([trial()]), FakeSpending())
    assert [found._may_start(1, 0) for _ in range(3)] == [True] * 3
    assert count.call_count == 1


def test_no_trial_starts_without_flops_for_all_that_must_follow() -> None:
    needed = FLOPS * (1 + SEEDS * compared())
    study = FakeStudy([trial()])
    for share, expected in [(1.01, True), (0.99, False)]:
        spending = FakeSpending(flops_left=share * needed)
        assert engine(study, spending)._may_start(1, 0) == expected


def test_trials_get_a_share_of_the_limits_however_much_follows() -> None:
    study = FakeStudy([trial()])
    limit = RATE * FLOPS  # far too little for all that follows
    for left, expected in [(RESERVED_SHARE + 0.01, True), (RESERVED_SHARE - 0.01, False)]:
        time = FakeSpending(seconds_left=left * limit, limits=Limits(seconds=limit))
        assert engine(study, time)._may_start(1, 0) == expected
        flops = FakeSpending(flops_left=left * FLOPS, limits=Limits(train_flops=FLOPS))
        assert engine(study, flops)._may_start(1, 0) == expected
    assert RESERVED_SHARE < 0.9


def test_without_a_result_trials_start_until_a_limit_is_reached() -> None:
    assert engine(FakeStudy([]), FakeSpending(seconds_left=0.1))._may_start(0, 0)
    assert not engine(FakeStudy([]), FakeSpending(seconds_left=0.0))._may_start(0, 0)


def test_baselines_come_before_ablations() -> None:
    found = engine(FakeStudy([]), FakeSpending())
    found.jobs = found._comparison_jobs(TINY, [1, 2])
    phases = found._phases()
    assert list(phases) == ["baselines", "ablations"]
    first, second = ({name for name, _, _ in jobs} for jobs in phases.values())
    assert {"winner", "equal-parameters plain"} <= first
    assert all(name.startswith("without") for name in second)
    assert second
    assert sum(map(len, phases.values())) == len(found.jobs)


def test_an_ablation_starts_while_the_last_baseline_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spending = FakeSpending()
    found = engine(FakeStudy([]), spending)
    found.jobs = found._comparison_jobs(TINY, [1])
    phases = found._phases()
    last = [*phases["baselines"].values()][-1]
    score, pending = trial().rungs[-1]["a"], Future[ProxyScore]()

    class Slow:
        workers = 2

        def submit(self, work: Any) -> Future[Any]:
            if work is last:
                return pending
            if any(work is job for job in phases["ablations"].values()) and not pending.done():
                pending.set_result(score)
            done = Future[Any]()
            done.set_result(score)
            return done

    told = iter(range(2 * len(found.jobs)))
    monkeypatch.setattr(found, "_affords_runs", lambda *_: True)
    monkeypatch.setattr(found, "_tell", lambda *_: next(told))  # it would wait for ever
    assert len(found._run_jobs(cast(Any, Slow()), phases, [])) == len(found.jobs)
    assert found.phase == "ablations"
    counted = Counter(spending.finished_jobs.get()[0] for _ in found.jobs)
    assert counted == {phase: len(jobs) for phase, jobs in phases.items()}


def test_an_interruption_of_the_ablations_keeps_the_baselines_and_what_failed_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = engine(FakeStudy([]), FakeSpending())
    found.jobs = found._comparison_jobs(TINY, [1])
    phases, score = found._phases(), trial().rungs[-1]["a"]

    class Interrupted:
        workers = 1

        def submit(self, work: Any) -> Future[Any]:
            if any(work is job for job in phases["ablations"].values()):
                raise KeyboardInterrupt
            done = Future[Any]()
            if work is phases["baselines"]["equal-FLOPs plain", "a", 1]:
                done.set_exception(JobFailed("out of memory", ""))
            else:
                done.set_result(score)
            return done

    monkeypatch.setattr(found, "_affords_runs", lambda *_: True)
    monkeypatch.setattr(found, "_tell", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        found._run_jobs(cast(Any, Interrupted()), phases, [], found.results)
    errors = {entry.name: entry.error for entry in found._entries(TINY)}
    assert errors.keys() == {name for name, _, _ in phases["baselines"]}
    assert [name for name, error in errors.items() if error] == ["equal-FLOPs plain"]


def test_a_score_of_another_machine_counts_more_than_a_failure_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = engine(FakeStudy([]), FakeSpending())
    found.jobs = found._comparison_jobs(TINY, [1], ablate=False)
    found.results = {key: JobFailed("out of memory", "") for key in found.jobs}
    assert all(entry.error for entry in found._entries(TINY))
    score = trial().rungs[-1]["a"]
    known = dict.fromkeys(found.jobs, score)
    monkeypatch.setattr("archdsl.search.engine.known_scores", lambda jobs, shared: known)
    assert not any(entry.error for entry in found._entries(TINY))


def test_the_flops_of_a_training_are_those_of_its_sequences(tmp_path: Path) -> None:
    task = Task(data="skill:p-hop,hops=1,length=12", context=40, batch_size=4, rungs=(2,))
    small = Proxy(dim=16, head_size=8, tasks={"a": task}).shrink(TINY, task)
    done = task.job(tmp_path, small, 0, 2).run(lambda: None)
    assert task_flops(task, small) == pytest.approx(done.train_flops)


def test_the_winner_is_compared_with_seeds_that_were_not_used_in_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    found = engine(FakeStudy([trial()]), FakeSpending(), seed=7)
    found.spending = cast(Any, SimpleNamespace(metered=lambda pool, phase: pool))
    monkeypatch.setattr(SearchEngine, "_validate_proxy", lambda *_: None)

    def run_comparison(pool: Any, jobs: dict[Any, Any], *_: Any) -> dict[Any, Any]:
        seen.extend(job.seed for job in jobs.values())
        return {}

    monkeypatch.setattr("archdsl.search.engine.run_comparison", run_comparison)
    found._evaluate_winner(cast(Any, None))
    assert [seed for seed, _ in groupby(sorted(seen))] == [8, 9, 10]
