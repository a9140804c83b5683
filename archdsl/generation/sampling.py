"""From logits to the next token, each row by random numbers of its own.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from archdsl.generation.sampling_config import Sampling


def generators(sampling: Sampling, rows: int) -> list[torch.Generator]:
    """One for each row, all alike: so a row is in a batch what it is alone."""
    return [torch.Generator().manual_seed(sampling.seed) for _ in range(rows)]


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Of each token to come next, in float64; top-k counts before top-p."""
    if sampling.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BV, dtype=torch.float64).scatter(-1, best_B1, 1.0)
    logits_BV = logits_BV.double()
    # less the largest first: a tiny temperature must not make them infinite
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return logits_BV.softmax(-1)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf in place of what is less than the k-th largest; equals of it stay."""
    least_B1 = logits_BV.topk(min(k, logits_BV.size(-1)), dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf in place of each token that likelier ones already reach ``p`` without."""
    sorted_BV = logits_BV.sort(dim=-1, descending=True).values
    probability_BV = sorted_BV.softmax(-1)
    kept_B1 = (probability_BV.cumsum(-1) - probability_BV < p).sum(-1, keepdim=True).clamp(min=1)
    least_B1 = sorted_BV.gather(-1, kept_B1 - 1)
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def sample_tokens(probability_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """A token for each row, by one number in [0, 1) of its generator."""
    drawn = [torch.rand((), generator=rng, dtype=torch.float64) for rng in generators]
    return token_at(probability_BV, torch.stack(drawn).to(probability_BV.device)).tolist()


def token_at(probability_BV: Tensor, at_B: Tensor) -> Tensor:
    """The token in whose share ``at_B`` falls, shares laid end to end from 0 to 1."""
    end_BV = probability_BV.cumsum(-1)
    # scaled, as the shares may add up to a little less than one
    at_B1 = at_B.unsqueeze(-1) * end_BV[..., -1:]
    return torch.searchsorted(end_BV, at_B1, right=True).squeeze(-1)
