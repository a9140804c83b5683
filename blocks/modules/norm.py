"""Norms as modules.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archdsl.block import Block, Context

if TYPE_CHECKING:
    from archdsl.blocks.norm import NormSpec, NormType


class Norm(Block):
    def __init__(self, spec: NormSpec, dim: int) -> None:
        super().__init__()
        self.norm = make_norm(spec.type, dim, spec.eps)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        self.norm.reset_parameters()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return self.norm(x_BTD)


def make_norm(type: NormType, dim: int, eps: float) -> nn.RMSNorm | nn.LayerNorm:
    return (nn.RMSNorm if type == "rms" else nn.LayerNorm)(dim, eps=eps)
