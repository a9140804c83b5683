"""Optuna's storages: a journal in the study's folder, or a database that many machines share."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from archdsl.errors import ArchdslError
from archdsl.search.study.sampler import no_experimental_warnings

HEARTBEAT_SECONDS = 30  # seconds; a worker that misses two is taken for dead


class StorageError(ArchdslError):
    """A storage that cannot be opened, or is in use."""

    exit_status = 2


def journal(folder: Path) -> BaseStorage:
    """For one process at a time; see ``exclusive``."""
    return JournalStorage(JournalFileBackend(str(folder / "study.journal")))


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder meanwhile, until this one ends, however it does."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another process is searching in {folder}; wait for it, choose another --out, or "
                "share a database: --storage postgresql+psycopg://..."
            ) from None
        yield


def database(url: str, heartbeat: int = HEARTBEAT_SECONDS) -> BaseStorage:
    """A database by its SQLAlchemy URL, such as postgresql+psycopg://user@host/name."""
    import sqlalchemy

    with no_experimental_warnings():
        try:
            # of several workers that make the tables at once, all but one fail the first time
            for attempt in range(5):
                try:
                    return get_storage(_database(url, heartbeat))
                except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
                    if attempt == 4:
                        raise
                    time.sleep(0.2 * 2**attempt)
        except ImportError as error:
            raise StorageError(
                f"--storage {_without_password(url)}: {error} (PostgreSQL's driver: "
                "pip install 'archdsl[postgresql]')"
            ) from None
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise StorageError(_refused(url, error)) from None
    raise AssertionError


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Raises StorageError where the database answers no more."""
    try:
        yield
    except StorageInternalError as error:
        raise StorageError(f"{_refused(url, error.__cause__ or error)}; start it again") from None


def _refused(url: str, error: BaseException) -> str:
    return f"--storage {_without_password(url)}: {str(error).strip().splitlines()[0]}"


def _database(url: str, heartbeat: int) -> RDBStorage:
    return RDBStorage(
        url,
        engine_kwargs={"pool_pre_ping": True},  # a database may be restarted meanwhile
        heartbeat_interval=heartbeat,
        grace_period=2 * heartbeat,
    )


def _without_password(url: str) -> str:
    import sqlalchemy

    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return "URL"


class HeartbeatThread:
    """Says in a database, from a thread, which trials are still worked on."""

    def __init__(self, storage: BaseStorage) -> None:
        # Optuna's heartbeats belong to study.optimize; asking and telling, we beat ourselves
        backend = getattr(storage, "_backend", storage)
        self.storage = backend if isinstance(backend, RDBStorage) else None
        self.trials: set[int] = set()
        self.stop = Event()
        if self.storage is not None:
            Thread(target=self._run, daemon=True).start()

    def record(self, trial_id: int) -> None:
        """Before a worker takes the trial: should it die at once, the beat will be missed."""
        if self.storage is not None:
            self.storage.record_heartbeat(trial_id)

    def _run(self) -> None:
        assert self.storage is not None
        while not self.stop.wait(self.storage.get_heartbeat_interval()):
            for trial_id in list(self.trials):
                self.storage.record_heartbeat(trial_id)
