"""Layer as a module.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from archdsl.nn.block import Block, Context
from archdsl.nn.norm import make_norm

if TYPE_CHECKING:
    from archdsl.blocks.layer import LayerSpec


class Layer(Block):
    """x + attention(norm(x)), then the same with feed-forward."""

    writes_to_stream: ClassVar[bool] = False
    hosted: ClassVar[bool] = True

    def __init__(self, spec: LayerSpec, dim: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(spec.norm, dim, spec.norm_eps)
        self.attention = spec.attention.build(dim)
        self.ffn_norm = make_norm(spec.norm, dim, spec.norm_eps)
        self.ffn = spec.ffn.build(dim)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Sets the two norms to 1; the blocks draw their own parameters."""
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """The stream after both blocks, [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), ctx)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD), ctx)
