"""The depth that training draws: its law, gradients through the last passes alone, costs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import archdsl
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.costs.receipt import sequence_cost, train_flops
from archdsl.data.loading import SkillData
from archdsl.data.skills import parse_skill
from archdsl.data.types import Batch
from archdsl.errors import SpecError
from archdsl.lang.spec import ModelSpec
from archdsl.lang.training import DepthSpec
from archdsl.model.build import build, meta_model
from archdsl.model.language_model import LanguageModel
from archdsl.nn.block import Context
from archdsl.reports.training_memory import full_batch, saved_for_backward, training_memory
from archdsl.search.analysis.baselines import compared_specs
from archdsl.testing import randomise, saved_tensors, small_model
from archdsl.training.config import TrainConfig
from archdsl.training.depth import at_depth
from archdsl.training.trainer import Trainer, compile_layers

SKILL = SkillData(parse_skill("p-hop,hops=1,length=16"))
LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
LOOP: dict[str, Any] = {"kind": "loop", "steps": 4, "injection": "linear", "body": LAYER}


def spec(loop: dict[str, Any] | None = None, **depth: Any) -> ModelSpec:
    training = {"training": {"depth": depth}} if depth else {}
    blocks = [LAYER, LOOP | (loop or {}), LAYER]
    return small_model(*blocks, context=16, **training)


def trainer(model: ModelSpec, **config: Any) -> Trainer:
    settings = {"steps": 6, "batch_size": 8, "device": "cpu"} | config
    return Trainer(build(model), SKILL, TrainConfig.model_validate(settings))


def gradients(model: LanguageModel) -> list[torch.Tensor]:
    return [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]


# What is drawn


def test_the_log_normal_law_is_that_of_huginn() -> None:
    rng = torch.Generator().manual_seed(0)
    rate = torch.empty(600_000, dtype=torch.float64)
    rate.log_normal_(math.log(8) - 0.5**2 / 2, 0.5, generator=rng)
    drawn = torch.poisson(rate, generator=rng) + 1
    means = drawn.sort().values.reshape(6, -1).mean(1)
    sizes = DepthSpec(law="poisson_lognormal").sizes(8)
    assert sizes == tuple(means.round().int().tolist()) == (3, 5, 7, 9, 12, 18)


@pytest.mark.parametrize(
    ("law", "sizes"),
    [
        ({}, (4,)),
        ({"mean": 7}, (7,)),
        ({"law": "uniform", "max": 3}, (1, 2, 3)),
        ({"law": "uniform", "mean": 3, "min": 2}, (2, 3, 4)),
        ({"law": "uniform"}, (1, 2, 3, 5, 6, 7)),
        ({"law": "poisson_lognormal", "min": 4, "max": 6}, (4, 4, 4, 5, 6, 6)),
    ],
    ids=str,
)
def test_a_law_is_drawn_from_few_numbers(law: dict[str, Any], sizes: tuple[int, ...]) -> None:
    assert DepthSpec(**law).sizes(4) == sizes


def test_what_is_drawn_depends_on_the_seed_and_the_step_alone() -> None:
    law = DepthSpec(law="uniform", max=3)
    drawn = [law.draw(4, 2, 0, step) for step in range(300)]
    assert drawn == [law.draw(4, 2, 0, step) for step in range(300)]
    assert drawn != [law.draw(4, 2, 1, step) for step in range(300)]
    assert all(one == other for one, other in drawn)
    assert min(Counter(one for one, _ in drawn).values()) > 80


def test_sequences_share_out_the_law_evenly() -> None:
    law = DepthSpec(law="uniform", max=3, per="sequence")
    drawn = [law.draw(4, 8, 0, step) for step in range(300)]
    assert all(set(Counter(rows).values()) <= {2, 3} for rows in drawn)
    first = Counter(rows[0] for rows in drawn)
    assert min(first.values()) > 80


# What is trained


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(per: str) -> None:
    drawn = spec(law="uniform", max=3, per=per, backprop_last=2)
    batch = SKILL.batch(0, 8, 16, 0)
    whole, parts = trainer(drawn), trainer(drawn, accumulate=4)
    assert parts.backward(batch) == pytest.approx(whole.backward(batch), rel=1e-6)
    for one, other in zip(gradients(whole.model), gradients(parts.model), strict=True):
        torch.testing.assert_close(one, other)


def test_each_sequence_is_trained_at_its_own_depth() -> None:
    drawn = spec(law="uniform", max=3, per="sequence")
    run, batch = trainer(drawn), SKILL.batch(0, 8, 16, 0)
    loss = run.backward(batch)
    nats = 0.0
    assert drawn.depth_law
    for row, depth in enumerate(drawn.depth_law.draw(4, 8, 0, 0)):
        with at_depth(run.model, depth):
            rows = slice(row, row + 1)
            nats += run.model.loss(batch.tokens_BT[rows], batch.targets_BT[rows]).item()
    assert loss == pytest.approx(nats / int((batch.targets_BT >= 0).sum()), rel=1e-5)


def test_a_run_that_is_resumed_draws_the_same_depths_and_is_evaluated_at_its_steps() -> None:
    drawn = spec(law="poisson_lognormal", mean=3, backprop_last=1)
    whole, first, second = trainer(drawn), trainer(drawn), trainer(drawn)
    whole.run()
    first.run(3)
    second.model.load_state_dict(first.model.state_dict())
    second.restore(first.state())
    second.run()
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [len(loop.passes) for loop in whole.model.loops] == [4]
    assert all(one.learns for one in whole.model.loops[0].passes)


def test_the_gradient_goes_through_the_last_passes_alone() -> None:
    model = build(spec())
    randomise(model, std=0.3)  # an injection starts as none
    batch = SKILL.batch(0, 2, 16, 0)
    with at_depth(model, 5, backprop_last=2):
        model.loss(batch.tokens_BT, batch.targets_BT).backward()
    found = [grad.clone() for grad in gradients(model)]
    model.zero_grad()
    with at_depth(model, 5):  # by hand: the state after three passes is a constant
        by_hand(model, batch).backward()
    for grad, wanted in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)
    assert all(grad.any() for grad in found)


def by_hand(model: LanguageModel, batch: Batch) -> torch.Tensor:
    first, loop, last = model.layers
    assert isinstance(loop, BodyLoop)
    start = first(model.embedding(batch.tokens_BT), Context())
    x = start
    for step in range(5):
        read = loop.inject(torch.cat((x, start), -1)) if loop.inject and step else x
        x = loop.bodies[0](read, Context())
        x = x.detach() if step == 2 else x
    logits = model.head(model.norm(last(x, Context())))
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_in_half_precision_the_body_gets_a_gradient_too() -> None:
    drawn, batch = spec({"injection": "add"}, mean=5, backprop_last=2), SKILL.batch(0, 8, 16, 0)
    half, exact = trainer(drawn, dtype="bfloat16"), trainer(drawn)
    half.backward(batch)
    exact.backward(batch)
    for one, other in zip(gradients(half.model), gradients(exact.model), strict=True):
        assert (one - other).norm() < 0.1 * other.norm()


@pytest.mark.filterwarnings("ignore")
def test_there_are_no_more_graphs_than_depths() -> None:
    torch._dynamo.reset()
    loop = LOOP | {"body": {"kind": "feed_forward", "hidden": 4}}
    depth = {"law": "uniform", "max": 2, "backprop_last": 1}
    rule = {"depth": depth, "loss": "every_step"}
    run = trainer(small_model(loop, context=16, training=rule), steps=10)
    counter = CompileCounter()
    compile_layers(run.model, backend=counter, depths=2)
    run.run()
    assert counter.frame_count == 2


# What it costs


def saved(model: ModelSpec, depth: int, last: int | None) -> int:
    tensors = saved_tensors(model, 3, depth=depth, backprop_last=last)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize(
    "loop",
    [
        {},
        {"injection": "add", "residual": "thinking", "encoding": "scale"},
        {"injection": "add", "residual": "delta", "encoding": "add"},
        {"injection": "add", "residual": "gated", "kv": "last"},
        {"injection": "diagonal", "start": "noise", "parameters": {"lora": {"rank": [1, 2, 3, 3]}}},
    ],
    ids=str,
)
def test_passes_without_a_gradient_save_no_activations(loop: dict[str, Any], last: int) -> None:
    model = spec(loop)
    rows = full_batch(model, 3)._replace(backprop_last=last)
    for depth in (3, 6):
        assert saved_for_backward(model.at_depth(depth), rows) == saved(model, depth, last)


def test_a_deeper_draw_needs_no_more_memory_for_activations() -> None:
    few, many = saved(spec(), 6, 2), saved(spec(), 60, 2)
    assert few == many < saved(spec(), 6, None) / 1.5
    cut, whole = (training_memory(spec(mean=30, backprop_last=n), 4) for n in (2, 30))
    assert cut == training_memory(spec(mean=60, backprop_last=2), 4)
    assert cut.activations < whole.activations / 3
    law: dict[str, Any] = {"law": "uniform", "max": 6}
    batch, each = (training_memory(spec(per=p, **law), 12) for p in ("batch", "sequence"))
    assert each.activations < batch.activations / 3  # at most two sequences at a time


def test_training_flops_are_those_of_a_forward_pass_and_of_the_last_passes_twice() -> None:
    model = spec(law="uniform", max=5, backprop_last=2)
    forward = {n: sequence_cost(model.at_depth(n)).flops for n in range(1, 6)}
    wanted = sum(forward[n] + 2 * forward[min(n, 2)] for n in range(1, 6)) / 5
    assert train_flops(model) == wanted == archdsl.cost(model).train_flops_per_token * 16
    # by torch's count, a pass that does not learn is run forward alone
    more = executed(model, 5, 2) - executed(model, 3, 2)
    assert more == forward[5] - forward[3]


def executed(spec: ModelSpec, depth: int, last: int) -> int:
    model = meta_model(spec).train()
    with FlopCounterMode(display=False) as counter, at_depth(model, depth, last):
        model(torch.zeros(1, 16, dtype=torch.long, device="meta")).sum().backward()
    return int(counter.get_total_flops())


# What the language says


@pytest.mark.parametrize(
    ("loop", "depth", "message"),
    [
        ({"injection": None}, {"backprop_last": 2}, "backprop_last: cuts the gradient to all that"),
        ({"encoding": "add"}, {"backprop_last": 2}, "blocks.1.encoding has weights for that pass"),
        ({"kv": "shared"}, {"backprop_last": 2}, "blocks.1.kv has weights for that pass alone"),
        (
            {"kv": "all"},
            {"backprop_last": 2},
            "backprop_last: does not go with kv: all",
        ),
        ({"parameters": "per_step"}, {"mean": 5}, "mean: draws up to 5 passes, but blocks.1 has"),
        ({}, {"mean": 2, "max": 3}, "max: law fixed has no limits"),
        ({}, {"law": "uniform", "mean": 2, "max": 3}, "mean: law uniform takes mean or max"),
        ({}, {"law": "uniform", "min": 5}, "min: must be at most mean, got 5"),
        ({"steps": 1}, {"mean": 2}, "training.depth: needs a loop with more than one pass"),
        ({"body": LOOP | {"steps": 2}}, {"law": "uniform"}, "4 steps and blocks.1.body has 2"),
        (
            {"body": LOOP | {"body": LOOP | {"body": LOOP}}},
            {"law": "uniform", "max": 40},
            "at most 10,000 may run",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_rule_that_does_not_go_with_the_blocks_is_refused(
    loop: dict[str, Any], depth: dict[str, Any], message: str
) -> None:
    tree = spec(loop).model_dump(mode="json") | {"training": {"depth": depth}}
    with pytest.raises(SpecError, match=message):
        archdsl.load(tree)


def test_rules_that_mean_the_same_have_one_hash() -> None:
    plain = spec().fingerprint()
    none: list[dict[str, Any]] = [{"mean": 4}, {"per": "sequence"}, {"backprop_last": 4}]
    assert {spec(**one).fingerprint() for one in none} == {plain}
    law: dict[str, Any] = {"law": "uniform"}
    same: list[dict[str, Any]] = [{"mean": 4}, {}, {"min": 1, "max": 7}, {"backprop_last": 9}]
    assert len({spec(**law, **one).fingerprint() for one in same}) == 1
    others: list[dict[str, Any]] = [{"mean": 5}, law, law | {"backprop_last": 2}]
    others += [{"law": "poisson_lognormal"}, law | {"per": "sequence"}]
    assert len({plain, *(spec(**one).fingerprint() for one in others)}) == 6


def test_a_baseline_keeps_of_the_rule_what_goes_with_its_blocks() -> None:
    specs = compared_specs(spec(law="uniform", max=6, backprop_last=2))
    kept = {name for name, one in specs.items() if one.depth_law}
    assert {"winner", "without encoding"} <= kept
    assert kept.isdisjoint({"equal-FLOPs plain", "without injection", "without loop 1"})
    for one in specs.values():
        ModelSpec.model_validate(one.model_dump(mode="json"))
