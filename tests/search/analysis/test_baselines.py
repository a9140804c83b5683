"""A baseline is a plain model of the same cost as the winner; an ablation is the winner without one
of its parts."""

import pytest
from hypothesis import given, settings

import archdsl
from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.residual_thinking import OverwriteSpec
from archdsl.costs.receipt import sequence_cost
from archdsl.lang.source import from_value
from archdsl.lang.spec import ModelSpec, Part, parse_spec, to_tree, walk
from archdsl.model.build import meta_model
from archdsl.search.analysis.baselines import (
    EQUAL_FLOPS,
    EQUAL_FLOPS_LOOP,
    EQUAL_PARAMS,
    RANDOM_ROUTING,
    ablations,
    baselines,
    compared_specs,
    distinct,
    plain_baseline,
)
from tests.strategies import specs

SHIPPED = ["itt", "loop", "mod", "mor", "universal", "hybrid", "tiny", "transformer"]


def loops(spec: ModelSpec) -> list[LoopSpec]:
    return [part for _, part in walk(spec) if isinstance(part, LoopSpec)]


def slots(spec: ModelSpec) -> int:
    """Parameters that only thinking has: those of the slots of loops."""

    def bare(part: Part) -> Part:
        part = part.with_each(bare)
        if not isinstance(part, LoopSpec):
            return part
        names = ("router", "encoding", "injection", "norm", "exit")
        empty = dict.fromkeys(names) | {"residual": OverwriteSpec()}
        own = {} if isinstance(part.parameters, str) else {"parameters": "shared"}
        return part.model_copy(update=empty | own)

    blocks = tuple(bare(block) for block in spec.blocks)
    params = sequence_cost(spec.model_copy(update={"blocks": blocks})).params
    return sequence_cost(spec).params - params


@pytest.mark.parametrize("name", ["itt", "loop", "mor", "hybrid", "tiny", "mod", "universal"])
def test_baselines_match_in_what_they_are_named_after(name: str) -> None:
    winner = archdsl.load(name)
    found = compared_specs(winner)
    own, plain = sequence_cost(winner), found[EQUAL_PARAMS]
    params = sequence_cost(plain).params
    assert params == own.params - slots(winner) == pytest.approx(own.params, rel=0.03)
    assert sequence_cost(found[EQUAL_FLOPS_LOOP]).params == params
    layer = sequence_cost(plain).flops / len(plain.blocks)  # and its share of the head
    assert abs(sequence_cost(found[EQUAL_FLOPS]).flops - own.flops) < layer / 2
    for name in (EQUAL_PARAMS, EQUAL_FLOPS):
        assert not loops(found[name])


def test_low_rank_differences_are_paid_for_with_layers() -> None:
    lora = {"kind": "lora", "rank": 64}
    winner = archdsl.load("loop").patch("blocks.0.body.1.parameters", lora)
    own, plain = sequence_cost(winner), baselines(winner)[EQUAL_PARAMS]
    layer = sequence_cost(plain).params / len(plain.blocks)
    assert own.params > sequence_cost(plain_baseline(winner)).params + layer
    assert abs(sequence_cost(plain).params - own.params) < layer / 2


@settings(max_examples=60)
@given(specs())
def test_what_is_equal_is_so_for_any_spec(winner: ModelSpec) -> None:
    found = compared_specs(winner)
    own, plain = sequence_cost(winner), sequence_cost(plain_baseline(winner))
    if all(loop.parameters == "shared" for loop in loops(winner)):
        # a loop without a router's choice, or of one step, builds no slots
        assert own.params - slots(winner) <= plain.params <= own.params
    gap = abs(sequence_cost(found[EQUAL_PARAMS]).params - own.params)
    assert gap <= abs(plain.params - own.params)
    assert not loops(found[EQUAL_PARAMS])
    assert not loops(found[EQUAL_FLOPS])
    for loop in loops(found[EQUAL_FLOPS_LOOP]):
        bare = LoopSpec(steps=loop.steps, body=loop.body)
        assert loop == bare
    assert sequence_cost(found[EQUAL_FLOPS_LOOP]).params == plain.params
    gap = abs(sequence_cost(found[EQUAL_FLOPS_LOOP]).flops - own.flops)
    assert gap <= abs(plain.flops - own.flops)
    assert abs(sequence_cost(found[EQUAL_FLOPS]).flops - own.flops) <= abs(plain.flops - own.flops)
    for loop in loops(found[RANDOM_ROUTING]):
        assert loop.router is None or not loop.router.learned
    # scores and weights apart, which a random choice has not, the FLOPs are those of the winner
    heaviest = [sequence_cost(spec).heaviest for spec in (winner, found[RANDOM_ROUTING])]
    assert heaviest[1] <= heaviest[0]


@settings(max_examples=60)
@given(specs())
def test_all_are_valid_and_other_models_than_the_winner(winner: ModelSpec) -> None:
    found = baselines(winner) | ablations(winner)
    prints = [spec.fingerprint() for spec in (winner, *found.values())]
    assert len(set(prints)) == len(prints)
    for spec in found.values():
        assert parse_spec(from_value(to_tree(spec), spec.name)) == spec
        model = meta_model(spec)
        assert sum(p.numel() for p in model.parameters()) == sequence_cost(spec).params


