"""Work on a study: taking draws, and telling what became of them, beside other processes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from archdsl.lang.spec import ModelSpec
from archdsl.search.study.record import (
    SETTINGS,
    UNTRAINED,
    Scores,
    StudyRecord,
    counting_attempts,
    is_interrupted,
    rungs_of,
    spec_of,
)
from archdsl.search.study.sampler import (
    EarlierTrial,
    Proposal,
    TrialSampler,
    no_experimental_warnings,
)
from archdsl.search.study.storage import HeartbeatThread

SECONDS_BETWEEN_STALE_CHECKS = 1.0


@dataclass
class RunningTrial:
    """A draw on its way up the rungs, in the hands of this process."""

    number: int
    spec: ModelSpec
    fingerprint: str
    params: dict[str, Any]
    trial_id: int
    earlier: list[EarlierTrial]
    rungs: list[Scores] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Study(StudyRecord):
    """One process's view of a study that others may work on, too.

    ``window``: so many draws may be under way at once; a draw knows what became of all further
    back, so that it does not depend on who was faster.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        sampler: TrialSampler,
        axes: tuple[str, ...],
        window: int,
    ) -> None:
        with suppress(DuplicatedStudyError):  # another worker was here before
            storage.create_new_study([StudyDirection.MINIMIZE] * len(axes), study_name=name)
        super().__init__(storage, name, axes)
        self.sampler, self.window = sampler, window
        self.optuna = optuna.load_study(study_name=name, storage=storage)
        self.heartbeat = HeartbeatThread(storage)
        self.stale_checked_at = 0.0

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Says in the storage what decides the study, for those who only read it."""
        if not self.settings:
            self.storage.set_study_user_attr(self.id, SETTINGS, settings)
            with no_experimental_warnings():
                self.optuna.set_metric_names(list(self.axes))  # for optuna-dashboard

    # taking

    def take(self, may_start: Callable[[int], bool]) -> RunningTrial | None:
        """A draw to train, now in this process's hands; None where there is none at present.

        Those that were left behind come first. ``may_start``: whether there may be a draw of this
        number, none with it having been made.
        """
        self._fail_stale()
        while True:
            trials = self.all_trials()
            attempts = counting_attempts(trials)
            self._fail_duplicates(trials, attempts)
            for number in sorted(attempts):
                trial = attempts[number]
                if is_interrupted(trial):
                    self._enqueue(_retry(trial))
                    break
                if trial.state == TrialState.WAITING:
                    if (taken := self._begin(trial, attempts)) is not None:
                        return taken
                    break
            else:
                number = len(attempts)
                if self.finished_up_to(attempts) < number - self.window or not may_start(number):
                    return None
                self._enqueue(_as_frozen_trial(self._propose(number, attempts)))

    def _fail_stale(self) -> None:
        """The trials of workers that no longer beat are lost."""
        if time.monotonic() - self.stale_checked_at > SECONDS_BETWEEN_STALE_CHECKS:
            with no_experimental_warnings():
                fail_stale_trials(self.optuna)
            self.stale_checked_at = time.monotonic()

    def _fail_duplicates(self, trials: list[FrozenTrial], attempts: dict[int, FrozenTrial]) -> None:
        """Two workers that made the same draw at once: the first one counts."""
        for trial in trials:
            counts = attempts[trial.user_attrs["draw"]].number == trial.number
            if trial.state == TrialState.WAITING and not counts:
                self._unless_finished(
                    self.storage.set_trial_user_attr, trial._trial_id, "double", True
                )
                self._set_state(trial._trial_id, TrialState.FAIL)

    def fail_running(self) -> None:
        """Those that are running belong to a process that is no more: they are lost."""
        for trial in self.all_trials():
            if trial.state == TrialState.RUNNING:
                self._set_state(trial._trial_id, TrialState.FAIL)

    def release(self, trial: RunningTrial) -> None:
        """Another may go on with it."""
        self._set_state(trial.trial_id, TrialState.FAIL)

    def _propose(self, number: int, attempts: dict[int, FrozenTrial]) -> Proposal:
        known: dict[str, int] = {}
        for earlier in range(number):
            attrs = attempts[earlier].user_attrs
            if attrs.get("outcome") not in UNTRAINED:
                known.setdefault(attrs["fingerprint"], earlier)
        return self.sampler.propose(number, self._earlier_trials(number, attempts), known)

    def _earlier_trials(self, number: int, attempts: dict[int, FrozenTrial]) -> list[EarlierTrial]:
        return [self._earlier_trial(attempts, i) for i in range(max(0, number - self.window + 1))]

    def _earlier_trial(self, attempts: dict[int, FrozenTrial], number: int) -> EarlierTrial:
        trial = attempts[number]
        attrs = attempts[trial.user_attrs.get("same_as", number)].user_attrs
        return EarlierTrial(
            trial.params,
            trial.distributions,
            trial.constraints,
            tuple(attrs.get("losses", ())),
            tuple(attrs.get("others", ())),
            attrs.get("outcome") == "complete",
        )

    def _begin(self, trial: FrozenTrial, attempts: dict[int, FrozenTrial]) -> RunningTrial | None:
        """None where it was somebody else's, or needed no training."""
        self.heartbeat.record(trial._trial_id)
        try:
            if not self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                return None
        except UpdateFinishedTrialError:
            return None
        attrs = trial.user_attrs
        if (outcome := attrs.get("outcome")) in UNTRAINED:
            self._set_state(trial._trial_id, TrialState.PRUNED)
            return None
        assert outcome is None
        self.heartbeat.trials.add(trial._trial_id)
        return RunningTrial(
            number=attrs["draw"],
            spec=spec_of(attrs),
            fingerprint=attrs["fingerprint"],
            params=trial.params,
            trial_id=trial._trial_id,
            earlier=self._earlier_trials(attrs["draw"], attempts),
            rungs=rungs_of(attrs),
            losses=list(attrs.get("losses", ())),
        )

    # telling

    def record_rung(
        self, trial: RunningTrial, scores: Scores, values: tuple[float, ...] | None
    ) -> None:
        """Takes note of a rung; ``values``: the axes, None where training diverged."""
        trial.rungs.append(scores)
        dumped = [{k: s.model_dump(mode="json") for k, s in rung.items()} for rung in trial.rungs]
        given: dict[str, Any] = {"rungs": json.dumps(dumped)}
        if values is not None:
            trial.losses.append(values[0])
            given |= {"losses": trial.losses, "others": values[1:]}
        self._set_attrs(trial, **given)
        if values is not None and len(self.axes) == 1:  # for those who look at the storage
            self._unless_finished(
                self.storage.set_trial_intermediate_value,
                trial.trial_id,
                len(trial.rungs),
                values[0],
            )

    def is_promoted(self, trial: RunningTrial, values: tuple[float, ...]) -> bool:
        """Whether the draw climbs to the next rung."""
        return self.sampler.is_promoted(trial.losses, values[1:], trial.earlier)

    def finish(
        self,
        trial: RunningTrial,
        outcome: str,
        values: tuple[float, ...] | None = None,
        error: str = "",
    ) -> None:
        """The draw is done with: complete (with values), pruned, diverged or failed."""
        self._set_attrs(trial, outcome=outcome, **({"error": error} if error else {}))
        state = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        self._set_state(trial.trial_id, state.get(outcome, TrialState.PRUNED), values)

    def _set_attrs(self, trial: RunningTrial, **attrs: Any) -> None:
        for key, value in attrs.items():
            self._unless_finished(self.storage.set_trial_user_attr, trial.trial_id, key, value)

    def _set_state(
        self, trial_id: int, state: TrialState, values: tuple[float, ...] | None = None
    ) -> None:
        self.heartbeat.trials.discard(trial_id)
        self._unless_finished(self.storage.set_trial_state_values, trial_id, state, values)

    def _unless_finished(self, write: Callable[..., Any], *given: Any) -> None:
        """Who was taken for dead and is not, has nothing to say: another does the same work."""
        try:
            write(*given)
        except UpdateFinishedTrialError:
            self.heartbeat.trials.discard(given[0])

    def _enqueue(self, trial: FrozenTrial) -> None:
        self.storage.create_new_trial(self.id, template_trial=trial)


def _as_frozen_trial(proposal: Proposal) -> FrozenTrial:
    """Whole from the start, so that nobody can die between making a draw and writing it down."""
    attrs: dict[str, Any] = {"draw": proposal.number, "fingerprint": proposal.fingerprint}
    if proposal.spec is not None:
        attrs["spec"] = proposal.spec.to_yaml()
    for name in ("outcome", "error", "same_as"):
        if (value := getattr(proposal, name)) not in (None, ""):
            attrs[name] = value
    return create_trial(
        state=TrialState.WAITING,
        params=proposal.params,
        distributions=proposal.distributions,
        constraints=proposal.constraints,
        user_attrs=attrs,
    )


def _retry(interrupted: FrozenTrial) -> FrozenTrial:
    """The same draw with what was recorded of it, but for an outcome that was never told."""
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
