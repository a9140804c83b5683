"""Causal attention with grouped queries, rotary positions, optional window and QK-norm.

Vaswani et al. 1706.03762; grouped queries: Ainslie et al. 2305.13245; window: Beltagy et al.
2004.05150; QK-norm: Henry et al. 2010.04245. As a block it is bare: `layer` adds norm and residual.

Shapes: B batch, T queries, S keys, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, SerializeAsAny, WithJsonSchema

from archdsl.blocks.rope_scaling import RopeScalingSpec
from archdsl.costs.activations import FLOAT, Angles, Footprint, Rows
from archdsl.costs.bill import Bill
from archdsl.lang.spec import BlockSpec, Path, Sizes, slot
from archdsl.lang.strict import Size

if TYPE_CHECKING:
    from archdsl.blocks.modules.attention import Attention


QUERIES = 256  # computed at a time where a mask is needed; fewer make smaller matrix products
# a larger share of queries costs less among all tokens, in causal order, than under a mask
MOST = 0.8


class AttentionSpec(BlockSpec):
    """Every token reads the tokens up to itself."""

    example: ClassVar = {"kind": "attention", "head_size": 8}
    adaptable: ClassVar[bool] = True

    kind: Literal["attention"] = "attention"
    head_size: Size = Field(64, ge=2, le=1024, multiple_of=2, description="width of one head")
    heads: Size | None = Field(
        None, ge=1, le=1024, description="query heads; default: dim / head_size"
    )
    queries_per_kv: int = Field(
        1, ge=1, le=1024, description="query heads that share one key/value head"
    )
    window: Size | None = Field(
        None, ge=1, description="how many tokens back a query sees, itself included; default: all"
    )
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys per head")
    rope_theta: float | None = Field(
        10_000.0, gt=1, description="base of the rotary angles; null: no positions"
    )
    rope_scaling: Annotated[
        SerializeAsAny[RopeScalingSpec] | None,
        slot("rope_scaling"),
        WithJsonSchema({"x-family": "rope_scaling"}),
    ] = Field(None, description="slower rotary angles for a longer context; default: none")

    def head_count(self, dim: int) -> int:
        """The number of query heads in a model of width ``dim``."""
        return self.heads or dim // self.head_size

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """Head sizes that do not divide the width, and a rope_scaling without rotary positions."""
        if self.heads is None and dim % self.head_size:
            yield ("head_size",), f"must divide dim {dim}, got {self.head_size}"
        elif self.head_count(dim) % self.queries_per_kv:
            yield (
                ("queries_per_kv",),
                f"must divide the {self.head_count(dim)} heads, got {self.queries_per_kv}",
            )
        if self.rope_scaling is not None and self.rope_theta is None:
            yield ("rope_scaling",), "needs a rope_theta: null means that nothing is rotated"

    def canonical(self, dim: int) -> AttentionSpec:
        """The same attention with its number of heads written out."""
        return self.model_copy(update={"heads": self.head_count(dim)})

    def resized(self, old: Sizes, new: Sizes) -> AttentionSpec:
        """Heads and a window that take the same shares of the width and of the context."""
        heads = max(
            1, round(self.head_count(old.dim) * self.head_size / old.dim * new.dim / new.head_size)
        )
        per_kv = min(self.queries_per_kv, heads)
        window = self.window and max(1, round(self.window * new.context / old.context))
        return self.model_copy(
            update={
                "head_size": new.head_size,
                "heads": -(-heads // per_kv) * per_kv,
                "queries_per_kv": per_kv,
                "window": window,
            }
        )

    def build(self, dim: int) -> Attention:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.attention import Attention

        return Attention(self, dim)

    def cost(self, bill: Bill) -> None:
        """Four projections, the scores and weighted values of all heads, and the KV cache."""
        heads, E, D = self.head_count(bill.dim), self.head_size, bill.dim
        q, kv = heads * E, heads // self.queries_per_kv * E
        bill.linear(D, q)
        bill.linear(q, D)
        bill.linear(D, kv, 2, keys=True)
        if self.qk_norm:
            bill.vectors += 2 * E
        bill.queries += q
        bill.layers += 1
        bill.kv += 2 * kv * bill.kept(self.window)

    def footprint(self, rows: Rows) -> Footprint:
        """Saved: queries, keys and values as they are multiplied, the result, a sum per query."""
        heads, E = self.head_count(rows.dim), self.head_size
        kv_size = heads // self.queries_per_kv * E
        q, kv = rows.floats(heads * E), rows.floats(kv_size)
        among = rows.kv != "own"
        among_all = among and self.window is None and rows.tokens > MOST * rows.keys
        in_parts = (among and not among_all) or self.window is not None
        asks = rows._replace(tokens=rows.keys) if among_all else rows
        made = asks.floats(heads * E) + (2 * rows.of_keys(kv_size) if rows.projects else 0)
        kept = made + asks.floats(heads * E) + asks.floats(heads)
        kept += (4 if rows.projects else 2) * rows.floats(rows.rank)
        if in_parts:
            kept += self._masks(rows)
        if among_all:  # the places of the queries
            kept += rows.indices
        if rows.kv == "last":  # the places of the new keys among those before
            kept += rows.indices
        if self.qk_norm:  # the inputs of the norms, the scaled inputs, and the scales
            normed = q + kv if rows.projects else q
            kept += 2 * normed + normed // E
        scattered = self.qk_norm and rows.tokens > 1
        if scattered or among_all or (in_parts and rows.tokens > QUERIES):
            kept += q  # a copy puts the heads side by side again
        angles: frozenset[Angles] = frozenset()
        if self.rope_theta is not None:
            angles = frozenset([(self.rope_theta, self.rope_scaling, E)])
        return Footprint(kept, work=rows.stream + q + made, angles=angles)

    def _masks(self, rows: Rows) -> int:
        """Bytes of the masks, for some queries at a time and the keys that they may see."""
        total = 0
        for start in range(0, rows.tokens, QUERIES):
            stop = min(start + QUERIES, rows.tokens)
            back = (self.window or rows.keys) - 1
            if rows.kv == "own":
                seen = stop - max(0, start - back)
            elif rows.kv == "all":
                seen = rows.keys
            else:  # of selected queries, how many keys stand before them depends on the choice
                seen = -(-rows.keys * stop // rows.tokens)
            total += FLOAT * (stop - start) * seen
        by_row = rows.by_row or (self.window is not None and rows.selected)
        return total * (rows.batch if by_row else 1)
