"""The LLaMA pair against its definition."""

from __future__ import annotations

from typing import Any

import pytest

from archdsl.blocks.layer import LayerSpec
from archdsl.blocks.norm import NormSpec
from tests import naive

ATTENTION = {"head_size": 2}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm": "layer"},
        {"norm_place": "post"},
        {"norm_place": "sandwich"},
        {"norm_place": "pre_post", "norm": "layer"},
        {"attention": {"head_size": 2, "queries_per_kv": 3, "window": 3}},
        {"attention": {"kind": "feed_forward", "hidden": 3}},
        {"ffn": {"kind": "attention", "head_size": 6}},
        {"ffn": {"hidden": 3, "activation": "gelu"}},
    ],
    ids=str,
)
def test_agrees_with_the_definition(fields: dict[str, Any]) -> None:
    naive.agrees(LayerSpec(**{"attention": ATTENTION, "ffn": {"hidden": 5}} | fields), 6)


def test_a_word_stands_for_a_kind() -> None:
    assert LayerSpec.model_validate({"attention": "norm"}).attention == NormSpec()
