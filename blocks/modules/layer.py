"""Layer as a module.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, assert_never

import torch
from torch import Tensor, nn

from archdsl.nn.block import Block, Context
from archdsl.nn.norm import make_norm

if TYPE_CHECKING:
    from archdsl.blocks.layer import LayerSpec


class Layer(Block):
    """Attention, then feed-forward, each with norms and a residual."""

    writes_to_stream: ClassVar[bool] = False
    hosted: bool = True

    def __init__(self, spec: LayerSpec, dim: int) -> None:
        super().__init__()
        self.norm_place = spec.norm_place
        self.attention_norm = make_norm(spec.norm, dim, spec.norm_eps)
        self.attention = spec.attention.build(dim)
        self.ffn_norm = make_norm(spec.norm, dim, spec.norm_eps)
        self.ffn = spec.ffn.build(dim)
        if spec.norms_twice:
            self.attention_norm2 = make_norm(spec.norm, dim, spec.norm_eps)
            self.ffn_norm2 = make_norm(spec.norm, dim, spec.norm_eps)

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Sets the norms to 1; the blocks draw their own parameters."""
        for child in self.children():
            if isinstance(child, nn.RMSNorm | nn.LayerNorm):
                child.reset_parameters()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """The stream after both blocks, [B, T, D]."""
        match self.norm_place:
            case "pre":
                x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), ctx)
                return x_BTD + self.ffn(self.ffn_norm(x_BTD), ctx)
            case "post":
                x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, ctx))
                return self.ffn_norm(x_BTD + self.ffn(x_BTD, ctx))
            case "sandwich":
                y_BTD = self.attention(self.attention_norm(x_BTD), ctx)
                x_BTD = x_BTD + self.attention_norm2(y_BTD)
                return x_BTD + self.ffn_norm2(self.ffn(self.ffn_norm(x_BTD), ctx))
            case "pre_post":
                y_BTD = self.attention(self.attention_norm(x_BTD), ctx)
                x_BTD = self.attention_norm2(x_BTD + y_BTD)
                return self.ffn_norm2(x_BTD + self.ffn(self.ffn_norm(x_BTD), ctx))
            case place:
                assert_never(place)
