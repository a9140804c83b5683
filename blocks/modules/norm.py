"""Norms as modules.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archdsl.nn.block import Block, Context

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


class RMSNorm(nn.RMSNorm):
    """torch's own, by half as many kernels where it has none made for it: a token that is decoded
    on a CPU waits for each of them."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        exact = x_BTD.dtype in (torch.float32, torch.float64)
        if x_BTD.requires_grad or x_BTD.device.type != "cpu" or not exact:
            return super().forward(x_BTD)
        assert self.eps is not None
        D = x_BTD.size(-1)
        size_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True)
        scale_BT1 = size_BT1.square_().add_(D * self.eps).rsqrt_().mul_(D**0.5)
        return x_BTD * scale_BT1 * self.weight


def make_norm(type: NormType, dim: int, eps: float) -> RMSNorm | nn.LayerNorm:
    return (RMSNorm if type == "rms" else nn.LayerNorm)(dim, eps=eps)
