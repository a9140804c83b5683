"""Which windows are easy or hard, which tokens have the same loss, and deciles of the loss.

Shapes: W windows, T tokens, J deciles, N and M tokens of two windows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from archdsl.data.types import Batch
from archdsl.errors import ArchdslError

QUARTER = 4  # the easy and the hard windows are a quarter each
DECILES = 10
CALIPER = 0.05  # the largest difference of matched losses, as a share of the larger one

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Sample(NamedTuple):
    """The windows that are measured, in batches, and who of them is what, for all models alike.

    ``easy`` and ``hard``: the numbers of windows; those at the same place are a pair.
    ``decile_WT``: the decile of the loss of each token, from 0; -1 where there is no target.
    ``drawn_JWT``: for each decile True at one token of each window that has one.
    """

    batches: list[Batch]
    easy: Ints
    hard: Ints
    decile_WT: Ints
    drawn_JWT: Bools


def choose_sample(batches: list[Batch], loss_WT: Floats, name: str) -> Sample:
    """Divides windows into easy and hard ones, and tokens into deciles. Raises ArchdslError."""
    targets = int((~np.isnan(loss_WT)).sum())
    if len(loss_WT) < QUARTER or targets < DECILES:
        raise ArchdslError(
            f"{name} gives {len(loss_WT)} windows with {targets} targets in all: "
            f"at least {QUARTER} windows and {DECILES} targets are needed"
        )
    order_W = np.nanmean(loss_WT, axis=1).argsort(kind="stable")
    group = len(order_W) // QUARTER
    decile_WT = deciles(loss_WT)
    return Sample(batches, order_W[:group], order_W[-group:], decile_WT, _drawn(decile_WT))


def deciles(loss_WT: Floats) -> Ints:
    """The decile of each token's loss among all tokens, 0 to 9; -1 where the loss is NaN.

    Equal losses are in the order of the tokens, so that all deciles have equally many tokens, or
    one less.
    """
    flat = loss_WT.ravel()
    order = flat.argsort(kind="stable")[: int((~np.isnan(flat)).sum())]  # NaN comes last
    found = np.full(flat.shape, -1)
    found[order] = np.arange(len(order)) * DECILES // len(order)
    return found.reshape(loss_WT.shape)


def _drawn(decile_WT: Ints) -> Bools:
    """For each decile one token, drawn at random, of each window that has any, [J, W, T]."""
    key_WT = np.random.default_rng(0).random(decile_WT.shape)
    key_JWT = np.where(decile_WT == np.arange(DECILES)[:, None, None], key_WT, -1.0)
    highest_JW1 = key_JWT.max(-1, keepdims=True)
    return (key_JWT == highest_JW1) & (highest_JW1 >= 0)


def pairs_of_equal_loss(easy_N: Floats, hard_M: Floats) -> tuple[Ints, Ints]:
    """The places of as many pairs of nearly equal losses as there are, each loss in one at most.

    Losses are nearly equal if they differ by at most 5% of the larger one. NaN is in no pair.
    """
    order_N, order_M = (np.argsort(x)[: int((~np.isnan(x)).sum())] for x in (easy_N, hard_M))
    pairs, i, j = [], 0, 0
    while i < len(order_N) and j < len(order_M):
        a, b = easy_N[order_N[i]], hard_M[order_M[j]]
        if abs(a - b) <= CALIPER * max(a, b):
            pairs.append((order_N[i], order_M[j]))
            i, j = i + 1, j + 1
        elif a < b:
            i += 1
        else:
            j += 1
    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return first, second


def matched_tokens(sample: Sample, loss_WT: Floats) -> Bools:
    """True at the matched tokens, [W, T]."""
    found = np.zeros(loss_WT.shape, dtype=bool)
    for easy, hard in zip(sample.easy, sample.hard, strict=True):
        first, second = pairs_of_equal_loss(loss_WT[easy], loss_WT[hard])
        found[easy, first] = found[hard, second] = True
    return found
