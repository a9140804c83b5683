"""The catalogue: the keys of a spec and every kind it can use, with fields and an example."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Group, RenderableType
from rich.text import Text

from archdsl.errors import Problem, SpecError, did_you_mean
from archdsl.lang.registry import families
from archdsl.lang.schema import OF_FILES, SIZE, Generator, Schema, sentence
from archdsl.lang.source import dump, dump_inline
from archdsl.lang.spec import Budget, ModelSpec, Part, to_tree
from archdsl.lang.strict import Strict
from archdsl.lang.training import CapacitySpec, DepthSpec, TrainingSpec
from archdsl.reports.layout import TwoColumns

SPEC = "spec"  # the name under which the keys at the top of a file are listed
EXAMPLE = """\
name: mine
vocab_size: 4k
context: 256
dim: 128
blocks:
  - kind: stack
    repeat: 4
    body: [layer]
"""


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


def catalogue(name: str | None = None) -> list[CatalogueEntry]:
    """Returns all kinds and the keys at the top of a spec, or those that ``name`` names.

    A name is that of a kind, of a family, of a key at the top, or ``spec`` for all of these keys.
    Raises SpecError with a suggestion if it is none of them.
    """
    entries = [
        _entry(family, kind, part)
        for family, kinds in families().items()
        for kind, part in kinds.items()
        if name in (None, kind, family)
    ]
    top = _top()
    if name in (None, SPEC):
        return [top, *entries]
    keys = [field for field in top.fields if name in (field.name, field.name.partition(".")[0])]
    entries += [replace(top, fields=keys)] if keys else []
    if not entries:
        known = sorted({kind for kinds in families().values() for kind in kinds})
        others = [SPEC, *families(), *(field.name for field in top.fields)]
        hint = did_you_mean(str(name), [*known, *others])
        raise SpecError(Problem("", f"no kind {name!r}{hint}; known kinds: {', '.join(known)}"))
    return entries


def _top() -> CatalogueEntry:
    """The keys at the top of a spec file."""
    of_budget = ", ".join(Budget.model_fields)
    of_training = ", ".join(TrainingSpec.model_fields)
    types = {
        "blocks": "list of block",
        "budget": f"mapping of {of_budget}",
        "training": f"mapping of {of_training}",
    }
    fields = [replace(f, type=types.get(f.name, f.type)) for f in _fields(ModelSpec)]
    fields += _nested(TrainingSpec, "training")
    fields += [
        CatalogueField(name, str(about["type"]), "null", about["description"])
        for name, about in OF_FILES.items()
    ]
    return CatalogueEntry(SPEC, SPEC, "The keys at the top of a spec file.", fields, EXAMPLE)


def _nested(mapping: type[Strict], name: str) -> list[CatalogueField]:
    """The fields of a mapping and of the mappings in it, by their dotted path."""
    inside: dict[str, type[Strict]] = {}
    if mapping is TrainingSpec:
        inside = {"depth": DepthSpec, "capacity": CapacitySpec}
    fields: list[CatalogueField] = []
    for field in _fields(mapping):
        path = f"{name}.{field.name}"
        part = inside.get(field.name)
        fields += _nested(part, path) if part else [replace(field, name=path)]
    return fields


def _entry(family: str, kind: str, part: type[Part]) -> CatalogueEntry:
    fields = [field for field in _fields(part) if field.name != "kind"]
    return CatalogueEntry(family, kind, sentence(part), fields, dump(dict(part.example)))


def _fields(part: type[Strict]) -> list[CatalogueField]:
    schema = part.model_json_schema(schema_generator=Generator)
    return [
        CatalogueField(
            name=name,
            type=_type(schema["properties"][name]),
            default=_default(field),
            description=field.description or "",
        )
        for name, field in part.model_fields.items()
    ]


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
        case {"properties": dict(keys)}:
            return f"{{{', '.join(keys)}: ...}}"
        case {"type": "string", "pattern": str(pattern)} if pattern == SIZE:
            return "size such as 4k"
        case {"type": str(name)}:
            return {"integer": "int", "number": "float", "boolean": "true | false"}.get(name, name)
    return ""


def listing(family: str | None = None) -> RenderableType:
    """Returns a list of the keys of a spec and of all kinds by family, or of one family."""
    parts: list[RenderableType] = []
    if family is None:
        keys = [(f"  {field.name}", field.description) for field in _top().fields]
        parts += [Text(f"{SPEC}, the keys at the top of a file", "bold"), TwoColumns(keys), ""]
    for name in [family] if family else families():
        facts = [(f"  {kind}", sentence(part)) for kind, part in families()[name].items()]
        parts += [Text(name, "bold"), TwoColumns(facts), ""]
    return Group(*parts, "`archdsl blocks NAME` shows the fields of a kind and an example.")


def shown(name: str | None = None) -> RenderableType:
    """Returns what ``archdsl blocks NAME`` prints: a list, or the page of each kind of that name.

    Raises SpecError with a suggestion if there is nothing of that name.
    """
    if name is None:
        return listing()
    parts: list[RenderableType] = []
    for entry in catalogue(name):
        if entry.kind == name or entry.family == SPEC:
            parts += [page(entry), ""]
    return Group(*parts, listing(name)) if name in families() else Group(*parts[:-1])


def page(entry: CatalogueEntry) -> RenderableType:
    """Returns the description of one kind: its fields with types and defaults, and an example."""
    of = "the keys of a file" if entry.family == SPEC else f"a kind of {entry.family}"
    parts: list[RenderableType] = [
        Text.assemble((entry.kind, "bold"), f", {of}"),
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
