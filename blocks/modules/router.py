"""The torch modules of routers: scores, and the selection that follows from them.

Shapes: B batch, T tokens, S tokens kept in a cache, K selected tokens, D width, R routed steps.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.blocks.router import share_of
from archdsl.lang.spec import at_step
from archdsl.nn.block import Context, normal_
from archdsl.nn.cache import Count, Kept, Memory, Stream, column
from archdsl.nn.devices import in_float64
from archdsl.nn.gather import pick
from archdsl.nn.loop import Router, Selection, Step
from archdsl.nn.noise import uniform

if TYPE_CHECKING:
    from archdsl.blocks.router import LearnedSpec, RandomSpec, RouterSpec


PAIRS = 2**28  # of scores that a device other than a CPU compares at a time


class ScoreRouter(Router):
    """Scores tokens and selects a share of them, within a budget; one row for each of ``steps``.

    ``ranks``: whether a choice depends on the scores of all tokens so far.
    """

    ranks: ClassVar[bool] = True

    def __init__(self, spec: RouterSpec, steps: list[int]) -> None:
        super().__init__()
        self.alpha = [at_step(spec.alpha, step) for step in steps]

    def forward(self, x_BTD: Tensor, at: Step, ctx: Context, active_BT: Tensor | None) -> Selection:
        """The tokens of a step; only among ``active_BT``, if given."""
        memory = None if self.training or ctx.stream.static else ctx.memory(self)
        if memory is not None and x_BTD.shape[:2] == (1, 1):
            return self._one(x_BTD, at, ctx, active_BT, memory)
        has_loss = self.training and self.learned and bool(self.z_loss or self.aux_loss)
        with nullcontext() if has_loss else torch.no_grad():  # `weights` has the other gradient
            score_BT = self.scores(x_BTD, at.row, ctx)
        ranked_BT = without_noise(score_BT.detach())
        if active_BT is not None:
            ranked_BT = ranked_BT.masked_fill(~active_BT, -math.inf)
        real_BT = ctx.stream.real(x_BTD)
        if real_BT is not None:
            padding_BT = ctx.stream.once("padding", partial(torch.logical_not, real_BT))
            ranked_BT = ranked_BT.masked_fill(padding_BT, -math.inf)
        all_are_asked = active_BT is None and real_BT is None
        asked_BT = None if all_are_asked else ranked_BT > -math.inf
        index_BK, keep_BK, stream = self.select(x_BTD, ranked_BT, asked_BT, at, ctx)
        chosen = Selection(index_BK, pick(score_BT.detach(), index_BK), keep_BK, stream)
        if has_loss:
            ctx.trace.add_loss(at.key, self._loss(score_BT, asked_BT, chosen))
        return chosen

    def _one(
        self, x_BTD: Tensor, at: Step, ctx: Context, active_BT: Tensor | None, memory: Memory
    ) -> Selection:
        """`forward` for one token of one sequence. Most tokens are not selected, and each kernel
        would delay them: numbers take the place of tensors, and no score is computed in vain."""
        past, taken = ctx.stream.past, memory.taken
        assert isinstance(past, int)
        assert isinstance(taken, int)
        masks = (active_BT, ctx.stream.real(x_BTD))
        allowed = all(bool(mask_BT) for mask_BT in masks if mask_BT is not None)
        chosen = allowed and taken < share_of(at.capacity, past + 1)
        if at.capacity < 1 and (chosen or self.ranks):
            chosen = self.wants(x_BTD, at, ctx, allowed) and chosen
        memory.taken = taken + chosen
        index_BK = torch.zeros(1, int(chosen), dtype=torch.long, device=x_BTD.device)
        stream = Stream(taken, None, share_of(at.capacity, ctx.stream.limit))
        if not chosen:
            return Selection(index_BK, None, None, stream)
        return Selection(index_BK, self.scores(x_BTD, at.row, ctx).detach(), None, stream)

    def again(self, selected_BT: Tensor, score_BT: Tensor, at: Step, ctx: Context) -> Selection:
        """The selection of a static step, made anew from the rows that it selected."""
        limit = share_of(at.capacity, ctx.stream.limit)
        index_BK, keep_BK, stream = packed(selected_BT, ctx, ctx.memory(self), limit, None)
        return Selection(index_BK, score_BT, keep_BK, stream)

    def _loss(self, score_BT: Tensor, asked_BT: Tensor | None, chosen: Selection) -> Tensor:
        """The weighted losses of a selection, each the mean over the tokens that were asked for.

        z-loss: the square of log sum exp over the scores of a token (ST-MoE, Zoph et al.
        2202.08906, equation 5), of which a router of one step has one. Auxiliary loss: the binary
        cross-entropy of the score and whether the token was selected (Mixture-of-Recursions, Bae et
        al. 2507.10524, with expert-choice routing), so that selected tokens have scores above 0.
        """
        score_BT = score_BT.to(torch.promote_types(score_BT.dtype, torch.float32))
        loss = score_BT.new_zeros(())
        if self.z_loss:
            loss = loss + self.z_loss * mean_of(score_BT.square(), asked_BT)
        if self.aux_loss:
            target_BT = chosen.mask(score_BT.size(1)).to(score_BT.dtype)
            nats_BT = F.binary_cross_entropy_with_logits(score_BT, target_BT, reduction="none")
            loss = loss + self.aux_loss * mean_of(nats_BT, asked_BT)
        return loss

    def select(
        self, x_BTD: Tensor, score_BT: Tensor, asked_BT: Tensor | None, at: Step, ctx: Context
    ) -> tuple[Tensor, Tensor | None, Stream]:
        """The places of the selected tokens [B, K], which of them are selected (None: all), and
        the stream that they are a chunk of. ``asked_BT``: False where a token must not be selected,
        whose ``score_BT`` is -inf; None: nowhere.
        """
        memory = ctx.memory(self)
        taken = memory.taken if memory else 0
        if at.capacity < 1:
            wanted_BT = self.wanted(x_BTD, score_BT, at, ctx)
        else:
            wanted_BT = torch.ones_like(score_BT, dtype=torch.bool)
        if asked_BT is not None:
            wanted_BT = wanted_BT & asked_BT
        selected_BT = within_budget(wanted_BT, _budgets(at.capacity, score_BT, ctx.stream), taken)
        most = share_of(at.capacity, x_BTD.size(1)) if memory is None else None
        return packed(selected_BT, ctx, memory, share_of(at.capacity, ctx.stream.limit), most)

    def wanted(self, x_BTD: Tensor, score_BT: Tensor, at: Step, ctx: Context) -> Tensor:
        """True where a token is to be selected if the budget allows it, [B, T]."""
        higher_BT = higher_before(score_BT)
        memory = ctx.memory(self)
        if memory is not None:
            kept = memory.named("scores", score_BT.unsqueeze(-1), ctx.stream.limit)
            higher_BT = higher_BT + _higher_kept(kept, score_BT, ctx.stream)
            kept.write(score_BT.unsqueeze(-1), ctx.stream)
        return higher_BT < _budgets(at.capacity, score_BT, ctx.stream)

    def wants(self, x_BTD: Tensor, at: Step, ctx: Context, allowed: bool) -> bool:
        """`wanted` for one token of one sequence with a cache.

        ``allowed``: whether it may be selected. Asked of every token if the router ``ranks``.
        """
        memory, past = ctx.memory(self), ctx.stream.past
        assert memory is not None
        assert isinstance(past, int)
        score_BT1 = without_noise(self.scores(x_BTD, at.row, ctx)).detach().unsqueeze(-1)
        score_BT1 = score_BT1 if allowed else torch.full_like(score_BT1, -math.inf)
        kept = memory.named("scores", score_BT1, ctx.stream.limit)
        rank = 1 + int((kept.read(past) > score_BT1).sum())
        kept.write(score_BT1, ctx.stream)
        return rank <= share_of(at.capacity, past + 1)


class _Known(torch.autograd.Function):
    """The product of tokens and a vector, which is known already, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x_BKD: Tensor, weight_D: Tensor, product_BK: Tensor) -> Tensor:
        ctx.save_for_backward(x_BKD, weight_D)
        return product_BK.view_as(product_BK)

    @staticmethod
    def backward(ctx: Any, slope_BK: Tensor) -> tuple[Tensor, Tensor, None]:
        x_BKD, weight_D = ctx.saved_tensors
        slope_BK = slope_BK.to(x_BKD.dtype)
        slope_D = slope_BK.flatten() @ x_BKD.flatten(0, 1)
        return slope_BK.unsqueeze(-1) * weight_D.to(x_BKD.dtype), slope_D.to(weight_D.dtype), None


