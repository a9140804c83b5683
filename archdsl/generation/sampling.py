"""Choose the next token of each row from its logits.

Every row has its own random number generator.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archdsl.generation.sampling_config import Sampling
from archdsl.nn.devices import in_float64


def generators(sampling: Sampling, rows: int) -> list[torch.Generator]:
    """Return one generator per row, all with the same seed.

    So a prompt gets the same continuation in a batch as alone.
    """
    return [torch.Generator().manual_seed(sampling.seed) for _ in range(rows)]


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the probability of each token to be the next one, [B, V] in float64.

    It is on the device of the logits if that has float64, else on the CPU. The top-k filter is
    applied before the top-p filter.
    """
    if sampling.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return in_float64(torch.zeros_like(logits_BV).scatter(-1, best_B1, 1.0))
    logits_BV = in_float64(logits_BV)
    # Subtract the largest logit first: divided by a tiny temperature it could become infinite.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return logits_BV.softmax(-1)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Mask (with -inf) the logits below the k-th largest. Logits equal to it are kept.

    Returns [B, V].
    """
    least_B1 = logits_BV.topk(min(k, logits_BV.size(-1)), dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Mask (with -inf) the tokens outside the smallest set whose probability is at least ``p``.

    Returns [B, V]. Nucleus sampling: Holtzman et al. 1904.09751.
    """
    sorted_BV = logits_BV.sort(dim=-1, descending=True).values
    probability_BV = sorted_BV.softmax(-1)
    kept_B1 = (probability_BV.cumsum(-1) - probability_BV < p).sum(-1, keepdim=True).clamp(min=1)
    least_B1 = sorted_BV.gather(-1, kept_B1 - 1)
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def sample_tokens(probability_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """Sample one token per row, with one random number of the row's generator."""
    uniform = [torch.rand((), generator=rng, dtype=torch.float64) for rng in generators]
    return token_at(probability_BV, torch.stack(uniform).to(probability_BV.device)).tolist()


def token_at(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return, per row, the token at ``uniform_B`` in [0, 1) of the cumulative distribution, [B]."""
    end_BV = probability_BV.cumsum(-1)
    # Scale by the total, which rounding may leave a little below one.
    uniform_B1 = uniform_B.unsqueeze(-1) * end_BV[..., -1:]
    return torch.searchsorted(end_BV, uniform_B1, right=True).squeeze(-1)
