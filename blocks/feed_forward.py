"""Feed-forward: what each token computes by itself. SwiGLU (Shazeer 2002.05202) or GELU.

As a block it is bare: `layer` adds norm and residual.

Shapes: B batch, T tokens, D width, F hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from archdsl.costs.activations import Footprint, Rows
from archdsl.costs.bill import Bill
from archdsl.lang.spec import BlockSpec, Path, Sizes
from archdsl.lang.strict import Size

if TYPE_CHECKING:
    from archdsl.blocks.modules.feed_forward import FeedForward


MULTIPLE = 32  # a hidden size from a ratio is rounded up to a multiple, which kernels run faster


class SizedSpec(BlockSpec):
    """The base of blocks with a hidden size and an activation."""

    hidden: Size | None = Field(None, ge=1, le=2**18, description="hidden size")
    ratio: float | None = Field(
        None, gt=0, le=64, description="hidden size over dim; default 8/3, rounded up to 32s"
    )
    activation: Literal["swiglu", "gelu"] = Field("swiglu", description="swiglu has a gate matrix")

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """A hidden size and a ratio at once."""
        if self.hidden is not None and self.ratio is not None:
            yield ("ratio",), "say either hidden or ratio, not both"

    def hidden_size(self, dim: int) -> int:
        """The hidden size in a model of width ``dim``."""
        if self.hidden:
            return self.hidden
        share = (self.ratio or 8 / 3) * dim / MULTIPLE
        return max(1, math.ceil(share - 1e-9)) * MULTIPLE  # 1.1 * 1600 is a bit more than 1760

    def canonical(self, dim: int) -> BlockSpec:
        """The same block with its hidden size written out."""
        return self.model_copy(update={"hidden": self.hidden_size(dim), "ratio": None})

    def resized(self, old: Sizes, new: Sizes) -> Self:
        """The same ratio of the hidden size to the width."""
        hidden = max(1, round(self.hidden_size(old.dim) * new.dim / old.dim))
        return self.model_copy(update={"hidden": hidden, "ratio": None})


class FeedForwardSpec(SizedSpec):
    """Two or three matrices around a non-linearity."""

    example: ClassVar = {"kind": "feed_forward", "hidden": 24}
    adaptable: ClassVar[bool] = True

    kind: Literal["feed_forward"] = "feed_forward"

    def build(self, dim: int) -> FeedForward:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.feed_forward import FeedForward

        return FeedForward(dim, self.hidden_size(dim), self.activation)

    def cost(self, bill: Bill) -> None:
        """Three matrices with swiglu, else two."""
        self.bill(bill, 1)

    def bill(self, bill: Bill, count: int, idle: int = 0) -> None:
        """Adds ``count`` such blocks, and ``idle`` more that a token does not use."""
        hidden, ups = self.hidden_size(bill.dim), 2 if self.activation == "swiglu" else 1
        bill.linear(bill.dim, hidden, ups * count, idle=ups * idle)
        bill.linear(hidden, bill.dim, count, idle=idle)

    def footprint(self, rows: Rows) -> Footprint:
        """Saved: gate, silu of it, up and their product; or up and gelu of it."""
        hidden = rows.floats(self.hidden_size(rows.dim))
        gated = self.activation == "swiglu"
        kept = (4 if gated else 2) * hidden + (3 if gated else 2) * rows.floats(rows.rank)
        return Footprint(kept, work=rows.stream + (2 if gated else 1) * hidden)
