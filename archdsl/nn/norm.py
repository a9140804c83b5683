"""Normalisation of tokens: RMSNorm (Zhang & Sennrich 1910.07467), LayerNorm (Ba et al. 1607.06450).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with half as many kernels where torch has no fused one.

    That is on a CPU without gradients, where each kernel delays every decoded token.
    """

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scales each token to unit size, then each of its elements by a learned gain."""
        if x_BTD.dtype != self.weight.dtype:  # under autocast, which would widen the stream
            weight_D = self.weight.to(x_BTD.dtype)
            with torch.autocast(x_BTD.device.type, enabled=False):
                return F.rms_norm(x_BTD, self.normalized_shape, weight_D, self.eps)
        exact = x_BTD.dtype in (torch.float32, torch.float64)
        if x_BTD.requires_grad or x_BTD.device.type != "cpu" or not exact:
            return super().forward(x_BTD)
        assert self.eps is not None
        D = x_BTD.size(-1)
        size_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True)
        scale_BT1 = size_BT1.square_().add_(D * self.eps).rsqrt_().mul_(D**0.5)
        return x_BTD * scale_BT1 * self.weight


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, whose result has the data type of the stream under autocast, too."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Moves each token to mean 0 and unit variance, then scales and moves its elements."""
        return super().forward(x_BTD).to(x_BTD.dtype)


def make_norm(type: Literal["rms", "layer"], dim: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm of this type over ``dim`` elements; ``eps`` is added to the variance."""
    return (RMSNorm if type == "rms" else LayerNorm)(dim, eps=eps)
