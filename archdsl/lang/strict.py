"""The base class of validated data, and sizes written as words.

A config, which becomes options of the command line, needs these and no more of the language.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from archdsl.errors import describe
from archdsl.lang.messages import explain

Path = tuple[str | int, ...]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "p": 10**15}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?(?:e\+?\d\d?)?) ?([a-z]*)", re.IGNORECASE | re.ASCII)


class Strict(BaseModel):
    """The base of all validated data: immutable, strict in types, without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # validators are built only for the kinds that a spec uses
    )

    @model_validator(mode="wrap")
    @classmethod
    def _rewrite_errors(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            # `from None`, because the rewritten error has all information of the first one
            problems = explain(error, cls.model_fields)
            raise validation_error(
                [(_as_written(path, value), why) for path, why in problems]
            ) from None


def _as_written(path: Path, value: Any) -> Path:
    """Removes the list index from the path of a per-step value that was written as one number."""
    if not isinstance(value, Mapping) or len(path) < 2 or path[1] != 0:
        return path
    return path if isinstance(value.get(path[0]), list | tuple) else path[:1] + path[2:]


def validation_error(problems: list[tuple[Path, str]]) -> ValidationError:
    """Makes one pydantic error from pairs of (path, message)."""
    return ValidationError.from_exception_data(
        "spec",
        [
            InitErrorDetails(
                type=PydanticCustomError("archdsl", "{message}", {"message": message}),
                loc=path,
                input=None,
            )
            for path, message in problems
        ],
    )


def parse_size(value: object) -> int:
    """Converts a size such as ``162M``, ``1.2B``, ``8k``, ``64KiB`` or ``2e9`` to an int.

    k, M, B (or G), T and P are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024. Upper and
    lower case are the same. Raises ValueError if the value is not a whole number of zero or more.
    """
    size = _fraction(value)
    if size is None or size < 0 or size.denominator != 1:
        wanted = "a whole number, also written as 162M, 1.2B, 8k or 64KiB"
        raise ValueError(f"must be {wanted}; got {describe(value)}")
    return int(size)


def _fraction(value: object) -> Fraction | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return Fraction(value)
    if isinstance(value, float) and math.isfinite(value):
        return Fraction(value)
    if isinstance(value, str) and (found := SIZE.fullmatch(value.strip())):
        unit = UNITS.get(found[2].casefold())
        return Fraction(found[1]) * unit if unit else None
    return None


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str | float) else value


Size = Annotated[int, BeforeValidator(_size)]
"""A whole number that may be written as 162M, 4k or 64KiB."""
