"""A spec without pydantic, for the file that `archdsl.interop.source_bundle` makes of the source.

There it takes the place of `archdsl.lang.spec.Part`; in the project itself nobody uses it.
"""

from __future__ import annotations

from typing import Any, ClassVar


class Node:
    """A part of a spec, read from plain data; its kind decides which class it is of."""

    family: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    fields: ClassVar[dict[str, str]] = {}  # and of which family the parts in it are, if any
    kinds: ClassVar[dict[tuple[str, str], type[Node]]] = {}

    def __init_subclass__(cls) -> None:
        cls.kinds[cls.family, cls.kind] = cls

    @classmethod
    def model_validate(cls, data: Any) -> Any:
        """Raises ValueError if a field is missing or unknown."""
        if not isinstance(data, dict) or data.keys() != cls.fields.keys():
            raise ValueError(f"a {cls.__name__} must have exactly the keys {list(cls.fields)}")
        node = cls()
        for name, family in cls.fields.items():
            setattr(node, name, cls.part(family, data[name]))
        return node

    @classmethod
    def part(cls, family: str, value: Any) -> Any:
        """The node of a mapping, a tuple for a list; other values, and those of no family, as
        they are.

        Raises ValueError for a kind that the exported source does not hold.
        """
        if isinstance(value, list):
            return tuple(cls.part(family, item) for item in value)
        if not family or not isinstance(value, dict):  # a word stands for itself
            return value
        kind = value.get("kind")
        found = cls.kinds.get((family, str(kind)))
        if found is None:
            raise ValueError(f"unknown kind {kind!r} of {family}")
        return found.model_validate(value)
