"""Storages: who may write, whose trials are stale, and what an error tells."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from optuna.storages import RDBStorage

from archdsl.lang.source import parse
from archdsl.lang.spec import Budget
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.storage import StorageError, database, exclusive
from archdsl.search.study.study import Study
from tests.search.study.test_sampler import SPACE


def backend(url: str, heartbeat: int) -> RDBStorage:
    found = database(url, heartbeat)._backend  # type: ignore[attr-defined]
    assert isinstance(found, RDBStorage)
    return found


def test_a_trial_is_stale_after_two_missed_heartbeats(tmp_path: Path) -> None:
    found = backend(f"sqlite:///{tmp_path / 'db'}", heartbeat=7)
    assert (found.heartbeat_interval, found.grace_period) == (7, 14)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[tuple[Study, Study]]:
    """Two workers that share a database."""
    sampler = TrialSampler(parse(SPACE, "small.yaml"), Budget(params=60_000), 1, 0)
    with ExitStack() as stack:

        def worker() -> Study:
            storage = database(f"sqlite:///{tmp_path / 'db'}", heartbeat=2)
            study = Study(storage, "study", sampler, ("loss",), window=4)
            stack.callback(study.heartbeat.stop.set)
            return study

        yield worker(), worker()


def test_the_trial_of_a_silent_worker_is_taken_by_another(workers: tuple[Study, Study]) -> None:
    silent, living = workers
    taken = silent.take(lambda number: number < 1)
    silent.heartbeat.stop.set()  # before its first interval is over
    assert taken is not None
    deadline = time.monotonic() + 60
    while (again := living.take(lambda number: number < 1)) is None:
        assert time.monotonic() < deadline, "the stale trial was never failed"
        time.sleep(0.1)
    assert (again.number, again.fingerprint) == (taken.number, taken.fingerprint)


def test_a_worker_with_heartbeats_keeps_its_trial(workers: tuple[Study, Study]) -> None:
    slow, other = workers
    taken = slow.take(lambda number: number < 1)
    assert taken is not None
    deadline = time.monotonic() + 6  # three intervals; it would be stale after two
    while time.monotonic() < deadline:
        assert other.take(lambda number: number < 1) is None
        time.sleep(0.3)


def test_one_process_at_a_time_may_use_a_folder(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path),
        pytest.raises(StorageError, match="another process"),
        exclusive(tmp_path),
    ):
        pytest.fail("two have the same folder")
    with exclusive(tmp_path):
        pass


def test_an_error_of_a_database_does_not_show_the_password() -> None:
    with pytest.raises(StorageError) as error:
        database("mysql+nosuchdriver://user:secret@host/name")
    assert "user" in str(error.value)
    assert "secret" not in str(error.value)
