"""Feed-forward against its definition, and how its size is said."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import ValidationError

from archdsl.blocks.feed_forward import FeedForwardSpec
from tests import naive


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("hidden", [1, 5])
def test_agrees_with_the_definition(activation: Literal["swiglu", "gelu"], hidden: int) -> None:
    naive.agrees(FeedForwardSpec(hidden=hidden, activation=activation), 7)


@pytest.mark.parametrize(
    ("fields", "dim", "hidden"),
    [
        ({"hidden": 33}, 8, 33),
        ({}, 12, 32),  # 8/3 * 12
        ({}, 1024, 2752),  # 8/3 * 1024 = 2730.67
        ({"ratio": 4.0}, 8, 32),
        ({"ratio": 4.1}, 8, 64),
        ({"ratio": 4.01}, 8, 64),  # 32.08 is above 32
        ({"ratio": 2.7}, 1000, 2720),  # 2.7 * 1000 is 2700.0000000000005
        ({"ratio": 1.1}, 1600, 1760),  # 55.00000000000001 times 32
        ({"ratio": 0.01}, 8, 32),
        ({"ratio": 1e-12}, 8, 32),
    ],
    ids=str,
)
def test_a_ratio_is_rounded_up_to_32s(fields: dict[str, Any], dim: int, hidden: int) -> None:
    assert FeedForwardSpec(**fields).hidden_size(dim) == hidden
    assert FeedForwardSpec(**fields).build(dim).up.out_features == hidden


@pytest.mark.parametrize("ratio", [0.0, -1.0, 65.0, float("nan"), float("inf")])
def test_rejects_a_ratio_that_is_no_size(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        FeedForwardSpec(ratio=ratio)
