"""A worker that is a group of processes: all do the same work, and fail or end together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from archdsl.search.workers.pool import JobFailed, process_pool
from tests.search.works import Aborts, InGroup, Leaves, Raises, Sleeps, is_alive


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in sorted(folder.iterdir()) if file.name.isdigit()]


def all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_a_group_works_together_and_fails_as_the_rank_that_failed_first(tmp_path: Path) -> None:
    works: list[Any] = [Raises(KeyError("x")), Raises(MemoryError("full")), Aborts(), Leaves(3)]
    found = []
    with process_pool(1, devices=3) as pool:
        assert pool.submit(InGroup(tmp_path)).result() == 111
        first = pids(tmp_path)
        assert pool.submit(InGroup(tmp_path)).result() == 111
        assert pids(tmp_path) == first
        for rank, work in zip((0, 1, 1, 2), works, strict=True):
            error = pool.submit(InGroup(tmp_path, rank, work)).exception()
            assert isinstance(error, JobFailed)
            found.append(str(error))
            assert all_end(pids(tmp_path))
    assert len(set(first)) == 3
    assert found == [
        "error: KeyError: 'x'",
        "out of memory: MemoryError: full",
        "crash: the process ended by signal 6: Aborted",
        "crash: the process ended with exit status 3 and no result",
    ]


def test_a_rank_that_hangs_ends_the_group(tmp_path: Path) -> None:
    with process_pool(1, patience=1.5, devices=2) as pool:
        hangs = Sleeps(tmp_path / "note", 60)
        error = pool.submit(InGroup(tmp_path, 1, hangs)).exception()
    assert isinstance(error, JobFailed)
    assert error.reason == "hang"
    assert all_end(pids(tmp_path))
