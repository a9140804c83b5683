"""What a spec leaves open: search leaves and the fit leaf. Plain data in, plain data out.

A leaf stands where the value would, as a mapping with the single key ``search`` or ``fit``::

    capacity: {search: {low: 0.3, high: 1.0, step: 0.1, default: 0.7}}
    steps: {search: {choices: [1, 2, 4], default: 4, name: steps}}
    blocks: {search: {choices: {plain: [...], loop: [...]}, default: plain}}
    dim: {fit: {multiple_of: 64, default: 1024, low: 64, high: 8192}}

``name`` ties leaves: equal names share one value. Without it a leaf is known by its place, such as
``blocks.1.capacity``, or ``blocks[loop].1.capacity`` inside the choice labelled ``loop``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from archdsl.errors import Position, Problem, SpecError, describe
from archdsl.lang.distributions import Choice, Distribution, Fit, Range
from archdsl.lang.messages import explain
from archdsl.lang.source import Path, Tree, at_position, put
from archdsl.lang.yaml import MAX_PROBLEMS

__all__ = [
    "Choice",
    "Distribution",
    "Fit",
    "Range",
    "defaults",
    "fill",
    "fill_some",
    "find",
    "find_fit",
    "places",
    "replace",
]

KEYS = ("search", "fit")
Pick = Callable[[str, Distribution], Any]


class _Walk:
    """Reads leaves where they stand in a tree and keeps what is wrong with them."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.leaves: dict[str, Distribution] = {}
        self.places: list[tuple[str, Path]] = []
        self.fits: list[tuple[Path, Fit]] = []
        self.problems: list[Problem] = []

    def say(self, place: str, path: Path, message: str) -> None:
        self.problems.append(Problem(place, message, self.tree.position(path)))
        if len(self.problems) > MAX_PROBLEMS:
            raise SpecError(self.problems)

    def finish(self) -> None:
        for path, _ in self.fits[1:]:
            first = self.tree.position(self.fits[0][0])
            self.say("", path, f"a second fit leaf; the first is at {first}, and one is the most")
        if self.problems:
            raise SpecError(self.problems)

    def read(
        self, value: dict[str, Any], path: Path, place: str
    ) -> tuple[str, Distribution] | None:
        """The search leaf that stands here, by name; None for a fit leaf or after a problem."""
        key = next(key for key in KEYS if key in value)
        if len(value) > 1:
            others = ", ".join(repr(other) for other in value if other != key)
            self.say(place, path, f"{key!r} must be the only key here, found beside it: {others}")
        elif not isinstance(value[key], dict):
            message = f"must be a mapping such as {{default: ...}}, got {describe(value[key])}"
            self.say(f"{place}.{key}", (*path, key), message)
        elif leaf := self.model(value[key], (*path, key), f"{place}.{key}"):
            if not isinstance(leaf, Fit):
                return self.named(leaf, path, place)
            self.fits.append((path, leaf))
        return None

    def model(self, body: dict[str, Any], path: Path, place: str) -> Distribution | Fit | None:
        kind: type[Distribution | Fit] = Range if "low" in body or "high" in body else Choice
        kind = Fit if path[-1] == "fit" else kind
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            for loc, message in explain(error, kind.model_fields):
                self.say(".".join(map(str, (place, *loc))), (*path, *loc), message)
            return None

    def named(self, leaf: Distribution, path: Path, place: str) -> tuple[str, Distribution]:
        name = leaf.name or place
        self.places.append((name, path))
        known = self.leaves.setdefault(name, leaf)
        if known is not leaf and _text(known) != _text(leaf):
            self.say(place, path, f"another leaf is called {name!r} and searches other values")
        return name, leaf

    def visit(self, value: Any, path: Path, place: str) -> None:
        """Every leaf in ``value``, in each subtree of each choice, also where a leaf is wrong."""
        if named := self.read(value, path, place) if _is_leaf(value) else None:
            self.visit_each(_subtrees(named[1]), path, place)
            return
        for part, item in _items(value):
            self.visit(item, (*path, part), _join(place, part))

    def visit_each(self, subtrees: dict[str, Any], path: Path, place: str) -> None:
        """Of the fit leaves, those of one subtree: no more than one of them is taken."""
        before, most = self.fits, list[tuple[Path, Fit]]()
        for label, subtree in subtrees.items():
            self.fits = []
            self.visit(subtree, _inside(path, label), f"{place}[{label}]")
            most = max(most, self.fits, key=len)
        self.fits = before + most


