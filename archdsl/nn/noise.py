"""Pseudo-random numbers that depend on positions and on nothing else.

So a token gets the same number in every pass, alone or in any batch, while decoding or all at once.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def uniform(pos_BT: Tensor, stream: int | Tensor) -> Tensor:
    """A number in [0, 1) for each position, by two rounds of multiply and xor-shift.

    ``stream``: selects one of 2**20 independent series; a tensor is broadcast with ``pos_BT``.
    """
    if isinstance(stream, Tensor):
        stream = _no_index(stream)
    h = _no_index(pos_BT.long()) * 0x9E3779B1 + ((stream % 2**20 + 1) * 0x85EBCA77 + 0x9E3779B1)
    for factor in (0x7FEB352D, 0x6C8E9CF5):
        h = ((h ^ (h >> 15)) & 0x7FFFFFFF) * factor
    # float32 holds 24 bits; half precision, in which the stream may be, would make ties
    return ((h ^ (h >> 16)) & 0xFFFFFF).float() / 2**24


def _no_index(x: Tensor) -> Tensor:
    """``x``, so that inductor takes it for a value: it calculates with an index in 32 bits."""
    return x ^ 0 if torch.compiler.is_compiling() else x


def normal(pos_BT: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``dim`` numbers from N(0, 1) for each position, [B, T, D] (Box & Muller 1958)."""
    channel_D = torch.arange(dim, device=pos_BT.device)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    size, angle = (uniform(pos_BT.unsqueeze(-1), 2 * channel_D + i).to(precise) for i in range(2))
    return ((-2 * (1 - size).log()).sqrt() * (2 * math.pi * angle).cos()).to(dtype)
