"""Whether a space holds models that keep to the budget, before anything is trained."""

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
from archdsl.search.space.optuna_space import starting_points

WHOLE = 256  # points of a space that is tried whole
SAMPLE = 64  # points tried of one that is larger, before it is refused


class NothingFitsError(ArchdslError):
    """No model of the space keeps to the budget, or none could be trained."""


@dataclass(frozen=True)
class TriedPoint:
    """A point of the space and its model.

    ``spec``: where no size fits, that of the least; None where the choices do not go together.
    ``misses``: the limits that it breaks. ``error``: in words, what is wrong.
    """

    point: Point
    spec: ModelSpec | None = None
    misses: dict[str, LimitUse] = field(default_factory=dict)
    error: str = ""

    @property
    def fits(self) -> bool:
        return self.spec is not None and not self.misses

    @property
    def miss(self) -> float:
        """By what shares of its limits it breaks them, in all."""
        if self.spec is None:
            return math.inf
        return sum(found.ratio for found in self.misses.values())


@dataclass(frozen=True)
class Survey:
    """What is known of a space from the points that were tried.

    ``size``: points of the space; None where it is continuous. ``invalid``: points whose choices
    do not go together. ``models``: of those that fit, each once. ``closest``: where none fits, the
    point that comes closest, in words.
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
        return self.tried == self.size

    @property
    def distinct(self) -> int:
        return len(self.models)

    @property
    def share(self) -> float:
        """Of the points tried, those that fit."""
        return self.feasible / self.tried


def _filled(tree: Tree, point: Point) -> Tree:
    return fill(tree, lambda name, _: point[name])


def try_point(tree: Tree, point: Point, budget: Budget) -> TriedPoint:
    """The model of a point, and how it keeps to the budget."""
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
    """What fits, of all points of the space or of ``limit`` of them."""
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


def require_feasible(tree: Tree, budget: Budget) -> ModelSpec:
    """The first model that is found to fit, at best that of the defaults.

    A space of many points is also searched downhill from the point that comes closest. Raises
    NothingFitsError if none fits, and SpecError for a mistake in the space.
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
    """The pure models, all of which are to be right: a mistake shows in them. Then other points."""
    pure = [try_point(tree, point, budget) for point in starting_points(tree)]
    for one in pure:
        if one.spec is None:
            fitted(_filled(tree, one.point), budget)  # raises what is wrong, with its place
    yield from pure
    count = space_size(tree)
    limit = WHOLE if count is not None and count <= WHOLE else SAMPLE
    for point in points(tree, limit, seed=0):
        yield try_point(tree, point, budget)


def _downhill(tree: Tree, closest: TriedPoint, budget: Budget) -> TriedPoint:
    """Improves one search value after the other, until a point is feasible or nothing helps."""
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
    """The point with other values of one search value: each choice, or both ends of the range."""
    if name not in point:  # another choice took it out of reach
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
    """A point by what differs from the defaults."""
    usual = point_from(tree, defaults)
    others = [f"{n}={dump_inline(v)}" for n, v in point.items() if n not in usual or usual[n] != v]
    return f"with {', '.join(others)}" if others else "with every default"


def _needed_limits(closest: TriedPoint) -> str:
    return " and ".join(
        f"{name} of at least {math.ceil(found.spent):,}" for name, found in closest.misses.items()
    )
