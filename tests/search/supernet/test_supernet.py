"""Super-nets: what a setting of one is, how it is trained, and the space that nets can serve."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from archdsl.costs.receipt import sequence_cost
from archdsl.lang.load import fitted, load, read
from archdsl.lang.source import Tree, parse
from archdsl.lang.spec import Budget, ModelSpec
from archdsl.lang.template import Choice, Distribution, fill, fill_some, find, find_fit
from archdsl.model.build import build
from archdsl.model.compute_meter import metered
from archdsl.search.analysis.supernet_validation import (
    SupernetPoint,
    SupernetValidation,
    supernet_points,
)
from archdsl.search.space.enumerate import point_from, points
from archdsl.search.space.optuna_space import starting_points
from archdsl.search.stats.paired import kendall_tau
from archdsl.search.study.trial import Trial
from archdsl.search.supernet.layouts import (
    LAYOUT,
    SupernetError,
    dial_leaves,
    layouts,
    restrict,
    supernet_space,
)
from archdsl.search.supernet.supernet import (
    SandwichTrainer,
    Supernet,
    build_net,
    calibrate_routers,
    dial,
    setting_of,
    with_setting,
)
from archdsl.search.supernet.supernet_job import SupernetJob, routed_names
from archdsl.search.trials.proxy import Proxy, Task
from archdsl.training.trainer import Trainer

LAYER: dict[str, Any] = {"kind": "layer", "attention": {"head_size": 8}, "ffn": {"hidden": 24}}
TASK = Task(
    data="skill:p-hop,hops=1,length=12", context=12, batch_size=4, rungs=(4,), eval_tokens=240
)
V = TASK.load().vocab_size
SPACE = """
name: small
vocab_size: 300
context: 64
dim: {fit: {multiple_of: 16, default: 32}}
budget: {params: 60k}
blocks:
  - &layer {kind: layer, attention: {head_size: 16}, ffn: {ratio: 2}}
  - search:
      default: itt
      choices:
        plain: *layer
        itt:
          kind: loop
          steps: {search: {choices: [1, 3], default: 3}}
          router:
            kind: {search: {choices: [prefix, random], default: prefix}}
            capacity: [{search: {choices: [0.5, 1.0], default: 0.5}}, 0.4]
          body: *layer
