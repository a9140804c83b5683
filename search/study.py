"""The study: what was drawn and how it scored, in Optuna's journal; nothing else asks Optuna."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from archdsl.errors import SpecError
from archdsl.leaves import fill
from archdsl.load import NoFitError, exceeds, fitted, over, ratios
from archdsl.search.proxy import Score
from archdsl.search.space import starting_points, suggest
from archdsl.source import Tree, parse
from archdsl.spec import Budget, ModelSpec, parse_spec

optuna.logging.set_verbosity(optuna.logging.WARNING)

Scores = dict[str, Score]  # by task
IN_TRAINING = "in training"  # the outcome of a draw that is being trained already
FAILED = ("failed", IN_TRAINING)
TRAINED = ("complete", "pruned", "diverged", "failed")  # outcomes of draws that cost training


@dataclass
class Trial:
    """A draw on its way up the rungs."""

    number: int
    spec: ModelSpec
    fingerprint: str
    ask: optuna.Trial
    rungs: list[Scores] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """A trial that was told; ``value`` is None unless it climbed to the last rung."""

    number: int
    spec: ModelSpec
    fingerprint: str
    params: dict[str, Any]
    outcome: str
    value: float | None
    rungs: list[Scores]


class Study:
    """Draws specs from a space and remembers what became of them, across processes and crashes.

    ``met_its_like``: the last draw was a model that is being trained; to draw on at once would
    only meet it again.
    """

    def __init__(self, folder: Path, tree: Tree, budget: Budget, seed: int) -> None:
        self.tree, self.budget, self.seed = tree, budget, seed
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
            study_name="search",
            pruner=optuna.pruners.PercentilePruner(50.0, n_startup_trials=4),
            load_if_exists=True,
        )
        if not self.study.trials:
            for point in starting_points(tree):
                self.study.enqueue_trial(point)
        self._finished: dict[int, Finished] = {}
        self._trials: list[FrozenTrial] = []
        self._changed, self.met_its_like = True, False
        self._take_up_lost_trials()

    def _take_up_lost_trials(self) -> None:
        """A process that was killed leaves its trials running: they are drawn again."""
        for lost in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(lost.number, state=TrialState.FAIL)
            if lost.params or "fixed_params" in lost.system_attrs:
                self.study.enqueue_trial(lost.system_attrs.get("fixed_params") or lost.params)

    def draw(self) -> Trial | None:
        """A model to train; None where the draw was told at once, being known or infeasible."""
        # every draw has its own stream, so that a resumed study does not repeat its first draws
        number = len(self._stored())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.sampler = optuna.samplers.TPESampler(
                seed=self.seed * 1_000_003 + number,
                n_startup_trials=8,
                multivariate=True,
                group=True,
            )
        ask = self.study.ask()
        self._changed = True
        try:
            tree = fill(self.tree, lambda name, leaf: suggest(ask, name, leaf))
            spec = fitted(tree, self.budget)
        except NoFitError as error:
            ask.set_user_attr("excess", error.ratio)
            ask.set_constraint("fit", error.ratio)
            self._close(ask, "infeasible", error=str(error))
            return None
        except SpecError as error:  # choices that do not go together
            self._close(ask, "invalid", error=str(error))
            return None
        trial = Trial(ask.number, spec, spec.fingerprint(), ask)
        for name, ratio in ratios(spec, self.budget).items():
            ask.set_constraint(name, ratio)
        ask.set_user_attr("spec", spec.to_yaml())
        ask.set_user_attr("fingerprint", trial.fingerprint)
        if (excess := over(spec, self.budget)) > 0:
            ask.set_user_attr("excess", excess)
            self._close(ask, "infeasible", error=exceeds(spec, self.budget))
            return None
        return self._unless_known(trial)

    def _unless_known(self, trial: Trial) -> Trial | None:
        same = [
            old for old in self._stored() if old.user_attrs.get("fingerprint") == trial.fingerprint
        ]
        same = [old for old in same if old.number != trial.number]
        done = [old for old in same if _outcome(old) in ("complete", "pruned")]
        if done:
            trial.ask.set_user_attr("same_as", done[0].number)
            self._close(trial.ask, "reused", value=done[0].value)
            return None
        if any(old.state == TrialState.RUNNING for old in same):
            self._close(trial.ask, IN_TRAINING)
            return None
        return trial

    def climbed(self, trial: Trial, scores: Scores, value: float | None, last: bool) -> bool:
        """Takes note of a rung; whether the trial goes on to the next."""
        trial.rungs.append(scores)
        dumped = [{k: s.model_dump(mode="json") for k, s in rung.items()} for rung in trial.rungs]
        trial.ask.set_user_attr("rungs", dumped)
        if value is None:
            self._close(trial.ask, "diverged")
            return False
        trial.ask.report(value, len(trial.rungs))
        if last:
            self._close(trial.ask, "complete", value=value)
            return False
        if trial.ask.should_prune():
            self._close(trial.ask, "pruned")
            return False
        return True

    def failed(self, trial: Trial, reason: str) -> None:
        self._close(trial.ask, "failed", error=reason)

    def _close(
        self, ask: optuna.Trial, outcome: str, *, value: float | None = None, error: str = ""
    ) -> None:
        ask.set_user_attr("outcome", outcome)
        self._changed, self.met_its_like = True, outcome == IN_TRAINING
        if error:
            ask.set_user_attr("error", error)
        if value is not None:
            self.study.tell(ask, value)
        else:
            # pruned, not failed: Optuna's sampler learns nothing from failures
            state = TrialState.FAIL if outcome in FAILED else TrialState.PRUNED
            self.study.tell(ask, state=state)

    def _stored(self) -> list[FrozenTrial]:
        """Read again only after a change: nobody else writes, and the journal is a file."""
        if self._changed:
            self._trials, self._changed = self.study.get_trials(deepcopy=False), False
        return self._trials

    def finished(self) -> list[Finished]:
        """Every trial that was told and had a spec, in the order of asking."""
        for trial in self._stored():
            known = trial.number in self._finished
            if not known and _outcome(trial) and "spec" in trial.user_attrs:
                self._finished[trial.number] = _finished(trial)
        return [self._finished[number] for number in sorted(self._finished)]

    def closest_miss(self) -> str:
        """Of the draws that break the budget, what the one that breaks it least said."""
        missed = [t.user_attrs for t in self._stored() if "excess" in t.user_attrs]
        least = min(missed, key=lambda attrs: float(attrs["excess"]), default=None)
        return str(least["error"]) if least else ""

    def outcomes(self) -> dict[str, int]:
        """How many draws ended how."""
        counts: dict[str, int] = {}
        for trial in self._stored():
            if outcome := _outcome(trial):
                counts[outcome] = counts.get(outcome, 0) + 1
        return counts


def _outcome(trial: FrozenTrial) -> str | None:
    """None until it was told: who is killed between writing and telling has told nothing."""
    outcome = trial.user_attrs.get("outcome")
    untold = trial.state == TrialState.FAIL and outcome not in FAILED
    return outcome if trial.state.is_finished() and not untold else None


def _finished(trial: FrozenTrial) -> Finished:
    attrs = trial.user_attrs
    return Finished(
        number=trial.number,
        spec=parse_spec(parse(attrs["spec"], f"trial {trial.number}")),
        fingerprint=attrs["fingerprint"],
        params=dict(trial.params),
        outcome=attrs["outcome"],
        value=trial.value if attrs["outcome"] == "complete" else None,
        rungs=[
            {task: Score.model_validate(score) for task, score in rung.items()}
            for rung in attrs.get("rungs", [])
        ],
    )
