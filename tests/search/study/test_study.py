"""A study is the same whoever works on it, however many, and whatever becomes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState

from archdsl.lang.load import read
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.search.rung_scheduler import RungScheduler, SearchFailedError
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.spending import Limits, Spending
from archdsl.search.study.storage import journal
from archdsl.search.study.study import Study
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Proxy, ProxyScore, Task
from archdsl.search.workers.pool import InProcess, Work

SPACE = """
name: small
vocab_size: 300
context: 64
dim: {fit: {multiple_of: 16, default: 32}}
blocks:
  - &layer {kind: layer, attention: {head_size: 16}, ffn: {ratio: 2}}
  - search:
      default: itt
      choices:
        plain: *layer
        itt:
          kind: loop
          steps: {search: {low: 1, high: 4, default: 2}}
          router:
            kind: {search: {choices: [prefix, random], default: prefix}}
            capacity: {search: {low: 0.1, high: 1.0, step: 0.1, default: 0.5}}
          residual: {kind: {search: {choices: [thinking, delta, overwrite], default: thinking}}}
          body: *layer
"""
BUDGET = Budget(params=60_000)
TASK = Task(data="skill:p-hop,hops=1,length=12", context=12, rungs=(2, 4))
PROXY = Proxy(dim=16, head_size=8, tasks={"skill": TASK})


@pytest.fixture
def space(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SPACE)
    return file


@dataclass(frozen=True)
class Pretended:
    """A score that depends on the model alone, as a training with one seed does."""

    fingerprint: str
    rung: int

    def run(self, heartbeat: Callable[[], None]) -> ProxyScore:
        rng = random.Random(f"{self.fingerprint}/{self.rung}")
        quality = random.Random(self.fingerprint).random()
        loss = 2 - 0.3 * self.rung + quality + 0.1 * rng.random()
        return ProxyScore(
            steps=self.rung,
            loss=None if quality > 0.97 else loss,
            accuracy=0.0,
            bits_per_byte=None,
            seconds=1.0,
            train_flops=10.0,
        )

    def smaller(self) -> None:
        return None


class Pretend:
    rungs = 2

    def job(
        self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int
    ) -> Work[ProxyScore]:
        return Pretended(spec.fingerprint(), rung)


class Killed(BaseException):
    pass


class Fragile(InProcess):
    """Dies before or after some of its jobs."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self.rng, self.share = rng, share

    def submit(self, work: Work[Any]) -> Future[Any]:
        if self.rng.random() < self.share:
            raise Killed
        return super().submit(work)


def study_of(space: Path, storage: BaseStorage, axes: tuple[str, ...], seed: int) -> Study:
    sampler = TrialSampler(read(space), BUDGET, len(axes), seed)
    return Study(storage, "study", sampler, axes, window=4)


def schedulers(
    space: Path,
    storage: BaseStorage,
    axes: tuple[str, ...],
    workers: int,
    trials: int,
    scorer: Pretend = Pretend(),  # noqa: B008  it holds nothing
) -> list[RungScheduler]:
    def one() -> RungScheduler:
        study = study_of(space, storage, axes, seed=3)
        spending = Spending(storage, study.id, Limits())
        return RungScheduler(
            study,
            scorer,
            PROXY,
            spending,
            lambda number, _: study.trained(before=number) < trials and not study.exhausted,
            lambda said, running: None,
        )

    return [one() for _ in range(workers)]


def told(found: list[Trial]) -> list[tuple[Any, ...]]:
    return [(t.number, t.fingerprint, t.outcome, t.values, t.same_as) for t in found]


@pytest.mark.parametrize("axes", [("loss",), ("loss", "flops")])
def test_a_study_does_not_depend_on_who_works_on_it(space: Path, axes: tuple[str, ...]) -> None:
    (alone,) = schedulers(space, InMemoryStorage(), axes, workers=1, trials=24)
    alone.run(InProcess())
    expected = told(alone.study.finished())
    outcomes = alone.study.outcomes()
    assert outcomes["pruned"] >= 3
    assert outcomes["complete"] >= 8
    assert outcomes["complete"] + outcomes["pruned"] + outcomes.get("diverged", 0) == 24
    for chance in range(2):
        assert told(stormy(space, axes, chance).finished()) == expected


def stormy(space: Path, axes: tuple[str, ...], chance: int) -> Study:
    """Three workers that take turns at random, and die at random moments."""
    rng, storage = random.Random(chance), InMemoryStorage()
    workers = schedulers(space, storage, axes, workers=3, trials=24)
    pools = [Fragile(random.Random(rng.random()), 0.1) for _ in workers]
    while True:
        which = rng.randrange(len(workers))
        worker = workers[which]
        try:
            if not turn(worker, pools[which], rng) and not worker.study.unfinished:
                return worker.study
        except Killed:
            fail_trials_of(worker, storage)
            (workers[which],) = schedulers(space, storage, axes, workers=1, trials=24)


