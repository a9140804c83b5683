"""The block keeps the contract of archdsl, and computes what its formula says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from archdsl_short_conv import ShortConvSpec

from archdsl.nn.block import Context
from archdsl.testing import checks, randomise

CHECKS = checks("short_conv")


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_keeps_the_contract(check: Callable[[], None]) -> None:
    check()


def test_computes_its_formula_token_by_token() -> None:
    block = ShortConvSpec(kernel=3).build(4)
    randomise(block)
    x_TD = torch.randn(6, 4, dtype=torch.float64)
    products, wanted = [], []
    for x_D in x_TD:
        a_D, b_D, c_D = (block.project.weight @ x_D).chunk(3)
        products.append(a_D * b_D)
        last = products[-3:]
        mixed_D = sum(p * tap for p, tap in zip(last, block.taps_KD[-len(last) :], strict=True))
        wanted.append(block.out.weight @ (c_D * mixed_D))
    torch.testing.assert_close(block(x_TD.unsqueeze(0), Context())[0], torch.stack(wanted))
