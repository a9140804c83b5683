"""Search leaves as Optuna sees them, and the points a search starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from archdsl.lang.source import Tree
from archdsl.lang.template import Choice, Distribution, Range, fill, find

if TYPE_CHECKING:
    import optuna


def suggest(trial: optuna.Trial, name: str, leaf: Distribution) -> Any:
    """Ask Optuna for the value of one leaf."""
    if isinstance(leaf, Choice):
        return trial.suggest_categorical(name, list(leaf.choices))
    if leaf.is_whole:
        low, high, step = int(leaf.low), int(leaf.high), int(leaf.step or 1)
        return trial.suggest_int(name, low, high, step=step, log=leaf.log)
    value = trial.suggest_float(name, leaf.low, leaf.high, step=leaf.step, log=leaf.log)
    return _on_grid(leaf, value)


def _on_grid(leaf: Range, value: float) -> float:
    """Optuna's 0.6000000000000001 as the grid's 0.6."""
    if leaf.step is None:
        return value
    return float(leaf.grid(round((value - leaf.low) / leaf.step)))


def starting_points(tree: Tree) -> list[dict[str, Any]]:
    """The default point, and for each label of a choice of subtrees the point that takes it
    wherever it can be taken, all else at its default: the pure models of a mixed space.
    """
    labels: dict[str, None] = {}
    for leaf in find(tree).values():
        if isinstance(leaf, Choice) and isinstance(leaf.choices, dict):
            labels |= dict.fromkeys(leaf.choices)
    points = [_point(tree, None), *(_point(tree, label) for label in labels)]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def _point(tree: Tree, label: str | None) -> dict[str, Any]:
    picked: dict[str, Any] = {}

    def pick(name: str, leaf: Distribution) -> Any:
        takes = (
            isinstance(leaf, Choice) and isinstance(leaf.choices, dict) and label in leaf.choices
        )
        picked[name] = label if takes else leaf.default
        return picked[name]

    fill(tree, pick)
    return picked
