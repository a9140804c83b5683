"""Open values of a spec: it may leave values to a search, and one size to the budget.

An open value is written in the place of the value, as a mapping with the single key ``search``
(a *search value*) or ``fit`` (a *fit value*)::

    capacity: {search: {low: 0.3, high: 1.0, step: 0.1, default: 0.7}}
    steps: {search: {choices: [1, 2, 4], default: 4, name: steps}}
    blocks: {search: {choices: {plain: [...], loop: [...]}, default: plain}}
    dim: {fit: {multiple_of: 64, default: 1024, low: 64, high: 8192}}

Search values with the same ``name`` always take the same value. Without ``name``, the name of a
search value is its place, such as ``blocks.1.capacity``, or ``blocks[loop].1.capacity`` inside the
choice labelled ``loop``. The functions here take and return trees of plain data.
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


class _Reader:
    """Reads the open values of a tree and collects the problems that they have."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.distributions: dict[str, Distribution] = {}
        self.places: list[tuple[str, Path]] = []
        self.fits: list[tuple[Path, Fit]] = []
        self.problems: list[Problem] = []

    def add_problem(self, place: str, path: Path, message: str) -> None:
        """Adds a problem. Raises SpecError if there are more than MAX_PROBLEMS."""
        self.problems.append(Problem(place, message, self.tree.position(path)))
        if len(self.problems) > MAX_PROBLEMS:
            raise SpecError(self.problems)

    def raise_problems(self) -> None:
        """Raises SpecError if there was any problem, also for a second fit value."""
        for path, _ in self.fits[1:]:
            first = self.tree.position(self.fits[0][0])
            message = f"is a second fit value; only one is allowed and the first is at {first}"
            self.add_problem("", path, message)
        if self.problems:
            raise SpecError(self.problems)

    def read(
        self, value: dict[str, Any], path: Path, place: str
    ) -> tuple[str, Distribution] | None:
        """Reads the open value at ``path``.

        Returns the name and the distribution of a search value. Returns None for a fit value and
        for a wrong one, after adding the problem.
        """
        key = next(key for key in KEYS if key in value)
        if len(value) > 1:
            others = ", ".join(repr(other) for other in value if other != key)
            message = f"{key!r} must be the only key here, but there is also {others}"
            self.add_problem(place, path, message)
        elif not isinstance(value[key], dict):
            message = f"must be a mapping such as {{default: ...}}, got {describe(value[key])}"
            self.add_problem(f"{place}.{key}", (*path, key), message)
        elif distribution := self.model(value[key], (*path, key), f"{place}.{key}"):
            if not isinstance(distribution, Fit):
                return self.named(distribution, path, place)
            self.fits.append((path, distribution))
        return None

    def model(self, body: dict[str, Any], path: Path, place: str) -> Distribution | Fit | None:
        """Validates the settings of an open value; returns None after adding its problems."""
        kind: type[Distribution | Fit] = Range if "low" in body or "high" in body else Choice
        kind = Fit if path[-1] == "fit" else kind
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            for loc, message in explain(error, kind.model_fields):
                self.add_problem(".".join(map(str, (place, *loc))), (*path, *loc), message)
            return None

    def named(self, distribution: Distribution, path: Path, place: str) -> tuple[str, Distribution]:
        """Registers a search value under its name, which defaults to its place."""
        name = distribution.name or place
        self.places.append((name, path))
        known = self.distributions.setdefault(name, distribution)
        if known is not distribution and _as_json(known) != _as_json(distribution):
            message = f"another search value is named {name!r} and has other settings"
            self.add_problem(place, path, message)
        return name, distribution

    def visit(self, value: Any, path: Path, place: str) -> None:
        """Reads every open value in ``value``, and in each subtree of each choice."""
        if named := self.read(value, path, place) if _is_open(value) else None:
            self.visit_each(_subtrees(named[1]), path, place)
            return
        for part, item in _children(value):
            self.visit(item, (*path, part), _join(place, part))

    def visit_each(self, subtrees: dict[str, Any], path: Path, place: str) -> None:
        """Reads the subtrees of a choice.

        Only one subtree is ever chosen, so each may have a fit value. Of the lists of fit values,
        the longest is kept, so that two in one subtree are found.
        """
        before, longest = self.fits, list[tuple[Path, Fit]]()
        for label, subtree in subtrees.items():
            self.fits = []
            self.visit(subtree, _path_inside(path, label), f"{place}[{label}]")
            longest = max(longest, self.fits, key=len)
        self.fits = before + longest


