"""Layer: the LLaMA pair, pre-norm attention and pre-norm feed-forward (Touvron et al. 2302.13971).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny, WithJsonSchema

from archdsl.blocks.attention import AttentionSpec
from archdsl.blocks.feed_forward import FeedForwardSpec
from archdsl.blocks.norm import EPS, NormType, norm_footprint, norm_size
from archdsl.costs.activations import Footprint, Rows, in_a_row
from archdsl.costs.bill import Bill
from archdsl.lang.spec import BlockSpec, slot

if TYPE_CHECKING:
    from archdsl.blocks.modules.layer import Layer


class LayerSpec(BlockSpec):
    """x + attention(norm(x)), then the same with feed-forward."""

    example: ClassVar = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}

    kind: Literal["layer"] = "layer"
    attention: Annotated[
        SerializeAsAny[BlockSpec],
        slot("block", "attention"),
        WithJsonSchema({"x-family": "block", "x-default": "attention"}),
    ] = Field(AttentionSpec(), description="what mixes the tokens")
    ffn: Annotated[
        SerializeAsAny[BlockSpec],
        slot("block", "feed_forward"),
        WithJsonSchema({"x-family": "block", "x-default": "feed_forward"}),
    ] = Field(FeedForwardSpec(), description="what each token does by itself")
    norm: NormType = Field("rms", description="the norm before each of the two")
    norm_eps: float = Field(EPS, gt=0, lt=1, description="added to the variance in both norms")

    def build(self, dim: int) -> Layer:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.layer import Layer

        return Layer(self, dim)

    def cost(self, bill: Bill) -> None:
        """Two norms and the two blocks."""
        norm = norm_size(self.norm, bill.dim)
        bill.part("attention_norm").vectors += norm
        self.attention.cost(bill.part("attention"))
        bill.part("ffn_norm").vectors += norm
        self.ffn.cost(bill.part("ffn"))

    def footprint(self, rows: Rows) -> Footprint:
        """The norms and blocks one after the other."""
        norm = norm_footprint(self.norm, rows)
        parts = [norm, self.attention.footprint(rows), norm, self.ffn.footprint(rows)]
        return in_a_row(rows.stream, parts)
