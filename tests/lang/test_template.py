"""Open values of a spec: which settings are valid, how they are found and how they are filled."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from archdsl.errors import Problem, SpecError
from archdsl.lang.source import Tree, from_value, parse
from archdsl.lang.template import (
    Choice,
    Distribution,
    Fit,
    Range,
    defaults,
    fill,
    fill_some,
    find,
    find_fit,
    replace,
)

SPACE = """\
dim: {fit: {multiple_of: 64, default: 1024}}
blocks:
  search:
    name: layout
    default: plain
    choices:
      plain:
        - capacity: {search: {low: 0.3, high: 1, step: 0.1, default: 0.7}}
      loop:
        - steps: {search: {choices: [1, 2, 4], default: 4, name: steps}}
        - search:
            default: deep
            choices: {deep: {steps: 9}, wide: {search: {choices: [x, y], default: x}}}
steps: {search: {choices: [1, 2, 4], default: 4, name: steps}}
"""


@st.composite
def ranges(draw: st.DrawFn) -> dict[str, Any]:
    """Draws settings of ranges of whole or decimal numbers, with a default that is in the range."""
    low, step, count = draw(st.integers(-50, 50)), draw(st.integers(1, 9)), draw(st.integers(2, 40))
    unit = draw(st.sampled_from([1, 10, 1000]))
    at = [Fraction(low + i * step, unit) for i in (0, count - 1, draw(st.integers(0, count - 1)))]
    numbers = [*at, Fraction(step, unit)]
    low_, high, default, step_ = map(int if unit == 1 else float, numbers)
    return {"low": low_, "high": high, "default": default, "step": step_}


def trees() -> st.SearchStrategy[Any]:
    scalars = st.integers() | st.booleans() | st.sampled_from(["x", None])
    choices = st.lists(st.integers(), min_size=1, max_size=3, unique=True)
    distribution = ranges() | choices.map(lambda values: {"choices": values, "default": values[-1]})
    return st.recursive(
        scalars | distribution.map(lambda body: {"search": body}), grown, max_leaves=12
    )


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mapping = st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
    labelled = mapping.map(lambda m: {"search": {"choices": m, "default": max(m)}})
    return st.lists(inner, max_size=3) | mapping | labelled


def places(tree: Tree) -> list[str]:
    with pytest.raises(SpecError) as error:
        find(tree)
    return str(error.value).splitlines()


@given(ranges())
def test_a_grid_holds_short_decimals_from_low_to_high(body: dict[str, Any]) -> None:
    distribution = Range.model_validate(body)
    values = list(distribution.values())
    assert (values[0], values[-1], len(values)) == (
        distribution.low,
        distribution.high,
        distribution.count,
    )
    assert values == sorted(set(values))
    assert distribution.default in values
    assert all(distribution.take(value) == value and len(str(value)) <= 6 for value in values)
    assert {type(value) for value in values} == {int if distribution.is_whole else float}


def test_a_range_has_whole_numbers_unless_one_of_its_settings_is_a_float() -> None:
    whole = Range(low=1, high=4, default=2)
    assert list(whole.values()) == [1, 2, 3, 4]
    tenth = Range(low=0, high=1, step=0.1, default=1)
    assert repr(list(tenth.values())) == "[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]"
    assert repr(tenth.take(1)) == repr(tenth.default) == "1.0"
    continuous = Range(low=1, high=4, default=2.5, log=True)
    assert (continuous.count, continuous.take(3.3)) == (None, 3.3)
    with pytest.raises(IndexError):
        continuous.grid(0)
    with pytest.raises(IndexError):
        whole.grid(4)


@pytest.mark.parametrize("value", [0, 7, 2, 3.0, True, "3", None, float("nan")])
def test_a_range_refuses_values_that_it_does_not_contain(value: Any) -> None:
    with pytest.raises(ValueError, match=r"is outside|is not 1 plus|must be a whole number"):
        Range(low=1, high=5, step=2, default=3).take(value)


@pytest.mark.parametrize(
    ("value", "taken"), [(1.0, "1.0"), (1, "1.0"), (True, "True"), ("a", "'a'")]
)
def test_a_choice_takes_only_its_own_values_and_distinguishes_true_from_one(
    value: Any, taken: str
) -> None:
    distribution = Choice(choices=(1.0, True, "a", None), default=None)
    assert repr(distribution.take(value)) == taken
    with pytest.raises(ValueError, match=r"false is not one of the choices 1.0, true, 'a', null"):
        distribution.take(False)


WRONG = {
    "search: {low: 1, high: 2}": "13: a.search.default: is required: the value to use without",
    "search: {low: 1, default: 2}": "13: a.search.high: is required",
    "search: {high: 1, default: 2}": "13: a.search.low: is required",
    "search: {default: 2}": "13: a.search.choices: is required",
    "search: {low: 2, high: 2, default: 2}": "13: a.search: low 2 must be below high 2",
    "search: {low: 1, high: 3, default: 4}": "13: a.search: 4 is outside the range from 1 to 3",
    "search: {low: 1, high: 3, default: 0}": "13: a.search: 0 is outside the range from 1 to 3",
    "search: {low: 0, high: 1, step: 0.3, default: 0}": "0.3 from low 0.0 do not reach high 1.0",
    "search: {low: 0, high: 3, step: 0, default: 1}": "13: a.search: step must be above 0, got 0",
    "search: {low: 0, high: 3, step: -1, default: 1}": "13: a.search: step must be above 0, got -1",
    "search: {low: 1, high: 9, step: 2, default: 4}": "4 is not 1 plus a multiple of the step 2",
    "search: {low: 0, high: 9, log: true, default: 4}": "log needs low above 0 and cannot be",
    "search: {low: 1, high: 3, log: true, step: 1, default: 2}": "cannot be combined with step",
    "search: {low: 1, high: x, default: 2}": "28: a.search.high: must be a number, got 'x'",
    "search: {low: 1, high: 3, default: true}": "40: a.search.default: must be a number, got true",
    "search: {low: 1, high: 3, default: 2, stpe: 1}": "49: a.search.stpe: unknown key (did you",
    "search: {low: 1, high: 3, default: 2, log: 1}": "48: a.search.log: must be true or false",
    "search: {choices: [1, 2], default: 3}": "13: a.search: 3 is not one of the choices 1, 2",
    "search: {choices: [1, 2], default: true}": "13: a.search: true is not one of the choices 1, 2",
    "search: {choices: [1, 2], default: [1]}": "40: a.search.default: must be a number, text,",
    "search: {choices: [1, 2, 1], default: 1}": "23: a.search.choices: choice 1 is given twice",
    "search: {choices: [], default: 1}": "23: a.search.choices: must be a list of values or",
    "search: {choices: {}, default: a}": "23: a.search.choices: must be a list of values or",
    f"search: {{choices: {list(range(1001))}, default: 1}}": "1001 choices, but a search takes at",
    "search: {choices: [[1], [2]], default: 1}": "choices that are lists or mappings need labels",
    "search: {choices: {lop: 1}, default: loop}": "one of the choices 'lop' (did you mean 'lop'?)",
    "search: {choices: [1], default: 1, name: ''}": "46: a.search.name: ",
    "search: [1, 2]": "13: a.search: must be a mapping such as {default: ...}, got a list",
    "search: {choices: [1], default: 1}, b: 2": "4: a: 'search' must be the only key here, but",
    "fit: {multiple_of: 64, default: 64}, b: 2": "4: a: 'fit' must be the only key here, but",
    "fit: {default: 64}": "10: a.fit.multiple_of: is required",
    "fit: {multiple_of: 64}": "10: a.fit.default: is required: the value to use without",
    "fit: {multiple_of: 64, default: 100}": "10: a.fit: default must be a multiple of 64",
    "fit: {multiple_of: 2, default: 4, low: 3}": "10: a.fit: low must be a multiple of 2",
    "fit: {multiple_of: 2, default: 4, high: 9}": "10: a.fit: high must be a multiple of 2",
    "fit: {multiple_of: 2, default: 4, low: 6}": "default 4 is outside the range from 6 to 2048",
    "fit: {multiple_of: 2, default: 4, high: 2}": "default 4 is outside the range from 2 to 2",
    "fit: {multiple_of: 0, default: 4}": "24: a.fit.multiple_of: must be at least 1, got 0",
    "search: {choices: {x: {fit: 1}}, default: x}": "33: a[x].fit: must be a mapping such as",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_a_wrong_open_value_is_an_error_at_its_position(text: str, message: str) -> None:
    lines = places(parse(f"a: {{{text}}}", "f"))
    assert len(lines) == 1
    assert message in lines[0].removeprefix("f:1:")


def test_all_wrong_open_values_are_reported_at_once_also_inside_wrong_ones() -> None:
    lines = places(
        parse(
            "a: {search: {choices: {x: {search: {low: 1}}}, default: y}}\n"
            "b: {fit: {multiple_of: 64, default: 64}}\n"
            "c: {fit: {multiple_of: 64, default: 64}}\n"
            "d: {search: {choices: [1, 2], default: 2, name: n}}\n"
            "e: {search: {choices: [true, 2], default: 2, name: n}}\n"
        )
    )
    assert [line.split(":")[1] for line in lines] == ["1", "1", "1", "3", "5"]
    assert "second fit value; only one is allowed and the first is at <string>:2:4" in lines[3]
    assert "another search value is named 'n' and has other settings" in lines[4]


def test_after_very_many_problems_reading_stops() -> None:
    assert len(places(parse("- {search: 1}\n" * 5000))) == 101


def test_a_search_value_has_its_own_name_or_that_of_its_place() -> None:
    search_values = find(parse(SPACE))
    assert list(search_values) == [
        "layout",
        "blocks[plain].0.capacity",
        "steps",
        "blocks[loop].1",
        "blocks[loop].1[wide]",
    ]
    assert search_values["steps"] == Choice(choices=(1, 2, 4), default=4, name="steps")


def test_the_picked_values_and_subtrees_replace_the_search_values() -> None:
    picks = {"layout": "loop", "steps": 2, "blocks[loop].1": "wide", "blocks[loop].1[wide]": "y"}
    filled = fill(parse(SPACE, "f"), lambda name, distribution: picks.pop(name))
    assert filled.value == {
        "dim": {"fit": {"multiple_of": 64, "default": 1024}},
        "blocks": [{"steps": 2}, "y"],
        "steps": 2,
    }
    assert not picks
    assert {path: str(mark) for path, mark in filled.positions.items() if "dim" not in path} == {
        (): "f:1:1",
        ("blocks",): "f:10:9",
        ("blocks", 0): "f:10:11",
        ("blocks", 0, "steps"): "f:10:18",
        ("blocks", 1): "f:13:47",
        ("steps",): "f:14:8",
    }


def test_values_are_picked_only_for_reachable_search_values_and_once_for_each_name() -> None:
    asked: list[str] = []

    def pick(name: str, distribution: Distribution) -> Any:
        asked.append(name)
        return "loop" if name == "layout" else distribution.default

    fill(parse(SPACE), defaults)
    fill(parse(SPACE), pick)
    assert asked == ["layout", "steps", "blocks[loop].1"]


def test_a_yaml_alias_of_a_search_value_without_name_is_independent_at_each_place() -> None:
    tree = parse("a: &x {search: {choices: [1, 2], default: 1}}\nb: *x\n")
    assert list(find(tree)) == ["a", "b"]
    assert fill(tree, lambda name, distribution: {"a": 1, "b": 2}[name]).value == {"a": 1, "b": 2}


def test_a_picked_value_that_is_not_in_the_distribution_is_an_error_at_the_search_value() -> None:
    with pytest.raises(SpecError) as error:
        fill(parse(SPACE, "f"), lambda name, distribution: "lop" if name == "layout" else 3)
    assert str(error.value).splitlines() == [
        "f:3:3: blocks: 'lop' is not one of the choices 'plain', 'loop' (did you mean 'loop'?)",
        "f:14:8: steps: 3 is not one of the choices 1, 2, 4",
    ]
    with pytest.raises(SpecError, match="is required"):
        fill(parse("a: {search: {low: 1, high: 2}}"), defaults)


@given(trees())
def test_filled_with_defaults_no_search_value_is_left_and_every_value_has_a_position(
    value: Any,
) -> None:
    tree = from_value({"root": value}, "f")
    filled = fill(tree, defaults)
    assert find(filled) == {}
    assert fill(filled, defaults) == filled
    assert filled == from_value(filled.value, "f")
    assert fill(tree, lambda name, distribution: find(tree)[name].default) == filled


def test_the_fit_value_is_found_and_replaced_at_its_position() -> None:
    tree = fill(parse(SPACE, "f"), defaults)
    found = find_fit(tree)
    assert found == (("dim",), Fit(multiple_of=64, default=1024, low=64, high=64 * 1024))
    fitted = replace(tree, found[0], 512)
    assert fitted.value["dim"] == 512
    assert find_fit(fitted) is None
    assert str(Problem("dim", "is odd", fitted.position(("dim",)))) == "f:1:6: dim: is odd"
    assert set(tree.positions) - set(fitted.positions) == {
        path for path in tree.positions if "fit" in path
    }


def test_distributions_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Range(low=1, high=4, default=2).low = 3  # type: ignore[misc]


def test_each_of_several_subtrees_may_have_a_fit_value_as_only_one_is_chosen() -> None:
    fit = "fit: {multiple_of: 8, default: 8}"
    choice = f"{{search: {{choices: {{x: {{{fit}}}, y: {{{fit}}}}}, default: x}}}}"
    assert find_fit(parse(f"a: {choice}")) is not None
    assert "second fit value" in places(parse(f"a: {choice}\nb: {{{fit}}}"))[0]


def test_search_values_that_are_not_filled_keep_their_names() -> None:
    tree = fill_some(parse(SPACE), {"layout": "loop", "blocks[loop].1": "wide"})
    assert set(find(tree)) == {"steps", "blocks[loop].1[wide]"}
    assert tree.value["steps"]["search"]["name"] == "steps"
