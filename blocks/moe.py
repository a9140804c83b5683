"""Mixture of experts: feed-forward blocks of which each token uses the few that score best.

With s(i) the score of expert i for the token x, g the squashing function (``gate``), b the bias of
``balance: bias``, E(i) the experts and S the shared experts:

    s = g(W x)                     sigmoid or softmax
    T = top_k of s(i) + b(i)
    y = sum over T of s(i) E(i)(x) + S(x)        ``normalise``: s(i) over its sum over T

gate: sigmoid is that of MoEUT (Csordas et al. 2405.16039) and, with ``normalise``, of DeepSeek-V3
(2412.19437, equations 12 to 16); softmax is that of Switch (Fedus et al. 2101.03961) and, with
``normalise``, of Mixtral (Jiang et al. 2401.04088). Every token gets its experts: there is no
capacity that could drop it, so a token does not depend on others.

How the load of the experts is balanced in training:

    bias   after each batch, b(i) rises by ``bias_step`` if expert i had less than the mean load,
           and falls if it had more; b only decides about T (Wang et al. 2408.15664, algorithm 1)
    loss   ``loss_weight`` * experts * sum over i of f(i) P(i) is added to the loss, with f(i) the
           share of choices and P(i) the mean share of the scores (as 2101.03961, equations 4 to 6)

Shapes: B batch, T tokens, N = B * T, D width, E experts, K experts of a token, R = N * K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archdsl.blocks.feed_forward import FeedForwardSpec, SizedSpec
from archdsl.costs.activations import FLOAT, Footprint, Rows
from archdsl.costs.bill import Bill
from archdsl.lang.spec import BlockSpec, Path

if TYPE_CHECKING:
    from archdsl.nn.block import Block

BIAS_STEP, LOSS_WEIGHT = 0.001, 0.01


class MoeSpec(SizedSpec):
    """Experts, of which each token uses those that score best."""

    example: ClassVar = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 12, "shared": 1}
    adaptable: ClassVar[bool] = True

    kind: Literal["moe"] = "moe"
    experts: int = Field(8, ge=1, le=1024, description="how many experts there are")
    top_k: int = Field(2, ge=1, le=1024, description="how many of them each token uses")
    shared: int = Field(
        0, ge=0, le=64, description="further experts of the same size, which every token uses"
    )
    gate: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="score -> weight: of each expert alone, or a share of all"
    )
    normalise: bool = Field(
        False, description="divide the weights of the experts of a token by their sum"
    )
    balance: Literal["bias", "loss", "none"] = Field(
        "bias",
        description="how the load is balanced in training: by a bias of each expert on the choice, "
        "by a loss, or not at all",
    )
    bias_step: float = Field(
        BIAS_STEP, gt=0, le=1, description="how far a bias moves after a batch; balance: bias"
    )
    loss_weight: float = Field(
        LOSS_WEIGHT, gt=0, le=100, description="of the loss beside the model's; balance: loss"
    )

    @property
    def is_dense(self) -> bool:
        """Whether it is one expert of weight 1, which is a feed-forward block."""
        return self.experts == 1 and (self.gate == "softmax" or self.normalise)

    @property
    def all_used(self) -> bool:
        """Whether each token uses all experts, so that there is nothing to balance."""
        return self.top_k == self.experts

    def expert(self, dim: int, count: int = 1) -> FeedForwardSpec:
        """``count`` experts side by side, as one feed-forward block."""
        hidden = count * self.hidden_size(dim)
        return FeedForwardSpec(hidden=hidden, activation=self.activation)

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """More experts of a token than there are; weights that no token could change."""
        yield from super().conflicts(dim)
        if self.top_k > self.experts:
            yield ("top_k",), f"must be at most experts, {self.experts}; got {self.top_k}"
        if self.normalise and self.top_k == 1 < self.experts:
            yield (
                ("normalise",),
                "makes every weight 1 with top_k 1, so that the gate cannot learn: top_k of at "
                "least 2, or normalise: false",
            )

    def canonical(self, dim: int) -> BlockSpec:
        """Feed-forward where it is that; else without settings that have no effect."""
        if self.is_dense:
            return self.expert(dim, 1 + self.shared)
        update: dict[str, object] = {"hidden": self.hidden_size(dim), "ratio": None}
        balance = "none" if self.all_used else self.balance
        update["balance"] = balance
        if balance != "bias":
            update["bias_step"] = BIAS_STEP
        if balance != "loss":
            update["loss_weight"] = LOSS_WEIGHT
        if self.all_used and self.gate == "softmax":  # its weights have the sum 1
            update["normalise"] = False
        return self.model_copy(update=update)

    def build(self, dim: int) -> Block:
        """The torch module for width ``dim``."""
        from archdsl.blocks.modules.feed_forward import FeedForward
        from archdsl.blocks.modules.moe import Moe

        if self.is_dense:
            return FeedForward(dim, (1 + self.shared) * self.hidden_size(dim), self.activation)
        return Moe(self, dim)

    def cost(self, bill: Bill) -> None:
        """The matrix of the scores, the experts, of which ``top_k`` run, and the shared ones."""
        if self.is_dense:
            self.expert(bill.dim, 1 + self.shared).cost(bill)
            return
        bill.linear(bill.dim, self.experts)
        self.expert(bill.dim).bill(bill, self.top_k, idle=self.experts - self.top_k)
        if self.shared:
            self.expert(bill.dim, self.shared).cost(bill)

    def footprint(self, rows: Rows) -> Footprint:
        """Saved besides the experts: scores, choices, places, weights, and what goes in and out."""
        if self.is_dense:
            return self.expert(rows.dim, 1 + self.shared).footprint(rows)
        chosen = rows._replace(tokens=rows.tokens * self.top_k)
        experts = self.expert(rows.dim).footprint(chosen)
        kept = experts.kept + rows.floats(self.experts) + rows.floats(rows.rank)
        kept += 3 * chosen.indices + chosen.floats() + 2 * chosen.stream
        if self.normalise:
            kept += chosen.floats() + rows.floats()
        if self.balance == "loss" and not self.all_used:
            kept += (1 + rows.padded) * rows.floats() + FLOAT * self.experts
        if self.shared:
            kept += self.expert(rows.dim, self.shared).footprint(rows).kept
        return Footprint(kept, work=experts.work)
