"""The outline of a spec: a tree of nodes with their costs, for receipts and differences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from archdsl.costs.bill import Cost
from archdsl.costs.receipt import sequence_cost
from archdsl.lang.source import dump_inline
from archdsl.lang.spec import BlockSpec, ModelSpec, Part, children, to_tree

ALWAYS_SHOWN = ("steps", "capacity")  # shown also at their default


@dataclass(frozen=True)
class OutlineNode:
    """One part of a model.

    ``path``: its path as `--set` takes it. ``cost``: the cost of all its repeats and steps on one
    full context. ``leaks``: whether a token's selection here depends on later tokens.
    """

    path: str
    kind: str
    label: str
    cost: Cost
    below: tuple[OutlineNode, ...] = ()
    leaks: bool = False

    def walk(self) -> Iterator[OutlineNode]:
        """Yields this node and all nodes below it."""
        yield self
        for node in self.below:
            yield from node.walk()


def outline(spec: ModelSpec) -> OutlineNode:
    """Returns the outline of a model. The costs of its nodes sum up to those of the model.

    >>> import archdsl
    >>> [node.label for node in outline(archdsl.load("tiny")).below][1]
    'layer'
    """
    whole = sequence_cost(spec, detailed=True)
    size = f"{spec.vocab_size} x {spec.dim}"
    labels = {
        "embedding": f"embedding {size}",
        "norm": f"norm {spec.norm}",
        "head": "head, the embedding's matrix" if spec.tie_embeddings else f"head {size}",
    }
    blocks = {f"blocks.{i}": block for i, block in enumerate(spec.blocks)}
    below = tuple(
        _node(blocks[name], name, name, cost)
        if name in blocks
        else OutlineNode(name, name, labels[name], cost)
        for name, cost in whole.parts.items()
    )
    return OutlineNode("", "model", "model", whole, below)


def _node(part: Part, slot: str, path: str, cost: Cost, leaks: bool = False) -> OutlineNode:
    costs = dict(cost.parts)
    if isinstance(part, BlockSpec) and part.built_in_place:
        costs = {part.built_in_place: cost}
    parts = {".".join(map(str, place)): child for place, child in children(part)}
    # a slot may hold a part without cost, such as a residual or a router that selects every token
    filled = [name for name, value in to_tree(part).items() if costs and isinstance(value, dict)]
    below = tuple(
        _node(
            parts[name],
            name,
            f"{path}.{name}",
            costs.get(name, Cost()),
            leaks=name in costs and _sees_ahead(parts[name]),
        )
        if name in parts
        else OutlineNode(f"{path}.{name}", name, name, costs[name])
        for name in dict.fromkeys([*costs, *filled])
    )
    return OutlineNode(path, _kind(part), _label(part, slot), cost, below, leaks)


def _sees_ahead(part: Part) -> bool:
    return part.family == "router" and bool(getattr(part, "leaks", False))


def _kind(part: Part) -> str:
    return str(type(part).model_fields["kind"].default)


def _label(part: Part, slot: str) -> str:
    """Describes a node in one line: ``loop steps=4``, ``stack x4``, ``ffn: feed_forward``."""
    written: dict[str, Any] = to_tree(part)
    kind = _kind(part)
    name = slot.rpartition(".")[2]
    words = [kind if name in (kind, "body") or name.isdecimal() else f"{name}: {kind}"]
    if repeat := written.pop("repeat", None):
        words.append(f"x{repeat}")
    own = {
        key: value for key, value in written.items() if key != "kind" and not _holds_parts(value)
    }
    always = {key: getattr(part, key) for key in ALWAYS_SHOWN if key in type(part).model_fields}
    words += [f"{key}={_value(value)}" for key, value in (always | own).items()]
    if getattr(part, "nested", False):
        words.append("(shares of all tokens)")
    return " ".join(words)


def _value(value: Any) -> str:
    same = isinstance(value, tuple) and len(value) == 1  # one value for all steps
    return dump_inline(value[0] if same else value)


def _holds_parts(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))
