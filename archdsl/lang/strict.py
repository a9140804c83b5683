"""The base class of validated data, and the type of a size.

A config, which becomes options of the command line, needs these and no more of the language.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from archdsl.lang.messages import explain
from archdsl.sizes import parse_size

Path = tuple[str | int, ...]


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


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str | float) else value


Size = Annotated[int, BeforeValidator(_size)]
"""A whole number that may be written as 162M, 4k or 64KiB."""


def _per_step(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Number = TypeVar("Number", bound=float)
PerStep = Annotated[
    tuple[Number, ...],
    BeforeValidator(_per_step),
    PlainSerializer(lambda values: values[0] if len(values) == 1 else list(values)),
]
"""One value for all routed steps, or a list with one value for each routed step."""
