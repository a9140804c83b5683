"""Optuna's storages: a journal in the study's folder, or a database that many machines share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, StorageInternalError
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    fail_stale_trials,
    get_storage,
)
from optuna.study import StudyDirection

from archdsl import files
from archdsl.errors import ArchdslError
from archdsl.search.study.journal_file import JournalFile

JOURNAL = "study.journal"
# what Optuna raises when it reads an entry that it would not write
WRONG_ENTRY = (LookupError, TypeError, ValueError, AttributeError, AssertionError, OptunaError)
HEARTBEAT_SECONDS = 30  # a trial is stale when two heartbeats in a row are missing
NO_URL = "URL"  # shown in place of a text that is no URL, as it may hold a password
SECONDS_BETWEEN_STALE_CHECKS = 1.0
CONNECTION_TRIES = 5  # until another worker has made the tables of a new database


class StorageError(ArchdslError):
    """A storage cannot be opened, does not answer, or is used by another process."""

    exit_status = 2


@contextmanager
def no_experimental_warnings() -> Iterator[None]:
    """Silence Optuna's warnings about its experimental features inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def create_study(storage: BaseStorage, name: str, objectives: int) -> None:
    """Add a study in which all ``objectives`` are minimized to a storage.

    Raises DuplicatedStudyError if the storage has a study of this name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage.create_new_study([StudyDirection.MINIMIZE] * objectives, study_name=name)


def in_memory_study(objectives: int) -> optuna.Study:
    """A new study of Optuna's in which all ``objectives`` are minimized, and which is not kept."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["minimize"] * objectives)


def journal(folder: Path, to_write: bool = False) -> BaseStorage:
    """The storage in a file of the folder. Only one process at a time may write: ``exclusive``.

    ``to_write``: drop a line that a crash has left unfinished. Raises JournalError if the file
    holds something that no search has written.
    """
    file = JournalFile(folder / JOURNAL)
    if to_write:
        file.drop_unfinished_line()
    try:
        return JournalStorage(file)
    except WRONG_ENTRY as error:
        missing = str(error.args[0]) if isinstance(error, KeyError) else ""
        why = f"{missing} is missing" if missing.isidentifier() else "is no entry of a study"
        raise file.error(why) from None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes inside the block, or until this process ends.

    Raises StorageError if another process has locked it.
    """
    refusal = StorageError(
        f"another process is searching in {folder}; wait until it ends, choose another "
        "--out, or share a database: --storage postgresql+psycopg://..."
    )
    with files.exclusive(folder, refusal):
        yield


def database(url: str, heartbeat: int = HEARTBEAT_SECONDS) -> BaseStorage:
    """Open a database by its SQLAlchemy URL, such as postgresql+psycopg://user@host/name.

    ``heartbeat``: seconds between two heartbeats of a trial. Raises StorageError if the driver is
    not installed or the database does not answer.
    """
    import sqlalchemy

    with no_experimental_warnings():
        try:
            return _connected(url, heartbeat)
        except ImportError as error:
            raise StorageError(
                f"storage: {_without_password(url)}: {error} (for PostgreSQL: "
                "pip install 'archdsl[postgresql]')"
            ) from None
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise StorageError(_message(url, error)) from None


def _connected(url: str, heartbeat: int) -> BaseStorage:
    """If several workers create the tables at the same time, all but one fail at first: retry."""
    import sqlalchemy

    for attempt in range(CONNECTION_TRIES - 1):
        try:
            return get_storage(_database(url, heartbeat))
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            time.sleep(0.2 * 2**attempt)
    return get_storage(_database(url, heartbeat))


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Raise StorageError with advice if the database stops answering inside the block."""
    try:
        yield
    except StorageInternalError as error:
        reason = _message(url, error.__cause__ or error)
        raise StorageError(f"{reason}; run the same command again to continue") from None


def _message(url: str, error: BaseException) -> str:
    shown = _without_password(url)
    if shown == NO_URL:
        wanted = "must be the URL of a database, such as postgresql+psycopg://user@host/name"
        return f"storage: {wanted}"
    return f"storage: {shown}: {str(error).strip().splitlines()[0]}"


def _database(url: str, heartbeat: int) -> RDBStorage:
    return RDBStorage(
        url,
        engine_kwargs={"pool_pre_ping": True},  # the database may have been restarted
        heartbeat_interval=heartbeat,
        grace_period=2 * heartbeat,
    )


def _without_password(url: str) -> str:
    import sqlalchemy

    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return NO_URL


class HeartbeatThread:
    """A thread that records heartbeats in a database for the attempts that this process trains.

    A journal needs no heartbeats, as only one process uses it: then there is no thread.
    """

    def __init__(self, storage: BaseStorage) -> None:
        # Optuna sends heartbeats only inside study.optimize, which the search does not use
        backend = getattr(storage, "_backend", storage)
        self.storage = backend if isinstance(backend, RDBStorage) else None
        self.attempts: set[int] = set()
        self.stale_checked_at = 0.0
        self.stop = Event()
        if self.storage is not None:
            Thread(target=self._run, daemon=True).start()

    def record(self, attempt_id: int) -> None:
        """Record a heartbeat at once.

        Call it before a worker takes the attempt: then the attempt becomes stale even if the worker
        dies before its next heartbeat.
        """
        if self.storage is not None:
            self.storage.record_heartbeat(attempt_id)

    def fail_stale(self, study: optuna.Study) -> None:
        """Fail the attempts of workers whose heartbeats are missing; look at most once a second."""
        if time.monotonic() - self.stale_checked_at > SECONDS_BETWEEN_STALE_CHECKS:
            with no_experimental_warnings():
                fail_stale_trials(study)
            self.stale_checked_at = time.monotonic()

    def _run(self) -> None:
        assert self.storage is not None
        while not self.stop.wait(self.storage.get_heartbeat_interval()):
            for attempt_id in list(self.attempts):
                self.storage.record_heartbeat(attempt_id)
