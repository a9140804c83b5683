"""Stack as a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

from torch import Tensor, nn

from archdsl.nn.block import Block, Context


class Stack(Block):
    """Blocks one after the other."""

    writes_to_stream: ClassVar[bool] = False
    hosted: bool = True

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def built_as(self, field: str) -> list[nn.Module]:
        """The blocks of all copies for ``body``; else as `Primitive.built_as`."""
        return list(self.blocks) if field == "body" else super().built_as(field)

    def unrolled(self) -> Iterator[nn.Module]:
        """Its blocks, and the blocks of stacks inside it."""
        for block in self.blocks:
            yield from cast(Block, block).unrolled()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """The stream after all blocks, [B, T, D]."""
        for block in self.blocks:
            x_BTD = block(x_BTD, ctx)
        return x_BTD
