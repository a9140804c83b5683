"""Read a study from an Optuna storage.

Each trial of the search has one or more trials in Optuna, which are called attempts here. When a
worker dies, its attempt remains in the storage. Then another attempt at the same trial is added,
which continues from the recorded scores. Of all attempts at a trial, only one counts.
"""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from archdsl.search.study.storage import in_memory_study, no_experimental_warnings
from archdsl.search.study.stored import check_attempts, check_attributes
from archdsl.search.study.trial import UNTRAINED, Scores, Trial
from archdsl.search.trials.proxy import ProxyScore

SETTINGS = "settings"  # the attribute of a study that holds its settings
WINNER = "winner"
EXHAUSTED = 3  # after so many reused trials in a row, the space is taken to hold no new model
LEAST_FOR_IMPORTANCE = 8  # the least number of complete trials


def trainings_of(name: str) -> str:
    """Return the name of the study with the trainings that follow the trials of a study."""
    return f"{name}-trainings"


class StudyRecord:
    """Reads a study from a storage. ``axes``: the names of the objectives, the loss first.

    Raises KeyError if the storage has no study of this name.
    """

    def __init__(self, storage: BaseStorage, name: str, axes: tuple[str, ...]) -> None:
        self.storage, self.name, self.axes = storage, name, axes
        self.id = storage.get_study_id_from_name(name)
        self._finished: dict[int, Trial] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the study was made with; empty if none were written."""
        return self.storage.get_study_user_attrs(self.id).get(SETTINGS, {})

    @property
    def winner(self) -> int | None:
        """The number of the trial that a search reported last as its best; None if it never did."""
        return self.storage.get_study_user_attrs(self.id).get(WINNER)

    def check(self, where: str) -> None:
        """Raise StorageError if the storage holds what no search writes.

        ``where``: the name of the storage, for the error.
        """
        attributes = self.storage.get_study_user_attrs(self.id)
        check_attributes(attributes, where)
        check_attempts(self.all_attempts(), self.axes, where)

    def all_attempts(self) -> list[FrozenTrial]:
        """Return all attempts, in the order in which they were added."""
        return self.storage.get_all_trials(self.id, deepcopy=False)

    def attempts(self) -> dict[int, FrozenTrial]:
        """Return the attempt that counts for each trial of the search, by its number."""
        return counting_attempts(self.all_attempts())

    def finished_up_to(self, attempts: dict[int, FrozenTrial]) -> int:
        """Return the number of the last trial before the first unfinished one.

        The result is -1 if there is no such trial.
        """
        unfinished = (
            number for number in range(len(attempts)) if not is_finished(attempts[number])
        )
        return next(unfinished, len(attempts)) - 1

    def trained(self, before: int | None = None) -> int:
        """Return how many trials were or are trained, among those with a number below ``before``.

        All trials are counted if ``before`` is None.
        """
        return sum(
            attempt.user_attrs.get("outcome") not in UNTRAINED
            for number, attempt in self.attempts().items()
            if before is None or number < before
        )

    @property
    def exhausted(self) -> bool:
        """Whether the last trials all reused models that had already been scored."""
        attempts = self.attempts()
        last = [attempts[n].user_attrs.get("outcome") for n in sorted(attempts)[-EXHAUSTED:]]
        return len(last) == EXHAUSTED and all(outcome == "reused" for outcome in last)

    @property
    def unfinished(self) -> int:
        """The number of trials that are not finished, over all processes."""
        return sum(not is_finished(attempt) for attempt in self.attempts().values())

    def finished(self) -> list[Trial]:
        """Return all finished trials that have a spec, sorted by number."""
        found = [
            self._trial(number, attempt)
            for number, attempt in sorted(self.attempts().items())
            if is_finished(attempt)
        ]
        return [trial for trial in found if trial.spec_yaml]

    def _trial(self, number: int, attempt: FrozenTrial) -> Trial:
        """Return the trial of an attempt that counts. A finished trial is read once and kept."""
        if number not in self._finished:
            trial = trial_of(attempt, self.axes)
            if not is_finished(attempt):
                return trial
            self._finished[number] = trial
        return self._finished[number]

    def outcomes(self) -> dict[str, int]:
        """Return the number of finished trials for each outcome."""
        counts: dict[str, int] = {}
        for attempt in self.attempts().values():
            if is_finished(attempt):
                outcome = attempt.user_attrs["outcome"]
                counts[outcome] = counts.get(outcome, 0) + 1
        return counts

    def importance(self) -> dict[str, float]:
        """Return the importance of each search value for the loss, by name; the sum is 1.

        It is computed by PED-ANOVA (Watanabe et al. 2304.10255) from the complete trials. The
        result is empty if there are fewer than LEAST_FOR_IMPORTANCE of them. It includes only the
        search values that occur in all complete trials.
        """
        complete = [t for t in self.attempts().values() if t.state == TrialState.COMPLETE]
        if len(complete) < LEAST_FOR_IMPORTANCE:
            return {}
        study = in_memory_study(objectives=1)
        study.add_trials(
            create_trial(value=t.values[0], params=t.params, distributions=t.distributions)
            for t in complete
        )
        common = set.intersection(*(set(attempt.params) for attempt in complete))
        with no_experimental_warnings():
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=sorted(common)
        )


def counting_attempts(attempts: list[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Return the attempt that counts for each trial, by its number.

    It is the first finished attempt, or else the first that is waiting or running, or else the
    first interrupted one.
    """
    found: dict[int, FrozenTrial] = {}
    for attempt in attempts:
        number = attempt.user_attrs["draw"]
        best = found.get(number)
        if best is None or _precedence(attempt) > _precedence(best):
            found[number] = attempt
    return found


