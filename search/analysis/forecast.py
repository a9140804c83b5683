"""Forecast of what a search would do and cost, estimated from a few short trainings."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from archdsl.lang.budget import limit_uses
from archdsl.lang.source import Tree
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.search.analysis.comparison import comparison_jobs
from archdsl.search.analysis.timing import Speed, Timing, measure_timing
from archdsl.search.space.feasibility import Survey, require_feasible, survey
from archdsl.search.trials.proxy import Proxy
from archdsl.search.trials.scorers import cost_in_trainings
from archdsl.search.workers.pool import Pool

SECONDS = 30.0  # of short trainings
Z = 1.96  # quantile of the normal distribution for a 95% interval


@dataclass(frozen=True)
class Spread:
    """Mean, minimum and maximum of an estimate over the proxies that were measured."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        found = list(values)
        return cls(fmean(found), min(found), max(found))


@dataclass(frozen=True)
class Resources:
    """What a search may use (None: no limit). ``workers`` is the number of parallel trainings."""

    workers: int
    seconds: float | None = None
    trials: int | None = None
    train_flops: float | None = None


@dataclass(frozen=True)
class TrainingCost:
    """The cost of one training on all tasks: seconds of a worker, and training FLOPs."""

    seconds: Spread
    flops: Spread


@dataclass(frozen=True)
class Scenario:
    """The course of a search, including all trainings that must follow its trials.

    ``trials`` is infinite if nothing limits them. ``stops_at`` names what ends the search:
    ``models`` (the space is exhausted), ``trials``, ``time``, ``train_flops``, or nothing.
    """

    trials: float
    seconds: float
    train_flops: float
    stops_at: str


