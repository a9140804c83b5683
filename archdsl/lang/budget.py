"""Compares the costs of a model with the limits of a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from archdsl.costs.receipt import Receipt, cost
from archdsl.lang.spec import Budget, ModelSpec


class Limit(NamedTuple):
    """How to compute the cost that a limit of the budget refers to, and its unit."""

    spent: Callable[[Receipt], float]
    unit: str


LIMITS = {
    "params": Limit(lambda receipt: receipt.params, "parameters"),
    "non_embedding": Limit(
        lambda receipt: receipt.non_embedding, "parameters without embedding and head"
    ),
    "flops": Limit(lambda receipt: receipt.expected, "FLOPs/token"),
    "kv": Limit(lambda receipt: receipt.kv_bytes_per_token, "bytes of KV cache per token"),
}


class LimitUse(NamedTuple):
    """A limit of the budget, and how much of it the model uses, both in ``unit``."""

    limit: int
    spent: float
    unit: str

    @property
    def ratio(self) -> float:
        """``spent / limit - 1``; it is above zero if the limit is exceeded."""
        return self.spent / self.limit - 1


def limit_uses(spec: ModelSpec, budget: Budget) -> dict[str, LimitUse]:
    """Returns how much the model uses of each limit that the budget sets, by the limit's name."""
    receipt = cost(spec)
    return {
        name: LimitUse(limit, LIMITS[name].spent(receipt), LIMITS[name].unit)
        for name, limit in budget.of_model.items()
    }


def excesses(spec: ModelSpec, budget: Budget) -> dict[str, float]:
    """Returns ``cost / limit - 1`` for each limit of the budget; above zero if it is exceeded."""
    return {name: found.ratio for name, found in limit_uses(spec, budget).items()}


def largest_excess(spec: ModelSpec, budget: Budget) -> float:
    """Returns the largest of the `excesses`; it is at most zero if the model meets every limit.

    Returns zero if the budget has no limits for a model.
    """
    return max(excesses(spec, budget).values(), default=0.0)


def describe_excess(spec: ModelSpec, budget: Budget) -> str:
    """Says in words which limits the model exceeds and by how much; empty if it exceeds none."""
    return " and ".join(
        f"its {found.spent:,.0f} {found.unit} exceed the budget of {found.limit:,} "
        f"by {found.ratio:.1%}"
        for found in limit_uses(spec, budget).values()
        if found.ratio > 0
    )
