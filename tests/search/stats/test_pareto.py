"""Fronts and hypervolumes against counting on a grid."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archdsl.search.stats.pareto import Point, dominates, hypervolume, pareto_front
from archdsl.search.study.sampler import STARTUP, may_join_front
from archdsl.search.study.trial import Trial

SIDE = 5


def grids(axes: int) -> st.SearchStrategy[list[Point]]:
    return st.lists(st.tuples(*[st.integers(0, SIDE).map(float)] * axes), max_size=7)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3).flatmap(lambda axes: st.tuples(st.just(axes), grids(axes))))
def test_a_hypervolume_is_the_cells_that_some_point_dominates(
    given: tuple[int, list[Point]],
) -> None:
    axes, points = given
    cells = product(range(SIDE), repeat=axes)
    counted = sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points)
        for cell in cells
    )
    assert hypervolume(points, (float(SIDE),) * axes) == counted


@settings(max_examples=60, deadline=None)
@given(grids(2))
def test_a_front_is_what_nothing_dominates(points: list[Point]) -> None:
    chosen = {points[i] for i in pareto_front(points)}
    assert chosen == {p for p in points if not any(dominates(other, p) for other in points)}
    assert len(pareto_front(points)) == len(chosen)


def complete(first: float, last: float, flops: float) -> Trial:
    return Trial(0, {}, losses=(first, last), others=(flops,), outcome="complete")


def test_a_model_goes_on_while_it_could_still_join_the_front() -> None:
    # the second rung takes off 1.0 on average
    known = [
        complete(3.0, 1.9, 10),
        complete(3.0, 2.1, 20),
        complete(4.0, 2.9, 5),
        complete(4.0, 3.1, 6),
    ]
    assert may_join_front((9.0,), (99.0,), known[: STARTUP - 1])  # nothing is known yet
    assert may_join_front((2.9,), (10.0,), known)  # better than the best
    assert may_join_front((9.0,), (4.0,), known)  # cheaper than the cheapest
    assert not may_join_front((2.99,), (10.0,), known)  # no luck is granted
    assert may_join_front((3.2,), (9.0,), known)  # between: the front there is at 2.9
    assert not may_join_front((4.2,), (9.0,), known)


@pytest.mark.parametrize("loss", [2.0, 2.5, 3.0])
def test_without_costs_to_weigh_a_front_is_the_best(loss: float) -> None:
    known = [complete(3.0, 2.0, 0)] * STARTUP
    assert may_join_front((loss,), (0.0,), known) == (loss <= 3.0)