def _is_open(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in KEYS)


def _children(value: Any) -> Iterable[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def _join(place: str, part: str | int) -> str:
    return f"{place}.{part}" if place else str(part)


def _path_inside(path: Path, label: str) -> Path:
    return (*path, "search", "choices", label)


def _subtrees(distribution: Distribution) -> dict[str, Any]:
    return distribution.subtrees if isinstance(distribution, Choice) else {}


def _as_json(distribution: Distribution) -> str:
    # This is compared instead of the objects, because 1 == True in Python.
    return json.dumps(distribution.model_dump(), sort_keys=True)


def find(tree: Tree) -> dict[str, Distribution]:
    """Returns the distribution of every search value by name, in every subtree of every choice.

    Raises SpecError with all problems of all open values.
    """
    return _read_all(tree).distributions


def places(tree: Tree) -> list[tuple[str, Path]]:
    """Returns the name and the path of every search value; a shared name is listed once per place.

    Raises SpecError with all problems of all open values.
    """
    return _read_all(tree).places


def find_fit(tree: Tree) -> tuple[Path, Fit] | None:
    """Returns the path and the settings of the fit value, or None if there is none.

    Raises SpecError with all problems of all open values.
    """
    fits = _read_all(tree).fits
    return fits[0] if fits else None


def _read_all(tree: Tree) -> _Reader:
    reader = _Reader(tree)
    reader.visit(tree.value, (), "")
    reader.raise_problems()
    return reader


def defaults(name: str, distribution: Distribution) -> Any:
    """The argument ``pick`` of `fill` that gives every search value its default."""
    return distribution.default


def fill(tree: Tree, pick: Pick) -> Tree:
    """Returns the tree with a value in the place of every search value that is still reachable.

    A search value is reachable unless it lies in a subtree that was not chosen. ``pick(name,
    distribution)`` is called once for each reachable name and returns the value, or the label of
    the chosen subtree. Each value gets the position of the search value in the file; subtrees keep
    their own positions. Raises SpecError if a distribution does not contain the picked value.
    """
    filling = _Filling(_Reader(tree), pick)
    value = filling.fill(tree.value, (), "", ())
    filling.reader.raise_problems()
    return Tree(value, filling.positions)


def fill_some(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """Returns the tree with only the named search values filled.

    The other search values stay, and keep their names. Raises SpecError as `fill` does.
    """
    filling = _Filling(
        _Reader(tree), lambda name, distribution: values[name], keep=lambda n: n not in values
    )
    value = filling.fill(tree.value, (), "", ())
    filling.reader.raise_problems()
    return Tree(value, filling.positions)


class _Filling:
    """Fills the search values of a tree, except those for whose name ``keep`` returns True."""

    def __init__(
        self, reader: _Reader, pick: Pick, keep: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.reader = reader
        self.pick = pick
        self.keep = keep
        self.picked: dict[str, Any] = {}
        self.positions: dict[Path, Position] = {}

    def fill(self, value: Any, path: Path, place: str, target: Path) -> Any:
        """Returns what replaces ``value``, which was at ``path`` and will be at ``target``."""
        if position := self.reader.tree.position(path):
            self.positions[target] = position
        named = self.reader.read(value, path, place) if _is_open(value) else None
        if named and self.keep(named[0]):
            return {"search": value["search"] | {"name": named[0]}}
        if named:
            return self.fill_picked(*named, path, place, target)
        parts = {
            part: self.fill(item, (*path, part), _join(place, part), (*target, part))
            for part, item in _children(value)
        }
        if isinstance(value, dict):
            return parts
        return list(parts.values()) if isinstance(value, list) else value

    def fill_picked(
        self, name: str, distribution: Distribution, path: Path, place: str, target: Path
    ) -> Any:
        """Returns the value that was picked for ``name``, or the filled subtree of that label."""
        try:
            if name not in self.picked:
                self.picked[name] = distribution.take(self.pick(name, distribution))
        except ValueError as error:
            self.reader.add_problem(place, path, str(error))
            return None
        value = self.picked[name]
        if subtrees := _subtrees(distribution):
            return self.fill(
                subtrees[value], _path_inside(path, value), f"{place}[{value}]", target
            )
        return value


def replace(tree: Tree, path: Path, value: Any) -> Tree:
    """Returns the tree with a plain value at ``path``; it gets the position of the old value."""
    return put(tree, path, at_position(value, tree.position(path)))
