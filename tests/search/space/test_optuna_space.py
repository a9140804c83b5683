"""Search values become parameters of Optuna, and numbers of a grid are returned as written."""

from functools import partial

import optuna
import pytest

from archdsl.lang.source import Tree, parse
from archdsl.lang.template import fill
from archdsl.search.space.optuna_space import starting_points, suggest

SPACE = """
a: {search: {low: 0.3, high: 1.0, step: 0.1, default: 0.7}}
b: {search: {low: 1, high: 9, step: 2, default: 3}}
c: {search: {low: 0.001, high: 1.0, log: true, default: 0.1}}
d: {search: {choices: [1, two, null], default: two}}
e:
  search:
    default: plain
    choices:
      plain: 0
      deep: {f: {search: {low: 1, high: 2, default: 1}}}
"""


@pytest.fixture
def space() -> Tree:
    return parse(SPACE)


def test_every_draw_is_on_the_grid_and_asks_only_what_can_be_reached(space: Tree) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    grid = {0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0}
    seen = set()
    for _ in range(60):
        trial = study.ask()
        value = fill(space, partial(suggest, trial)).value
        seen.add(value["a"])
        assert value["b"] in {1, 3, 5, 7, 9}
        assert 0.001 <= value["c"] <= 1
        assert value["d"] in {1, "two", None}
        assert ("e[deep].f" in trial.params) == (value["e"] != 0)
    assert seen == grid


def test_a_search_starts_from_the_default_and_from_the_pure_models(space: Tree) -> None:
    points = starting_points(space)
    assert [point["e"] for point in points] == ["plain", "deep"]
    assert points[0] == {"a": 0.7, "b": 3, "c": 0.1, "d": "two", "e": "plain"}
    assert points[1]["e[deep].f"] == 1
