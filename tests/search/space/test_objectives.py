"""What a full-size model costs when its routers select what its proxy's did."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from archdsl.costs.receipt import block_cost, cost, sequence_cost
from archdsl.lang.load import load
from archdsl.lang.spec import ModelSpec, Sizes
from archdsl.model.build import build
from archdsl.model.executed_flops import flops_per_token
from archdsl.search.space.objectives import AxisError, executed, others, parse_axes
from tests.shipped import STRUCTURES
from tests.strategies import specs

T = 12


def measured(spec: ModelSpec) -> dict[str, float]:
    """The shares of a pass over random tokens."""
    model, T = build(spec.canonical(), seed=1).eval(), spec.context
    tokens_BT = torch.randint(spec.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.causal_routing():
        model(tokens_BT)
    shares = model.router_shares()
    # copies of few tokens differ from their mean by what is rounded
    assert flops_per_token(model, T) == pytest.approx(of(spec, shares), rel=0.1)
    same = dict.fromkeys(shares, 0.1)  # in all copies, so that a mean is exact
    model.trace.counts.update(dict.fromkeys(shares, (1, 10)))
    assert flops_per_token(model, T) == pytest.approx(of(spec, same))
    return shares


def of(spec: ModelSpec, shares: dict[str, float]) -> float:
    T = spec.context
    return sequence_cost(executed(spec, spec, shares), tokens=T).flops / T


@settings(max_examples=40, deadline=None)
@given(specs())
def test_a_model_that_is_its_own_proxy_costs_what_it_executed(spec: ModelSpec) -> None:
    measured(spec)


def test_a_loop_in_the_slot_of_a_layer_costs_what_it_executed() -> None:
    ffn = {"kind": "feed_forward", "hidden": 16}
    loop = {"kind": "loop", "steps": 3, "router": {"kind": "prefix", "capacity": 0.9}, "body": ffn}
    mixer = loop | {"body": {"kind": "attention", "head_size": 8}, "steps": 2}
    layer = {"kind": "layer", "attention": mixer, "ffn": loop}
    blocks = [{"kind": "stack", "repeat": 2, "body": [layer, ffn]}]
    fields = {"name": "slots", "vocab_size": 11, "context": T, "dim": 16, "blocks": blocks}
    spec = ModelSpec.model_validate(fields)
    shares = measured(spec)
    assert shares.keys() == {
        f"blocks.{i}.{step}" for i in (0, 2) for step in ("attention.0", "ffn.0", "ffn.1")
    }
    few = dict.fromkeys(shares, 0.1)
    assert of(spec, few) < 0.6 * of(spec, dict.fromkeys(shares, 0.9))


def test_what_an_exit_left_counts_at_full_size() -> None:
    layer = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 16}}
    loop = {"kind": "loop", "steps": 3, "exit": {"kind": "halting"}, "body": layer}
    fields = {"name": "exits", "vocab_size": 11, "context": T, "dim": 16, "blocks": [layer, loop]}
    spec = ModelSpec.model_validate(fields)
    shares = measured(spec)
    assert shares.keys() == {"blocks.1.0", "blocks.1.1"}
    one_layer = block_cost(spec.blocks[0], 16, T).flops / T
    fewer = of(spec, dict.fromkeys(shares, 1.0)) - of(spec, dict.fromkeys(shares, 0.5))
    assert 0.9 * one_layer < fewer < 1.4 * one_layer


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_step_of_a_shipped_model_takes_what_its_proxy_measured(name: str) -> None:
    full = load(name)
    small = full.resized(Sizes(dim=32, context=T, vocab_size=64, head_size=16, repeat=1))
    shares = measured(small)
    none, every = (executed(full, small, dict.fromkeys(shares, share)) for share in (0.0, 1.0))
    assert cost(none).expected == pytest.approx(cost(none).lightest)
    assert cost(every).expected == pytest.approx(cost(full).heaviest)
    assert (none == full) == (not shares)


def test_an_axis_is_a_cost_and_the_loss_comes_first() -> None:
    assert parse_axes("loss") == ("loss",)
    assert parse_axes("loss,flops, kv") == ("loss", "flops", "kv")
    for text in ("flops", "flops,loss", "loss,loss", "loss,speed", ""):
        with pytest.raises(AxisError, match="write loss"):
            parse_axes(text)


def test_a_plain_model_costs_what_its_receipt_says() -> None:
    spec = load("transformer")
    receipt = cost(spec)
    assert others(("loss", "flops", "params", "kv"), spec, spec, {}) == (
        receipt.expected,
        receipt.params,
        receipt.kv_bytes_per_token,
    )


def test_the_copies_of_a_stack_take_the_mean_of_their_shares() -> None:
    small = load("itt").resized(Sizes(dim=32, context=T, vocab_size=64, head_size=16, repeat=2))
    shares = measured(small)
    by_copy = sorted({name.rpartition(".")[0] for name in shares})
    assert len(by_copy) == 2
    given = {name: 0.2 if name.startswith(f"{by_copy[0]}.") else 0.6 for name in shares}
    mean = executed(small, small, dict.fromkeys(shares, 0.4))
    assert cost(executed(small, small, given)).expected == pytest.approx(cost(mean).expected)
    assert cost(mean).expected > cost(executed(small, small, dict.fromkeys(shares, 0.2))).expected
