"""Layer: attention and feed-forward, by default with a norm before each, as in LLaMA (2302.13971).

Where the norms stand, with f for attention and then for feed-forward:

    pre        x + f(norm(x))               LLaMA, Touvron et al. 2302.13971
    post       norm(x + f(x))               the Transformer, Vaswani et al. 1706.03762
    sandwich   x + norm2(f(norm(x)))        CogView, Ding et al. 2105.13290; Ouro, 2510.25741
    pre_post   norm2(x + f(norm(x)))        Huginn, Geiping et al. 2502.05171

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
    """Attention, then feed-forward, each with norms and a residual; see the module's text."""

    example: ClassVar = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
    adaptable: ClassVar[bool] = True

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
    norm: NormType = Field("rms", description="the kind of its norms")
    norm_eps: float = Field(EPS, gt=0, lt=1, description="added to the variance in its norms")
    norm_place: Literal["pre", "post", "sandwich", "pre_post"] = Field(
        "pre",
        exclude_if=lambda place: place == "pre",  # the hash of specs without it stays
        description="where norms stand: before attention and feed-forward, after the residual, "
        "before and after each inside of the residual, or before it and after the residual",
    )

    @property
    def norms_twice(self) -> bool:
        """Whether attention and feed-forward have two norms each."""
        return self.norm_place in ("sandwich", "pre_post")

    def build(self, dim: int) -> Layer:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.layer import Layer

        return Layer(self, dim)

    def cost(self, bill: Bill) -> None:
        """The norms and the two blocks."""
        norm = norm_size(self.norm, bill.dim)
        for name, block in (("attention", self.attention), ("ffn", self.ffn)):
            bill.part(f"{name}_norm").vectors += norm
            block.cost(bill.part(name))
            if self.norms_twice:
                bill.part(f"{name}_norm2").vectors += norm

    def footprint(self, rows: Rows) -> Footprint:
        """The norms and blocks one after the other."""
        norm, parts = norm_footprint(self.norm, rows), []
        for block in (self.attention, self.ffn):
            before = [] if self.norm_place == "post" else [norm]
            after = [] if self.norm_place == "pre" else [norm]
            parts += [*before, block.footprint(rows), *after]
        return in_a_row(rows.stream, parts)
