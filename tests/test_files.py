"""Files appear complete or not at all, also on a full disk, with the modes that the umask gives."""

from __future__ import annotations

import os
import re
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from archdsl.errors import ArchdslError
from archdsl.files import (
    JsonLines,
    WriteError,
    atomic_folder,
    disk_fault,
    exclusive,
    read_json,
    read_lines,
    remove_leftovers,
    remove_temporary_files,
    write_text,
)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Inside, writing more bytes to a file fails as on a full disk, after the first ``size``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = "could not be written: File too large"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("old", [None, "old"])
def test_a_text_is_written_whole_or_the_old_one_stays_alone(
    tmp_path: Path, old: str | None
) -> None:
    file = tmp_path / "text"
    if old is not None:
        file.write_text(old)
    with no_file_above(10), pytest.raises(WriteError, match=f"^{file} {FULL}$"):
        write_text(file, "longer than ten bytes")
    assert names(tmp_path) == ([] if old is None else ["text"])
    assert old is None or file.read_text() == old
    with pytest.raises(WriteError, match=r"nowhere/text could not be written: No such file"):
        write_text(tmp_path / "nowhere" / "text", "")


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, writer: str) -> None:
    def write(folder: Path) -> None:
        if writer == "python":
            (folder / "a").write_bytes(bytes(5000))
        else:
            save_file({"a": torch.zeros(1250)}, folder / "a")

    with (
        no_file_above(1000),
        pytest.raises(WriteError, match=f"{tmp_path}/made {FULL}$"),
        atomic_folder(tmp_path / "made") as folder,
    ):
        write(folder)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_files_of_a_folder_have_the_mode_of_the_umask(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "made") as folder:
            (folder / "text").write_text("")
            save_file({"a": torch.zeros(1)}, folder / "weights")
    finally:
        os.umask(before)
    assert names(tmp_path) == ["made", "text", "weights"]
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "made").iterdir()}
    assert modes == {mode}


def test_a_line_that_a_full_disk_has_cut_is_dropped(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log", 0)
    log.append({"step": 1})
    with no_file_above(15), pytest.raises(WriteError, match=f"^{tmp_path}/log {FULL}$"):
        log.append({"step": 2, "more": "than fits"})
    log.close()
    assert (tmp_path / "log").stat().st_size == 15
    assert read_lines(tmp_path / "log") == [{"step": 1}]
    with no_file_above(5), pytest.raises(WriteError, match=f"^{tmp_path}/log {FULL}$"):
        JsonLines(tmp_path / "log", 9)
    log = JsonLines(tmp_path / "log", 9)
    log.append({"step": 2})
    log.close()
    assert (tmp_path / "log").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert names(tmp_path) == ["log"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{}", "step: must be a whole number, got none"),
        (b'{"step": null}', "step: must be a whole number, got null"),
        (b'{"step": "2"}', "step: must be a whole number, got '2'"),
        (b'{"step": true}', "step: must be a whole number, got true"),
        (b"[2]", "must be an object, got a list"),
        (b"2", "must be an object, got 2"),
        (b'{"step": 2', "must be a JSON object"),
        (b'{"step": 2, "loss": NaN}', "must be a JSON object"),
        (b"\xff\x00", "must be a JSON object"),
        (b"[" * 100_000, "must be a JSON object"),
        (b"", "must be a JSON object"),
    ],
)
def test_a_line_of_another_kind_is_refused_by_its_number(
    tmp_path: Path, line: bytes, complaint: str
) -> None:
    (tmp_path / "log").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(ArchdslError, match=rf"^{tmp_path}/log: line 2: {re.escape(complaint)}$"):
        JsonLines(tmp_path / "log", 9)


def test_only_a_full_disk_is_blamed() -> None:
    for number in (28, 27, 122):
        assert disk_fault(OSError(number, "")) == os.strerror(number)
    assert disk_fault(OSError(2, "")) is None
    assert disk_fault(ValueError("(os error 2)")) is None


ODD: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path: Path, kind: str) -> None:
    """Reading a pipe or a device may have no end; root could replace /dev/null."""
    path = tmp_path / "odd"
    ODD[kind](path)
    before = path.lstat().st_ino
    wanted = rf"^{path} is a (directory|pipe, socket or device), not a file$"
    for use in (
        lambda: write_text(path, "text"),
        lambda: read_json(path, ArchdslError),
        lambda: read_lines(path),
        lambda: JsonLines(path, 0),
    ):
        with pytest.raises(ArchdslError, match=wanted):
            use()
    assert path.lstat().st_ino == before
    assert names(tmp_path) == ["odd"]


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_lock_locks_nobody_out_for_ever(tmp_path: Path, kind: str) -> None:
    ODD[kind](tmp_path / "lock")
    with (
        pytest.raises(WriteError, match=f"^{tmp_path}/lock is a "),
        exclusive(tmp_path, ArchdslError()),
    ):
        pass


@pytest.mark.parametrize("kind", ODD)
def test_leftovers_of_any_kind_are_removed(tmp_path: Path, kind: str) -> None:
    for remove in (remove_leftovers, remove_temporary_files):
        ODD[kind](tmp_path / f".text.{'0' * 32}.tmp")
        remove(tmp_path)
        assert names(tmp_path) == []
