"""Routers: which tokens take a thinking step.

Chen et al. 2502.13842, section 3.2: ``w = sigmoid(R(Y))`` with one linear router per step; a
selected token's new value is weighted by ``alpha * w``, which is how the router learns.

    prefix  its score ranks in the top share of the scores up to it
    random  a pseudo-random share of the positions, as a baseline

The file threshold.py has routers that keep statistics of their scores, such as the paper's.

Causal choices keep within a running budget: of the tokens so far, never more than the capacity is
selected. So the capacity bounds FLOPs and cache at every prefix, and shapes are static in training.

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
    """Selects the tokens of every step of a loop after the full ones."""

    family: ClassVar[str] = "router"
    leaks: ClassVar[bool] = False  # whether a choice depends on later tokens, outside training
    learned: ClassVar[bool] = True
    ranks: ClassVar[bool] = False  # whether decoding needs the scores of all tokens so far
    fills: ClassVar[bool] = True  # whether fewer than its share may be selected, and others fill up

    capacity: PerStep[Annotated[float, Field(gt=0, le=1)]] = Field(
        (0.5,), min_length=1, max_length=64, description="share of all tokens that a step selects"
    )
    alpha: PerStep[Positive] = Field(
        (1.0,), min_length=1, max_length=64, description="scale of a selected token's new value"
    )
    nested: bool = Field(
        False,
        description="a token that was left out stays out (Mixture-of-Recursions); capacities are "
        "shares of all tokens, not of those that are left",
    )

    def conflicts(self, dim: int) -> Iterator[tuple[Path, str]]:
        """Nested capacities that rise."""
        if self.nested and list(self.capacity) != sorted(self.capacity, reverse=True):
            yield (
                ("capacity",),
                (
                    "must not rise when nested, as all are shares of all tokens; got "
                    f"{list(self.capacity)}"
                ),
            )

    def canonical(self, dim: int) -> RouterSpec | None:
        """None where every token is selected, because that needs no router."""
        return None if all(share == 1 for share in self.capacity) else self

    def opened(self, share: float) -> RouterSpec:
        """The router with its capacities moved by ``share`` towards 1; those of 1 are no routers,
        so that others do not reach it."""
        moved = tuple(c + (1 - c) * share for c in self.capacity)
        pairs = zip(self.capacity, moved, strict=True)
        capacity = tuple(c if c == 1 else min(one, 1 - 1e-9) for c, one in pairs)
        return self.model_copy(update={"capacity": capacity})

    def tokens(self, tokens: int, step: int) -> int:
        """How many of ``tokens`` a routed step runs on."""
        return share_of(at_step(self.capacity, step), tokens)

    def cost(self, bill: Bill, steps: int) -> None:
        """Adds ``steps`` selections to the bill, each among all tokens of a run."""
        if self.learned:
            bill.matrices += steps * bill.dim
        if self.ranks:
            # scores are kept in float32, which takes as much as two numbers of a cache in bfloat16
            bill.kv += 2 * steps * sum(bill.runs.lengths)

    def footprint(self, rows: Rows, chosen: Rows) -> Footprint:
        """The memory of one selection. Saved: the weights of the tokens; if learned, their squashed
        scores, too. For losses of the router, the tokens, the scores of all of them, and a mask.

        ``rows``: padded if there are tokens that the router is not asked for.
        """
        if not self.learned:
            return Footprint(chosen.floats(), reads=False)
        kept = rows.floats(rows.router_losses) + 2 * chosen.floats()
        if rows.router_losses:
            kept += rows.mask
        return Footprint(kept, reads=rows.router_losses > 0)

    def build(self, dim: int, steps: list[int]) -> Router:
        """The torch module, with weights for the routed ``steps`` of the loop."""
        raise NotImplementedError


class LearnedSpec(RouterSpec):
    """A router that scores tokens with a learned matrix."""

    gate: Literal["sigmoid", "tanh"] = Field("sigmoid", description="score -> weight")


class PrefixSpec(LearnedSpec):
    """The best-scored share of the tokens so far. Causal."""

    ranks: ClassVar[bool] = True
    example: ClassVar = {"kind": "prefix", "capacity": 0.7}

    kind: Literal["prefix"] = "prefix"

    def build(self, dim: int, steps: list[int]) -> Prefix:
        """The torch module, with weights for the routed ``steps``."""
        from archdsl.blocks.modules.router import Prefix

        return Prefix(self, dim, steps)


class RandomSpec(RouterSpec):
    """A fixed pseudo-random share by position, the baseline of a learned choice. Causal."""

    learned: ClassVar[bool] = False
    ranks: ClassVar[bool] = True
    example: ClassVar = {"kind": "random", "capacity": 0.5}

    kind: Literal["random"] = "random"
    seed: int = Field(0, ge=0, le=2**31, description="other seeds select other positions")

    def build(self, dim: int, steps: list[int]) -> Random:
        """The torch module for the routed ``steps``; it has no weights."""
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
    """How many of ``tokens`` the share ``capacity`` is: rounded, at least one unless it is 0."""
    return int(capacity * tokens + 0.5) or 1 if capacity > 0 else 0
