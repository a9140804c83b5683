"""The torch modules of routers that keep quantiles of their scores.

Shapes: B batch, T tokens, K selected tokens, D width, R routed steps, Q quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.blocks.modules.router import Learned, ScoreRouter, mean_of, without_noise
from archdsl.blocks.router import share_of
from archdsl.lang.spec import at_step
from archdsl.nn.block import BatchStatistics, Context, normal_
from archdsl.nn.cache import Memory, Stream
from archdsl.nn.devices import in_float64
from archdsl.nn.loop import Pass, Selection, Step

if TYPE_CHECKING:
    from archdsl.blocks.router import LearnedSpec
    from archdsl.blocks.threshold import PredictorSpec


QUANTILES = 257  # of the scores, kept for each routed step


MOMENTUM = 0.02  # the least share of a new pass in them


class Threshold(Learned, BatchStatistics):
    """Keeps the quantiles of its scores, which give a threshold for every capacity."""

    ranks: ClassVar[bool] = False
    quantiles_RQ: Tensor
    seen_R: Tensor

    def __init__(self, spec: LearnedSpec, dim: int, steps: list[int]) -> None:
        super().__init__(spec, dim, steps)
        self.register_buffer("quantiles_RQ", torch.empty(len(steps), QUANTILES))
        self.register_buffer("seen_R", torch.empty(len(steps)))

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws the weights, and sets the quantiles to those of a normal distribution."""
        super().reset(rng, depth)
        levels_Q = torch.linspace(0, 1, QUANTILES + 2)[1:-1]
        self.quantiles_RQ.copy_(torch.special.ndtri(levels_Q))  # of untrained scores
        self.seen_R.zero_()

    def forget_statistics(self) -> bool:
        """Counts no pass as seen, so that the next ones replace the quantiles."""
        self.seen_R.zero_()
        return True

    def wanted(self, x_BTD: Tensor, score_BT: Tensor, at: Step, ctx: Context) -> Tensor:
        """True where the score is above the threshold, [B, T]."""
        if self.training:
            self.note(score_BT, at.row)
        return score_BT >= self.threshold(at)

    def wants(self, x_BTD: Tensor, at: Step, ctx: Context, allowed: bool) -> bool:
        """See `ScoreRouter`."""
        memory = ctx.memory(self)
        assert memory is not None
        return self.takes(self.odds(x_BTD[0, 0]), at, memory)

    def skips(self, x_BTD: Tensor, passes: Sequence[Pass], ctx: Context) -> int:
        """See `Router`. For one token of one sequence, by one product for all passes."""
        past, kept = ctx.stream.past, ctx.kept
        if kept is None or x_BTD.shape[:2] != (1, 1):
            return 0
        assert isinstance(past, int)
        odds: list[float] = []
        for n, one in enumerate(passes):
            if one.routed is None:
                return n
            memory = kept.memory((self.place, (*ctx.path, one.step)))
            assert isinstance(memory.taken, int)
            if memory.taken < share_of(one.routed.capacity, past + 1):
                odds = odds or self.odds(x_BTD[0, 0])
                if one.routed.capacity == 1 or self.takes(odds, one.routed, memory):
                    return n
        return len(passes)

    def odds(self, x_D: Tensor) -> list[float]:
        """For each row, what a threshold decides by, of one token."""
        odds: list[float] = without_noise(F.linear(x_D, self.weight_RD)).tolist()
        return odds

    def takes(self, odds: list[float], at: Step, memory: Memory) -> bool:
        """Whether a token of these `odds` is wanted in the pass ``at``, which has this memory."""
        if memory.threshold is None:
            memory.threshold = self.threshold(at).item()
        return odds[at.row] >= memory.threshold

    def threshold(self, at: Step) -> Tensor:
        """The score that the wanted share of scores exceeded in training.

        For a nested router, that is the share of the tokens that it may still choose from.
        """
        place = (1 - at.capacity / at.among) * (QUANTILES - 1)
        low, high = math.floor(place), math.ceil(place)
        if low == high:
            return self.quantiles_RQ[at.row, low]
        return torch.lerp(
            self.quantiles_RQ[at.row, low], self.quantiles_RQ[at.row, high], place - low
        )

    def note(self, score_BT: Tensor, row: int) -> None:
        """Stores the scores of a training pass; the table does not change before `commit`."""
        self.pending[row] = _sample(score_BT.detach().flatten())

    def add(self, parts: Mapping[Hashable, Sequence[Tensor]]) -> None:
        """Mixes the quantiles of the scores of a batch into the table."""
        scores = {cast(int, row): _sample(_joined(found)) for row, found in parts.items()}
        # passes that some sequences do not take have fewer scores
        for size in {score_N.numel() for score_N in scores.values()}:
            rows = [row for row, score_N in scores.items() if score_N.numel() == size]
            self._mix(rows, torch.stack([scores[row] for row in rows]))

    def _mix(self, rows: list[int], score_SN: Tensor) -> None:
        score_SN = score_SN.float().masked_fill(score_SN == -math.inf, math.nan)
        levels_Q = torch.linspace(0, 1, QUANTILES, device=score_SN.device)
        new_SQ = torch.nanquantile(score_SN, levels_Q, dim=1).t()
        known_S1 = new_SQ.isfinite().all(1, keepdim=True)
        at_S = torch.tensor(rows).to(score_SN.device, non_blocking=True)
        self.seen_R[at_S] += known_S1.squeeze(1)
        share_S1 = (1 / self.seen_R[at_S].unsqueeze(1)).clamp(min=MOMENTUM)
        old_SQ = self.quantiles_RQ[at_S]
        moved_SQ = old_SQ.lerp(new_SQ.to(share_S1.dtype), share_S1)
        self.quantiles_RQ[at_S] = torch.where(known_S1, moved_SQ, old_SQ)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _sample(score_N: Tensor) -> Tensor:
    """An even sample of fewer than 2**17 scores; all of them where there are no more."""
    return score_N[:: score_N.numel() // 2**16 | 1]


class TopK(Threshold):
    """Selects the highest scores of the whole sequence; without later tokens, by threshold."""

    @property
    def leaks(self) -> bool:
        """True unless it has to select causally."""
        return not self.causal

    def select(
        self, x_BTD: Tensor, score_BT: Tensor, asked_BT: Tensor | None, at: Step, ctx: Context
    ) -> tuple[Tensor, Tensor | None, Stream]:
        """The highest scores of the sequence; by threshold with a cache or when causal."""
        if self.causal or ctx.cache is not None or at.capacity == 1:
            return super().select(x_BTD, score_BT, asked_BT, at, ctx)
        if self.training:
            self.note(score_BT, at.row)
        return self.best(score_BT, at, ctx)

    def best(
        self, score_BT: Tensor, at: Step, ctx: Context
    ) -> tuple[Tensor, Tensor | None, Stream]:
        """The highest scores of each sequence, as many as its capacity allows without padding."""
        order_BT = score_BT.sort(dim=1, descending=True, stable=True).indices
        best_BK = order_BT[:, : share_of(at.capacity, score_BT.size(1))]
        if ctx.stream.length_B is None:
            return best_BK.sort(dim=1).values, None, Stream()
        share_B = (at.capacity * in_float64(ctx.stream.length_B) + 0.5).floor().clamp(min=1).long()
        length_B = torch.minimum(share_B.to(score_BT.device), ctx.stream.length_B)
        stream = Stream(0, length_B)
        keep_BK = stream.real(best_BK)
        assert keep_BK is not None
        last_first_BK = best_BK + score_BT.size(1) * ~keep_BK
        return last_first_BK.sort(dim=1).values % score_BT.size(1), keep_BK, stream


class Predictor(TopK):
    """Predicts what top_k would select; its quantiles are those of its predictions."""

    sees_later_tokens_in_training: ClassVar[bool] = True

    def __init__(self, spec: PredictorSpec, dim: int, steps: list[int]) -> None:
        super().__init__(spec, dim, steps)
        self.loss_weight = spec.weight
        self.trained = [at_step(spec.capacity, step) for step in steps]
        self.predict_RD = nn.Parameter(torch.empty(len(steps), dim))
        self.bias_R = nn.Parameter(torch.empty(len(steps)))

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws both matrices, and sets the biases to 0."""
        super().reset(rng, depth)
        normal_(self.predict_RD, self.predict_RD.size(1) ** -0.5, rng)
        nn.init.zeros_(self.bias_R)

    @property
    def leaks(self) -> bool:
        """False: it looks at later tokens in training only."""
        return False

    def serve_every_capacity(self) -> None:
        """From now on every capacity is selected by threshold."""
        # what it predicts is then no choice at one capacity
        self.trained = [math.nan] * len(self.trained)

    def select(
        self, x_BTD: Tensor, score_BT: Tensor, asked_BT: Tensor | None, at: Step, ctx: Context
    ) -> tuple[Tensor, Tensor | None, Stream]:
        """As top_k in training, where it learns to predict that choice; else by prediction."""
        if not self.training or self.causal or ctx.cache is not None:
            return ScoreRouter.select(self, x_BTD, score_BT, asked_BT, at, ctx)
        index_BK, keep_BK, stream = self.best(score_BT, at, ctx)
        self.learn(x_BTD, asked_BT, Selection(index_BK, None, keep_BK, stream), at, ctx)
        return index_BK, keep_BK, stream

    def wanted(self, x_BTD: Tensor, score_BT: Tensor, at: Step, ctx: Context) -> Tensor:
        """True where a token is likely to be among the highest scores, [B, T]."""
        likely_BT = self.likely(x_BTD, at.row)
        if at.capacity == self.trained[at.row]:
            return likely_BT > 0
        return likely_BT >= self.threshold(at)

    def odds(self, x_D: Tensor) -> list[float]:
        """`likely` for each row, of one token."""
        odds: list[float] = F.linear(x_D, self.predict_RD, self.bias_R).tolist()
        return odds

    def takes(self, odds: list[float], at: Step, memory: Memory) -> bool:
        """See `Threshold`."""
        if at.capacity == self.trained[at.row]:
            return odds[at.row] > 0
        return super().takes(odds, at, memory)

    def likely(self, x_BTD: Tensor, row: int) -> Tensor:
        """The log-odds that a token is selected, [B, T], without gradients for the stream."""
        rows = slice(row, row + 1)
        return F.linear(x_BTD.detach(), self.predict_RD[rows], self.bias_R[rows]).squeeze(-1)

    def learn(
        self,
        x_BTD: Tensor,
        asked_BT: Tensor | None,
        chosen: Selection,
        at: Step,
        ctx: Context,
    ) -> None:
        """Adds the loss and the accuracy of the prediction of ``chosen`` to the trace."""
        likely_BT = self.likely(x_BTD, at.row).float()
        target_BT = chosen.mask(x_BTD.size(1))
        nats_BT = F.binary_cross_entropy_with_logits(likely_BT, target_BT.float(), reduction="none")
        ctx.trace.add_loss(at.key, self.loss_weight * mean_of(nats_BT, asked_BT))
        likely_BT = likely_BT.detach()
        right_BT = (likely_BT > 0) == target_BT
        ctx.trace.accuracies[at.key] = mean_of(right_BT.float(), asked_BT)
        if asked_BT is not None:
            likely_BT = likely_BT.masked_fill(~asked_BT, -math.inf)
        self.note(likely_BT, at.row)
