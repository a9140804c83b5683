"""What a study has spent, by the records of all its workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection

from archdsl.search.study.spending import Limits, Spending, covered_seconds, spending_summary
from archdsl.search.trials.proxy import ProxyScore
from archdsl.search.workers.pool import InProcess


@dataclass(frozen=True)
class Charge:
    train_flops: float
    reused: bool = False

    def run(self, heartbeat: Callable[[], None]) -> ProxyScore:
        if self.train_flops < 0:
            raise ValueError("failed")
        return ProxyScore(
            steps=1,
            loss=1.0,
            accuracy=None,
            bits_per_byte=None,
            seconds=2.0,
            train_flops=self.train_flops,
            reused=self.reused,
        )

    def smaller(self) -> None:
        return None


@pytest.fixture
def storage() -> BaseStorage:
    made = InMemoryStorage()
    made.create_new_study([StudyDirection.MINIMIZE])
    return made


def spending_of(storage: BaseStorage, limit: float | None = None) -> Spending:
    return Spending(storage, 0, Limits(train_flops=limit))


def pay(to: Spending, phase: str, *works: Charge) -> None:
    jobs: list[Future[ProxyScore]] = [
        to.metered(InProcess(), lambda _: phase).submit(work) for work in works
    ]
    assert all(job.done() for job in jobs)
    to.update()


def test_the_account_sums_up_all_workers_whether_they_live_or_not(storage: BaseStorage) -> None:
    killed = spending_of(storage)
    pay(killed, "search", Charge(10), Charge(20))
    pay(killed, "baselines", Charge(5))
    alive = spending_of(storage, limit=50)
    pay(alive, "search", Charge(7), Charge(99, reused=True), Charge(-1))
    summary = alive.summary()
    assert summary.by_phase["search"].train_flops == 37
    assert (summary.total.train_flops, summary.total.jobs, summary.total.seconds) == (42, 4, 8.0)
    assert alive.flops_left == 8
    assert not alive.is_spent
    pay(alive, "search", Charge(8))
    assert alive.is_spent
    alive.save()
    assert spending_summary(storage, 0).total == alive.summary().total
    assert spending_summary(storage, 0).workers == 2


def test_time_passes_once_for_all_workers() -> None:
    assert covered_seconds([]) == 0
    assert covered_seconds([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13


def test_time_goes_on_where_the_last_process_stopped(storage: BaseStorage) -> None:
    first = spending_of(storage)
    time.sleep(0.05)
    first.save()
    second = Spending(storage, 0, Limits(seconds=0.06))
    assert 0.05 <= second.summary().wall < 5
    time.sleep(0.05)
    assert second.is_spent


def test_phases_of_earlier_versions_count_under_their_present_names(storage: BaseStorage) -> None:
    spent = {"seconds": 2.0, "train_flops": 5.0, "eval_flops": 0.0, "jobs": 1}
    old = {"pid": 1, "from": 0.0, "to": 1.0, "phases": {"controls": spent, "trust": spent}}
    storage.set_study_user_attr(0, "worker/old", old)
    spending = spending_of(storage)
    pay(spending, "baselines", Charge(7))
    phases = spending.summary().by_phase
    assert set(phases) == {"baselines", "proxy validation"}
    assert phases["baselines"].train_flops == 12