class Learned(ScoreRouter):
    """Its scores are a learned matrix times the tokens."""

    learned: ClassVar[bool] = True

    def __init__(self, spec: LearnedSpec, dim: int, steps: list[int]) -> None:
        super().__init__(spec, steps)
        self.weight_RD = nn.Parameter(torch.empty(len(steps), dim))
        self.squash = torch.sigmoid if spec.gate == "sigmoid" else torch.tanh

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws one row of weights for each routed step."""
        normal_(self.weight_RD, self.weight_RD.size(1) ** -0.5, rng)

    def scores(self, x_BTD: Tensor, row: int, ctx: Context) -> Tensor:
        """The log-odds that a token is selected, [B, T]."""
        return F.linear(x_BTD, self.weight_RD[row : row + 1]).squeeze(-1)

    def weights(self, x_BKD: Tensor, at: Step, chosen: Selection) -> Tensor:
        """alpha times the sigmoid or tanh of the score."""
        assert chosen.score_BK is not None
        score_BK = chosen.score_BK
        if torch.is_grad_enabled():
            score_BK = _Known.apply(x_BKD, self.weight_RD[at.row], score_BK)  # type: ignore[no-untyped-call]
        return (self.alpha[at.row] * self.squash(score_BK)).to(x_BKD.dtype)


class Prefix(Learned):
    """Selects the tokens whose scores rank highest among those up to them."""


class Random(ScoreRouter):
    """Selects pseudo-random positions, the same in every sequence."""

    def __init__(self, spec: RandomSpec, steps: list[int]) -> None:
        super().__init__(spec, steps)
        self.seed = spec.seed

    def scores(self, x_BTD: Tensor, row: int, ctx: Context) -> Tensor:
        """A pseudo-random number for each position, [B, T]."""
        pos_BT = ctx.stream.order(x_BTD) if ctx.pos_BT is None else ctx.pos_BT
        score_BT = uniform(pos_BT, (self.seed * 31 + self.salt) * 64 + row)
        return score_BT.expand(x_BTD.shape[:2])

    def weights(self, x_BKD: Tensor, at: Step, chosen: Selection) -> Tensor:
        """alpha."""
        return torch.full_like(x_BKD[..., 0], self.alpha[at.row])


def packed(
    selected_BT: Tensor, ctx: Context, memory: Memory | None, limit: int, most: int | None
) -> tuple[Tensor, Tensor | None, Stream]:
    """The selected tokens of each row first, as in `ScoreRouter.select`.

    ``limit``: how many tokens can ever be selected. ``most``: the number of places in a row; None:
    as many as the row with the most selected tokens has. A static cache computes every row.
    """
    length_B = selected_BT.sum(1)
    if memory is not None and ctx.stream.static:
        assert isinstance(memory.taken, Tensor)
        # `memory.taken` grows when the loop has run the pass, by `Stream.advance`
        stream = Stream(memory.taken, length_B, limit, static=True)
        first_BT = ctx.stream.once(
            "first", partial(torch.zeros_like, selected_BT, dtype=torch.long)
        )
        return first_BT, selected_BT, stream
    stream = Stream(memory.taken if memory else 0, length_B, limit)
    K = int(length_B.max()) if most is None else most
    if memory is not None:
        memory.taken = stream.after(K)
    if most is None and bool((length_B == K).all()):
        stream = replace(stream, length_B=None)
    first_BT, order_BT = selected_BT.sort(dim=1, descending=True, stable=True)
    keep_BK = None if stream.length_B is None else first_BT[:, :K]
    return order_BT[:, :K], keep_BK, stream


def mean_of(x_BT: Tensor, asked_BT: Tensor | None) -> Tensor:
    """The mean over the tokens that were asked for, 0 if there are none; None: over all."""
    if asked_BT is None:
        return x_BT.mean()
    return (x_BT * asked_BT).sum() / asked_BT.sum().clamp(min=1)


def without_noise(score_BT: Tensor) -> Tensor:
    """Scores rounded to half of their bits, so that equal tokens have equal scores in every pass.

    The last bits differ between passes of different shapes. (Veltkamp's splitting of a number.)
    Scores of 16 bits have fewer bits than are kept.
    """
    if score_BT.dtype.itemsize == 2:
        return score_BT.float()
    double = score_BT.dtype == torch.float64
    large_BT = score_BT * (2 ** (29 if double else 10) + 1)
    return large_BT - (large_BT - score_BT)


def budgets(capacity: float, order_BT: Tensor) -> Tensor:
    """The largest number of selected tokens up to each token, for its place ``order_BT``."""
    least = 1 if capacity > 0 else 0
    count_BT = (capacity * in_float64(order_BT + 1) + 0.5).floor().clamp(min=least).long()
    return count_BT.to(order_BT.device)


def _budgets(capacity: float, score_BT: Tensor, stream: Stream) -> Tensor:
    """`budgets` of the tokens of a stream, [1 or B, T]."""
    key = ("budget", capacity, score_BT.size(1))
    return stream.once(key, lambda: budgets(capacity, stream.order(score_BT)))


def within_budget(wanted_BT: Tensor, budget_BT: Tensor, taken: Count = 0) -> Tensor:
    """Which of the wanted tokens are selected: each while the selected ones up to it are not more
    than its budget, ``taken`` of them before this chunk, at most the budget before it.

    Unrolled: if all wanted tokens were selected, they would be ``over_BT`` more than the budget. A
    token is refused where that is more than ever before.
    """
    if wanted_BT.size(1) == 1:
        return wanted_BT & (budget_BT > column(taken))
    over_BT = wanted_BT.cumsum(1) - budget_BT
    if not isinstance(taken, int) or taken:
        over_BT = over_BT + column(taken)
    most_BT = F.pad(over_BT, (1, 0)).cummax(1).values
    return wanted_BT & (most_BT[:, 1:] == most_BT[:, :-1])


def higher_before(score_BT: Tensor, size: int | None = None, sorts: bool | None = None) -> Tensor:
    """For each score, how many of those before it are higher, [B, T].

    In parts of ``size`` scores. With ``sorts``, by default on a CPU, each score of a part is held
    against each, and those before it are sorted. Otherwise it is held against all before it, which
    takes few kernels.
    """
    B, T = score_BT.shape
    if sorts is None:
        sorts = score_BT.device.type == "cpu"
    if size is None:
        size = 256 if sorts else max(256, PAIRS // max(1, B * T))
    parts = []
    for start in range(0, T, size):
        part_BP, first = score_BT[:, start : start + size].contiguous(), start if sorts else 0
        others_BS = score_BT[:, first : start + size]
        higher_BPS = others_BS.unsqueeze(1) > part_BP.unsqueeze(2)
        higher_BP = higher_BPS.tril(start - first - 1).sum(-1)
        if start and sorts:
            before = score_BT[:, :start].sort().values
            higher_BP = higher_BP + start - torch.searchsorted(before, part_BP, right=True)
        parts.append(higher_BP)
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _higher_kept(kept: Kept, score_BT: Tensor, stream: Stream) -> Tensor:
    """For each score of this chunk, how many scores before the chunk are higher."""
    stop = stream.begin
    score_BS = kept.read(stop)[..., 0]
    if not isinstance(stream.past, int):
        none_BS = torch.arange(stop, device=score_BS.device) >= stream.past.unsqueeze(1)
        score_BS = score_BS.masked_fill(none_BS, -math.inf)
    parts = score_BT.split(256, dim=1)
    return torch.cat([(score_BS.unsqueeze(1) > part.unsqueeze(2)).sum(-1) for part in parts], 1)
