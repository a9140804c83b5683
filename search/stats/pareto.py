"""Fronts of points of which every coordinate should be low: dominance and hypervolume.

Shapes: N points, A axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

Point = tuple[float, ...]


def dominates(one: Point, other: Point) -> bool:
    """Nowhere worse, and not the same."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by the first axis; of equal ones the first."""
    kept = [
        i
        for i, point in enumerate(points)
        if point not in points[:i] and not any(dominates(other, point) for other in points)
    ]
    return sorted(kept, key=lambda i: points[i])


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume that the points dominate below ``reference``; higher is better.

    Slices along the last axis (Knowles 2002): O(N^A), for fronts of tens of points.
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
