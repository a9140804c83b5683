"""The file behind a journal storage of Optuna's: one JSON object on each line, only ever appended.

Optuna's own file backend appends to a line that a full disk or a crash has left unfinished, after
which nothing can read the file. Its lock outlives a process that is killed, and if the path of the
journal is relative, all others then wait for it without an end.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from archdsl.errors import ArchdslError, describe
from archdsl.files import refuse_no_file, write_all, writing

CHUNK = 65_536  # bytes read at once in search of the end of the last line


class JournalError(ArchdslError):
    """A journal holds something that no search has written."""

    exit_status = 2


class JournalFile(BaseJournalBackend):
    """Reads and appends whole lines. Several processes may do so at once.

    ``line``: the number of the line that was read last, for errors.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.line = path, 0
        self._starts = {0: 0}  # of lines, in bytes, by how many lines there are before
        refuse_no_file(path, JournalError)
        if not path.exists():
            with writing(path):
                path.touch()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the objects of all lines but the first ones.

        Raises JournalError if a line is no object.
        """
        at = self._starts[log_number_from]
        with self.path.open("rb") as file:
            file.seek(at)
            for before, line in enumerate(file, log_number_from):
                if not line.endswith(b"\n"):  # another process is writing it, or has died
                    return
                at += len(line)
                self._starts[before + 1] = at
                self.line = before + 1
                yield self._object(line)

    def _object(self, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise self.error("must be a JSON object") from None
        if not isinstance(value, dict):
            raise self.error(f"must be a JSON object, got {describe(value)}")
        return value

    def error(self, why: str) -> JournalError:
        """Return the error that the line read last is wrong."""
        return JournalError(f"{self.path}: line {self.line}: {why}")

    def append_logs(self, logs: Iterable[dict[str, Any]]) -> None:
        """Append the objects as lines: all of them, or none.

        Raises WriteError if they cannot be written.
        """
        lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
        with self._locked() as file:
            end = _end_of_lines(file)
            file.truncate(end)
            file.seek(end)
            try:
                write_all(file, "".join(lines).encode())
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def drop_unfinished_line(self) -> None:
        """Cut off what a full disk or a crash has left behind the last whole line.

        Raises WriteError if the file cannot be written.
        """
        with self._locked() as file:
            file.truncate(_end_of_lines(file))

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        with writing(self.path), FileIO(self.path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed, also by the end of the process
            yield file


def _end_of_lines(file: FileIO) -> int:
    """Return the number of bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - CHUNK)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0
