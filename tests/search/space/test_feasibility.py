"""What a space holds: its size against counting, what fits against trying every point."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from archdsl.errors import SpecError
from archdsl.lang.budget import largest_excess
from archdsl.lang.load import load, read
from archdsl.lang.source import Tree, from_value, override, parse
from archdsl.lang.spec import Budget
from archdsl.lang.template import Choice, Distribution, find
from archdsl.search.space.enumerate import Point, point_from, points, space_size
from archdsl.search.space.feasibility import NothingFitsError, require_feasible, survey, try_point

SCALARS = st.sampled_from([1, "x", None])
NAMED = [  # of equal names there is one kind only
    {"choices": [1, 2, 3], "default": 1, "name": "n"},
    {"low": 0.5, "high": 1.0, "step": 0.5, "default": 1.0, "name": "r"},
    {
        "choices": {"p": {"search": {"choices": [1, 2], "default": 1}}, "q": 7},
        "default": "q",
        "name": "l",
    },
]
FREE = [{"choices": [1, 2], "default": 1}, {"low": 1, "high": 3, "default": 1}]


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mapping = st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
    labelled = mapping.map(lambda m: {"search": {"choices": m, "default": min(m)}})
    return st.lists(inner, max_size=3) | mapping | labelled


SEARCH_VALUES = st.sampled_from(NAMED + FREE).map(lambda body: {"search": body})
TREES = st.recursive(SCALARS | SEARCH_VALUES, grown, max_leaves=8).map(
    lambda v: from_value({"a": v}, "")
)


def counted(tree: Tree) -> set[str]:
    """Every point, by answering all that could be asked in every way."""
    distributions = find(tree)
    values = [list(_values(distribution)) for distribution in distributions.values()]
    answers = (dict(zip(distributions, picked, strict=True)) for picked in product(*values))
    return {as_text(point_from(tree, lambda name, _, a=a: a[name])) for a in answers}  # type: ignore[misc]


def _values(distribution: Distribution) -> Any:
    return distribution.choices if isinstance(distribution, Choice) else distribution.values()


def as_text(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


@given(TREES)
def test_the_size_of_a_space_is_the_number_of_its_points(tree: Tree) -> None:
    assume(len(find(tree)) <= 6)
    expected = counted(tree)
    assert space_size(tree) == len(expected)
    found = points(tree, len(expected), seed=0)
    assert len(found) == len(expected)
    assert {as_text(point) for point in found} == expected
    some = points(tree, len(expected) - 1, seed=0)
    assert {as_text(point) for point in some} <= expected
    assert len({as_text(point) for point in some}) == len(some) < len(expected)


def test_a_continuous_space_has_no_size_but_points() -> None:
    tree = parse(
        "a: {search: {low: 0.001, high: 1.0, log: true, default: 0.1}}\n"
        "b: {search: {low: 0.0, high: 1.0, default: 0.1}}\n"
        "c: {search: {low: 1, high: 1000, log: true, default: 1}}\n"
    )
    assert space_size(tree) is None
    found = points(tree, 40, seed=3)
    assert len(found) == 40
    assert found == points(tree, 40, seed=3) != points(tree, 40, seed=4)
    assert 10 < sum(point["a"] < 0.03 for point in found) < 30
    assert 10 < sum(point["c"] < 30 for point in found) < 30
    assert all(1 <= point["c"] <= 1000 and isinstance(point["c"], int) for point in found)


SPACE = """\
name: space
vocab_size: 16
context: 8
dim: 16
blocks:
  - kind: loop
    steps: {search: {low: 2, high: 4, default: 3}}
    router: {kind: prefix, capacity: {search: {choices: [0.25, 0.5, 1.0], default: 0.5}}}
    body:
      kind: layer
      attention: {head_size: 8}
      ffn: {hidden: {search: {choices: [8, 12, 90], default: 90}}}
