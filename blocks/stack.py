"""Stack: blocks one after the other, the whole series repeated with weights of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pydantic import Field

from archdsl.costs.activations import Footprint, Rows, in_a_row
from archdsl.costs.bill import Bill
from archdsl.lang.spec import Blocks, BlockSpec, Sizes

if TYPE_CHECKING:
    from archdsl.blocks.modules.stack import Stack


class StackSpec(BlockSpec):
    """``repeat`` copies of ``body``, each with its own weights."""

    example: ClassVar = {
        "kind": "stack",
        "repeat": 2,
        "body": [{"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}],
    }
    adaptable: ClassVar[bool] = True

    kind: Literal["stack"] = "stack"
    repeat: int = Field(1, ge=1, le=1024, description="how many copies of the body")
    body: Blocks = Field(description="the blocks of one copy, which run one after the other")

    @property
    def nodes(self) -> int:
        """The stack itself, and every copy of its blocks."""
        return 1 + self.repeat * sum(block.nodes for block in self.body)

    def unrolled(self) -> tuple[BlockSpec, ...]:
        """The blocks of all copies."""
        return tuple(leaf for block in self.body for leaf in block.unrolled()) * self.repeat

    def canonical(self, dim: int) -> BlockSpec:
        """One stack without repeats or stacks inside; the block itself where there is one."""
        stack = super().canonical(dim)
        assert isinstance(stack, StackSpec)
        blocks = stack.unrolled()
        return blocks[0] if len(blocks) == 1 else StackSpec(body=blocks)

    def resized(self, old: Sizes, new: Sizes) -> StackSpec:
        """The same blocks at other sizes, with at most ``new.repeat`` copies.

        If there is an ``old.repeat``, so many copies become ``new.repeat``, and others are in
        proportion, but at least one.
        """
        stack = super().resized(old, new)
        assert isinstance(stack, StackSpec)
        copies = min(self.repeat, new.repeat)
        if old.repeat:
            copies = max(1, round(self.repeat * new.repeat / old.repeat))
        return stack.model_copy(update={"repeat": copies})

    def with_copies(self) -> StackSpec:
        """All copies written out in one body."""
        body = tuple(cast(BlockSpec, block.with_copies()) for block in self.body)
        return StackSpec(body=body * self.repeat)

    def build(self, dim: int) -> Stack:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.stack import Stack

        return Stack([block.build(dim) for _ in range(self.repeat) for block in self.body])

    def cost(self, bill: Bill) -> None:
        """Each block of the body, once for each copy."""
        for i, block in enumerate(self.body):
            block.cost(bill.copied(f"body.{i}", self.repeat))

    def footprint(self, rows: Rows) -> Footprint:
        """The blocks of all copies one after the other."""
        return in_a_row(rows.stream, [block.footprint(rows) for block in self.body] * self.repeat)
