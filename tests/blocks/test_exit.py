"""Exits: who stops when, what the loss is, what it costs, and what cannot go together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from archdsl.checks.serving import obstacles
from archdsl.costs.receipt import sequence_cost
from archdsl.data.types import IGNORE
from archdsl.evaluation.dial_sweep import preset_settings
from archdsl.lang.spec import ModelSpec
from archdsl.model.executed_flops import executed
from archdsl.model.language_model import LanguageModel
from archdsl.nn.loop import DialError
from archdsl.testing import LAYER, built, small_model, some_tokens
from tests import naive

GATE = {"kind": "gate", "threshold": 0.6}


def spec(leave: Any, **fields: Any) -> ModelSpec:
    loop = {"kind": "loop", "steps": 4, "exit": leave, "body": LAYER} | fields
    return small_model(LAYER, loop)


@pytest.mark.parametrize(
    ("leave", "fields"),
    [
        (GATE, {"kv": "last"}),
        (GATE, {"kv": "shared", "residual": "thinking"}),
        (GATE | {"threshold": 0.0}, {"kv": "last"}),
        ({"kind": "halting", "threshold": 0.8}, {"kv": "last", "residual": "thinking"}),
        ({"kind": "halting", "threshold": 0.95}, {"kv": "own", "encoding": "scale"}),
        ({"kind": "confidence", "threshold": 0.5}, {"kv": "last"}),
        ({"kind": "confidence", "measure": "entropy", "threshold": 1.2}, {"kv": "shared"}),
    ],
    ids=str,
)
def test_agrees_with_the_definition(leave: dict[str, Any], fields: dict[str, Any]) -> None:
    model = built(spec(leave, **fields))
    tokens_BT = some_tokens(model.spec, 1)
    naive.agree(model(tokens_BT), naive.model(model, tokens_BT), list(model.parameters()))


@pytest.mark.parametrize("prior", [None, 0.3])
def test_a_gate_learns_by_the_loss_expected_over_the_passes(prior: float | None) -> None:
    model = built(spec({"kind": "gate", "prior": prior, "weight": 0.7})).train()
    tokens_BT, target_BT = some_tokens(model.spec, 4).chunk(2)
    target_BT[0, 3] = IGNORE
    with torch.no_grad():  # chances that are not so small that a float64 has none
        exit_of(model).score.weight.mul_(0.05)

    loss = model.loss(tokens_BT, target_BT)
    (extra,) = model.trace.losses.values()
    wanted, divergence = expected_loss(model, tokens_BT, target_BT, prior)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(extra, 0.7 * divergence)

    weights = list(model.parameters())
    found = torch.autograd.grad(loss + extra, weights)
    for one, other in zip(
        found, torch.autograd.grad(wanted + 0.7 * divergence, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert any(one.any() for one in found)


def expected_loss(
    model: LanguageModel, tokens_BT: Tensor, target_BT: Tensor, prior: float | None
) -> tuple[Tensor, Tensor]:
    """The expected loss in nats and the mean divergence from the prior, token by token."""
    gate = exit_of(model)
    states = []
    for steps in range(1, 5):
        model.eval().dial(steps=steps)
        states.append(model.hidden(model.embedding(tokens_BT)))
    model.dial()
    passes = len(states)
    chances = [1 / passes if prior is None else prior * (1 - prior) ** n for n in range(passes)]
    total = divergence = torch.zeros((), dtype=torch.float64)
    for b, t in [(b, t) for b in range(2) for t in range(tokens_BT.size(1))]:
        left = torch.ones((), dtype=torch.float64)
        for n, x_BTD in enumerate(states):
            x = x_BTD[b, t]
            stop = torch.sigmoid(gate.score.weight[0] @ x + gate.score.bias[0])
            p = left * stop if n < passes - 1 else left
            left = left * (1 - stop)
            if target_BT[b, t] >= 0:
                total = total - p * model.readout(x).log_softmax(-1)[target_BT[b, t]]
            divergence = divergence + p * (p.log() - math.log(chances[n] / sum(chances)))
    return total, divergence / tokens_BT.numel()


def test_halting_pays_for_passes_and_for_what_is_left() -> None:
    model = built(spec({"kind": "halting", "threshold": 0.9, "weight": 0.5})).train()
    tokens_BT = some_tokens(model.spec)
    model(tokens_BT)
    (found,) = model.trace.losses.values()
    halting = exit_of(model)
    states, costs = [], []
    for steps in range(1, 5):
        model.eval().dial(steps=steps)
        with torch.no_grad(), returning_the_state(halting):
            states.append(model.hidden(model.embedding(tokens_BT)))
    for b, t in [(b, t) for b in range(2) for t in range(tokens_BT.size(1))]:
        numbers = naive.halting_numbers(halting, [x_BTD[b, t] for x_BTD in states])
        before, n = 0.0, 0
        while n < 3 and before + numbers[n].item() < 0.9:
            before, n = before + numbers[n].item(), n + 1
        costs.append(n + 1 + 1 - before)
    assert found.item() == pytest.approx(0.5 * sum(costs) / len(costs))


def exit_of(model: LanguageModel) -> Any:
    return cast(Any, model.loops[0]).exit


@contextmanager
def returning_the_state(halting: Any) -> Iterator[None]:
    """Within the block, the loop returns its last state in place of the weighted sum."""
    halting.end = lambda x_BTD, *_: x_BTD
    yield
    del halting.end


@pytest.mark.parametrize("leave", ["gate", "halting", {"kind": "confidence", "measure": "entropy"}])
def test_the_dial_trades_passes_for_the_threshold(leave: Any) -> None:
    model = built(spec(leave))
    tokens_BT, shares = some_tokens(model.spec), []
    looser = sorted(model.loops[0].thresholds, reverse=leave in ("gate", "halting"))
    for threshold in looser:
        model.dial(exit=threshold)
        with torch.no_grad():
            model(tokens_BT)
        shares.append(sum(model.router_shares().values()))
        steps_BT = model.trace.steps_BT
        assert steps_BT is not None
        assert steps_BT.double().mean().item() == pytest.approx(shares[-1])
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    assert {setting.exit for setting in preset_settings(model)} >= set(looser)


def test_what_ran_is_counted_as_what_is_stated() -> None:
    """The receipt takes the stated shares; a pass is counted at the measured ones."""
    stated = spec(GATE | {"remaining": [0.75, 0.5, 0.25]}, steps=4)
    cost = sequence_cost(stated)
    assert cost.lightest < cost.flops < cost.heaviest
    assert cost.heaviest == sequence_cost(spec(GATE)).flops
    model = built(stated)
    loop = model.loops[0]
    model.trace.counts = {f"{loop.label}.{i}": (count, 4) for i, count in enumerate([3, 2, 1])}
    assert sequence_cost(executed(model)).flops == cost.flops


def test_what_has_no_effect_does_not_count() -> None:
    few, many = (
        spec(GATE | {"remaining": shares}) for shares in ([0.5, 0.4, 0.3], [0.5, 0.4, 0.3, 0.2])
    )
    assert few.fingerprint() == many.fingerprint()
    light, heavy = (spec({"kind": "gate", "weight": 0, "prior": prior}) for prior in (None, 0.2))
    assert light.fingerprint() == heavy.fingerprint()


def test_flops_that_ran_are_those_of_the_dialled_threshold() -> None:
    """Readouts of confidence are heads: they run where tokens can stop, and nowhere else."""
    leave = {"kind": "confidence", "measure": "entropy"}
    found = []
    for threshold in (0.5, 0.0):
        model = built(spec(leave | {"threshold": threshold}))
        for dialled in (2.0, 0.0):
            model.dial(exit=dialled)
            with torch.no_grad():
                model(some_tokens(model.spec))
            found.append(sequence_cost(executed(model)).flops)
    assert found[:2] == found[2:]


def test_every_step_has_a_loss_or_an_exit_that_learns() -> None:
    loop = {"kind": "loop", "exit": "halting", "body": LAYER}
    with pytest.raises(ValidationError, match=r"blocks\.0\.exit learns how to weigh the passes"):
        small_model(loop, training={"loss": "every_step"})
    weights = {"loss": "every_step", "loss_weights": [1, 2], "depth": {"backprop_last": 1}}
    with pytest.raises(ValidationError, match="must be equal beside depth"):
        small_model(loop | {"exit": None, "injection": "add"}, training=weights)


def test_an_exit_that_stops_tokens_stands_in_the_way_of_serving() -> None:
    [found] = obstacles(spec(GATE))
    assert found.path == "blocks.1.exit"
    assert not obstacles(spec("gate"))


def test_thresholds_that_stop_nobody_are_no_exit() -> None:
    assert spec({"kind": "confidence", "threshold": 0}).fingerprint() == spec(None).fingerprint()
    gate = built(spec({"kind": "gate", "threshold": 1.0}))
    tokens_BT = some_tokens(gate.spec)
    plain = built(spec(None))
    plain.load_state_dict(gate.state_dict(), strict=False)
    torch.testing.assert_close(gate(tokens_BT), plain(tokens_BT), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"router": {"kind": "prefix"}}, r"exit\n.*leave out one of exit and router"),
        ({"full_steps": 2}, r"full_steps\n.*must be 1 beside an exit"),
        ({"residual": {"kind": "thinking", "unselected": "literal"}}, r"unselected: bypass"),
        ({"exit": GATE | {"remaining": [0.5, 0.7, 0.2]}}, "must not rise"),
        ({"exit": GATE | {"remaining": [0.5, 0.4]}}, "one for each of the 3 passes"),
        ({"exit": {"kind": "gate", "remaining": 0.5}}, "must be 1, as no token stops"),
    ],
)
def test_refuses_what_does_not_go_together(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        spec(GATE, **fields) if "exit" not in fields else spec(fields["exit"])


def test_a_gate_stands_in_the_last_block() -> None:
    loop = {"kind": "loop", "exit": "gate", "body": LAYER}
    with pytest.raises(ValidationError, match=r"must be the last block, blocks\.1"):
        small_model(loop, LAYER)
    small_model({**loop, "exit": "halting"}, LAYER)


def test_only_loops_with_exits_have_thresholds() -> None:
    with pytest.raises(DialError, match="no loop with an exit"):
        built(spec(None)).dial(exit=0.5)
    with pytest.raises(DialError, match=r"between 0 and 1, got 1\.5"):
        built(spec("gate")).dial(exit=1.5)
