"""Taking tokens out of a stream by their places, and putting them back.

Shapes: B batch, T tokens, K selected tokens, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


def take(x_BTD: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens at the places ``index_BK`` of each row, [B, K, D].

    index_select over flattened rows is the fastest gather.
    """
    B, T, D = x_BTD.shape
    if _single(T, index_BK):
        return x_BTD
    return x_BTD.reshape(B * T, D).index_select(0, _flat(index_BK, T)).view(B, -1, D)


def put(x_BTD: Tensor, index_BK: Tensor, new_BKD: Tensor) -> Tensor:
    """A copy of ``x_BTD`` with the tokens at ``index_BK`` replaced; the places must be distinct.

    index_copy is a little faster, but keeps the new tokens for the backward pass.
    """
    B, T, D = x_BTD.shape
    if _single(T, index_BK):
        return new_BKD
    flat = x_BTD.reshape(B * T, D).index_put((_flat(index_BK, T),), new_BKD.reshape(-1, D))
    return flat.view(B, T, D)


def split(x_BTD: Tensor, index_BK: Tensor) -> tuple[Tensor, Left]:
    """As `take`, and what is left: to be given to `join`, and to nothing else.

    The gradient of all tokens then takes one copy: `join` hands it on as it is, also at the places
    that were replaced, and here these are replaced by the gradient of the taken tokens.
    """
    B, T, D = x_BTD.shape
    x_ND, index = x_BTD.reshape(B * T, D), _flat(index_BK, T)
    if torch.is_grad_enabled():
        x_KD, left_ND = _Split.apply(x_ND, index)  # type: ignore[no-untyped-call]
    else:
        x_KD, left_ND = x_ND.index_select(0, index), x_ND
    return x_KD.view(B, -1, D), Left(left_ND, index, B)


def join(left: Left, new_BKD: Tensor) -> Tensor:
    """As `put`, at the places that `split` took the tokens from."""
    new_KD = new_BKD.reshape(-1, new_BKD.size(-1))
    if torch.is_grad_enabled():
        joined = cast(Tensor, _Join.apply(left.x_ND, left.places, new_KD))  # type: ignore[no-untyped-call]
    else:
        joined = left.x_ND.index_put((left.places,), new_KD)
    return joined.view(left.rows, -1, joined.size(-1))


class Left(NamedTuple):
    """What `split` leaves: the tokens of all ``rows``, and the ``places`` of those that it took."""

    x_ND: Tensor
    places: Tensor
    rows: int


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        return x_ND.index_select(0, index), x_ND.view_as(x_ND)

    @staticmethod
    def backward(ctx: Any, taken: Tensor, rest_ND: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return rest_ND.index_copy(0, index, taken), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest_ND: Tensor, index: Tensor, new: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return rest_ND.index_copy(0, index, new)

    @staticmethod
    def backward(ctx: Any, slope_ND: Tensor) -> tuple[Tensor, None, Tensor]:
        (index,) = ctx.saved_tensors
        return slope_ND, None, slope_ND.index_select(0, index)


def pick(numbers_BT: Tensor, index_BK: Tensor) -> Tensor:
    """The numbers at the places ``index_BK`` of each row, [B, K]; of a single place, as given."""
    if _single(numbers_BT.size(1), index_BK):
        return numbers_BT
    return numbers_BT.expand(len(index_BK), -1).gather(1, index_BK)


def _single(T: int, index_BK: Tensor) -> bool:
    """Whether a decoder takes the only token that there is. Training has no such shortcut, so that
    its memory follows one formula."""
    return T == index_BK.size(1) == 1 and not torch.is_grad_enabled()


def _flat(index_BK: Tensor, T: int) -> Tensor:
    rows_B1 = torch.arange(len(index_BK), device=index_BK.device).unsqueeze(1)
    return torch.add(index_BK, rows_B1, alpha=T).flatten()
