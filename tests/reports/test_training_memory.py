"""The memory of a training step: the tensors that autograd saves, and the peak of the allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from torch import nn

import archdsl
from archdsl.blocks.attention import QUERIES
from archdsl.blocks.loop import LoopSpec
from archdsl.lang.spec import ModelSpec, Sizes, walk
from archdsl.reports.training_memory import (
    full_batch,
    installed_memory,
    saved_for_backward,
    shortage,
    training_memory,
)
from archdsl.testing import saved_tensors, small_model
from archdsl.training.config import TrainConfig
from benchmarks.memory import allocated, measured
from tests.shipped import STRUCTURES
from tests.strategies import specs

SMALL = Sizes(dim=32, context=96, vocab_size=101, head_size=16, repeat=1)


# The instrument


def test_the_memory_of_a_small_model_equals_a_count_by_hand() -> None:
    linear, x_BD = nn.Linear(30, 50, bias=False), torch.randn(20, 30)
    result = 4 * 20 * 50
    forward = allocated(lambda: F.silu(linear(x_BD)))  # which keeps what it is the silu of
    assert (forward.peak, forward.left) == (2 * result, 2 * result)
    with torch.no_grad():
        forgotten = allocated(lambda: F.silu(linear(x_BD)))
    assert (forgotten.peak, forgotten.left) == (2 * result, result)
    assert allocated(lambda: F.silu(linear(x_BD)).sum().backward()).left == 4 * 30 * 50


def test_memory_allocated_before_a_call_is_not_measured() -> None:
    there = [torch.zeros(10_000)]
    found = allocated(lambda: (there.pop(), torch.zeros(10))[1])
    assert (found.peak, found.left) == (40, 40)


# What a pass keeps


def saved_bytes(spec: ModelSpec, batch_size: int, checkpointed: bool = False) -> int:
    """The bytes of distinct tensors that autograd saves, without parameters and scalars."""
    saved = saved_tensors(spec, batch_size, checkpointed)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved)


@settings(max_examples=60)
@given(specs())
def test_the_formula_equals_what_autograd_saves_for_any_spec(spec: ModelSpec) -> None:
    keeps_what_autograd_saves(spec)


@pytest.mark.slow
@settings(max_examples=150)
@given(specs())
def test_the_formula_equals_what_autograd_saves_for_150_specs(spec: ModelSpec) -> None:
    keeps_what_autograd_saves(spec)


@pytest.mark.parametrize("context", [1, 2, 4])
def test_the_only_token_is_counted_as_any_other(context: int) -> None:
    attention = {"kind": "attention", "head_size": 4}
    routed = {"kind": "loop", "steps": 2, "full_steps": 0, "router": "prefix", "injection": "add"}
    literal = {"kind": "thinking", "unselected": "literal"}
    inner = routed | {"residual": literal, "body": {"kind": "layer", "attention": attention}}
    outer = routed | {"body": {"kind": "layer", "attention": attention, "ffn": inner}}
    spec = small_model(outer, context=context)
    assert saved_for_backward(spec, full_batch(spec, 3)) == saved_bytes(spec, 3)


def keeps_what_autograd_saves(spec: ModelSpec) -> None:
    parts = [part for _, part in walk(spec)]
    assume(not any(depends_on_the_choice(part) for part in parts))
    assert saved_for_backward(spec, full_batch(spec, 3)) == saved_bytes(spec, 3)


def depends_on_the_choice(part: Any) -> bool:
    """Whether the attention masks of the part depend on which tokens take its passes."""
    if not isinstance(part, LoopSpec) or part.kv not in ("shared", "last"):
        return False
    return part.router is not None or part.exit is not None


@pytest.mark.parametrize(
    "attention",
    [{}, {"queries_per_kv": 2}, {"window": 50}, {"window": 50, "qk_norm": True}],
    ids=str,
)
@pytest.mark.parametrize("router", [None, "top_k", "prefix"])
def test_the_formula_equals_what_autograd_saves_for_masked_attention(
    attention: Any, router: Any
) -> None:
    spec = looped(attention, router and {"kind": router, "capacity": 0.9}, context=2 * QUERIES)
    assert saved_for_backward(spec, full_batch(spec, 2)) == saved_bytes(spec, 2)


@pytest.mark.parametrize("kv", ["shared", "last"])
@pytest.mark.parametrize("attention", [{}, {"queries_per_kv": 2}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("router", ["top_k", "prefix", "random"])
def test_a_large_share_of_selected_queries_is_saved_at_full_length(
    attention: Any, router: Any, kv: str
) -> None:
    spec = looped(attention, {"kind": router, "capacity": 0.9}, context=40, kv=kv, steps=3)
    assert saved_for_backward(spec, full_batch(spec, 2)) == saved_bytes(spec, 2)


@pytest.mark.parametrize("router", ["top_k", {"kind": "prefix", "capacity": 0.9}], ids=str)
def test_shared_keys_inside_a_routed_loop_keep_what_autograd_saves(router: Any) -> None:
    inner = looped({}, None, context=40, kv="shared").blocks[0].model_dump(mode="json")
    spec = looped({}, None, context=40)
    loop = {"kind": "loop", "router": router, "body": inner}
    spec = ModelSpec.model_validate(spec.model_dump(mode="json") | {"blocks": [loop]})
    assert saved_for_backward(spec, full_batch(spec, 2)) == saved_bytes(spec, 2)


def looped(attention: Any, router: Any, context: int, **fields: Any) -> ModelSpec:
    layer = {"kind": "layer", "attention": {"head_size": 8} | attention, "ffn": {"hidden": 24}}
    loop = {"kind": "loop", "router": router, "body": layer} | fields
    sizes = {"name": "parts", "vocab_size": 11, "context": context, "dim": 16}
    return ModelSpec.model_validate(sizes | {"blocks": [loop]})


def test_the_formula_nearly_equals_what_autograd_saves_with_shared_keys() -> None:
    spec = archdsl.load("hybrid").resized(SMALL._replace(context=300))
    assert any(depends_on_the_choice(part) for _, part in walk(spec))
    assert saved_for_backward(spec, full_batch(spec, 2)) == pytest.approx(
        saved_bytes(spec, 2), rel=0.01
    )


@pytest.mark.parametrize("name", ["transformer", "itt", "hybrid"])
def test_recomputed_layers_save_only_their_inputs(name: str) -> None:
    spec = archdsl.load(name).resized(SMALL)
    closed, saved = (
        saved_for_backward(spec, full_batch(spec, 2), checkpointed=True),
        saved_bytes(spec, 2, True),
    )
    # the tables of rotary angles are the context's, and nobody saves them
    assert saved <= closed <= saved + 2 * 4 * spec.context * SMALL.head_size


# The peak


def off(spec: ModelSpec, batch_size: int, **config: Any) -> float:
    """Returns the ratio of the closed form to the peak of the allocator, minus one."""
    recomputed = config.get("activation_checkpointing", False)
    accumulate = config.get("accumulate", 1)
    closed = training_memory(spec, batch_size, checkpointed=recomputed, accumulate=accumulate)
    return abs(closed.peak / measured(spec, batch_size, **config) - 1)


@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_estimate_for_a_shipped_spec_is_near_the_measured_peak(
    name: str, recomputed: bool
) -> None:
    spec = archdsl.load(name).resized(SMALL)
    # The saved tensors are exact; the working memory of the backward pass is an estimate. That of
    # a loop counts the gradients of all passes, also where each has low-rank matrices of its own.
    stored = 0.02 if name == "relaxed-recursive-tiny" else 0.01
    assert off(spec, 2, activation_checkpointing=recomputed) < (0.06 if recomputed else stored)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("context", "batch_size", "accumulate"),
    [(8, 1, 1), (64, 4, 4), (64, 4, 1)],
    ids=["gradients last", "accumulated", "at once"],
)
def test_the_peak_is_found_at_every_place_where_it_may_be(
    context: int, batch_size: int, accumulate: int, tied: bool
) -> None:
    spec = archdsl.load("itt", overrides=[f"tie_embeddings={str(tied).lower()}"])
    spec = spec.resized(SMALL._replace(dim=64, context=context, vocab_size=1000))
    assert off(spec, batch_size, accumulate=accumulate) < 0.01


def test_only_activations_grow_with_the_batch() -> None:
    spec = archdsl.load("itt").resized(SMALL)
    # batches so large that the peak is at the same layer
    eight, sixteen, thirty_two = (training_memory(spec, size) for size in (8, 16, 32))
    assert eight.weights == sixteen.weights == 4 * archdsl.cost(spec).params
    assert eight.optimizer == 2 * eight.weights
    assert thirty_two.peak - sixteen.peak == 2 * (sixteen.peak - eight.peak) > 0


def test_the_message_for_too_little_memory_says_what_needs_less() -> None:
    spec = archdsl.load("itt")
    huge = TrainConfig(batch_size=10_000, accumulate=2)
    assert training_memory(spec, 10_000, accumulate=2).peak > installed_memory() > 2**20
    said = shortage(spec, huge)
    assert said is not None
    assert "--batch-size (now 10000)" in said
    assert "--accumulate (now 2)" in said
    assert shortage(spec, TrainConfig(batch_size=10_000, accumulate=10_000, context=16)) is None
