"""What a study has spent, by the records of all its workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection

from archdsl.search.study.spending import Ledger, Limits, account_of, covered
from archdsl.search.trials.proxy import Score
from archdsl.search.workers.pool import InProcess


@dataclass(frozen=True)
class Bill:
    train_flops: float
    reused: bool = False

    def run(self, beat: Callable[[], None]) -> Score:
        if self.train_flops < 0:
            raise ValueError("failed")
        return Score(
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


def ledger(storage: BaseStorage, limit: float | None = None) -> Ledger:
    return Ledger(storage, 0, Limits(train_flops=limit))


def pay(to: Ledger, phase: str, *bills: Bill) -> None:
    jobs: list[Future[Score]] = [to.paying(InProcess(), phase).submit(bill) for bill in bills]
    assert all(job.done() for job in jobs)
    to.keep()


def test_the_account_sums_up_all_workers_whether_they_live_or_not(storage: BaseStorage) -> None:
    dead = ledger(storage)
    pay(dead, "search", Bill(10), Bill(20))
    pay(dead, "controls", Bill(5))
    alive = ledger(storage, limit=50)
    pay(alive, "search", Bill(7), Bill(99, reused=True), Bill(-1))
    account = alive.account()
    assert account.by_phase["search"].train_flops == 37
    assert (account.total.train_flops, account.total.jobs, account.total.seconds) == (42, 4, 8.0)
    assert alive.flops_left == 8
    assert not alive.is_spent
    pay(alive, "search", Bill(8))
    assert alive.is_spent
    alive.save()
    assert account_of(storage, 0).total == alive.account().total
    assert account_of(storage, 0).workers == 2


def test_time_passes_once_for_all_workers() -> None:
    assert covered([]) == 0
    assert covered([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13


def test_time_goes_on_where_the_last_process_stopped(storage: BaseStorage) -> None:
    first = ledger(storage)
    time.sleep(0.05)
    first.save()
    second = Ledger(storage, 0, Limits(seconds=0.06))
    assert 0.05 <= second.account().wall < 5
    time.sleep(0.05)
    assert second.is_spent
