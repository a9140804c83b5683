"""The JSON schema (draft 2020-12) of the language, for editors that check and complete YAML.

Every value may be left to a search, and every whole number to the budget. A schema cannot express
rules about several values, such as that the head size divides the width; ``archdsl build`` checks
these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from archdsl.lang import strict
from archdsl.lang.distributions import Choice, Fit, Range
from archdsl.lang.registry import families
from archdsl.lang.spec import ModelSpec, Part
from archdsl.lang.strict import Strict

Schema: TypeAlias = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SIZE = r"^\d+(\.\d+)?([eE]\+?\d{1,2})? ?([kKmMbBgGtT]|[kKmMgGtT][iI][bB])?$"
# pydantic writes these limits under its own names if a validator runs before the type is checked
KEYWORDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
}
# keys of a file that are no fields of a spec: they are resolved when it is read
OF_FILES = {
    "extends": {"type": "string", "description": "another spec file to start from"},
    "set": {"type": "object", "description": "values to change in it, by their dotted path"},
}
RANGE, FIT = {"$ref": "#/$defs/range"}, {"$ref": "#/$defs/fit"}


class Generator(GenerateJsonSchema):
    """Adds the two notations that validators accept: sizes such as "4k", and one value per step."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> Schema:
        """Overrides pydantic's schema of a field that has a validator before its type check."""
        inner = super().function_before_schema(schema)
        match schema["function"]["function"]:
            case strict._size:
                return {"anyOf": [inner, {"type": "string", "pattern": SIZE}]}
            case strict._per_step:
                return {"anyOf": [inner["items"], inner]}
        return inner


def json_schema() -> Schema:
    """Returns the schema of a spec file.

    `archdsl.load` accepts the same files, except that it also refuses values that do not fit
    together.
    """
    defs: dict[str, Schema] = {
        "range": _open_value("search", Range, "low", "high", "default"),
        "fit": _open_value("fit", Fit, "multiple_of", "default"),
    }
    model = _part(ModelSpec, "model", defs)
    model["properties"] |= OF_FILES
    # a file that extends another need not repeat the required keys
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
    """The schema of one kind.

    Each of its fields becomes a definition, because the subtrees of a choice refer to it too.
    """
    schema = part.model_json_schema(schema_generator=Generator)
    properties: dict[str, Schema] = {}
    for key, field in schema["properties"].items():
        place = f"{name}.{key}"
        defs[place] = _or_open(_clean(field, schema.get("$defs", {})), place, defs)
        about = {word: field[word] for word in ("description", "default") if word in field}
        properties[key] = {"$ref": f"#/$defs/{place}"} | about
    return _object(properties, schema.get("required", [])) | {"description": sentence(part)}


def _or_open(value: Schema, place: str, defs: dict[str, Schema]) -> Schema:
    """The schema of a field: its value, a search value or, for whole numbers, a fit value.

    The fields inside of it may be left open too.
    """
    for array in _alternatives(value):
        if "type" in array.get("items", {}):
            defs[f"{place}.item"] = _or_open(array["items"], f"{place}.item", defs)
            array["items"] = {"$ref": f"#/$defs/{place}.item"}
    for mapping in _alternatives(value):
        for key, field in mapping.get("properties", {}).items():
            defs[f"{place}.{key}"] = _or_open(field, f"{place}.{key}", defs)
            mapping["properties"][key] = {"$ref": f"#/$defs/{place}.{key}"}
    types = {one.get("type") for one in _alternatives(value)}
    open_values = [FIT] if "integer" in types else []
    open_values += [RANGE] if types & {"integer", "number"} else []
    return {"anyOf": [value, *open_values, _choice(f"#/$defs/{place}")]}


def _alternatives(schema: Schema) -> Iterator[Schema]:
    yield schema
    for one in schema.get("anyOf", ()):
        yield from _alternatives(one)


def _open_value(key: str, kind: type[Range | Fit], *required: str) -> Schema:
    body = _clean(kind.model_json_schema(), {}) | {"required": list(required)}
    return _object({key: body}, [key])


def _choice(ref: str) -> Schema:
    """The schema of a choice among scalars, or among labelled subtrees that ``ref`` describes."""
    labelled = {"type": "object", "minProperties": 1, "additionalProperties": {"$ref": ref}}
    listed = {"type": "array", "minItems": 1, "items": {"not": {"type": ["array", "object"]}}}
    body = _clean(_choice_schema(), {})
    body["properties"]["choices"] = {"anyOf": [listed, labelled]}
    return _object({"search": body}, ["search"])


@cache
def _choice_schema() -> Schema:
    """The schema is the same at the hundred places where a choice may be."""
    return Choice.model_json_schema()


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _clean(schema: Schema, inner: Mapping[str, Schema]) -> Schema:
    """Resolves references, removes titles and defaults, and renames limits to schema keywords."""
    match schema:
        case {"x-family": family, **rest}:
            kinds: list[Schema] = [{"$ref": f"#/$defs/{family}"}]
            if default := rest.get("x-default"):
                kinds.append({"$ref": f"#/$defs/{family}.{default}"})  # its kind may be left out
            if "default" in rest and rest["default"] is None:
                kinds.append({"type": "null"})
            return {"anyOf": kinds}
        case {"$ref": path}:
            return _clean(inner[path.rpartition("/")[2]], inner)
    cleaned = {KEYWORDS.get(key, key): value for key, value in schema.items()}
    for key in ("title", "default", "$defs"):
        cleaned.pop(key, None)
    if cleaned.get("type") == "array" and "minLength" in cleaned:
        cleaned["minItems"] = cleaned.pop("minLength")
    if "anyOf" in cleaned:
        cleaned["anyOf"] = [_clean(one, inner) for one in cleaned["anyOf"]]
    if "items" in cleaned:
        cleaned["items"] = _clean(cleaned["items"], inner)
    if "properties" in cleaned:
        cleaned["properties"] = {k: _clean(one, inner) for k, one in cleaned["properties"].items()}
    return cleaned


def sentence(part: type[Strict]) -> str:
    """Returns the first paragraph of the docstring of a kind, as one line."""
    return " ".join((part.__doc__ or "").partition("\n\n")[0].replace("``", "`").split())
