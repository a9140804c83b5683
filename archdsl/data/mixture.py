"""Several texts that are trained on in given shares.

Shapes: B sequences, T tokens, P rows of a period, N texts.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from archdsl.data.text_data import TextData
from archdsl.data.types import Batch, DataError, HeldOut, Split
from archdsl.errors import blamed_on, describe

SEPARATOR = " + "  # between the texts of a mixture that is written as one string
WEIGHT = re.compile(r"(.*[^:]):(\d{1,9}(?:\.\d{1,9})?)", re.DOTALL)
PREFIX = re.compile(r"(?:hf|skill):")  # the colon of these stands before no weight
LONGEST_PERIOD = 10_000  # rows; weights of four decimals have no longer one
MOST_TEXTS = 1000


class Weighted(NamedTuple):
    """A source, as `archdsl.load_data` takes it, and its weight."""

    source: str
    weight: Fraction


def parse_mixture(given: str | os.PathLike[str] | Sequence[Any]) -> list[Weighted]:
    """Returns the sources of a mixture and their weights; one alone is no mixture.

    ``given``: ``"a:0.8 + b:0.2"``, or a list of such parts or of pairs of a source and its weight.
    The weight stands after the last colon. What exists as a file or folder is one source as it is
    written, also with colons. Without any weight all are 1. Raises DataError if only some sources
    have a weight, if one is named twice, or if a weight is no number above zero.
    """
    if isinstance(given, str | os.PathLike):
        text = os.fspath(given)
        parts: Sequence[Any] = [text] if os.path.exists(text) else text.split(SEPARATOR)
    else:
        parts = given
    if not 1 <= len(parts) <= MOST_TEXTS:
        raise DataError(f"from 1 to {MOST_TEXTS:,} data can be mixed, got {len(parts):,}")
    found = [_weighted(part) for part in parts]
    without = [source for source, weight in found if weight is None]
    if 0 < len(without) < len(found):
        raise DataError(
            f"{without[0]!r} has no weight, while others have: give all of the data a weight, as "
            f"in {without[0]}:0.2, or none"
        )
    sources = [source for source, _ in found]
    if twice := next((source for source in sources if sources.count(source) > 1), None):
        raise DataError(f"{twice!r} is named twice: name it once, with a larger weight")
    return [Weighted(source, Fraction(1) if w is None else w) for source, w in found]


def _weighted(part: Any) -> tuple[str, Fraction | None]:
    match part:
        case (str() | os.PathLike() as source, int() | float() as weight):
            return _checked(os.fspath(source), str(weight))
        case str() | os.PathLike() if os.fspath(part):
            text = os.fspath(part)
            prefix = PREFIX.match(text)
            found = WEIGHT.fullmatch(text, prefix.end() if prefix else 0)
            if found is None or os.path.exists(text):
                return text, None
            return _checked(text[: found.end(1)], found[2])
    raise DataError(f"expected data, or a pair of data and a weight, got {describe(part)}")


def _checked(source: str, weight: str) -> tuple[str, Fraction]:
    if not source or not re.fullmatch(r"[\d.e+-]{1,30}", weight) or not float(weight) > 0:
        raise DataError(f"{source!r}: the weight must be a number above zero, got {weight}")
    return source, Fraction(weight)


@lru_cache(maxsize=4)
def turns(share_N: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns which text each row of a period is of, [P], and the rows of each before, [P+1, N].

    Text i has ``share_N[i]`` of the P rows. After any number n of rows it has had n share / P of
    them, to within one row: its row number j is taken from n = floor(j P / share) on, and before
    ceil((j + 1) P / share). Of the texts whose turn may come, the one whose turn must come first
    is taken, which is always possible (Baruah, Cohen, Plaxton and Varvel, Proportionate progress,
    Algorithmica 15, 1996; for one resource).
    """
    period = sum(share_N)
    had = [0] * len(share_N)
    row_P, before = np.empty(period, np.int64), np.zeros((period + 1, len(share_N)), np.int64)
    for n in range(period):
        may = [i for i, share in enumerate(share_N) if had[i] * period // share <= n]
        row_P[n] = chosen = min(may, key=lambda i: -(-(had[i] + 1) * period // share_N[i]))
        had[chosen] += 1
        before[n + 1] = had
    return row_P, before


@dataclass(frozen=True, eq=False)
class MixedData:
    """Texts that share every batch by their weights, all in tokens of one tokenizer.

    Row number n of the training is row number m of one of the texts, in the order in which that
    text alone would be trained on; n alone decides which text and which m (see `turns`).
    """

    parts: tuple[TextData, ...]
    weights: tuple[Fraction, ...]
    chance: None = None

    def __post_init__(self) -> None:
        """Raises DataError if the shares have no common period, or the tokenizers differ."""
        if (period := sum(self._shares)) > LONGEST_PERIOD:
            raise DataError(
                f"the weights {', '.join(map(_number, self.weights))} repeat only after {period:,} "
                f"sequences, more than {LONGEST_PERIOD:,}: round them, for example to percents"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles where the tokens of each text are."""
        return _mixed_or_none, (self.parts, self.weights)

    @cached_property
    def _shares(self) -> tuple[int, ...]:
        """The rows of each text in a period."""
        whole = math.lcm(*(weight.denominator for weight in self.weights))
        number_N = [int(weight * whole) for weight in self.weights]
        return tuple(number // math.gcd(*number_N) for number in number_N)

    @property
    def name(self) -> str:
        """See `Data.name`: as in ``a:0.8 + b:0.2``."""
        pairs = zip(self.parts, self.weights, strict=True)
        return SEPARATOR.join(f"{part.name}:{_number(weight)}" for part, weight in pairs)

    @property
    def vocab_size(self) -> int:
        """See `Data.vocab_size`."""
        return self.parts[0].vocab_size

    @property
    def fingerprint(self) -> str:
        """See `Data.fingerprint`: it is that of the texts and of their shares."""
        pairs = zip(self.parts, self._shares, strict=True)
        lines = [f"{part.fingerprint} {share}\n" for part, share in pairs]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def save_tokenizer(self, path: Path) -> None:
        """See `Data.save_tokenizer`."""
        self.parts[0].save_tokenizer(path)

    def bytes_per_token(self, split: Split) -> float:
        """See `Data.bytes_per_token`: the mean of the texts, by their shares."""
        of_each = [part.bytes_per_token(split) for part in self.parts]
        return float(np.average(of_each, weights=self._shares))

    def batch(self, index: int, batch_size: int, context: int, seed: int) -> Batch:
        """Returns ``batch_size`` windows of the training texts, [B, T]; each has its share.

        Each window of a text is used once per epoch of that text. Raises DataError if a text is
        shorter than one window.
        """
        row_P, _ = turns(self._shares)
        first = index * batch_size
        text_B = row_P[np.arange(first, first + batch_size) % len(row_P)]
        first_N = self._rows_before(first)
        tokens_BT = torch.empty(batch_size, context, dtype=torch.int64)
        targets_BT = torch.empty_like(tokens_BT)
        for number, part in enumerate(self.parts):
            place_b = torch.from_numpy(np.flatnonzero(text_B == number))
            if len(place_b):
                rows = part.rows(int(first_N[number]), len(place_b), context, seed)
                tokens_BT[place_b], targets_BT[place_b] = rows.tokens_BT, rows.targets_BT
        return Batch(tokens_BT, targets_BT)

    def _rows_before(self, row: int) -> NDArray[np.int64]:
        """Returns how many rows of each text stand before a row of the training, [N]."""
        _, before = turns(self._shares)
        periods, rest = divmod(row, len(before) - 1)
        return periods * np.array(self._shares) + before[rest]

    def held_out(
        self, split: HeldOut, batch_size: int, context: int, limit_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Yields windows [B, T] of all texts, spread evenly over each, in the shares of training.

        There are as many as the shortest text allows, or fewer with ``limit_tokens``. Raises
        DataError if a text is too short for its share of one window, or ``limit_tokens`` is
        below 1.
        """
        if limit_tokens is not None and limit_tokens < 1:
            raise DataError(f"limit_tokens must be at least 1, got {limit_tokens}")
        windows = min(self._windows(number, split, context) for number in range(len(self.parts)))
        if limit_tokens is not None:
            windows = min(windows, max(1, limit_tokens // context))
        for part, count in zip(self.parts, self._rows_before(windows), strict=True):
            if count:
                yield from part.held_out(split, batch_size, context, int(count) * context)

    def _windows(self, number: int, split: HeldOut, context: int) -> int:
        """Returns for how many windows of the mixture one of the texts has enough."""
        part, tokens = self.parts[number], self.parts[number].tokens[split]
        if not (own := (len(tokens) - 1) // context):
            with blamed_on("context"):
                raise DataError(
                    f"the {split} text of {part.name} has {len(tokens)} tokens, too few for a "
                    f"context of {context}"
                )
        return own * sum(self._shares) // self._shares[number]

    def summary(self) -> list[str]:
        """Returns lines that say the share of each text, and what is in it."""
        lines: list[str] = []
        for part, share in zip(self.parts, self._shares, strict=True):
            lines.append(f"{share / sum(self._shares):.4g} of the sequences: {part.name}")
            lines += [f"  {line}" for line in part.summary()]
        return lines


def _mixed_or_none(
    parts: tuple[TextData | None, ...], weights: tuple[Fraction, ...]
) -> MixedData | None:
    """Returns None if the tokens of a text are no longer in the cache."""
    found = tuple(part for part in parts if part is not None)
    return MixedData(found, weights) if len(found) == len(parts) else None


def _number(weight: Fraction) -> str:
    return f"{float(weight):.12g}"
