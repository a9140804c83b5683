"""Atomic writes: a file or folder appears complete or not at all, also after a crash."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from archdsl.errors import ArchdslError

MAX_JSON = 2**26  # bytes


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to the file in one atomic step. Several processes may do so at once."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def make_folder(path: Path) -> None:
    """Creates the folder and those above it. Raises ArchdslError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ArchdslError(f"{path} cannot be used as a folder: {reason}") from None


def read_json(path: Path, failure: type[ArchdslError]) -> dict[str, Any]:
    """Reads the JSON object in a file that may come from an untrusted source.

    Raises ``failure`` if the file does not exist, is larger than MAX_JSON bytes, or holds anything
    other than one JSON object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f"longer than {MAX_JSON:,} bytes")
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"an object was expected, got a {type(value).__name__}")
    except FileNotFoundError:
        raise failure(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise failure(f"{path} cannot be read: {error}") from None
    return value


@contextmanager
def atomic_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to ``path`` if the block ends without an error.

    A folder that already has the name ``path`` is replaced. With ``durable=False`` nothing is
    flushed to disk (no fsync): after a power failure the files may hold wrong content.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left over from a crash
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary) if durable else ():
            _fsync(file)
        _rename(temporary, path, durable)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _rename(folder: Path, path: Path, durable: bool) -> None:
    """Renames ``folder`` to ``path``. The system cannot replace a folder that holds files, so an
    existing one is moved aside first."""
    old = _move_aside(path) if path.exists() else None
    folder.rename(path)
    if durable:
        _fsync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder. It is renamed first, so that a crash never leaves half of it at ``path``.

    Raises OSError if the folder does not exist or cannot be removed.
    """
    shutil.rmtree(_move_aside(path))


def _move_aside(path: Path) -> Path:
    old = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    return path.rename(old)


def remove_leftovers(parent: Path) -> None:
    """Removes the temporary files and folders that crashed writes have left in ``parent``."""
    for path in parent.glob(".*.tmp"):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def _fsync(path: Path) -> None:
    """Flushes a file or folder to disk. Otherwise a rename may reach the disk before the content,
    and a crash in between leaves an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonLines:
    """A log file with one JSON object per line; the value of ``step`` rises from line to line."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Opens the log and removes the lines of steps later than ``after_step``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] <= after_step]
        write_text(path, "".join(_dump(line) for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line. Raises ValueError if a number in ``record`` is not finite."""
        self.file.write(_dump(record))
        self.file.flush()  # so that no line is lost if the process is killed

    def fsync(self) -> None:
        """Flushes all lines to disk, so that they survive a power failure."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def _dump(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a log, up to the first line that a crash has left incomplete.

    Returns an empty list if the file does not exist.
    """
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
