"""Normalisation of tokens: RMSNorm (Zhang & Sennrich 1910.07467), LayerNorm (Ba et al. 1607.06450).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with half as many kernels where torch has no fused one.

    That is on a CPU without gradients, where each kernel delays every decoded token.
    """

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scales each token to unit size, then each of its elements by a learned gain."""
        exact = x_BTD.dtype in (torch.float32, torch.float64)
        if x_BTD.requires_grad or x_BTD.device.type != "cpu" or not exact:
            return super().forward(x_BTD)
        assert self.eps is not None
        D = x_BTD.size(-1)
        size_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True)
        scale_BT1 = size_BT1.square_().add_(D * self.eps).rsqrt_().mul_(D**0.5)
        return x_BTD * scale_BT1 * self.weight


def make_norm(type: Literal["rms", "layer"], dim: int, eps: float) -> RMSNorm | nn.LayerNorm:
    """The norm of this type over ``dim`` elements; ``eps`` is added to the variance."""
    return (RMSNorm if type == "rms" else nn.LayerNorm)(dim, eps=eps)
