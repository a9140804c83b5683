"""Compare two lists of losses that are paired by seed, and rankings of the same models."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Literal

import numpy as np

LEVEL = 0.95  # of the intervals
POWER = 0.8
MOST_SEEDS = 1000  # no comparison is worth more

Conclusion = Literal["lower", "higher", "cannot tell"]


@dataclass(frozen=True)
class Difference:
    """The mean loss of the baseline minus that of the winner, over several seeds.

    ``mean``: in nats; infinite if a training diverged. ``half_width``: half the width of its 95%
    t-interval, in nats; infinite with one pair. ``pairs``: the number of seeds. ``deviation``: the
    standard deviation of the differences between seeds.
    """

    mean: float
    half_width: float
    pairs: int
    deviation: float = math.nan

    @property
    def conclusion(self) -> Conclusion:
        """Whether the winner's loss is lower or higher than the baseline's.

        It is "cannot tell" if the 95% interval contains zero.
        """
        if abs(self.mean) <= self.half_width:
            return "cannot tell"
        return "lower" if self.mean > 0 else "higher"

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        width = f" ± {self.half_width:.3f}" if math.isfinite(self.half_width) else ", one seed"
        return f"{self.mean:+.3f}{width}"


def paired(baseline: Sequence[float], winner: Sequence[float], comparisons: int = 1) -> Difference:
    """Return the difference ``baseline`` - ``winner`` of losses in nats, paired by seed.

    ``comparisons``: of how many differences the intervals shall hold together with 95%
    (Bonferroni's correction). Raises ValueError if the lists have different lengths or are empty.
    """
    gaps = [c - w for c, w in zip(baseline, winner, strict=True)]
    n = len(gaps)
    if not all(math.isfinite(gap) for gap in gaps):  # a training diverged
        return Difference(math.inf, math.inf, n)
    if n < 2:
        return Difference(fmean(gaps), math.inf, n)
    deviation = stdev(gaps)
    return Difference(fmean(gaps), half_width(deviation, n, comparisons), n, deviation)


def half_width(deviation: float, n: int, comparisons: int = 1) -> float:
    """Return half the width of the 95% t-interval of the mean of ``n`` values.

    ``deviation``: the standard deviation of the values. ``comparisons``: as in ``paired``.
    """
    return t_quantile(1 - (1 - LEVEL) / 2 / comparisons, n - 1) * deviation / math.sqrt(n)


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution.

    With t = sqrt(degrees) tan(a), the density of the angle a is proportional to
    cos(a)^(degrees - 1), which is integrated here by Simpson's rule. The result is right to five
    digits for probabilities up to 0.9999.
    """
    low, high = 0.0, math.pi / 2
    whole = _cosine_integral(high, degrees)
    for _ in range(44):  # bisection
        middle = (low + high) / 2
        below = 0.5 + 0.5 * _cosine_integral(middle, degrees) / whole
        low, high = (middle, high) if below < probability else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _cosine_integral(angle: float, degrees: int) -> float:
    """Integrate cos(a)^(degrees - 1) from 0 to ``angle``."""
    values = np.cos(np.linspace(0.0, angle, 1001)) ** (degrees - 1)
    weights = np.full(1001, 2.0)
    weights[1::2], weights[[0, -1]] = 4.0, 1.0
    return float(weights @ values) * angle / 3000


def seeds_to_tell(deviation: float, difference: float, comparisons: int) -> int | None:
    """Return the least number of seeds that tell a true difference in about three of four cases.

    ``deviation``: the standard deviation of the difference between seeds. None: more than 1,000.
    """

    def tells(seeds: int) -> bool:
        return told_by(seeds, deviation, comparisons) <= abs(difference)

    numbers = range(2, MOST_SEEDS + 1)  # with more seeds, ever smaller differences are told
    found = bisect_left(numbers, True, key=tells)
    return numbers[found] if found < len(numbers) else None


def told_by(seeds: int, deviation: float, comparisons: int) -> float:
    """Return the least true difference that so many seeds tell in about three of four cases.

    It lies above the half width of the interval by the 80% quantile of the estimate's own error,
    which gives 70% with two seeds and 78% with ten.
    """
    beyond = t_quantile(POWER, seeds - 1) * deviation / math.sqrt(seeds)
    return half_width(deviation, seeds, comparisons) + beyond


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-a of two scores of the same models, with the limits of its 95% interval.

    ``pairs``: the number of models. If it is below three, the other values are None.
    """

    tau: float | None
    low: float | None
    high: float | None
    pairs: int

    @property
    def is_significant(self) -> bool:
        """Whether the whole 95% interval is above zero, the value for unrelated rankings."""
        return self.low is not None and self.low > 0

    def __str__(self) -> str:
        if self.tau is None:
            return f"too few to say ({self.pairs})"
        return f"{self.tau:+.2f} ({self.low:+.2f} to {self.high:+.2f}, {self.pairs} models)"


RESAMPLES = 2000


def kendall_tau(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Correlation:
    """Return the rank correlation between two scores of the same models: Kendall's tau-a.

    A tie counts neither as agreement nor as disagreement. The interval holds the 2.5% and 97.5%
    percentiles of tau over bootstrap samples of the models. A model that occurs twice in a sample
    is a tie with itself, which moves tau towards zero. Therefore the interval is extended, if
    necessary, to contain the tau of the original list.
    """
    n = len(pairs)
    if n < 3:
        return Correlation(None, None, None, n)
    first, second = np.array(pairs, dtype=float).T
    agree = np.sign(np.subtract.outer(first, first)) * np.sign(np.subtract.outer(second, second))
    drawn = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=RESAMPLES)
    tau = float(agree.sum()) / (n * (n - 1))
    resampled = ((drawn @ agree) * drawn).sum(1) / (n * (n - 1))
    low, high = (float(q) for q in np.percentile(resampled, (2.5, 97.5)))
    return Correlation(tau, min(low, tau), max(high, tau), n)