"""
STEPS, CAPACITY = "blocks.0.steps", "blocks.0.router.capacity"
HIDDEN = "blocks.0.body.ffn.hidden"


def corner() -> dict[str, int]:
    """What the one cheapest model costs."""
    tree = parse(SPACE)
    least = try_point(tree, {STEPS: 2, CAPACITY: 0.25, HIDDEN: 8}, Budget(params=1, flops=1))
    return {name: round(found.spent) for name, found in least.misses.items()}


def test_a_survey_tells_what_fits_from_what_does_not() -> None:
    tree = parse(SPACE)
    costs = corner()
    every = survey(tree, Budget())
    assert (every.size, every.tried, every.feasible, every.whole) == (27, 27, 27, True)
    assert every.distinct == 27
    once = survey(parse(SPACE.replace("low: 2, high: 4", "low: 1, high: 3")), Budget())
    assert (once.feasible, once.distinct) == (27, 21)  # one step has no use for a capacity
    one = survey(tree, Budget.model_validate(costs))
    assert (one.feasible, one.distinct, one.share, one.closest) == (1, 1, 1 / 27, "")
    some = survey(tree, Budget(flops=costs["flops"]), limit=10, seed=1)
    assert (some.tried, some.whole, some.size) == (10, False, 27)
    none = survey(tree, Budget(flops=costs["flops"] - 100))
    assert none.feasible == 0
    assert f"its {costs['flops']:,} FLOPs/token exceed the budget" in none.closest
    assert none.miss == pytest.approx(100 / (costs["flops"] - 100), rel=1e-2)


def test_choices_that_do_not_go_together_are_counted_apart() -> None:
    heads = SPACE.replace("head_size: 8", "head_size: {search: {choices: [6, 8], default: 8}}")
    found = survey(parse(heads), Budget())
    assert (found.size, found.invalid, found.feasible) == (54, 27, 27)
    mistaken = heads.replace("default: 8}}", "default: 6}}")
    with pytest.raises(SpecError, match="head_size: must divide dim 16, got 6"):
        require_feasible(parse(mistaken), Budget())


def many(text: str) -> Tree:
    """The same space with so many more points that not all are tried."""
    return override(
        parse(text), ["norm_eps={search: {low: 1.0e-6, high: 1.0e-3, default: 1.0e-5}}"]
    )


@pytest.mark.parametrize("space", [parse(SPACE), many(SPACE)])
def test_a_space_in_which_one_corner_fits_is_not_refused(space: Tree) -> None:
    found = require_feasible(space, Budget.model_validate(corner()))
    assert largest_excess(found, Budget.model_validate(corner())) == 0


@pytest.mark.parametrize(
    ("space", "tried"), [(parse(SPACE), "none of its 27 points"), (many(SPACE), "points tried")]
)
def test_one_in_which_nothing_fits_names_the_closest_and_what_would_help(
    space: Tree, tried: str
) -> None:
    costs = corner()
    limits = {"params": costs["params"] - 10, "flops": costs["flops"] - 10}
    with pytest.raises(NothingFitsError) as error:
        require_feasible(space, Budget.model_validate(limits))
    said = str(error.value)
    assert tried in said
    assert f"{STEPS}=2" in said
    assert f"{CAPACITY}=0.25" in said
    assert f"its {costs['params']:,} parameters exceed the budget of {limits['params']:,}" in said
    assert f"it would fit with params of at least {costs['params']:,} and flops of at " in said
    require_feasible(space, Budget.model_validate(costs))


def test_the_shipped_space_is_answered_for() -> None:
    tree = read("search")
    require_feasible(tree, Budget(params=162_000_000, kv=2**16))
    with pytest.raises(
        NothingFitsError, match=r"no size fits: 64 is the smallest.* kv of at least"
    ):
        require_feasible(tree, Budget(kv=100))
    assert try_point(
        tree, point_from(tree, lambda _, distribution: distribution.default), Budget()
    ).spec == load("search")


def test_a_model_that_no_sample_meets_is_found_step_by_step() -> None:
    """Of 493 values of one choice only the least fits."""
    fine = SPACE.replace("{choices: [8, 12, 90], default: 90}", "{low: 8, high: 500, default: 90}")
    budget = Budget.model_validate(corner())
    found = require_feasible(many(fine), budget)
    assert largest_excess(found, budget) == 0
