"""Stacks: in order, each copy with weights of its own."""

from __future__ import annotations

from archdsl.blocks.feed_forward import FeedForwardSpec
from archdsl.blocks.layer import LayerSpec
from archdsl.blocks.norm import NormSpec
from archdsl.blocks.stack import StackSpec
from tests import naive

MIXED = [
    {"kind": "layer", "attention": {"head_size": 2}, "ffn": {"hidden": 3}},
    {"kind": "norm", "type": "layer"},
    {"kind": "stack", "repeat": 2, "body": [{"kind": "feed_forward", "hidden": 2}]},
]


def spec(**fields: object) -> StackSpec:
    return StackSpec.model_validate({"body": MIXED} | fields)


def test_agrees_with_the_definition() -> None:
    naive.agrees(spec(repeat=2), 4)


def test_copies_share_nothing() -> None:
    parameters = list(spec(repeat=3).build(4).parameters())
    once = list(spec().build(4).parameters())
    assert len(parameters) == 3 * len(once)
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


def test_means_its_blocks_one_after_the_other() -> None:
    norm, ffn = NormSpec(type="layer"), FeedForwardSpec(hidden=2)
    layer = LayerSpec.model_validate(MIXED[0])
    assert spec(repeat=2).unrolled() == (layer, norm, ffn, ffn) * 2
