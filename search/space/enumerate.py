"""The points of a space: how many there are, all of them, or some at random."""

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

Point = dict[str, Any]  # the value of each search value, by name
Tied = frozenset[
    tuple[str, str | None]
]  # the named search values of a subtree, with the chosen label if they have one

TRIES = 50  # for a point that was not drawn before
NOTHING: Mapping[Tied, int] = {frozenset(): 1}


def point_from(tree: Tree, pick: Pick) -> Point:
    """The point that ``pick`` leads to: what it answers, by the names that are asked."""
    point: Point = {}

    def answer(name: str, distribution: Distribution) -> Any:
        point[name] = pick(name, distribution)
        return point[name]

    fill(tree, answer)
    return point


def space_size(tree: Tree) -> int | None:
    """How many points there are: ways to answer all that is asked; None if some are continuous."""
    counts = {
        name: len(distribution.choices) if isinstance(distribution, Choice) else distribution.count
        for name, distribution in find(tree).items()
    }
    whole = {name: count for name, count in counts.items() if count is not None}
    if len(whole) < len(counts):
        return None
    return _Sizes(tree, whole).all()


class _Sizes:
    """Counts points for each choice of the named search values, which may also occur elsewhere.

    So values of named search values are counted at the end, and labels of two places must agree.
    """

    def __init__(self, tree: Tree, counts: Mapping[str, int]) -> None:
        self.distributions, self.counts = find(tree), counts
        self.outermost: list[Path] = []
        self.inside: dict[Path, dict[str, list[Path]]] = {}  # the search values in its subtrees
        self.names: dict[Path, str] = {}
        around: list[Path] = []
        for name, path in places(tree):  # outer search values come before inner ones
            while around and path[: len(around[-1])] != around[-1]:
                around.pop()
            self.names[path], self.inside[path] = name, {}
            if around:
                label = str(path[len(around[-1]) + 2])  # below search, choices
                self.inside[around[-1]].setdefault(label, []).append(path)
            else:
                self.outermost.append(path)
            around.append(path)

    def all(self) -> int:
        return sum(
            n * prod(self.counts[name] for name, label in tied if label is None)
            for tied, n in self.of_all(self.outermost).items()
        )

    def of_all(self, paths: list[Path]) -> Mapping[Tied, int]:
        return reduce(_together, map(self.of, paths), NOTHING)

    def of(self, path: Path) -> Mapping[Tied, int]:
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
    """Points of both; none where a name would have two labels."""
    total: Counter[Tied] = Counter()
    for (tied, n), (also, m) in product(one.items(), other.items()):
        if len(dict(tied | also)) == len(tied | also):
            total[tied | also] += n * m
    return total


def points(tree: Tree, limit: int, seed: int) -> list[Point]:
    """All points of the space if there are at most ``limit``, or else as many different ones.

    They are drawn at random, every value with equal probability; fewer if new ones become rare.
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
    """Counts through all points like an odometer, with one wheel for each search value."""
    wheels: list[int] | None = []
    while wheels is not None:
        turn = _Turn(wheels)
        yield point_from(tree, turn.pick)
        wheels = turn.next()


class _Turn:
    """One reading of an odometer whose first wheels are set, the others at 0."""

    def __init__(self, wheels: list[int]) -> None:
        self.wheels, self.asked = wheels, list[int]()

    def pick(self, name: str, distribution: Distribution) -> Any:
        values = list(
            distribution.choices if isinstance(distribution, Choice) else distribution.values()
        )
        self.asked.append(len(values))
        self.wheels += [0] * (len(self.asked) - len(self.wheels))
        return values[self.wheels[len(self.asked) - 1]]

    def next(self) -> list[int] | None:
        """The wheels of the next reading; None after the last."""
        wheels = list(self.wheels)
        while wheels and wheels[-1] + 1 == self.asked[len(wheels) - 1]:
            wheels.pop()
        return [*wheels[:-1], wheels[-1] + 1] if wheels else None


def _random(rng: random.Random, distribution: Distribution) -> Any:
    if isinstance(distribution, Choice):
        return rng.choice(list(distribution.choices))
    if distribution.log:
        value = math.exp(rng.uniform(math.log(distribution.low), math.log(distribution.high)))
        value = min(max(value, distribution.low), distribution.high)  # rounding may lead outside
        return round(value) if distribution.is_whole else value
    if distribution.count is None:
        return rng.uniform(distribution.low, distribution.high)
    return distribution.grid(rng.randrange(distribution.count))
