"""Validation of the supernets: do they rank models as separate trainings do?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from archdsl.search.analysis.proxy_validation import Run, distinct_models, loss_of, retrain
from archdsl.search.stats.paired import Correlation, kendall_tau
from archdsl.search.stats.pareto import pareto_front
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Proxy

POINTS = 8  # models that are trained separately as well


@dataclass(frozen=True)
class SupernetPoint:
    """A model's loss with the weights of a supernet and after separate training, in nats.

    ``flops`` is the cost of the separate training.
    """

    number: int
    loss: float
    own_loss: float
    flops: float


@dataclass(frozen=True)
class SupernetValidation:
    """Rank correlation between supernet scores and separate trainings.

    ``settings`` is the number of models that supernets scored, ``points`` are those that were
    trained separately as well. ``shared_flops`` is the cost of training the supernets.
    """

    correlation: Correlation
    points: list[SupernetPoint]
    settings: int
    shared_flops: float

    @property
    def alone_flops(self) -> float:
        """The FLOPs of the separate trainings."""
        return sum(point.flops for point in self.points)

    def sentence(self) -> str:
        """Say in plain sentences whether the ranking of the supernets holds."""
        found = f"Kendall's tau is {self.correlation}"
        if self.correlation.tau is None:
            return "Whether supernets rank models as separate trainings do was not tested."
        if self.correlation.is_significant:
            ranking = f"The supernets rank models as separate trainings do: {found}."
        else:
            ranking = f"It is not shown that supernets rank as separate trainings do: {found}."
        each = self.alone_flops / len(self.points)
        return (
            f"{ranking} Training them took {self.shared_flops:.2g} FLOPs for {self.settings} "
            f"models, {self.shared_flops / each:.1f} times the cost of training one separately."
        )

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"alone_flops": self.alone_flops}


def supernet_points(trials: Sequence[Trial], count: int = POINTS) -> list[Trial]:
    """Choose the trials that are trained separately.

    At most half of them are on the Pareto front. Each further one is the trial whose loss is
    farthest from those chosen before.
    """
    every = distinct_models(trials)
    best = [every[i] for i in pareto_front([trial.point for trial in every])]
    chosen = _spread([], best, min(len(best), count // 2))
    return _spread(chosen, every, min(len(every), count))


def _spread(chosen: list[Trial], among: Sequence[Trial], count: int) -> list[Trial]:
    """Extend ``chosen`` to ``count`` trials; if it is empty, start with the lowest loss."""
    chosen = list(chosen)
    while len(chosen) < count:
        rest = [trial for trial in among if trial not in chosen]
        chosen.append(
            max(rest, key=lambda trial: min(abs(loss_of(trial) - loss_of(one)) for one in chosen))
            if chosen
            else min(rest, key=loss_of)
        )
    return chosen


def validate_supernet(
    run: Run,
    trials: Sequence[Trial],
    proxy: Proxy,
    seed: int,
    store: Path,
    shared_flops: float,
) -> SupernetValidation:
    """Train a few trials separately, with the seed of the supernets, and compare the rankings.

    ``run`` runs the trainings. ``shared_flops`` is the cost of training the supernets.
    """
    found = [
        SupernetPoint(
            trial.number, loss_of(trial), own, sum(s.train_flops for s in scores.values())
        )
        for trial, own, scores in retrain(run, supernet_points(trials), proxy, seed, store)
    ]
    correlation = kendall_tau([(point.loss, point.own_loss) for point in found])
    return SupernetValidation(correlation, found, len(distinct_models(trials)), shared_flops)
