"""Stack as a module."""

from __future__ import annotations

from torch import Tensor, nn

from archdsl.nn.block import Block, Context


class Stack(Block):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        for block in self.blocks:
            x_BTD = block(x_BTD, ctx)
        return x_BTD
