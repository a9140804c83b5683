"""Attention as a module; `archdsl.blocks.attention` has its spec, its cost and its sources.

Shapes: B batch, T queries, S keys, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archdsl.blocks.attention import MOST, QUERIES
from archdsl.blocks.norm import EPS
from archdsl.nn.block import Block, Context, KeysValues, into_stream_, rotate
from archdsl.nn.cache import Kept, column
from archdsl.nn.norm import make_norm
from archdsl.nn.selected_attention import attend_by_blocks, blocks_are_possible

if TYPE_CHECKING:
    from archdsl.blocks.attention import AttentionSpec


NEVER = 2**40  # a place in a sequence that no query reaches


class Attention(Block):
    """Causal attention with grouped queries, rotary positions, optional window and QK-norm."""

    hosted: bool = True

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
        self.q_norm = make_norm("rms", spec.head_size, EPS) if spec.qk_norm else nn.Identity()
        self.k_norm = make_norm("rms", spec.head_size, EPS) if spec.qk_norm else nn.Identity()

    def reset(self, rng: torch.Generator, depth: int) -> None:
        """Draws the four projections, and sets the norms of queries and keys to 1."""
        super().reset(rng, depth)
        into_stream_(self.o.weight, self.o.in_features, rng, depth)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                norm.reset_parameters()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """What each token reads from the tokens up to itself, [B, T, D]."""
        handed = ctx.handed
        if handed is not None and ctx.kv == "shared" and self in handed:
            q_BHTE, kv = self._heads(ctx.linear(self.q, x_BTD)), handed[self]
        else:
            products = ctx.linears((self.q, self.k, self.v), x_BTD)
            q_BHTE, k_BGTE, v_BGTE = (self._heads(one) for one in products)
            kv = self._keys_values(self._turn(self.k_norm(k_BGTE), ctx), v_BGTE, ctx)
        y_BHTE = self._attend(self._turn(self.q_norm(q_BHTE), ctx), kv, ctx)
        return ctx.linear(self.o, y_BHTE.transpose(1, 2).flatten(2))

    def _keys_values(self, k_BGTE: Tensor, v_BGTE: Tensor, ctx: Context) -> KeysValues:
        new = KeysValues(k_BGTE, v_BGTE, ctx.pos_BT)
        if ctx.handed is None:
            return self._with_past(new, ctx)
        return self._handed_on(new, ctx, ctx.handed)

    def _handed_on(
        self, new: KeysValues, ctx: Context, handed: dict[Block, KeysValues]
    ) -> KeysValues:
        """What this pass attends to, made of what it computed and of what passes before handed on.

        ``handed`` then holds what this pass hands on.
        """
        before = handed.get(self)
        if ctx.kv == "last":
            if ctx.whole is not None and before is not None:
                ctx, index_BK, keep_BK = ctx.whole
                new = _replaced(before, index_BK, keep_BK, new)
            handed[self] = new
            return self._with_past(new, ctx)
        kv = self._with_past(new, ctx)
        if ctx.kv == "all":
            handed[self] = self._joined(before, kv, ctx)
            return kv if before is None else handed[self]
        handed[self] = kv
        return kv

    def _joined(self, before: KeysValues | None, kv: KeysValues, ctx: Context) -> KeysValues:
        """The keys and values of this pass behind those of the passes ``before``.

        Their order is that of the tokens of the loop.
        """
        device = kv.k_BGSE.device
        place_BS = torch.arange(kv.k_BGSE.size(2), device=device).unsqueeze(0)
        if kv.order_BS is not None:
            place_BS = kv.order_BS
        order_BS, pos_BS = _order_in_loop(place_BS, ctx), None
        if self.window is not None:
            pos_BS = place_BS if kv.pos_BS is None else kv.pos_BS
        this = KeysValues(kv.k_BGSE, kv.v_BGSE, pos_BS, order_BS)
        return this if before is None else before.followed_by(this)

    def pass_over(self, ctx: Context) -> None:
        """See `Block.pass_over`: no token takes this pass, but earlier ones may have.

        With ``kv: last``, its cache gets what these tokens have from passes before; with
        ``kv: all``, later passes attend to what it holds.
        """
        if ctx.handed is None or ctx.kv == "shared":
            return
        before = ctx.handed[self]
        none = KeysValues(before.k_BGSE[:, :, :0], before.v_BGSE[:, :, :0], ctx.pos_BT)
        self._handed_on(none, ctx, ctx.handed)

    def _with_past(self, new: KeysValues, ctx: Context) -> KeysValues:
        """These keys and values behind those in the cache, to which they are added."""
        if ctx.host is not None:
            return ctx.host.keep(self, ctx.path, new)
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
        stream, new_pos, limit = ctx.stream, _places(new, ctx), k.limit
        order_BT = stream.order(new_pos).expand(new_pos.shape[:2])
        order_BS = pos.order(stream.past).expand(len(new_pos), -1)
        both = KeysValues(
            torch.cat((k.read(limit), new.k_BGSE), 2),
            torch.cat((v.read(limit), new.v_BGSE), 2),
            torch.cat((pos.read(limit), new_pos), 1)[..., 0],
            torch.cat((order_BS, order_BT), 1),
        )
        for kept, entries in ((k, new.k_BGSE), (v, new.v_BGSE), (pos, new_pos)):
            kept.write(entries, stream)
        return both

    def _attend(self, q_BHTE: Tensor, kv: KeysValues, ctx: Context) -> Tensor:
        """Attention in the order of the tokens, [B, H, T, E].

        Padding of a selection stands last, and no query may see it. Where a mask is needed, some
        queries are computed at a time, with only the keys that one of them may see, so that hidden
        keys cost little.
        """
        if ctx.host is not None:
            return ctx.host.attend(self, q_BHTE, kv)
        stream, T = ctx.stream, q_BHTE.size(2)
        order_BT = _order_among_keys(ctx)
        same_past = stream.begins or (isinstance(stream.past, int) and T == 1)
        if order_BT is None and same_past and self.window is None and kv.order_BS is None:
            return self._scaled(q_BHTE, kv.k_BGSE, kv.v_BGSE, None, causal=T > 1)
        if order_BT is not None:
            attend = self._without_mask(q_BHTE, kv, ctx)
            if attend is not None:  # the compiler of torch 2.11 knows no truth of a method
                return attend(q_BHTE, kv, order_BT)
        asking_BT = stream.order(q_BHTE[:, 0]) if order_BT is None else order_BT
        pos_BT = asking_BT if ctx.pos_BT is None else ctx.pos_BT
        if stream.static and self.window is None and kv.order_BS is None:
            asked = stream if order_BT is None or ctx.whole is None else ctx.whole[0].stream
            S, dtype = kv.k_BGSE.size(2), kv.k_BGSE.dtype
            same_BT, keys = asking_BT, slice(0, S)
            bias = asked.once((S, dtype), lambda: self._bias(same_BT, same_BT, kv, keys))
            return self._scaled(q_BHTE, kv.k_BGSE, kv.v_BGSE, bias)
        y = []
        for part, keys in self._parts(T, kv, ctx):
            k_BGSE, v_BGSE = kv.k_BGSE[:, :, keys], kv.v_BGSE[:, :, keys]
            bias = self._bias(asking_BT[:, part], pos_BT[:, part], kv, keys)
            y.append(self._scaled(q_BHTE[:, :, part], k_BGSE, v_BGSE, bias))
        return torch.cat(y, 2) if len(y) > 1 else y[0]

    def _without_mask(
        self, q_BHTE: Tensor, kv: KeysValues, ctx: Context
    ) -> Callable[[Tensor, KeysValues, Tensor], Tensor] | None:
        """How selected tokens attend faster than under a mask of all queries and keys, if so."""
        # not with a cache: places of padding could lie beyond the keys
        if self.window is not None or ctx.cache is not None or kv.order_BS is not None:
            return None
        if q_BHTE.size(2) > MOST * kv.k_BGSE.size(2):
            return self._among_all
        if blocks_are_possible(q_BHTE):
            return self._by_blocks
        return None if q_BHTE.device.type in ("cpu", "meta") else self._among_all

    def _by_blocks(self, q_BHTE: Tensor, kv: KeysValues, order_BT: Tensor) -> Tensor:
        return attend_by_blocks(q_BHTE, kv.k_BGSE, kv.v_BGSE, order_BT, self.grouped)

    def _among_all(self, q_BHTE: Tensor, kv: KeysValues, order_BT: Tensor) -> Tensor:
        """Plain causal attention with each query at its place, and zeros at the other places."""
        # a part of a larger tensor would be saved whole
        index = order_BT.contiguous()[:, None, :, None].expand_as(q_BHTE)
        q_BHSE = torch.zeros_like(kv.k_BGSE[:, :1]).expand(-1, q_BHTE.size(1), -1, -1)
        q_BHSE = q_BHSE.scatter(2, index, q_BHTE)
        y_BHSE = self._scaled(q_BHSE, kv.k_BGSE, kv.v_BGSE, None, causal=True)
        return y_BHSE.gather(2, index)

    def _parts(self, T: int, kv: KeysValues, ctx: Context) -> Iterator[tuple[slice, slice]]:
        """Slices of queries, each with a slice of keys that has all keys these queries may see.

        Where the exact range is expensive to find, the slice has more keys.
        """
        S, back = kv.k_BGSE.size(2), (self.window or kv.k_BGSE.size(2)) - 1
        parts = [slice(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]
        order_BT = _order_among_keys(ctx)
        if kv.order_BS is not None or ctx.stream.static:
            return ((part, slice(0, S)) for part in parts)
        if order_BT is None:
            past = ctx.stream.past
            if not isinstance(past, int):
                return ((part, slice(0, S)) for part in parts)
            # where a chunk ends in padding in every row, this lies beyond the keys
            stops = (min(S, past + part.stop) for part in parts)
            return (
                (part, slice(max(0, min(past + part.start, stop - 1) - back), stop))
                for part, stop in zip(parts, stops, strict=True)
            )
        if order_BT.device.type == "cpu" and not torch.compiler.is_compiling():
            first, last = order_BT.amin(0).tolist(), order_BT.amax(0).tolist()
            return (
                # padding may lie beyond the keys
                (part, slice(max(0, min(first[part]) - back), min(S, max(last[part]) + 1)))
                for part in parts
            )
        # the T tokens are distinct, so this is the latest place of the last of them
        return ((part, slice(0, S - T + part.stop)) for part in parts)

    def _bias(self, order_BT: Tensor, pos_BT: Tensor, kv: KeysValues, keys: slice) -> Tensor:
        """0 where a query sees a key, else -inf, [B, 1, T, S]."""
        # floats, because each kernel would convert a boolean mask again
        unseen = ~self._mask(order_BT, pos_BT, kv, keys)
        return kv.k_BGSE.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)

    def _mask(self, order_BT: Tensor, pos_BT: Tensor, kv: KeysValues, keys: slice) -> Tensor:
        """Which keys a query sees, [B, 1, T, S]."""
        if kv.order_BS is None:
            order_BS = torch.arange(keys.start, keys.stop, device=order_BT.device).unsqueeze(0)
        else:
            order_BS = kv.order_BS[:, keys]
        seen_BTS = order_BT.unsqueeze(2) >= order_BS.unsqueeze(1)
        if self.window is not None:
            pos_BS = order_BS if kv.pos_BS is None else kv.pos_BS[:, keys]
            near_BTS = pos_BT.unsqueeze(2) - pos_BS.unsqueeze(1) < self.window
            seen_BTS = seen_BTS & near_BTS & (order_BS >= 0).unsqueeze(1)
        return seen_BTS.unsqueeze(1)

    def _scaled(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped
        )

    def side_by_side(self) -> list[tuple[nn.Linear, ...]]:
        """See `Block`."""
        return [(self.q, self.k, self.v)]

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.view(*x_BTD.shape[:-1], -1, self.head_size).transpose(1, 2)

    def _turn(self, x_BHTE: Tensor, ctx: Context) -> Tensor:
        if self.theta is None:
            return x_BHTE
        return rotate(x_BHTE, ctx.rope(x_BHTE, self.theta, self.scaling))


def _order_among_keys(ctx: Context) -> Tensor | None:
    """The places of selected queries among the keys, [B, T]; None: the keys are of these tokens."""
    return None if ctx.handed is None else ctx.order_BT


def _order_in_loop(place_BS: Tensor, ctx: Context) -> Tensor:
    """The place of each key among the tokens of the loop, [B, S]; 0 for those of earlier chunks.

    ``place_BS``: that among the tokens that took this pass; negative where there is no key.
    """
    if ctx.whole is None or ctx.order_BT is None:  # every token took it
        return place_BS
    _, _, keep_BK = ctx.whole
    order_BK = ctx.order_BT if keep_BK is None else ctx.order_BT.masked_fill(~keep_BK, NEVER)
    never_B1 = order_BK.new_full((len(order_BK), 1), NEVER)
    ago_BS = (place_BS - column(ctx.stream.past)).expand(len(order_BK), -1)
    new_BS = torch.cat((order_BK, never_B1), 1).gather(1, ago_BS.clamp(0, order_BK.size(1)))
    return torch.where(ago_BS < 0, place_BS.clamp(max=0), new_BS)


def _replaced(
    old: KeysValues, index_BK: Tensor, keep_BK: Tensor | None, new: KeysValues
) -> KeysValues:
    """``old`` with the keys and values of the tokens that took the pass replaced by ``new``."""
    places = index_BK.clone()[:, None, :, None]  # a part of a larger tensor would be saved whole

    def put(old_BGSE: Tensor, new_BGKE: Tensor) -> Tensor:
        index = places.expand_as(new_BGKE)
        if keep_BK is not None:
            kept_BGKE = old_BGSE.gather(2, index)
            new_BGKE = torch.where(keep_BK[:, None, :, None], new_BGKE, kept_BGKE)
        return old_BGSE.scatter(2, index, new_BGKE)

    return KeysValues(put(old.k_BGSE, new.k_BGSE), put(old.v_BGSE, new.v_BGSE), old.pos_BS)


def _places(kv: KeysValues, ctx: Context) -> Tensor:
    """The positions of the tokens in their sequences, [B, T, 1]."""
    pos_BT = ctx.stream.order(kv.k_BGSE[:, 0]) if kv.pos_BS is None else kv.pos_BS
    return pos_BT.expand(len(kv.k_BGSE), -1).unsqueeze(-1)
