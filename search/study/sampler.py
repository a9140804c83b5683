"""What is drawn next, and what goes on: pure functions of the seed and of earlier results.

Optuna's samplers and pruners work here on studies in memory that hold nothing but the draws they
are to know. So a search is the same however many workers share it, and whatever becomes of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from archdsl.errors import SpecError
from archdsl.lang.budget import describe_excess, excesses, largest_excess
from archdsl.lang.load import NoFitError, fitted
from archdsl.lang.source import Tree
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.lang.template import fill
from archdsl.search.space.optuna_space import starting_points, suggest
from archdsl.search.stats.pareto import Point, dominates

optuna.logging.set_verbosity(optuna.logging.WARNING)

MAX_TRIES = 20  # for a model that fits and is new, before a draw is given up
STARTUP = 4  # draws to the last rung before any is stopped early
MARGIN = 1.0  # standard deviations of what the rungs above bring, in favour of a model


@contextmanager
def no_experimental_warnings() -> Iterator[None]:
    """Meanwhile Optuna does not warn of what it calls experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@dataclass(frozen=True)
class EarlierTrial:
    """An earlier draw, as a later one may know it."""

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    constraints: dict[str, float] = field(default_factory=dict)
    losses: tuple[float, ...] = ()  # the objective at each rung that was climbed
    others: Point = ()  # the further axes
    complete: bool = False  # to the last rung


@dataclass(frozen=True)
class Proposal:
    """A point of the space. ``outcome``: why it is not trained; None where it is."""

    number: int
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    spec: ModelSpec | None = None
    fingerprint: str = ""
    constraints: dict[str, float] = field(default_factory=dict)
    outcome: str | None = None
    error: str = ""
    same_as: int | None = None


@dataclass(frozen=True)
class TrialSampler:
    """The draws from a space; ``axes``: how many figures of a model should be low."""

    tree: Tree
    budget: Budget
    axes: int
    seed: int

    @cached_property
    def starting_points(self) -> list[dict[str, Any]]:
        """The pure models of the space, which are drawn first."""
        return starting_points(self.tree)

    def propose(
        self, number: int, earlier: Sequence[EarlierTrial], known: Mapping[str, int]
    ) -> Proposal:
        """Draw ``number``, from what is known of earlier ones.

        ``known``: models drawn before by fingerprint, also those that are still being trained.
        """
        if number < len(self.starting_points):
            study = self._study([])
            study.enqueue_trial(self.starting_points[number])
            return self._try(number, study, known)
        study = self._study(earlier)
        with no_experimental_warnings():
            study.sampler = optuna.samplers.TPESampler(
                seed=self.seed * 1_000_003 + number,
                n_startup_trials=8,
                multivariate=True,
                group=True,
            )
        found = self._try(number, study, known)
        for _ in range(1, MAX_TRIES):
            if found.outcome is None:
                break
            found = self._try(number, study, known)
        return found

    def is_promoted(
        self, losses: Sequence[float], others: Point, earlier: Sequence[EarlierTrial]
    ) -> bool:
        """Whether a draw with these losses so far climbs further."""
        if self.axes == 1:
            return not self._is_pruned(losses, earlier)
        return may_join_front(losses, others, earlier)

    def _is_pruned(self, losses: Sequence[float], earlier: Sequence[EarlierTrial]) -> bool:
        study = self._study(earlier)
        pruner = optuna.pruners.PercentilePruner(50.0, n_startup_trials=STARTUP)
        trial = study.ask()
        for step, loss in enumerate(losses, 1):
            trial.report(loss, step)
        return pruner.prune(study, study.trials[-1])

    def _study(self, earlier: Sequence[EarlierTrial]) -> optuna.Study:
        study = optuna.create_study(directions=["minimize"] * self.axes)
        gains = expected_gains(earlier)
        study.add_trials([self._as_trial(one, gains) for one in earlier])
        return study

    def _as_trial(
        self, earlier: EarlierTrial, gains: Mapping[int, tuple[float, float]]
    ) -> FrozenTrial:
        given: dict[str, Any] = {
            "params": earlier.params,
            "distributions": earlier.distributions,
            "constraints": earlier.constraints,
        }
        if self.axes == 1:
            given["intermediate_values"] = dict(enumerate(earlier.losses, 1))
        rungs_reached = len(earlier.losses)
        if earlier.complete:
            values = [earlier.losses[-1], *earlier.others]
        elif self.axes > 1 and rungs_reached in gains:
            # with several axes Optuna knows no stopped trials: what this one would have reached
            values = [earlier.losses[-1] + gains[rungs_reached][0], *earlier.others]
        else:
            return create_trial(state=TrialState.PRUNED, **given)
        return create_trial(values=values, **given)

    def _try(self, number: int, study: optuna.Study, known: Mapping[str, int]) -> Proposal:
        ask = study.ask()
        error: SpecError | None = None
        try:
            tree = fill(self.tree, lambda name, leaf: suggest(ask, name, leaf))
            spec = fitted(tree, self.budget)
        except SpecError as failure:  # nothing fits, or choices that do not go together
            error = failure
        point = (number, dict(ask.params), dict(ask.distributions))
        if isinstance(error, NoFitError):
            found = Proposal(*point, constraints={"fit": error.ratio}, outcome="infeasible")
        elif error is not None:
            found = Proposal(*point, outcome="invalid")
        else:
            found = self._check(Proposal(*point, spec, spec.fingerprint()), spec, known)
        if error is not None:
            found = replace(found, error=str(error))
        for name, ratio in found.constraints.items():
            ask.set_constraint(name, ratio)
        if found.outcome is not None:  # the next try learns from it
            study.tell(ask, state=TrialState.PRUNED)
        return found

    def _check(self, found: Proposal, spec: ModelSpec, known: Mapping[str, int]) -> Proposal:
        found = replace(found, constraints=excesses(spec, self.budget))
        if largest_excess(spec, self.budget) > 0:
            error = describe_excess(spec, self.budget)
            return replace(found, outcome="infeasible", error=error)
        if (same := known.get(found.fingerprint)) is not None:
            return replace(found, outcome="reused", same_as=same)
        return found


def expected_gains(earlier: Sequence[EarlierTrial]) -> dict[int, tuple[float, float]]:
    """By rungs climbed, what the rungs above added to the loss: mean and standard deviation."""
    whole = [one.losses for one in earlier if one.complete]
    if len(whole) < STARTUP:
        return {}
    changes = {
        rung: [losses[-1] - losses[rung - 1] for losses in whole]
        for rung in range(1, len(whole[0]))
    }
    return {rung: (fmean(found), stdev(found)) for rung, found in changes.items()}


def may_join_front(losses: Sequence[float], others: Point, earlier: Sequence[EarlierTrial]) -> bool:
    """Whether a model could still join the front of those that climbed to the last rung.

    It is granted what the rungs above brought others, and a standard deviation of that on top.
    """
    gains = expected_gains(earlier)
    if len(losses) not in gains:
        return True
    mean, deviation = gains[len(losses)]
    hoped = (losses[-1] + mean - MARGIN * deviation, *others)
    return not any(
        dominates((one.losses[-1], *one.others), hoped) for one in earlier if one.complete
    )
