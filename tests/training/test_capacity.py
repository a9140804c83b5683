"""The schedule of capacities, and the losses of routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import archdsl
from archdsl.costs.receipt import sequence_cost, train_flops
from archdsl.data.loading import SkillData
from archdsl.data.skills import parse_skill
from archdsl.errors import SpecError
from archdsl.lang.spec import ModelSpec
from archdsl.lang.training import CapacitySpec
from archdsl.model.build import build
from archdsl.reports.training_memory import training_memory
from archdsl.testing import small_model
from archdsl.training.config import TrainConfig
from archdsl.training.depth import at_depth
from archdsl.training.trainer import Trainer

SKILL = SkillData(parse_skill("p-hop,hops=1,length=16"))
LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
ROUTER: dict[str, Any] = {"kind": "top_k", "capacity": [0.5, 0.25], "nested": True}


def spec(router: dict[str, Any] | None = None, **training: Any) -> ModelSpec:
    loop = {"kind": "loop", "steps": 3, "router": router or ROUTER, "residual": "delta"}
    return small_model(loop | {"body": LAYER}, context=16, training=training or None)


def trainer(model: ModelSpec, **config: Any) -> Trainer:
    settings = {"steps": 8, "batch_size": 4, "device": "cpu"} | config
    return Trainer(build(model), SKILL, TrainConfig.model_validate(settings))


# The schedule


def test_capacities_fall_from_one_along_half_a_cosine_in_eight_steps() -> None:
    schedule = CapacitySpec(warmup=0.5)
    found = [schedule.openness(step, 200) for step in range(200)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1
    assert found[50] == 0.5
    assert set(found[100:]) == {0}
    assert len(set(found)) == 9
    counted = {level: found.count(level) / 200 for level in set(found)}
    assert schedule.levels() == pytest.approx(counted, abs=0.01)


@pytest.mark.parametrize("kind", ["top_k", "prefix", "threshold", "predictor", "random"])
def test_a_run_begins_with_every_token_and_ends_at_its_own_capacities(kind: str) -> None:
    run = trainer(spec(ROUTER | {"kind": kind}, capacity={"warmup": 0.5}))
    run.run(1)
    assert list(run.model.router_shares().values()) == [1, 1]
    run.run(3)
    most = [0.5 + 0.5 / 2, 0.25 + 0.75 / 2]
    assert all(0 < a <= b for a, b in zip(run.model.router_shares().values(), most, strict=True))
    run.run()
    assert list(run.model.router_shares().values()) <= [0.5, 0.25]
    assert [one.routed.capacity for one in run.model.loops[0].passes if one.routed] == [0.5, 0.25]


def test_a_schedule_goes_with_the_depth_of_a_step() -> None:
    model = build(spec())
    with at_depth(model, 5, None, 0.5):
        found = [one.routed.capacity for one in model.loops[0].passes if one.routed]
    assert found == [0.75, 0.625, 0.625, 0.625]


def test_a_run_does_not_go_on_to_more_steps_if_its_capacities_were_others() -> None:
    same: dict[str, Any] = {"schedule": "constant", "steps": 8, "warmup_steps": 2}
    run = trainer(spec(capacity={"warmup": 0.5}), **same)
    run.run(6)
    state, more = run.state(), same | {"steps": 80}
    assert trainer(spec(capacity={"warmup": 0.5}), **same).can_go_on_from(state, Path("run"))
    assert not trainer(spec(capacity={"warmup": 0.5}), **more).can_go_on_from(state, Path("run"))
    plain = trainer(spec(), **same)
    plain.run(6)
    assert trainer(spec(), **more).can_go_on_from(plain.state(), Path("run"))


def test_the_receipt_counts_the_schedule() -> None:
    full = small_model({"kind": "loop", "steps": 3, "body": LAYER}, context=16)
    most, least = 3 * sequence_cost(full).flops, train_flops(spec())
    half, never = (train_flops(spec(capacity={"warmup": share})) for share in (0.5, 1e-6))
    assert never == pytest.approx(least, rel=1e-4)
    assert half == pytest.approx(least + (most - least) / 4, rel=0.02)
    opened = training_memory(spec(capacity={"warmup": 0.1}), 4)
    assert opened.activations > 1.2 * training_memory(spec(), 4).activations


def test_a_schedule_needs_a_router() -> None:
    tree = spec().model_dump(mode="json") | {"training": {"capacity": {}}}
    assert archdsl.load(tree).fingerprint() != spec().fingerprint()
    tree["blocks"][0]["router"] = "all"
    with pytest.raises(SpecError, match=r"training.capacity: needs a router that selects fewer"):
        archdsl.load(tree)
