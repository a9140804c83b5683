"""Work on a study: take trials and record their results, beside other processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from archdsl.search.study.record import (
    SETTINGS,
    WINNER,
    StudyRecord,
    counting_attempts,
    is_interrupted,
    trial_of,
)
from archdsl.search.study.sampler import TrialSampler
from archdsl.search.study.storage import HeartbeatThread, create_study, no_experimental_warnings
from archdsl.search.study.trial import UNTRAINED, RunningTrial, Scores, Trial


class Study(StudyRecord):
    """One process's view of a study, on which other processes may work as well.

    ``window``: how many trials may be unfinished at once. The proposal of a trial depends on all
    trials that are at least ``window`` older, and on no newer ones; so it does not depend on which
    worker was faster.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        sampler: TrialSampler,
        axes: tuple[str, ...],
        window: int,
    ) -> None:
        with suppress(DuplicatedStudyError):  # this or another worker created it before
            create_study(storage, name, len(axes))
        super().__init__(storage, name, axes)
        self.sampler, self.window = sampler, window
        self.optuna = optuna.load_study(study_name=name, storage=storage)
        self.heartbeat = HeartbeatThread(storage)

    @property
    def in_database(self) -> bool:
        """Whether other processes may work on the study."""
        return self.heartbeat.storage is not None

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write the settings of the study into the storage, for processes that only read it."""
        if not self.settings:
            self.storage.set_study_user_attr(self.id, SETTINGS, settings)
            with no_experimental_warnings():
                self.optuna.set_metric_names(list(self.axes))  # for optuna-dashboard

    def write_winner(self, trial: Trial) -> None:
        """Write which trial the search reported as its best."""
        self.storage.set_study_user_attr(self.id, WINNER, trial.number)

    # taking trials

    def take(self, may_start: Callable[[int], bool]) -> RunningTrial | None:
        """Take a trial for training; None if there is none at present.

        Trials whose worker stopped or died come first, then new proposals. ``may_start``: whether
        the trial of this number may be proposed.
        """
        self.heartbeat.fail_stale(self.optuna)
        while True:
            every = self.all_attempts()
            attempts = counting_attempts(every)
            self._fail_duplicates(every, attempts)
            for number in sorted(attempts):
                attempt = attempts[number]
                if is_interrupted(attempt):
                    self._enqueue(_retry(attempt))
                    break
                if attempt.state == TrialState.WAITING:
                    if (taken := self._begin(attempt, attempts)) is not None:
                        return taken
                    break
            else:
                number = len(attempts)
                window_is_full = self.finished_up_to(attempts) < number - self.window
                if window_is_full or not may_start(number):
                    return None
                self._enqueue(_as_frozen_trial(self._propose(number, attempts)))

    def _fail_duplicates(self, every: list[FrozenTrial], attempts: dict[int, FrozenTrial]) -> None:
        """If two workers proposed the same trial at the same time, the first attempt counts."""
        for attempt in every:
            counts = attempts[attempt.user_attrs["draw"]].number == attempt.number
            if attempt.state == TrialState.WAITING and not counts:
                self._set_attr(attempt._trial_id, "double", True)
                self._set_state(attempt._trial_id, TrialState.FAIL)

    def fail_running(self) -> None:
        """Fail all running attempts, which an earlier process has left behind.

        Only for a process that has the study for itself.
        """
        for attempt in self.all_attempts():
            if attempt.state == TrialState.RUNNING:
                self._set_state(attempt._trial_id, TrialState.FAIL)

    def release(self, trial: RunningTrial) -> None:
        """Give the trial up unfinished; another process may continue it."""
        self._set_state(trial.attempt_id, TrialState.FAIL)

    def _propose(self, number: int, attempts: dict[int, FrozenTrial]) -> Trial:
        known: dict[str, int] = {}
        for earlier in range(number):
            attrs = attempts[earlier].user_attrs
            if attrs.get("outcome") not in UNTRAINED:
                known.setdefault(attrs["fingerprint"], earlier)
        return self.sampler.propose(number, self._earlier_trials(number, attempts), known)

    def _earlier_trials(self, number: int, attempts: dict[int, FrozenTrial]) -> list[Trial]:
        """The trials that the proposal of trial ``number`` depends on; all are finished."""
        return [self._observed(i, attempts) for i in range(max(0, number - self.window + 1))]

    def _observed(self, number: int, attempts: dict[int, FrozenTrial]) -> Trial:
        """The trial; with the results of the earlier one if it is the same model."""
        trial = self._trial(number, attempts[number])
        if trial.same_as is None:
            return trial
        same = self._trial(trial.same_as, attempts[trial.same_as])
        return replace(trial, losses=same.losses, others=same.others, outcome=same.outcome)

    def _begin(self, attempt: FrozenTrial, attempts: dict[int, FrozenTrial]) -> RunningTrial | None:
        """Take the attempt; None if another process was faster or it needs no training."""
        self.heartbeat.record(attempt._trial_id)
        try:
            if not self.storage.set_trial_state_values(attempt._trial_id, TrialState.RUNNING):
                return None
        except UpdateFinishedTrialError:
            return None
        trial = trial_of(attempt, self.axes)
        if trial.outcome:
            self._set_state(attempt._trial_id, TrialState.PRUNED)
            return None
        self.heartbeat.attempts.add(attempt._trial_id)
        return RunningTrial(
            **{field.name: getattr(trial, field.name) for field in fields(trial)},
            attempt_id=attempt._trial_id,
            earlier=tuple(self._earlier_trials(trial.number, attempts)),
        )

    # recording results

    def record_rung(
        self, trial: RunningTrial, scores: Scores, values: tuple[float, ...] | None
    ) -> RunningTrial:
        """Record the scores of one more rung; returns the trial with them.

        ``values``: the objectives in the order of ``axes``; None if the training diverged.
        """
        trial = replace(trial, rungs=(*trial.rungs, scores))
        if values is not None:
            trial = replace(trial, losses=(*trial.losses, values[0]), others=values[1:])
            if len(self.axes) == 1:  # for people who look at the storage
                self._unless_finished(
                    self.storage.set_trial_intermediate_value,
                    trial.attempt_id,
                    len(trial.rungs),
                    values[0],
                )
            self._set_attr(trial.attempt_id, "losses", list(trial.losses))
            self._set_attr(trial.attempt_id, "others", list(trial.others))
        # last, because a rung counts once its scores are there: a kill before loses all of it
        dumped = [{k: s.model_dump(mode="json") for k, s in rung.items()} for rung in trial.rungs]
        self._set_attr(trial.attempt_id, "rungs", json.dumps(dumped))
        return trial

    def is_promoted(self, trial: RunningTrial) -> bool:
        """Whether the trial is trained on the next rung, after a rung with a finite loss."""
        return self.sampler.is_promoted(trial.losses, trial.others, trial.earlier)

    def finish(
        self,
        trial: RunningTrial,
        outcome: str,
        values: tuple[float, ...] | None = None,
        error: str = "",
    ) -> None:
        """End the trial. ``outcome``: complete (then with ``values``), pruned, diverged, failed."""
        self._set_attr(trial.attempt_id, "outcome", outcome)
        if error:
            self._set_attr(trial.attempt_id, "error", error)
        state = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        self._set_state(trial.attempt_id, state.get(outcome, TrialState.PRUNED), values)

    def _set_attr(self, attempt_id: int, key: str, value: Any) -> None:
        self._unless_finished(self.storage.set_trial_user_attr, attempt_id, key, value)

    def _set_state(
        self, attempt_id: int, state: TrialState, values: tuple[float, ...] | None = None
    ) -> None:
        self.heartbeat.attempts.discard(attempt_id)
        self._unless_finished(self.storage.set_trial_state_values, attempt_id, state, values)

    def _unless_finished(self, write: Callable[..., Any], attempt_id: int, *given: Any) -> None:
        """Ignore writes to an attempt that has already been failed as stale.

        Another worker repeats the same work.
        """
        try:
            write(attempt_id, *given)
        except UpdateFinishedTrialError:
            self.heartbeat.attempts.discard(attempt_id)

    def _enqueue(self, attempt: FrozenTrial) -> None:
        self.storage.create_new_trial(self.id, template_trial=attempt)


def _as_frozen_trial(trial: Trial) -> FrozenTrial:
    """The proposal as a waiting attempt, complete in one write: no worker can die in between."""
    attrs: dict[str, Any] = {"draw": trial.number, "fingerprint": trial.fingerprint}
    optional = {
        "spec": trial.spec_yaml,
        "outcome": trial.outcome,
        "error": trial.error,
        "same_as": trial.same_as,
    }
    attrs |= {key: value for key, value in optional.items() if value not in (None, "")}
    return create_trial(
        state=TrialState.WAITING,
        params=trial.params,
        distributions=trial.distributions,
        constraints=trial.constraints,
        user_attrs=attrs,
    )


def _retry(interrupted: FrozenTrial) -> FrozenTrial:
    """A waiting attempt with what the interrupted one recorded, except an unfinished outcome."""
    attrs = dict(interrupted.user_attrs)
    if attrs.get("outcome") not in UNTRAINED:
        attrs.pop("outcome", None)
    return create_trial(
        state=TrialState.WAITING,
        params=interrupted.params,
        distributions=interrupted.distributions,
        constraints=interrupted.constraints,
        user_attrs=attrs,
        intermediate_values=interrupted.intermediate_values,
    )