def is_finished(attempt: FrozenTrial) -> bool:
    """Whether the attempt ended with an outcome.

    An attempt that failed before Optuna was told its outcome is not finished, even if the outcome
    was already written.
    """
    failed = attempt.user_attrs.get("outcome") == "failed"
    return attempt.state.is_finished() and (attempt.state != TrialState.FAIL or failed)


def is_interrupted(attempt: FrozenTrial) -> bool:
    """Whether the attempt ended without an outcome: its worker stopped or died."""
    return attempt.state == TrialState.FAIL and not is_finished(attempt)


def _precedence(attempt: FrozenTrial) -> int:
    return 2 if is_finished(attempt) else 0 if is_interrupted(attempt) else 1


def trial_of(attempt: FrozenTrial, axes: tuple[str, ...]) -> Trial:
    """Return the trial that an attempt records. ``axes``: the names of the objectives.

    The stored keys ``draw``, ``losses``, ``others`` and so on are those of the first release.
    """
    attrs = attempt.user_attrs
    outcome = attrs.get("outcome", "")
    if not is_finished(attempt) and outcome not in UNTRAINED:
        outcome = ""  # the worker wrote it, but died before it told Optuna
    rungs = tuple(_scores(rung) for rung in json.loads(attrs.get("rungs", "[]")))
    losses = tuple(attrs.get("losses", ()))
    if not is_finished(attempt):
        losses = losses[: len(rungs)]  # a rung whose scores are not there counts for nothing
    return Trial(
        number=attrs["draw"],
        params=attempt.params,
        distributions=attempt.distributions,
        constraints=attempt.constraints,
        spec_yaml=attrs.get("spec", ""),
        fingerprint=attrs["fingerprint"],
        outcome=outcome,
        rungs=rungs,
        losses=losses,
        others=tuple(attrs.get("others", ())),
        values=dict(zip(axes, attempt.values, strict=True)) if outcome == "complete" else None,
        error=attrs.get("error", ""),
        same_as=attrs.get("same_as"),
    )


def _scores(rung: dict[str, Any]) -> Scores:
    return {task: ProxyScore.model_validate(score) for task, score in rung.items()}
