"""Step encodings: how the body can distinguish the steps of a loop.

    scale  the step's result times phi(t), learned, element-wise  (TSE, Chen et al. 2502.13842)
    add    the step's input plus e(t), learned                    (Dehghani et al. 1807.03819)

Shapes: S steps, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archdsl.costs.bill import Bill
from archdsl.lang.spec import Part

if TYPE_CHECKING:
    from archdsl.blocks.modules.step_encoding import Add, Encoding, Scale


class EncodingSpec(Part):
    """Marks the steps of a loop, before or after the body."""

    family: ClassVar[str] = "encoding"
    multiplies: ClassVar[bool] = False  # the result, which is then kept; else it adds to the input

    def cost(self, bill: Bill, steps: int) -> None:
        """A vector for each of ``steps``."""
        bill.vectors += steps * bill.dim

    def build(self, dim: int, steps: int, further_phi: float) -> Encoding:
        """``further_phi``: where the loop's residual wants factors after the first to start."""
        raise NotImplementedError


class ScaleSpec(EncodingSpec):
    """The result of step t is multiplied by phi(t)."""

    multiplies: ClassVar[bool] = True
    example: ClassVar = {"kind": "scale"}

    kind: Literal["scale"] = "scale"
    first: float = Field(1.0, ge=-10, le=10, description="phi of the first step at the start")
    init: float | None = Field(
        None,
        ge=-10,
        le=10,
        description="phi of further steps at the start; default: 0.5 where results are summed "
        "(thinking), else 1. At 0 a summed model starts as its plain backbone",
    )

    def build(self, dim: int, steps: int, further_phi: float) -> Scale:
        """The torch module for ``steps`` passes of width ``dim``."""
        from archdsl.blocks.modules.step_encoding import Scale

        further = further_phi if self.init is None else self.init
        return Scale(dim, steps, self.first, further)


class AddSpec(EncodingSpec):
    """The input of step t has e(t) added."""

    example: ClassVar = {"kind": "add"}

    kind: Literal["add"] = "add"
    std: float = Field(0.02, ge=0, le=10, description="spread of e at the start")

    def build(self, dim: int, steps: int, further_phi: float) -> Add:
        """The torch module for ``steps`` passes of width ``dim``."""
        from archdsl.blocks.modules.step_encoding import Add

        return Add(dim, steps, self.std)
