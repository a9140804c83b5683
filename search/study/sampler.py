"""Which trial comes next, and which trials are promoted to the next rung.

Both are pure functions of the seed and of earlier trials: Optuna's samplers and pruners work on
studies in memory that hold only the trials they are given. Therefore a search proposes the same
trials however many workers share it, and whichever of them die.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from archdsl.errors import SpecError
from archdsl.lang.budget import describe_excess, excesses, largest_excess
from archdsl.lang.load import NoFitError, fitted
from archdsl.lang.source import Tree
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.lang.template import fill
from archdsl.search.space.optuna_space import starting_points, suggest
from archdsl.search.stats.pareto import Point, dominates
from archdsl.search.study.storage import in_memory_study, no_experimental_warnings
from archdsl.search.study.trial import Trial

MAX_TRIES = 20  # to find a model that keeps to the budget and is new
RANDOM_TRIALS = 8  # before TPE makes proposals
STARTUP = 4  # complete trials before any trial is stopped early


@dataclass(frozen=True)
class TrialSampler:
    """Proposes the trials of a search. ``axes``: the number of objectives, all minimized."""

    tree: Tree
    budget: Budget
    axes: int
    seed: int

    @cached_property
    def starting_points(self) -> list[dict[str, Any]]:
        """The points that are tried first: the default, and each pure model of the space."""
        return starting_points(self.tree)

    def propose(self, number: int, earlier: Sequence[Trial], known: Mapping[str, int]) -> Trial:
        """The trial of this number: a starting point, or the proposal of TPE.

        TPE (Watanabe 2304.11127) learns from ``earlier``. ``known``: numbers of earlier trials by
        the fingerprint of their model, also of those that are still trained. If ``MAX_TRIES``
        proposals are over the budget or known, the last of them is the trial.
        """
        if number < len(self.starting_points):
            study = self._study([])
            study.enqueue_trial(self.starting_points[number])
            return self._try(number, study, known)
        study = self._study(earlier)
        with no_experimental_warnings():
            study.sampler = optuna.samplers.TPESampler(
                seed=self.seed * 1_000_003 + number,
                n_startup_trials=RANDOM_TRIALS,
                multivariate=True,
                group=True,
            )
        trial = self._try(number, study, known)
        for _ in range(1, MAX_TRIES):
            if not trial.outcome:
                break
            trial = self._try(number, study, known)
        return trial

    def is_promoted(self, losses: Sequence[float], others: Point, earlier: Sequence[Trial]) -> bool:
        """Whether a trial is trained on the next rung.

        ``losses``: the objective loss at each rung so far; ``others``: the further objectives. With
        one objective a trial stops if its loss is above the median of ``earlier`` at this rung.
        """
        if self.axes == 1:
            return not self._is_pruned(losses, earlier)
        return may_join_front(losses, others, earlier)

    def _is_pruned(self, losses: Sequence[float], earlier: Sequence[Trial]) -> bool:
        study = self._study(earlier)
        pruner = optuna.pruners.PercentilePruner(50.0, n_startup_trials=STARTUP)
        trial = study.ask()
        for step, loss in enumerate(losses, 1):
            trial.report(loss, step)
        return pruner.prune(study, study.trials[-1])

    def _study(self, earlier: Sequence[Trial]) -> optuna.Study:
        study = in_memory_study(self.axes)
        gains = expected_gains(earlier)
        study.add_trials([self._as_frozen_trial(trial, gains) for trial in earlier])
        return study

    def _as_frozen_trial(self, trial: Trial, gains: Mapping[int, float]) -> FrozenTrial:
        """The trial as Optuna's samplers and pruners take it."""
        given: dict[str, Any] = {
            "params": trial.params,
            "distributions": trial.distributions,
            "constraints": trial.constraints,
        }
        if self.axes == 1:
            given["intermediate_values"] = dict(enumerate(trial.losses, 1))
        rungs = len(trial.losses)
        if trial.complete:
            values = [trial.losses[-1], *trial.others]
        elif self.axes > 1 and rungs in gains:
            # Optuna has no pruned trials with several objectives: take the loss that is expected
            # at the last rung
            values = [trial.losses[-1] + gains[rungs], *trial.others]
        else:
            return create_trial(state=TrialState.PRUNED, **given)
        return create_trial(values=values, **given)

    def _try(self, number: int, study: optuna.Study, known: Mapping[str, int]) -> Trial:
        """One proposal of the study's sampler, checked; the study learns if it is not to be
        trained."""
        ask = study.ask()
        found: ModelSpec | SpecError
        try:
            tree = fill(self.tree, lambda name, leaf: suggest(ask, name, leaf))
            found = fitted(tree, self.budget)
        except SpecError as error:
            found = error
        trial = self._check(Trial(number, dict(ask.params), dict(ask.distributions)), found, known)
        for name, ratio in trial.constraints.items():
            ask.set_constraint(name, ratio)
        if trial.outcome:
            study.tell(ask, state=TrialState.PRUNED)
        return trial

    def _check(self, trial: Trial, found: ModelSpec | SpecError, known: Mapping[str, int]) -> Trial:
        """The trial with its model, or with the reason why it is not to be trained."""
        if isinstance(found, NoFitError):  # no size keeps to the budget
            ratio = {"fit": found.ratio}
            return replace(trial, constraints=ratio, outcome="infeasible", error=str(found))
        if isinstance(found, SpecError):  # the choices do not go together
            return replace(trial, outcome="invalid", error=str(found))
        trial = replace(
            trial,
            spec_yaml=found.to_yaml(),
            fingerprint=found.fingerprint(),
            constraints=excesses(found, self.budget),
        )
        if largest_excess(found, self.budget) > 0:
            return replace(trial, outcome="infeasible", error=describe_excess(found, self.budget))
        if (same := known.get(trial.fingerprint)) is not None:
            return replace(trial, outcome="reused", same_as=same)
        return trial


def expected_gains(earlier: Sequence[Trial]) -> dict[int, float]:
    """What the remaining rungs add to the loss on average, by rungs trained.

    Over the complete trials; empty if they are fewer than ``STARTUP``.
    """
    complete = [trial.losses for trial in earlier if trial.complete]
    if len(complete) < STARTUP:
        return {}
    return {
        rung: fmean(losses[-1] - losses[rung - 1] for losses in complete)
        for rung in range(1, len(complete[0]))
    }


def may_join_front(losses: Sequence[float], others: Point, earlier: Sequence[Trial]) -> bool:
    """Whether a trial is expected to reach the Pareto front of the complete trials.

    Its loss is expected to change as that of complete trials did on the remaining rungs.
    """
    gains = expected_gains(earlier)
    if len(losses) not in gains:
        return True
    expected = (losses[-1] + gains[len(losses)], *others)
    complete = [trial for trial in earlier if trial.complete]
    return not any(dominates((trial.losses[-1], *trial.others), expected) for trial in complete)
