"""Attention of selected tokens to all keys up to their places, by blocks, on a GPU.

`torch.nn.attention.flex_attention` computes the blocks of 128 queries and 128 keys in which a query
sees a key, and looks at the mask only in those in which another does not. Which blocks these are
follows from the places of the first and the last query of a block, so the mask of all queries and
keys is never made.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, E head size, N blocks of
queries, M blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archdsl.nn.devices import TRITON
from archdsl.nn.precision import autocast_dtype

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
COMPILATIONS = 256  # in a process: heads, head sizes, data types, with gradients and without
HEAD_SIZES = range(16, 129)  # that its kernels have room for on every GPU


def blocks_are_possible(q_BHTE: Tensor) -> bool:
    """Whether these queries can be computed by blocks: on CUDA with Triton, in half precision, as
    training is, and not so few of them that torch takes a kernel for decoding."""
    dtype = autocast_dtype(q_BHTE.device) or q_BHTE.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    fits = q_BHTE.size(2) >= BLOCK and q_BHTE.size(3) in HEAD_SIZES
    return TRITON and q_BHTE.device.type == "cuda" and half and fits


def attend_by_blocks(
    q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, place_BT: Tensor, grouped: bool
) -> Tensor:
    """What the query at each place reads from the keys up to that place, [B, H, T, E].

    ``place_BT``: grows along each row. Where it does not, tokens only fill up the row, and what
    they read means nothing. ``grouped``: whether several query heads share keys. Under autocast, in
    its data type.
    """
    dtype = autocast_dtype(q_BHTE.device) or v_BGSE.dtype
    q_BHTE, k_BGSE, v_BGSE = (x.to(dtype) for x in (q_BHTE, k_BGSE, v_BGSE))
    by_blocks = _by_blocks if torch.compiler.is_compiling() else _compiled()
    return by_blocks(q_BHTE, k_BGSE, v_BGSE, place_BT, grouped)


def _by_blocks(
    q_BHTE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, place_BT: Tensor, grouped: bool
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention  # imports torch's compiler

    mask = blocks_seen(place_BT, k_BGSE.size(2))
    return flex_attention(q_BHTE, k_BGSE, v_BGSE, block_mask=mask, enable_gqa=grouped)


@cache
def _compiled() -> Callable[..., Tensor]:
    # a process may train many models; sizes that change become dynamic after a few compilations
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILATIONS)
    return torch.compile(_by_blocks, fullgraph=True)


def blocks_seen(place_BT: Tensor, S: int) -> BlockMask:
    """The blocks in which queries at these places see some of S keys, and all of them."""
    from torch.nn.attention.flex_attention import BlockMask

    (B, T), device = place_BT.shape, place_BT.device
    N, M = -(-T // BLOCK), -(-S // BLOCK)
    query_N, key_M = torch.arange(N, device=device), torch.arange(M, device=device)
    highest_BT = place_BT.cummax(1).values  # so that blocks with filling keep their order, too
    first_BN = highest_BT.index_select(1, query_N * BLOCK)
    last_BN = highest_BT.index_select(1, (query_N * BLOCK + BLOCK - 1).clamp(max=T - 1))
    whole_BN = ((first_BN + 1) // BLOCK).clamp(max=M)  # blocks of keys that all queries see
    seen_BN = (last_BN // BLOCK + 1).clamp(max=M)  # and those that some query sees
    # blocks of queries that see nothing of a block of keys, and those that do not see all of it
    blind_BM = (seen_BN.unsqueeze(1) <= key_M.unsqueeze(1)).sum(2)
    partly_BM = (whole_BN.unsqueeze(1) <= key_M.unsqueeze(1)).sum(2)

    def of_all_heads(x: Tensor) -> Tensor:
        # a view as the last step would have the stride 0 for heads when compiled, by which the
        # kernels for a GPU find the lists of a sequence: all would have those of the first
        return x.unsqueeze(1).to(torch.int32).contiguous()

    def sees(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return place_BT[b, query] >= key

    return BlockMask(
        seq_lengths=(T, S),
        kv_num_blocks=of_all_heads(seen_BN - whole_BN),
        kv_indices=of_all_heads((whole_BN.unsqueeze(2) + key_M).clamp(max=M - 1)),
        full_kv_num_blocks=of_all_heads(whole_BN),
        full_kv_indices=of_all_heads(key_M.expand(B, N, M)),
        q_num_blocks=of_all_heads(partly_BM - blind_BM),
        q_indices=of_all_heads((blind_BM.unsqueeze(2) + query_N).clamp(max=N - 1)),
        full_q_num_blocks=of_all_heads(N - partly_BM),
        full_q_indices=of_all_heads((partly_BM.unsqueeze(2) + query_N).clamp(max=N - 1)),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )
