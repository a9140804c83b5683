"""The journal: whole lines alone, whatever a full disk, a crash or another program left behind."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from archdsl.files import WriteError
from archdsl.search.study.journal_file import JournalError, JournalFile
from archdsl.search.study.storage import journal
from tests.test_files import FULL, no_file_above

ENTRY = {"op_code": 0, "worker_id": "one"}
LINE = json.dumps(ENTRY, separators=(",", ":")).encode() + b"\n"


def read(path: Path) -> list[object]:
    return list(JournalFile(path).read_logs(0))


@pytest.mark.parametrize("kept", [1, 7, len(LINE) - 1])
@pytest.mark.parametrize("before", [0, 1, 3_000])  # more than is searched at once
def test_an_unfinished_line_is_dropped_before_the_next_one(
    tmp_path: Path, kept: int, before: int
) -> None:
    file = tmp_path / "journal"
    file.write_bytes(before * LINE + LINE[:kept])
    assert read(file) == before * [ENTRY]
    JournalFile(file).append_logs([ENTRY, ENTRY])
    assert file.read_bytes() == (before + 2) * LINE
    file.write_bytes(before * LINE + LINE[:kept])
    JournalFile(file).drop_unfinished_line()
    assert file.read_bytes() == before * LINE


def test_a_line_without_an_end_is_dropped_however_long_it_is(tmp_path: Path) -> None:
    for before in (b"", LINE):
        (tmp_path / "journal").write_bytes(before + bytes(200_000))
        JournalFile(tmp_path / "journal").drop_unfinished_line()
        assert (tmp_path / "journal").read_bytes() == before


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "journal")
    file.append_logs([ENTRY])
    for size in (len(LINE), len(LINE) + 5, 2 * len(LINE) + 5):
        with (
            no_file_above(size),
            pytest.raises(WriteError, match=rf"^{tmp_path}/journal {FULL}$"),
        ):
            file.append_logs([ENTRY, ENTRY])
        assert file.path.read_bytes() == LINE
    file.append_logs([ENTRY])
    assert read(file.path) == [ENTRY, ENTRY]
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]  # no lock is left


def test_a_lock_that_a_killed_process_has_left_holds_up_nobody(tmp_path: Path) -> None:
    """Optuna's own lock waits for ever if the path was relative: its link then leads nowhere."""
    (tmp_path / "journal.lock").symlink_to("runs/journal")
    JournalFile(tmp_path / "journal").append_logs([ENTRY])
    assert read(tmp_path / "journal") == [ENTRY]


def test_several_may_append_and_read_at_once(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    file.write_bytes(LINE[:9])

    def write(name: str) -> None:
        mine = JournalFile(file)
        for number in range(20):
            mine.append_logs([{"by": name, "n": number, "text": "x" * 100}])
            list(mine.read_logs(0))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for name in "abc":
        assert [entry["n"] for entry in found if entry["by"] == name] == list(range(20))


def test_reading_goes_on_where_it_stopped(tmp_path: Path) -> None:
    reader, writer = (JournalFile(tmp_path / "journal") for _ in range(2))
    writer.append_logs([{"n": 0}, {"n": 1}])
    assert list(reader.read_logs(0)) == [{"n": 0}, {"n": 1}]
    writer.append_logs([{"n": 2}])
    assert list(reader.read_logs(2)) == [{"n": 2}]
    assert list(reader.read_logs(3)) == []


def written(folder: Path) -> BaseStorage:
    storage = journal(folder)
    study = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    storage.create_new_trial(study)
    return storage


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"garbage", "must be a JSON object"),
        (b"\x00\xff", "must be a JSON object"),
        (b"[1]", "must be a JSON object, got a list"),
        (b"{}", "op_code is missing"),
        (b'{"op_code": 99, "worker_id": ""}', "is no entry of a study"),
        (
            b'{"op_code": 6, "worker_id": ""}',
            "trial_id is missing",
        ),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_line_that_no_search_has_written_is_refused_by_its_number(
    tmp_path: Path, line: bytes, complaint: str, last: bool
) -> None:
    written(tmp_path)
    file = tmp_path / "study.journal"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + line + b"\n" + (b"" if last else lines[1]))
    for to_write in (False, True):
        with pytest.raises(JournalError) as error:
            journal(tmp_path, to_write)
        assert str(error.value).startswith(f"{file}: line 2: {complaint}")
        assert "\n" not in str(error.value)
