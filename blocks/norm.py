"""Norm as a block: RMSNorm (Zhang & Sennrich 1910.07467), LayerNorm (Ba et al. 1607.06450).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archdsl.costs.activations import Footprint, Rows
from archdsl.costs.bill import Bill
from archdsl.lang.spec import BlockSpec

if TYPE_CHECKING:
    from archdsl.blocks.modules.norm import Norm


NormType = Literal["rms", "layer"]


EPS = 1e-5


class NormSpec(BlockSpec):
    """Every token scaled to unit size, then element by element by a learned gain."""

    example: ClassVar = {"kind": "norm"}
    adaptable: ClassVar[bool] = True

    kind: Literal["norm"] = "norm"
    type: NormType = Field("rms", description="rms: no centring, no bias; layer: both")
    eps: float = Field(EPS, gt=0, lt=1, description="added to the variance, against tiny inputs")

    def build(self, dim: int) -> Norm:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.norm import Norm

        return Norm(self, dim)

    def cost(self, bill: Bill) -> None:
        """The gain, and with ``layer`` the bias."""
        bill.vectors += norm_size(self.type, bill.dim)

    def footprint(self, rows: Rows) -> Footprint:
        """See `norm_footprint`."""
        return norm_footprint(self.type, rows)


def norm_size(type: NormType, dim: int) -> int:
    """The number of parameters of a norm."""
    return dim if type == "rms" else 2 * dim


def norm_footprint(type: NormType, rows: Rows) -> Footprint:
    """The memory of a norm.

    Saved: the input; with rms also the scaled input and its scale; with layer the mean and scale.
    """
    if type == "rms":
        return Footprint(rows.stream + rows.floats(), work=3 * rows.stream)
    return Footprint(2 * rows.floats(), work=2 * rows.stream)
