"""The low-rank differences of the passes of a loop as modules.

Shapes: R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from archdsl.blocks.lora import LoraSpec
from archdsl.nn.block import Primitive


class LowRank(Primitive):
    """The difference alpha / rank * B A of one matrix in one pass."""

    def __init__(self, matrix: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a = nn.Linear(matrix.in_features, rank, bias=False)
        self.b = nn.Linear(rank, matrix.out_features, bias=False)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws A from N(0, 1 / inputs), and sets B to 0, so that there is no difference."""
        super().reset(rng, depth)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """alpha / rank * B A x, [..., outputs]."""
        return self.b(self.a(x) * self.scale)

    def difference(self) -> Tensor:
        """alpha / rank * B A, [outputs, inputs]."""
        return self.scale * self.b.weight @ self.a.weight


class Lora(nn.Module):
    """The differences of all passes from one shared body.

    ``matrices``: the linear maps of the body. ``steps``: for each pass a list with the difference
    of each of them; an empty list where the rank is 0.
    """

    def __init__(self, spec: LoraSpec, steps: int, body: nn.Module) -> None:
        super().__init__()
        self.matrices = [one for one in body.modules() if isinstance(one, nn.Linear)]
        ranks = [spec.at(step) for step in range(steps)]
        self.steps = nn.ModuleList(
            nn.ModuleList(LowRank(one, rank, spec.alpha) for one in self.matrices if rank)
            for rank in ranks
        )

    def added(self, step: int) -> dict[nn.Module, LowRank]:
        """The differences of pass ``step`` by linear map; see `Context`."""
        differences = cast(Sequence[LowRank], self.steps[step])
        return dict(zip(self.matrices, differences, strict=False))
