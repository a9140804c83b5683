"""The language as a JSON schema (draft 2020-12), for editors that check and complete YAML.

A value may always be left to a search, and a whole number to the budget. What depends on several
values at once (a head size that divides the width) is beyond a schema; ``archdsl build`` says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from archdsl.lang import spec
from archdsl.lang.distributions import Choice, Fit, Range
from archdsl.lang.registry import families
from archdsl.lang.spec import ModelSpec, Part, Strict

Schema: TypeAlias = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SIZE = r"^\d+(\.\d+)?([eE]\+?\d{1,2})? ?([kKmMbBgGtT]|[kKmMgGtT][iI][bB])?$"
# pydantic writes limits in its own words where something is done to the value before
KEYWORDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
}
RANGE, FIT = {"$ref": "#/$defs/range"}, {"$ref": "#/$defs/fit"}


class Generator(GenerateJsonSchema):
    """Knows the two ways in which a value may be written other than as its type."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> Schema:
        inner = super().function_before_schema(schema)
        match schema["function"]["function"]:
            case spec._size:
                return {"anyOf": [inner, {"type": "string", "pattern": SIZE}]}
            case spec._per_step:
                return {"anyOf": [inner["items"], inner]}
        return inner


def json_schema() -> Schema:
    """Of a spec file: what it accepts, `load` accepts, but for values that clash."""
    defs: dict[str, Schema] = {
        "range": _leaf("search", Range, "low", "high", "default"),
        "fit": _leaf("fit", Fit, "multiple_of", "default"),
    }
    model = _part(ModelSpec, "model", defs)
    model["properties"] |= {
        "extends": {"type": "string", "description": "another spec file, taken over key by key"},
        "set": {"type": "object", "description": "single places to change in it, by dotted path"},
    }
    # what a file extends has what it leaves out
    model["anyOf"] = [{"required": ["extends"]}, {"required": model.pop("required")}]
    for family, kinds in families().items():
        for kind, part in kinds.items():
            defs[f"{family}.{kind}"] = _part(part, f"{family}.{kind}", defs)
        defs[family] = _family(family, kinds)
    return {"$schema": DIALECT, "title": "archdsl spec"} | model | {"$defs": defs}


def _family(family: str, kinds: Mapping[str, type[Part]]) -> Schema:
    parts = [{"required": ["kind"], "$ref": f"#/$defs/{family}.{kind}"} for kind in kinds]
    return {"anyOf": [{"enum": sorted(kinds)}, *parts, _choice(f"#/$defs/{family}")]}


def _part(part: type[Strict], name: str, defs: dict[str, Schema]) -> Schema:
    """One kind; each of its fields becomes a definition, as a choice's subtrees are fields too."""
    schema = part.model_json_schema(schema_generator=Generator)
    properties: dict[str, Schema] = {}
    for key, field in schema["properties"].items():
        place = f"{name}.{key}"
        defs[place] = _open(_tidy(field, schema.get("$defs", {})), place, defs)
        about = {word: field[word] for word in ("description", "default") if word in field}
        properties[key] = {"$ref": f"#/$defs/{place}"} | about
    return _object(properties, schema.get("required", [])) | {"description": sentence(part)}


def _open(value: Schema, place: str, defs: dict[str, Schema]) -> Schema:
    """What stands in a field: its value, a search for it or, for whole numbers, a fit."""
    for array in _alternatives(value):
        if "type" in array.get("items", {}):
            defs[f"{place}.item"] = _open(array["items"], f"{place}.item", defs)
            array["items"] = {"$ref": f"#/$defs/{place}.item"}
    types = {one.get("type") for one in _alternatives(value)}
    leaves = [FIT] if "integer" in types else []
    leaves += [RANGE] if types & {"integer", "number"} else []
    return {"anyOf": [value, *leaves, _choice(f"#/$defs/{place}")]}


def _alternatives(schema: Schema) -> Iterator[Schema]:
    yield schema
    for one in schema.get("anyOf", ()):
        yield from _alternatives(one)


def _leaf(key: str, leaf: type[Range | Fit], *required: str) -> Schema:
    body = _tidy(leaf.model_json_schema(), {}) | {"required": list(required)}
    return _object({key: body}, [key])


def _choice(ref: str) -> Schema:
    """A choice among scalars, or among labelled subtrees of what ``ref`` describes."""
    labelled = {"type": "object", "minProperties": 1, "additionalProperties": {"$ref": ref}}
    listed = {"type": "array", "minItems": 1, "items": {"not": {"type": ["array", "object"]}}}
    body = _tidy(_choice_itself(), {})
    body["properties"]["choices"] = {"anyOf": [listed, labelled]}
    return _object({"search": body}, ["search"])


@cache
def _choice_itself() -> Schema:
    """The same at the hundred places where there may be one."""
    return Choice.model_json_schema()


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _tidy(schema: Schema, inner: Mapping[str, Schema]) -> Schema:
    """References resolved, titles and defaults away, limits in the schema's own words."""
    match schema:
        case {"x-family": family, **rest}:
            kinds: list[Schema] = [{"$ref": f"#/$defs/{family}"}]
            if default := rest.get("x-default"):
                kinds.append({"$ref": f"#/$defs/{family}.{default}"})  # without naming its kind
            if "default" in rest and rest["default"] is None:
                kinds.append({"type": "null"})
            return {"anyOf": kinds}
        case {"$ref": path}:
            return _tidy(inner[path.rpartition("/")[2]], inner)
    tidy = {KEYWORDS.get(key, key): value for key, value in schema.items()}
    for key in ("title", "default", "$defs"):
        tidy.pop(key, None)
    if tidy.get("type") == "array" and "minLength" in tidy:
        tidy["minItems"] = tidy.pop("minLength")
    if "anyOf" in tidy:
        tidy["anyOf"] = [_tidy(one, inner) for one in tidy["anyOf"]]
    if "items" in tidy:
        tidy["items"] = _tidy(tidy["items"], inner)
    if "properties" in tidy:
        tidy["properties"] = {k: _tidy(one, inner) for k, one in tidy["properties"].items()}
    return tidy


def sentence(part: type[Strict]) -> str:
    """The first paragraph of a part's docstring, on one line."""
    return " ".join((part.__doc__ or "").partition("\n\n")[0].replace("``", "`").split())
