"""What a model spends of each limit of a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from archdsl.costs.receipt import Receipt, cost
from archdsl.lang.spec import Budget, ModelSpec


class Limit(NamedTuple):
    """What a limit of the budget counts."""

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
    """A limit of the budget, and what the model has of it."""

    limit: int
    spent: float
    unit: str

    @property
    def ratio(self) -> float:
        """Spent / limit - 1: above zero is too much."""
        return self.spent / self.limit - 1


def limit_uses(spec: ModelSpec, budget: Budget) -> dict[str, LimitUse]:
    """Each limit that the budget sets a model, by name."""
    receipt = cost(spec)
    return {
        name: LimitUse(limit, LIMITS[name].spent(receipt), LIMITS[name].unit)
        for name, limit in budget.of_model.items()
    }


def excesses(spec: ModelSpec, budget: Budget) -> dict[str, float]:
    """For each limit of the budget, cost / limit - 1: above zero is too much."""
    return {name: found.ratio for name, found in limit_uses(spec, budget).items()}


def largest_excess(spec: ModelSpec, budget: Budget) -> float:
    """The worst of the ratios; at most zero where every limit is kept."""
    return max(excesses(spec, budget).values(), default=0.0)


def describe_excess(spec: ModelSpec, budget: Budget) -> str:
    """In words, which limits are broken and by how much."""
    return " and ".join(
        f"its {found.spent:,.0f} {found.unit} exceed the budget of {found.limit:,} "
        f"by {found.ratio:.1%}"
        for found in limit_uses(spec, budget).values()
        if found.ratio > 0
    )
