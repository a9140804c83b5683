"""Routers: which tokens take a thinking step.

Chen et al. 2502.13842, section 3.2: ``w = sigmoid(R(Y))`` with one linear router per step; a
selected token's new value is weighted by ``alpha * w``, which is how the router learns.

    prefix  its score ranks in the top share of the scores up to it
    random  a pseudo-random share of the positions: the control

and in threshold.py those that know what scores are like from training, the paper's among them.

Causal choices keep within a running budget: of the tokens so far, never more than the share is
selected. So the capacity is a hard bound at every prefix, on FLOPs and on the cache, and shapes are
static in training.

Shapes: B batch, T tokens, S tokens kept in a cache, K selected tokens, D width, R routed steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from archdsl.block import Context, Primitive, normal_
from archdsl.cache import Count, Kept, Memory, Stream, column
from archdsl.cost import Cost
from archdsl.spec import Part, Path, PerStep, at_step

Positive = Annotated[float, Field(gt=0, le=100)]


@dataclass(frozen=True)
class Choice:
    """Selected tokens: distinct, in sequence order, filled up to K with unselected ones.

    ``stream``: what they are a chunk of, the tokens that the step selected before included.
    """

    index_BK: Tensor
    gate_BK: Tensor
    keep_BK: Tensor | None  # False where the entry only fills up; None: all are selected
    stream: Stream

    def mask(self, tokens: int) -> Tensor:
        """True where a token is selected, [B, T]."""
        keep = (
            torch.ones_like(self.index_BK, dtype=torch.bool)
            if self.keep_BK is None
            else self.keep_BK
        )
        empty = torch.zeros(len(keep), tokens, dtype=torch.bool, device=keep.device)
        return empty.scatter(1, self.index_BK, keep)


class Step(NamedTuple):
    """One routed pass of a loop: ``row`` of the router's weights, at a share of all tokens.

    ``among``: the share of the tokens that it may choose from.
    """

    name: str
    row: int
    capacity: float
    among: float


class RouterSpec(Part):
    """A choice of tokens for every step of a loop after the full ones."""

    family: ClassVar[str] = "router"
    leaks: ClassVar[bool] = False  # whether a choice depends on later tokens, outside training
    learned: ClassVar[bool] = True
    ranks: ClassVar[bool] = False  # whether decoding needs the scores of all tokens so far

    capacity: PerStep[Annotated[float, Field(gt=0, le=1)]] = Field(
        (0.5,), min_length=1, max_length=64, description="share of the tokens selected, per step"
    )
    alpha: PerStep[Positive] = Field(
        (1.0,), min_length=1, max_length=64, description="scale of a selected token's new value"
    )
    nested: bool = Field(
        False, description="a token that was left out stays out (Mixture-of-Recursions)"
    )

    def misfits(self, dim: int) -> Iterator[tuple[Path, str]]:
        if self.nested and list(self.capacity) != sorted(self.capacity, reverse=True):
            yield ("capacity",), f"must not rise when nested, got {list(self.capacity)}"

    def canonical(self, dim: int) -> RouterSpec | None:
        return None if all(share == 1 for share in self.capacity) else self

    def tokens(self, tokens: int, step: int) -> int:
        """How many of ``tokens`` a routed step runs on."""
        return share_of(at_step(self.capacity, step), tokens)

    def cost(self, dim: int, tokens: int, steps: int) -> Cost:
        """``steps`` choices among ``tokens`` tokens each."""
        weights = steps * dim if self.learned else 0
        # scores are kept in float32, which takes as much as two numbers of a cache in bfloat16
        kept = 2 * steps * tokens if self.ranks else 0
        return Cost(params=weights, matrices=weights, flops=2 * tokens * weights, kv=kept)

    def build(self, dim: int, steps: list[int]) -> Router:
        raise NotImplementedError


class LearnedSpec(RouterSpec):
    gate: Literal["sigmoid", "tanh"] = Field("sigmoid", description="score -> weight")


class PrefixSpec(LearnedSpec):
    """The best-scored share of the tokens so far. Causal."""

    ranks: ClassVar[bool] = True
    example: ClassVar = {"kind": "prefix", "capacity": 0.7}

    kind: Literal["prefix"] = "prefix"

    def build(self, dim: int, steps: list[int]) -> Prefix:
        return Prefix(self, dim, steps)


class RandomSpec(RouterSpec):
    """A fixed pseudo-random share by position, the control for a learned choice. Causal."""

    learned: ClassVar[bool] = False
    ranks: ClassVar[bool] = True
    example: ClassVar = {"kind": "random", "capacity": 0.5}

    kind: Literal["random"] = "random"
    seed: int = Field(0, ge=0, le=2**31, description="other seeds select other positions")

    def build(self, dim: int, steps: list[int]) -> Random:
        return Random(self, steps)


class AllSpec(RouterSpec):
    """Every token, every step: the same as no router."""

    learned: ClassVar[bool] = False
    example: ClassVar = {"kind": "all"}

    kind: Literal["all"] = "all"
    capacity: PerStep[Annotated[float, Field(ge=1, le=1)]] = (1.0,)


def share_of(capacity: float, tokens: int) -> int:
    """``capacity`` of ``tokens``, rounded, at least one: grids yield 0.6000000000000001."""
    return max(1, math.floor(capacity * tokens + 0.5)) if capacity > 0 else 0


class Router(Primitive):
    """Scores tokens and selects a share of them; one row of ``steps`` per routed step."""

    def __init__(self, spec: RouterSpec, steps: list[int]) -> None:
        super().__init__()
        self.alpha = [at_step(spec.alpha, step) for step in steps]
        self.salt = 0  # which router of the model this is

    def scores(self, x_BTD: Tensor, row: int, ctx: Context) -> Tensor:
        raise NotImplementedError

    def gate(self, score_BK: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, at: Step, ctx: Context, active_BT: Tensor | None) -> Choice:
        """The tokens of a step; only among ``active_BT``, if given."""
        score_BT = self.scores(x_BTD, at.row, ctx)
        ranked_BT = without_noise(score_BT.detach())
        for allowed_BT in (active_BT, ctx.stream.real(x_BTD)):
            if allowed_BT is not None:
                ranked_BT = ranked_BT.masked_fill(~allowed_BT, -math.inf)
        index_BK, keep_BK, stream = self.select(x_BTD, ranked_BT, at, ctx)
        gate_BK = self.alpha[at.row] * self.gate(score_BT.gather(1, index_BK))
        return Choice(index_BK, gate_BK.to(x_BTD.dtype), keep_BK, stream)

    def select(
        self, x_BTD: Tensor, score_BT: Tensor, at: Step, ctx: Context
    ) -> tuple[Tensor, Tensor | None, Stream]:
        memory = ctx.memory(self)
        if memory is not None and x_BTD.shape[:2] == (1, 1):
            return self._select_one(x_BTD, score_BT, at, ctx, memory)
        taken = memory.taken if memory else 0
        if at.capacity == 1:
            wanted_BT = score_BT > -math.inf
        else:
            wanted_BT = self.wanted(x_BTD, score_BT, at, ctx) & (score_BT > -math.inf)
        selected_BT = within_budget(wanted_BT, at.capacity, ctx.stream.order(x_BTD), taken)
        length_B = selected_BT.sum(1)
        stream = Stream(taken, length_B, share_of(at.capacity, ctx.stream.limit))
        if memory is None:
            K = share_of(at.capacity, x_BTD.size(1))
        else:  # while decoding, nothing that can be left out is computed
            K = int(length_B.max())
            memory.taken = stream.after(K)
            if bool((length_B == K).all()):
                stream = replace(stream, length_B=None)
        order_BT = (~selected_BT).to(torch.int8).sort(dim=1, stable=True).indices
        index_BK = order_BT[:, :K]
        keep_BK = None if stream.length_B is None else selected_BT.gather(1, index_BK)
        return index_BK, keep_BK, stream

    def _select_one(
        self, x_BTD: Tensor, score_BT: Tensor, at: Step, ctx: Context, memory: Memory
    ) -> tuple[Tensor, Tensor | None, Stream]:
        """The same for one token of one sequence, which needs no tensors for its budget."""
        past, taken = ctx.stream.past, memory.taken
        assert isinstance(past, int)
        assert isinstance(taken, int)
        wanted = at.capacity == 1 or self.wanted(x_BTD, score_BT, at, ctx)
        allowed = taken < share_of(at.capacity, past + 1) and bool(score_BT > -math.inf)
        selected = int(bool(wanted) and allowed)
        memory.taken = taken + selected
        index_BK = torch.zeros(1, selected, dtype=torch.long, device=x_BTD.device)
        return index_BK, None, Stream(taken, None, share_of(at.capacity, ctx.stream.limit))

    def wanted(self, x_BTD: Tensor, score_BT: Tensor, at: Step, ctx: Context) -> Tensor:
        """Which tokens should be selected as far as the budget goes, [B, T]."""
        rank_BT = prefix_rank(score_BT)
        memory = ctx.memory(self)
        if memory is not None:
            kept = memory.named("scores", score_BT.unsqueeze(-1), ctx.stream.limit)
            rank_BT = rank_BT + _ranked_above(kept, score_BT, ctx.stream)
            kept.write(score_BT.unsqueeze(-1), ctx.stream)
        return rank_BT <= budgets(at.capacity, ctx.stream.order(score_BT))

    @property
    def leaks(self) -> bool:
        """Whether it looks at later tokens, outside training."""
        return False

    def commit(self) -> None:
        """Takes up what the last training pass taught besides gradients."""


class Learned(Router):
    def __init__(self, spec: LearnedSpec, dim: int, steps: list[int]) -> None:
        super().__init__(spec, steps)
        self.weight_RD = nn.Parameter(torch.empty(len(steps), dim))
        self.squash = torch.sigmoid if spec.gate == "sigmoid" else torch.tanh

    def reset(self, rng: torch.Generator, depth: int) -> None:
        normal_(self.weight_RD, self.weight_RD.size(1) ** -0.5, rng)

    def scores(self, x_BTD: Tensor, row: int, ctx: Context) -> Tensor:
        return F.linear(x_BTD, self.weight_RD[row : row + 1]).squeeze(-1)

    def gate(self, score_BK: Tensor) -> Tensor:
        return self.squash(score_BK)


class Prefix(Learned):
    pass


class Random(Router):
    def __init__(self, spec: RandomSpec, steps: list[int]) -> None:
        super().__init__(spec, steps)
        self.seed = spec.seed

    def scores(self, x_BTD: Tensor, row: int, ctx: Context) -> Tensor:
        pos_BT = ctx.stream.order(x_BTD) if ctx.pos_BT is None else ctx.pos_BT
        score_BT = _hash(pos_BT, (self.seed * 31 + self.salt) * 64 + row)
        return score_BT.expand(x_BTD.shape[:2])

    def gate(self, score_BK: Tensor) -> Tensor:
        return torch.ones_like(score_BK)


def _hash(pos_BT: Tensor, stream: int) -> Tensor:
    """A number in [0, 1) for each position, by two rounds of multiply and xor-shift."""
    h = (pos_BT.long() + 1) * 0x9E3779B1 + (stream % 2**20 + 1) * 0x85EBCA77
    for factor in (0x7FEB352D, 0x6C8E9CF5):
        h = ((h ^ (h >> 15)) & 0x7FFFFFFF) * factor
    # float32 holds 24 bits; half precision, in which the stream may be, would make ties
    return ((h ^ (h >> 16)) & 0xFFFFFF).float() / 2**24


def without_noise(score_BT: Tensor) -> Tensor:
    """Scores without their last bits, which differ between one pass and another: equal tokens
    shall tie in all of them. (Veltkamp's splitting of a number; half of the bits are kept.)"""
    score_BT = score_BT.to(torch.promote_types(score_BT.dtype, torch.float32))
    bits = 29 if score_BT.dtype == torch.float64 else 10
    large_BT = score_BT * (2**bits + 1)
    return large_BT - (large_BT - score_BT)


def budgets(capacity: float, order_BT: Tensor) -> Tensor:
    """How many tokens may have been selected when each of them has been decided."""
    least = 1 if capacity > 0 else 0
    return (capacity * (order_BT + 1).double() + 0.5).floor().clamp(min=least).long()


def within_budget(wanted_BT: Tensor, capacity: float, order_BT: Tensor, taken: Count = 0) -> Tensor:
    """Which of the wanted tokens are selected: each while the selected ones so far stay within
    ``capacity`` of all so far, ``taken`` of them before this chunk.

    taken(i) = min(taken(i-1) + wanted(i), budget(i)), unrolled to a running minimum.
    """
    sum_BT = wanted_BT.long().cumsum(1) + column(taken)
    spare_BT = budgets(capacity, order_BT) - sum_BT
    taken_BT = sum_BT + spare_BT.cummin(1).values.clamp(max=0)
    return taken_BT.diff(dim=1, prepend=torch.zeros_like(taken_BT[:, :1]) + column(taken)) > 0


def prefix_rank(score_BT: Tensor, rows: int = 256) -> Tensor:
    """The rank of each score among those up to it, best is 1; ties go to the later one."""
    T = score_BT.size(1)
    ranks = []
    for start in range(0, T, rows):  # in slices: T x T at once is too much at long contexts
        stop = min(start + rows, T)
        above = score_BT[:, None, :stop] > score_BT[:, start:stop, None]
        ranks.append(above.tril(start - 1).sum(-1) + 1)
    return torch.cat(ranks, 1)


def _ranked_above(kept: Kept, score_BT: Tensor, stream: Stream) -> Tensor:
    """How many of the scores before this chunk are above each of its own."""
    stop = stream.past if isinstance(stream.past, int) else int(stream.past.max())
    score_BS = kept.read(stop)[..., 0]
    if not isinstance(stream.past, int):
        none_BS = torch.arange(stop, device=score_BS.device) >= stream.past.unsqueeze(1)
        score_BS = score_BS.masked_fill(none_BS, -math.inf)
    parts = score_BT.split(256, dim=1)
    return torch.cat([(score_BS.unsqueeze(1) > part.unsqueeze(2)).sum(-1) for part in parts], 1)
