"""Rotary frequencies (Su et al. 2104.09864).

Shapes: F pairs of one head's elements, half its size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RopeScaling(Protocol):
    """A change of the rotary frequencies, for a longer context than a model was trained on."""

    def slowed(self, freq_F: Tensor) -> Tensor:
        """The frequencies [F] for the longer context."""


def inverse_frequencies(
    theta: float,
    head_size: int,
    scaling: RopeScaling | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The rotary frequencies [F]: radians from one token to the next, the highest first."""
    exponent_F = torch.arange(0, head_size, 2, device=device, dtype=dtype or torch.float32)
    # not theta ** -exponent, whose last bits differ from those that pretrained models use
    freq_F = 1.0 / theta ** (exponent_F / head_size)
    return freq_F if scaling is None else scaling.slowed(freq_F)
