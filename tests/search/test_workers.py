"""Workers that share a database, and are killed: nothing is lost, doubled or changed by it."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from archdsl.lang.load import budget_of, read
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.storage import database, journal
from archdsl.search.study.study import Study

SPACE = """
name: small
vocab_size: 300
context: 64
dim: {fit: {multiple_of: 16, default: 32}}
budget: {params: 60K}
blocks:
  - &layer {kind: layer, attention: {head_size: 16}, ffn: {ratio: 2}}
  - search:
      default: itt
      choices:
        plain: *layer
        itt:
          kind: loop
          steps: {search: {low: 2, high: 4, default: 2}}
          router: {kind: prefix, capacity: {search: {low: 0.3, high: 0.9, step: 0.1, default: 0.5}}}
          residual: {kind: {search: {choices: [overwrite, thinking], default: thinking}}}
          body: *layer
"""
Connection = psycopg.Connection[tuple[Any, ...]]
TRIALS, WORKERS, KILLS = 4, 2, 2
LONGEST = 600.0  # seconds, on a machine that does much else


def command(space: Path, out: Path, *more: str) -> list[str]:
    proxy = "--proxy dim=16,head_size=8,steps=8 --data skill:p-hop,hops=1,length=12 --seeds 2"
    limits = f"--trials {TRIALS} --time 1h --workers 1"
    words = [str(space), *proxy.split(), *limits.split(), "--out", str(out), *more]
    return [sys.executable, "-m", "archdsl", "search", *words]


def disturb(words: list[str], url: str, log: Path) -> None:
    """Several workers; again and again one of them is killed and started anew, to the end."""
    rng = random.Random(0)
    # draws told; when all were, the winner meets its controls
    moments = [*sorted(rng.choices(range(TRIALS), k=KILLS - 1)), TRIALS]
    with log.open("wb") as output, ExitStack() as stack:
        # One connection for all questions: each new one would start a process of the server.
        connection = stack.enter_context(
            psycopg.connect(url.replace("+psycopg", ""), autocommit=True)
        )

        def start() -> subprocess.Popen[bytes]:
            worker = stack.enter_context(subprocess.Popen(words, stdout=output, stderr=output))
            stack.callback(worker.kill)
            return worker

        workers = [start() for _ in range(WORKERS)]
        for moment in moments:
            wait_until_finished(connection, moment, log)
            time.sleep(rng.random())
            victim = rng.randrange(WORKERS)
            assert workers[victim].poll() is None, log.read_text()
            workers[victim].kill()  # the coordinator alone: its children have to notice
            workers[victim] = start()
        assert [worker.wait(LONGEST) for worker in workers] == [0] * WORKERS, log.read_text()


def finished_trials(connection: Connection) -> int:
    """Return the number of finished trials in the database; 0 while it has no tables."""
    if connection.execute("SELECT to_regclass('trials')").fetchone() == (None,):
        return 0
    query = "SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')"
    found = connection.execute(query).fetchone()
    assert found is not None
    return int(found[0])


def wait_until_finished(connection: Connection, count: int, log: Path) -> None:
    deadline = time.monotonic() + LONGEST
    while finished_trials(connection) < count:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@contextmanager
def closing_database(url: str) -> Iterator[BaseStorage]:
    storage = database(url, heartbeat=1)
    yield storage
    storage.remove_session()
    storage._backend.engine.dispose()  # type: ignore[attr-defined]


def trials(storage: BaseStorage) -> list[FrozenTrial]:
    (study, *_) = sorted(optuna.get_all_study_names(storage))  # the other one is of what follows
    return optuna.load_study(study_name=study, storage=storage).trials


def by_trial(found: list[FrozenTrial]) -> dict[int, tuple[Any, ...]]:
    """What became of each draw. Fails where one has no end, or two."""
    ends: dict[int, tuple[Any, ...]] = {}
    for trial in found:
        attrs = trial.user_attrs
        assert trial.state.is_finished(), trial
        if trial.state == TrialState.FAIL and attrs.get("outcome") != "failed":
            continue  # an attempt that was lost
        assert attrs["draw"] not in ends
        ends[attrs["draw"]] = (attrs["outcome"], trial.values, trial.params, attrs.get("losses"))
    assert sorted(ends) == list(range(len(ends)))
    assert {trial.user_attrs["draw"] for trial in found} == set(ends)
    return ends


@pytest.fixture
def space(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SPACE)
    return file


def undisturbed(words: list[str], out: Path) -> dict[int, tuple[Any, ...]]:
    """By one worker, which keeps its record in a file."""
    done = subprocess.run(words, capture_output=True, timeout=LONGEST)
    assert done.returncode == 0, done.stderr.decode()
    return by_trial(trials(journal(out)))


def test_who_falls_silent_loses_its_draw_to_another(postgresql: str, space: Path) -> None:
    tree = read(space)
    sampler = TrialSampler(tree, budget_of(tree), axes=1, seed=0)
    with closing_database(postgresql) as mine, closing_database(postgresql) as theirs:
        silent = Study(mine, "study", sampler, ("loss",), window=4)
        living = Study(theirs, "study", sampler, ("loss",), window=4)
        taken = silent.take(lambda number: number < 1)
        assert taken is not None
        assert living.take(lambda number: number < 1) is None  # it has been heard of
        silent.heartbeat.stop.set()
        deadline = time.monotonic() + LONGEST
        while (again := living.take(lambda number: number < 1)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (again.number, again.fingerprint) == (taken.number, taken.fingerprint)
        silent.finish(taken, "complete", (9.0,))  # it was only slow, and is too late
        living.finish(again, "complete", (1.0,))
        living.heartbeat.stop.set()
        assert [trial.values for trial in silent.finished()] == [{"loss": 1.0}]
        ends = by_trial(trials(mine))
    assert [outcome for outcome, *_ in ends.values()] == ["complete"]


@pytest.mark.slow
def test_workers_that_are_killed_change_nothing(
    postgresql: str, space: Path, tmp_path: Path
) -> None:
    expected = undisturbed(command(space, tmp_path / "alone"), tmp_path / "alone")
    out = tmp_path / "shared"
    words = command(space, out, "--storage", postgresql, "--heartbeat", "2")
    disturb(words, postgresql, tmp_path / "log")
    with closing_database(postgresql) as storage:
        assert by_trial(trials(storage)) == expected
    assert (out / "winner.yaml").read_text() == (tmp_path / "alone" / "winner.yaml").read_text()
