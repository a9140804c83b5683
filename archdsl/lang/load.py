"""YAML to spec: read, override, take the defaults of what is searched, solve what is to fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from archdsl.errors import Problem, SpecError
from archdsl.lang import source, template
from archdsl.lang.budget import describe_excess, excesses, largest_excess
from archdsl.lang.spec import Budget, ModelSpec, parse_spec


class NoFitError(SpecError):
    """Even the ``least`` size breaks the budget, by ``ratio`` of it."""

    def __init__(self, problem: Problem, least: ModelSpec, ratio: float) -> None:
        super().__init__(problem)
        self.least, self.ratio = least, ratio


def load(
    path: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    budget: Budget | None = None,
) -> ModelSpec:
    """The spec in a file, or a shipped one by name; search leaves take their defaults.

    ``overrides``: assignments such as ``blocks.0.repeat=2``. ``budget``: takes the place of the
    file's, limit by limit; a ``fit`` leaf is solved for both. Raises SpecError with every problem
    and its place.

    >>> import archdsl
    >>> archdsl.load("itt", overrides=["context=2048"]).context
    2048
    """
    tree = template.fill(read(path, overrides), template.defaults)
    return fitted(tree, budget)


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> source.Tree:
    """The tree in a file, inheritance and overrides applied, search leaves in place."""
    tree = source.override(source.read(source.resolve(path)), overrides)
    if "loop" in tree.value and "blocks" not in tree.value:
        message = (
            "is an overlay for a trained model, no model of its own: "
            f"archdsl retrofit CHECKPOINT {path} --out FOLDER"
        )
        raise SpecError(Problem("", message, tree.position(())))
    return tree


def budget_of(tree: source.Tree, given: Budget | None = None) -> Budget:
    """The limits of a space: the file's, limit by limit replaced by what is given."""
    tree = template.fill(tree, template.defaults)
    spec, _ = _at_default(tree)
    return (spec.budget or Budget()).with_limits(given)


def _at_default(tree: source.Tree) -> tuple[ModelSpec, tuple[source.Path, template.Fit] | None]:
    """The spec with the default of its ``fit`` leaf, and that leaf."""
    found = template.find_fit(tree)
    return parse_spec(template.replace(tree, found[0], found[1].default) if found else tree), found


def fitted(tree: source.Tree, budget: Budget | None = None) -> ModelSpec:
    """A tree without search leaves as a spec, its ``fit`` leaf solved for the budget.

    ``budget`` takes the place of the file's limit by limit. Where no limit is one of the model,
    the size stays at its default.
    """
    spec, found = _at_default(tree)
    if budget:
        budget = (spec.budget or Budget()).with_limits(budget)
        spec = spec.model_copy(update={"budget": budget})
    if found is None or spec.budget is None or not spec.budget.of_model:
        return spec
    path, fit = found
    at = (
        _with_dim(tree, path, spec)
        if path == ("dim",)
        else lambda size: parse_spec(template.replace(tree, path, size))
    )
    return _solved(tree, path, fit, at, spec.budget)


def _solved(
    tree: source.Tree,
    path: source.Path,
    fit: template.Fit,
    at: Callable[[int], ModelSpec],
    budget: Budget,
) -> ModelSpec:
    """The spec of the largest size that keeps to every limit; raises NoFitError."""
    sizes = range(-(-fit.low // fit.multiple_of) * fit.multiple_of, fit.high + 1, fit.multiple_of)
    best, broken = _largest(sizes, lambda size: _broken(at(size), budget))
    if not broken:
        whole = parse_spec(template.replace(tree, path, best))
        return whole.model_copy(update={"budget": budget})
    least = at(sizes[0])
    message = f"no size fits: {sizes[0]} is the least and {describe_excess(least, budget)}"
    where = ".".join(map(str, path))
    raise NoFitError(
        Problem(where, message, tree.position(path)), least, largest_excess(least, budget)
    )


def _with_dim(tree: source.Tree, path: source.Path, spec: ModelSpec) -> Callable[[int], ModelSpec]:
    """The width enters no part's own data: costing another one needs no validation."""
    return lambda size: spec.model_copy(update={"dim": size})


def _largest(sizes: range, broken: Callable[[int], set[str]]) -> tuple[int, set[str]]:
    """The largest size that breaks no limit which the least keeps, and those that it breaks.

    Each cost rises with size, or falls: with the context, the cache of a window per token. So no
    size keeps a limit that both the least and the one that is returned break.
    """
    at_least = at_low = broken(sizes[0])
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        found = broken(sizes[middle])
        if found <= at_least:
            low, at_low = middle, found
        else:
            high = middle
    return sizes[low], at_low


def _broken(spec: ModelSpec, budget: Budget) -> set[str]:
    return {name for name, ratio in excesses(spec, budget).items() if ratio > 0}
