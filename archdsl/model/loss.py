"""The cross-entropy of the logits of the head, of which only some exist at a time.

Shapes: P streams, N tokens in each, n of them at a time, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from archdsl.costs.activations import logits_at_once
from archdsl.data.types import IGNORE
from archdsl.nn.devices import TRITON
from archdsl.nn.precision import autocast_dtype


def summed_cross_entropy(
    streams: Sequence[Tensor], head_VD: Tensor, target_N: Tensor, weight_PN: Tensor | None = None
) -> Tensor:
    """The sum of the cross-entropies of the logits ``x_ND @ head_VD.T`` for each of P ``streams``.

    In nats. ``target_N``: the target tokens; IGNORE does not count. ``weight_PN``: the weight of
    each target of each stream in the sum; None: 1. The products have the data type of the streams,
    or that of autocast; the sum and the gradient of the head are at least in float32. Gradients are
    computed together with the loss, so that no logit is computed twice.
    """
    dtype = autocast_dtype(head_VD.device) or streams[0].dtype
    with torch.autocast(head_VD.device.type, enabled=False):
        given = [x_ND.to(dtype) for x_ND in streams]
        nats = _SummedCrossEntropy.apply(head_VD, target_N, weight_PN, *given)  # type: ignore[no-untyped-call]
    return cast(Tensor, nats)


class _SummedCrossEntropy(torch.autograd.Function):
    """See `summed_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, head_VD: Tensor, target_N: Tensor, weight_PN: Tensor | None, *streams: Tensor
    ) -> Tensor:
        needs_head, _, needs_weight, *needs_stream = ctx.needs_input_grad
        device, dtype = head_VD.device.type, streams[0].dtype
        exact, scores = torch.promote_types(dtype, torch.float32), _scores_on(device)
        rows = _equal_parts(len(target_N), max(1, logits_at_once(device) // len(head_VD)))
        there_N, read_VD = (target_N != IGNORE).to(exact), head_VD.to(dtype)
        count_PN = there_N.expand(len(streams), -1)
        if weight_PN is not None:
            count_PN = count_PN * weight_PN.detach()
        nats_PN = torch.empty_like(count_PN)
        slope_VD = torch.zeros_like(head_VD, dtype=exact) if needs_head else None
        slopes = [
            torch.empty_like(x) if needs else None
            for x, needs in zip(streams, needs_stream, strict=True)
        ]
        for p, x_ND in enumerate(streams):
            for start in range(0, len(x_ND), rows):
                part, asked = slice(start, start + rows), needs_head or needs_stream[p]
                nats_PN[p, part], slope_nV = scores(
                    x_ND[part] @ read_VD.t(), target_N[part], count_PN[p, part], asked
                )
                if (slope_ND := slopes[p]) is not None:
                    torch.mm(slope_nV, read_VD, out=slope_ND[part])
                if slope_VD is not None:
                    _add_product_(slope_VD, slope_nV.t(), x_ND[part])
                del slope_nV  # so that its memory is free before the next logits are computed
        ctx.dtypes = head_VD.dtype, None if weight_PN is None else weight_PN.dtype
        ctx.save_for_backward(slope_VD, nats_PN if needs_weight else None, *slopes)
        return (nats_PN * count_PN).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        # in place, so a second backward pass through the same graph raises an error
        scaled = [None if one is None else one.mul_(slope) for one in ctx.saved_tensors]
        slope_VD, slope_PN, *slopes = scaled
        head_dtype, weight_dtype = ctx.dtypes
        return (
            None if slope_VD is None else slope_VD.to(head_dtype),
            None,
            None if slope_PN is None else slope_PN.to(weight_dtype),
            *slopes,
        )


def _equal_parts(total: int, most: int) -> int:
    """The size of the fewest parts of ``total`` that have at most ``most`` each, nearly equal."""
    return -(-total // max(1, -(-total // most)))


def _add_product_(sum_VD: Tensor, left_Vn: Tensor, right_nD: Tensor) -> None:
    """Adds a product to a sum that is more precise than the factors."""
    if left_Vn.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_Vn, right_nD)
    elif left_Vn.device.type == "cuda":
        sum_VD += torch.mm(left_Vn, right_nD, out_dtype=sum_VD.dtype)
    else:
        sum_VD += left_Vn @ right_nD


Scores = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def _scores(
    logit_nV: Tensor, target_n: Tensor, weight_n: Tensor, slopes: bool
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each target, [n], and the gradient of their weighted sum, [n, V].

    Without ``slopes``, the second is of no use. In place, where the logits are precise enough.
    """
    exact = weight_n.dtype
    score_nV, target_n1 = logit_nV.to(exact), target_n.clamp(min=0).unsqueeze(1)
    score_nV.sub_(score_nV.amax(1, keepdim=True))
    target_score_n1 = score_nV.gather(1, target_n1)
    sum_n1 = score_nV.exp_().sum(1, keepdim=True)
    nats_n = torch.where(target_n == IGNORE, 0, (sum_n1.log() - target_score_n1).squeeze(1))
    if slopes:
        score_nV.mul_(weight_n.unsqueeze(1) / sum_n1)
        score_nV.scatter_add_(1, target_n1, -weight_n.unsqueeze(1))
    return nats_n, score_nV.to(logit_nV.dtype)


def _fused_scores(
    logit_nV: Tensor, target_n: Tensor, weight_n: Tensor, slopes: bool
) -> tuple[Tensor, Tensor]:
    """As `_scores`, of which inductor makes two kernels: one for the losses, one for the slopes."""
    log_p_nV = F.log_softmax(logit_nV, -1, dtype=weight_n.dtype)
    target_n1 = target_n.clamp(min=0).unsqueeze(1)
    nats_n = torch.where(target_n == IGNORE, 0, -log_p_nV.gather(1, target_n1).squeeze(1))
    if slopes:
        hit_nV = torch.arange(logit_nV.size(1), device=logit_nV.device) == target_n1
        logit_nV.copy_((log_p_nV.exp() - hit_nV.to(weight_n.dtype)) * weight_n.unsqueeze(1))
    return nats_n, logit_nV


@cache
def _scores_on(device: str) -> Scores:
    if device in ("cpu", "mps", "meta") or not TRITON:
        return _scores
    compiled = torch.compile(_fused_scores)

    def scores(
        logit_nV: Tensor, target_n: Tensor, weight_n: Tensor, slopes: bool
    ) -> tuple[Tensor, Tensor]:
        for given in (logit_nV, target_n, weight_n):  # a vocabulary of any size would be slow
            torch._dynamo.maybe_mark_dynamic(given, 0)
        return compiled(logit_nV, target_n, weight_n, slopes)

    return scores