@dataclass(frozen=True)
class SearchForecast:
    """The forecast of a search. Counts, limits and costs of full-size models are exact.

    - ``interval``: 95% interval of the share of feasible points; None if every point was tried.
    - ``kept``: the limits of the budget, each with the least and the most that models use of it.
    - ``trial``, ``stopped``: cost of a trial up to the last rung, and up to the first.
    - ``after``: the cost of what must follow the trials, in trainings of a trial: winner and
      baselines with each seed, and the proxy validation if it is wanted.
    - ``all_promoted``, ``all_stopped``: the course if every trial reaches the last rung, and if
      every trial stops on the first. A search lies between the two.
    """

    survey: Survey
    interval: tuple[float, float] | None
    kept: dict[str, tuple[int, float, float]]
    resources: Resources
    timing: Timing
    trial: TrainingCost
    stopped: TrainingCost
    after: float
    all_promoted: Scenario
    all_stopped: Scenario

    @property
    def seconds_after(self) -> float:
        """The seconds that the trainings after the trials take."""
        return self.after * self.trial.seconds.mean / self.resources.workers

    @property
    def peak_bytes(self) -> int:
        """The largest memory of one worker that was measured."""
        return max(s.peak_bytes for found in self.timing.speeds for s in found.values())

    def as_json(self) -> dict[str, Any]:
        """Return the forecast as JSON values; null for what has no limit."""
        found = self.survey
        return {
            "space": {
                "size": found.size,
                "tried": found.tried,
                "whole": found.whole,
                "feasible": found.feasible,
                "share": found.share,
                "interval": self.interval,
                "invalid": found.invalid,
                "distinct": found.distinct,
            },
            "kept": {
                name: {"limit": limit, "least": least, "most": most}
                for name, (limit, least, most) in self.kept.items()
            },
            "means": asdict(self.resources),
            "calibration": {
                "proxies": len(self.timing.models),
                "seconds": self.timing.seconds,
                "failures": self.timing.failures,
            },
            "estimated": {
                "trial": asdict(self.trial),
                "stopped": asdict(self.stopped),
                "peak_bytes": self.peak_bytes,
                "trainings_after": self.after,
                "seconds_after": self.seconds_after,
                "climbing": _finite(asdict(self.all_promoted)),
                "stopping": _finite(asdict(self.all_stopped)),
            },
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace infinity, which JSON does not have, by None."""
    return {key: None if value == math.inf else value for key, value in values.items()}


def forecast_search(
    pool: Pool,
    tree: Tree,
    budget: Budget,
    proxy: Proxy,
    *,
    seconds: float | None,
    trials: int | None = None,
    seed: int = 0,
    seeds: int = 3,
    wider: int = 0,
    timing: float = SECONDS,
) -> SearchForecast:
    """Survey the space, train some of its proxies briefly, and forecast the search.

    ``seconds``, ``trials`` and the budget's ``train_flops`` limit the search. ``seeds`` is the
    number of seeds of the final comparison, ``wider`` the cost of the proxy validation in
    trainings. ``timing`` are the seconds of short trainings; none of their results is kept.

    Raises SpecError if the space is wrong, NothingFitsError if no model fits the budget, and
    JobFailed if no proxy can be trained.
    """
    fits = require_feasible(tree, budget)
    found = survey(tree, budget, seed=seed)
    resources = Resources(pool.workers, seconds, trials, budget.train_flops)
    with tempfile.TemporaryDirectory(prefix="archdsl-plan-") as folder:
        store = Path(folder)
        measured = measure_timing(
            pool, found.models or (fits,), proxy, store, seconds=timing, seed=seed
        )
        compared = [
            cost_in_trainings(
                comparison_jobs(model, proxy, range(seeds), store, ablate=False).values(),
                proxy,
                model,
            )
            for model in measured.models
        ]
    return forecast_from_timing(
        found, budget, proxy, measured, resources, after=fmean(compared) + wider
    )


def forecast_from_timing(
    found: Survey,
    budget: Budget,
    proxy: Proxy,
    measured: Timing,
    resources: Resources,
    *,
    after: float,
) -> SearchForecast:
    """Forecast a search from measured speeds; what follows the trials costs ``after`` trainings."""
    trial, stopped = _cost(proxy, measured.speeds, proxy.rungs), _cost(proxy, measured.speeds, 1)
    models = found.distinct if found.whole else None
    return SearchForecast(
        survey=found,
        interval=None if found.whole else wilson(found.feasible, found.tried),
        kept=_kept(found.models or measured.models, budget),
        resources=resources,
        timing=measured,
        trial=trial,
        stopped=stopped,
        after=after,
        all_promoted=_course(resources, models, trial, trial, after),
        all_stopped=_course(resources, models, stopped, trial, after),
    )


def _course(
    resources: Resources, models: int | None, each: TrainingCost, whole: TrainingCost, after: float
) -> Scenario:
    """Return the scenario of trials that cost ``each``, then ``after`` trainings of ``whole``."""
    limits: dict[str, float] = {}
    if models is not None:
        limits["models"] = models
    if resources.trials is not None:
        limits["trials"] = resources.trials
    if resources.seconds is not None:
        left = resources.seconds * resources.workers - after * whole.seconds.mean
        limits["time"] = max(0, left // each.seconds.mean)
    if resources.train_flops is not None:
        left = resources.train_flops - after * whole.flops.mean
        limits["train_flops"] = max(0, left // each.flops.mean)
    stops_at = min(limits, key=lambda name: limits[name], default="")
    trials = limits.get(stops_at, math.inf)
    return Scenario(
        trials,
        (trials * each.seconds.mean + after * whole.seconds.mean) / resources.workers,
        trials * each.flops.mean + after * whole.flops.mean,
        stops_at,
    )


def _cost(proxy: Proxy, speeds: list[dict[str, Speed]], rungs: int) -> TrainingCost:
    """Return the cost of a training up to the given number of rungs."""
    steps = {name: task.rungs[rungs - 1] for name, task in proxy.tasks.items()}
    return TrainingCost(
        Spread.of(sum(s.seconds(steps[n], rungs) for n, s in model.items()) for model in speeds),
        Spread.of(sum(s.flops_per_step * steps[n] for n, s in model.items()) for model in speeds),
    )


def _kept(models: Sequence[ModelSpec], budget: Budget) -> dict[str, tuple[int, float, float]]:
    found = [limit_uses(model, model.budget or budget) for model in models]
    return {
        name: (first.limit, *_ends(by_name[name].spent for by_name in found))
        for name, first in found[0].items()
    }


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% interval of a share, by Wilson's score (Wilson 1927).

    >>> [round(x, 3) for x in wilson(9, 10)]
    [0.596, 0.982]
    """
    share, z = successes / trials, Z * Z / trials
    middle = (share + z / 2) / (1 + z)
    half = Z * math.sqrt(share * (1 - share) / trials + z / (4 * trials)) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)
