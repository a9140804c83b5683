"""Norms: RMSNorm (Zhang & Sennrich 1910.07467), LayerNorm (Ba et al. 1607.06450).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from archdsl.block import Block, Context
from archdsl.cost import Cost, Scope, vectors
from archdsl.spec import BlockSpec

NormType = Literal["rms", "layer"]
EPS = 1e-5


class NormSpec(BlockSpec):
    """Every token scaled to unit size, then element by element by a learned gain."""

    example: ClassVar = {"kind": "norm"}

    kind: Literal["norm"] = "norm"
    type: NormType = Field("rms", description="rms: no centring, no bias; layer: both")
    eps: float = Field(EPS, gt=0, lt=1, description="added to the variance, against tiny inputs")

    def build(self, dim: int) -> Norm:
        return Norm(self, dim)

    def cost(self, scope: Scope) -> Cost:
        return norm_cost(self.type, scope.dim)


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


def norm_cost(type: NormType, dim: int) -> Cost:
    return vectors(dim if type == "rms" else 2 * dim)
