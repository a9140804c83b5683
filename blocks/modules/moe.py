"""Mixture of experts as a module; `archdsl.blocks.moe` has its equations and sources.

Shapes: B batch, T tokens, N = B * T, D width, E experts, K experts of a token, R = N * K.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from archdsl.blocks.modules.feed_forward import FeedForward
from archdsl.blocks.modules.router import without_noise
from archdsl.nn.block import BatchStatistics, Block, Context

if TYPE_CHECKING:
    from archdsl.blocks.moe import MoeSpec


class Expert(FeedForward):
    """A feed-forward block, of which several together write to the stream once."""

    writes_to_stream: ClassVar[bool] = False


class Moe(Block, BatchStatistics):
    """Runs each token through the experts that score best, and weighs what they compute.

    ``bias_E``: what balances the load; None where nothing does, or a loss.
    """

    hosted: bool = True
    bias_E: Tensor | None

    def __init__(self, spec: MoeSpec, dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.select = nn.Linear(dim, spec.experts, bias=False)
        hidden, kind = spec.hidden_size(dim), spec.activation
        self.experts = nn.ModuleList(Expert(dim, hidden, kind) for _ in range(spec.experts))
        self.shared = Expert(dim, spec.shared * hidden, kind) if spec.shared else None
        self.balance = "none" if spec.all_used else spec.balance
        biased = self.balance == "bias"
        self.register_buffer("bias_E", torch.empty(spec.experts) if biased else None)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws the matrix of the scores, and sets the biases to 0."""
        super().reset(rng, depth)
        if self.bias_E is not None:
            self.bias_E.zero_()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """What each token computes by itself, [B, T, D]."""
        x_ND = x_BTD.flatten(0, 1)
        score_NE = self.scores(x_ND, ctx)
        index_NK = self.chosen(score_NE.detach())
        weight_NK = score_NE.gather(1, index_NK)
        if self.spec.normalise:
            weight_NK = weight_NK / weight_NK.sum(1, keepdim=True)
        if self.training and self.balance != "none":
            self._balance(score_NE, index_NK, x_BTD, ctx)
        weight_NK = weight_NK.to(x_ND.dtype)
        # shapes that depend on the choice are not possible everywhere
        run = self._all if ctx.stream.static or torch.compiler.is_compiling() else self._chosen_only
        y_BTD = run(x_ND, index_NK, weight_NK, ctx).view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD, ctx)

    def scores(self, x_ND: Tensor, ctx: Context) -> Tensor:
        """The weight that each expert would have, [N, E], at least in float32."""
        logit_NE = ctx.linear(self.select, x_ND)
        logit_NE = logit_NE.to(torch.promote_types(logit_NE.dtype, torch.float32))
        return logit_NE.sigmoid() if self.spec.gate == "sigmoid" else logit_NE.softmax(1)

    def chosen(self, score_NE: Tensor) -> Tensor:
        """The experts of each token, the best first, [N, K]; of equal ones the first."""
        if self.bias_E is not None:
            score_NE = score_NE + self.bias_E
        order_NE = without_noise(score_NE).sort(dim=1, descending=True, stable=True).indices
        return order_NE[:, : self.spec.top_k].contiguous()

    def _chosen_only(
        self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, ctx: Context
    ) -> Tensor:
        """The weighted sum of the chosen experts, [N, D], each on its tokens alone."""
        N, K = index_NK.shape
        order_R = index_NK.flatten().sort(stable=True).indices
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(N * K, device=order_R.device)
        parts = x_ND.index_select(0, order_R // K).split(self._loads(index_NK))
        pairs = zip(self.experts, parts, strict=True)
        y_RD = torch.cat([expert(part_RD, ctx) for expert, part_RD in pairs])
        y_NKD = y_RD.index_select(0, place_R).view(N, K, -1)
        # autocast on CUDA would make a sum in float32
        return (y_NKD * weight_NK.unsqueeze(-1)).sum(1, dtype=y_NKD.dtype)

    def _loads(self, index_NK: Tensor) -> list[int]:
        """How many tokens each expert has. On the device meta, where nobody knows: evenly many."""
        R, E = index_NK.numel(), self.spec.experts
        if index_NK.is_meta:
            return [R * (e + 1) // E - R * e // E for e in range(E)]
        return cast(list[int], index_NK.flatten().bincount(minlength=E).tolist())

    def _all(self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, ctx: Context) -> Tensor:
        """The same sum, for which every expert runs on all tokens, at shapes that never change."""
        weight_NE = weight_NK.new_zeros(len(x_ND), self.spec.experts)
        weight_NE = weight_NE.scatter(1, index_NK, weight_NK)
        weights = weight_NE.unsqueeze(-1).unbind(1)
        y_ND = torch.zeros_like(x_ND)
        for expert, weight_N1 in zip(self.experts, weights, strict=True):
            y_ND = y_ND + weight_N1 * expert(x_ND, ctx)
        return y_ND

    def _balance(self, score_NE: Tensor, index_NK: Tensor, x_BTD: Tensor, ctx: Context) -> None:
        """Notes the load of the experts, or adds the loss; padding does not count."""
        real_BT = ctx.stream.real(x_BTD)
        real_N1 = None if real_BT is None else real_BT.reshape(-1, 1).to(score_NE.dtype)
        one_NK = torch.ones_like(index_NK, dtype=score_NE.dtype)
        if real_N1 is not None:
            one_NK = one_NK * real_N1
        load_E = score_NE.new_zeros(self.spec.experts)
        load_E = load_E.scatter_add(0, index_NK.flatten(), one_NK.flatten())
        if self.balance == "bias":
            self.pending[ctx.path] = load_E
            return
        share_NE = score_NE / score_NE.sum(1, keepdim=True)
        if real_N1 is not None:
            share_NE = share_NE * real_N1
        if self.mean_over_ranks is not None:
            load_E = self.mean_over_ranks(load_E)
        tokens = load_E.sum().clamp(min=1) / self.spec.top_k
        loss = (share_NE.sum(0) * load_E).sum() / (tokens * tokens * self.spec.top_k)
        loss = self.spec.loss_weight * self.spec.experts * loss
        ctx.trace.add_loss(".moe", loss)

    def add(self, parts: Mapping[Hashable, Sequence[Tensor]]) -> None:
        """Moves the biases by the sign of what each expert lacks of the mean load of a batch."""
        loads: Iterable[Tensor] = chain.from_iterable(parts.values())
        load_E = sum(loads, torch.zeros(()))
        if self.bias_E is not None and parts:
            self.bias_E += self.spec.bias_step * (load_E.mean() - load_E).sign().to(self.bias_E)
