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

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from archdsl.costs.activations import Footprint, Rows
from archdsl.costs.bill import Bill
from archdsl.lang.spec import Part, Path, PerStep, at_step

if TYPE_CHECKING:
    from archdsl.blocks.modules.router import Prefix, Random
    from archdsl.nn.loop import Router


Positive = Annotated[float, Field(gt=0, le=100)]


class RouterSpec(Part):
    """A choice of tokens for every step of a loop after the full ones."""

    family: ClassVar[str] = "router"
    leaks: ClassVar[bool] = False  # whether a choice depends on later tokens, outside training
    learned: ClassVar[bool] = True
    ranks: ClassVar[bool] = False  # whether decoding needs the scores of all tokens so far
    fills: ClassVar[bool] = True  # whether fewer than its share may be selected, and others fill up

    capacity: PerStep[Annotated[float, Field(gt=0, le=1)]] = Field(
        (0.5,), min_length=1, max_length=64, description="share of the tokens selected, per step"
    )
    alpha: PerStep[Positive] = Field(
        (1.0,), min_length=1, max_length=64, description="scale of a selected token's new value"
    )
    nested: bool = Field(
        False, description="a token that was left out stays out (Mixture-of-Recursions)"
    )

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        if self.nested and list(self.capacity) != sorted(self.capacity, reverse=True):
            yield ("capacity",), f"must not rise when nested, got {list(self.capacity)}"

    def canonical(self, dim: int) -> RouterSpec | None:
        return None if all(share == 1 for share in self.capacity) else self

    def tokens(self, tokens: int, step: int) -> int:
        """How many of ``tokens`` a routed step runs on."""
        return share_of(at_step(self.capacity, step), tokens)

    def cost(self, bill: Bill, steps: int) -> None:
        """``steps`` choices among all tokens of a run each."""
        if self.learned:
            bill.matrices += steps * bill.dim
        if self.ranks:
            # scores are kept in float32, which takes as much as two numbers of a cache in bfloat16
            bill.kv += 2 * steps * sum(bill.runs.lengths)

    def footprint(self, rows: Rows, chosen: Rows) -> Footprint:
        """Of one choice. Kept: each weight; if it is learned, the scores and where they stand."""
        if not self.learned:
            return Footprint(chosen.floats(), reads=False)
        places = rows.indices if self.fills else chosen.indices
        return Footprint(rows.floats() + places + 2 * chosen.floats())

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
        from archdsl.blocks.modules.router import Prefix

        return Prefix(self, dim, steps)


class RandomSpec(RouterSpec):
    """A fixed pseudo-random share by position, the control for a learned choice. Causal."""

    learned: ClassVar[bool] = False
    ranks: ClassVar[bool] = True
    example: ClassVar = {"kind": "random", "capacity": 0.5}

    kind: Literal["random"] = "random"
    seed: int = Field(0, ge=0, le=2**31, description="other seeds select other positions")

    def build(self, dim: int, steps: list[int]) -> Random:
        from archdsl.blocks.modules.router import Random

        return Random(self, steps)


class AllSpec(RouterSpec):
    """Every token, every step: the same as no router."""

    learned: ClassVar[bool] = False
    example: ClassVar = {"kind": "all"}

    kind: Literal["all"] = "all"
    capacity: PerStep[Annotated[float, Field(ge=1, le=1)]] = Field(
        (1.0,), description="always 1: the share of the tokens selected"
    )


def share_of(capacity: float, tokens: int) -> int:
    """``capacity`` of ``tokens``, rounded, at least one: grids yield 0.6000000000000001."""
    return int(capacity * tokens + 0.5) or 1 if capacity > 0 else 0