"""
LAYER_TEXT = "{kind: layer, attention: {head_size: 16}, ffn: {ratio: 2}}"


def loop(steps: int, capacity: Any, router: str = "prefix", **fields: Any) -> dict[str, Any]:
    by = {"kind": router, "capacity": capacity, **fields.pop("routed", {})}
    slots = {"residual": "thinking", "encoding": "scale", "body": LAYER}
    return {"kind": "loop", "steps": steps, "router": by} | slots | fields


def model(*blocks: dict[str, Any]) -> ModelSpec:
    whole = {"name": "m", "vocab_size": V, "context": 12, "dim": 16, "blocks": list(blocks)}
    return ModelSpec.model_validate(whole)


def net_of(router: str = "prefix") -> Supernet:
    """Two loops, one of them in a stack."""

    def one(a: int, b: int, first: list[float], second: list[float]) -> ModelSpec:
        stack = {"kind": "stack", "repeat": 2, "body": [LAYER, loop(b, second, router)]}
        return model(loop(a, first, router), stack)

    return Supernet.of(
        [
            one(2, 2, [0.5, 0.5], [0.6, 0.5]),
            one(3, 3, [1.0, 1.0], [1.0, 1.0]),
            one(3, 2, [0.8, 0.6], [0.4, 0.9]),
            one(2, 3, [0.4, 0.4], [0.7, 0.3]),
            one(1, 1, [0.3, 0.3], [0.3, 0.3]),
        ]
    )


def sandwich_trainer(net: Supernet, seed: int = 0) -> SandwichTrainer:
    return SandwichTrainer(net, build_net(net, seed), TASK.load(), TASK.config(seed))


# nets


def test_a_net_has_the_most_steps_and_a_router_wherever_one_is_needed() -> None:
    net = net_of()
    assert setting_of(net.spec) == ((3, (0.8, 0.6)), (3, (0.7, 0.3)))
    assert net.settings[:2] == (
        ((3, (1.0, 1.0)), (3, (1.0, 1.0))),
        ((1, ()), (1, ())),
    )
    assert all(net.serves(with_setting(net.spec, one)) for one in net.settings)
    assert not net.serves(net.spec.model_copy(update={"dim": 32}))
    assert not net.serves(model(loop(3, [0.8, 0.6]), LAYER))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router": "threshold"},
        {"router": "random"},
        {"routed": {"nested": True}},
        {"parameters": "per_step"},
        {"parameters": {"lora": {"rank": 2}}},
        {"kv": "shared"},
        {"full_steps": 0},
    ],
)
def test_a_net_at_a_setting_is_the_model_of_the_same_weights(fields: dict[str, Any]) -> None:
    def made(steps: int, *capacity: float) -> ModelSpec:
        return model({"kind": "stack", "repeat": 2, "body": [loop(steps, [*capacity], **fields)]})

    drawn = made(2, 0.6, 0.4)
    net = Supernet.of([drawn, made(3, 0.9, 0.5, 0.5), made(1, 0.3, 0.3)])
    big, own = build(net.spec).double().eval(), build(drawn, seed=1).double().eval()
    weights = big.state_dict()
    own.load_state_dict({k: weights[k][: len(mine)] for k, mine in own.state_dict().items()})
    tokens_BT = torch.arange(24).view(2, 12) * 7 % V
    dial(big, setting_of(drawn))
    assert big(tokens_BT).equal(own(tokens_BT))
    dial(big, net.settings[0])
    assert not big(tokens_BT).allclose(own(tokens_BT))


def test_a_step_adds_up_the_gradients_of_its_settings() -> None:
    net = net_of()
    trainer = sandwich_trainer(net)
    trainer.step = 5
    settings = net.sandwich(5, 0)
    assert settings[-2:] == [net.settings[1], net.settings[0]]
    assert len(set(settings)) == 4
    assert settings != net.sandwich(6, 0)
    batch = trainer.data.batch(5, 4, 12, 0)
    model = trainer.model.double().train()
    plain = Trainer(model, TASK.load(), TASK.config(0))
    total: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    for one in settings:
        dial(model, one)
        losses.append(plain.backward(batch))
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                total[name] = total.get(name, torch.zeros(())) + weight.grad
    assert trainer.backward(batch) == pytest.approx(sum(losses) / 4, rel=1e-12)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, total[name], rtol=1e-9, atol=1e-12)


def test_a_net_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = (sandwich_trainer(net_of("threshold")) for _ in range(3))
    whole.run(4)
    first.run(2)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    second.run(4)
    for name, tensor in whole.model.state_dict().items():
        assert tensor.equal(second.model.state_dict()[name]), name


@pytest.mark.parametrize("router", ["threshold", "top_k", "predictor"])
def test_a_table_of_scores_is_learned_anew_for_the_setting_that_is_scored(router: str) -> None:
    low, high = (model(loop(2, share, router)) for share in (0.3, 0.8))
    trainer = sandwich_trainer(Supernet.of([low, high]))
    trainer.run(4)
    table_RQ = trainer.model.routers[0].get_buffer("quantiles_RQ")

    def taken(spec: ModelSpec, known: float) -> float:
        table_RQ.fill_(known)
        dial(trainer.model, setting_of(spec))
        calibrate_routers(trainer)
        with metered(trainer.model) as meter, trainer.model.causal_routing():
            trainer.evaluate()
        return meter.shares["blocks.0.0"]

    assert 0.1 < taken(low, 99) <= 0.3
    assert 0.6 < taken(high, 99) <= 0.8
    of_high = table_RQ.clone()
    assert taken(low, 99) == taken(low, -99)
    assert table_RQ.equal(of_high)  # of the first step, which no capacity is before


# spaces


def test_dial_leaves_stand_nowhere_but_in_steps_and_capacities() -> None:
    assert {name.rpartition("]")[2] for name in dial_leaves(read("search"))} == {
        ".steps",
        ".router.capacity.0",
        ".router.capacity.1",
        ".router.capacity.2",
    }
    tied = """
    blocks:
      - kind: stack
        repeat: {search: {choices: [1, 2], default: 1, name: both}}
        body:
          - kind: loop
            steps: {search: {choices: [1, 2], default: 1, name: both}}
            full_steps: {search: {choices: [0, 1], default: 1}}
            router: {search: {default: a, choices: {
              a: {kind: prefix, capacity: {search: {low: 0.1, high: 1.0, default: 0.1}}},
              b: {kind: prefix, alpha: {search: {low: 0.1, high: 1.0, default: 0.1}}}}}}
      - {kind: other, steps: {search: {choices: [1, 2], default: 1}}}
    """
    assert dial_leaves(parse(tied)) == {"blocks.0.body.0.router[a].capacity"}


def values(tree: Tree, every: list[dict[str, Any]]) -> set[str]:
    return {json.dumps(fill_some(tree, point).value) for point in every}


def test_a_restricted_space_has_the_points_of_its_layouts_and_no_others() -> None:
    tree = parse(SPACE)
    dials = dial_leaves(tree)
    found = layouts(tree, 10, seed=0)
    assert found == [
        {"blocks.1": "itt", "blocks.1[itt].router.kind": "prefix"},
        {"blocks.1": "plain"},
        {"blocks.1": "itt", "blocks.1[itt].router.kind": "random"},
    ]
    assert layouts(tree, 2, seed=0) == found[:2]
    space = restrict(tree, found[1:])
    assert set(find(space)) == {LAYOUT, *dials}
    wanted = [
        point
        for point in points(tree, 100, 0)
        if {name: value for name, value in point.items() if name not in dials} in found[1:]
    ]
    assert len(wanted) == 5
    assert values(space, points(space, 100, 0)) == values(tree, wanted)
    assert values(restrict(tree, found), points(restrict(tree, found), 100, 0)) == values(
        tree, points(tree, 100, 0)
    )


def test_a_restricted_space_is_searched_as_any_other() -> None:
    tree = parse(SPACE, "small.yaml")
    space = restrict(tree, layouts(tree, 3, seed=0))
    labels = [point[LAYOUT] for point in starting_points(space)]
    assert labels == ["0: layer + layer x3 prefix .5/.4 overwrite", "1: 2x layer", labels[2]]
    filled = fill(space, lambda name, distribution: distribution.default)
    assert fitted(filled) == fitted(fill(tree, lambda name, distribution: distribution.default))
    assert str(filled.position(("dim",))) == "small.yaml:5:6"
    assert find_fit(space) is not None


@pytest.mark.parametrize("budget", [None, Budget(params=30_000_000)], ids=["162M", "30M"])
def test_every_draw_of_the_default_space_is_a_setting_of_its_net(
    budget: Budget | None, tmp_path: Path
) -> None:
    """Also where the budget gives the models of a layout several widths."""
    task = TASK.model_copy(update={"batch_size": 1})
    proxy = Proxy(dim=32, head_size=8, tasks={"skill": task})
    space, scorer = supernet_space(read("search"), proxy, tmp_path, seed=0, count=5)
    rng, named = Random(0), 0
    tokens_BT = torch.arange(12).unsqueeze(0) % V
    for _ in range(12):
        point = point_from(space, lambda _, distribution: drawn(rng, distribution))
        work = scorer.job(fitted(fill_some(space, point), budget), point, "skill", 0)
        net, own = build_net(work.net, 0).eval(), build(work.spec.canonical()).eval()
        dial(net, setting_of(work.spec))
        with torch.no_grad():
            net(tokens_BT), own(tokens_BT)
        names = routed_names(net, work.spec)
        assert list(names) == list(own.router_shares())
        assert set(names.values()) <= set(net.router_shares())
        named += len(names)
    assert named > 12


def drawn(rng: Random, distribution: Distribution) -> Any:
    return rng.choice(
        list(distribution.choices if isinstance(distribution, Choice) else distribution.values())
    )


@pytest.mark.parametrize(("dim", "ffn"), [(None, "ratio: 2"), (16, "hidden: 48")])
def test_a_net_is_as_wide_as_the_model_that_it_scores(
    dim: int | None, ffn: str, tmp_path: Path
) -> None:
    proxy = Proxy(dim=dim, tasks={"skill": TASK})
    space, scorer = supernet_space(parse(SPACE.replace("ratio: 2", ffn)), proxy, tmp_path, 0, 1)
    point = starting_points(space)[0]
    spec = fitted(fill_some(space, point), Budget(params=100_000))
    work = scorer.job(spec, point, "skill", 0)
    assert spec.dim > 32  # the default
    assert work.spec == proxy.shrink(spec, TASK)
    assert work.net.serves(work.spec)


def test_a_model_of_other_shapes_than_its_net_is_refused(tmp_path: Path) -> None:
    fit = "{fit: {multiple_of: 16, default: 32}}"
    tree = SPACE.replace(f"dim: {fit}", "dim: 32").replace("ratio: 2", f"hidden: {fit}")
    tree = tree.replace("&layer", "", 1).replace("*layer", LAYER_TEXT)
    proxy = Proxy(dim=16, tasks={"skill": TASK})
    space, scorer = supernet_space(parse(tree), proxy, tmp_path, 0, 1)
    point = starting_points(space)[0]
    with pytest.raises(SupernetError, match="let `fit` solve for dim"):
        scorer.job(fitted(fill_some(space, point), Budget(params=100_000)), point, "skill", 0)


# scores


def test_a_net_is_trained_once_for_all_of_its_settings(tmp_path: Path) -> None:
    net = net_of("threshold")

    def score(folder: str, one: int) -> Any:
        spec = with_setting(net.spec, net.settings[one])
        return SupernetJob(tmp_path / folder, spec, TASK, TASK.load(), 0, 4, net=net).run(
            lambda: None
        )

    first, second, again = score("a", 2), score("a", 3), score("a", 2)
    forward = {one: forward_flops(with_setting(net.spec, one)) for one in net.settings}
    passes = sum(forward[one] for step in range(4) for one in net.sandwich(step, 0))
    assert first.train_flops == 3 * TASK.batch_size * passes
    assert (first.reused, second.reused, again.reused) == (False, False, True)
    assert second.train_flops == 0 < second.eval_flops
    assert again.loss == first.loss
    other = [score("b", 3), score("b", 2)]  # whoever comes first
    assert [s.loss for s in other] == [second.loss, first.loss]
    assert [s.train_flops for s in other] == [first.train_flops, 0]
    assert other[1].shares == first.shares
    assert len(list((tmp_path / "a").iterdir())) == 1


def forward_flops(spec: ModelSpec) -> int:
    sequence_BT = TASK.load().batch(0, 1, 12, 0).tokens_BT
    return sequence_cost(spec, tokens=sequence_BT.size(1)).flops


def test_the_proof_is_of_models_spread_over_the_losses() -> None:
    spec = load("tiny")

    def trial(number: int, loss: float, flops: float) -> Trial:
        values = {"loss": loss, "flops": flops}
        return Trial(
            number,
            {},
            spec_yaml=spec.to_yaml(),
            fingerprint=str(number),
            outcome="complete",
            values=values,
        )

    losses = [1.0, 1.1, 1.2, 3.0, 2.0, 2.9, 2.1]
    trials = [trial(i, loss, flops=3 - i if i < 3 else 9) for i, loss in enumerate(losses)]
    trials += [trial(0, 1.0, 3)]
    # three are on the front, of which two: the lowest, and the farthest from it
    assert [one.number for one in supernet_points(trials, 4)] == [0, 2, 3, 6]
    assert len(supernet_points(trials)) == 7


def test_the_proof_says_what_it_found() -> None:
    points = [SupernetPoint(i, loss=i, own_loss=i**2, flops=2e9) for i in range(8)]
    tau = kendall_tau([(p.loss, p.own_loss) for p in points])
    said = SupernetValidation(tau, points, settings=40, shared_flops=5e9).sentence()
    assert said.startswith("The supernets rank models as separate trainings do")
    assert "took 5e+09 FLOPs for 40 models, 2.5 times the cost of training one separately" in said
    assert "not tested" in SupernetValidation(kendall_tau([]), [], 40, 5e9).sentence()
