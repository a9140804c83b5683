"""Routers: which tokens take a thinking step.

Chen et al. 2502.13842, section 3.2: ``w = sigmoid(R(Y))`` with one linear router per step; a
selected token's new value is weighted by ``alpha * w``, which is how the router learns.

``top_k`` is the paper's choice over the whole sequence. It sees the future: a token's selection
depends on later tokens. `prefix` is causal: a token is selected when its score ranks in the top
share of the scores up to it, and while no more than that share of the tokens so far has been
selected. The second rule makes the capacity a hard bound at every prefix, and shapes static.

Shapes: B batch, T tokens, K selected tokens, D width, R routed steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from archdsl.block import Context, Primitive, normal_
from archdsl.cost import Cost
from archdsl.spec import Part, Path, PerStep, at_step

Positive = Annotated[float, Field(gt=0, le=100)]


@dataclass(frozen=True)
class Choice:
    """Selected tokens: distinct, in sequence order, filled up to K with unselected ones."""

    index_BK: Tensor
    gate_BK: Tensor
    keep_BK: Tensor | None = None  # False where the entry only fills up; None: all are selected

    def mask(self, tokens: int) -> Tensor:
        """True where a token is selected, [B, T]."""
        keep = (
            torch.ones_like(self.index_BK, dtype=torch.bool)
            if self.keep_BK is None
            else self.keep_BK
        )
        empty = torch.zeros(len(keep), tokens, dtype=torch.bool, device=keep.device)
        return empty.scatter(1, self.index_BK, keep)


class RouterSpec(Part):
    """A choice of tokens for every step of a loop after the full ones."""

    family: ClassVar[str] = "router"
    leaks: ClassVar[bool] = False  # whether a choice depends on later tokens
    learned: ClassVar[bool] = True

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
        return Cost(params=weights, matrices=weights, flops=2 * tokens * weights)

    def build(self, dim: int, steps: list[int]) -> Router:
        raise NotImplementedError


class LearnedSpec(RouterSpec):
    gate: Literal["sigmoid", "tanh"] = Field("sigmoid", description="score -> weight")


class TopKSpec(LearnedSpec):
    """The best-scored share of the sequence, as in the paper. Sees the future."""

    leaks: ClassVar[bool] = True
    example: ClassVar = {"kind": "top_k", "capacity": 0.7}

    kind: Literal["top_k"] = "top_k"

    def build(self, dim: int, steps: list[int]) -> TopK:
        return TopK(self, dim, steps)


class PrefixSpec(LearnedSpec):
    """The best-scored share of the tokens so far. Causal."""

    example: ClassVar = {"kind": "prefix", "capacity": 0.7}

    kind: Literal["prefix"] = "prefix"

    def build(self, dim: int, steps: list[int]) -> Prefix:
        return Prefix(self, dim, steps)


class RandomSpec(RouterSpec):
    """A fixed pseudo-random share by position, the control for a learned choice. Causal."""

    learned: ClassVar[bool] = False
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
    return max(1, math.floor(capacity * tokens + 0.5))


class Router(Primitive):
    """Scores tokens and selects a share of them; one row of ``steps`` per routed step."""

    def __init__(self, spec: RouterSpec, steps: list[int]) -> None:
        super().__init__()
        self.capacity = [at_step(spec.capacity, step) for step in steps]
        self.alpha = [at_step(spec.alpha, step) for step in steps]
        self.salt = 0  # which router of the model this is

    def scores(self, x_BTD: Tensor, row: int, ctx: Context) -> Tensor:
        raise NotImplementedError

    def gate(self, score_BK: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, row: int, ctx: Context, active_BT: Tensor | None) -> Choice:
        """The tokens of step ``row``; only among ``active_BT``, if given."""
        score_BT = self.scores(x_BTD, row, ctx)
        ranked_BT = score_BT.detach()
        if active_BT is not None:
            ranked_BT = ranked_BT.masked_fill(~active_BT, -math.inf)
        index_BK, keep_BK = self.select(ranked_BT, self.capacity[row])
        gate_BK = self.alpha[row] * self.gate(score_BT.gather(1, index_BK))
        return Choice(index_BK, gate_BK.to(x_BTD.dtype), keep_BK)

    def select(self, score_BT: Tensor, capacity: float) -> tuple[Tensor, Tensor | None]:
        return prefix_share(score_BT, capacity)


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


class TopK(Learned):
    causal = False  # selects as `prefix` does while this is set: the honest way to score it

    def select(self, score_BT: Tensor, capacity: float) -> tuple[Tensor, Tensor | None]:
        if self.causal:
            return prefix_share(score_BT, capacity)
        kept = share_of(capacity, score_BT.size(1))
        return score_BT.topk(kept, dim=1).indices.sort(dim=1).values, None


class Random(Router):
    def __init__(self, spec: RandomSpec, steps: list[int]) -> None:
        super().__init__(spec, steps)
        self.seed = spec.seed

    def scores(self, x_BTD: Tensor, row: int, ctx: Context) -> Tensor:
        B, T, _ = x_BTD.shape
        pos = (
            torch.arange(T, device=x_BTD.device).expand(B, T) if ctx.pos_BT is None else ctx.pos_BT
        )
        return _hash(pos, (self.seed * 31 + self.salt) * 64 + row)

    def gate(self, score_BK: Tensor) -> Tensor:
        return torch.ones_like(score_BK)


def _hash(pos_BT: Tensor, stream: int) -> Tensor:
    """A number in [0, 1) for each position, by two rounds of multiply and xor-shift."""
    h = (pos_BT.long() + 1) * 0x9E3779B1 + (stream % 2**20 + 1) * 0x85EBCA77
    for factor in (0x7FEB352D, 0x6C8E9CF5):
        h = ((h ^ (h >> 15)) & 0x7FFFFFFF) * factor
    # float32 holds 24 bits; half precision, in which the stream may be, would make ties
    return ((h ^ (h >> 16)) & 0xFFFFFF).float() / 2**24


def prefix_share(score_BT: Tensor, capacity: float) -> tuple[Tensor, Tensor]:
    """Token i is selected when its score ranks in the top ``capacity`` of scores 0..i and the
    tokens selected so far stay within ``capacity`` of i + 1. Tokens at -inf are never selected.

    Returns K = share_of(capacity, T) indices, selected ones first, and which are selected.
    """
    T = score_BT.size(1)
    n_T = torch.arange(1, T + 1, device=score_BT.device)
    budget_T = (capacity * n_T.double() + 0.5).floor().clamp(min=1).long()
    wanted_BT = (prefix_rank(score_BT) <= budget_T) & (score_BT > -math.inf)

    # taken(i) = min(taken(i-1) + wanted(i), budget(i)), unrolled to a running minimum
    sum_BT = wanted_BT.long().cumsum(1)
    taken_BT = sum_BT + (budget_T - sum_BT).cummin(1).values.clamp(max=0)
    selected_BT = taken_BT.diff(dim=1, prepend=torch.zeros_like(taken_BT[:, :1])) > 0

    order_BT = (~selected_BT).to(torch.int8).sort(dim=1, stable=True).indices
    index_BK = order_BT[:, : share_of(capacity, T)]
    return index_BK, selected_BT.gather(1, index_BK)


def prefix_rank(score_BT: Tensor, rows: int = 256) -> Tensor:
    """The rank of each score among those up to it, best is 1; ties go to the later one."""
    T = score_BT.size(1)
    ranks = []
    for start in range(0, T, rows):  # in slices: T x T at once is too much at long contexts
        stop = min(start + rows, T)
        above = score_BT[:, None, :stop] > score_BT[:, start:stop, None]
        ranks.append(above.tril(start - 1).sum(-1) + 1)
    return torch.cat(ranks, 1)
