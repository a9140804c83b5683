"""Step encodings as modules.

Shapes: S steps, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archdsl.nn.block import Primitive, normal_


class Encoding(Primitive):
    """No encoding: every step looks the same."""

    def forward(self, x: Tensor, step: int, *, after: bool = False) -> Tensor:
        """`after` or `before`. A loop calls the module and not these methods, because the hooks
        that bring offloaded weights run when a module is called."""
        return self.after(x, step) if after else self.before(x, step)

    def before(self, x: Tensor, step: int) -> Tensor:
        """The input of the body in pass ``step``, of the same shape as ``x``."""
        return x

    def after(self, y: Tensor, step: int) -> Tensor:
        """The result of the body in pass ``step``, of the same shape as ``y``."""
        return y


class Scale(Encoding):
    """Multiplies the result of each pass by a learned vector."""

    def __init__(self, dim: int, steps: int, first: float, further: float) -> None:
        super().__init__()
        self.start = (first, further)
        self.phi_SD = nn.Parameter(torch.empty(steps, dim))

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Sets the vectors to their initial values."""
        first, further = self.start
        nn.init.constant_(self.phi_SD, further)
        nn.init.constant_(self.phi_SD[0], first)

    def after(self, y: Tensor, step: int) -> Tensor:
        """``y`` times the vector of pass ``step``."""
        return y * self.phi_SD[step].to(y.dtype)


class Add(Encoding):
    """Adds a learned vector to the input of each pass."""

    def __init__(self, dim: int, steps: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.e_SD = nn.Parameter(torch.empty(steps, dim))

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws the vectors."""
        normal_(self.e_SD, self.std, rng)

    def before(self, x: Tensor, step: int) -> Tensor:
        """``x`` plus the vector of pass ``step``."""
        return x + self.e_SD[step].to(x.dtype)
