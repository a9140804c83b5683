"""YAML to spec: read, override, take the defaults of what is searched, solve what is to fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import archdsl.blocks  # noqa: F401  registers every kind
from archdsl import leaves, source, verbs
from archdsl.cost import cost
from archdsl.errors import Problem, SpecError
from archdsl.spec import Budget, ModelSpec, parse_spec


class NoFitError(SpecError):
    """Even the least size breaks the budget, by ``ratio`` of it."""

    def __init__(self, problem: Problem, ratio: float) -> None:
        super().__init__(problem)
        self.ratio = ratio


def load(
    path: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    budget: Budget | None = None,
) -> ModelSpec:
    """The spec in a file, or a shipped one by name; search leaves take their defaults.

    ``overrides``: assignments such as ``blocks.0.repeat=2``. ``budget``: takes the place of the
    file's; a ``fit`` leaf is solved for it. Raises SpecError with every problem and its place.

    >>> import archdsl
    >>> archdsl.load("itt", overrides=["context=2048"]).context
    2048
    """
    tree = leaves.fill(read(path, overrides), leaves.defaults)
    return fitted(tree, budget)


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> source.Tree:
    """The tree in a file, inheritance and overrides applied, search leaves in place."""
    tree = source.override(source.read(source.resolve(path)), overrides)
    if "loop" in tree.value and "blocks" not in tree.value:
        message = (
            "is an overlay for a trained model, no model of its own: "
            f"archdsl retrofit CHECKPOINT {path} --out FOLDER"
        )
        raise SpecError(Problem("", message, tree.mark(())))
    return tree


def fitted(tree: source.Tree, budget: Budget | None = None) -> ModelSpec:
    """A tree without search leaves as a spec, its ``fit`` leaf solved for the budget."""
    found = leaves.fit_leaf(tree)
    if found is None:
        spec = parse_spec(tree)
        return spec.model_copy(update={"budget": budget}) if budget else spec

    path, fit = found
    spec = parse_spec(leaves.replace(tree, path, fit.default))
    budget = budget or spec.budget
    if budget is None:
        return spec
    spec = spec.model_copy(update={"budget": budget})
    sizes = range(-(-fit.low // fit.multiple_of) * fit.multiple_of, fit.high + 1, fit.multiple_of)
    at = (
        _with_dim(tree, path, spec)
        if path == ("dim",)
        else lambda size: parse_spec(leaves.replace(tree, path, size))
    )
    best = _largest(sizes, lambda size: over(at(size), budget) <= 0)
    if best is None:
        least = at(sizes[0])
        message = f"no size fits: {sizes[0]} is the least and {exceeds(least, budget)}"
        where = ".".join(map(str, path))
        raise NoFitError(Problem(where, message, tree.mark(path)), over(least, budget))
    return parse_spec(leaves.replace(tree, path, best)).model_copy(update={"budget": budget})


def _with_dim(tree: source.Tree, path: source.Path, spec: ModelSpec) -> Callable[[int], ModelSpec]:
    """The width enters no part's own data: costing another one needs no validation."""
    return lambda size: spec.model_copy(update={"dim": size})


def _largest(sizes: range, fits: Callable[[int], bool]) -> int | None:
    """The largest size that fits, where costs rise with size; None if the least does not."""
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


def ratios(spec: ModelSpec, budget: Budget) -> dict[str, float]:
    """For each limit of the budget, cost / limit - 1: above zero is too much."""
    receipt = cost(spec)
    spent = {"params": receipt.params, "flops": receipt.expected}
    limits = {name: getattr(budget, name) for name in spent}
    return {name: spent[name] / limit - 1 for name, limit in limits.items() if limit}


def over(spec: ModelSpec, budget: Budget) -> float:
    """The worst of the ratios; at most zero where every limit is kept."""
    return max(ratios(spec, budget).values(), default=0.0)


def exceeds(spec: ModelSpec, budget: Budget) -> str:
    """In words, which limits are broken and by how much."""
    receipt = cost(spec)
    spent = {"params": (receipt.params, "parameters"), "flops": (receipt.expected, "FLOPs/token")}
    return " and ".join(
        f"its {spent[name][0]:,.0f} {spent[name][1]} exceed the budget of "
        f"{getattr(budget, name):,} by {ratio:.1%}"
        for name, ratio in ratios(spec, budget).items()
        if ratio > 0
    )


verbs.callable_by_name(__name__)
