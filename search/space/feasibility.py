"""Check before any training whether a search space contains models that fit the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from archdsl.errors import ArchdslError, SpecError
from archdsl.lang.budget import LimitUse, describe_excess, limit_uses
from archdsl.lang.load import NoFitError, fitted
from archdsl.lang.source import Tree, dump_inline
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.lang.template import Choice, Distribution, defaults, fill, find
from archdsl.search.space.enumerate import Point, point_from, points, space_size
from archdsl.search.space.model_summary import model_summary
from archdsl.search.space.optuna_space import starting_points

FEW = 16  # a space with at most this many points is tried to see whether it has several models
WHOLE = 256  # a space with at most this many points is tried completely
SAMPLE = 64  # the number of random points that are tried of a larger space


class NothingFitsError(ArchdslError):
    """No model of the space fits the budget, or no model could be trained."""


class NothingToSearchError(ArchdslError):
    """The space has only one model, or only one of its models keeps to the budget."""

    exit_status = 2


@dataclass(frozen=True)
class TriedPoint:
    """A point of the space and its model.

    ``spec``: the model. If no size fits the budget, it is the model of the smallest size. It is
    None if the choices of the point cannot be combined. ``misses``: the limits that the model
    exceeds, by name. ``error``: a message that says what is wrong.
    """

    point: Point
    spec: ModelSpec | None = None
    misses: dict[str, LimitUse] = field(default_factory=dict)
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether the point has a model and the model is within all limits."""
        return self.spec is not None and not self.misses

    @property
    def miss(self) -> float:
        """The sum of the relative excesses over all exceeded limits; infinite without a model.

        For example, 0.1 means that the model exceeds one limit by 10 percent of that limit.
        """
        if self.spec is None:
            return math.inf
        return sum(found.ratio for found in self.misses.values())


