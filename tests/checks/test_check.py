"""`check`: correct specs pass, leaks are reported with their step, and broken parts are found."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import archdsl
from archdsl.blocks.modules.attention import Attention
from archdsl.blocks.modules.feed_forward import FeedForward
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.blocks.modules.router import Prefix
from archdsl.checks.check import Report, _reduced, check
from archdsl.checks.localise import WHOLE
from archdsl.lang.spec import ModelSpec
from archdsl.model import backbone as model_module
from archdsl.model.build import build, meta_model
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context, KeysValues
from archdsl.nn.cache import Kept, Stream
from archdsl.nn.loop import Router, Step
from archdsl.reports.outline import outline
from tests.shipped import STRUCTURES
from tests.strategies import specs

LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
TOP_K, PREFIX = {"kind": "top_k", "capacity": 0.5}, {"kind": "prefix", "capacity": 0.5}


def spec(*blocks: Any, context: int = 9) -> ModelSpec:
    fields = {"name": "small", "vocab_size": 11, "context": context, "dim": 16}
    return ModelSpec.model_validate(fields | {"blocks": list(blocks)})


def loop(router: Any, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "loop",
        "steps": 3,
        "router": router,
        "residual": "delta",
        "body": LAYER,
    } | fields


def tried(*blocks: Any, seeds: int = 1) -> Report:
    return check(spec(*blocks), seeds=seeds)


def origins(report: Report) -> set[tuple[str, int | None, str]]:
    """Where it comes from: place, step and check."""
    return {(fault.place, fault.step, fault.check) for fault in report.faults}


def failing(report: Report) -> set[str]:
    return {
        kind
        for row in report.rows
        for kind, share in row.differences.items()
        if share != 0 and (share is None or share > 1e-9)
    }


def everything(attention: Attention, q_BHTE: Tensor, kv: KeysValues, ctx: Context) -> Tensor:
    """Attention in which every query sees all keys."""
    return attention._scaled(q_BHTE, kv.k_BGSE, kv.v_BGSE, None)


# what is sound passes, and what leaks is named


def structure(name: str) -> str:
    """The shipped spec at the size that ``check`` builds, without its name and hidden sizes."""
    spec = _reduced(archdsl.load(name)).canonical()
    text = spec.model_copy(update={"name": "", "description": ""}).model_dump_json()
    return re.sub(r'"(hidden|ratio)":[\d.]+', "", text)


# Specs of other sizes are the same models once they are reduced.
REDUCED = list({structure(name): name for name in STRUCTURES}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_a_shipped_spec_passes_or_its_leak_is_named(name: str) -> None:
    passes_or_is_named(archdsl.load(name))


@pytest.mark.parametrize("name", ["tiny", "mod"])
def test_a_small_or_a_leaking_shipped_spec_passes_or_its_leak_is_named(name: str) -> None:
    passes_or_is_named(archdsl.load(name))


def test_each_seed_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def recorded(spec: ModelSpec, seed: int, **options: Any) -> LanguageModel:
        seeds.append(seed)
        return build(spec, seed=seed, **options)

    monkeypatch.setattr("archdsl.checks.check.build", recorded)
    assert check(spec(LAYER), seeds=3).passed
    assert seeds == [0, 1, 2]


def passes_or_is_named(spec: ModelSpec) -> None:
    """On one draw of weights, as more structures say more than more draws: there are 50 below."""
    report = check(spec, seeds=1)
    leaking = {node.path.removesuffix(".router") for node in outline(spec).walk() if node.leaks}
    assert {fault.place for fault in report.leaks} == leaking
    assert len(report.leaks) == len(report.faults)
    for fault in report.faults:
        assert fault.difference is not None
        assert fault.difference > 0.01
        assert fault.router == "top_k"
    assert report.passed == (not leaking)
    for row in report.rows:
        assert (
            max(row.differences[kind] or 0 for kind in ("decoding", "prefill", "padding")) < 1e-13
        )


@pytest.mark.parametrize("kind", ["prefix", "threshold", "predictor", "random"])
def test_a_leaking_spec_passes_with_a_causal_router(kind: str) -> None:
    assert not tried(loop(TOP_K)).passed
    report = tried(loop(TOP_K | {"kind": kind}))
    assert report.passed
    assert any("while it trains" in note for note in report.notes) == (kind == "predictor")


@settings(max_examples=10)
@given(specs())
def test_any_spec_passes_but_for_its_leaking_routers(spec: ModelSpec) -> None:
    passes_but_for_its_leaking_routers(spec)


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_any_of_40_specs_passes_but_for_its_leaking_routers(spec: ModelSpec) -> None:
    passes_but_for_its_leaking_routers(spec)


def passes_but_for_its_leaking_routers(spec: ModelSpec) -> None:
    report = check(spec, seeds=1)
    assert report.faults == report.leaks
    # one draw may find the leak of a block in the whole model alone
    named = {fault.router for fault in report.faults if fault.place != WHOLE}
    assert named <= {"top_k"}
    assert bool(report.faults) == meta_model(spec).leaks


def test_a_leak_is_reported_with_its_first_step_and_its_size() -> None:
    report = tried(LAYER, {"kind": "stack", "repeat": 2, "body": [LAYER, loop(TOP_K)]})
    [fault] = report.faults
    assert (fault.place, fault.step, fault.router) == ("blocks.1.body.1", 2, "top_k")
    assert str(fault).startswith(
        "blocks.1.body.1, step 2 (router top_k): changing a later token moves earlier outputs by "
        f"up to {fault.difference:.3g}, where the largest is "
    )
    marks = {row.place: row.mark for row in report.rows}
    assert [place for place, mark in marks.items() if mark == "LEAK"] == [
        "model",
        "blocks.1",
        "blocks.1.body.1",
        "model, dialled",
    ]
    assert report.verdict == "small sees later tokens"
    assert report.leaking_pass is not None
    assert report.leaking_pass > 0.01  # what decoding differs from training by


@pytest.mark.parametrize(
    ("block", "leaks"),
    [
        (loop(TOP_K, full_steps=0), {("blocks.0", 1)}),
        (loop({"kind": "top_k", "capacity": [1.0, 0.5]}), {("blocks.0", 3)}),
        (loop(PREFIX, body=loop(TOP_K)), {("blocks.0.body", 2)}),
        (loop(TOP_K, body=loop(PREFIX)), {("blocks.0", 2)}),
        (loop(TOP_K, body=loop(TOP_K, full_steps=0)), {("blocks.0", 2), ("blocks.0.body", 1)}),
        (
            loop(TOP_K, body={"kind": "loop", "steps": 1, "body": loop(TOP_K)}),
            {("blocks.0", 2), ("blocks.0.body.body", 2)},
        ),
        (loop(TOP_K, parameters="per_step"), {("blocks.0", 2)}),
        (loop(TOP_K, kv="shared"), {("blocks.0", 2)}),
    ],
)
def test_of_nested_loops_those_that_leak_by_themselves_are_reported(
    block: Any, leaks: set[tuple[str, int]]
) -> None:
    assert origins(tried(block)) == {(*leak, "change") for leak in leaks}


def test_a_leaking_router_is_reported_even_if_its_leak_has_no_effect() -> None:
    [fault] = check(spec(loop(TOP_K), context=1)).faults
    assert (
        str(fault)
        == "blocks.0 (router top_k): looks at later tokens, though none moved an output here"
    )


# what is broken is found


def test_a_router_that_looks_one_token_ahead_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(router: Router, x_BTD: Tensor, score_BT: Tensor, at: Step, ctx: Context) -> Tensor:
        return score_BT.roll(-1, 1) > 0.3

    monkeypatch.setattr(Prefix, "wanted", wanted)
    report = tried(loop({"kind": "random"}), loop(PREFIX))
    assert [(fault.place, fault.step, fault.router) for fault in report.leaks] == [
        ("blocks.1", 2, "prefix")
    ]
    assert {row.mark for row in report.rows if row.place.startswith("blocks.0")} == {"PASS"}


def test_attention_that_is_not_causal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "_attend", everything)
    report = tried(loop(PREFIX))
    assert {fault.place for fault in report.faults} == {"blocks.0.body.attention"}
    assert failing(report) >= {"change", "gradient", "decoding", "prefill"}
    assert (
        report.verdict
        == "small sees later tokens and does not give the same outputs however its tokens arrive"
    )


def test_a_leak_that_only_gradients_show_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = FeedForward.forward

    def with_a_hidden_term(block: FeedForward, x_BTD: Tensor, ctx: Context) -> Tensor:
        mean_B1D = x_BTD.mean(1, keepdim=True)
        return forward(block, x_BTD, ctx) + mean_B1D - mean_B1D.detach()

    monkeypatch.setattr(FeedForward, "forward", with_a_hidden_term)
    report = tried(LAYER)
    assert origins(report) == {("blocks.0.ffn", None, "gradient")}
    assert "have a gradient with respect to later inputs by up to" in str(report.faults[0])


def test_a_cache_that_loses_an_entry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Kept.write

    def forgetful(kept: Kept, new: Tensor, stream: Stream) -> None:
        write(kept, new, stream)
        kept.data[..., 2, :] = 0

    monkeypatch.setattr(Kept, "write", forgetful)
    report = tried(LAYER, {"kind": "feed_forward", "hidden": 8})
    assert {fault.place for fault in report.faults} == {"blocks.0.attention"}
    assert failing(report) == {"decoding", "prefill", "padding"}
    assert report.leaks == ()
    assert {row.mark for row in report.rows if row.place == "blocks.1"} == {"PASS"}


def test_a_loop_whose_further_steps_decode_wrongly_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routed = BodyLoop._routed

    def from_the_start(
        loop: BodyLoop, x: Tensor, start: Tensor, one: Any, ctx: Context, chosen: Any
    ) -> Tensor:
        chosen = replace(chosen, stream=replace(chosen.stream, past=0))
        return routed(loop, x, start, one, ctx, chosen)

    monkeypatch.setattr(BodyLoop, "_routed", from_the_start)
    report = tried(loop(PREFIX))
    assert ("blocks.0", 2, "decoding") in origins(report)
    assert report.leaks == ()


def test_attention_that_ignores_padding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Attention._attend

    def sees_padding(attention: Attention, q_BHTE: Tensor, kv: KeysValues, ctx: Context) -> Tensor:
        padded = ctx.stream.length_B is not None
        return (everything if padded else attend)(attention, q_BHTE, kv, ctx)

    monkeypatch.setattr(Attention, "_attend", sees_padding)
    report = tried(LAYER)
    assert origins(report) == {("blocks.0.attention", None, "padding")}
    assert str(report.faults[0]).startswith(
        "blocks.0.attention: padding changes the outputs of other"
    )


def test_a_model_that_ignores_padding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "_real_first", lambda mask_BT: (None, None))
    report = tried(LAYER)
    assert origins(report) == {("blocks.0.attention", None, "padding")}


def test_nan_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeedForward, "forward", lambda block, x_BTD, ctx: x_BTD * float("inf"))
    report = tried(LAYER)
    assert not report.passed
    assert {fault.place for fault in report.faults} == {"blocks.0.ffn"}
    assert "overflow" in str(report.faults[0])
    assert report.rows[0].differences["decoding"] is None
    assert json.loads(report.model_dump_json())["faults"][0]["difference"] is None


def test_a_fault_outside_the_blocks_is_reported_for_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = torch.nn.Linear.forward

    def mixing(linear: torch.nn.Linear, x: Tensor) -> Tensor:
        y = head(linear, x)
        return y.flip(1) if linear.out_features == 11 else y

    monkeypatch.setattr(torch.nn.Linear, "forward", mixing)
    assert {place for place, _, _ in origins(tried(LAYER))} == {"model"}


def test_a_fault_that_only_the_dial_shows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    full = BodyLoop._full

    def beyond(loop: BodyLoop, x: Tensor, start: Tensor, one: Any, ctx: Context) -> Tensor:
        y = full(loop, x, start, one, ctx)
        return y.flip(1) if one.step >= loop.spec.steps else y

    monkeypatch.setattr(BodyLoop, "_full", beyond)
    report = tried({"kind": "loop", "steps": 2, "body": LAYER})
    assert {place for place, _, _ in origins(report)} == {"model, dialled"}


# what is tried


def test_a_trained_model_is_checked_with_its_own_weights_and_not_changed() -> None:
    model = archdsl.build(spec(LAYER, loop(PREFIX), context=40))
    model.dial(capacity=0.25, steps=4)
    before = [loop.passes for loop in model.loops]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert check(model, seeds=1).passed
    assert [loop.passes for loop in model.loops] == before
    assert all(weight.equal(weights[name]) for name, weight in model.state_dict().items())
    report = check(model, seeds=1)
    assert "its own weights, width 16, 32 tokens for 40" in report.setup

    with torch.no_grad():
        model.get_parameter("blocks.1.bodies.0.ffn.down.weight").fill_(torch.inf)
    report = check(model, seeds=1)
    assert ("blocks.1.body.ffn", None, "decoding") in origins(report)


def test_a_large_spec_is_checked_at_a_small_size_and_the_report_says_so() -> None:
    report = check(archdsl.load("mod"), seeds=1)
    assert "width 48 for 1,024, 32 tokens for 4,096" in report.setup
    assert "width 16, 9 tokens, 1 draw" in tried(LAYER).setup


def test_the_report_is_the_same_every_time() -> None:
    assert tried(loop(TOP_K)) == tried(loop(TOP_K))
