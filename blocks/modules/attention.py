"""Attention as a module; `archdsl.blocks.attention` has its spec, its cost and its sources.

Shapes: B batch, T queries, S keys, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.block import Block, Context, KeysValues, into_stream_, rotate
from archdsl.blocks.norm import EPS
from archdsl.cache import Kept

if TYPE_CHECKING:
    from archdsl.blocks.attention import AttentionSpec


class Attention(Block):
    def __init__(self, spec: AttentionSpec, dim: int) -> None:
        super().__init__()
        self.head_size, self.window = spec.head_size, spec.window
        self.theta, self.scaling = spec.rope_theta, spec.rope_scaling
        q_size = spec.head_count(dim) * spec.head_size
        kv_size = q_size // spec.queries_per_kv
        self.grouped = spec.queries_per_kv > 1
        self.q = nn.Linear(dim, q_size, bias=False)
        self.k = nn.Linear(dim, kv_size, bias=False)
        self.v = nn.Linear(dim, kv_size, bias=False)
        self.o = nn.Linear(q_size, dim, bias=False)
        self.q_norm = nn.RMSNorm(spec.head_size, eps=EPS) if spec.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(spec.head_size, eps=EPS) if spec.qk_norm else nn.Identity()

    def reset(self, rng: torch.Generator, depth: int) -> None:
        super().reset(rng, depth)
        into_stream_(self.o.weight, self.o.in_features, rng, depth)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                norm.reset_parameters()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        q_BHTE = self._turn(self.q_norm(self._heads(self.q(x_BTD))), ctx)
        kv = self._keys_values(x_BTD, ctx)
        mask = self._mask(ctx, kv, x_BTD)
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            kv.k_BGSE,
            kv.v_BGSE,
            attn_mask=mask,
            is_causal=mask is None and x_BTD.size(1) > 1,
            enable_gqa=self.grouped,
        )
        return self.o(y_BHTE.transpose(1, 2).flatten(2))

    def _keys_values(self, x_BTD: Tensor, ctx: Context) -> KeysValues:
        if ctx.first is not None and ctx.reads_first:
            return ctx.first[self]
        k_BGTE = self._turn(self.k_norm(self._heads(self.k(x_BTD))), ctx)
        kv = self._with_past(KeysValues(k_BGTE, self._heads(self.v(x_BTD)), ctx.pos_BT), ctx)
        if ctx.first is not None:
            ctx.first[self] = kv
        return kv

    def _with_past(self, new: KeysValues, ctx: Context) -> KeysValues:
        """These keys and values after the ones that are kept, and from now on among them."""
        memory, stream = ctx.memory(self), ctx.stream
        if memory is None:
            return new
        limit = min(stream.limit, self.window or stream.limit)
        k, v = (memory.named(n, x, limit) for n, x in (("k", new.k_BGSE), ("v", new.v_BGSE)))
        if self.window is not None:
            return self._within_window(
                new, memory.named("pos", _places(new, ctx), limit), k, v, ctx
            )
        k.write(new.k_BGSE, stream)
        v.write(new.v_BGSE, stream)
        if stream.begins:
            return new
        stop = stream.reach(new.k_BGSE.size(2))
        return KeysValues(k.read(stop), v.read(stop), None)

    def _within_window(
        self, new: KeysValues, pos: Kept, k: Kept, v: Kept, ctx: Context
    ) -> KeysValues:
        stream, new_pos = ctx.stream, _places(new, ctx)
        order_BT = stream.order(new_pos).expand(new_pos.shape[:2])
        order_BS = pos.order(stream.past).expand(len(new_pos), -1)
        both = KeysValues(
            torch.cat((k.data, new.k_BGSE), 2),
            torch.cat((v.data, new.v_BGSE), 2),
            torch.cat((pos.data, new_pos), 1)[..., 0],
            torch.cat((order_BS, order_BT), 1),
        )
        for kept, entries in ((k, new.k_BGSE), (v, new.v_BGSE), (pos, new_pos)):
            kept.write(entries, stream)
        return both

    def _mask(self, ctx: Context, kv: KeysValues, x_BTD: Tensor) -> Tensor | None:
        """Which keys a query sees, [B, 1, T, S]; None where that is plain causal order.

        By order, not by place: what fills up a selection stands last, and nobody may look at it.
        """
        stream, T, S = ctx.stream, x_BTD.size(1), kv.k_BGSE.size(2)
        order_BT = ctx.order_BT if ctx.reads_first else None
        same_past = stream.begins or (isinstance(stream.past, int) and T == 1)
        if order_BT is None and same_past and self.window is None:
            return None
        order_BT = stream.order(x_BTD) if order_BT is None else order_BT
        order_BS = kv.order_BS
        if order_BS is None:
            order_BS = torch.arange(S, device=x_BTD.device).unsqueeze(0)
        seen_BTS = order_BT.unsqueeze(2) >= order_BS.unsqueeze(1)
        if self.window is not None:
            pos_BT = order_BT if ctx.pos_BT is None else ctx.pos_BT
            pos_BS = order_BS if kv.pos_BS is None else kv.pos_BS
            near_BTS = pos_BT.unsqueeze(2) - pos_BS.unsqueeze(1) < self.window
            seen_BTS = seen_BTS & near_BTS & (order_BS >= 0).unsqueeze(1)
        return seen_BTS.unsqueeze(1)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def _turn(self, x_BHTE: Tensor, ctx: Context) -> Tensor:
        if self.theta is None:
            return x_BHTE
        return rotate(x_BHTE, ctx.rope(x_BHTE, self.theta, self.scaling))


def _places(kv: KeysValues, ctx: Context) -> Tensor:
    """Of the tokens in their sequences, [B, T, 1]."""
    pos_BT = ctx.stream.order(kv.k_BGSE[:, 0]) if kv.pos_BS is None else kv.pos_BS
    return pos_BT.expand(len(kv.k_BGSE), -1).unsqueeze(-1)
