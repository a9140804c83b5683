"""The costs of models equal the figures of the paper and independent counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

import archdsl
from archdsl.blocks.exit import ExitSpec
from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.modules.attention import Attention
from archdsl.blocks.modules.router import Prefix, Random
from archdsl.blocks.router import RouterSpec
from archdsl.costs.bill import Cost
from archdsl.costs.receipt import cost, paper_flops, sequence_cost
from archdsl.lang.spec import ModelSpec, Part, walk
from archdsl.model.build import meta_model
from tests.strategies import specs

CAPACITY = "blocks.0.body.1.router.capacity"


@pytest.mark.parametrize("kind", ["transformer", "itt", "loop"])
@pytest.mark.parametrize(("size", "millions"), [("", 162.0), ("-230m", 230.4), ("-466m", 466.6)])
def test_parameters_equal_those_of_the_paper(kind: str, size: str, millions: float) -> None:
    receipt = cost(archdsl.load(kind + size))
    assert round(receipt.matrices / 1e6, 1) == millions
    # the paper's tables do not count norms, routers and step encodings
    assert receipt.matrices <= receipt.params < 1.0003 * receipt.matrices


@pytest.mark.parametrize(
    ("name", "overrides", "teraflops"),
    [
        ("transformer", [], 1.88),
        ("itt", [f"{CAPACITY}=0.5"], 3.29),
        ("itt", [f"{CAPACITY}=0.7"], 3.85),
        ("itt", [f"{CAPACITY}=[0.7, 0.7, 0.9]"], 4.04),
        ("itt", [f"{CAPACITY}=0.9"], 4.42),
        ("loop", [], 4.70),
        ("transformer-466m", [], 4.92),
    ],
)
def test_flops_equal_those_of_the_paper_in_its_convention(
    name: str, overrides: list[str], teraflops: float
) -> None:
    assert round(paper_flops(archdsl.load(name, overrides=overrides)) / 1e12, 2) == teraflops


def test_counted_by_node_inner_thinking_has_fewer_flops_than_in_the_paper() -> None:
    loop = archdsl.load("loop")
    assert sequence_cost(loop).flops / 1e12 == pytest.approx(3.62, abs=0.005)
    tied = archdsl.load("loop", overrides=["tie_embeddings=true"])
    assert paper_flops(tied) == paper_flops(loop)


def test_the_embedding_has_no_flops_and_the_head_has() -> None:
    spec = tiny(blocks=[{"kind": "norm"}])
    assert sequence_cost(spec).flops == 2 * 16 * 8 * 11
    assert cost(spec).params == 2 * 8 * 11 + 8 + 8
    assert cost(spec).non_embedding == 8 + 8
    tied = tiny(blocks=[{"kind": "norm"}], tie_embeddings=True)
    assert sequence_cost(tied).flops == sequence_cost(spec).flops
    assert cost(tied).params == 8 * 11 + 8 + 8
    assert cost(tied).non_embedding == 8 + 8


def test_a_routed_step_costs_the_selected_tokens_and_the_scores_of_all_tokens() -> None:
    body = {"kind": "feed_forward", "hidden": 5, "activation": "gelu"}
    spec = tiny(blocks=[{"kind": "loop", "steps": 3, "router": "prefix", "body": body}])
    head, ffn, score = 2 * 8 * 11, 2 * 2 * 8 * 5, 2 * 8
    receipt = cost(spec)
    assert receipt.lightest == head + ffn + 2 * score
    assert receipt.expected == head + ffn + 2 * score + 2 * 0.5 * ffn
    assert receipt.heaviest == head + ffn + 2 * score + 2 * ffn
    assert receipt.flops_per_context == 16 * receipt.expected
    assert receipt.train_flops_per_token == 3 * receipt.expected


def test_a_pass_that_the_dial_skips_costs_nothing() -> None:
    layer = {"kind": "layer", "attention": {"head_size": 8}}
    inner = {"kind": "loop", "steps": 2, "router": "prefix", "body": layer}
    whole = tiny(blocks=[{"kind": "loop", "router": "random", "body": inner}])
    (loop,) = whole.blocks
    assert isinstance(loop, LoopSpec)
    assert loop.router is not None
    skipped = loop.model_copy(update={"router": dialled(loop.router, 0.0)})
    found, once = (
        sequence_cost(whole.model_copy(update={"blocks": (block,)}))
        for block in (skipped, loop.body)
    )
    assert (found.flops, found.passes) == (once.flops, once.passes)


@settings(max_examples=40)
@given(specs())
def test_the_ends_of_the_dial_have_the_lowest_and_highest_cost(spec: ModelSpec) -> None:
    none, every = (
        sequence_cost(
            spec.model_copy(update={"blocks": tuple(dialled(b, share) for b in spec.blocks)})
        )
        for share in (0.0, 1 - 1e-12)
    )
    assert none.flops == none.lightest
    assert every.flops == every.heaviest == sequence_cost(spec).heaviest


def dialled(part: Part, share: float) -> Any:
    """Returns the spec with this capacity in every router, and this share left by every exit."""
    if isinstance(part, RouterSpec):
        shares = tuple(1.0 if own == 1 else share for own in part.capacity)
        return part.model_copy(update={"capacity": shares})
    if isinstance(part, ExitSpec) and part.stops:
        return part.model_copy(update={"remaining": (share,)})
    return part.with_each(lambda inner: dialled(inner, share))


def test_memory_is_four_bytes_each_for_weight_gradient_and_two_moments() -> None:
    receipt = cost(tiny(blocks=[{"kind": "norm"}]))
    bytes_each = (receipt.weight_bytes, receipt.gradient_bytes, receipt.optimizer_bytes)
    assert bytes_each == (4 * receipt.params, 4 * receipt.params, 8 * receipt.params)


@settings(max_examples=40)
@given(specs())
def test_the_cache_holds_what_a_pass_computes(spec: ModelSpec) -> None:
    # with kv: last, it also holds what tokens that do not take a pass had before
    loops = [part for _, part in walk(spec) if isinstance(part, LoopSpec)]
    assume(not any(loop.kv == "last" and loop.router is not None for loop in loops))
    assert sequence_cost(spec).kv == kept_numbers(spec)


def kept_numbers(spec: ModelSpec) -> int:
    """Counts keys and values at the projections that run, limited to the window, and the scores
    that the routers of this pass rank, each of which takes two numbers."""
    model, kept = meta_model(spec), 0

    def note(window: int | None) -> Any:
        def hook(module: nn.Module, given: Any, made_BTD: Tensor) -> None:
            nonlocal kept
            tokens, width = made_BTD.shape[1:]
            kept += min(tokens, window or tokens) * width

        return hook

    def note_scores(module: nn.Module, given: Any, selection: Any) -> None:
        nonlocal kept
        x_BTD, at = given[:2]
        kept += 2 * x_BTD.size(1) * (at.capacity < 1)

    for module in model.modules():
        if isinstance(module, Attention):
            module.k.register_forward_hook(note(module.window))
            module.v.register_forward_hook(note(module.window))
        elif isinstance(module, Prefix | Random):
            module.register_forward_hook(note_scores)
    model(torch.zeros(1, spec.context, dtype=torch.long, device="meta"))
    return kept


@settings(max_examples=40)
@given(specs())
def test_a_selected_token_never_costs_less_than_one_that_is_not(spec: ModelSpec) -> None:
    receipt = cost(spec)
    assert receipt.lightest <= receipt.expected <= receipt.heaviest


@settings(max_examples=40)
@given(specs())
def test_the_costs_of_the_parts_add_up(spec: ModelSpec) -> None:
    whole = sequence_cost(spec, detailed=True)
    assert whole._replace(parts={}) == sequence_cost(spec)._replace(parts={})
    adds_up(whole)


def adds_up(node: Cost) -> None:
    if node.parts:
        for name in ("params", "matrices", "flops", "kv"):
            assert getattr(node, name) == sum(getattr(p, name) for p in node.parts.values())
    for part in node.parts.values():
        adds_up(part)


def tiny(**fields: Any) -> ModelSpec:
    sizes = {"name": "tiny", "vocab_size": 11, "context": 16, "dim": 8}
    return ModelSpec.model_validate(sizes | fields)
