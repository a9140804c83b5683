"""YAML 1.2 text is parsed to trees and written back: scalars, positions and limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from archdsl.errors import Position, SpecError
from archdsl.lang import yaml as archdsl_yaml
from archdsl.lang.yaml import Path, Tree, dump, dump_inline, parse

NASTY = ["1e-3", "on", "010", "null", "0x10", "~", "1_000", ".inf", "162M", "", "<<", "-", "a: b"]
NASTY += [
    "a\n b\n",
    " x",
    "x ",
    "#c",
    "é\u2028\x85\ufeff😀\x00",
    "'",
    '"\\',
    "true",
    "0o7",
    "k" * 120,
]
WORDS = st.sampled_from(NASTY) | st.text(max_size=20)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4)


VALUES = st.recursive(SCALARS, nested, max_leaves=20)


def paths(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    yield path, value
    items = value.items() if isinstance(value, dict) else []
    for part, item in enumerate(value) if isinstance(value, list) else items:
        yield from paths(item, (*path, part))


def messages(error: pytest.ExceptionInfo[SpecError]) -> list[str]:
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 0.001), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("+3", 3), ("010", 10)],
        *[("0o17", 15), ("0x1F", 31), ("0b1", "0b1"), ("1_000", "1_000"), ("162M", "162M")],
        *[("true", True), ("FALSE", False), ("on", "on"), ("yes", "yes"), ("NO", "NO")],
        *[("null", None), ("~", None), ("", None), ("'1'", "1"), ('"~"', "~"), ("e3", "e3")],
        *[("12:30", "12:30"), ("2001-01-01", "2001-01-01")],
    ],
)
def test_scalars_have_the_values_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse(f"on: {text}").value
    assert repr(read) == repr({"on": value})


@given(VALUES)
def test_a_written_value_is_read_back_unchanged(value: Any) -> None:
    assert repr(parse(dump(value)).value) == repr(value)
    assert repr(parse(dump_inline(value)).value) == repr(value)


@given(VALUES)
def test_each_scalar_has_the_position_of_its_text(value: Any) -> None:
    text = dump(value)
    tree = parse(text, "f.yaml")
    assert set(tree.positions) == {path for path, _ in paths(value)}
    for path, item in paths(value):
        position = tree.positions[path]
        if not isinstance(item, dict | list):
            line = text.split("\n")[position.line - 1]
            assert line[position.column - 1 :].startswith(dump_inline(item))


@given(st.text("[]{}:,-&*!|>'\"\\#%@`?~<= \n\tab01.\u2028\x00", max_size=40) | st.text())
def test_any_text_gives_a_tree_or_a_spec_error(text: str) -> None:
    try:
        value = parse(text).value
    except SpecError as error:
        value = [problem.position.file for problem in error.problems if problem.position]
    assert repr(parse(dump(value)).value) == repr(value)


def test_short_values_are_written_on_one_line() -> None:
    text = """\
name: on the fly
blocks:
  - kind: stack
    body:
      - {kind: layer, ffn: 2560}
      - kind: loop
        capacity: [0.7, 0.9]
        router: {kind: top_k}
