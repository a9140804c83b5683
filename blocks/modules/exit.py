"""The torch modules of exits.

Shapes: B batch, T tokens, K tokens that take a pass, D width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.blocks.modules.router import packed, without_noise
from archdsl.errors import ArchdslError
from archdsl.nn.block import Context, Primitive, normal_
from archdsl.nn.gather import put, take
from archdsl.nn.loop import Pass, Selection

if TYPE_CHECKING:
    from archdsl.blocks.exit import ConfidenceSpec, GateSpec, HaltingSpec


class ReadoutError(ArchdslError):
    """A model without a head whose exit reads logits."""


@dataclass(frozen=True)
class Going:
    """What an exit knows of the tokens of a pass through a loop.

    ``going_BT``: True for those that have not stopped. ``seen``: what it remembers of each: a sum
    or probability [B, T], or logarithms of a distribution [B, T, V]. ``out_BTD``: the weighted sum
    of states that the loop returns; None: it returns the state itself. In training, ``ponder_BT``:
    the passes that each token took, and the weight of its last one; ``passes``: the state after
    each pass, and the logit of stopping there.
    """

    going_BT: Tensor
    seen: Tensor | None = None
    out_BTD: Tensor | None = None
    ponder_BT: Tensor | None = None
    passes: tuple[tuple[Tensor, Tensor], ...] = ()


class Exit(Primitive):
    """Decides after each pass of a loop which tokens take the next one.

    ``in_training``: whether tokens stop in training, too.
    """

    in_training: ClassVar[bool] = False

    def begin(self, x_BTD: Tensor, ctx: Context) -> Going:
        """Before the first pass: every real token goes on."""
        going_BT = torch.ones_like(x_BTD[..., 0], dtype=torch.bool)
        real_BT = ctx.stream.real(x_BTD)
        return Going(going_BT if real_BT is None else real_BT)

    def after(
        self, x_BTD: Tensor, known: Going, chosen: Selection | None, at: Pass, ctx: Context
    ) -> Going:
        """After a pass that is not the last one.

        ``x_BTD``: the state, which is that of its last pass where a token has stopped.
        ``chosen``: the tokens that took the pass; None: all. ``at``: the next pass.
        """
        raise NotImplementedError

    def end(self, x_BTD: Tensor, known: Going, place: str, ctx: Context) -> Tensor:
        """What the loop returns after its last pass, [B, T, D]."""
        return x_BTD

    def choose(self, x_BTD: Tensor, known: Going, ctx: Context) -> Selection:
        """The tokens that take a pass: those that have not stopped."""
        # in training, shapes do not depend on what is chosen
        most = x_BTD.size(1) if self.training or x_BTD.is_meta else None
        index_BK, keep_BK, stream = packed(
            known.going_BT, ctx, ctx.memory(self), ctx.stream.limit, most
        )
        return Selection(index_BK, None, keep_BK, stream)


class Learned(Exit):
    """Reads a logit from the state of each token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws the weights, and sets the bias so that few tokens stop at first."""
        normal_(self.score.weight, 0.1 * self.score.in_features**-0.5, rng)
        nn.init.constant_(self.score.bias, -1.0)

    def logits(self, x_BTD: Tensor, chosen: Selection | None) -> Tensor:
        """A logit for each token, [B, T]; 0 for those that did not take the pass."""
        if chosen is None or self.training:
            return precise(self.score(x_BTD).squeeze(-1))
        logit_BK = precise(self.score(take(x_BTD, chosen.index_BK)).squeeze(-1))
        return logit_BK.new_zeros(x_BTD.shape[:2]).scatter(1, chosen.index_BK, logit_BK)


class Gate(Learned):
    """A probability of stopping after each pass."""

    def __init__(self, spec: GateSpec, dim: int) -> None:
        super().__init__(dim)
        self.prior, self.weight = spec.prior, spec.weight

    def after(
        self, x_BTD: Tensor, known: Going, chosen: Selection | None, at: Pass, ctx: Context
    ) -> Going:
        """Multiplies the chance to go on; in training, notes the state and the logit."""
        if self.training:
            both = (x_BTD, self.logits(x_BTD, chosen))
            return replace(known, passes=(*known.passes, both))
        if at.routed is None:
            return known
        logit_BT = self.logits(x_BTD, chosen)
        stay_BT = F.logsigmoid(-logit_BT)
        stay_BT = stay_BT if known.seen is None else known.seen + stay_BT
        stopped_BT = without_noise(-torch.expm1(stay_BT)) >= threshold(at)
        return replace(known, going_BT=known.going_BT & ~stopped_BT, seen=stay_BT)

    def end(self, x_BTD: Tensor, known: Going, place: str, ctx: Context) -> Tensor:
        """The state. In training, notes what the expected loss needs, and adds the divergence of
        the exit distribution from the prior to the losses."""
        if self.training and known.passes:
            states, logits = zip(*known.passes, strict=True)
            log_p_PBT = log_exits(torch.stack(logits))
            ctx.trace.passes[:] = zip((*states, x_BTD), log_p_PBT.exp(), strict=True)
            nats_BT, real_BT = self.divergence(log_p_PBT), ctx.stream.real(x_BTD)
            nats_BT = nats_BT if real_BT is None else nats_BT * real_BT
            loss = self.weight * nats_BT.sum() / ctx.stream.tokens(x_BTD)
            ctx.trace.add_loss(f"{place}.exit", loss)
        return x_BTD

    def divergence(self, log_p_PBT: Tensor) -> Tensor:
        """The KL divergence of exit distributions from the prior, in nats, [B, T]."""
        passes = torch.arange(len(log_p_PBT), device=log_p_PBT.device, dtype=log_p_PBT.dtype)
        slope = 0.0 if self.prior is None else math.log1p(-self.prior)
        log_prior_P = (slope * passes).log_softmax(0)
        return (log_p_PBT.exp() * (log_p_PBT - log_prior_P.view(-1, 1, 1))).sum(0)


def log_exits(logit_PBT: Tensor) -> Tensor:
    """The logarithms of the chances to stop after each pass, [P + 1, B, T].

    ``logit_PBT``: of stopping after each pass but the last, after which all others stop.
    """
    log_stay_PBT = F.logsigmoid(-logit_PBT).cumsum(0)
    log_stop_PBT = torch.cat((F.logsigmoid(logit_PBT), torch.zeros_like(logit_PBT[:1])))
    return log_stop_PBT + F.pad(log_stay_PBT, (0, 0, 0, 0, 1, 0))


class Halting(Learned):
    """A number after each pass; a token stops when they add up to the threshold."""

    in_training: ClassVar[bool] = True

    def __init__(self, spec: HaltingSpec, dim: int) -> None:
        super().__init__(dim)
        self.weight = spec.weight

    def after(
        self, x_BTD: Tensor, known: Going, chosen: Selection | None, at: Pass, ctx: Context
    ) -> Going:
        """Adds the state with its weight: h, or what is left to 1 where the token stops here."""
        h_BT = torch.sigmoid(self.logits(x_BTD, chosen))
        before_BT = torch.zeros_like(h_BT) if known.seen is None else known.seen
        sum_BT = before_BT + h_BT
        stops_BT = without_noise(sum_BT.detach()) >= threshold(at)
        weight_BT = torch.where(stops_BT, 1 - before_BT, h_BT)
        found = self._added(x_BTD, known, weight_BT, stops_BT)
        return replace(found, seen=torch.where(known.going_BT, sum_BT, before_BT))

    def end(self, x_BTD: Tensor, known: Going, place: str, ctx: Context) -> Tensor:
        """The weighted sum of states. In training, adds the ponder cost to the losses."""
        left_BT = torch.ones_like(x_BTD[..., 0]) if known.seen is None else 1 - known.seen
        found = self._added(x_BTD, known, left_BT, torch.ones_like(known.going_BT))
        assert found.out_BTD is not None
        if self.training and found.ponder_BT is not None:
            loss = self.weight * found.ponder_BT.sum() / ctx.stream.tokens(x_BTD)
            ctx.trace.add_loss(f"{place}.ponder", loss)
        return found.out_BTD

    def _added(self, x_BTD: Tensor, known: Going, weight_BT: Tensor, stops_BT: Tensor) -> Going:
        """Adds the state times its weight, and one pass, to the sums of tokens that go on."""
        weight_BT = torch.where(known.going_BT, weight_BT, 0.0)
        one_BTD = weight_BT.unsqueeze(-1).to(x_BTD.dtype) * x_BTD
        out_BTD = one_BTD if known.out_BTD is None else known.out_BTD + one_BTD
        going_BT = known.going_BT & ~stops_BT
        if not self.training:
            return Going(going_BT, known.seen, out_BTD)
        # N + R: a pass for each, and the weight of the last
        cost_BT = known.going_BT + torch.where(stops_BT, weight_BT, 0.0)
        ponder_BT = cost_BT if known.ponder_BT is None else known.ponder_BT + cost_BT
        return Going(going_BT, known.seen, out_BTD, ponder_BT)


class Confidence(Exit):
    """Stops tokens whose next-token distribution is settled."""

    def __init__(self, spec: ConfidenceSpec) -> None:
        super().__init__()
        self.measure = spec.measure

    def after(
        self, x_BTD: Tensor, known: Going, chosen: Selection | None, at: Pass, ctx: Context
    ) -> Going:
        """Compares the distributions of the tokens that were computed with the threshold."""
        if self.training or at.routed is None:
            return known
        if ctx.readout is None:
            raise ReadoutError(
                "exit: confidence reads the logits after each pass: load the model with its head"
            )
        index_BK = None if chosen is None else chosen.index_BK
        logits = precise(ctx.readout(x_BTD if index_BK is None else take(x_BTD, index_BK)))
        logp_BKV = logits.log_softmax(-1)
        if self.measure == "entropy":
            nats_BK = -(logp_BKV.exp() * logp_BKV).sum(-1)
            return replace(known, going_BT=_still_going(known, nats_BK, index_BK, at))
        if known.seen is None:  # the first pass has nothing to be compared with
            return replace(known, seen=logp_BKV)
        before_BKV = known.seen if index_BK is None else take(known.seen, index_BK)
        nats_BK = (logp_BKV.exp() * (logp_BKV - before_BKV)).sum(-1)
        seen_BTV = logp_BKV if index_BK is None else put(known.seen, index_BK, logp_BKV)
        return Going(_still_going(known, nats_BK, index_BK, at), seen_BTV)


def _still_going(known: Going, nats_BK: Tensor, index_BK: Tensor | None, at: Pass) -> Tensor:
    stops = without_noise(nats_BK) < threshold(at)
    if index_BK is not None:
        stops = torch.zeros_like(known.going_BT).scatter(1, index_BK, stops)
    return known.going_BT & ~stops


def threshold(at: Pass) -> float:
    """The threshold at which tokens stop before a pass."""
    assert at.exit is not None
    return at.exit


def precise(x: Tensor) -> Tensor:
    """``x`` in at least float32, as sums of probabilities need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
