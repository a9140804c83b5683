"""Restrict a search space to a few layouts, and train one supernet for each of them.

A *layout* fixes all search values except the dial values, which are the steps of loops and the
capacities of their routers. Each trial is then a setting of a supernet that is trained only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path as Folder
from random import Random
from typing import Any

from archdsl.errors import ArchdslError, SpecError
from archdsl.lang.source import Path, Tree
from archdsl.lang.spec import ModelSpec, parse_spec
from archdsl.lang.template import Choice, Distribution, fill, fill_some, find_fit, places, replace
from archdsl.search.space.enumerate import point_from, points
from archdsl.search.space.model_summary import model_summary
from archdsl.search.space.optuna_space import starting_points
from archdsl.search.supernet.supernet import Supernet
from archdsl.search.supernet.supernet_job import SupernetJob
from archdsl.search.trials.proxy import Proxy

LAYOUT = "layout"  # the name of the search value that chooses a layout
LAYOUTS = 4
SAMPLE = 64  # settings that a supernet is trained at, besides the largest and the smallest
MISSES = 20  # random points for each layout; some repeat a layout or are invalid


class SupernetError(ArchdslError):
    """The models of a space cannot share the weights of supernets."""

    exit_status = 2


@dataclass(frozen=True)
class SupernetScorer:
    """The scorer of a restricted space. It scores each trial with the supernet of its layout.

    ``store``: the folder of the result store. ``nets``: the full-size supernets, by the label of
    the layout. ``stretch``: the training steps of a supernet, as a multiple of the steps of a model
    that is trained alone.
    """

    proxy: Proxy
    store: Folder
    seed: int
    nets: Mapping[str, Supernet]
    stretch: float = 1.0

    @property
    def rungs(self) -> int:
        """Always 1, because a supernet must be fully trained before a setting is scored."""
        return 1

    def job(self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int) -> SupernetJob:
        """Return the job that scores a full-size spec on a task.

        ``params``: the search values of the trial; they name its layout. The supernet is as wide as
        the trial, and so one is trained for each shape that the budget's widths give the proxies
        of a layout. Raises SupernetError if the shapes differ in something else. Raises
        DataError if the data of the task cannot be loaded.
        """
        net, trained = self.nets[params[LAYOUT]], self.proxy.tasks[task]
        as_wide = net.spec.model_copy(update={"dim": spec.dim})  # the width that the budget solved
        net = Supernet(self.proxy.shrink(as_wide, trained), net.settings)
        small = self.proxy.shrink(spec, trained)
        if not net.serves(small):
            raise SupernetError(
                f"{spec.name}: the models of one layout have different shapes, so they cannot "
                "share weights; for --strategy shared let `fit` solve for dim"
            )
        steps = round(self.stretch * trained.rungs[-1])
        data = trained.load()
        return SupernetJob(self.store, small, trained, data, self.seed, steps, net=net)


def supernet_space(
    tree: Tree, proxy: Proxy, store: Folder, seed: int, count: int = LAYOUTS
) -> tuple[Tree, SupernetScorer]:
    """Return the restricted space that is searched instead of ``tree``, and its scorer.

    ``store``: the folder of the result store. ``count``: the largest number of layouts.
    """
    space = restrict(tree, layouts(tree, count, seed))
    nets = {
        label: supernet(fill_some(space, {LAYOUT: label}), seed)
        for label in space.value["search"]["choices"]
    }
    return space, SupernetScorer(proxy, store, seed, nets)


def dial_leaves(tree: Tree) -> frozenset[str]:
    """Return the names of the dial values: those that set only loop steps or router capacities."""
    found = places(tree)
    others = {name for name, path in found if not _is_dial(tree.value, path, found)}
    return frozenset(name for name, _ in found) - others


def _is_dial(value: Any, path: Path, found: Sequence[tuple[str, Path]]) -> bool:
    trail = list(_trail(value, path))
    while trail and isinstance(trail[-1][1], int):
        trail.pop()
    keys = [key for _, key in trail]
    if keys[-1:] == ["steps"]:
        return bool(trail[-1][0].get("kind") == "loop")
    if keys[-2:] != ["router", "capacity"] or trail[-2][0].get("kind") != "loop":
        return False
    return not any(other[: len(path)] == path for _, other in found if other != path)


def _trail(value: Any, path: Path) -> Iterator[tuple[Any, str | int]]:
    """Yield each key of a path together with its container; choices on the path are skipped."""
    while path:
        if isinstance(value, dict) and "search" in value:
            value, path = value["search"]["choices"][path[2]], path[3:]
        else:
            yield value, path[0]
            value, path = value[path[0]], path[1:]


def layouts(tree: Tree, count: int, seed: int) -> list[dict[str, Any]]:
    """Return up to ``count`` different layouts: those of the starting points, then random ones.

    A layout is a value for each search value that is not a dial value, by name.
    """
    dials = dial_leaves(tree)
    drawn = points(tree, count * MISSES, seed)
    Random(seed).shuffle(drawn)
    found: dict[str, dict[str, Any]] = {}
    for point in starting_points(tree) + drawn:
        layout = {name: value for name, value in point.items() if name not in dials}
        with suppress(SpecError):  # the choices cannot be combined
            net = supernet(fill_some(tree, layout), seed, sample=4)
            found.setdefault(net.spec.fingerprint(), layout)
        if len(found) == count:
            break
    return list(found.values())


def restrict(tree: Tree, chosen: Sequence[Mapping[str, Any]]) -> Tree:
    """Return the space of all points that have one of the chosen layouts.

    The layouts become the labels of one search value, which is named ``layout``.
    """
    cut = [fill_some(tree, layout) for layout in chosen]
    labels = [
        f"{i}: {model_summary(_spec(fill(one, lambda _, distribution: distribution.default)))}"
        for i, one in enumerate(cut)
    ]
    choices = {label: one.value for label, one in zip(labels, cut, strict=True)}
    distribution = {"name": LAYOUT, "choices": choices, "default": labels[0]}
    marks = {path: mark for path, mark in tree.positions.items() if not path}
    for label, one in zip(labels, cut, strict=True):
        inside = ("search", "choices", label)
        marks |= {(*inside, *path): mark for path, mark in one.positions.items()}
    return Tree({"search": distribution}, marks)


def supernet(layout: Tree, seed: int, sample: int = SAMPLE) -> Supernet:
    """Return the supernet of a space that has only dial values.

    ``sample``: the largest number of settings, besides the largest and the smallest. Raises
    SpecError if all points that were tried are invalid.
    """
    ends = [point_from(layout, partial(_end, of)) for of in (max, min)]
    specs, wrong = [], None
    for point in ends + points(layout, sample, seed):
        try:
            specs.append(_spec(fill_some(layout, point)))
        except SpecError as error:
            wrong = error
    if wrong and not specs:
        raise wrong
    return Supernet.of(specs)


def _spec(tree: Tree) -> ModelSpec:
    """Parse the spec with the default of its ``fit`` value, because a proxy has its own sizes."""
    found = find_fit(tree)
    return parse_spec(replace(tree, found[0], found[1].default) if found else tree)


def _end(of: Callable[..., Any], name: str, distribution: Distribution) -> Any:
    """Return the largest or smallest value; for a choice of subtrees, the default label."""
    if isinstance(distribution, Choice):
        return distribution.default if distribution.subtrees else of(distribution.choices)
    return of(distribution.low, distribution.high)
