"""What tells the steps apart, and how it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.blocks.modules.step_encoding import Encoding
from archdsl.blocks.step_encoding import AddSpec, ScaleSpec

X = torch.tensor([[[1.0, -2.0, 3.0]]])


def test_scale_multiplies_the_result_by_the_vector_of_the_step() -> None:
    encoding = ScaleSpec().build(3, 4, 1.0)
    torch.nn.init.normal_(encoding.phi_SD)
    torch.testing.assert_close(encoding.after(X, 2), X * encoding.phi_SD[2])
    assert encoding.before(X, 2) is X


def test_add_adds_the_vector_of_the_step_to_the_input() -> None:
    encoding = AddSpec().build(3, 4, 1.0)
    torch.nn.init.normal_(encoding.e_SD)
    torch.testing.assert_close(encoding.before(X, 2), X + encoding.e_SD[2])
    assert encoding.after(X, 2) is X


def test_none_changes_nothing() -> None:
    assert Encoding().before(X, 1) is X
    assert Encoding().after(X, 1) is X


@pytest.mark.parametrize(
    ("residual", "encoding", "starts"),
    [
        ("overwrite", {}, [1.0, 1.0, 1.0]),
        ("delta", {}, [1.0, 1.0, 1.0]),
        ("thinking", {}, [1.0, 0.5, 0.5]),
        ("thinking", {"init": 0.0}, [1.0, 0.0, 0.0]),
        ("overwrite", {"first": 2.0, "init": -0.1}, [2.0, -0.1, -0.1]),
    ],
)
def test_scale_starts_where_the_residual_wants_it(
    residual: str, encoding: dict[str, Any], starts: list[float]
) -> None:
    loop = LoopSpec.model_validate(
        {
            "steps": 3,
            "residual": residual,
            "encoding": {"kind": "scale"} | encoding,
            "body": {"kind": "norm"},
        }
    ).build(5)
    assert isinstance(loop, BodyLoop)
    loop.encoding.reset(torch.Generator(), 1)
    want = torch.tensor(starts).unsqueeze(1).expand(3, 5)
    torch.testing.assert_close(loop.encoding.phi_SD.data, want)


def test_add_starts_small_and_different_at_every_step() -> None:
    encoding = AddSpec(std=0.3).build(1000, 4, 1.0)
    encoding.reset(torch.Generator().manual_seed(0), 1)
    torch.testing.assert_close(encoding.e_SD.std(1), torch.full((4,), 0.3), rtol=0.1, atol=0)
    assert not encoding.e_SD[0].equal(encoding.e_SD[1])
