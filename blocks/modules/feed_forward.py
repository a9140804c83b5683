"""Feed-forward as a module.

Shapes: B batch, T tokens, D width, F hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.nn.block import Block, Context, into_stream_


class FeedForward(Block):
    """SwiGLU or GELU between matrices to and from the hidden size."""

    hosted: bool = True

    def __init__(self, dim: int, hidden: int, activation: Literal["swiglu", "gelu"]) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws the matrices."""
        super().reset(rng, depth)
        into_stream_(self.down.weight, self.down.in_features, rng, depth)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """What each token computes by itself, [B, T, D]."""
        if self.gate is None:
            return ctx.linear(self.down, F.gelu(ctx.linear(self.up, x_BTD)))
        gate_BTF, up_BTF = ctx.linears((self.gate, self.up), x_BTD)
        return ctx.linear(self.down, F.silu(gate_BTF) * up_BTF)

    def side_by_side(self) -> list[tuple[nn.Linear, ...]]:
        """See `Block`."""
        return [] if self.gate is None else [(self.gate, self.up)]
