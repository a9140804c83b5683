"""The loss of every pass: each through the last norm and the head, weighted and summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import archdsl
from archdsl.costs.receipt import train_flops
from archdsl.errors import SpecError
from archdsl.evaluation.evaluate import cross_entropy
from archdsl.lang.spec import ModelSpec
from archdsl.model.build import build
from archdsl.reports.training_memory import training_memory
from archdsl.testing import randomise, small_model, some_tokens
from archdsl.training.depth import at_depth
from benchmarks.memory import measured
from tests import naive

LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
ROUTED = {"router": {"kind": "prefix", "capacity": [0.7, 0.5, 0.5]}, "residual": "thinking"}
WEIGHTS = [1.0, 3.0, 2.0]


def spec(loop: dict[str, Any] | None = None, *after: Any, **training: Any) -> ModelSpec:
    looped = {"kind": "loop", "steps": 4, "injection": "add", "body": LAYER} | (loop or {})
    return small_model(LAYER, looped, *after, context=16, training=training or None)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("loop", [{}, ROUTED], ids=["plain", "routed"])
def test_it_is_the_weighted_sum_of_the_losses_at_each_depth(
    loop: dict[str, Any], recomputed: bool
) -> None:
    rule = spec(loop, loss="every_step", loss_weights=WEIGHTS)
    model = build(rule).train()
    randomise(model)
    model.checkpoint_activations = recomputed
    tokens_BT, targets_BT = some_tokens(rule), some_tokens(rule).roll(-1, 1)
    targets_BT[0, 3:7] = -100
    assert rule.training
    found = model.loss_of_passes(tokens_BT, targets_BT, rule.training.pass_weights)
    wanted = torch.zeros((), dtype=torch.float64)
    for steps, weight in enumerate([1.0, 3.0, 2.0, 2.0], 1):
        with at_depth(model, steps):
            wanted = wanted + weight / 8 * cross_entropy(model(tokens_BT), targets_BT).sum()
    naive.agree(found, wanted, list(model.parameters()))


def test_a_weight_may_differ_between_tokens() -> None:
    model = build(spec())
    randomise(model)
    tokens_BT, targets_BT = some_tokens(spec()), some_tokens(spec()).roll(-1, 1)
    exits_BT = torch.rand(4, *tokens_BT.shape, dtype=torch.float64)
    found = model.loss_of_passes(tokens_BT, targets_BT, lambda count: list(exits_BT[:count]))
    wanted = torch.zeros((), dtype=torch.float64)
    for steps in range(4):
        with at_depth(model, steps + 1):
            wanted = wanted + (exits_BT[steps] * cross_entropy(model(tokens_BT), targets_BT)).sum()
    naive.agree(found, wanted, list(model.parameters()))


def test_passes_without_a_gradient_have_no_loss() -> None:
    model, tokens_BT = build(spec()), some_tokens(spec())
    passes: list[torch.Tensor] = []
    with at_depth(model, 4, backprop_last=3):
        last = model.hidden(model.embedding(tokens_BT), passes=passes)
    assert len(passes) == 3
    assert passes[-1] is last
    assert all(x_BTD.requires_grad for x_BTD in passes)


@pytest.mark.parametrize("last", [None, 2])
def test_the_memory_is_near_the_measured_peak(last: int | None) -> None:
    depth = {"mean": 6, "backprop_last": last}
    rule = spec(loss="every_step", depth=depth).model_copy(update={"dim": 32, "vocab_size": 200})
    assert training_memory(rule, 8).peak == pytest.approx(measured(rule, 8), rel=0.02)


def test_a_head_is_counted_for_each_loss() -> None:
    head = 2 * 11 * 16 * 16
    assert train_flops(spec(loss="every_step")) == train_flops(spec()) + 3 * 3 * head
    cut = {"backprop_last": 2}
    more = train_flops(spec(loss="every_step", depth=cut)) - train_flops(spec(depth=cut))
    assert more == 3 * head


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"loss": "every_step"},
            "loss: every_step needs a loop as the last block, and blocks.2",
        ),
        ({"loss_weights": [1, 2]}, "loss_weights: only the loss every_step has weights"),
        ({"loss": "expected"}, "loss: must be 'last' or 'every_step'"),
    ],
    ids=str,
)
def test_a_loss_that_the_model_has_not_is_refused(rule: dict[str, Any], message: str) -> None:
    tree = spec(None, LAYER).model_dump(mode="json") | {"training": rule}
    with pytest.raises(SpecError, match=message):
        archdsl.load(tree)


def test_losses_that_mean_the_same_have_one_hash() -> None:
    assert spec(loss="last").fingerprint() == spec().fingerprint()
    every = spec(loss="every_step")
    assert every.fingerprint() == spec(loss="every_step", loss_weights=[2, 2]).fingerprint()
    assert len({spec().fingerprint(), every.fingerprint()}) == 2
    weighed = [spec(loss="every_step", loss_weights=weights) for weights in ([1, 2], [2, 4])]
    assert len({every.fingerprint(), *(one.fingerprint() for one in weighed)}) == 2
