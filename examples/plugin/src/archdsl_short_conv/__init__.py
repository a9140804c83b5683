"""A gated short convolution, which mixes each token with the few before it.

    a, b, c = project(x)
    y = out(c * conv(a * b))

``conv`` is a causal convolution of every channel by itself, ``kernel`` tokens long. Such blocks
stand in place of most attention blocks of LFM2 (Liquid AI, 2511.23404); gated convolutions are
those of Hyena (Poli et al. 2302.10866). A decoder keeps ``kernel - 1`` tokens, however long the
sequence gets. As a block it is bare: ``layer`` adds norm and residual.

Importing this module makes the kind known. It is imported for every spec, so it needs no torch:
the module that computes the block stands in its own file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archdsl.costs.activations import Footprint, Rows
from archdsl.costs.bill import Bill
from archdsl.lang.spec import BlockSpec

if TYPE_CHECKING:
    from archdsl_short_conv.module import ShortConv


class ShortConvSpec(BlockSpec):
    """Every token is mixed with the few before it, channel by channel, between two gates."""

    example: ClassVar = {"kind": "short_conv", "kernel": 4}

    kind: Literal["short_conv"] = "short_conv"
    kernel: int = Field(
        3, ge=2, le=64, description="tokens that the convolution reads, the present one included"
    )

    def build(self, dim: int) -> ShortConv:
        from archdsl_short_conv.module import ShortConv

        return ShortConv(self, dim)

    def cost(self, bill: Bill) -> None:
        """Two matrices; the convolution multiplies element by element, which counts no FLOPs."""
        bill.matrices += 4 * bill.dim * bill.dim
        bill.vectors += self.kernel * bill.dim
        bill.state += (self.kernel - 1) * bill.dim

    def footprint(self, rows: Rows) -> Footprint:
        """Kept: the three projections, what is convolved with zeros before it, the result, and
        the gated result. The backward pass also holds the gradient of the projections, and one
        product for each tap of the convolution."""
        before = rows.batch * rows.dim * (self.kernel - 1) * 4
        return Footprint(6 * rows.stream + before, work=5 * rows.stream)
