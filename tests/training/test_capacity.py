"""The schedule of capacities, and the losses of routers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import archdsl
from archdsl.costs.receipt import sequence_cost, train_flops
from archdsl.data.loading import SkillData
from archdsl.data.skills import parse_skill
from archdsl.errors import SpecError
from archdsl.interop.hf_export import export
from archdsl.lang.spec import ModelSpec
from archdsl.lang.training import CapacitySpec
from archdsl.model.build import build
from archdsl.model.checkpoint import Checkpoint
from archdsl.model.language_model import LanguageModel
from archdsl.reports.training_memory import full_batch, saved_for_backward, training_memory
from archdsl.testing import randomise, saved_tensors, small_model, some_tokens
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


# Losses of routers


@pytest.mark.parametrize("kind", ["top_k", "prefix", "threshold", "predictor"])
def test_the_losses_of_routers_are_those_of_their_equations(kind: str) -> None:
    rule = spec(ROUTER | {"kind": kind}, router_z_loss=0.5, router_aux_loss=0.25)
    model = build(rule).train()
    randomise(model)
    seen: list[Any] = []
    model.routers[0].register_forward_hook(lambda _, given, chosen: seen.append((*given, chosen)))
    model(some_tokens(rule))
    plain = build(spec(ROUTER | {"kind": kind})).train()
    plain.double().load_state_dict(model.state_dict())
    plain(some_tokens(rule))
    for x_BTD, at, _, active_BT, chosen in seen:
        own = plain.trace.losses.get(at.name, torch.zeros(()))  # of a predictor
        wanted = by_equation(model, x_BTD, at.row, active_BT, chosen.mask(16))
        torch.testing.assert_close(model.trace.losses[at.name] - own, wanted)
    total = sum(model.trace.losses.values(), torch.zeros(()))
    (grad_RD,) = torch.autograd.grad(total, [weights(model)])
    assert grad_RD.any(1).all()
    model.eval()(some_tokens(rule))
    assert not model.trace.losses


def weights(model: LanguageModel) -> Tensor:
    weight_RD = model.routers[0].weight_RD
    assert isinstance(weight_RD, Tensor)
    return weight_RD


def by_equation(
    model: LanguageModel, x_BTD: Tensor, row: int, active_BT: Tensor | None, taken_BT: Tensor
) -> Tensor:
    losses: list[Tensor] = []
    for b, t in torch.cartesian_prod(torch.arange(len(x_BTD)), torch.arange(16)).tolist():
        if active_BT is None or active_BT[b, t]:
            score = x_BTD[b, t] @ weights(model)[row]
            odds = torch.sigmoid(score if taken_BT[b, t] else -score)
            losses.append(0.5 * score.exp().log() ** 2 - 0.25 * odds.log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "rule",
    [{"router_z_loss": 0.1}, {"router_aux_loss": 0.1}, {"router_z_loss": 1, "router_aux_loss": 1}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["top_k", "prefix", "threshold", "predictor"])
def test_what_the_losses_of_routers_save_is_counted(kind: str, rule: dict[str, Any]) -> None:
    model = spec({"kind": kind, "capacity": 0.5}, **rule)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in saved_tensors(model, 3))
    assert saved_for_backward(model, full_batch(model, 3)) == saved


def test_losses_of_routers_need_a_router_that_learns() -> None:
    tree = spec({"kind": "random"}).model_dump(mode="json") | {"training": {"router_z_loss": 0.1}}
    with pytest.raises(SpecError, match=r"router_z_loss: needs a router with learned scores"):
        archdsl.load(tree)
    assert spec(router_z_loss=0.0).fingerprint() == spec().fingerprint()
    assert spec(router_z_loss=0.1).fingerprint() != spec(router_aux_loss=0.1).fingerprint()


def test_an_export_ignores_the_rule_of_training_and_keeps_it_in_its_config(tmp_path: Path) -> None:
    rule = spec({"kind": "prefix"}, router_aux_loss=0.5, capacity={"warmup": 0.5})
    export(Checkpoint(tmp_path, build(rule).eval(), {}), tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["spec"]["training"]["router_aux_loss"] == 0.5
