"""Is one list of losses lower than another? Paired by seed, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

# 97.5% quantiles of Student's t by degrees of freedom (Abramowitz & Stegun, table 26.10)
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Verdict = Literal["lower", "higher", "cannot tell"]


@dataclass(frozen=True)
class Difference:
    """Mean of control - winner in nats, and the half-width of its 95% t-interval."""

    mean: float
    half_width: float
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """What the winner's loss is, beside the control's."""
        if abs(self.mean) <= self.half_width:
            return "cannot tell"
        return "lower" if self.mean > 0 else "higher"

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        width = f" ± {self.half_width:.3f}" if math.isfinite(self.half_width) else ", one seed"
        return f"{self.mean:+.3f}{width}"


def paired(control: Sequence[float], winner: Sequence[float]) -> Difference:
    """``control`` - ``winner``, seed by seed."""
    gaps = [c - w for c, w in zip(control, winner, strict=True)]
    n = len(gaps)
    if not all(math.isfinite(gap) for gap in gaps):  # a run diverged
        return Difference(math.inf, math.inf, n)
    if n < 2:
        return Difference(fmean(gaps), math.inf, n)
    quantile = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1]
    return Difference(fmean(gaps), quantile * stdev(gaps) / math.sqrt(n), n)


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation (tau-a) between two scores of the same trials; None below three."""
    if len(pairs) < 3:
        return None
    agree = [
        math.copysign(1, (a - c) * (b - d)) if (a - c) * (b - d) else 0.0
        for i, (a, b) in enumerate(pairs)
        for c, d in pairs[:i]
    ]
    return fmean(agree)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Middle and half of the range."""
    return (min(values) + max(values)) / 2, (max(values) - min(values)) / 2
