"""Reads a spec: applies overrides, fills in defaults, and finds the size that fits a budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from archdsl.errors import Problem, SpecError
from archdsl.lang import source, template
from archdsl.lang.budget import describe_excess, excesses, largest_excess
from archdsl.lang.spec import Budget, ModelSpec, parse_spec, to_tree

OWN_KEYS = {"name", "vocab_size", "dim", "blocks"}  # settings may have a context and a budget too

Source = ModelSpec | str | os.PathLike[str] | Mapping[str, Any]
"""All that stands for a spec, in every function that takes one: see `load`."""


class NoFitError(SpecError):
    """Even the smallest size of a ``fit`` value exceeds the budget.

    ``least``: the spec of the smallest size. ``ratio``: by how much of the limit it exceeds it.
    """

    def __init__(self, problem: Problem, least: ModelSpec, ratio: float) -> None:
        super().__init__(problem)
        self.least, self.ratio = least, ratio


def load(
    spec: Source,
    *,
    overrides: Sequence[str] = (),
    budget: Budget | None = None,
) -> ModelSpec:
    """Reads a spec. Values that a search would choose take their defaults.

    Args:
        spec: The path of a YAML file, the name of a shipped spec such as ``"itt"``, a YAML text,
            a dict, or a spec. All functions that take a spec take any of these.
        overrides: Values to set in it, such as ``"blocks.0.repeat=2"``.
        budget: Limits that replace the same limits of the spec. A ``fit`` value becomes the
            largest size that keeps to all limits.

    Raises:
        SpecError: The spec is wrong, or there is none of that name; the error has every problem
            and its place in the file.

    >>> import archdsl
    >>> archdsl.load("itt", overrides=["context=2048"]).context
    2048
    >>> archdsl.load({"extends": "itt", "context": 512}).context
    512
    """
    return load_tree(read(spec, overrides), budget)


def load_tree(tree: source.Tree, budget: Budget | None = None) -> ModelSpec:
    """Returns the spec of a tree that `read` returned: see `load`."""
    return fitted(template.fill(tree, template.defaults), budget)


def read(spec: Source, overrides: Sequence[str] = ()) -> source.Tree:
    """Returns the tree of a spec with inheritance and overrides applied.

    Values that are searched or fitted stay as they are written. Raises SpecError.
    """
    if isinstance(spec, ModelSpec):
        return source.override(source.from_value(to_tree(spec), f"spec {spec.name}"), overrides)
    tree = source.override(source.read(spec), overrides)
    refuse_other_files(tree, spec)
    return tree


def refuse_other_files(tree: source.Tree, spec: Source) -> None:
    """Raises SpecError if a tree is that of an overlay, of a train file or of settings.

    ``spec``: what the tree was read from.
    """
    if "loop" in tree.value and "blocks" not in tree.value:
        message = (
            "is an overlay, which changes a trained model, and not a model. Use it with "
            f"archdsl retrofit CHECKPOINT {spec if isinstance(spec, str) else 'OVERLAY'} "
            "--out FOLDER"
        )
        raise SpecError(Problem("", message, tree.position(())))
    if tree.value and not tree.value.keys() & OWN_KEYS:
        message = (
            "this does not look like a model spec, which has the keys name, vocab_size, context, "
            f"dim and blocks, or extends another spec; got {', '.join(map(str, tree.value))[:200]}."
            " A file of settings goes with --config; one with the key model is a train file, which "
            "archdsl train takes instead of a spec"
        )
        raise SpecError(Problem("", message, tree.position(())))


def as_spec(spec: Source) -> ModelSpec:
    """Returns the spec itself if it is one, else what `load` makes of it. Raises SpecError."""
    return spec if isinstance(spec, ModelSpec) else load(spec)


def budget_of(tree: source.Tree, given: Budget | None = None) -> Budget:
    """Returns the limits of a search space, in which those given replace the file's one by one."""
    tree = template.fill(tree, template.defaults)
    spec, _ = _at_default(tree)
    return (spec.budget or Budget()).with_limits(given)


def _at_default(tree: source.Tree) -> tuple[ModelSpec, tuple[source.Path, template.Fit] | None]:
    """Returns the spec with the default of its ``fit`` value, and the place of that value."""
    found = template.find_fit(tree)
    return parse_spec(template.replace(tree, found[0], found[1].default) if found else tree), found


def fitted(tree: source.Tree, budget: Budget | None = None) -> ModelSpec:
    """Returns the spec of a tree without searched values; a ``fit`` value is solved for.

    The limits of ``budget`` replace those of the file one by one. If there is no limit on the
    model, the size is the default. Raises SpecError, or NoFitError if no size fits.
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
    """Returns the spec of the largest size that keeps to every limit. Raises NoFitError."""
    sizes = range(-(-fit.low // fit.multiple_of) * fit.multiple_of, fit.high + 1, fit.multiple_of)
    best, broken = _largest(sizes, lambda size: _broken(at(size), budget))
    if not broken:
        whole = parse_spec(template.replace(tree, path, best))
        return whole.model_copy(update={"budget": budget})
    least = at(sizes[0])
    message = f"no size fits: {sizes[0]} is the smallest, and {describe_excess(least, budget)}"
    where = ".".join(map(str, path))
    raise NoFitError(
        Problem(where, message, tree.position(path)), least, largest_excess(least, budget)
    )


def _with_dim(tree: source.Tree, path: source.Path, spec: ModelSpec) -> Callable[[int], ModelSpec]:
    """Returns a function of the width. No part stores the width, so nothing is validated again."""
    return lambda size: spec.model_copy(update={"dim": size})


def _largest(sizes: range, broken: Callable[[int], set[str]]) -> tuple[int, set[str]]:
    """Returns the largest size that breaks only limits that the smallest breaks too, and these.

    Every cost either rises with the size or falls with it, as the KV cache of a window does per
    token of context. So no size keeps a limit that both the smallest and the returned size break.
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
    """Returns the names of the limits that the spec exceeds."""
    return {name for name, ratio in excesses(spec, budget).items() if ratio > 0}
