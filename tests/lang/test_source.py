"""Spec files: inheritance, overrides, merging, sizes and error messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archdsl import sizes
from archdsl.errors import Position, Problem, SpecError, did_you_mean
from archdsl.lang import source

KEYS = st.sampled_from("abc")
VALUES = st.integers(0, 3) | st.none() | st.lists(st.integers(0, 3), max_size=2)
MAPPINGS = st.recursive(
    st.dictionaries(KEYS, VALUES),
    lambda inner: st.dictionaries(KEYS, VALUES | inner),
    max_leaves=6,
)


def paths(value: Any, path: source.Path = ()) -> Iterator[tuple[source.Path, Any]]:
    yield path, value
    items = value.items() if isinstance(value, dict) else []
    for part, item in enumerate(value) if isinstance(value, list) else items:
        yield from paths(item, (*path, part))


def complaints(error: pytest.ExceptionInfo[SpecError]) -> list[str]:
    return str(error.value).splitlines()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and one spec that comes with the package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "plain.yaml").write_text("name: plain\ndim: 8\n")
    monkeypatch.setattr(source, "SPECS", tmp_path / "shipped")
    return tmp_path


def test_every_shipped_spec_is_found_by_name() -> None:
    specs = source.shipped_specs()
    assert "itt" in specs
    for name, file in specs.items():
        assert source.read(name) == source.read(file)


@pytest.mark.parametrize("name", ["plain", "plain.yaml", "specs/plain.yaml", "specs/plain"])
def test_a_file_is_preferred_to_a_shipped_spec_and_that_to_a_folder(here: Path, name: str) -> None:
    assert source.read(name).value["dim"] == 8
    (here / name).mkdir(parents=True)
    assert source.read(name).value["dim"] == 8
    (here / name).rmdir()
    (here / name).write_text("dim: 9")
    assert source.read(name).value == {"dim": 9}


def test_a_file_that_is_not_readable_text_is_refused_without_blocking(here: Path) -> None:
    os.mkfifo("pipe.yaml")
    Path("latin.yaml").write_bytes(b"a: \xc3\xa9\nb: \xc3\xa9\xe9")
    Path("wide.yaml").write_bytes("a: 1".encode("utf-16"))
    Path("big.yaml").write_bytes(b"\xff" * (2**20 + 1))
    Path("list.yaml").write_text("- 1")
    for name, message in {
        "pipe.yaml": "pipe.yaml: is a pipe, socket or device, not a file",
        "shipped": "shipped: is a directory, not a file",
        "plan": "plan: no such file (did you mean 'plain'?); the specs that come with archdsl are ",
        "list.yaml/x": "list.yaml/x: cannot be read: Not a directory",
        "a\0b": "is not a valid file name",
        "latin.yaml": "latin.yaml:2:5: not UTF-8 text (byte 0xe9); save the file as UTF-8",
        "wide.yaml": "wide.yaml:1:1: not UTF-8 text",
        "big.yaml": "big.yaml: is larger than 1 MiB",
        "list.yaml": "list.yaml:1:1: a spec is a mapping of keys to values, got a list",
    }.items():
        with pytest.raises(SpecError) as error:
            source.read(name)
        assert message in str(error.value)


def test_a_file_that_may_not_be_read_or_became_a_pipe_is_an_error(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    os.mkfifo("pipe.yaml")
    monkeypatch.setattr(source, "why_unreadable", lambda path: None)
    with pytest.raises(SpecError, match=r"pipe.yaml: is empty"):
        source.read("pipe.yaml")
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(SpecError, match=r"pipe.yaml: cannot be read: Permission denied"):
        source.read("pipe.yaml")


def test_a_byte_order_mark_is_skipped(here: Path) -> None:
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbfa: .inf")
    with pytest.raises(SpecError, match=r"bom.yaml:1:4: a"):
        source.read("bom.yaml")


def test_values_from_extends_and_set_keep_their_positions(here: Path) -> None:
    Path("sub").mkdir()
    Path("sub/root.yaml").write_text("extends: plain")
    Path("sub/base.yaml").write_text(
        "extends: root.yaml\nset: {dim: 16}\nblocks: [{kind: a, n: 1}]\n"
    )
    Path("kid.yaml").write_text("extends: sub/base.yaml\nset:\n  blocks.0.n: {x: 2}\ntop: 1\n")
    tree = source.read("kid.yaml")
    assert tree.value == {
        "name": "plain",
        "dim": 16,
        "blocks": [{"kind": "a", "n": {"x": 2}}],
        "top": 1,
    }
    assert {
        path: str(position).removeprefix(f"{here}/") for path, position in tree.positions.items()
    } == {
        (): "kid.yaml:1:1",
        ("name",): "shipped/plain.yaml:1:7",
        ("dim",): "sub/base.yaml:2:12",
        ("blocks",): "sub/base.yaml:3:9",
        ("blocks", 0): "sub/base.yaml:3:10",
        ("blocks", 0, "kind"): "sub/base.yaml:3:17",
        ("blocks", 0, "n"): "kid.yaml:3:15",
        ("blocks", 0, "n", "x"): "kid.yaml:3:19",
        ("top",): "kid.yaml:4:6",
    }


def test_errors_of_extends_have_the_position_of_their_cause(here: Path) -> None:
    Path("a.yaml").write_text("extends: b.yaml")
    Path("b.yaml").write_text("x: 1\nextends: ./a.yaml")
    for i in range(20):
        Path(f"c{i}.yaml").write_text(f"extends: c{i + 1}.yaml" if i < 17 else "x: 1")
    assert source.read("c1.yaml").value == {"x": 1}  # sixteen levels
    for text, message in {
        "extends: a.yaml": "a.yaml:1:10: extends: is circular: a.yaml -> a.yaml.",
        "extends: b.yaml": "circular: a.yaml -> b.yaml -> a.yaml",
        "extends: c0.yaml": "c15.yaml:1:10: extends: is nested more than 16 files deep",
        "x: 1\nextends: [b]": "a.yaml:2:10: extends: must be the name of one spec file, got",
        "extends: plan": "a.yaml:1:10: extends: plan: no such file (did you mean 'plain'?)",
        "extends: shipped": "a.yaml:1:10: extends: shipped: is a directory",
        "set: [1]": "a.yaml:1:6: set: must map paths to values, as in {blocks.0.repeat: 2}; got",
        "x: [1]\nset: {x.1: 2, y.z: 3}": "a.yaml:2:20: y.z: the spec has no key 'y'",
    }.items():
        Path("a.yaml").write_text(text)
        with pytest.raises(SpecError) as error:
            source.read("a.yaml")
        assert message in f"{error.value}."


@given(MAPPINGS, MAPPINGS)
def test_a_merge_has_the_values_of_the_patch_and_else_those_of_the_base(old: Any, new: Any) -> None:
    base, patch = source.from_value(old, "base"), source.from_value(new, "patch")
    empty = source.Tree({}, {})
    assert (
        source.merge(base, base) == source.merge(base, empty) == source.merge(empty, base) == base
    )
    merged = source.merge(base, patch)
    assert source.merge(merged, patch) == merged
    assert set(merged.positions) == {path for path, _ in paths(merged.value)}
    for path, item in paths(merged.value):
        if not isinstance(item, dict):
            owner = {"base": old, "patch": new}[merged.positions[path].file]
            assert dict(paths(owner))[path] == item
    for path, item in paths(new):
        if not isinstance(item, dict) or not item:
            assert item == {} or dict(paths(merged.value))[path] == item
            assert merged.positions[path].file == "patch"


@pytest.mark.parametrize(
    ("base", "patch", "value"),
    [
        ("a: {kind: x, p: 1}", "a: {kind: y, q: 2}", {"a": {"kind": "y", "q": 2}}),
        ("a: {kind: x, p: 1}", "a: {kind: x, q: 2}", {"a": {"kind": "x", "p": 1, "q": 2}}),
        ("a: {kind: x, p: 1}", "a: {q: 2}", {"a": {"kind": "x", "p": 1, "q": 2}}),
        ("a: {search: {low: 1}}", "a: {fit: {high: 2}}", {"a": {"fit": {"high": 2}}}),
        (
            "a: {search: {low: 1}}",
            "a: {search: {choices: [1]}}",
            {"a": {"search": {"choices": [1]}}},
        ),
        ("a: {kind: x}", "a: {search: {low: 1}}", {"a": {"search": {"low": 1}}}),
        ("a: {fit: {low: 1}}", "a: {kind: x}", {"a": {"kind": "x"}}),
        ("a: [1, 2]", "a: [3]", {"a": [3]}),
        ("a: {b: 1}", "a: null", {"a": None}),
    ],
)
def test_a_merge_replaces_other_kinds_open_values_and_lists_as_a_whole(
    base: str, patch: str, value: Any
) -> None:
    assert source.merge(source.parse(base), source.parse(patch)).value == value


def test_an_override_changes_one_value_and_is_named_in_errors() -> None:
    tree = source.parse("blocks:\n  - {repeat: 4, body: [1, 2]}\n", "f")
    changed = source.override(
        tree, ["blocks.0.repeat=2", "blocks.0.body.1 = {kind: 1e-3}", "new=~"]
    )
    body = [1, {"kind": 0.001}]
    assert changed.value == {"blocks": [{"repeat": 2, "body": body}], "new": None}
    assert tree == source.parse("blocks:\n  - {repeat: 4, body: [1, 2]}\n", "f")
    assert str(changed.position(("blocks", 0, "repeat"))) == "--set blocks.0.repeat=2"
    assert changed.position(("blocks", 0, "body", 0)) == tree.position(("blocks", 0, "body", 0))
    assert set(changed.positions) == {path for path, _ in paths(changed.value)}


def test_all_impossible_overrides_are_reported_at_once() -> None:
    tree = source.parse("blocks: [{repeat: 4}]")
    wrong = {
        "block.0=1": "block.0: the spec has no key 'block' (did you mean 'blocks'?)",
        "blocks.1=1": "blocks.1: blocks is a list of 1 and has no item '1'",
        "blocks.-1=1": "blocks.-1: blocks is a list of 1 and has no item '-1'",
        "blocks.0.repeat.x=1": "blocks.0.repeat.x: blocks.0.repeat is 4, it has no key 'x'",
        "blocks.0.=1": "blocks.0.: blocks.0 is a mapping, it has no key ''",
        "repeat": "must be path=value, as in blocks.0.repeat=2",
        "a=": "must be path=value, as in blocks.0.repeat=2",
        "a=[": "not valid YAML: did not find expected node content",
        "a=.inf": "number .inf is not finite",
    }
    with pytest.raises(SpecError) as error:
        source.override(tree, list(wrong))
    lines = complaints(error)
    assert len(lines) == len(wrong)
    for assignment, message in wrong.items():
        assert any(line.startswith(f"--set {assignment}: {message}") for line in lines)


def test_overrides_cannot_nest_deeper_than_a_file() -> None:
    deep = "x=" + "[" * 60 + "1" + "]" * 60
    deeper = "x" + ".0" * 59 + "=" + "[" * 40 + "1" + "]" * 40
    tree = source.override(source.parse("x: 1"), [deep, deeper])
    assert max(map(len, tree.positions)) == 100
    with pytest.raises(SpecError, match="nested more than 100 levels deep"):
        source.override(tree, ["x" + ".0" * 98 + "=[[2]]"])


def test_after_very_many_wrong_settings_no_more_are_reported() -> None:
    with pytest.raises(SpecError) as error:
        source.override(source.parse("x: 1"), ["x.y=1", *[f"y{i}.z=2" for i in range(500)]])
    assert len(error.value.problems) == 101


def test_a_python_value_becomes_an_independent_tree() -> None:
    value = {"a": ({"b": 1},)}
    tree = source.from_value(value, "winner")
    assert tree.value == {"a": [{"b": 1}]}
    assert (
        str(Problem("a.0.b", "is wrong", tree.position(("a", 0, "b")))) == "winner: a.0.b: is wrong"
    )


@pytest.mark.parametrize(
    ("size", "number"),
    [
        *[("162M", 162_000_000), ("1.2B", 1_200_000_000), ("64KiB", 65_536), ("2e9", 2 * 10**9)],
        *[
            ("8k", 8000),
            ("0.8G", 800_000_000),
            ("1T", 10**12),
            ("1P", 10**15),
            ("1e15", 10**15),
            ("1.5MiB", 1_572_864),
        ],
        *[
            ("3GiB", 3 * 2**30),
            ("162 m", 162_000_000),
            (" 7 ", 7),
            (5, 5),
            (0, 0),
            (2e9, 2 * 10**9),
        ],
    ],
)
def test_sizes_may_be_written_with_units(size: object, number: int) -> None:
    got = sizes.parse_size(size)
    assert (got, type(got)) == (number, int)


@pytest.mark.parametrize(
    "size",
    [
        *[True, None, -1, "-1", 1.5, "1.5", "0.0001k", float("nan"), float("inf"), "nan", [1]],
        *["M", "", "1e", "1X", "1kB", "1_000", "1,000", "0x10", "1 2", "1e-3G", "٣"],
        *["1e999999999", "1" * 1000],
    ],
)
def test_sizes_that_are_not_whole_or_not_sizes_are_refused(size: object) -> None:
    with pytest.raises(ValueError, match=r"must be a whole number, also written as 162M.*; got "):
        sizes.parse_size(size)


def test_errors_are_sorted_by_position_and_leave_out_unknown_positions() -> None:
    problems = [
        Problem("b", "late", Position("f", 10, 1)),
        Problem("a", "early", Position("f", 9, 2)),
        Problem("", "nowhere"),
        Problem("b", "late", Position("f", 10, 1)),
    ]
    error = SpecError(problems)
    assert str(error) == "nowhere\nf:9:2: a: early\nf:10:1: b: late"
    assert error.exit_status == 2


def test_only_a_close_word_is_suggested() -> None:
    assert did_you_mean("stpes", ["steps", "body"]) == " (did you mean 'steps'?)"
    assert did_you_mean("zzz", ["steps", "body"]) == ""
