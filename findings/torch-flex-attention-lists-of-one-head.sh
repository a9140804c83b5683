#!/usr/bin/env bash
# torch 2.13.0 (2.11.0 does the same): flex_attention with a BlockMask whose lists of blocks differ
# between the sequences of a batch and are the same for all heads, made within the compiled function.
#
# The kernels for a GPU find the list of sequence b at b * stride(1) of kv_num_blocks [B, 1, N] and
# kv_indices [B, 1, N, M]: there is one head, so the stride of the heads is taken for that of the
# sequences (sparse_hz_offset * stride_kv_num_blks_h in inductor's template). Inductor gives a
# dimension of size 1 the stride 0 if the tensor is a view of something that was not computed yet, as
# `x.to(torch.int32).unsqueeze(1).contiguous()` is. Then every sequence is computed by the lists of the
# first one, without an error. In the other order, `x.unsqueeze(1).to(torch.int32)`, the strides are
# those of eager mode. The kernels of the CPU take the stride of the sequences and are right.
#
# No GPU is needed: this script prints the strides with which flex_attention is compiled. It reads
# them from an internal function of torch.
#
# Seen: eager (2, 2, 1) and (8, 8, 4, 1) in both orders; compiled (2, 0, 1) and (8, 0, 4, 1) where the
# view comes last, as in eager mode where it comes first. This script fails if that is no longer so.
#
# Usage: findings/torch-flex-attention-lists-of-one-head.sh
# PY names a python that has torch; without it, a temporary environment is made.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [[ -z "${PY:-}" ]]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 setuptools
    PY=$folder/venv/bin/python
fi
cat >"$folder/strides.py" <<'PYTHON'
import sys
from unittest import mock

import torch
from torch._inductor import config
from torch._inductor.kernel.flex import flex_cpu
from torch.nn.attention.flex_attention import BlockMask, flex_attention

print("torch", torch.__version__)
B, T, S, BLOCK = 3, 256, 512, 128


def view_last(x):
    return x.to(torch.int32).unsqueeze(1).contiguous()


def view_first(x):
    return x.unsqueeze(1).to(torch.int32).contiguous()


def lists(last_BT, order):
    """The blocks of keys up to the last key that a block of queries sees."""
    counts_BN = last_BT[:, BLOCK - 1 :: BLOCK] // BLOCK + 1
    blocks_BNM = torch.arange(S // BLOCK).expand(B, T // BLOCK, S // BLOCK)
    return order(counts_BN), order(blocks_BNM)


def attend(q, k, v, last_BT, order):
    mask = BlockMask.from_kv_blocks(
        *lists(last_BT, order),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, query, key: last_BT[b, query] >= key,
        seq_lengths=(T, S),
        compute_q_blocks=False,
    )
    return flex_attention(q, k, v, block_mask=mask)


def compiled_with(order):
    """The strides of both lists, as flex_attention is compiled."""
    realize, strides = flex_cpu.maybe_realize, []

    def noted(given):
        made = realize(given)
        found = [one for one in made if hasattr(one, "get_size") and one.get_dtype() == torch.int32]
        strides.extend(tuple(map(int, one.get_stride())) for one in found)
        return made

    torch.compiler.reset()
    q, k, v = (torch.randn(B, 2, n, 32) for n in (T, S, S))
    last_BT = torch.stack([torch.arange(T) + step for step in (0, 100, S - T)])
    with mock.patch.object(flex_cpu, "maybe_realize", noted), torch.no_grad():
        with config.patch(force_disable_caches=True):
            torch.compile(attend, fullgraph=True)(q, k, v, last_BT, order)
    return strides[:2]


found = {}
for order in (view_last, view_first):
    eager = [x.stride() for x in lists(torch.zeros(B, T, dtype=torch.long), order)]
    found[order] = compiled_with(order)
    print(f"{order.__name__}: eager {eager}, compiled {found[order]}")
if found != {view_last: [(2, 0, 1), (8, 0, 4, 1)], view_first: [(2, 2, 1), (8, 8, 4, 1)]}:
    sys.exit("CHANGED: the strides of the lists of blocks are others")
print("as described: the stride of the one head is 0 where the view comes last")
PYTHON
"$PY" -W ignore "$folder/strides.py"
