"""Step encodings as modules.

Shapes: S steps, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archdsl.nn.block import Primitive, normal_


class Encoding(Primitive):
    """No encoding: every step looks the same."""

    def before(self, x: Tensor, step: int) -> Tensor:
        return x

    def after(self, y: Tensor, step: int) -> Tensor:
        return y


class Scale(Encoding):
    def __init__(self, dim: int, steps: int, first: float, further: float) -> None:
        super().__init__()
        self.start = (first, further)
        self.phi_SD = nn.Parameter(torch.empty(steps, dim))

    def reset(self, rng: torch.Generator, depth: int) -> None:
        first, further = self.start
        nn.init.constant_(self.phi_SD, further)
        nn.init.constant_(self.phi_SD[0], first)

    def after(self, y: Tensor, step: int) -> Tensor:
        return y * self.phi_SD[step]


class Add(Encoding):
    def __init__(self, dim: int, steps: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.e_SD = nn.Parameter(torch.empty(steps, dim))

    def reset(self, rng: torch.Generator, depth: int) -> None:
        normal_(self.e_SD, self.std, rng)

    def before(self, x: Tensor, step: int) -> Tensor:
        return x + self.e_SD[step]
