"""The catalogue: every kind that a spec can use, with its fields and an example."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Group, RenderableType
from rich.text import Text

from archdsl.errors import Problem, SpecError, did_you_mean
from archdsl.lang.registry import families
from archdsl.lang.schema import SIZE, Generator, Schema, sentence
from archdsl.lang.source import dump, dump_inline
from archdsl.lang.spec import Part, to_tree
from archdsl.lang.strict import Strict
from archdsl.reports.tables import TwoColumns


@dataclass(frozen=True)
class CatalogueField:
    """A field of a kind. ``default`` is written as in a file; None if the field is required."""

    name: str
    type: str
    default: str | None
    description: str


@dataclass(frozen=True)
class CatalogueEntry:
    """One kind of a family. ``example`` is valid YAML of this kind."""

    family: str
    kind: str
    sentence: str
    fields: list[CatalogueField]
    example: str


def catalogue(kind: str | None = None) -> list[CatalogueEntry]:
    """Returns all kinds, or those named ``kind``.

    Raises SpecError with a suggestion if there is no kind of that name.
    """
    entries = [
        _entry(family, name, part)
        for family, kinds in families().items()
        for name, part in kinds.items()
        if kind in (None, name)
    ]
    if not entries:
        known = sorted({name for kinds in families().values() for name in kinds})
        hint = did_you_mean(str(kind), known)
        raise SpecError(Problem("", f"no kind {kind!r}{hint}; known kinds: {', '.join(known)}"))
    return entries


def _entry(family: str, kind: str, part: type[Part]) -> CatalogueEntry:
    schema = part.model_json_schema(schema_generator=Generator)
    fields = [
        CatalogueField(
            name=name,
            type=_type(schema["properties"][name]),
            default=_default(field),
            description=field.description or "",
        )
        for name, field in part.model_fields.items()
        if name != "kind"
    ]
    return CatalogueEntry(family, kind, sentence(part), fields, dump(dict(part.example)))


def _default(field: FieldInfo) -> str | None:
    value = field.get_default()
    if value is PydanticUndefined:
        return None
    if isinstance(value, Strict):
        tree = to_tree(value)
        return str(tree["kind"]) if list(tree) == ["kind"] else dump_inline(tree)
    return dump_inline(value[0] if isinstance(value, tuple) and len(value) == 1 else value)


def _type(schema: Schema) -> str:
    """Describes the type of a field: ``int``, ``own | shared``, ``router``, ``size such as 4k``."""
    match schema:
        case {"x-family": str(family)}:
            return family
        case {"enum": list(words)}:
            return " | ".join(map(str, words))
        case {"type": "array", "items": items}:
            return f"list of {_type(items)}"
        case {"anyOf": list(several)}:
            found = dict.fromkeys(map(_type, several))
            found.pop("null", None)  # the default shows that the field may be null
            return " or ".join(found)
        case {"type": "string", "pattern": str(pattern)} if pattern == SIZE:
            return "size such as 4k"
        case {"type": str(name)}:
            return {"integer": "int", "number": "float", "boolean": "true | false"}.get(name, name)
    return ""


def listing() -> RenderableType:
    """Returns a list of all kinds by family, with one line for each kind."""
    parts: list[RenderableType] = []
    for family, kinds in families().items():
        facts = [(f"  {kind}", sentence(part)) for kind, part in kinds.items()]
        parts += [Text(family, "bold"), TwoColumns(facts), ""]
    return Group(*parts, "`archdsl blocks KIND` shows the fields of a kind and an example.")


def page(entry: CatalogueEntry) -> RenderableType:
    """Returns the description of one kind: its fields with types and defaults, and an example."""
    parts: list[RenderableType] = [
        Text.assemble((entry.kind, "bold"), f", a kind of {entry.family}"),
        TwoColumns([("", entry.sentence)]),
    ]
    if entry.fields:
        facts = [(f"  {field.name}", _about(field)) for field in entry.fields]
        parts += ["", Text("fields", "bold"), TwoColumns(facts)]
    parts += ["", Text("example", "bold"), Text(textwrap.indent(entry.example, "  "), end="")]
    return Group(*parts)


def _about(field: CatalogueField) -> str:
    default = "required" if field.default is None else f"default {field.default}"
    described = field.default == "null" and "default:" in field.description
    return "; ".join(filter(None, [field.type, "" if described else default, field.description]))
