"""What an Optuna storage holds of a study: who may not train can read it.

A draw is one trial of Optuna's. A worker that dies leaves its trial behind; then another trial
stands for the same draw and goes on from what is recorded. Of all trials of a draw only one counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from archdsl.lang.source import parse
from archdsl.lang.spec import ModelSpec, parse_spec
from archdsl.search.study.sampler import no_experimental_warnings
from archdsl.search.trials.proxy import ProxyScore

Scores = dict[str, ProxyScore]  # by task
UNTRAINED = ("infeasible", "invalid", "reused")  # outcomes of draws that cost no training
SETTINGS = "settings"  # attribute of a study
EXHAUSTED = 3  # draws in a row that find nothing new: the space is used up


@dataclass(frozen=True)
class Trial:
    """A draw that was told. ``values``: by axis; None unless it climbed to the last rung."""

    number: int
    spec: ModelSpec
    fingerprint: str
    params: dict[str, Any]
    outcome: str
    values: dict[str, float] | None
    rungs: list[Scores]
    error: str = ""
    same_as: int | None = None

    @property
    def value(self) -> float | None:
        return self.values["loss"] if self.values else None

    @cached_property
    def point(self) -> tuple[float, ...]:
        assert self.values is not None
        return tuple(self.values.values())


class StudyRecord:
    """A study of a storage, to be read. ``axes``: what should be low, the loss first."""

    def __init__(self, storage: BaseStorage, name: str, axes: tuple[str, ...]) -> None:
        self.storage, self.name, self.axes = storage, name, axes
        self.id = storage.get_study_id_from_name(name)
        self._finished: dict[int, Trial] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the study."""
        return self.storage.get_study_user_attrs(self.id).get(SETTINGS, {})

    def all_trials(self) -> list[FrozenTrial]:
        return self.storage.get_all_trials(self.id, deepcopy=False)

    def attempts(self) -> dict[int, FrozenTrial]:
        """For each draw the trial that counts."""
        return counting_attempts(self.all_trials())

    def finished_up_to(self, attempts: dict[int, FrozenTrial]) -> int:
        """The last draw up to which all were told."""
        finished = (number for number in range(len(attempts)) if not is_finished(attempts[number]))
        return next(finished, len(attempts)) - 1

    def trained(self, before: int | None = None) -> int:
        """How many draws (below ``before``) cost training, also those that still do."""
        return sum(
            trial.user_attrs.get("outcome") not in UNTRAINED
            for number, trial in self.attempts().items()
            if before is None or number < before
        )

    @property
    def exhausted(self) -> bool:
        """The last draws found nothing that was new."""
        attempts = self.attempts()
        last = [attempts[n].user_attrs.get("outcome") for n in sorted(attempts)[-EXHAUSTED:]]
        return len(last) == EXHAUSTED and all(outcome == "reused" for outcome in last)

    @property
    def unfinished(self) -> int:
        """Draws that were not told, whoever trains them."""
        return sum(not is_finished(trial) for trial in self.attempts().values())

    def finished(self) -> list[Trial]:
        """Every draw that was told and had a spec, in order."""
        for number, trial in self.attempts().items():
            known = number in self._finished
            if not known and is_finished(trial) and "spec" in trial.user_attrs:
                self._finished[number] = self._as_trial(trial)
        return [self._finished[number] for number in sorted(self._finished)]

    def _as_trial(self, trial: FrozenTrial) -> Trial:
        attrs = trial.user_attrs
        whole = attrs["outcome"] == "complete"
        return Trial(
            number=attrs["draw"],
            spec=spec_of(attrs),
            fingerprint=attrs["fingerprint"],
            params={name: _rounded(value) for name, value in trial.params.items()},
            outcome=attrs["outcome"],
            values=dict(zip(self.axes, trial.values, strict=True)) if whole else None,
            rungs=rungs_of(attrs),
            error=attrs.get("error", ""),
            same_as=attrs.get("same_as"),
        )

    def outcomes(self) -> dict[str, int]:
        """How many draws ended how."""
        counts: dict[str, int] = {}
        for trial in self.attempts().values():
            if is_finished(trial):
                outcome = trial.user_attrs["outcome"]
                counts[outcome] = counts.get(outcome, 0) + 1
        return counts

    def importance(self) -> dict[str, float]:
        """How much of the difference between good and other draws each choice makes (PED-ANOVA)."""
        whole = [t for t in self.attempts().values() if t.state == TrialState.COMPLETE]
        if len(whole) < 8:
            return {}
        study = optuna.create_study()
        study.add_trials(
            create_trial(value=t.values[0], params=t.params, distributions=t.distributions)
            for t in whole
        )
        common = set.intersection(*(set(trial.params) for trial in whole))
        with no_experimental_warnings():
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=sorted(common)
        )


def counting_attempts(trials: list[FrozenTrial]) -> dict[int, FrozenTrial]:
    """For each draw the trial that counts: the first that was told, else the first alive."""
    found: dict[int, FrozenTrial] = {}
    for trial in trials:
        number = trial.user_attrs["draw"]
        best = found.get(number)
        if best is None or _precedence(trial) > _precedence(best):
            found[number] = trial
    return found


def is_finished(trial: FrozenTrial) -> bool:
    """Not who wrote an outcome and was killed before telling it."""
    failed = trial.user_attrs.get("outcome") == "failed"
    return trial.state.is_finished() and (trial.state != TrialState.FAIL or failed)


def is_interrupted(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and not is_finished(trial)


def _rounded(value: Any) -> Any:
    """Optuna's 0.6000000000000001 as 0.6."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _precedence(trial: FrozenTrial) -> int:
    return 2 if is_finished(trial) else 0 if is_interrupted(trial) else 1


def spec_of(attrs: dict[str, Any]) -> ModelSpec:
    return parse_spec(parse(attrs["spec"], f"draw {attrs['draw']}"))


def rungs_of(attrs: dict[str, Any]) -> list[Scores]:
    return [
        {task: ProxyScore.model_validate(score) for task, score in rung.items()}
        for rung in json.loads(attrs.get("rungs", "[]"))
    ]
