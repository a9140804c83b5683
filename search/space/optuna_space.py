"""Convert search values to Optuna parameters, and list the points that a search starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from archdsl.lang.source import Tree
from archdsl.lang.template import Choice, Distribution, Range, fill, find

if TYPE_CHECKING:
    import optuna


def suggest(trial: optuna.Trial, name: str, distribution: Distribution) -> Any:
    """Ask Optuna to choose one search value, and return the chosen value."""
    if isinstance(distribution, Choice):
        return trial.suggest_categorical(name, list(distribution.choices))
    if distribution.is_whole:
        low, high, step = int(distribution.low), int(distribution.high), int(distribution.step or 1)
        return trial.suggest_int(name, low, high, step=step, log=distribution.log)
    value = trial.suggest_float(
        name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )
    return _on_grid(distribution, value)


def _on_grid(distribution: Range, value: float) -> float:
    """Remove rounding errors: Optuna's 0.6000000000000001 becomes 0.6 if the range has a step."""
    if distribution.step is None:
        return value
    return float(distribution.grid(round((value - distribution.low) / distribution.step)))


def starting_points(tree: Tree) -> list[dict[str, Any]]:
    """Return the default point, and one further point for each label of a choice of subtrees.

    The point of a label chooses that label in all places where it is available, and the defaults
    elsewhere. Equal points are returned once.
    """
    labels: dict[str, None] = {}
    for distribution in find(tree).values():
        if isinstance(distribution, Choice) and isinstance(distribution.choices, dict):
            labels |= dict.fromkeys(distribution.choices)
    points = [_point(tree, None), *(_point(tree, label) for label in labels)]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def _point(tree: Tree, label: str | None) -> dict[str, Any]:
    picked: dict[str, Any] = {}

    def pick(name: str, distribution: Distribution) -> Any:
        takes = (
            isinstance(distribution, Choice)
            and isinstance(distribution.choices, dict)
            and label in distribution.choices
        )
        picked[name] = label if takes else distribution.default
        return picked[name]

    fill(tree, pick)
    return picked