@pytest.mark.parametrize("name", SHIPPED)
def test_a_loop_of_equal_flops_is_as_close_as_a_step_allows(name: str) -> None:
    winner = archdsl.load(name)
    loop, own = compared_specs(winner)[EQUAL_FLOPS_LOOP], sequence_cost(winner).flops
    for i, block in enumerate(loop.blocks):
        steps = block.steps if isinstance(block, LoopSpec) else 1
        body = block.body if isinstance(block, LoopSpec) else block
        for other in (steps - 1, steps + 1):
            if isinstance(block, LoopSpec) and other >= 1:
                changed = list(loop.blocks)
                changed[i] = LoopSpec(steps=other, body=body) if other > 1 else body
                near = loop.model_copy(update={"blocks": tuple(changed)})
                gap = abs(sequence_cost(near).flops - own)
                assert gap >= abs(sequence_cost(loop).flops - own)


def test_steps_that_are_no_whole_number_are_taken_by_some_of_the_loops() -> None:
    winner = archdsl.load("itt", overrides=["blocks.0.body.1.router.capacity=0.5"])
    baseline = compared_specs(winner)[EQUAL_FLOPS_LOOP]
    assert [loop.steps for loop in loops(baseline)] == [3, 2, 2, 2]
    assert sequence_cost(baseline).flops == pytest.approx(sequence_cost(winner).flops, rel=0.05)


def test_random_routing_keeps_everything_but_the_choice() -> None:
    winner = archdsl.load("itt", overrides=["blocks.0.body.1.router.kind=prefix"])
    random = baselines(winner)[RANDOM_ROUTING]
    assert [loop.router.kind for loop in loops(random)] == ["random"]  # type: ignore[union-attr]
    assert (
        random.fingerprint() == winner.patch("blocks.0.body.1.router.kind", "random").fingerprint()
    )


def test_a_model_has_the_ablations_of_what_it_is_made_of() -> None:
    itt = ["without router", "without residual", "without encoding"]
    assert list(ablations(archdsl.load("itt"))) == itt
    assert list(ablations(archdsl.load("mor"))) == [
        "without router",
        "without nesting",
        "without residual",
    ]
    for kv in ("shared", "last", "all"):
        shared = ablations(archdsl.load("itt", overrides=[f"blocks.0.body.1.kv={kv}"]))
        assert list(shared) == [*itt, f"without {kv} kv"]
        assert loops(shared[f"without {kv} kv"])[0].kv == "own"
    assert shared["without router"].blocks[0].body[1].router is None  # type: ignore[attr-defined]
    assert ablations(archdsl.load("transformer")) == {}


def test_the_norm_that_a_loop_ends_with_stands_before_the_head_where_the_loop_has_none() -> None:
    layer = archdsl.load("tiny").blocks[0].model_dump()
    loop = {"kind": "loop", "steps": 3, "norm": "layer", "norm_eps": 0.1, "body": layer}
    sizes = {"name": "x", "vocab_size": 9, "context": 8, "dim": 16, "final_norm": False}
    winner = ModelSpec.model_validate(sizes | {"blocks": [loop]})
    found = compared_specs(winner)
    for name in (EQUAL_PARAMS, EQUAL_FLOPS_LOOP, "without norm between passes", "without loop 1"):
        assert found[name].final_norm
        assert (found[name].norm, found[name].norm_eps) == ("layer", 0.1)
        assert sequence_cost(found[name]).params == sequence_cost(winner).params
    assert not found["without encoding"].final_norm


def test_of_several_loops_each_is_put_back_in_turn() -> None:
    winner = archdsl.load("hybrid")
    found = ablations(winner)
    for i, loop in enumerate(loops(winner)):
        rest = loops(found[f"without loop {i + 1}"])
        assert rest == [other for other in loops(winner) if other is not loop]


def test_a_plain_winner_has_no_baselines() -> None:
    assert baselines(archdsl.load("transformer")) == {}


def test_what_routes_below_a_full_pass_is_matched_by_fewer_layers() -> None:
    winner = archdsl.load("mod")
    baseline = baselines(winner)[EQUAL_FLOPS]
    assert len(baseline.blocks) < len(winner.canonical().blocks)
    assert sequence_cost(baseline).flops == pytest.approx(sequence_cost(winner).flops, rel=0.06)


def test_per_step_weights_are_matched_by_layers() -> None:
    winner = archdsl.load("loop", overrides=["blocks.0.body.1.parameters=per_step"])
    assert sequence_cost(baselines(winner)[EQUAL_PARAMS]).params == sequence_cost(winner).params
    assert "without weights per step" in ablations(winner)


def test_nested_loops_are_taken_apart() -> None:
    tiny = archdsl.load("tiny")
    nested = tiny.patch(
        "blocks.1.body",
        {"kind": "loop", "steps": 2, "body": {"kind": "layer", "attention": {"head_size": 16}}},
    )
    assert isinstance(nested, ModelSpec)
    assert [block.kind for block in baselines(nested)[EQUAL_PARAMS].blocks] == ["layer", "layer"]  # type: ignore[attr-defined]


def test_a_name_is_kept_where_it_is_another_model_for_one_of_the_tasks() -> None:
    a, b, c = (archdsl.load(name) for name in ("tiny", "loop", "mor"))
    assert distinct([{"x": a, "y": a, "z": a}, {"x": b, "y": c, "z": b}]) == ["x", "y"]
