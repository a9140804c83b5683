"""Residuals that have weights, as modules; `archdsl.blocks.residual_thinking` has the others.

Shapes: B batch, K tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archdsl.blocks.residual_thinking import gated
from archdsl.nn.block import Primitive

if TYPE_CHECKING:
    Scale = Callable[[Tensor], Tensor]


class Residual(Primitive):
    """Joins the result of a pass to the stream in place of its spec, for it has weights."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        """See `ResidualSpec.join`."""
        raise NotImplementedError

    if TYPE_CHECKING:

        def __call__(  # noqa: D102  for type checkers alone
            self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale
        ) -> Tensor: ...


class Gated(Residual):
    """A learned gate for each channel, between the value before and the result of the pass."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gate_D = nn.Parameter(torch.empty(dim))

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Opens every gate as far as the spec says."""
        nn.init.constant_(self.gate_D, math.log(self.init / (1 - self.init)))

    def forward(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        """x + scale(gate * sigmoid(a) * (y - x)), [B, K, D]."""
        return x + scale(gated(torch.sigmoid(self.gate_D).to(x.dtype) * (y - x), gate))