@dataclass(frozen=True)
class Survey:
    """What is known about a space from the points that were tried.

    ``size``: the number of points of the space; None if it is continuous. ``tried``: the number of
    points that were tried. ``feasible``: how many of them fit the budget. ``invalid``: how many of
    them have choices that cannot be combined. ``models``: the different models that fit.
    ``closest``: a description of the point with the least excess; empty if a point fits.
    ``miss``: the excess of that point, as in ``TriedPoint.miss``.
    """

    size: int | None
    tried: int
    feasible: int
    invalid: int
    models: tuple[ModelSpec, ...]
    closest: str = ""
    miss: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether all points of the space were tried."""
        return self.tried == self.size

    @property
    def distinct(self) -> int:
        """The number of different models that fit the budget."""
        return len(self.models)

    @property
    def share(self) -> float:
        """The fraction of the tried points that fit the budget, from 0 to 1."""
        return self.feasible / self.tried


def _filled(tree: Tree, point: Point) -> Tree:
    return fill(tree, lambda name, _: point[name])


def try_point(tree: Tree, point: Point, budget: Budget) -> TriedPoint:
    """Build the spec of a point and compare it with the budget; an invalid point has no spec."""
    try:
        spec = fitted(_filled(tree, point), budget)
    except NoFitError as error:
        spec, said = error.least, error.problems[0].message
    except SpecError as error:
        return TriedPoint(point, error=str(error))
    else:
        said = describe_excess(spec, spec.budget or budget)
    limits = limit_uses(spec, spec.budget or budget)
    return TriedPoint(
        point, spec, {n: found for n, found in limits.items() if found.ratio > 0}, said
    )


def survey(tree: Tree, budget: Budget, limit: int = WHOLE, seed: int = 0) -> Survey:
    """Find out which points fit, among all points of the space or a sample of ``limit`` points."""
    found = [try_point(tree, point, budget) for point in points(tree, limit, seed)]
    fitting = [one.spec for one in found if one.fits and one.spec]
    closest = min(found, key=lambda one: one.miss)
    return Survey(
        size=space_size(tree),
        tried=len(found),
        feasible=len(fitting),
        invalid=sum(one.spec is None for one in found),
        models=tuple({spec.fingerprint(): spec for spec in fitting}.values()),
        closest="" if fitting else f"{_describe_point(tree, closest.point)}: {closest.error}",
        miss=closest.miss,
    )


def require_choice(tree: Tree, budget: Budget) -> None:
    """Raise NothingToSearchError if the space is so small that only one model can be tried."""
    size = space_size(tree)
    if size is None or size > FEW:
        return
    found = survey(tree, budget)
    if found.distinct != 1:
        return
    why = (
        "it leaves no value open, so it is one model"
        if size == 1
        else f"of its {size} points only one model keeps to the budget: {found.models[0].name}, "
        f"{model_summary(found.models[0])}"
    )
    raise NothingToSearchError(
        f"there is nothing to search in this space: {why}. `archdsl ablate` compares one model "
        "with its baselines, and `archdsl train` trains it"
    )


def require_feasible(tree: Tree, budget: Budget) -> ModelSpec:
    """Return the first model that is found to fit the budget. The defaults are tried first.

    If a space is too large to be tried completely, a local search also starts at the tried point
    with the least excess. Raises NothingFitsError if no tried model fits. Raises SpecError if the
    space contains a mistake.
    """
    missed: list[TriedPoint] = []
    for one in _candidates(tree, budget):
        if one.spec and one.fits:
            return one.spec
        missed.append(one)
    closest = min(missed, key=lambda one: one.miss)
    count = space_size(tree)
    whole = count is not None and count <= WHOLE
    if not whole:
        closest = _downhill(tree, closest, budget)
        if closest.spec and closest.fits:
            return closest.spec
    which = f"none of its {count:,} points" if whole else f"none of the {len(missed)} points tried"
    raise NothingFitsError(
        f"no model of this space keeps to the budget: {which} does; the closest, "
        f"{_describe_point(tree, closest.point)}: {closest.error}; it would fit "
        f"with {_needed_limits(closest)}"
    )


def _candidates(tree: Tree, budget: Budget) -> Iterator[TriedPoint]:
    """Yield the starting points, and then all points of the space or a random sample.

    Raises SpecError if a starting point is invalid, because this shows a mistake in the space.
    """
    pure = [try_point(tree, point, budget) for point in starting_points(tree)]
    for one in pure:
        if one.spec is None:
            fitted(_filled(tree, one.point), budget)  # raises the error, with its position
    yield from pure
    count = space_size(tree)
    limit = WHOLE if count is not None and count <= WHOLE else SAMPLE
    for point in points(tree, limit, seed=0):
        yield try_point(tree, point, budget)


def _downhill(tree: Tree, closest: TriedPoint, budget: Budget) -> TriedPoint:
    """Change one search value after another to reduce the excess (coordinate descent).

    Return the first point that fits, or the last point if no further change reduces the excess.
    """
    distributions = find(tree)
    while True:
        before = closest.miss
        for name in list(closest.point):
            for point in _neighbours(tree, closest.point, name, distributions[name]):
                closest = min(closest, try_point(tree, point, budget), key=lambda one: one.miss)
                if closest.fits:
                    return closest
        if closest.miss == before:
            return closest


def _neighbours(tree: Tree, point: Point, name: str, distribution: Distribution) -> Iterable[Point]:
    """Yield the point with each other choice of a search value, or with both ends of its range."""
    if name not in point:  # the present choices do not use this search value
        return
    for value in (
        distribution.choices
        if isinstance(distribution, Choice)
        else (distribution.low, distribution.high)
    ):
        if value != point[name]:
            yield point_from(tree, partial(_or_default, point | {name: value}))


def _or_default(point: Point, name: str, distribution: Distribution) -> Any:
    return point.get(name, distribution.default)


def _describe_point(tree: Tree, point: Point) -> str:
    """Describe a point by the values that differ from the defaults."""
    usual = point_from(tree, defaults)
    others = [f"{n}={dump_inline(v)}" for n, v in point.items() if n not in usual or usual[n] != v]
    return f"with {', '.join(others)}" if others else "with every default"


def _needed_limits(closest: TriedPoint) -> str:
    return " and ".join(
        f"{name} of at least {math.ceil(found.spent):,}" for name, found in closest.misses.items()
    )
