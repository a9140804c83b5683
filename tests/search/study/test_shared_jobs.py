"""Jobs that processes share by a database: each is done once, and what is damaged is refused."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import create_trial

from archdsl.search.analysis.comparison import Key, run_comparison
from archdsl.search.studies import studies
from archdsl.search.study.shared_jobs import SharedJobs, shared_jobs
from archdsl.search.study.storage import StorageError, database
from archdsl.search.trials.proxy import Job, ProxyScore
from archdsl.search.workers.pool import JobFailed
from tests.search.analysis.test_compare import setup
from tests.search.analysis.test_comparison import Scripted, quiet, times

NAME = "compare-1a2b3c4d"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'db'}"


def jobs_of(machine: Path) -> dict[Key, Job]:
    return setup("transformer", "loop").jobs(4, machine)


def score(job: Job, loss: float = 1.0) -> ProxyScore:
    return ProxyScore(
        steps=job.steps, loss=loss, accuracy=None, bits_per_byte=None, seconds=time.monotonic()
    )


@contextmanager
def opened(url: str, jobs: dict[Key, Job], heartbeat: int = 30) -> Any:
    with shared_jobs(url, NAME, jobs, heartbeat) as shared:
        assert shared is not None
        yield shared
    backend = shared.heartbeat.storage
    assert backend is not None
    backend.remove_session()
    backend.engine.dispose()


def test_two_machines_do_each_job_once_and_end_with_the_same_scores(
    tmp_path: Path, postgresql: str
) -> None:
    """SQLite locks no rows: there, two that claim the same job at once may both do it."""

    def trained(job: Job) -> ProxyScore:
        time.sleep(0.1)
        return score(job)

    def machine(name: str) -> tuple[list[Job], dict[Key, Any]]:
        jobs, pool = jobs_of(tmp_path / name), Scripted(trained)
        with opened(postgresql, jobs) as shared:
            return pool.jobs, run_comparison(pool, jobs, lambda: True, quiet, shared)

    with opened(postgresql, jobs_of(tmp_path)), ThreadPoolExecutor() as threads:
        (mine, results), (yours, same) = threads.map(machine, "ab")
    done = [(job.spec.name, job.seed) for job in mine + yours]
    assert len(done) == len(set(done)) == len(results) == 8
    assert mine
    assert yours
    assert results == same


def test_the_jobs_of_a_machine_that_died_are_done_by_another(tmp_path: Path, url: str) -> None:
    jobs = jobs_of(tmp_path)
    with opened(url, jobs, heartbeat=1) as living, opened(url, jobs, heartbeat=1) as dead:
        lost = dead.claim(jobs)
        dead.heartbeat.stop.set()
        pool, said = Scripted(score), list[str]()
        results = run_comparison(pool, jobs, lambda: True, said.append, living)
        assert pool.jobs[-1] == jobs[lost]
        assert any("; other processes do the rest" in sentence for sentence in said)
        dead.finish(lost, score(jobs[lost], 9.0))  # it was only slow
        assert living.scores() == results


def test_jobs_of_a_machine_at_work_are_waited_for_when_time_is_over(
    tmp_path: Path, url: str
) -> None:
    jobs = dict(list(jobs_of(tmp_path).items())[:3])
    with opened(url, jobs) as mine, opened(url, jobs) as theirs, ThreadPoolExecutor() as threads:
        busy = theirs.claim(jobs)
        pool = Scripted(score)
        found = threads.submit(run_comparison, pool, jobs, lambda: False, quiet, mine)
        time.sleep(0.2)
        assert not found.done()
        assert theirs.claim(jobs) not in (busy, None)  # begun later: nobody waits for it
        theirs.finish(busy, score(jobs[busy], 9.0))
        assert found.result(timeout=30) == theirs.scores()
        assert not pool.jobs


def test_a_job_that_failed_may_be_done_by_another_machine(tmp_path: Path, url: str) -> None:
    def failed(job: Job) -> ProxyScore:
        raise JobFailed("out of memory", "killed twice")

    jobs = dict(list(jobs_of(tmp_path).items())[:1])
    with opened(url, jobs) as small, opened(url, jobs) as large:
        (failure,) = run_comparison(Scripted(failed), jobs, lambda: True, quiet, small).values()
        assert isinstance(failure, JobFailed)
        again = run_comparison(Scripted(score), jobs, times(9), quiet, large)
        assert run_comparison(Scripted(failed), jobs, lambda: True, quiet, small) == again
    assert not list(studies(storage=url))  # `archdsl study ls` lists searches alone


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"score": {"steps": 12, "loss": "low"}}, "score.loss: must be a number, got 'low'"),
    ({"score": None}, "score: is required for an attempt that is complete"),
    ({"steps": 7}, "score.steps: must be 7, as of the job"),
    ({"job": 3}, "job: must be text, got 3"),
]


def test_what_is_no_score_is_one_clear_error(tmp_path: Path, url: str) -> None:
    jobs = jobs_of(tmp_path)
    job = next(iter(jobs.values()))
    good = {"job": "0" * 32, "steps": job.steps, "score": score(job).model_dump(mode="json")}
    storage = database(url)
    for number, (changed, said) in enumerate(DAMAGED):
        shared = SharedJobs(storage, f"compare-{number}", jobs)
        shared.heartbeat.stop.set()
        damaged = create_trial(value=1.0, user_attrs=good | changed)
        storage.create_new_trial(shared.id, template_trial=damaged)
        with pytest.raises(StorageError) as error:
            shared.scores()
        assert str(error.value) == f"the database: compare-{number}: attempt 0: {said}"
