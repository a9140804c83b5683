"""Norms against their definitions."""

from __future__ import annotations

import pytest
import torch

from archdsl.blocks.norm import EPS, NormSpec, NormType
from archdsl.nn.block import Context
from tests import naive


@pytest.mark.parametrize("type", ["rms", "layer"])
def test_agrees_with_the_definition(type: NormType) -> None:
    naive.agrees(NormSpec(type=type), 7)


@pytest.mark.parametrize("type", ["rms", "layer"])
def test_starts_with_a_gain_of_one_and_no_bias(type: NormType) -> None:
    module = NormSpec(type=type).build(64)
    module.reset(torch.Generator(), 1)
    y = module(torch.randn(2, 3, 64) * 50, Context())
    torch.testing.assert_close((y**2).mean(-1), torch.ones(2, 3), rtol=1e-3, atol=1e-3)


def test_zeros_stay_zeros() -> None:
    module = NormSpec().build(4)
    assert module(torch.zeros(1, 1, 4), Context()).tolist() == [[[0.0] * 4]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_gradients_is_what_torch_makes_of_it(dtype: torch.dtype) -> None:
    module = NormSpec().build(48).to(dtype)
    torch.nn.init.normal_(module.norm.weight)
    x_BTD = torch.randn(2, 3, 48, dtype=dtype) * torch.logspace(-6, 6, 6).view(2, 3, 1).to(dtype)
    want = torch.nn.functional.rms_norm(x_BTD, (48,), module.norm.weight, EPS)
    torch.testing.assert_close(module(x_BTD, Context()), want)