def turn(worker: RungScheduler, pool: Fragile, rng: random.Random) -> bool:
    """Takes a draw, or finishes a rung of one; whether there was anything to do."""
    if not worker.active or (len(worker.active) < 2 and rng.random() < 0.5):
        return worker._take(pool)
    worker._finish_rung(pool, rng.choice(worker.active))
    return True


def fail_trials_of(worker: RungScheduler, storage: BaseStorage) -> None:
    """What missing heartbeats do: the trials that the worker held are lost."""
    for trial_id in worker.study.heartbeat.attempts:
        storage.set_trial_state_values(trial_id, TrialState.FAIL)


def test_every_trial_of_optuna_is_a_result_or_was_left_behind(space: Path) -> None:
    study = stormy(space, ("loss", "flops"), chance=1)
    trials = study.storage.get_all_trials(study.id)
    results = [t for t in trials if t.state != TrialState.FAIL]
    numbers = [t.user_attrs["draw"] for t in results]
    assert sorted(numbers) == list(range(len(numbers)))
    assert len(results) < len(trials)


@contextmanager
def held(study: Study, sampler: int) -> Iterator[None]:
    for _ in range(sampler):
        assert study.take(lambda number: True) is not None
    yield


def test_a_draw_waits_for_those_that_it_must_know(space: Path, tmp_path: Path) -> None:
    study = study_of(space, journal(tmp_path), ("loss",), seed=0)
    with held(study, 4):
        assert study.take(lambda number: True) is None  # the window is 4


def test_what_a_dead_process_held_is_taken_first_with_what_is_known(
    space: Path, tmp_path: Path
) -> None:
    study = study_of(space, journal(tmp_path), ("loss",), seed=0)
    trial = study.take(lambda number: True)
    assert trial is not None
    score = Pretended(trial.fingerprint, 0).run(lambda: None)
    study.record_rung(trial, {"skill": score}, (2.5,))
    study._set_attr(
        trial.attempt_id, "outcome", "complete"
    )  # and here it is killed, before telling
    again = study_of(space, journal(tmp_path), ("loss",), seed=0)
    assert again.finished() == []
    again.fail_running()
    taken = again.take(lambda number: True)
    assert taken is not None
    assert (taken.number, taken.fingerprint) == (trial.number, trial.fingerprint)
    assert (taken.rungs, taken.losses) == (({"skill": score},), (2.5,))


def test_who_was_wrongly_taken_for_dead_changes_nothing(space: Path, tmp_path: Path) -> None:
    study = study_of(space, journal(tmp_path), ("loss",), seed=0)
    slow = study.take(lambda number: True)
    assert slow is not None
    study.fail_running()
    quick = study.take(lambda number: True)
    assert quick is not None
    study.finish(quick, "complete", (1.0,))
    study.record_rung(slow, {}, (9.0,))
    study.finish(slow, "complete", (9.0,))
    assert [t.value for t in study.finished()] == [1.0]


def test_a_draw_is_new_wherever_there_is_something_new(space: Path) -> None:
    (worker,) = schedulers(space, InMemoryStorage(), ("loss",), workers=1, trials=40)
    worker.run(InProcess())
    found = worker.study.finished()
    trained = [t.fingerprint for t in found if t.outcome != "reused"]
    assert len(set(trained)) == len(trained) == 40
    assert len(found) - len(trained) <= 2


@dataclass(frozen=True)
class Exhausting(Pretended):
    def run(self, heartbeat: Callable[[], None]) -> ProxyScore:
        raise MemoryError("no more")


@dataclass(frozen=True)
class Exhaust(Pretend):
    """Some models are too large for the machine."""

    share: float

    def job(
        self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int
    ) -> Work[ProxyScore]:
        found = spec.fingerprint()
        large = random.Random(f"size of {found}").random() < self.share
        return (Exhausting if large else Pretended)(found, rung)


def test_a_trial_that_fails_does_so_alone_and_says_why(space: Path) -> None:
    (worker,) = schedulers(
        space, InMemoryStorage(), ("loss", "flops"), workers=1, trials=16, scorer=Exhaust(0.2)
    )
    worker.run(InProcess())
    found = worker.study.finished()
    failed = [trial for trial in found if trial.outcome == "failed"]
    assert 1 <= len(failed) <= 8
    assert {trial.error for trial in failed} == {"out of memory: MemoryError: no more"}
    assert {trial.outcome for trial in found[-4:]} - {"failed"}
    assert sum(trial.outcome not in ("reused", "invalid") for trial in found) == 16


def test_when_every_trial_fails_the_search_ends_and_says_why(space: Path) -> None:
    (worker,) = schedulers(
        space, InMemoryStorage(), ("loss",), workers=1, trials=16, scorer=Exhaust(1.0)
    )
    with pytest.raises(SearchFailedError, match=r"5 trials failed .* no more"):
        worker.run(InProcess())
