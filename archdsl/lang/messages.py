"""Rewrites pydantic's validation errors: what is wrong, what was found, what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from archdsl.errors import did_you_mean

# pydantic's types of errors and their messages, formatted with the context of the error
RULES = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping",
    "too_short": "needs at least {min_length} entries",
    "too_long": "takes at most {max_length} entries",
}


def explain(
    error: ValidationError, fields: Mapping[str, FieldInfo]
) -> list[tuple[tuple[str | int, ...], str]]:
    """Returns (path, message) for each error found in a model that has these ``fields``."""
    found = error.errors(include_url=False)
    return [(e["loc"], _message(e, fields)) for e in found if not _is_consequence(e)]


def _is_consequence(error: ErrorDetails) -> bool:
    """Whether a list is too short only because some of its items have errors of their own."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _message(error: ErrorDetails, fields: Mapping[str, FieldInfo]) -> str:
    match error["type"]:
        case "extra_forbidden":
            key = error["loc"][-1]
            return f"unknown key{did_you_mean(str(key), fields)}; known keys: {', '.join(fields)}"
        case "missing" if isinstance(error["loc"][-1], int):
            return "is missing: the list needs more entries"
        case "missing":
            description = fields[str(error["loc"][-1])].description
            return "is required" + (f": {description}" if description else "")
        case "value_error":
            return str(error["ctx"]["error"])
        case kind if kind in RULES:
            bounds = {name: _number(bound) for name, bound in error.get("ctx", {}).items()}
            return f"{RULES[kind].format(**bounds)}, got {_shown(error['input'])}"
        case _:
            return error["msg"]


def _number(bound: Any) -> Any:
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _shown(value: Any) -> str:
    match value:
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return f"a list of {len(value)}"
        case None:
            return "nothing"
        case _:
            text = repr(value)
            return text if len(text) <= 60 else f"{text[:57]}..."
