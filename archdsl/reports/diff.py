"""The differences between two specs: their values, their total costs and the cost of each node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from archdsl.costs.receipt import Receipt, cost
from archdsl.lang.source import dump_inline
from archdsl.lang.spec import ModelSpec, Path, to_tree
from archdsl.lang.strict import Strict
from archdsl.reports.layout import StackingTable, TwoColumns
from archdsl.reports.outline import OutlineNode, outline
from archdsl.reports.tables import short

ABSENT = "absent"
TOTALS = {
    "parameters": "params",
    "in matrices": "matrices",
    "FLOPs/token": "expected",
    "lightest": "lightest",
    "heaviest": "heaviest",
    "training FLOPs/token": "train_flops_per_token",
    "KV bytes/token": "kv_bytes_per_token",
    "state bytes": "state_bytes",
}


@dataclass(frozen=True)
class Change:
    """A value that differs. ``first`` and ``second`` are the values as written in a file."""

    path: str
    first: str
    second: str


@dataclass(frozen=True)
class NodeChange:
    """A node whose cost differs; it is None for a model that does not have it."""

    path: str
    first: OutlineNode | None
    second: OutlineNode | None


@dataclass(frozen=True)
class SpecDiff:
    """All differences between two specs.

    ``same_model``: both describe the same model, even if their names or notation differ.
    """

    names: tuple[str, str]
    contexts: tuple[int, int]
    same_model: bool
    changes: list[Change]
    receipts: tuple[Receipt, Receipt]
    nodes: list[NodeChange]


def diff_specs(first: ModelSpec, second: ModelSpec) -> SpecDiff:
    """Compares two specs. The changes are in the order of the fields.

    >>> import archdsl
    >>> both = diff_specs(archdsl.load("loop"), archdsl.load("itt"))
    >>> both.changes[1].path, both.changes[1].second
    ('blocks.0.body.1.router', '{kind: top_k, capacity: 0.7}')
    """
    contexts = (first.context, second.context)
    return SpecDiff(
        names=(first.name, second.name),
        contexts=contexts,
        same_model=first.fingerprint() == second.fingerprint(),
        changes=list(_changes(first, second, ())),
        receipts=(cost(first), cost(second)),
        nodes=list(_node_changes(outline(first), outline(second), contexts)),
    )


def _changes(first: Any, second: Any, path: Path) -> Iterator[Change]:
    if isinstance(first, Strict) and type(first) is type(second):
        for name in type(first).model_fields:
            yield from _changes(getattr(first, name), getattr(second, name), (*path, name))
    elif _are_parts(first) and _are_parts(second):
        for i, (one, other) in enumerate(zip_longest(first, second, fillvalue=ABSENT)):
            yield from _changes(one, other, (*path, i))
    elif first != second:
        yield Change(".".join(map(str, path)), _as_written(first), _as_written(second))


def _are_parts(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Strict)


def _as_written(value: Any) -> str:
    if isinstance(value, Strict):
        return dump_inline(to_tree(value))
    return dump_inline(value[0] if isinstance(value, tuple) and len(value) == 1 else value)


def _node_changes(
    first: OutlineNode, second: OutlineNode, contexts: tuple[int, int]
) -> Iterator[NodeChange]:
    """Compares nodes from the root down. It does not go below a node that was added or removed, or
    whose kind has changed."""
    if _figures(first, contexts[0]) != _figures(second, contexts[1]):
        yield NodeChange(first.path, first, second)
    if first.kind != second.kind:
        return
    one, other = ({n.path: n for n in node.below} for node in (first, second))
    for path in dict.fromkeys([*one, *other]):
        if path in one and path in other:
            yield from _node_changes(one[path], other[path], contexts)
        elif any((one | other)[path].cost[:3]):
            yield NodeChange(path, one.get(path), other.get(path))


def _figures(node: OutlineNode | None, context: int) -> tuple[int, float]:
    """Returns the parameters and the FLOPs per token of a node."""
    return (node.cost.params, node.cost.flops / context) if node else (0, 0.0)


def diff_data(both: SpecDiff) -> dict[str, Any]:
    """Returns the differences as data for JSON; the FLOPs of nodes are per token."""
    return {
        "names": both.names,
        "same_model": both.same_model,
        "changes": [asdict(change) for change in both.changes],
        "receipts": [receipt._asdict() for receipt in both.receipts],
        "nodes": [
            {
                "path": node.path,
                "first": node.first and _figures(node.first, both.contexts[0]),
                "second": node.second and _figures(node.second, both.contexts[1]),
            }
            for node in both.nodes
        ],
    }


def diff_tables(both: SpecDiff) -> RenderableType:
    """Returns tables of the values, totals and nodes that differ."""
    parts: list[RenderableType] = [Text(f"{both.names[0]} -> {both.names[1]}", "bold")]
    if both.same_model:
        parts.append("the same model" + (", written differently" if both.changes else ""))
    if both.changes:
        parts += ["", TwoColumns([(c.path, f"{c.first} -> {c.second}") for c in both.changes])]
    if not both.same_model:
        parts += ["", _totals(both)]
    if both.nodes:
        parts += ["", _nodes(both)]
    return Group(*parts)


def _totals(both: SpecDiff) -> StackingTable:
    table = StackingTable("", *both.names, "change")
    for name, field in TOTALS.items():
        one, other = (getattr(receipt, field) for receipt in both.receipts)
        if field == "state_bytes" and not one and not other:
            continue  # most models have no state of fixed size
        change = "=" if one == other else f"{other / one - 1:+.1%}" if one else ""
        table.add_row(name, f"{one:,.0f}", f"{other:,.0f}", change)
    return table


def _nodes(both: SpecDiff) -> StackingTable:
    table = StackingTable("node", "parameters", "FLOPs/token")
    for node in both.nodes:
        one = _figures(node.first, both.contexts[0])
        other = _figures(node.second, both.contexts[1])
        figures = (_arrow(short(a), short(b)) for a, b in zip(one, other, strict=True))
        table.add_row(node.path or "model", *figures)
    return table


def _arrow(first: str, second: str) -> str:
    return first if first == second else f"{first} -> {second}"