steps: {search: {choices: [1, 2, 4], default: 4}}
empty: {}
"""
    assert dump(parse(text).value) == text
    assert dump({"long": ["word" * 5] * 5}).count("\n") == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**200, "\ud800", {1: 2}, {1, 2}])
def test_a_value_that_could_not_be_read_back_is_not_written(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        dump([value])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f:3:1: a: key 'a' was already given on line 1"),
        ("a: .inf", "f:1:4: a: number .inf is not finite"),
        ("a: [1, -.INF]", "f:1:8: a.1: number -.INF is not finite"),
        ("a: .nan", "f:1:4: a: number .nan is not finite"),
        ("a: 1e999", "f:1:4: a: number 1e999 is too large"),
        ("a: " + "1" * 5000, "f:1:4: a: a number may have 100 characters, got one of 5000"),
        ("a: !!python/name:os.system x", "f:1:4: a: tag '!!python/name:os.system' is not allowed"),
        ("a: !!binary eA==", "f:1:4: a: tag '!!binary' is not allowed"),
        ("a: ! 12", "f:1:4: a: tag '!' is not allowed"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "f:3:3: c: merge keys (<<) are not supported; use extends"),
        ("? [a]\n: b", "f:1:3: a key must be plain text"),
        ("&a a: 1\n*a : 2", "f:1:1: a key must be plain text"),
        ("?\n: 1", "a key is missing before ':'"),
        ("? " + "k" * 300 + "\n: 1", "f:1:3: key of 300 characters"),
        ("a: *b", "f:1:4: a: alias *b is not defined"),
        ("a: &a [*a]", "f:1:8: a.0: alias *a is inside the value it refers to"),
        ("a: 1\n---\nb: 2", "f:2:1: second document; a file may hold only one"),
        ("", "f: is empty"),
        ("# nothing\n", "f: is empty"),
        ("a: [1,\nb: 2", "f:3:1: not valid YAML: did not find expected ',' or ']'"),
        ("a:\n\t- 1", "f:2:1: not valid YAML: found character that cannot start any token; indent"),
        ("a: b: c", "f:1:5: not valid YAML: mapping values are not allowed"),
        ("ab\x00c", "f:1:3: character '\\x00' is not allowed"),
        ("a: 1\nb: \u2028", "f:2:4: character '\\u2028' is not allowed"),
        ("a: " + "[" * 101 + "]" * 101, "f:1:104: nested more than 100 levels deep"),
        ("[" * 100_000, "nested more than 100 levels deep"),
        ("- " * 100_000, "nested more than 100 levels deep"),
        ("a: &a " + "[" * 60 + "]" * 60 + "\nb: " + "[" * 60 + "*a", "nested more than 100 levels"),
        ("[" + "1," * 30_000 + "]", "more than 30000 values"),
        ("#" * 2**20 + "\na: 1", "f: is larger than 1 MiB"),
    ],
)
def test_invalid_text_is_an_error_with_its_position(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(text, "f")
    assert message in messages(error)[-1]
    assert len(str(error.value)) < 300


def test_aliases_that_expand_to_very_many_values_are_refused_before_they_are_expanded() -> None:
    layers = [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    bomb = "\n".join(["a: &a [x, x]", *layers])
    assert len(parse("\n".join(bomb.splitlines()[:4])).value["d"]) == 9
    with pytest.raises(SpecError, match=r"values with all aliases expanded"):
        parse(bomb)


def test_all_problems_of_a_text_are_reported_at_once_in_order() -> None:
    with pytest.raises(SpecError) as error:
        parse("z: .inf\na: !t x\na: 1\nb: [", "f")
    assert [line.split(": ")[0] for line in messages(error)] == [
        "f:1:4",
        "f:2:4",
        "f:3:1",
        "f:5:1",
    ]
    with pytest.raises(SpecError, match="more than 100 problems") as error:
        parse("- .inf\n" * 10_000)
    assert len(error.value.problems) == 101


def test_every_use_of_an_alias_is_a_copy_and_its_parts_keep_their_positions() -> None:
    tree = parse("a: &x {b: 1}\nc: *x\n", "f")
    assert tree.value["a"] == tree.value["c"]
    assert tree.value["a"] is not tree.value["c"]
    assert (str(tree.position(("c",))), str(tree.position(("c", "b")))) == ("f:2:4", "f:1:11")


def test_a_path_without_a_value_has_the_position_of_the_value_around_it() -> None:
    tree = parse("a:\n  b: 1", "f")
    assert tree.position(("a", "b", "union tag", 3)) == Position("f", 2, 6)
    assert Tree(1, {}).position(("a",)) is None


def test_the_python_parser_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: &x [1, 'b', {c: ~}]\n'on': |\n  text\n  more\nd: *x\n? e\n"
    fast = parse(text)
    monkeypatch.setattr(archdsl_yaml, "LOADER", yaml.SafeLoader)
    assert parse(text) == fast
