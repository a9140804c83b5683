"""The rung scheduler: which trials go on, when it ends, and what it leaves for others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from archdsl.files import WriteError
from archdsl.lang.source import parse
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.search.rung_scheduler import FAILURES, RungScheduler, SearchFailedError
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.spending import Limits, Spending
from archdsl.search.study.study import Study
from archdsl.search.trials.proxy import Proxy, ProxyScore, Task, mean_shares
from archdsl.search.workers.pool import InProcess, JobFailed, Work
from tests.search.study.test_sampler import SPACE

TASK = Task(data="skill:p-hop,hops=1,length=12", context=12, rungs=(2, 4))
PROXY = Proxy(dim=16, head_size=8, tasks={"skill": TASK})
Outcome = Callable[[int, int], Any]  # number of the training and rung -> a loss, or an exception


def score(loss: float | None, shares: dict[str, float] | None = None) -> ProxyScore:
    return ProxyScore(
        steps=2,
        loss=loss,
        accuracy=None,
        bits_per_byte=None,
        seconds=1.0,
        train_flops=10.0,
        shares=shares or {},
    )


@dataclass(frozen=True)
class Scripted:
    """A scorer whose scores are given by a function."""

    outcome: Outcome
    rungs: int = 2
    shares: float | None = None

    def job(
        self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int
    ) -> Work[ProxyScore]:
        names = ["blocks.1.0"] if "kind: loop" in spec.to_yaml() and self.shares else []
        return Given(self.outcome, rung, dict.fromkeys(names, self.shares or 0.0))


@dataclass(frozen=True)
class Given:
    outcome: Outcome
    rung: int
    shares: dict[str, float]

    def run(self, heartbeat: Callable[[], None]) -> ProxyScore:
        Counted.trainings += 1
        found = self.outcome(Counted.trainings, self.rung)
        if isinstance(found, BaseException):
            raise found
        return score(found, self.shares)

    def smaller(self) -> None:
        return None


class Counted:
    trainings = 0


@pytest.fixture(autouse=True)
def _count_anew() -> None:
    Counted.trainings = 0


def scheduler(
    outcome: Outcome,
    trials: int,
    storage: InMemoryStorage | None = None,
    axes: tuple[str, ...] = ("loss",),
    limit: float | None = None,
    shares: float | None = None,
) -> RungScheduler:
    storage = storage or InMemoryStorage()
    sampler = TrialSampler(parse(SPACE, "small.yaml"), Budget(params=60_000), len(axes), 0)
    study = Study(storage, "study", sampler, axes, window=8)
    spending = Spending(storage, study.id, Limits(train_flops=limit))
    return RungScheduler(
        study,
        Scripted(outcome, shares=shares),
        PROXY,
        spending,
        lambda number, _: number < trials,
        lambda said, running: None,
    )


def outcomes(found: RungScheduler) -> list[str]:
    return [trial.outcome for trial in found.study.finished()]


def test_failures_end_the_search_only_if_no_trial_succeeds_between_them() -> None:
    failed = JobFailed("crash", "it fell over")
    every_third = scheduler(lambda n, rung: 2.0 if n % 3 == 0 else failed, trials=FAILURES + 4)
    every_third.run(InProcess())
    assert outcomes(every_third).count("failed") > FAILURES
    never = scheduler(lambda n, rung: failed, trials=FAILURES + 4)
    with pytest.raises(SearchFailedError, match=r"5 trials failed .* crash: it fell over"):
        never.run(InProcess())
    assert outcomes(never).count("failed") == FAILURES


def test_the_first_trial_that_the_disk_is_too_full_for_ends_the_search() -> None:
    full = OSError(28, "No space left on device", "a/state")
    ended = scheduler(lambda n, rung: 2.0 if n < 2 else full, trials=9)
    with pytest.raises(WriteError, match=r"^a/state could not .* device; make room, and run the"):
        ended.run(InProcess())
    assert outcomes(ended).count("failed") == 0


def test_a_diverged_trial_is_finished_at_once() -> None:
    found = scheduler(lambda n, rung: None, trials=2)
    found.run(InProcess())
    assert outcomes(found) == ["diverged", "diverged"]
    assert [len(trial.rungs) for trial in found.study.finished()] == [1, 1]
    assert Counted.trainings == 2


def test_a_trial_that_is_worse_than_most_is_stopped_on_the_first_rung() -> None:
    losses = iter([1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, *[9.0] * 40])
    found = scheduler(lambda n, rung: next(losses), trials=14)
    found.study.window = 1
    found.run(_OneAtATime())
    assert outcomes(found)[:4] == ["complete"] * 4
    stopped = [trial for trial in found.study.finished() if trial.outcome == "pruned"]
    assert stopped
    assert all(len(trial.rungs) == 1 and trial.values is None for trial in stopped)


class _OneAtATime(InProcess):
    workers = 0


def test_a_rung_that_was_trained_before_a_crash_is_not_trained_again() -> None:
    storage = InMemoryStorage()
    first = scheduler(lambda n, rung: 2.0, trials=1, storage=storage)
    trial = first.study.take(lambda number: True)
    assert trial is not None
    first.study.record_rung(trial, {"skill": score(2.0)}, (2.0,))  # and then it crashes
    first.study.release(trial)
    second = scheduler(lambda n, rung: 1.0, trials=1, storage=storage)
    second.run(InProcess())
    assert Counted.trainings == 1
    (found,) = second.study.finished()
    assert [rung["skill"].loss for rung in found.rungs] == [2.0, 1.0]


def test_a_decision_that_a_crash_prevented_is_made_by_the_next_process() -> None:
    storage = InMemoryStorage()
    first = scheduler(lambda n, rung: 2.0, trials=1, storage=storage)
    trial = first.study.take(lambda number: True)
    assert trial is not None
    for loss in (2.0, 1.5):  # all rungs, and then it crashes
        trial = first.study.record_rung(trial, {"skill": score(loss)}, (loss,))
    first.study.release(trial)
    again = JobFailed("error", "it was trained again")
    second = scheduler(lambda n, rung: again, trials=1, storage=storage)
    second.run(InProcess())
    assert Counted.trainings == 0
    (found,) = second.study.finished()
    assert (found.outcome, found.value) == ("complete", 1.5)


class _Interrupted(InProcess):
    def submit(self, work: Work[Any]) -> Future[Any]:
        if Counted.trainings:
            raise KeyboardInterrupt
        return super().submit(work)


def test_after_ctrl_c_another_process_continues_the_trials() -> None:
    storage = InMemoryStorage()
    first = scheduler(lambda n, rung: 2.0, trials=3, storage=storage)
    with pytest.raises(KeyboardInterrupt):
        first.run(_Interrupted())
    second = scheduler(lambda n, rung: 2.0, trials=3, storage=storage)
    held = [second.study.take(lambda number: number < 1) for _ in range(1)]
    assert [trial.number for trial in held if trial is not None] == [0]


def test_no_training_starts_after_a_limit_is_reached() -> None:
    found = scheduler(lambda n, rung: 2.0, trials=9, limit=10.0)
    found.run(InProcess())
    assert Counted.trainings == 2  # those that were running
    assert found.study.finished() == []
    more = scheduler(lambda n, rung: 2.0, trials=2, storage=found.study.storage)  # type: ignore[arg-type]
    more.run(InProcess())
    assert outcomes(more) == ["complete"] * 2
    assert Counted.trainings == 4


def test_a_mistake_in_the_code_is_no_failed_trial() -> None:
    found = scheduler(lambda n, rung: 2.0, trials=1)

    class Broken(InProcess):
        def submit(self, work: Work[Any]) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(ZeroDivisionError("a mistake"))
            return future

    with pytest.raises(ZeroDivisionError, match="a mistake"):
        found.run(Broken())


def test_a_model_costs_what_its_routers_really_select() -> None:
    few, many = (
        scheduler(lambda n, rung: 2.0, trials=1, axes=("loss", "flops"), shares=share)
        for share in (0.1, 0.9)
    )
    flops = []
    for one in (few, many):
        one.run(InProcess())
        (trial,) = one.study.finished()
        assert trial.values is not None
        flops.append(trial.values["flops"])
    assert flops[0] < 0.9 * flops[1]


def test_shares_are_means_over_the_tasks_that_have_them() -> None:
    scores = [score(1.0, {"a": 0.2, "b": 0.4}), score(1.0, {"a": 0.6})]
    assert mean_shares(scores) == pytest.approx({"a": 0.4, "b": 0.4})