def _is_leaf(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in KEYS)


def _items(value: Any) -> Iterable[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def _join(place: str, part: str | int) -> str:
    return f"{place}.{part}" if place else str(part)


def _inside(path: Path, label: str) -> Path:
    return (*path, "search", "choices", label)


def _subtrees(leaf: Distribution) -> dict[str, Any]:
    return leaf.subtrees if isinstance(leaf, Choice) else {}


def _text(leaf: Distribution) -> str:
    # not ==, for which 1 and true are the same
    return json.dumps(leaf.model_dump(), sort_keys=True)


def find(tree: Tree) -> dict[str, Distribution]:
    """Every search leaf that some choice can reach; raises SpecError with all that is wrong."""
    return _walked(tree).leaves


def places(tree: Tree) -> list[tuple[str, Path]]:
    """The name of every search leaf, once for each place that it stands at."""
    return _walked(tree).places


def find_fit(tree: Tree) -> tuple[Path, Fit] | None:
    """The one size that is left to the budget, and its place."""
    fits = _walked(tree).fits
    return fits[0] if fits else None


def _walked(tree: Tree) -> _Walk:
    walk = _Walk(tree)
    walk.visit(tree.value, (), "")
    walk.finish()
    return walk


def defaults(name: str, leaf: Distribution) -> Any:
    """The pick for ``fill`` that searches nothing."""
    return leaf.default


def fill(tree: Tree, pick: Pick) -> Tree:
    """The tree with a value for every search leaf that the values picked so far can reach.

    ``pick`` is asked once for each name; for labelled choices it returns the label. Values keep
    the position of their leaf, subtrees their own. Raises SpecError if a pick is not in its leaf.
    """
    filling = _Filling(_Walk(tree), pick)
    value = filling.fill(tree.value, (), "", ())
    filling.walk.finish()
    return Tree(value, filling.positions)


def fill_some(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """The tree with these leaves filled; the others stay, under the names that they had."""
    filling = _Filling(_Walk(tree), lambda name, leaf: values[name], keep=lambda n: n not in values)
    value = filling.fill(tree.value, (), "", ())
    filling.walk.finish()
    return Tree(value, filling.positions)


class _Filling:
    def __init__(
        self, walk: _Walk, pick: Pick, keep: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.walk = walk
        self.pick = pick
        self.keep = keep
        self.picked: dict[str, Any] = {}
        self.positions: dict[Path, Position] = {}

    def fill(self, value: Any, path: Path, place: str, target: Path) -> Any:
        """What takes the place of ``value``, which stood at ``path`` and goes to ``target``."""
        if position := self.walk.tree.position(path):
            self.positions[target] = position
        named = self.walk.read(value, path, place) if _is_leaf(value) else None
        if named and self.keep(named[0]):
            return {"search": value["search"] | {"name": named[0]}}
        if named:
            return self.chosen(*named, path, place, target)
        parts = {
            part: self.fill(item, (*path, part), _join(place, part), (*target, part))
            for part, item in _items(value)
        }
        if isinstance(value, dict):
            return parts
        return list(parts.values()) if isinstance(value, list) else value

    def chosen(self, name: str, leaf: Distribution, path: Path, place: str, target: Path) -> Any:
        try:
            if name not in self.picked:
                self.picked[name] = leaf.take(self.pick(name, leaf))
        except ValueError as error:
            self.walk.say(place, path, str(error))
            return None
        value = self.picked[name]
        if subtrees := _subtrees(leaf):
            return self.fill(subtrees[value], _inside(path, value), f"{place}[{value}]", target)
        return value


def replace(tree: Tree, path: Path, value: Any) -> Tree:
    """The tree with a plain value at ``path``, in the position of what stood there."""
    return put(tree, path, at_position(value, tree.position(path)))
