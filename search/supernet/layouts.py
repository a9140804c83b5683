"""One training for all depths: a space cut down to a few layouts, each served by one super-net.

A *layout* fixes all search values except the dial values, which are the steps of loops and the
capacities of their routers. What is drawn then is a setting of a net that has been trained already.
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

LAYOUT = "layout"  # the search value that replaces all that are not dial values
LAYOUTS = 4
SAMPLE = 64  # settings that a net is trained at, besides the largest and the smallest
MISSES = 20  # draws for each layout that may be known already or make no spec


class SupernetError(ArchdslError):
    """A space that super-nets cannot serve."""

    exit_status = 2


@dataclass(frozen=True)
class SupernetScorer:
    """The scorer of a restricted space: each draw is a setting of its layout's net.

    ``nets``: by label of the layout, of full size. ``stretch``: steps of a net, as a multiple of
    those of a model that is trained alone.
    """

    proxy: Proxy
    store: Folder
    seed: int
    nets: Mapping[str, Supernet]
    stretch: float = 1.0

    @property
    def rungs(self) -> int:
        """A net serves nobody before it has been trained."""
        return 1

    def job(self, spec: ModelSpec, params: dict[str, Any], task: str, rung: int) -> SupernetJob:
        net, trained = self.nets[params[LAYOUT]], self.proxy.tasks[task]
        net = Supernet(self.proxy.shrink(net.spec, trained), net.settings)
        small = self.proxy.shrink(spec, trained)
        if not net.serves(small):
            raise SupernetError(
                f"{spec.name}: the proxies of one layout have different shapes, so they cannot "
                "share weights; for --strategy shared let `fit` solve for dim, make other sizes "
                "relative to it (ffn: {ratio: 2.5}), and give the proxy a width"
            )
        steps = round(self.stretch * trained.rungs[-1])
        data = trained.load()
        return SupernetJob(self.store, small, trained, data, self.seed, steps, net=net)


def supernet_space(
    tree: Tree, proxy: Proxy, store: Folder, seed: int, count: int = LAYOUTS
) -> tuple[Tree, SupernetScorer]:
    """The space that is searched in the place of ``tree``, and what scores its draws."""
    space = restrict(tree, layouts(tree, count, seed))
    nets = {
        label: supernet(fill_some(space, {LAYOUT: label}), seed)
        for label in space.value["search"]["choices"]
    }
    return space, SupernetScorer(proxy, store, seed, nets)


def dial_leaves(tree: Tree) -> frozenset[str]:
    """The search values that only set the steps of loops or the capacity of their routers."""
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
    """The keys of a path and what they are keys of, choices on the way left out."""
    while path:
        if isinstance(value, dict) and "search" in value:
            value, path = value["search"]["choices"][path[2]], path[3:]
        else:
            yield value, path[0]
            value, path = value[path[0]], path[1:]


def layouts(tree: Tree, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to ``count`` that differ: those of the starting points, then drawn ones."""
    dials = dial_leaves(tree)
    drawn = points(tree, count * MISSES, seed)
    Random(seed).shuffle(drawn)
    found: dict[str, dict[str, Any]] = {}
    for point in starting_points(tree) + drawn:
        layout = {name: value for name, value in point.items() if name not in dials}
        with suppress(SpecError):  # choices that do not go together
            net = supernet(fill_some(tree, layout), seed, sample=4)
            found.setdefault(net.spec.fingerprint(), layout)
        if len(found) == count:
            break
    return list(found.values())


def restrict(tree: Tree, chosen: Sequence[Mapping[str, Any]]) -> Tree:
    """The points of a space that have one of these layouts, which become a choice of their own."""
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
    """For the points of a space that has only dial values. Raises SpecError if all of its
    points are wrong."""
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
    """The spec with the default of the fit value, because a proxy has its own sizes."""
    found = find_fit(tree)
    return parse_spec(replace(tree, found[0], found[1].default) if found else tree)


def _end(of: Callable[..., Any], name: str, distribution: Distribution) -> Any:
    """The largest or smallest value; of labels the default."""
    if isinstance(distribution, Choice):
        return distribution.default if distribution.subtrees else of(distribution.choices)
    return of(distribution.low, distribution.high)
