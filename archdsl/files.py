"""Files and folders that appear whole or not at all, also when the machine stops in between."""

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
    """Replaces the file by ``text`` in one step, also where others are about to do the same."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def read_json(path: Path, failure: type[ArchdslError]) -> dict[str, Any]:
    """The object in a file of a stranger; raises ``failure``."""
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
    except (ValueError, RecursionError) as error:
        raise failure(f"{path} cannot be read: {error}") from None
    return value


@contextmanager
def atomic_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A new folder to fill; it takes the name ``path`` once the block ends without an error.

    Not ``durable``: after a power failure what the files hold must be doubted.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left over from a crash
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary) if durable else ():
            _fsync(file)
        _take_name(temporary, path, durable)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _take_name(folder: Path, path: Path, durable: bool) -> None:
    """Renames, after moving a folder of that name out of the way: none can replace a full one."""
    old = _out_of_the_way(path) if path.exists() else None
    folder.rename(path)
    if durable:
        _fsync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Nobody will ever see half of it under its name."""
    shutil.rmtree(_out_of_the_way(path))


def _out_of_the_way(path: Path) -> Path:
    old = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    return path.rename(old)


def remove_leftovers(parent: Path) -> None:
    """Removes what crashes left of files and folders that were being written in ``parent``."""
    for path in parent.glob(".*.tmp"):
        path.unlink() if path.is_file() else shutil.rmtree(path)


def _fsync(path: Path) -> None:
    """A rename can reach the disk before what was written: then a crash leaves an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonLines:
    """A log of one JSON object per line, each with a ``step`` that rises from line to line."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Opens the log, without the lines of steps later than ``after_step``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(path) if line["step"] <= after_step]
        write_text(path, "".join(_dump(line) for line in kept))
        self.file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        self.file.write(_dump(record))
        self.file.flush()  # a killed process loses no line

    def fsync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _dump(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log up to the first line that a crash cut short; none without the file."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
