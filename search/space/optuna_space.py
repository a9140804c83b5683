"""Search values as parameters of Optuna, and the points that a search starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from archdsl.lang.source import Tree
from archdsl.lang.template import Choice, Distribution, Range, fill, find

if TYPE_CHECKING:
    import optuna


def suggest(trial: optuna.Trial, name: str, distribution: Distribution) -> Any:
    """Asks Optuna for the value of one search value and returns it."""
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
    """Optuna's 0.6000000000000001 as the grid's 0.6."""
    if distribution.step is None:
        return value
    return float(distribution.grid(round((value - distribution.low) / distribution.step)))


def starting_points(tree: Tree) -> list[dict[str, Any]]:
    """The default point, and for each label of a choice of subtrees the point that takes it
    wherever it can be taken, all else at its default: the pure models of a mixed space.
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
