"""The JSON schema accepts valid specs and refuses the errors that an editor can find."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings

from archdsl.errors import SpecError
from archdsl.lang import template
from archdsl.lang.load import fitted
from archdsl.lang.schema import json_schema
from archdsl.lang.source import from_value, parse, shipped_specs
from archdsl.lang.spec import ModelSpec
from archdsl.reports.catalogue import catalogue
from tests.strategies import specs

SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

LOOP = "{kind: loop, steps: 3, router: {kind: prefix, capacity: [0.7, 0.5]}, body: layer}"


def loop(said: str, instead: str) -> str:
    assert said in LOOP
    return f"[{LOOP.replace(said, instead)}]"


def understood(tree: Any) -> ModelSpec:
    """Reads the text as `archdsl build` does."""
    return fitted(template.fill(from_value(tree, "x"), template.defaults))


def file(**changes: str) -> Any:
    """Returns a valid spec file as a tree, with some of its values replaced by other YAML."""
    lines = {"name": "x", "vocab_size": "32k", "context": "64", "dim": "64", "blocks": f"[{LOOP}]"}
    return parse("\n".join(f"{key}: {text}" for key, text in (lines | changes).items()), "x").value


def test_the_schema_itself_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", shipped_specs())
def test_every_shipped_spec_is_valid(name: str) -> None:
    VALIDATOR.validate(parse(shipped_specs()[name].read_text(), name).value)


@settings(max_examples=50)
@given(specs())
def test_every_spec_is_valid_as_written_to_yaml(spec: ModelSpec) -> None:
    VALIDATOR.validate(parse(spec.to_yaml(), "spec").value)


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: f"{entry.family}.{entry.kind}")
def test_every_example_of_the_catalogue_is_valid(entry: Any) -> None:
    part = {"$ref": f"#/$defs/{entry.family}", "$defs": SCHEMA["$defs"]}
    part = SCHEMA if entry.family == "spec" else part
    jsonschema.Draft202012Validator(part).validate(parse(entry.example, "example").value)


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": "[layer]"},
        {"vocab_size": "0.1M", "context": "64KiB"},
        {"dim": "{fit: {multiple_of: 64, default: 1024}}"},
        {"dim": "{search: {low: 64, high: 128, step: 64, default: 64}}"},
        {"blocks": "[{search: {choices: {a: layer, b: {kind: norm}}, default: a}}]"},
        {"blocks": loop("prefix", "{search: {choices: [top_k, random], default: top_k}}")},
        {"blocks": "[{kind: loop, encoding: null, body: layer}]"},
        {"blocks": "[{kind: layer, attention: {head_size: 16}, ffn: {hidden: 4k}}]"},
        {
            "blocks": "[{kind: loop, router: {kind: prefix, capacity: "
            "[{search: {low: 0.1, high: 0.9, default: 0.5}}, 0.5]}, body: layer}]"
        },
        {"training": "{depth: {law: uniform, mean: {search: {choices: [2, 3], default: 3}}}}"},
    ],
)
def test_the_schema_accepts_what_the_language_accepts(changes: dict[str, str]) -> None:
    assert understood(file(**changes))
    VALIDATOR.validate(file(**changes))


def test_a_spec_that_extends_another_may_leave_out_required_keys() -> None:
    VALIDATOR.validate({"extends": "itt.yaml", "set": {"blocks.0.repeat": 2}})


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"dimm": "64"}, []),
        ({"dim": "[64]"}, ["dim"]),
        ({"dim": "0"}, ["dim"]),
        ({"dim": "64Q"}, ["dim"]),
        ({"blocks": "[{kind: layer, attention: {heads: 0}}]"}, ["blocks"]),
        ({"norm": "rmsnorm"}, ["norm"]),
        ({"blocks": "[]"}, ["blocks"]),
        ({"blocks": "[lair]"}, ["blocks"]),
        ({"blocks": "[{kind: loop}]"}, ["blocks"]),
        ({"blocks": loop("steps", "stepz")}, ["blocks"]),
        ({"blocks": loop("prefix", "prefiks")}, ["blocks"]),
        ({"blocks": loop("0.7", "1.7")}, ["blocks"]),
        ({"blocks": loop("layer", "thinking")}, ["blocks"]),
        ({"dim": "{fit: {multiple: 64, default: 1024}}"}, ["dim"]),
        ({"dim": "{search: {low: 64, high: 128}}"}, ["dim"]),
        ({"norm": "{fit: {multiple_of: 64, default: 1024}}"}, ["norm"]),
        ({"blocks": "[{search: {choices: {one: lair}, default: one}}]"}, ["blocks"]),
        ({"training": "{depth: {law: uniformly}}"}, ["training"]),
        ({"training": "{depth: {mean: {search: {choices: [2, 3]}}}}"}, ["training"]),
    ],
)
def test_the_schema_refuses_what_the_language_refuses(
    changes: dict[str, str], place: list[str]
) -> None:
    with pytest.raises(SpecError):
        understood(file(**changes))
    errors = list(VALIDATOR.iter_errors(file(**changes)))
    assert [list(error.path)[:1] for error in errors] == [place]


def test_the_schema_refuses_a_spec_without_a_name() -> None:
    whole = file()
    del whole["name"]
    assert not VALIDATOR.is_valid(whole)


def test_the_schema_describes_each_field_for_an_editor() -> None:
    steps = SCHEMA["$defs"]["block.loop"]["properties"]["steps"]
    assert steps["description"].startswith("passes through the body")
    assert steps["default"] == 2
