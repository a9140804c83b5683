"""Real child processes that fail in every way: each failure is told apart, and its own alone."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from archdsl.search.workers import pool as pool_of
from archdsl.search.workers.pool import InProcess, JobFailed, Work, process_pool
from tests.search.works import (
    Aborts,
    Allocates,
    Keeps,
    Killed,
    Leaves,
    Peaks,
    Raises,
    Sleeps,
    is_alive,
)

MIB = 2**20


def failure(work: Work[Any], **settings: Any) -> JobFailed:
    with process_pool(1, **settings) as pool:
        error = pool.submit(work).exception()
    assert isinstance(error, JobFailed)
    return error


def test_failures_are_told_apart_and_leave_the_pool_working() -> None:
    with process_pool(2) as pool:
        works = (Raises(KeyError("x")), Aborts(), Leaves(3), Raises(SystemExit(4)))
        errors = [future.exception() for future in [pool.submit(work) for work in works]]
        assert pool.submit(Killed(1, fits=1)).result() == 1
    assert [str(error) for error in errors] == [
        "error: KeyError: 'x'",
        f"crash: the process ended by signal {int(signal.SIGABRT)}: Aborted",
        "crash: the process ended with exit status 3 and no result",
        "error: SystemExit: 4",
    ]
    assert isinstance(errors[0], JobFailed)
    assert "raise self.error" in errors[0].details


def test_one_that_is_out_of_memory_is_tried_once_more_with_less() -> None:
    with process_pool(1) as pool:
        assert pool.submit(Killed(8, fits=4)).result() == 4
        error = pool.submit(Killed(8, fits=2)).exception()
    assert isinstance(error, JobFailed)
    assert error.reason == "out of memory"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process allocates")
@pytest.mark.parametrize("with_torch", [False, True])
def test_the_limit_of_memory_holds(with_torch: bool) -> None:
    with process_pool(1, memory=256 * MIB) as pool:
        assert pool.submit(Allocates(128 * MIB, with_torch)).result() == 128 * MIB
        error = pool.submit(Allocates(512 * MIB, with_torch)).exception()
    assert isinstance(error, JobFailed)
    assert error.reason == "out of memory"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process allocates")
def test_what_one_piece_kept_is_not_missing_to_the_next() -> None:
    with process_pool(1, memory=256 * MIB) as pool:
        errors = [pool.submit(Keeps(n * MIB)).exception() for n in (128, 192, 192, 300)]
    assert errors[:3] == [None, None, None]
    assert "out of memory" in str(errors[3])


def test_one_that_is_silent_hangs_and_one_that_beats_does_not(tmp_path: Path) -> None:
    with process_pool(2, patience=1.5) as pool:
        hangs = pool.submit(Sleeps(tmp_path / "silent", 60, heartbeats=False))
        works = pool.submit(Sleeps(tmp_path / "beating", 2.5))
        error = hangs.exception()
        works.result()
    assert isinstance(error, JobFailed)
    assert error.reason == "hang"
    assert not is_alive(int((tmp_path / "silent").read_text().split()[0]))


def test_a_child_goes_on_until_it_fails_or_has_done_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_of, "WORK_PER_WORKER", 3)
    works: list[Work[Any]] = [Sleeps(tmp_path / str(i), 0.0) for i in range(6)]
    works.insert(1, Raises(KeyError("x")))
    with process_pool(1) as pool:
        futures = [pool.submit(work) for work in works]
    children = [future.result() for future in futures if not future.exception()]
    one, two, three = dict.fromkeys(children)
    assert children == [one, two, two, two, three, three]


def test_one_that_dies_while_it_waits_takes_no_work_with_it(tmp_path: Path) -> None:
    with process_pool(1) as pool:
        child = pool.submit(Sleeps(tmp_path / "first", 0.0)).result()
        os.kill(child, signal.SIGKILL)
        while is_alive(child):
            time.sleep(0.01)
        assert pool.submit(Sleeps(tmp_path / "second", 0.0)).result() != child


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets how much was held")
def test_the_peak_of_memory_is_that_of_each_piece_alone() -> None:
    with process_pool(1) as pool:
        large, small = (pool.submit(Peaks(size * MIB)).result() for size in (512, 1))
    assert large - small > 400 * MIB


def test_no_more_than_the_workers_at_once_first_come_first_served(tmp_path: Path) -> None:
    with process_pool(2) as pool:
        jobs = [pool.submit(Sleeps(tmp_path / str(i), 0.15)) for i in range(6)]
    assert len({job.result() for job in jobs}) == 2
    begun = [float((tmp_path / str(i)).read_text().split()[2]) for i in range(6)]
    order = sorted(range(6), key=begun.__getitem__)
    assert all(abs(place - i) <= 1 for place, i in enumerate(order))  # two begin together
    begun.sort()
    assert all(later - earlier > 0.15 for earlier, later in zip(begun, begun[2:], strict=False))


def test_leaving_by_an_exception_ends_the_children_at_once(tmp_path: Path) -> None:
    futures: list[Future[int]] = []

    def give_up() -> None:
        with process_pool(1) as pool:
            futures.extend(pool.submit(Sleeps(tmp_path / n, 60)) for n in ("first", "second"))
            written(tmp_path / "first")
            raise RuntimeError("enough")

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="enough"):
        give_up()
    assert time.monotonic() - started < 20
    child = int(written(tmp_path / "first").split()[0])
    assert isinstance(futures[0].exception(), CancelledError)
    assert futures[1].cancelled()
    assert not is_alive(child)
    assert not (tmp_path / "second").exists()


def test_work_that_cannot_be_sent_is_a_failure_of_its_own() -> None:
    error = failure(Raises(KeyError(lambda: None)))
    assert error.reason == "error"
    assert "pickle" in str(error)


def test_in_this_process_failures_are_the_same() -> None:
    pool = InProcess()
    assert str(pool.submit(Raises(KeyError("x"))).exception()) == "error: KeyError: 'x'"
    error = pool.submit(Raises(MemoryError("full"))).exception()
    assert str(error) == "out of memory: MemoryError: full"


COORDINATOR = """
import signal
import sys
from pathlib import Path
from archdsl.search.workers.pool import process_pool
from tests.search.works import Sleeps
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
    with process_pool(2) as pool:
        for name in ("first", "second"):
            pool.submit(Sleeps(Path(sys.argv[1]) / name, 600))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_nobody_outlives_the_coordinator(tmp_path: Path, sent: signal.Signals) -> None:
    script = tmp_path / "coordinator.py"
    script.write_text(COORDINATOR)
    coordinator = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    pids = {
        int(pid)
        for name in ("first", "second")
        for pid in written(tmp_path / name).split()[:2]  # a child and its server
    }
    if sent == signal.SIGINT:
        os.killpg(coordinator.pid, sent)  # as a terminal does
    else:
        coordinator.kill()
    assert coordinator.wait(30) == -sent
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in pids if is_alive(pid)] == []


def written(file: Path) -> str:
    """What the file says, once it does."""
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_text().count(" ") < 2:
        assert time.monotonic() < deadline, f"{file} was never written"
        time.sleep(0.02)
    return file.read_text()
