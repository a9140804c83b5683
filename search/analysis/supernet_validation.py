"""Does a super-net rank models as trainings of their own do?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from archdsl.search.analysis.proxy_validation import retrain
from archdsl.search.stats.paired import Correlation, kendall_tau
from archdsl.search.stats.pareto import pareto_front
from archdsl.search.study.record import Trial
from archdsl.search.trials.proxy import Proxy
from archdsl.search.workers.pool import Pool

POINTS = 8


@dataclass(frozen=True)
class SupernetPoint:
    """A model's loss with the weights of a net, and with its own. ``flops``: of its training."""

    number: int
    loss: float
    own_loss: float
    flops: float


@dataclass(frozen=True)
class SupernetValidation:
    """``settings`` models were scored by nets; ``points`` are those trained alone as well.

    ``shared_flops``: what training the nets took.
    """

    correlation: Correlation
    points: list[SupernetPoint]
    settings: int
    shared_flops: float

    @property
    def alone_flops(self) -> float:
        """What training the points took."""
        return sum(point.flops for point in self.points)

    def sentence(self) -> str:
        """In words."""
        found = f"Kendall's tau is {self.correlation}"
        if self.correlation.tau is None:
            return "Whether the super-nets rank models as trainings of their own do was not tried."
        if self.correlation.is_significant:
            ranking = f"The super-nets rank models as trainings of their own do: {found}."
        else:
            ranking = f"It is not shown that super-nets rank as trainings of their own do: {found}."
        each = self.alone_flops / len(self.points)
        return (
            f"{ranking} They took {self.shared_flops:.2g} FLOPs of training for {self.settings} "
            f"models, {self.shared_flops / each:.1f} times what one took alone."
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"alone_flops": self.alone_flops}


def supernet_points(trials: Sequence[Trial], count: int = POINTS) -> list[Trial]:
    """Models of the front, at most half of the points, then those farthest in loss from the ones
    that are chosen already."""
    models: dict[str, Trial] = {}
    for trial in trials:
        if trial.value is not None:
            models.setdefault(trial.fingerprint, trial)
    every = list(models.values())
    best = [every[i] for i in pareto_front([trial.point for trial in every])]
    chosen = _spread([], best, min(len(best), count // 2))
    return _spread(chosen, every, min(len(every), count))


def _spread(chosen: list[Trial], among: Sequence[Trial], count: int) -> list[Trial]:
    """More of them, up to ``count``; the lowest loss first."""
    chosen = list(chosen)
    while len(chosen) < count:
        rest = [trial for trial in among if trial not in chosen]
        chosen.append(
            max(rest, key=lambda trial: min(abs(_loss(trial) - _loss(one)) for one in chosen))
            if chosen
            else min(rest, key=_loss)
        )
    return chosen


def _loss(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def validate_supernet(
    pool: Pool,
    trials: Sequence[Trial],
    proxy: Proxy,
    seed: int,
    store: Path,
    shared_flops: float,
    may_go_on: Callable[[], bool],
    tell: Callable[[str], None],
) -> SupernetValidation:
    """Trains the points each for itself, with the seed of the nets, as far as it may."""
    found = [
        SupernetPoint(trial.number, _loss(trial), own, sum(s.train_flops for s in scores.values()))
        for trial, own, scores in retrain(
            pool, supernet_points(trials), proxy, seed, store, may_go_on, tell
        )
    ]
    correlation = kendall_tau([(point.loss, point.own_loss) for point in found])
    models = len({trial.fingerprint for trial in trials if trial.value is not None})
    return SupernetValidation(correlation, found, models, shared_flops)
