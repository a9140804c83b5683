"""The gated short convolution as a torch module.

Shapes: B batch, T tokens, D width, K kernel, N = K - 1 tokens before, S = N + T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archdsl.nn.block import Block, Context, into_stream_, normal_

if TYPE_CHECKING:
    from archdsl_short_conv import ShortConvSpec


class ShortConv(Block):
    def __init__(self, spec: ShortConvSpec, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.taps_KD = nn.Parameter(torch.empty(spec.kernel, dim))
        self.out = nn.Linear(dim, dim, bias=False)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        super().reset(rng, depth)
        normal_(self.taps_KD, len(self.taps_KD) ** -0.5, rng)
        into_stream_(self.out.weight, self.out.in_features, rng, depth)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        a_BTD, b_BTD, c_BTD = self.project(x_BTD).chunk(3, -1)
        return self.out(c_BTD * self._convolve(a_BTD * b_BTD, ctx))

    def _convolve(self, u_BTD: Tensor, ctx: Context) -> Tensor:
        """Each token and those before it, which come from the cache where there is one."""
        (B, T, D), N = u_BTD.shape, len(self.taps_KD) - 1
        memory = ctx.memory(self)
        if memory is None:
            s_BSD = torch.cat((u_BTD.new_zeros(B, N, D), u_BTD), 1)
        else:
            state = memory.state("last", u_BTD, N, D)
            s_BSD = torch.cat((state.data, u_BTD), 1)
            after_BTND = s_BSD.unfold(1, N, 1)[:, 1:].movedim(-1, 2)  # after each token; no copy
            state.write(after_BTND, ctx.stream)
        y_BTD = s_BSD[:, :T] * self.taps_KD[0]
        for k in range(1, N + 1):
            y_BTD = y_BTD + s_BSD[:, k : k + T] * self.taps_KD[k]
        return y_BTD
