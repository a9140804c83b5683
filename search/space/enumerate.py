"""Count the points of a search space, and list all of them or a random sample.

A point gives a value to each search value that is needed to build one model.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import product
from math import prod
from typing import Any

from archdsl.lang.source import Path, Tree
from archdsl.lang.template import Choice, Distribution, Pick, fill, find, places

Point = dict[str, Any]  # the chosen value of each search value, by name
# The named search values of a subtree, each with its chosen label. The label is None if the
# search value has no subtrees to choose from.
Tied = frozenset[tuple[str, str | None]]

TRIES = 50  # the largest number of random points that are tried for each wanted point
NOTHING: Mapping[Tied, int] = {frozenset(): 1}


def point_from(tree: Tree, pick: Pick) -> Point:
    """Return the point that results if ``pick`` chooses each search value.

    The point holds only the search values that the chosen subtrees contain, by name.
    """
    point: Point = {}

    def answer(name: str, distribution: Distribution) -> Any:
        point[name] = pick(name, distribution)
        return point[name]

    fill(tree, answer)
    return point


def space_size(tree: Tree) -> int | None:
    """Return the number of points of the space; None if a search value is continuous."""
    counts = {
        name: len(distribution.choices) if isinstance(distribution, Choice) else distribution.count
        for name, distribution in find(tree).items()
    }
    whole = {name: count for name, count in counts.items() if count is not None}
    if len(whole) < len(counts):
        return None
    return _Sizes(tree, whole).all()


class _Sizes:
    """Count the points of a space in which a named search value may occur in several places.

    A named search value has the same value in all its places. Therefore the points are counted
    separately for each choice of labels of the named search values, and two subtrees are combined
    only if their labels agree. The values of named search values without labels are counted last.
    """

    def __init__(self, tree: Tree, counts: Mapping[str, int]) -> None:
        self.distributions, self.counts = find(tree), counts
        self.outermost: list[Path] = []
        self.inside: dict[Path, dict[str, list[Path]]] = {}  # paths inside, by label
        self.names: dict[Path, str] = {}
        around: list[Path] = []
        for name, path in places(tree):  # outer ones come before inner ones
            while around and path[: len(around[-1])] != around[-1]:
                around.pop()
            self.names[path], self.inside[path] = name, {}
            if around:
                label = str(path[len(around[-1]) + 2])  # after search, choices
                self.inside[around[-1]].setdefault(label, []).append(path)
            else:
                self.outermost.append(path)
            around.append(path)

    def all(self) -> int:
        """Return the number of points of the whole space."""
        return sum(
            n * prod(self.counts[name] for name, label in tied if label is None)
            for tied, n in self.of_all(self.outermost).items()
        )

    def of_all(self, paths: list[Path]) -> Mapping[Tied, int]:
        """Return the number of points of several search values together, by ``Tied``."""
        return reduce(_together, map(self.of, paths), NOTHING)

    def of(self, path: Path) -> Mapping[Tied, int]:
        """Return the number of points of the search value at ``path``, by ``Tied``."""
        name = self.names[path]
        distribution, inside = self.distributions[name], self.inside[path]
        if not isinstance(distribution, Choice) or not distribution.subtrees:
            return (
                {frozenset({(name, None)}): 1}
                if distribution.name
                else {frozenset(): self.counts[name]}
            )
        total: Counter[Tied] = Counter()
        for label in distribution.subtrees:
            own: Tied = frozenset({(name, label)} if distribution.name else ())
            total.update(_together({own: 1}, self.of_all(inside.get(label, []))))
        return total


def _together(one: Mapping[Tied, int], other: Mapping[Tied, int]) -> Mapping[Tied, int]:
    """Count the combinations of both parts, without those in which a name has two labels."""
    total: Counter[Tied] = Counter()
    for (tied, n), (also, m) in product(one.items(), other.items()):
        if len(dict(tied | also)) == len(tied | also):
            total[tied | also] += n * m
    return total


def points(tree: Tree, limit: int, seed: int) -> list[Point]:
    """Return all points of the space if there are at most ``limit``, or else a random sample.

    The sample has ``limit`` different points, or fewer if new points become rare. Each search value
    is chosen independently: choices have equal probability, ranges are uniform, and ranges with
    ``log`` are uniform in the logarithm.
    """
    count = space_size(tree)
    if count is not None and count <= limit:
        return list(_every(tree))
    rng = random.Random(seed)
    found: dict[str, Point] = {}
    for _ in range(TRIES * limit):
        point = point_from(tree, lambda _, distribution: _random(rng, distribution))
        found.setdefault(json.dumps(point), point)
        if len(found) == limit:
            break
    return list(found.values())


def _every(tree: Tree) -> Iterator[Point]:
    """Yield all points, counting like an odometer that has one wheel for each search value."""
    wheels: list[int] | None = []
    while wheels is not None:
        turn = _Turn(wheels)
        yield point_from(tree, turn.pick)
        wheels = turn.next()


class _Turn:
    """One state of the odometer: the given wheels come first, and all further wheels are at 0."""

    def __init__(self, wheels: list[int]) -> None:
        self.wheels, self.asked = wheels, list[int]()

    def pick(self, name: str, distribution: Distribution) -> Any:
        """Return the value at which the next wheel stands."""
        values = list(
            distribution.choices if isinstance(distribution, Choice) else distribution.values()
        )
        self.asked.append(len(values))
        self.wheels += [0] * (len(self.asked) - len(self.wheels))
        return values[self.wheels[len(self.asked) - 1]]

    def next(self) -> list[int] | None:
        """Return the wheels of the next state; None after the last one."""
        wheels = list(self.wheels)
        while wheels and wheels[-1] + 1 == self.asked[len(wheels) - 1]:
            wheels.pop()
        return [*wheels[:-1], wheels[-1] + 1] if wheels else None


def _random(rng: random.Random, distribution: Distribution) -> Any:
    if isinstance(distribution, Choice):
        return rng.choice(list(distribution.choices))
    if distribution.log:
        value = math.exp(rng.uniform(math.log(distribution.low), math.log(distribution.high)))
        value = min(max(value, distribution.low), distribution.high)  # removes rounding errors
        return round(value) if distribution.is_whole else value
    if distribution.count is None:
        return rng.uniform(distribution.low, distribution.high)
    return distribution.grid(rng.randrange(distribution.count))
