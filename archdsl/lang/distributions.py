"""What may stand in the place of a value that a spec leaves open.

`Range` and `Choice` are the distributions that a search draws from. `Fit` is a size that is solved
so that the model just meets its budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from archdsl.errors import describe, did_you_mean

MAX_CHOICES = 1000
DEFAULT = Field(description="the value to use without a search")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, got {describe(value)}")
    return value


def _scalar(value: Any) -> Any:
    if isinstance(value, dict | list | tuple):
        raise ValueError(f"must be a number, text, true, false or null, got {describe(value)}")
    return value


def _choices(value: Any) -> Any:
    """Validates choices: returns a tuple of distinct scalars, or a dict from labels to subtrees."""
    if not isinstance(value, dict | list | tuple) or not value:
        raise ValueError("must be a list of values or a mapping of labels to subtrees, not empty")
    if len(value) > MAX_CHOICES:
        raise ValueError(f"has {len(value)} choices, but a search takes at most {MAX_CHOICES}")
    if isinstance(value, dict):
        return value
    if any(isinstance(item, dict | list | tuple) for item in value):
        raise ValueError(
            "choices that are lists or mappings need labels, as in {label: [...], other: [...]}"
        )
    for i, item in enumerate(value):
        if any(_same(item, other) for other in value[:i]):
            raise ValueError(f"choice {describe(item)} is given twice")
    return tuple(value)


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _exact(number: float) -> Fraction:
    # The number as it is written: 0.1 is exactly a tenth, so that 0.3 + 3 * 0.1 is 0.6.
    return Fraction(str(number))


Number = Annotated[int | float, BeforeValidator(_number)]
Scalar = Annotated[bool | int | float | str | None, BeforeValidator(_scalar)]
Name = Annotated[str, Field(min_length=1, max_length=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True
    )


class Range(_Strict):
    """Numbers from ``low`` to ``high``, both included.

    They are whole numbers if all given numbers are, else floats. With ``step`` only the values
    ``low + i * step`` are used. With ``log`` a search samples on a logarithmic scale.
    """

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False
    default: Number = DEFAULT
    name: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_one_type(cls, body: dict[str, Any]) -> dict[str, Any]:
        given = {key: body.get(key) for key in ("low", "high", "step", "default")}
        if not any(type(value) is float for value in given.values()):
            return body
        return body | {key: float(value) for key, value in given.items() if type(value) is int}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0 and cannot be combined with step")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be above 0, got {self.step}")
        if self.step and (_exact(self.high) - _exact(self.low)) % _exact(self.step):
            raise ValueError(
                f"the steps of {self.step} from low {self.low} do not reach high {self.high}"
            )
        self.take(self.default)
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the values are whole numbers."""
        return isinstance(self.low, int)

    def take(self, value: Any) -> int | float:
        """Returns the value as an int or float of this range.

        Raises ValueError if the range does not contain it.
        """
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else int | float):
            wanted = "a whole number" if self.is_whole else "a number"
            raise ValueError(f"must be {wanted}, got {describe(value)}")
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} is outside the range from {self.low} to {self.high}")
        if self.step and (_exact(value) - _exact(self.low)) % _exact(self.step):
            raise ValueError(f"{value} is not {self.low} plus a multiple of the step {self.step}")
        return value if self.is_whole else float(value)

    @property
    def count(self) -> int | None:
        """The number of values, or None if they are continuous."""
        if self.step is None and not self.is_whole:
            return None
        return int((_exact(self.high) - _exact(self.low)) / _exact(self.step or 1)) + 1

    def grid(self, i: int) -> int | float:
        """Returns value number ``i``, counted from 0, rounded as a person would write it.

        For example 0.6 instead of 0.6000000000000001. Raises IndexError if there is no such value,
        or if the values are continuous.
        """
        if self.count is None or not 0 <= i < self.count:
            raise IndexError(f"value {i} of a range that has {self.count or 'no numbered'} values")
        value = _exact(self.low) + i * _exact(self.step or 1)
        return int(value) if self.is_whole else float(value)

    def values(self) -> Iterator[int | float]:
        """Yields all values in rising order; none if they are continuous."""
        return (self.grid(i) for i in range(self.count or 0))


class Choice(_Strict):
    """One of several values, or one of several subtrees, each of which has a label."""

    choices: Annotated[tuple[Scalar, ...] | dict[str, Any], PlainValidator(_choices)]
    default: Scalar = DEFAULT
    name: Name | None = None

    @model_validator(mode="after")
    def _default_is_a_choice(self) -> Self:
        self.take(self.default)
        return self

    def take(self, value: Any) -> Any:
        """Returns the value or label as it is written among the choices.

        Raises ValueError if it is not one of them.
        """
        for choice in self.choices:
            if _same(choice, value):
                return choice
        hint = did_you_mean(str(value), map(str, self.choices))
        known = ", ".join(map(describe, self.choices))
        raise ValueError(f"{describe(value)} is not one of the choices {known}{hint}")

    @property
    def subtrees(self) -> dict[str, Any]:
        """The subtrees by label. It is empty if the choices are scalars."""
        return self.choices if isinstance(self.choices, dict) else {}


class Fit(_Strict):
    """A size that the budget decides: the largest multiple of ``multiple_of`` that meets it."""

    multiple_of: int = Field(ge=1)
    default: int = DEFAULT
    low: int = Field(ge=1, description="the smallest size to try")
    high: int = Field(description="the largest size to try")

    @model_validator(mode="before")
    @classmethod
    def _wide_by_default(cls, body: dict[str, Any]) -> dict[str, Any]:
        unit = body.get("multiple_of")
        least = unit if isinstance(unit, int) and unit > 0 else 1
        return {"low": least, "high": 1024 * least, **body}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key in ("low", "high", "default"):
            if getattr(self, key) % self.multiple_of:
                raise ValueError(f"{key} must be a multiple of {self.multiple_of}")
        if not self.low <= self.default <= self.high:
            raise ValueError(
                f"default {self.default} is outside the range from {self.low} to {self.high}"
            )
        return self


Distribution = Range | Choice
