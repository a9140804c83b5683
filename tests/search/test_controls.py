"""The controls do without thinking what the winner does with it, at the same price."""

import pytest

import archdsl
from archdsl.cost import sequence_cost
from archdsl.search.controls import FLOPS_TWIN, PARAMS_TWIN, RANDOM_TWIN, controls
from archdsl.spec import ModelSpec


@pytest.mark.parametrize("name", ["itt", "loop", "mor", "hybrid", "tiny"])
def test_twins_match_in_what_they_are_named_after(name: str) -> None:
    winner = archdsl.load(name)
    found = controls(winner)
    # step encodings, routers: what only thinking has
    assert sequence_cost(found[PARAMS_TWIN]).params == pytest.approx(
        sequence_cost(winner).params, rel=0.03
    )
    layer = sequence_cost(winner).flops / len(winner.canonical().blocks)
    assert abs(sequence_cost(found[FLOPS_TWIN]).flops - sequence_cost(winner).flops) < layer
    for twin in (PARAMS_TWIN, FLOPS_TWIN):
        assert "loop" not in found[twin].to_yaml().replace(found[twin].name, "")


def test_random_routing_keeps_everything_but_the_choice() -> None:
    winner = archdsl.load("itt", overrides=["blocks.0.body.1.router.kind=prefix"])
    random = controls(winner)[RANDOM_TWIN]
    assert random.to_yaml().count("kind: random") == 1
    assert (
        random.fingerprint() == winner.patch("blocks.0.body.1.router.kind", "random").fingerprint()
    )


def test_a_plain_winner_needs_no_twin() -> None:
    assert controls(archdsl.load("transformer")) == {}


def test_per_step_weights_are_matched_by_layers() -> None:
    winner = archdsl.load("loop", overrides=["blocks.0.body.1.parameters=per_step"])
    assert sequence_cost(controls(winner)[PARAMS_TWIN]).params == sequence_cost(winner).params


def test_nested_loops_are_taken_apart() -> None:
    tiny = archdsl.load("tiny")
    nested = tiny.patch(
        "blocks.1.body",
        {"kind": "loop", "steps": 2, "body": {"kind": "layer", "attention": {"head_size": 16}}},
    )
    assert isinstance(nested, ModelSpec)
    assert [block.kind for block in controls(nested)[PARAMS_TWIN].blocks] == ["layer", "layer"]  # type: ignore[attr-defined]
