"""How a step joins the ones before it, as equations of the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from archdsl.blocks.loop import LoopSpec
from archdsl.blocks.modules.loop import BodyLoop
from archdsl.blocks.modules.step_encoding import Scale
from archdsl.blocks.residual_thinking import DeltaSpec, OverwriteSpec, ResidualSpec, ThinkingSpec
from archdsl.nn.block import Context
from tests import naive

x, y, phi, gate = (torch.tensor([[[v]]]) for v in (2.0, 5.0, 0.5, 3.0))


@pytest.mark.parametrize(
    ("spec", "selected", "not_selected"),
    [
        (ThinkingSpec(), 2 + 0.5 * 3 * 5, 2),
        (ThinkingSpec(unselected="literal"), 2 + 0.5 * 3 * 5, 2 + 0.5 * 2),
        (OverwriteSpec(), 0.5 * 3 * 5, 2),
        (DeltaSpec(), 2 + 0.5 * 3 * (5 - 2), 2),
    ],
)
def test_is_its_equation(spec: ResidualSpec, selected: float, not_selected: float) -> None:
    def scale(value: Tensor) -> Tensor:
        return phi * value

    assert spec.join(x, y, gate[:, :, 0], scale).item() == selected
    assert spec.rest(x, scale).item() == not_selected
    assert spec.join(x, y, None, scale).item() == spec.join(x, y, gate[:, :, 0] / 3, scale).item()


def test_thinking_with_every_token_is_the_sum_of_all_steps() -> None:
    """x(t) = sum over i of f(x(i-1)) * phi(i): residual thinking connections, equation of RTC."""
    loop = built(residual="thinking", encoding="scale")
    assert isinstance(loop.encoding, Scale)
    x_BTD = naive.stream(2, 7, 4)
    summed = loop.bodies[0](x_BTD, Context()) * loop.encoding.phi_SD[0]
    for step in (1, 2):
        summed = summed + loop.bodies[0](summed, Context()) * loop.encoding.phi_SD[step]
    torch.testing.assert_close(loop(x_BTD, Context()), summed)


def test_with_further_phi_at_zero_a_model_starts_as_its_plain_backbone() -> None:
    fields = {"router": {"kind": "prefix"}, "encoding": {"kind": "scale", "init": 0.0}}
    loop = built(residual="thinking", **fields)
    loop.encoding.reset(torch.Generator(), 1)
    x_BTD = naive.stream(2, 7, 4)
    torch.testing.assert_close(loop(x_BTD, Context()), loop.bodies[0](x_BTD, Context()))


def built(**fields: Any) -> BodyLoop:
    body = {"kind": "feed_forward", "hidden": 3}
    loop = LoopSpec.model_validate({"steps": 3, "body": body} | fields).build(4)
    assert isinstance(loop, BodyLoop)
    naive.randomise(loop)
    return loop
