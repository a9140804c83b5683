"""Taking tokens out of a stream and putting others in their places, with gradients."""

from __future__ import annotations

import torch

from archdsl.nn.gather import join, put, split, take


def test_split_and_join_have_the_gradients_of_take_and_put() -> None:
    x_BTD = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    index_BK = torch.stack([torch.randperm(7)[:5] for _ in range(3)])
    taken_BKD, left = split(x_BTD, index_BK)
    found_BTD = join(left, taken_BKD.exp() + taken_BKD)
    same_BKD = take(x_BTD, index_BK)
    wanted_BTD = put(x_BTD, index_BK, same_BKD.exp() + same_BKD)
    assert torch.equal(taken_BKD, same_BKD)
    assert torch.equal(found_BTD, wanted_BTD)
    slope_BTD = torch.randn_like(found_BTD)
    found, wanted = (torch.autograd.grad(y, x_BTD, slope_BTD)[0] for y in (found_BTD, wanted_BTD))
    torch.testing.assert_close(found, wanted)


def test_without_gradients_nothing_of_the_stream_is_changed() -> None:
    x_BTD, index_BK = torch.randn(2, 5, 3), torch.tensor([[0, 3], [4, 1]])
    before_BTD = x_BTD.clone()
    with torch.no_grad():
        taken_BKD, left = split(x_BTD, index_BK)
        found_BTD = join(left, 2 * taken_BKD)
    assert torch.equal(x_BTD, before_BTD)
    assert torch.equal(found_BTD, put(x_BTD, index_BK, 2 * take(x_BTD, index_BK)))
