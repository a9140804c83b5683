"""The compute dial changes capacities and numbers of steps after training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import archdsl
from archdsl.blocks.modules.threshold import Threshold
from archdsl.costs.receipt import sequence_cost
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import meta_model
from archdsl.model.executed_flops import executed, flops_per_token
from archdsl.model.language_model import DialError, LanguageModel
from tests import naive

V, T = 11, 20
LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
LOOP: dict[str, Any] = {
    "kind": "loop",
    "steps": 3,
    "router": {"kind": "prefix", "capacity": [0.7, 0.4]},
    "residual": "thinking",
    "encoding": "scale",
    "body": LAYER,
}


def spec(**fields: Any) -> ModelSpec:
    loop = LOOP | fields
    whole = {"name": "m", "vocab_size": V, "context": T, "dim": 16, "blocks": [LAYER, loop]}
    return ModelSpec.model_validate(whole)


def built(**fields: Any) -> LanguageModel:
    model = archdsl.build(spec(**fields)).eval()
    naive.randomise(model)
    return model


def run(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(2 * T).view(2, T) * 7 % V)


@pytest.mark.parametrize("kind", ["prefix", "threshold", "top_k", "random"])
def test_a_capacity_set_by_the_dial_equals_a_model_built_with_it(kind: str) -> None:
    model = built(router={"kind": kind, "capacity": [0.7, 0.4]})
    other = built(router={"kind": kind, "capacity": [0.3, 0.9]})
    model.dial(capacity=[0.3, 0.9])
    torch.testing.assert_close(run(model), run(other))
    model.dial()
    assert not run(model).allclose(run(other))


def test_fewer_steps_equal_a_model_built_with_them() -> None:
    model, other = built(), built(steps=2)
    other.load_state_dict(
        {
            name: weight[: len(other.state_dict()[name])]
            for name, weight in model.state_dict().items()
        }
    )
    model.dial(steps=2)
    torch.testing.assert_close(run(model), run(other))


def test_additional_steps_repeat_the_last_trained_step() -> None:
    model, other = (
        built(),
        built(steps=5, router={"kind": "prefix", "capacity": [0.7, 0.4, 0.4, 0.4]}),
    )
    rows = {"phi_SD": [0, 1, 2, 2, 2], "weight_RD": [0, 1, 1, 1]}
    other.load_state_dict(
        {
            name: weight[rows.get(name.rpartition(".")[2], slice(None))]
            for name, weight in model.state_dict().items()
        }
    )
    model.dial(steps=5)
    torch.testing.assert_close(run(model), run(other))
    assert list(model.router_shares()) == [f"blocks.1.{i}" for i in range(4)]


def test_capacity_0_skips_a_step_and_capacity_1_selects_every_token() -> None:
    model = built(router={"kind": "prefix", "capacity": 0.5}, residual="delta")
    model.dial(capacity=0)
    plain = run(model)
    assert model.trace.steps_BT is not None
    assert not model.trace.steps_BT.any()
    model.dial(steps=1)
    torch.testing.assert_close(run(model), plain)
    model.dial(capacity=[1, 0])
    run(model)
    assert (model.trace.steps_BT == 1).all()
    assert model.router_shares() == {"blocks.1.0": 1}


def test_only_executed_steps_are_counted() -> None:
    model = built(body={**LOOP, "steps": 2})
    run(model)
    steps_BT, shares = model.trace.steps_BT, model.router_shares()
    assert steps_BT is not None
    assert steps_BT[:, 0].min() > 0  # the first token is always within the budget
    assert steps_BT.max() > steps_BT.min()
    padded = torch.zeros(1, T, dtype=torch.bool)
    padded[:, 3:9] = True
    with torch.no_grad():
        model(torch.arange(T).unsqueeze(0) % V, padded)
    steps_BT = model.trace.steps_BT
    assert steps_BT is not None
    assert not steps_BT[~padded].any()
    assert steps_BT[padded].any()
    assert set(shares) == {"blocks.1.0", "blocks.1.1", "blocks.1.bodies.0.0"}


@settings(max_examples=25)
@given(
    st.sampled_from([0, 0.3, 1, [0.9, 0.0], [1, 0.2]]) | st.none(),
    st.sampled_from([1, 3, 6]) | st.none(),
    st.sampled_from(["own", "shared", "last", "all"]),
)
def test_the_reported_flops_of_a_pass_equal_the_counted_ones(
    capacity: float | list[float] | None, steps: int | None, kv: str
) -> None:
    assume(kv != "shared" or capacity != [0.9, 0.0])  # then all queries, but in causal order
    top_k = spec(router={"kind": "top_k", "capacity": 0.4}, kv=kv)
    if isinstance(capacity, list):
        steps = None
    model = meta_model(top_k).eval()
    model.dial(capacity, steps)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long, device="meta"))
    model.trace.counts.clear()  # no numbers on the meta device: the capacities count
    assert sequence_cost(executed(model)).flops == counter.get_total_flops()


def test_the_measured_share_of_tokens_is_used_after_the_first_pass() -> None:
    model = built(router={"kind": "prefix", "capacity": 0.5}, steps=2)
    expected = flops_per_token(model, T)
    assert expected == pytest.approx(archdsl.cost(model.spec).expected)
    run(model)
    assert model.router_shares()["blocks.1.0"] < 0.5
    assert flops_per_token(model, T) < expected


@pytest.mark.parametrize(
    ("fields", "dial", "message"),
    [
        ({}, {"capacity": [0.5]}, "2 passes are routed, so one capacity or 2 are needed; got 1"),
        ({}, {"capacity": [0.5, 1.5]}, "a capacity is between 0 and 1, got 1.5"),
        ({}, {"capacity": -0.1}, "between 0 and 1"),
        ({}, {"capacity": float("nan")}, "between 0 and 1"),
        ({}, {"steps": 0}, "at least one step, got 0"),
        ({"parameters": "per_step"}, {"steps": 4}, "has weights for 3 steps, each its own; got 4"),
        ({"router": None}, {"capacity": 0.5}, "m has no routers"),
        (
            {"router": {"kind": "prefix", "capacity": [1.0, 0.5]}},
            {"capacity": [0.5, 0.5]},
            "routed pass 1 was trained on every token and has no router",
        ),
        (
            {"router": {"kind": "prefix", "capacity": [0.7, 0.5], "nested": True}},
            {"capacity": [0.4, 0.5]},
            "is nested, so capacities must not rise",
        ),
    ],
)
def test_an_unsupported_setting_is_an_error_that_changes_nothing(
    fields: dict[str, Any], dial: dict[str, Any], message: str
) -> None:
    model = built(**fields)
    before = run(model)
    with pytest.raises(DialError, match=message):
        model.dial(**dial)
    assert run(model).equal(before)


def test_a_model_without_loops_has_no_dial() -> None:
    fields = {"name": "m", "vocab_size": V, "context": T, "dim": 16, "blocks": [LAYER]}
    with pytest.raises(DialError, match="m has no loops"):
        archdsl.build(ModelSpec.model_validate(fields)).dial(steps=2)


def in_a_loop(outer: float | list[float], inner: float | list[float], kind: str) -> LanguageModel:
    body = LOOP | {"router": {"kind": kind, "capacity": inner}}
    model = built(router={"kind": kind, "capacity": outer}, body=body)
    run(model)
    return model


@pytest.mark.parametrize("kind", ["top_k", "prefix", "threshold"])
def test_a_loop_in_a_loop_counts_the_tokens_of_all_its_runs(kind: str) -> None:
    model = in_a_loop([0.5, 0.1], [0.7, 0.4], kind)
    counts = model.router_counts()
    assert model.trace.steps_BT is not None
    assert sum(selected for selected, _ in counts.values()) == model.trace.steps_BT.sum()
    outer = [counts[f"blocks.1.{i}"] for i in range(2)]
    given = 2 * T + sum(selected for selected, _ in outer)  # the first pass takes every token
    assert [tokens for _, tokens in outer] == [2 * T, 2 * T]
    assert {tokens for name, (_, tokens) in counts.items() if "bodies" in name} == {given}


def test_the_flops_of_a_loop_in_a_loop_are_those_that_torch_counts() -> None:
    model = built(
        router={"kind": "top_k", "capacity": [0.5, 0.25]},
        body=LOOP | {"router": {"kind": "top_k", "capacity": [0.5, 0.25]}},
    )
    tokens_BT = torch.zeros(1, 32, dtype=torch.long)[:, :16]
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens_BT)
    assert flops_per_token(model, 16) * 16 == pytest.approx(counter.get_total_flops())


def test_a_loop_whose_pass_nobody_takes_has_a_share() -> None:
    model = built(
        router={"kind": "threshold", "capacity": 0.1},
        full_steps=0,
        body=LOOP | {"router": {"kind": "threshold", "capacity": 0.5}},
    )
    for router in model.routers:
        assert isinstance(router, Threshold)
        router.quantiles_RQ.fill_(1e9)  # nobody is selected, but shapes are those of the capacity
    run(model)
    assert set(model.router_counts().values()) == {(0, 2 * T), (0, 0)}
    assert set(model.router_shares().values()) == {0}
    assert math.isfinite(flops_per_token(model, T))
