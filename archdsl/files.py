"""Atomic writes: a file or folder appears complete or not at all, also after a crash."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from archdsl.errors import ArchdslError, describe

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of a disk that takes no more
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # the names of `atomic_file`
MAX_JSON = 2**26  # bytes
MISSING = "no such file"


class WriteError(ArchdslError):
    """A file or folder could not be written, for example because the disk is full."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an OSError means that ``path`` could not be written, and becomes a WriteError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(f"{path} could not be written: {reason}") from error


def disk_fault(error: BaseException) -> str | None:
    """Returns why the disk took no more, as ``No space left on device``.

    Returns None if that is not what led to the error.
    """
    cause: BaseException | None = error
    while cause is not None:
        told = re.search(r"\(os error (\d+)\)", str(cause))  # as safetensors says it
        number = cause.errno if isinstance(cause, OSError) else told and int(told[1])
        if number in FULL:
            return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None


def why_unreadable(path: Path) -> str | None:
    """Returns why ``path`` is not a readable file, such as MISSING; None if it is one.

    This does not open the file, because opening a pipe would block, and a device may be endless.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return f"is not a valid file name: {error}"
    if stat.S_ISREG(mode):
        return None
    return f"is {'a directory' if stat.S_ISDIR(mode) else 'a pipe, socket or device'}, not a file"


def refuse_no_file(path: Path, failure: Callable[[str], Exception] = WriteError) -> None:
    """Raises ``failure`` if something other than a file has this name. It may not exist."""
    if path.exists() and (why := why_unreadable(path)):
        raise failure(f"{path} {why}")


def read_bytes(path: Path, failure: Callable[[str], Exception], most: int = MAX_JSON) -> bytes:
    """Reads a file that may come from an untrusted source.

    Raises ``failure`` if it does not exist, cannot be read, or is larger than ``most`` bytes.
    """
    if why := why_unreadable(path):
        missing = f"{path.parent} has no {path.name}"
        raise failure(missing if why == MISSING else f"{path} {why}")
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise failure(f"{path} cannot be read: longer than {most:,} bytes")
    return content


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file, which is renamed to ``path`` if there is no error.

    Several processes may do so at once. Raises WriteError, after removing the temporary file, if
    it cannot be written, or ``path`` is a folder, a pipe or a device.
    """
    refuse_no_file(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to the file in one atomic step. Several processes may do so at once.

    Raises WriteError if that cannot be done.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    text = read_bytes(path, failure)
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"an object was expected, got a {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise failure(f"{path} cannot be read: {error}") from None
    return value


@contextmanager
def atomic_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to ``path`` if the block ends without an error.

    A folder that already has the name ``path`` is replaced. With ``durable=False`` nothing is
    flushed to disk (no fsync): after a power failure the files may hold wrong content. Raises
    WriteError if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left over from a crash
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _give_usual_modes(temporary)
        for file in (*temporary.iterdir(), temporary) if durable else ():
            _fsync(file)
        _rename(temporary, path, durable)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if reason := disk_fault(error):
            raise WriteError(f"{path} could not be written: {reason}") from error
        raise


def _give_usual_modes(folder: Path) -> None:
    """Lets those read the files whom the umask lets: safetensors creates files for the owner."""
    fresh = folder / f".{uuid.uuid4().hex}.tmp"
    fresh.touch()
    usual = stat.S_IMODE(fresh.stat().st_mode)
    fresh.unlink()
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(stat.S_IMODE(file.stat().st_mode) | usual)


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
    _remove(_move_aside(path))


def _remove(path: Path) -> None:
    """Removes a folder with everything in it, or whatever else has the name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move_aside(path: Path) -> Path:
    old = path.with_name(f".{path.name}.old.tmp")
    _remove(old)
    return path.rename(old)


def remove_leftovers(parent: Path) -> None:
    """Removes the temporary files and folders that crashed writes have left in ``parent``."""
    for path in parent.glob(".*.tmp"):
        _remove(path)


def remove_temporary_files(parent: Path) -> None:
    """Removes the temporary files that crashed calls of `atomic_file` have left in ``parent``."""
    for path in parent.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            _remove(path)


@contextmanager
def exclusive(folder: Path, refusal: ArchdslError) -> Iterator[None]:
    """Locks the folder against other processes inside the block, or until this process ends.

    Raises ``refusal`` if another process has locked it, and WriteError if it cannot be locked.
    """
    path = folder / "lock"
    refuse_no_file(path)
    with writing(path):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        yield


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
        """Opens the log and removes the lines of steps later than ``after_step``.

        Raises ArchdslError if it holds something else, WriteError if it cannot be written.
        """
        make_folder(path.parent)
        kept = [line for line, found in _whole_lines(path) if found["step"] <= after_step]
        write_text(path, "".join(f"{line.decode()}\n" for line in kept))
        self.path = path
        with writing(path):
            self.file = path.open("ab", buffering=0)  # a line that fails is not tried again

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line, which is not lost if the process is killed.

        Raises ValueError if a number in ``record`` is not finite, WriteError if the disk is full.
        """
        with writing(self.path):
            write_all(self.file, _dump(record).encode())

    def fsync(self) -> None:
        """Flushes all lines to disk, so that they survive a power failure."""
        with writing(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def write_all(file: io.RawIOBase, content: bytes) -> None:
    """Writes all of ``content`` to a file without a buffer, which may take less at once."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) or 0 :]


def _dump(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a log, without a last line that a crash has left incomplete.

    Returns an empty list if the file does not exist. Raises ArchdslError, which names the line, if
    another line is no object with a whole number ``step``.
    """
    return [found for _, found in _whole_lines(path)]


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    refuse_no_file(path, ArchdslError)
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    found = [(line, _object(path, number, line)) for number, line in enumerate(lines[:-1], 1)]
    with suppress(ArchdslError):  # a crash has cut it short
        found += [(line, _object(path, len(lines), line)) for line in lines[-1:] if line]
    return found


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ArchdslError(f"{path}: line {number}: must be a JSON object") from None
    if not isinstance(value, dict):
        raise ArchdslError(f"{path}: line {number}: must be an object, got {describe(value)}")
    step = value.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        found = describe(step) if "step" in value else "none"
        raise ArchdslError(f"{path}: line {number}: step: must be a whole number, got {found}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
