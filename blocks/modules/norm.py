"""Norms as modules.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from archdsl.nn.block import Block, Context
from archdsl.nn.norm import make_norm

if TYPE_CHECKING:
    from archdsl.blocks.norm import NormSpec


class Norm(Block):
    """A norm by itself, as a block."""

    writes_to_stream: ClassVar[bool] = False
    hosted: bool = True

    def __init__(self, spec: NormSpec, dim: int) -> None:
        super().__init__()
        self.norm = make_norm(spec.type, dim, spec.eps)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Sets the gain to 1 and the bias to 0."""
        self.norm.reset_parameters()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """Each token normalised, [B, T, D]."""
        return self.norm(x_BTD)
