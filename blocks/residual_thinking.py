"""Residuals: how the result of a step is combined with the stream before it.

Chen et al. 2502.13842. ``scale`` below is the step encoding of the result, ``phi`` in the paper.

    thinking   Y(t) = Y(t-1) + phi(t) * gate * f(Y(t-1))                  equation of the paper
    overwrite  Y(t) = phi(t) * gate * f(Y(t-1))                           a plain loop
    delta      Y(t) = Y(t-1) + phi(t) * gate * (f(Y(t-1)) - Y(t-1))       only what the step changed
    gated      Y(t) = Y(t-1) + phi(t) * gate * g * (f(Y(t-1)) - Y(t-1))   g = sigmoid(a), learned

The gate ``g`` of ``gated`` has a value for each channel and is the same in all steps. Without a
router and an encoding it mixes the old and the new: Y(t) = (1 - g) * Y(t-1) + g * f(Y(t-1)), as in
a highway network (Srivastava et al. 1505.00387) whose gate does not look at its input.

Tokens that are not selected keep Y(t-1). Under ``thinking``, the formula of the paper taken
literally adds it once more, ``Y(t-1) + phi(t) * Y(t-1)``, but in its figure they bypass the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archdsl.costs.activations import FLOAT, Rows
from archdsl.costs.bill import Bill
from archdsl.lang.spec import Part

if TYPE_CHECKING:
    from torch import Tensor

    from archdsl.blocks.modules.residual import Gated, Residual

    Scale = Callable[[Tensor], Tensor]


class ResidualSpec(Part):
    """Combines the result of a step with the stream."""

    family: ClassVar[str] = "residual"
    adds: ClassVar[bool] = True  # a weight of 0 leaves the value before
    first_phi: ClassVar[float] = 1.0
    further_phi: ClassVar[float] = 1.0  # where a multiplicative encoding starts

    def build(self, dim: int) -> Residual | None:
        """The module whose call takes the place of `join`; None where there are no weights."""
        return None

    def cost(self, bill: Bill) -> None:
        """Adds its weights to the bill of the loop; by default there are none."""

    def footprint(self, rows: Rows) -> int:
        """The bytes that a `join` saves for the backward pass, by default none.

        Without those of multiplying by the weight of each token and by the step encoding.
        """
        return 0

    def join(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        """The new value of tokens that took the step; unused where `build` returns a module.

        ``x``: the value before. ``y``: the result of the body. ``gate``: the weight of each token;
        None: 1. ``scale``: multiplies by the step encoding.
        """
        raise NotImplementedError

    def rest(self, x: Tensor, scale: Scale) -> Tensor:
        """The new value of tokens that did not take the step."""
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
        """x + scale(gate * y)."""
        return x + scale(gated(y, gate))

    def rest(self, x: Tensor, scale: Scale) -> Tensor:
        """x, or x + scale(x) with ``unselected: literal``."""
        return x if self.unselected == "bypass" else x + scale(x)


class OverwriteSpec(ResidualSpec):
    """The result takes the place of what was there: a plain loop."""

    example: ClassVar = {"kind": "overwrite"}
    adds: ClassVar[bool] = False

    kind: Literal["overwrite"] = "overwrite"

    def join(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        """scale(gate * y)."""
        return scale(gated(y, gate))


class DeltaSpec(ResidualSpec):
    """Only what the step changed is added, weighted by the gate (as in Mixture-of-Depths)."""

    example: ClassVar = {"kind": "delta"}

    kind: Literal["delta"] = "delta"

    def join(self, x: Tensor, y: Tensor, gate: Tensor | None, scale: Scale) -> Tensor:
        """x + scale(gate * (y - x))."""
        return x + scale(gated(y - x, gate))


class GatedSpec(ResidualSpec):
    """A learned gate for each channel decides how much of the result takes the old one's place."""

    example: ClassVar = {"kind": "gated"}

    kind: Literal["gated"] = "gated"
    init: float = Field(
        0.5, gt=0, lt=1, description="the gate of every channel at the start: the share of the new"
    )

    def build(self, dim: int) -> Gated:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.residual import Gated

        return Gated(dim, self.init)

    def cost(self, bill: Bill) -> None:
        """A vector."""
        bill.part("residual").vectors += bill.dim

    def footprint(self, rows: Rows) -> int:
        """Saved: what the step changed, and the gate."""
        return rows.stream + FLOAT * rows.dim


def gated(y: Tensor, gate: Tensor | None) -> Tensor:
    """``y`` [B, K, D] times ``gate`` [B, K]; ``y`` itself without a gate."""
    return y if gate is None else gate.unsqueeze(-1) * y
