"""Pareto fronts of points whose coordinates are all minimized: dominance and hypervolume.

Shapes: N is the number of points, and A is the number of axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

Point = tuple[float, ...]


def dominates(one: Point, other: Point) -> bool:
    """Whether ``one`` is at most ``other`` in every coordinate, and the points are not equal."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other point dominates, sorted by the first axis.

    If several points are equal, only the first of them is returned.
    """
    kept = [
        i
        for i, point in enumerate(points)
        if point not in points[:i] and not any(dominates(other, point) for other in points)
    ]
    return sorted(kept, key=lambda i: points[i])


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the volume between the points and ``reference``; a higher volume is better.

    Points that are not below ``reference`` in every coordinate are ignored. The algorithm cuts the
    volume into slices along the last axis (Knowles 2002). It takes O(N^A) time, so it is meant for
    fronts of tens of points.
    """
    below = [p for p in points if all(a < r for a, r in zip(p, reference, strict=True))]
    if len(reference) == 1:
        return max((reference[0] - p[0] for p in below), default=0.0)
    rising = sorted(below, key=itemgetter(-1))
    ends = [*(p[-1] for p in rising), reference[-1]][1:]
    return sum(
        (end - point[-1]) * hypervolume([p[:-1] for p in rising[: i + 1]], reference[:-1])
        for i, (point, end) in enumerate(zip(rising, ends, strict=True))
        if end > point[-1]
    )
