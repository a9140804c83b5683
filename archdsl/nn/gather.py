"""Taking tokens out of a stream by their places, and putting them back.

Shapes: B batch, T tokens, K selected tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(x_BTD: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens at the places ``index_BK`` of each row, [B, K, D].

    index_select over flattened rows is the fastest gather.
    """
    B, T, D = x_BTD.shape
    return x_BTD.reshape(B * T, D).index_select(0, _flat(index_BK, T)).view(B, -1, D)


def put(x_BTD: Tensor, index_BK: Tensor, new_BKD: Tensor) -> Tensor:
    """A copy of ``x_BTD`` with the tokens at ``index_BK`` replaced; the places must be distinct.

    index_copy is a little faster, but keeps the new tokens for the backward pass.
    """
    B, T, D = x_BTD.shape
    flat = x_BTD.reshape(B * T, D).index_put((_flat(index_BK, T),), new_BKD.reshape(-1, D))
    return flat.view(B, T, D)


def _flat(index_BK: Tensor, T: int) -> Tensor:
    rows_B1 = torch.arange(len(index_BK), device=index_BK.device).unsqueeze(1)
    return (index_BK + rows_B1 * T).flatten()
