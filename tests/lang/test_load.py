"""Budgets: which limits a model meets, and the largest size that meets all of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archdsl.costs.receipt import cost
from archdsl.errors import SpecError
from archdsl.lang.budget import describe_excess, excesses, largest_excess
from archdsl.lang.load import NoFitError, budget_of, fitted, load
from archdsl.lang.source import parse
from archdsl.lang.spec import Budget, ModelSpec

SPEC = """\
name: any
vocab_size: {vocab_size}
context: {context}
dim: {dim}
budget: {{params: 60k, flops: 1M}}
blocks:
  - kind: stack
    repeat: {repeat}
    body:
      - kind: layer
        attention: {{heads: {heads}, head_size: 8, queries_per_kv: 2, window: {window}}}
        ffn: {{hidden: {hidden}}}
"""
SIZES = {"vocab_size": 32, "context": 64, "dim": 32, "repeat": 2, "heads": 4, "window": 16}
SIZES |= {"hidden": 24}
# a cost of each rises with the size, but for the cache per token of a window: it falls with context
HIGHS = {"vocab_size": 90, "context": 100, "dim": 90, "repeat": 12, "heads": 40, "window": 70}
HIGHS |= {"hidden": 90}
LIMITS = {"params": 10_000, "non_embedding": 8_000, "flops": 30_000, "kv": 30}


def written(**sizes: int | str) -> str:
    return SPEC.format(**(SIZES | sizes))


def at(name: str, size: int) -> ModelSpec:
    return fitted(parse(written(**{name: size})))


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(HIGHS)),
    given_=st.dictionaries(st.sampled_from(sorted(LIMITS)), st.floats(0.2, 6), min_size=1),
)
def test_the_solved_size_is_the_largest_that_meets_every_limit(
    name: str, given_: dict[str, float]
) -> None:
    limits = {"params": None, "flops": None} | {n: int(LIMITS[n] * x) for n, x in given_.items()}
    budget = Budget.model_validate(limits)
    step = 2 if name == "heads" else 1
    fit = f"{{fit: {{multiple_of: {step}, low: 4, high: {HIGHS[name]}, default: 4}}}}"
    fits = [
        size
        for size in range(4, HIGHS[name] + 1, step)
        if largest_excess(at(name, size), budget) <= 0
    ]
    tree = parse(written(**{name: fit}))
    if fits:
        found = fitted(tree, budget)
        assert found == at(name, fits[-1]).model_copy(update={"budget": found.budget})
        assert found.budget == budget_of(tree, budget)
    else:
        with pytest.raises(NoFitError, match="no size fits: 4 is the smallest, and its ") as error:
            fitted(tree, budget)
        assert error.value.ratio == largest_excess(at(name, 4), budget) > 0


def test_given_limits_replace_those_of_the_file_one_by_one() -> None:
    tree = parse(written())
    assert budget_of(tree) == Budget(params=60_000, flops=1_000_000)
    assert budget_of(tree, Budget(params=9)) == Budget(params=9, flops=1_000_000)
    assert budget_of(tree, Budget(kv=9)) == Budget(params=60_000, flops=1_000_000, kv=9)
    assert budget_of(tree, Budget(params=None, kv=9)) == Budget(flops=1_000_000, kv=9)
    assert fitted(tree, Budget(kv=9)).budget == budget_of(tree, Budget(kv=9))
    assert budget_of(parse(written().replace("{params: 60k, flops: 1M}", "null"))) == Budget()


def test_the_training_flops_of_a_search_are_not_a_limit_of_a_model() -> None:
    spends = Budget(params=None, flops=None, train_flops=1)
    assert excesses(at("dim", 32), spends) == {}
    fit = "{fit: {multiple_of: 8, default: 24}}"
    assert fitted(parse(written(dim=fit)), spends).dim == 24
    assert load("tiny", budget=spends) == load("tiny").model_copy(update={"budget": spends})


def test_every_limit_is_computed_from_the_receipt_and_reported_in_its_unit() -> None:
    spec = at("dim", 32)
    receipt = cost(spec)
    budget = Budget(params=20_000, non_embedding=10, flops=30, kv=20)
    found = excesses(spec, budget)
    assert found["params"] == receipt.params / 20_000 - 1 < 0
    assert found["non_embedding"] == receipt.non_embedding / 10 - 1
    assert found["flops"] == receipt.expected / 30 - 1
    assert found["kv"] == receipt.kv_bytes_per_token / 20 - 1 > 0
    words = describe_excess(spec, budget)
    assert words.count(" exceed the budget of ") == 3
    assert f"its {receipt.kv_bytes_per_token:,.0f} bytes of KV cache per token exceed" in words
    assert f"its {receipt.non_embedding:,} parameters without embedding and head exceed" in words


@pytest.mark.parametrize("limit", ["params: 0", "kv: -1", "flops: 0.5", "train_flops: many"])
def test_a_limit_is_a_whole_number_above_zero(limit: str) -> None:
    with pytest.raises(SpecError, match=f"budget.{limit.split(':')[0]}: must be "):
        fitted(parse(written().replace("params: 60k", limit).replace(", flops: 1M", "")))


def test_limits_may_be_written_with_units() -> None:
    text = "{params: 162M, kv: 64KiB, flops: 0.8G, train_flops: 1P, non_embedding: 1e6}"
    tree = parse(written().replace("{params: 60k, flops: 1M}", text))
    expected = {"params": 162 * 10**6, "kv": 2**16, "flops": 8 * 10**8}
    assert budget_of(tree).model_dump() == expected | {
        "train_flops": 10**15,
        "non_embedding": 10**6,
    }
