"""How much of the differences between trials may come from the seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import stdev, variance
from typing import Any

from archdsl.search.analysis.comparison import ComparisonEntry, objectives
from archdsl.search.analysis.proxy_validation import distinct_models, loss_of
from archdsl.search.study.trial import Trial
from archdsl.search.trials.proxy import Proxy

LEAST = 3  # models, for a spread between them
MOSTLY = 0.5  # share of the variance between trials above which most of it is noise
SURELY = 1.96 * math.sqrt(2)  # standard deviations by which two trainings of one model may differ


@dataclass(frozen=True)
class Noise:
    """The spread of the objective between trials and between seeds, in nats.

    ``between_trials`` is the standard deviation over the different models that reached the last
    rung, each trained with one seed. ``between_seeds`` is that of one model over seeds, pooled over
    the models of the comparison. ``near`` is the number of other trials whose distance from the
    best one could come from the seed alone, ``others`` the number of all other trials.
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
                f"deviation), and one model by {self.between_seeds:.3f} nats from seed to seed, so "
                "the ranking of the trials and the importance of the choices are mostly noise."
            )
        if self.near:
            return (
                f"The seed alone may order the best trial and {self.near} of the {self.others} "
                f"others: one model differs by {self.between_seeds:.3f} nats (standard deviation) "
                "from seed to seed."
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"share": self.share, "sentence": self.sentence()}


def noise(
    trials: Sequence[Trial], entries: Sequence[ComparisonEntry], proxy: Proxy
) -> Noise | None:
    """Measure both spreads; None with fewer than three models or with one seed."""
    losses = sorted(loss_of(trial) for trial in distinct_models(trials))
    by_model = [objectives(entry, proxy) for entry in entries if not entry.error]
    several = [found for found in by_model if len(found) > 1 and all(map(math.isfinite, found))]
    if len(losses) < LEAST or not several:
        return None
    degrees = [len(found) - 1 for found in several]
    pooled = sum(n * variance(found) for n, found in zip(degrees, several, strict=True))
    seeds = math.sqrt(pooled / sum(degrees))
    near = sum(loss - losses[0] <= SURELY * seeds for loss in losses[1:])
    return Noise(stdev(losses), seeds, near, len(losses) - 1)
