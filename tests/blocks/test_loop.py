"""Loops against their definition, token by token and step by step, any kind in any slot."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import archdsl
from archdsl.blocks.loop import LoopSpec
from archdsl.costs.receipt import cost
from archdsl.interop.merge_lora import MergeError, merged
from archdsl.lang.registry import families
from archdsl.lang.spec import ModelSpec
from archdsl.nn.block import Context
from archdsl.nn.loop import Loop, Selection
from tests import naive
from tests.strategies import injections

D = 6
LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 2}, "ffn": {"hidden": 3}}
WINDOW: dict[str, Any] = LAYER | {
    "attention": {"head_size": 2, "queries_per_kv": 3, "window": 3, "qk_norm": True}
}
MOE = LAYER | {"ffn": {"kind": "moe", "experts": 3, "hidden": 2, "shared": 1}}
STACK = {"kind": "stack", "repeat": 2, "body": [LAYER]}
ROUTED = {
    "kind": "loop",
    "steps": 2,
    "router": {"kind": "prefix", "capacity": 0.5},
    "residual": "delta",
    "body": LAYER,
}
LITERAL = {"kind": "thinking", "unselected": "literal"}


def spec(**fields: Any) -> LoopSpec:
    return LoopSpec.model_validate({"steps": 3, "body": LAYER} | fields)


def router(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "capacity": [0.7, 0.4]} | fields


@pytest.mark.parametrize("residual", ["overwrite", "delta", "thinking", "gated", LITERAL], ids=str)
@pytest.mark.parametrize("encoding", [None, "scale", "add"])
@pytest.mark.parametrize("kind", [None, "top_k", "prefix", "threshold", "predictor", "random"])
def test_agrees_with_the_definition(residual: Any, encoding: str | None, kind: str | None) -> None:
    given_router = router(kind) if kind else None
    naive.agrees(spec(residual=residual, encoding=encoding, router=given_router), D)


@pytest.mark.parametrize(
    "fields",
    [
        {"kv": "shared"},
        {"kv": "shared", "router": router("prefix")},
        {"kv": "shared", "router": router("top_k"), "body": STACK},
        {"kv": "shared", "router": router("prefix"), "body": WINDOW},
        {"kv": "shared", "full_steps": 2, "router": router("random")},
        {"kv": "last", "router": router("prefix")},
        {"kv": "last", "router": router("prefix", capacity=[0.4, 1.0, 0.7]), "steps": 4},
        {"kv": "last", "router": router("random"), "body": WINDOW, "parameters": "per_step"},
        {"kv": "all"},
        {"kv": "all", "router": router("prefix", capacity=[0.4, 1.0, 0.7]), "steps": 4},
        {"kv": "all", "router": router("top_k"), "body": WINDOW, "parameters": "per_step"},
        {"body": ROUTED | {"kv": "all", "body": STACK}, "router": router("prefix")},
        {"body": ROUTED | {"kv": "last", "body": STACK}, "router": router("prefix")},
        {"router": router("prefix"), "body": WINDOW},
        {"router": router("top_k"), "body": WINDOW},
        {"router": router("random"), "body": WINDOW},
        {"router": router("prefix", nested=True)},
        {"router": router("top_k", nested=True), "full_steps": 1},
        {"router": router("random", nested=True)},
        {"router": router("prefix", capacity=0.5, nested=True), "steps": 5},
        {"router": router("prefix", capacity=[1.0, 0.6]), "residual": "thinking"},
        {"router": router("top_k", capacity=[0.6, 1.0, 0.3], alpha=[1.0, 2.0, 3.0]), "steps": 4},
        {"router": router("prefix", alpha=2.5), "residual": "thinking"},
        {"router": router("prefix", gate="tanh"), "residual": "delta"},
        {"router": "all", "encoding": "scale"},
        {"injection": "add"},
        {"injection": "linear"},
        {"injection": "diagonal"},
        {"injection": "diagonal", "router": router("prefix"), "residual": "delta"},
        {"injection": "add", "router": router("prefix"), "residual": "delta", "encoding": "add"},
        {"injection": "add", "start": "zeros", "router": router("top_k")},
        {"injection": "linear", "start": "noise", "steps": 1},
        {"injection": "diagonal", "start": "noise", "start_std": 2.0, "router": router("prefix")},
        {"injection": "linear", "router": router("prefix"), "steps": 2, "full_steps": 0},
        {"norm": "rms", "router": router("prefix"), "residual": "thinking", "encoding": "scale"},
        {"norm": "layer", "norm_eps": 0.1, "steps": 1, "router": router("top_k"), "full_steps": 0},
        {"parameters": "per_step", "router": router("prefix")},
        {"parameters": "per_step", "full_steps": 3, "encoding": "scale"},
        {"parameters": {"lora": {"rank": [2, 0, 1], "alpha": 3}}, "router": router("prefix")},
        {"parameters": {"lora": {"rank": 1}}, "body": MOE, "router": router("prefix")},
        {
            "parameters": {"lora": {"rank": 2}},
            "kv": "last",
            "body": STACK,
            "router": router("prefix"),
        },
        {"full_steps": 0, "steps": 2, "router": router("top_k"), "residual": "delta"},
        {"full_steps": 2, "router": router("prefix"), "residual": LITERAL, "encoding": "scale"},
        {"full_steps": 9, "router": router("prefix")},
        {"steps": 1, "encoding": "scale"},
        {"steps": 1, "full_steps": 0, "router": router("top_k", capacity=0.3)},
        {"body": ROUTED},
        {"body": ROUTED, "router": router("prefix")},
        {"body": ROUTED | {"body": WINDOW}, "router": router("top_k"), "residual": "thinking"},
        {"body": ROUTED | {"kv": "shared"}, "router": router("random"), "encoding": "add"},
        {"body": ROUTED | {"kv": "shared", "body": WINDOW}, "router": router("prefix")},
        {"body": ROUTED | {"router": {"kind": "random"}}, "router": router("random")},
    ],
    ids=str,
)
def test_agrees_with_the_definition_with(fields: dict[str, Any]) -> None:
    naive.agrees(spec(**fields), D, tokens=10)


shares = st.sampled_from([0.01, 0.3, 0.6000000000000001, 0.9, 1.0])


@st.composite
def loops(draw: st.DrawFn, inner: bool = True) -> dict[str, Any]:
    capacity = draw(st.lists(shares, min_size=4, max_size=4))
    nested = draw(st.booleans())
    routers = st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["top_k", "prefix", "random"]),
            "capacity": st.just(sorted(capacity, reverse=True) if nested else capacity),
            "alpha": st.sampled_from([1.0, 0.5]),
            "nested": st.just(nested),
        }
    )
    body = draw(st.sampled_from([LAYER, WINDOW, STACK]))
    if inner and draw(st.booleans()):
        body = draw(loops(inner=False))
    own = {"kv": "own", "parameters": draw(st.sampled_from(["shared", "per_step"]))}
    others = [own, {"kv": "shared"}, own | {"kv": "last"}, own | {"kv": "all"}]
    kv = own if body["kind"] == "loop" else draw(st.sampled_from(others))
    full_steps = draw(st.integers(0 if kv["kv"] == "own" else 1, 2))
    return (
        {
            "kind": "loop",
            "steps": draw(st.integers(1, 4)),
            "full_steps": full_steps,
            "router": draw(st.none() | routers),
            "residual": draw(st.sampled_from(["overwrite", "delta", "thinking", LITERAL])),
            "encoding": draw(st.sampled_from([None, "scale", "add"])),
            "body": body,
        }
        | kv
        | draw(injections(full_steps > 0))
    )


@settings(max_examples=15)
@given(loops(), st.integers(1, 9), st.integers(0, 99))
def test_any_combination_agrees_with_the_definition(
    fields: dict[str, Any], tokens: int, seed: int
) -> None:
    agrees_as_part_of_a_model(fields, tokens, seed)


@pytest.mark.slow
@settings(max_examples=80)
@given(loops(), st.integers(1, 9), st.integers(0, 99))
def test_any_of_many_combinations_agrees_with_the_definition(
    fields: dict[str, Any], tokens: int, seed: int
) -> None:
    # One row each: that the rows of a batch are independent is seen in the tests above.
    agrees_as_part_of_a_model(fields, tokens, seed, batch=1)


def agrees_as_part_of_a_model(
    fields: dict[str, Any], tokens: int, seed: int, batch: int = 2
) -> None:
    naive.agrees(LoopSpec.model_validate(fields), D, tokens, batch, seed)


def test_the_slots_of_the_tests_are_all_there_are() -> None:
    learned = {"top_k", "prefix", "threshold", "predictor"}
    assert set(families()["router"]) == learned | {"random", "all"}
    assert set(families()["residual"]) == {"thinking", "overwrite", "delta", "gated"}
    assert set(families()["encoding"]) == {"scale", "add"}


def test_nested_choices_are_subsets_of_the_ones_before() -> None:
    falling = [0.9, 0.6, 0.4, 0.2]
    module = built(steps=5, router=router("prefix", capacity=falling, nested=True))
    assert module.router is not None
    masks: list[torch.Tensor] = []

    def note(_: Any, __: Any, choice: Selection) -> None:
        masks.append(choice.mask(13))

    module.router.register_forward_hook(note)
    module(naive.stream(5, 13, D), Context())
    assert len(masks) == 4
    for before, after in pairwise(masks):
        assert not (after & ~before).any()
        assert after.sum() < before.sum()


def test_reports_how_many_tokens_each_step_selected() -> None:
    ctx = Context()
    built(router=router("top_k", capacity=[0.7, 0.3]))(naive.stream(2, 10, D), ctx)
    assert ctx.trace.counts == {"loop.0": (14, 20), "loop.1": (6, 20)}


@pytest.mark.parametrize(
    ("start", "same"),
    [("embedding", {}), ("zeros", {"injection": "add", "start": "zeros"})],
)
def test_a_linear_injection_starts_as_none_or_where_the_state_is_empty_as_add(
    start: str, same: dict[str, Any]
) -> None:
    plain, linear = spec(**same).build(D), spec(injection="linear", start=start).build(D)
    linear.load_state_dict(plain.state_dict(), strict=False)
    linear.reset(torch.Generator(), 1)
    x_BTD = torch.randn(2, 7, D)
    torch.testing.assert_close(linear(x_BTD, Context()), plain(x_BTD, Context()))


def test_noise_is_drawn_anew_in_training_and_belongs_to_positions_otherwise() -> None:
    loop = built(injection="add", start="noise", start_std=3.0, parameters="per_step")
    given: list[torch.Tensor] = []
    loop.bodies[0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    x_BTD = torch.zeros(2, 500, D, dtype=torch.float64)
    for train in (True, True, False, False):
        loop.train(train)
        loop(x_BTD, Context())
    one, other, fixed, again = given
    for noise in (one, other, fixed):
        assert noise.std() == pytest.approx(3, rel=0.05)
        assert noise.mean() == pytest.approx(0, abs=0.15)
        assert torch.corrcoef(noise[0].T).fill_diagonal_(0).abs().max() < 0.2
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    assert torch.equal(fixed, again)
    assert torch.equal(fixed[0], fixed[1])
    at = Context(pos_BT=torch.tensor([[7, 3]]))
    loop(x_BTD[:1, :2], at)
    assert torch.equal(given[-1][0], fixed[0, [7, 3]])


def test_a_pass_that_is_recomputed_has_the_noise_it_had() -> None:
    text = archdsl.load("tiny").patch("blocks.1.injection", "linear")
    model = archdsl.build(text.patch("blocks.1.start", "noise")).train()
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        model.checkpoint_activations = checkpointed
        model(torch.arange(20).view(1, 20)).square().mean().backward()
        grads.append(
            [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        )
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("fields", [{"steps": 1}, {"steps": 1, "full_steps": 0}], ids=str)
@pytest.mark.parametrize("more", [{}, {"encoding": "scale"}, {"router": "all"}], ids=str)
def test_one_step_for_every_token_is_the_body(fields: dict[str, Any], more: dict[str, Any]) -> None:
    loop = spec(**fields, **more)
    assert type(loop.build(D)) is type(loop.body.build(D))
    assert loop.canonical(D) == loop.body.canonical(D)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 4, "router": router("prefix", capacity=[0.7, 0.9])}, "one for each of the 3"),
        ({"steps": 4, "router": router("prefix", alpha=[1.0, 2.0])}, "one for each of the 3"),
        ({"router": router("prefix", capacity=[0.5, 0.9], nested=True)}, "must not rise"),
        ({"kv": "shared", "full_steps": 0}, "full_steps of at least 1"),
        ({"start": "noise"}, "noise needs an injection, .*or leave start out"),
        (
            {"start": "zeros", "injection": "add", "full_steps": 0, "router": router("prefix")},
            "zeros needs a first pass over all tokens, .*full_steps of at least 1",
        ),
        ({"kv": "shared", "parameters": "per_step"}, "parameters: shared"),
        ({"kv": "last", "full_steps": 0}, "last needs a first pass over all tokens"),
        ({"kv": "all", "full_steps": 0}, "all needs a first pass over all tokens"),
        ({"kv": "last", "body": ROUTED}, "last is not defined for a loop inside"),
        ({"kv": "shared", "parameters": {"lora": {}}}, "unused: parameters: shared"),
        ({"parameters": {"lora": {"rank": [1, 2]}}}, "one for each of the 3 passes; got 2"),
        ({"parameters": {"lora": {}}, "body": ROUTED}, "not defined for body, a loop: parameters:"),
        ({"parameters": {"lora": {"rank": -1}}}, "parameters.lora.rank"),
        ({"parameters": "per-step"}, "must be shared, per_step or .*did you mean"),
        ({"kv": "shared", "body": ROUTED}, "not defined for a loop inside"),
        ({"kv": "shared", "body": {"kind": "stack", "body": [ROUTED]}}, "not defined for a loop"),
    ],
    ids=str,
)
def test_refuses_what_does_not_go_together(fields: dict[str, Any], says: str) -> None:
    block = {"kind": "loop", "steps": 3, "body": LAYER} | fields
    with pytest.raises(ValidationError, match=says):
        ModelSpec.model_validate(
            {"name": "x", "vocab_size": 8, "context": 8, "dim": D, "blocks": [block]}
        )


def built(**fields: Any) -> Loop:
    module = spec(**fields).build(D)
    assert isinstance(module, Loop)
    naive.randomise(module)
    return module


def test_lora_starts_as_a_shared_body_and_rank_0_means_it() -> None:
    def model(parameters: Any) -> ModelSpec:
        return archdsl.load("tiny").patch("blocks.1.parameters", parameters)

    tokens_BT = torch.arange(20).view(2, 10)
    shared, lora = (archdsl.build(model(p)) for p in ("shared", {"lora": {"rank": [0, 2, 3]}}))
    assert lora(tokens_BT).equal(shared(tokens_BT))
    zero = model({"lora": {"rank": [0, 0, 0]}})
    assert zero.fingerprint() == shared.spec.fingerprint() != lora.spec.fingerprint()
    unused = model({"lora": {"rank": [0, 2, 3, 9]}})
    assert unused.fingerprint() == lora.spec.fingerprint()


def test_steps_beyond_the_trained_ones_add_what_the_last_one_adds() -> None:
    """Twice as many steps whose last ranks are copies of the last trained one."""
    short = built(parameters={"lora": {"rank": 2}}, steps=2)
    long = built(parameters={"lora": {"rank": 2}}, steps=4)
    weights = short.state_dict()
    for name in list(weights):
        if name.startswith("lora.steps.1."):
            weights |= {name.replace("steps.1", f"steps.{i}"): weights[name] for i in (2, 3)}
    long.load_state_dict(weights)
    short.dial(steps=4)
    x_BTD = naive.stream(2, 5, D)
    torch.testing.assert_close(short(x_BTD, Context()), long(x_BTD, Context()))


def test_merged_lora_is_a_body_for_each_pass() -> None:
    lora = {"lora": {"rank": [2, 0, 3], "alpha": 4}}
    looped = {"kind": "loop", "steps": 3, "parameters": lora, "body": STACK}
    outer = {"kind": "loop", "steps": 2, "router": "prefix", "body": looped}
    sizes = {"name": "x", "vocab_size": 8, "context": 8, "dim": D, "tie_embeddings": True}
    model = archdsl.build(ModelSpec.model_validate(sizes | {"blocks": [looped, outer]})).eval()
    naive.randomise(model)
    whole = merged(model)
    assert cost(whole.spec).params == sum(p.numel() for p in whole.parameters())
    assert not any("lora" in name for name in whole.state_dict())
    tokens_BT = torch.arange(16).view(2, 8) % 8
    torch.testing.assert_close(whole(tokens_BT), model(tokens_BT), rtol=1e-9, atol=1e-9)
    with pytest.raises(MergeError, match="no loop has `parameters: lora`"):
        merged(whole)


def test_what_no_gate_weighs_is_overwritten_whether_it_says_so_or_not() -> None:
    def model(residual: str, **router: Any) -> ModelSpec:
        changes = {"steps": 3, "router": {"capacity": 0.5, **router}, "residual": residual}
        loop = {"kind": "loop", "body": archdsl.load("tiny").blocks[0].model_dump(), **changes}
        return archdsl.load("tiny").patch("blocks.1", loop)

    for router, same in [("random", True), ("prefix", False)]:
        delta, overwrite = (model(r, kind=router) for r in ("delta", "overwrite"))
        assert (delta.fingerprint() == overwrite.fingerprint()) == same
    weighed = [model(r, kind="random", alpha=0.5) for r in ("delta", "overwrite")]
    assert weighed[0].fingerprint() != weighed[1].fingerprint()


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"start_std": 2.0}, {}),
        ({"norm_eps": 0.1}, {}),
        ({"injection": "add", "start": "zeros"}, {"injection": "add"}),
        ({"injection": "add", "start": "zeros", "steps": 1}, {"steps": 1}),
        ({"norm": "rms", "steps": 1, "exit": "halting"}, {"norm": "rms", "steps": 1}),
    ],
    ids=str,
)
def test_what_has_no_effect_does_not_count(fields: dict[str, Any], same: dict[str, Any]) -> None:
    assert spec(**fields).canonical(D) == spec(**same).canonical(D)
