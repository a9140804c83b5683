"""How much of the differences between trials may come from the seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from archdsl.search.analysis.comparison import ComparisonEntry, objectives
from archdsl.search.analysis.proxy_validation import distinct_models, loss_of
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Proxy

LEAST = 3  # trials, for a spread between them
MOSTLY = 0.5  # share of the variance between trials above which most of it is noise
SURELY = 1.96 * math.sqrt(2)  # standard deviations by which equal models may differ


@dataclass(frozen=True)
class Noise:
    """The spread of the objective between trials and between seeds, in nats.

    ``between_trials`` is the standard deviation over the different models that reached the last
    rung, all trained with one seed. ``between_seeds`` is that by which a seed moves one model
    against the others: what a seed does to all models alike changes no ranking. ``near`` is the
    number of other trials whose distance from the best one could come from the seed alone,
    ``others`` the number of all other trials.
    """

    between_trials: float
    between_seeds: float
    near: int
    others: int

    @property
    def share(self) -> float:
        """The share of the variance between trials that seeds alone explain, from 0 to 1."""
        if not self.between_trials:
            return 1.0
        return min(1.0, (self.between_seeds / self.between_trials) ** 2)

    def sentence(self) -> str:
        """Say what of the ranking and of the importance of the choices may be noise."""
        if self.share >= MOSTLY:
            return (
                f"Warning: the trials differ by {self.between_trials:.3f} nats (standard "
                f"deviation), and the seed alone moves a model by {self.between_seeds:.3f} nats "
                "against the others, so the ranking of the trials and the importance of the "
                "choices are mostly noise."
            )
        if self.near:
            return (
                f"The seed alone may order the best trial and {self.near} of the {self.others} "
                f"others: it moves a model by {self.between_seeds:.3f} nats (standard deviation) "
                "against the others."
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"share": self.share, "sentence": self.sentence()}


def noise(
    trials: Sequence[Trial], entries: Sequence[ComparisonEntry], proxy: Proxy
) -> Noise | None:
    """Measure both spreads; None with fewer than three trials, or without two models and seeds."""
    losses = sorted(loss_of(trial) for trial in distinct_models(trials))
    seeds = _between_seeds([objectives(one, proxy) for one in entries if not one.error])
    if len(losses) < LEAST or seeds is None:
        return None
    near = sum(loss - losses[0] <= SURELY * seeds for loss in losses[1:])
    return Noise(stdev(losses), seeds, near, len(losses) - 1)


def _between_seeds(by_model: Sequence[Sequence[float]]) -> float | None:
    """Return the residual standard deviation of losses by model and seed.

    It is what is left when the means of the models and of the seeds are taken out. Models count
    that have as many seeds as the first one, the winner.
    """
    count = len(by_model[0]) if by_model else 0
    whole = [row for row in by_model if len(row) == count and all(map(math.isfinite, row))]
    degrees = (len(whole) - 1) * (count - 1)
    if degrees < 1:
        return None
    centred = [[loss - fmean(row) for loss in row] for row in whole]
    of_seeds = [fmean(column) for column in zip(*centred, strict=True)]
    squares = ((x - y) ** 2 for row in centred for x, y in zip(row, of_seeds, strict=True))
    return math.sqrt(sum(squares) / degrees)
