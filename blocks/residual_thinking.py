"""Residual thinking: how a step's result joins what the steps before it left.

Chen et al. 2502.13842. ``scale`` below is the step encoding of the result, ``phi`` in the paper.

    thinking   Y(t) = Y(t-1) + phi(t) * gate * f(Y(t-1))                  equation of the paper
    overwrite  Y(t) = phi(t) * gate * f(Y(t-1))                           a plain loop
    delta      Y(t) = Y(t-1) + phi(t) * gate * (f(Y(t-1)) - Y(t-1))       only what the step changed

Unselected tokens keep Y(t-1); under ``thinking`` the formula taken literally adds it once more,
``Y(t-1) + phi(t) * Y(t-1)``, while the paper's figure reads as if they bypassed the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archdsl.lang.spec import Part

if TYPE_CHECKING:
    from torch import Tensor

    Scale = Callable[[Tensor], Tensor]


class ResidualSpec(Part):
    """Joins a step's result to the stream; holds no weights."""

    family: ClassVar[str] = "residual"
    first_phi: ClassVar[float] = 1.0
    further_phi: ClassVar[float] = 1.0  # where a multiplicative encoding starts

    def join(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        """The new value of tokens that took the step: was ``x``, the body said ``y``."""
        raise NotImplementedError

    def rest(self, x: Tensor, scale: Scale) -> Tensor:
        """The new value of tokens that did not."""
        return x


class ThinkingSpec(ResidualSpec):
    """Every step's result is kept: the sum of all of them (RTC)."""

    example: ClassVar = {"kind": "thinking"}
    further_phi: ClassVar[float] = 0.5

    kind: Literal["thinking"] = "thinking"
    unselected: Literal["bypass", "literal"] = Field(
        "bypass", description="bypass: unchanged; literal: Y(t-1) * phi(t) is added"
    )

    def join(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        return x + scale(gated(y, gate))

    def rest(self, x: Tensor, scale: Scale) -> Tensor:
        return x if self.unselected == "bypass" else x + scale(x)


class OverwriteSpec(ResidualSpec):
    """The result takes the place of what was there: a plain loop."""

    example: ClassVar = {"kind": "overwrite"}

    kind: Literal["overwrite"] = "overwrite"

    def join(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        return scale(gated(y, gate))


class DeltaSpec(ResidualSpec):
    """Only what the step changed is added, weighted by the gate (as in Mixture-of-Depths)."""

    example: ClassVar = {"kind": "delta"}

    kind: Literal["delta"] = "delta"

    def join(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        return x + scale(gated(y - x, gate))


def gated(y: Tensor, gate: Tensor | None) -> Tensor:
    return y if gate is None else gate.unsqueeze(-1) * y
