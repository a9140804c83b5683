"""Jobs that many machines share by a database: each is trained once, and all use its score.

The trainings of a comparison with ``--storage`` are a study of their own in the database. Each
trial of Optuna's in it is an attempt at a job. An attempt that failed, or whose machine stopped
sending heartbeats, counts no more; of the others, the one that was added first counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Generic, TypeVar

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import Field

from archdsl.errors import blamed_on
from archdsl.search.study.storage import (
    HEARTBEAT_SECONDS,
    HeartbeatThread,
    StorageError,
    create_study,
    database,
    database_errors,
)
from archdsl.search.study.stored import Stored, checked
from archdsl.search.trials.proxy import Job, ProxyScore

K = TypeVar("K")


class StoredAttempt(Stored):
    """The attributes of an attempt at a job. ``job``: the name of its folder in a result store."""

    job: str
    steps: int = Field(ge=1)
    score: ProxyScore | None = None


class SharedJobs(Generic[K]):
    """One process's view of the jobs of a study, on which other processes work as well.

    ``jobs``: by any key. Keys whose jobs are equal share the attempts.
    """

    def __init__(self, storage: BaseStorage, name: str, jobs: Mapping[K, Job]) -> None:
        with suppress(DuplicatedStudyError):  # this or another process created it before
            create_study(storage, name, objectives=1)
        self.storage, self.name = storage, name
        self.id = storage.get_study_id_from_name(name)
        self.optuna = optuna.load_study(study_name=name, storage=storage)
        self.jobs = {key: (job.stored_run.folder.name, job.steps) for key, job in jobs.items()}
        self.heartbeat = HeartbeatThread(storage)
        self.claimed: dict[K, int] = {}  # the attempts that this process trains

    def scores(self) -> dict[K, ProxyScore]:
        """Return the scores in the database. Raises StorageError if it holds something else."""
        attempts = self._attempts()
        found = {key: self._score(attempts.get(job)) for key, job in self.jobs.items()}
        return {key: score for key, score in found.items() if score is not None}

    def add(self, scores: Mapping[K, ProxyScore]) -> None:
        """Put scores that were made without the database into it, unless it has others."""
        known = self.scores()
        for key, score in scores.items():
            if key not in known and self.claim([key]) is not None:
                self.finish(key, score)

    def claim(self, keys: Iterable[K]) -> K | None:
        """Claim the first job that has no score and is not claimed; None if there is none."""
        self.heartbeat.fail_stale(self.optuna)
        attempts = self._attempts()
        return next((key for key in keys if self._begin(key, attempts.get(self.jobs[key]))), None)

    def at_work(self, keys: Iterable[K]) -> list[K]:
        """Return which of the jobs another process, which is alive, is doing."""
        self.heartbeat.fail_stale(self.optuna)
        attempts = self._attempts()
        found = {key: attempts.get(self.jobs[key]) for key in keys if key not in self.claimed}
        return [key for key, one in found.items() if one and one.state == TrialState.RUNNING]

    def _begin(self, key: K, attempt: FrozenTrial | None) -> bool:
        """Take the attempt, or a new one; return False if another process has it."""
        if attempt is None:
            self._enqueue(key)
            attempt = self._attempts().get(self.jobs[key])  # another process may have been faster
        if attempt is None or attempt.state != TrialState.WAITING:
            return False
        self.heartbeat.record(attempt._trial_id)
        try:
            if not self.storage.set_trial_state_values(attempt._trial_id, TrialState.RUNNING):
                return False
        except UpdateFinishedTrialError:
            return False
        self.heartbeat.attempts.add(attempt._trial_id)
        self.claimed[key] = attempt._trial_id
        return True

    def _enqueue(self, key: K) -> None:
        """Add a waiting attempt in one write, so that no process can die in between."""
        job, steps = self.jobs[key]
        waiting = create_trial(state=TrialState.WAITING, user_attrs={"job": job, "steps": steps})
        self.storage.create_new_trial(self.id, template_trial=waiting)

    def finish(self, key: K, score: ProxyScore) -> None:
        """Record the score of a job that this process has claimed."""
        attempt = self.claimed.pop(key)
        value = math.inf if score.loss is None else score.loss  # for people who look at the storage
        # if the attempt was failed as stale, another process does the job again
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(attempt, "score", score.model_dump(mode="json"))
            self.storage.set_trial_state_values(attempt, TrialState.COMPLETE, (value,))
        self.heartbeat.attempts.discard(attempt)

    def release(self, key: K) -> None:
        """Give a claimed job up; another process may claim it."""
        attempt = self.claimed.pop(key)
        self.heartbeat.attempts.discard(attempt)
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(attempt, TrialState.FAIL)

    def close(self) -> None:
        """Give all claimed jobs up and send no more heartbeats."""
        self.heartbeat.stop.set()
        for key in list(self.claimed):
            self.release(key)

    def _attempts(self) -> dict[tuple[str, int], FrozenTrial]:
        """Return the attempt that counts, for each job that has one."""
        found: dict[tuple[str, int], FrozenTrial] = {}
        for attempt in self.storage.get_all_trials(self.id, deepcopy=False):
            if attempt.state != TrialState.FAIL:
                stored = self._checked(attempt)
                found.setdefault((stored.job, stored.steps), attempt)
        return found

    def _score(self, attempt: FrozenTrial | None) -> ProxyScore | None:
        if attempt is None or attempt.state != TrialState.COMPLETE:
            return None
        return self._checked(attempt).score

    def _checked(self, attempt: FrozenTrial) -> StoredAttempt:
        where = f"the database: {self.name}: attempt {attempt.number}"
        found = checked(StoredAttempt, attempt.user_attrs, where)
        if attempt.state == TrialState.COMPLETE:
            if found.score is None:
                raise StorageError(f"{where}: score: is required for an attempt that is complete")
            if found.score.steps != found.steps:
                raise StorageError(f"{where}: score.steps: must be {found.steps}, as of the job")
        return found


@contextmanager
def shared_jobs(
    url: str | None, name: str, jobs: Mapping[K, Job], heartbeat: int = HEARTBEAT_SECONDS
) -> Iterator[SharedJobs[K] | None]:
    """The jobs in a study of a database, to which they are given back at the end of the block.

    ``url``: of the database; None: there is none, and the block gets None. ``heartbeat``: seconds
    between two heartbeats. Raises StorageError if the database cannot be opened, or stops answering
    inside the block.
    """
    if url is None:
        yield None
        return
    with blamed_on("storage"):
        storage = database(url, heartbeat)
    with database_errors(url), closing(SharedJobs(storage, name, jobs)) as shared:
        yield shared
